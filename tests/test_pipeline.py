"""End to end: the `test` preset goes through every stage in seconds; bad input ends in one sentence and status 2."""
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_model
from safetensors.torch import load_file

import run
from data import DataError, encode_query
from reward import sample_responses
from sft import load_model

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def script(*args, cwd=ROOT):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, os.path.join(ROOT, args[0]), *map(str, args[1:])], cwd=cwd, env=env, text=True,
                          capture_output=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of the test preset, and what it printed."""
    out = tmp_path_factory.mktemp("runs") / "one"
    done = script("run.py", "--preset", "test", "--out", out, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def refused(done, *says):
    """One sentence, status 2, no traceback."""
    assert done.returncode == 2, done.stdout + done.stderr
    lines = [line for line in done.stderr.strip().splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
    for word in says:
        assert word in lines[0], lines[0]


def test_results_have_every_field(finished):
    out, printed = finished
    results = json.loads((out / "report" / "results.json").read_text())
    assert set(results) == {"settings", "seconds", "peak_rss_mb", "reward_model", "policies"}
    assert {"accuracy", "accuracy_ci", "labeler_ceiling", "longer_wins", "n"} <= set(results["reward_model"])
    assert set(results["policies"]) == {"reference", "lead3", "pretrained", "sft", "best_of_n", "ppo"}
    for name, p in results["policies"].items():
        assert {"gold_win_rate", "gold_win_rate_ci", "gold_win_rate_length_controlled", "rm_win_rate", "gold_utility", "rm_score", "kl",
                "length", "no_eos", "n"} <= set(p)
        assert (p["kl"] is None) == (name in ("reference", "lead3")) and p["n"] == 12
        assert p["gold_win_rate_ci"][0] <= p["gold_win_rate"] <= p["gold_win_rate_ci"][1]
    assert results["policies"]["reference"]["gold_win_rate"] == 0.5 and results["policies"]["sft"]["kl"] == 0
    assert results["seconds"]["total"] == pytest.approx(sum(t for k, t in results["seconds"].items() if k != "total"))
    for file in ("report.md", "win_rates.png", "reward.png", "training.png", "ppo.png", "policies.csv"):
        assert (out / "report" / file).stat().st_size > 200 and file.split(".")[0] in printed + (out / "report" / "report.md").read_text() + file


def test_ppo_starts_at_the_reference(finished):
    """KL 0 and ratio 1 at the first iteration, in whatever precision this machine runs."""
    first = json.loads((finished[0] / "ppo" / "metrics.jsonl").read_text().splitlines()[0])
    assert abs(first["kl"]) < 1e-3 and abs(first["kl_k1"]) < 1e-3 and first["first_log_ratio"] < 5e-2


def test_every_model_has_its_vocabulary(finished):
    """Catches a model folder that transformers loads and cannot read texts for."""
    hf = pytest.importorskip("transformers")
    from sft import open_run
    enc, folders = open_run(str(finished[0])).enc, sorted(file.parent for file in finished[0].rglob("model.safetensors"))
    assert [str(f.relative_to(finished[0])) for f in folders] == ["ppo", "ppo/value", "pretrained", "reward", "sft"]
    for folder in folders:
        tokenizer = hf.AutoTokenizer.from_pretrained(folder)
        assert tokenizer("my cat ran away.")["input_ids"] == enc.encode_ordinary("my cat ran away.")
        assert tokenizer.eos_token_id == enc.n_vocab - 1 == hf.AutoConfig.from_pretrained(folder).eos_token_id


def test_same_command_again_repeats_nothing(finished):
    out, _ = finished
    before = {f: (out / f).stat().st_mtime_ns for _, f, _ in run.STAGES}
    again = script("run.py", "--preset", "test", "--out", out, "--device", "cpu")
    assert again.returncode == 0 and again.stdout.count("done before") == len(run.STAGES)
    assert before == {f: (out / f).stat().st_mtime_ns for _, f, _ in run.STAGES}


def test_a_lost_stage_is_made_again_bit_for_bit(finished, tmp_path):
    """Every stage draws from its own seeds: the policy comes out the same after PPO is repeated alone."""
    out = tmp_path / "copy"
    shutil.copytree(finished[0], out)
    shutil.rmtree(out / "ppo")
    assert script("run.py", "--preset", "test", "--out", out, "--device", "cpu").returncode == 0
    a, b = (load_file(folder / "ppo" / "model.safetensors") for folder in (finished[0], out))
    assert all((a[k] == b[k]).all() for k in a)


def test_ppo_resumes_bit_for_bit(finished, tmp_path):
    """Two iterations at once equal one, a crash, and the second from state.pt."""
    import ppo
    from sft import open_run
    r = open_run(str(finished[0]))
    s = ppo.PPOSettings(**r.config["settings"]["ppo"])
    args = (str(finished[0]), r.enc, r.posts["pretrain"], r.Q, r.R, s)
    ppo.train_ppo(*args, str(tmp_path / "whole"), 1, "cpu", save_every=1)
    real, calls = ppo.rollout, []

    def crashes(*a):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*a)
    ppo.rollout = crashes
    try:
        with pytest.raises(KeyboardInterrupt):
            ppo.train_ppo(*args, str(tmp_path / "parts"), 1, "cpu", save_every=1)
    finally:
        ppo.rollout = real
    ppo.train_ppo(*args, str(tmp_path / "parts"), 1, "cpu", save_every=1)
    for part in (".", "value"):
        a, b = (load_file(tmp_path / run / part / "model.safetensors") for run in ("whole", "parts"))
        assert all((a[k] == b[k]).all() for k in a)
    metrics = [[{k: v for k, v in json.loads(line).items() if k != "tokens_per_second"} for line in (tmp_path / run / "metrics.jsonl").open()]
               for run in ("whole", "parts")]
    assert metrics[0] == metrics[1]
    assert (tmp_path / "whole" / "samples.jsonl").read_text() == (tmp_path / "parts" / "samples.jsonl").read_text()


def test_evaluation_measures_again_from_saved_samples(finished, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(finished[0], out)
    before = json.loads((out / "report" / "results.json").read_text())
    assert script("evaluation.py", out).returncode == 0
    after = json.loads((out / "report" / "results.json").read_text())
    assert before == after


@pytest.mark.parametrize("name", ["sft", "reward", "ppo"])
def test_each_script_runs_alone(finished, tmp_path, name):
    done = script(f"{name}.py", finished[0], "--out", tmp_path / "alone", "--device", "cpu", "--lr", "1e-4")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "alone" / "model.safetensors").exists() and str(tmp_path / "alone") in done.stdout
    assert (tmp_path / "alone" / "merges.txt").read_text() == (finished[0] / "sft" / "merges.txt").read_text()
    refused(script(f"{name}.py", finished[0], "--out", tmp_path / "alone", "--device", "cpu"), "already holds")


@pytest.mark.parametrize("name", ["run", "sft", "reward", "ppo", "evaluation"])
def test_help(name):
    done = script(f"{name}.py", "--help")
    assert done.returncode == 0 and "References" in done.stdout or name == "run" and "--ppo.beta" in done.stdout


def test_another_configuration_is_refused_by_name(finished):
    out, _ = finished
    refused(script("run.py", "--preset", "test", "--out", out, "--ppo.beta", "0.5", "--device", "cpu"), "ppo.beta", "0.05", "0.5")
    refused(script("run.py", "--preset", "test", "--out", out, "--seed", "9", "--device", "cpu"), "seed")
    refused(script("run.py", "--preset", "test", "--out", out / "data", "--device", "cpu"), "not empty")
    assert (out / "ppo" / "model.safetensors").exists()


@pytest.mark.parametrize("args, says", [
    (["--nonsense", "1"], ["--nonsense"]), (["--ppo.beta", "-1"], ["beta"]), (["--ppo.lr", "nan"], ["lr"]), (["--sft.batch", "0"], ["batch"]),
    (["--model.n_embd", "33"], ["n_embd"]), (["--model.vocab_size", "10"], ["vocab_size"]), (["--preset", "huge"], ["huge"]),
    (["--ppo.epochs", "many"], ["many"]), (["--collect.flipped", "perhaps"], ["perhaps"]), (["--device", "abacus"], ["abacus"]),
    (["--posts", "README.md"], ["--comparisons"]), (["--posts", "x.jsonl", "--comparisons", "y.jsonl"], ["y.jsonl does not exist"]),
    (["--out", "/dev/null/run"], ["/dev/null"]), (["--reward.loss", "kwise"], ["collect.labels rank"]),
    (["--pretrain.choose", "reward"], ["pretrain.choose"]), (["--ppo.value", "both"], ["value", "shared"])])
def test_bad_settings_are_one_sentence(tmp_path, args, says):
    refused(script("run.py", "--preset", "test", *(["--out", tmp_path / "new"] if "--out" not in args else []), *args), *says)


def real_files(folder, posts=40):
    """Small files in OpenAI's formats, as people would bring them: empty posts, long texts, several comparisons of a post."""
    p, c = folder / "posts.jsonl", folder / "comparisons.jsonl"
    rows = [{"id": f"t3_{i}", "subreddit": "tifu", "title": f"a post about number {i}", "post": f"this is story {i}. " * (1 + 40 * (i % 7 == 0)),
             "summary": f"story {i} " * (1 + 60 * (i == 3))} for i in range(posts)] + [{"subreddit": "x", "title": "y", "post": "", "summary": ""}]
    p.write_text("".join(json.dumps(r) + "\n" for r in rows))
    c.write_text("".join(json.dumps({
        "info": {k: rows[i % 20][k] for k in ("id", "subreddit", "title", "post")}, "choice": i % 2, "worker": "w", "split": "valid2",
        "summaries": [{"text": f" first {i}", "policy": "a"}, {"text": f" second one {i}", "policy": "ref"}], "extra": {"confidence": i % 9}}) + "\n"
        for i in range(40)))
    return p, c


