"""The table of ablations builds, its arms run and go on after an interruption, and its arithmetic is that of a hand calculation."""
import csv
import json
import math
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

import ablations
import run
from data import DataError, encode_query, decode_response
from reward import sample_responses
from sft import load_model, open_run


def test_every_arm_builds():
    """Catches a setting that does not exist or that another forbids, an arm that is the default, and arms that no post would pair."""
    names = [a.name for a in ablations.ABLATIONS]
    assert len(set(names)) == len(names) and all(a.more in ablations.MEASURES or not a.more for a in ablations.ABLATIONS)
    for a in ablations.ABLATIONS:
        for quick in (False, True):
            start, default = ablations.arm_settings(a, {}, quick)
            assert start == ("test" if quick else a.preset) and default == run.preset(start)
            for changes in a.arms:
                settings = ablations.arm_settings(a, changes, quick)[1]
                assert settings != default and settings.data == default.data and settings.model == default.model, changes
                assert settings.ppo.iterations <= 2 and settings.sft.epochs <= 2 and settings.reward.epochs <= 2 or not quick
        assert len({ablations.label(changes) for changes in [{}, *a.arms]}) == 1 + len(a.arms)
    assert ablations.label({"ppo.beta": 0.1, "ppo.tf_adam": True, "ppo.value": "shared"}) == "ppo.beta=0.1,ppo.tf_adam=true,ppo.value=shared"
    with pytest.raises(DataError, match="kl must be"):
        ablations.arm_settings(a, {"ppo.kl": "none"})


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """One ablation of the test preset: stopped before its arm, the same command again, and once more. -> folder, what each printed"""
    out, printed, real = tmp_path_factory.mktemp("ablations"), [], ablations.run_pipeline
    mine = ablations.Ablation("mine", "Nobody 2000 §1", "nothing", [{"ppo.beta": 0.5}], "pretraining")

    def stops(settings, seed, folder, name, base, device):
        if base is not None:
            raise KeyboardInterrupt
        real(settings, seed, folder, name, base, device=device)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ablations, "ABLATIONS", [mine])
        for pipeline in (stops, real, stops):
            patch.setattr(ablations, "run_pipeline", pipeline)
            patch.setattr("builtins.print", lambda *a, **_: printed.append(" ".join(map(str, a))))
            try:
                ablations.main(["mine", "--quick", "--seeds", "3", "--out", str(out), "--device", "cpu"])
            except KeyboardInterrupt:
                printed.append("STOPPED")
    return out, "\n".join(printed)


def test_an_interrupted_command_goes_on_and_repeats_nothing(done):
    out, printed = done
    assert [line for line in printed.splitlines() if "done before" in line and "runs" in line] == [
        f"2 runs, {n} of them done before" for n in (0, 1, 2)]
    assert printed.count("STOPPED") == 1  # the third command runs nothing
    assert f"from {out}/test-seed3/default: data, pretrain, sft, collect, reward\n" in printed
    assert sorted(f.name for f in (out / "test-seed3").iterdir()) == ["default", "ppo.beta=0.5"]


def test_the_table_says_what_the_runs_say(done):
    """Catches rows and columns of another arm or policy."""
    out, printed = done
    rows = {row["arm"]: row for row in csv.DictReader((out / "table.csv").open())}
    assert list(rows) == ["SFT", "default", "ppo.beta=0.5"]
    for arm, folder, policy in (("SFT", "default", "sft"), ("default", "default", "ppo"), ("ppo.beta=0.5", "ppo.beta=0.5", "ppo")):
        results = json.loads((out / "test-seed3" / folder / "report" / "results.json").read_text())
        said, row = results["policies"][policy], rows[arm]
        assert float(row["gold win rate"]) == pytest.approx(100 * said["gold_win_rate"]) and int(row["n"]) == 12 and row["seeds"] == "3"
        assert (float(row["KL"]), float(row["length"])) == pytest.approx((said["kl"], said["length"])) and not row.get("KL sd")
        assert results["settings"]["seed"] == 3 and results["settings"]["settings"]["ppo"]["beta"] == (0.5 if folder != "default" else 0.05)
    assert len({row["KL"] for row in rows.values()}) == 3 == len({row["pretraining loss"] for row in rows.values()})
    page = (out / "table.md").read_text()
    assert "## mine" in page and "Nobody 2000 §1: nothing." in page and "| ppo.beta=0.5 | 3 | 12 |" in page and "ppo.beta=0.5" in printed