def test_real_files_go_through_every_stage(tmp_path):
    posts, comparisons = real_files(tmp_path)
    done = script("run.py", "--preset", "test", "--posts", posts, "--comparisons", comparisons, "--out", tmp_path / "out", "--device", "cpu",
                  "--model.max_response", 0)
    assert done.returncode == 0, done.stderr
    assert "40 posts, 1 more skipped" in done.stdout
    results = json.loads((tmp_path / "out" / "report" / "results.json").read_text())
    assert results["policies"]["ppo"]["gold_win_rate"] is None and results["reward_model"]["labeler_ceiling"] is None
    assert results["policies"]["ppo"]["rm_win_rate"] is not None
    split = {}
    for line in (tmp_path / "out" / "comparisons.jsonl").open():
        row = json.loads(line)
        assert split.setdefault(row["info"]["id"], row["split"]) == row["split"]  # a post is never on both sides


def test_bad_files_are_one_sentence_and_lose_nothing(tmp_path):
    posts, comparisons = real_files(tmp_path)
    lines = comparisons.read_text().splitlines()
    broken, file = "\n".join(lines[:7] + [lines[7].replace('"choice": 1', '"choice": 5')]), tmp_path / "bad.jsonl"
    args = ["--preset", "test", "--posts", posts, "--out", tmp_path / "out", "--device", "cpu", "--comparisons", file]
    file.write_text(broken)
    refused(script("run.py", *args), "bad.jsonl:8", "choice")
    assert not (tmp_path / "out" / "pretrained").exists()  # before any work
    file.write_text("\n".join(lines))
    assert script("run.py", *args).returncode == 0  # the same folder serves once the file is mended
    (tmp_path / "out" / "comparisons.jsonl").unlink()
    file.write_text(broken)
    refused(script("run.py", *args), "bad.jsonl:8", "choice")
    assert (tmp_path / "out" / "sft" / "model.safetensors").exists()  # what came before is kept
    (tmp_path / "few.jsonl").write_text("\n".join(posts.read_text().splitlines()[:3]))
    refused(script("run.py", "--preset", "test", "--posts", tmp_path / "few.jsonl", "--comparisons", comparisons, "--out", tmp_path / "b"), "at least 8")