def test_what_other_settings_made_is_not_done(done):
    """Catches a table of runs that an older version of the presets made."""
    folder, settings = str(done[0] / "test-seed3" / "default"), run.preset("test")
    assert ablations.finished(folder, settings)
    settings.ppo.lr *= 2
    assert not ablations.finished(folder, settings) and not ablations.finished(str(done[0]), settings)


def test_pretraining_loss_is_of_that_policy_on_posts_nobody_saw(done):
    folder = str(done[0] / "test-seed3" / "default")
    seen, real = [], ablations.encode_posts

    def encode(enc, posts, *lengths):
        seen.extend(posts)
        return real(enc, posts, *lengths)
    losses = {}
    for policy in ("sft", "ppo"):
        (done[0] / "test-seed3" / "default" / policy / "pretraining_loss.json").unlink()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ablations, "encode_posts", encode)
            losses[policy] = ablations.pretraining_loss(folder, policy, "cpu")["pretraining loss"]
    trained = {post["post"] for split in os.listdir(os.path.join(folder, "data")) if split.endswith(".jsonl")
               for post in open_run(folder).posts[split[:-6]]}
    assert len(seen) == 24 and not trained & {post["post"] for post in seen} and len({post["subreddit"] for post in seen}) > 3
    assert 5 < losses["sft"] < 8 and losses["sft"] != losses["ppo"]
    assert ablations.pretraining_loss(folder, "sft", "cpu")["pretraining loss"] == losses["sft"]  # from its file


def test_reward_fit_by_hand(done):
    """Catches train and held-out swapped, and a loss of the wrong sign."""
    assert ablations.margin_fit(np.array([0, math.log(3), -math.log(3)])) == pytest.approx(
        {"loss": (math.log(2) + math.log(4 / 3) + math.log(4)) / 3, "accuracy": 0.5})
    folder = done[0] / "test-seed3" / "default"
    fit = ablations.reward_fit(str(folder), "ppo", "cpu")
    held_out = [json.loads(line)["margin"] for line in (folder / "reward" / "held_out.jsonl").open()]
    train = json.loads((folder / "reward" / "train_margins.json").read_text())
    splits = [json.loads(line)["split"] for line in (folder / "comparisons.jsonl").open()]
    assert (len(train), len(held_out)) == (splits.count("train"), splits.count("valid")) and len(train) != len(held_out)
    assert fit["train loss"] == pytest.approx(sum(math.log(1 + math.exp(-m)) for m in train) / len(train))
    assert fit["held-out loss"] == pytest.approx(sum(math.log(1 + math.exp(-m)) for m in held_out) / len(held_out))
    assert fit["held-out accuracy"] == pytest.approx(sum(m > 0 for m in held_out) / len(held_out))


def test_steered_kl_by_hand(monkeypatch):
    """Catches the first fifth, a mean over all, and a ratio upside down."""
    rows = [{"kl": float(i), "beta": i / 100} for i in range(11)]
    monkeypatch.setattr(ablations, "read_metrics", lambda folder: rows)
    for kl in ("adaptive", "fixed"):
        monkeypatch.setattr(ablations, "open_run", lambda _: SimpleNamespace(config={"settings": {"ppo": {"kl": kl, "kl_target": 5.0}}}))
        said = ablations.steered_kl("x", "ppo", "cpu")
        assert said == {"KL of the last fifth": 9.5, "last β": 0.1} | ({"KL / target": 1.9} if kl == "adaptive" else {})
    assert ablations.steered_kl("x", "sft", "cpu") == {}