def test_checkpoint_of_another_shape_is_one_sentence(finished, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(finished[0], out)
    shutil.rmtree(out / "ppo")
    config = json.loads((out / "sft" / "config.json").read_text())
    (out / "sft" / "config.json").write_text(json.dumps({**config, "n_embd": 64}))
    refused(script("run.py", "--preset", "test", "--out", out, "--device", "cpu"), "shape")
    (out / "sft" / "model.safetensors").write_bytes(b"not a model")
    refused(script("run.py", "--preset", "test", "--out", out, "--device", "cpu"), "sft")


def options(text):
    return [word for setting in text.split() for word in ("--" + setting).split("=")]


def test_choices_as_in_ziegler_go_through_every_stage(tmp_path):
    """Best of four, gain and bias, a shared value head, adaptive KL, whitened rewards, truncation at '.', TensorFlow's Adam."""
    out = tmp_path / "out"
    done = script("run.py", "--preset", "test", "--out", out, "--device", "cpu", *options(
        "collect.labels=best_of reward.loss=best_of reward.normalise=gain_bias ppo.value=shared ppo.kl=adaptive ppo.kl_horizon=50 "
        "ppo.whiten_rewards=true ppo.stop_token=. ppo.truncate_after=4 ppo.tf_adam=true ppo.adam_eps=1e-5 ppo.adam_beta2=0.999"))
    assert done.returncode == 0, done.stderr
    better = {}
    for line in (out / "comparisons.jsonl").open():
        row = json.loads(line)
        better.setdefault(row["info"]["id"], []).append(row["summaries"][row["choice"]]["text"])
    assert len(better) == 24 and all(len(texts) <= 3 and len(set(texts)) == 1 for texts in better.values())
    assert "score.weight" not in load_file(out / "ppo" / "model.safetensors") and "score.weight" in load_file(out / "ppo" / "value" / "model.safetensors")
    rows = [json.loads(line) for line in (out / "ppo" / "metrics.jsonl").open()]
    assert rows[1]["beta"] == pytest.approx(rows[0]["beta"] * (1 - 0.2 * 8 / 50))


def test_choices_as_in_instructgpt_go_through_every_stage(tmp_path):
    """Rankings of five, the K-wise loss, dropout, the SFT checkpoint that the reward model chooses, PPO-ptx, averaging."""
    out = tmp_path / "out"
    args = ("run.py", "--preset", "test", "--out", out, "--device", "cpu", *options(
        "sft.epochs=3 sft.lr=5e-3 sft.dropout=0.2 sft.choose=reward collect.labels=rank collect.k=5 collect.tie=0.5 reward.loss=kwise "
        "ppo.ptx_coef=1 ppo.ptx_ratio=2 ppo.ema=0.9"))
    done = script(*args)
    assert done.returncode == 0, done.stderr
    chosen = json.loads((out / "sft" / "chosen.json").read_text())
    pairs = Counter(json.loads(line)["info"]["id"] for line in (out / "comparisons.jsonl").open())
    assert 6 < max(pairs.values()) <= 10 and min(pairs.values()) < 10  # five samples, not four; and some of them tie
    assert chosen["scores"][str(chosen["epoch"])] == max(chosen["scores"].values()) and set(chosen["losses"]) == set("123")
    a, b = (load_file(out / "sft" / name / "model.safetensors") for name in (".", f"epoch-{chosen['epoch']}"))
    assert all((a[k] == b[k]).all() for k in a)
    assert all("ptx_loss" in json.loads(line) for line in (out / "ppo" / "metrics.jsonl").open())
    again = script(*args)
    assert again.returncode == 0 and again.stdout.count("done before") == len(run.STAGES) and "chooses" in done.stdout


def test_the_reward_model_chooses_the_checkpoint(enc, tmp_path):
    """Catches the worst taken for the best, another epoch's weights, and samples scored for another prompt: each checkpoint's samples once
    more, scored one by one."""
    for epoch in (1, 2, 3):
        model = tiny_model(seed=epoch, vocab_size=enc.n_vocab, n_positions=90)
        with torch.no_grad():
            model.wte.weight[epoch] += 5 * model.ln_f.bias  # a favourite token, so that their samples differ
        model.save_pretrained(tmp_path / "sft" / f"epoch-{epoch}")
    tiny_model("scalar", vocab_size=enc.n_vocab, n_positions=90).save_pretrained(tmp_path / "reward")
    posts = [{"subreddit": "x", "title": "a dog", "post": f"my {'cat ' * i}ate."} for i in range(9)]
    r = SimpleNamespace(folder=str(tmp_path), enc=enc, posts={"valid": posts}, Q=80, R=6, seed=1, device="cpu", settings=run.preset("test"))
    r.settings.sft.epochs = 3
    run.choose_sft(r)
    chosen = json.loads((tmp_path / "sft" / "chosen.json").read_text())
    reward_model, queries = load_model(str(tmp_path / "reward"), "cpu", "scalar"), [encode_query(enc, p, 80) for p in posts]
    scores = []
    for epoch in (1, 2, 3):
        samples = sample_responses(load_model(str(tmp_path / "sft" / f"epoch-{epoch}"), "cpu"), queries, 6, 0.7, torch.Generator().manual_seed(1))
        rows = [torch.tensor([q + s]) for q, s in zip(queries, samples)]
        with torch.no_grad():
            scores.append(sum(reward_model.scores(row, torch.tensor([row.shape[1]])).item() for row in rows) / 9)
    assert [chosen["scores"][e] for e in "123"] == pytest.approx(scores, abs=.02)  # bf16, in batches of another shape
    assert max(scores) - min(scores) > .1 and scores[chosen["epoch"] - 1] == max(scores)
    a, b = (load_file(tmp_path / "sft" / name / "model.safetensors") for name in (".", f"epoch-{chosen['epoch']}"))
    assert all((a[k] == b[k]).all() for k in a)


def test_every_preset_builds_and_validates():
    for name in run.PRESETS:
        assert run.preset(name).ppo.beta > 0
    with pytest.raises(DataError, match="iterations"):
        s = run.preset("tiny").ppo
        s.iterations = 0
        s.validate()


def test_a_stage_alone_does_not_mix_settings(finished, tmp_path):
    """A folder begun with another β is refused before anything is trained."""
    (tmp_path / "alone").mkdir()
    settings = json.loads((finished[0] / "config.json").read_text())["settings"]["ppo"]
    (tmp_path / "alone" / "settings.json").write_text(json.dumps({"seed": 1, **settings}))
    refused(script("ppo.py", finished[0], "--out", tmp_path / "alone", "--beta", "0.5", "--device", "cpu"), "beta", "0.5")
    assert not (tmp_path / "alone" / "state.pt").exists()


def test_ppo_takes_its_prompts_from_the_task(finished):
    """Other subreddits are for pretraining only."""
    import world
    samples = [json.loads(line) for line in (finished[0] / "ppo" / "samples.jsonl").open()]
    assert samples and all(any(f"r/{name}\n" in s["query"] for name in world.SUBREDDITS) for s in samples)


@pytest.mark.parametrize("bad, says", [(["--ppo.stop_token", "no such token"], "ppo.stop_token"), (["--ppo.truncate_after", "48"], "truncate_after")])
def test_what_a_late_stage_would_refuse_is_refused_first(tmp_path, bad, says):
    """Catches minutes of pretraining that end in a refusal, in a folder that then refuses the corrected command too."""
    out = tmp_path / "run"
    refused(script("run.py", "--preset", "test", "--device", "cpu", "--out", out, *bad), says)
    assert not (out / "pretrained").exists() and not (out / "config.json").exists()


def test_a_policy_judged_alone_gets_the_row_it_has_in_the_run(finished):
    """Catches the wrong policy, posts, reward model or row: the SFT model in PPO's place gets SFT's numbers, at KL 0."""
    out, _ = finished
    done = script("evaluation.py", out, "--policy", out / "sft", "--device", "cpu")
    rows = {line.split("  ")[0]: line.split()[1:] for line in done.stdout.splitlines() if line.startswith(("SFT", "PPO"))}
    assert done.returncode == 0 and rows["PPO"] == rows["SFT"], done.stdout + done.stderr
    assert "0.0" in rows["PPO"]
    assert not (out / "sft" / "report").exists()


def test_an_interrupted_stage_has_cost_its_time(tmp_path, monkeypatch):
    """Catches seconds lost by an interruption, and seconds of an earlier run of a stage that begins anew."""
    clock = iter([0., 5., 10., 12., 20., 21.])
    monkeypatch.setattr(run, "time", SimpleNamespace(time=lambda: next(clock)))

    def interrupted(_):
        raise KeyboardInterrupt
    of = SimpleNamespace(folder=str(tmp_path), enc=None)
    monkeypatch.setattr(run, "STAGES", [("sft", "sft/model.safetensors", interrupted)])
    interrupted.__doc__ = "A stage."
    with pytest.raises(KeyboardInterrupt):
        run.run_stages(of)
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "state.pt").touch()
    stage = lambda _: None
    stage.__doc__ = "A stage."
    monkeypatch.setattr(run, "STAGES", [("sft", "sft/model.safetensors", stage)])
    assert run.run_stages(of) == ({"sft": 7.}, True)  # 5 before the interruption, 2 after
    (tmp_path / "sft" / "state.pt").unlink()
    assert run.run_stages(of) == ({"sft": 1.}, True)