def test_sft_epochs_are_in_order(done, tmp_path, monkeypatch):
    """Catches epochs mixed up and a judge that hears another post's summary."""
    shutil.copytree(done[0] / "test-seed3" / "default", tmp_path / "run", ignore=shutil.ignore_patterns("ppo", "reward", "evaluation"))
    folder = tmp_path / "run"
    assert ablations.sft_epochs(str(folder), "ppo", "cpu") == {}
    for epoch, source in ((1, "pretrained"), (2, "sft")):
        shutil.copytree(folder / source, folder / "sft" / f"epoch-{epoch}")
    (folder / "sft" / "chosen.json").write_text(json.dumps({"epoch": 2, "scores": {"1": -1.0, "2": 3.0}, "losses": {"1": 5.0, "2": 6.0}}))
    utility = lambda post, text: sum(map(ord, post["title"] + text)) % 9  # the world's own is low for all that these models say
    monkeypatch.setattr(ablations.world, "utility", utility)
    r, rates = open_run(str(folder)), []
    posts = r.posts["valid"] = r.posts["valid"][:40]
    monkeypatch.setattr(ablations, "open_run", lambda _: r)
    said = ablations.sft_epochs(str(folder), "ppo", "cpu")
    for epoch in (1, 2):
        model = load_model(str(folder / "sft" / f"epoch-{epoch}"), "cpu")
        texts = [decode_response(r.enc, ids) for ids in sample_responses(model, [encode_query(r.enc, p, r.Q) for p in posts], r.R, 0, None)]
        pairs = [(utility(p, t), utility(p, p["summary"])) for p, t in zip(posts, texts)]
        rates.append(100 * sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs) / len(posts))
    assert rates[0] != rates[1]
    assert said == {"chosen epoch": 2.0, "held-out loss by epoch": [5.0, 6.0], "score by epoch": [-1.0, 3.0],
                    "gold win rate by epoch": pytest.approx(rates)}


def test_arm_row_by_hand():
    """Catches unpaired differences, a population's standard deviation, a sign, seeds that the default lacks."""
    arm = {2: {"wins": [1, 1, 0, 1], "KL": 4.0, "list": [1.0, 2.0]}, 1: {"wins": [.5, 0, 1, 1], "KL": 2.0, "list": [3.0, 6.0]},
           7: {"wins": [0, 0, 0, 0], "KL": 9.0, "list": [0.0, 0.0]}}
    default = {1: {"wins": [0, 0, 1, 0], "KL": 1.0}, 2: {"wins": [0, 1, 0, 1], "KL": 1.0}}
    row = ablations.arm_row(arm, default)
    assert (row["seeds"], row["n"], row["by seed"]) == ([1, 2], 8, [62.5, 75.0])
    assert (row["gold win rate"], row["gold win rate sd"]) == pytest.approx((68.75, 12.5 / math.sqrt(2)))
    assert row["difference by seed"] == [37.5, 25.0] and row["minus default"] == pytest.approx(31.25)
    assert (row["KL"], row["KL sd"], row["list"], row["list sd"]) == (3.0, pytest.approx(math.sqrt(2)), [2.0, 4.0], None)
    draws = np.random.default_rng(1).integers(0, 8, (4000, 8))  # the differences, posts drawn again
    expected = np.percentile(np.array([50, 0, 0, 100, 100, 0, 0, 0])[draws].mean(1), [2.5, 97.5])
    assert (row["from"], row["to"]) == pytest.approx(expected, abs=7)
    one = ablations.arm_row({1: arm[1]}, default)
    assert one["KL sd"] is None and one["gold win rate"] == 62.5
    assert ablations.arm_row(default, default)["to"] == 0


def test_a_pair_is_worth_more_than_two_samples():
    """Catches an interval of unpaired samples: arms that agree on all but one post of a hundred."""
    wins = [float(i % 3 == 0) for i in range(100)]
    row = ablations.arm_row({1: {"wins": [1.0, 1.0, *wins[2:]], "KL": 1.0}}, {1: {"wins": wins, "KL": 1.0}})
    assert row["minus default"] == pytest.approx(1) and 0 <= row["from"] and row["to"] <= 4


@pytest.mark.parametrize("args, says", [(["nonsense"], "kl-coefficient"), (["--seeds", "one"], "--seeds"), (["--seeds", ""], "--seeds")])
def test_bad_arguments_are_one_sentence(args, says, tmp_path):
    with pytest.raises(DataError, match=says):
        ablations.main([*args, "--out", str(tmp_path / "new")])
    assert not (tmp_path / "new").exists()


def test_the_command_is_part_of_run(monkeypatch, capsys):
    """python run.py ablations --list, which runs nothing."""
    monkeypatch.setattr("sys.argv", ["run.py", "ablations", "ptx", "--list"])
    run.main()
    said = capsys.readouterr().out
    assert said.startswith("ptx  (InstructGPT") and "ppo.ptx_coef=1.0" in said and "kl-coefficient" not in said