def test_labeler_settings_do_not_go_with_human_labels(tmp_path):
    posts, comparisons = real_files(tmp_path)
    refused(script("run.py", "--posts", posts, "--comparisons", comparisons, "--collect.noise", "2", "--out", tmp_path / "o"), "--collect")
    assert not (tmp_path / "o").exists()


def test_a_base_gives_the_stages_whose_settings_are_the_same(finished, tmp_path):
    out, _ = finished
    done = script("run.py", "--preset", "test", "--base", out, "--out", tmp_path / "b", "--ppo.beta", 0.5, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert f"from {out}: data, pretrain, sft, collect, reward\n" in done.stdout
    for name in ("pretrained", "sft", "reward", "ppo"):
        files = [(folder / name / "model.safetensors").read_bytes() for folder in (out, tmp_path / "b")]
        assert (files[0] == files[1]) == (name != "ppo"), name
    refused(script("run.py", "--preset", "test", "--base", tmp_path / "no", "--out", tmp_path / "c"), "is not the folder of a run")
    assert not (tmp_path / "c").exists()


def test_which_stages_a_base_shares(finished):
    out, _ = finished
    old = json.loads((out / "config.json").read_text())

    def shared(seed=None, **changes):
        new = json.loads(json.dumps({**old, "seed": seed or old["seed"]}))
        for key, value in changes.items():
            part, name = key.split("__")
            assert new["settings"][part][name] != value
            new["settings"][part][name] = value
        return run.same_stages(out, old, new)

    names = [name for name, _, _ in run.STAGES]
    assert shared() == names
    assert shared(seed=9) == ["data", "pretrain", "sft"]  # one base for many seeds of comparisons, reward model and PPO
    assert shared(model__n_layer=3) == shared(data__test=13) == shared(collect__posts=17) == []
    assert shared(pretrain__lr=1.0) == names[:1] and shared(sft__lr=1.0) == names[:2] and shared(collect__noise=2.0) == names[:3]
    assert shared(reward__lr=1.0) == names[:4] and shared(ppo__beta=1.0) == names[:5] and shared(evaluation__best_of=3) == names[:6]
    assert run.same_stages(out, {**old, "posts": "other.jsonl"}, old) == []
    chosen = json.loads(json.dumps(old))
    chosen["settings"]["sft"]["choose"] = "reward"  # then the SFT model depends on the reward model
    other = json.loads(json.dumps(chosen))
    other["settings"]["reward"]["lr"] = 1.0
    assert run.same_stages(out, chosen, chosen) == names and run.same_stages(out, chosen, other) == names[:2]
