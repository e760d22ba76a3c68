"""End to end: the `test` preset goes through every stage in seconds; bad input ends in one sentence and status 2."""
import importlib
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
from data import DataError, decode_response, encode_query
from reward import CollectSettings, sample_responses, score_groups, split_comparisons
from sft import load_model, open_run

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
    assert {"accuracy", "accuracy_ci", "noise_free_judge", "longer_wins", "n"} <= set(results["reward_model"])
    assert set(results["policies"]) - {"in_context"} == {"reference", "lead3", "pretrained", "sft", "sft_sampled", "best_of_n", "ppo"}  # room permitting
    for name, p in results["policies"].items():
        if name == "in_context" and p is None:
            continue
        assert {"gold_win_rate", "gold_win_rate_ci", "gold_win_rate_length_controlled", "rm_win_rate", "gold_utility", "rm_score", "kl",
                "length", "no_eos", "n"} <= set(p)
        assert (p["kl"] is None) == (name in ("reference", "lead3", "in_context")) and p["n"] == 12
        assert p["gold_win_rate_ci"][0] <= p["gold_win_rate"] <= p["gold_win_rate_ci"][1]
    assert results["policies"]["reference"]["gold_win_rate"] == 0.5 and results["policies"]["sft"]["kl"] == 0
    assert results["seconds"]["total"] == pytest.approx(sum(t for k, t in results["seconds"].items() if k != "total"))
    for file in ("report.md", "win_rates.png", "reward.png", "training.png", "ppo.png", "policies.csv"):
        assert (out / "report" / file).stat().st_size > 200 and file.split(".")[0] in printed + (out / "report" / "report.md").read_text() + file


def test_ppo_starts_at_the_reference(finished):
    """KL 0 and ratio 1 at the first iteration, in whatever precision this machine runs."""
    first = json.loads((finished[0] / "ppo" / "metrics.jsonl").read_text().splitlines()[0])
    assert abs(first["kl"]) < 1e-3 and abs(first["kl_k1"]) < 1e-3 and first["first_log_ratio"] < 5e-2


def test_models_from_scratch_take_the_exact_gelu(finished):
    """Catches GPT-2's formula for it, which costs a CPU 7 % of a training step, and a model that is loaded as another."""
    folders = [file.parent for file in finished[0].rglob("model.safetensors")]
    assert len(folders) >= 4
    for folder in folders:
        head = "scalar" if "score.weight" in load_file(folder / "model.safetensors") else "lm"
        config = json.loads((folder / "config.json").read_text())
        assert config["activation_function"] == load_model(folder, "cpu", head).config.activation == "gelu"


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


def test_help_names_the_commands(monkeypatch, capsys):
    """Catches a command that --help keeps to itself, or that no module has."""
    monkeypatch.setattr(sys, "argv", ["run.py", "--help"])
    with pytest.raises(SystemExit):
        run.main()
    usage = capsys.readouterr().out.split("\n\n")[0].splitlines()
    assert len(usage) == 4 and sorted(run.COMMANDS) == ["ablations", "figures", "summarize"]
    for line, (name, what) in zip(usage[1:], run.COMMANDS.items()):
        assert line.split()[:3] == ["run.py", name, "..."] and line.endswith(what) and callable(importlib.import_module(name).main)


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
    (["--model.vocab_size", "300", "--data.test", "1"], ["no test post"]), (["--pretrain.choose", "reward"], ["pretrain.choose"]), (["--ppo.value", "both"], ["value", "shared"])])
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
    assert results["policies"]["ppo"]["gold_win_rate"] is None and results["reward_model"]["noise_free_judge"] is None
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
    r = open_run(str(out))  # labels, reward model and evaluation obey the rule as PPO does
    texts = [s["text"] for line in (out / "comparisons.jsonl").open() for s in json.loads(line)["summaries"]]
    rows = [json.loads(line)["policies"] for line in (out / "evaluation" / "samples.jsonl").open()]
    texts += [row[name]["text"] for row in rows for name in ("pretrained", "sft", "ppo", "best_of_n")]
    tails = [r.enc.encode_ordinary(" " + text.strip())[4:] for text in texts]
    assert not any(r.stop[0] in tail[:-1] for tail in tails) and sum(tail[-1:] == [r.stop[0]] for tail in tails) > 2
    margins = [json.loads(line)["margin"] for line in (out / "reward" / "held_out.jsonl").open()]
    model, both = load_model(str(out / "reward"), "cpu", "scalar"), []
    for stop in (r.stop, None):
        _, held_out, _ = split_comparisons(r.enc, out / "comparisons.jsonl", r.Q, r.R, stop)
        with torch.no_grad():
            both.append(torch.sub(*score_groups(model, held_out)).tolist())
    assert margins == pytest.approx(both[0], abs=.05) and max(abs(a - b) for a, b in zip(*both)) > .2
    assert len(better) == 24 and all(len(texts) <= 3 and len(set(texts)) == 1 for texts in better.values())
    assert "score.weight" not in load_file(out / "ppo" / "model.safetensors") and "score.weight" in load_file(out / "ppo" / "value" / "model.safetensors")
    rows = [json.loads(line) for line in (out / "ppo" / "metrics.jsonl").open()]
    assert rows[1]["beta"] == pytest.approx(rows[0]["beta"] * (1 - 0.2 * 8 / 50))


def test_stories_go_through_every_stage(tmp_path):
    """The preset ziegler at the size of a test: no SFT, four samples of the initial policy, ends at '.', no lead-3; a style is its labeler."""
    out, args = tmp_path / "out", ["--device", "cpu", *options(
        "model.n_layer=2 model.n_embd=32 model.n_head=2 data.pretrain=400 data.sft=40 data.test=12 pretrain.lr=1e-2 collect.posts=24 "
        "collect.held_out_posts=12 ppo.iterations=2 ppo.batch=8 ppo.kl_horizon=50 evaluation.best_of=2")]
    done = script("run.py", "--preset", "ziegler", "--out", out, *args)
    assert done.returncode == 0, done.stderr
    a, b = (load_file(out / name / "model.safetensors") for name in ("pretrained", "sft"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    r = open_run(str(out))
    assert r.Q <= 64 and r.R == 24 and r.stop == (r.enc.encode_ordinary(".")[0], 16)
    rows = [json.loads(line) for line in (out / "comparisons.jsonl").open()]
    shown = [s["text"] for row in rows for s in row["summaries"]]
    assert len(shown) > 30 and all(text.endswith(".") for text in shown)
    assert {s["policy"] for row in rows for s in row["summaries"]} == {"initial"} and {row["info"]["task"] for row in rows} == {"sentiment"}
    for row in (json.loads(line) for line in (out / "evaluation" / "samples.jsonl").open()):
        reference = row["policies"]["reference"]
        assert reference["eos"] and 16 < reference["length"] <= 24 and reference["text"] == row["post"]["summary"]
    results = json.loads((out / "report" / "results.json").read_text())["policies"]
    assert results.pop("lead3") is None and results.pop("sft_sampled") is None and set(results) - {"in_context"} == {"reference", "pretrained", "sft", "best_of_n", "ppo"}
    assert results["ppo"]["gold_win_rate_sft"] is not None and results["pretrained"]["kl"] == results["sft"]["kl"] == 0
    assert "PPO wins" in done.stdout and "nothing was fine-tuned" in (out / "report" / "report.md").read_text()
    assert script("evaluation.py", out).returncode == 0 and script("evaluation.py", out, "--policy", out / "ppo", "--device", "cpu").returncode == 0
    refused(script("run.py", "--preset", "ziegler", "--out", tmp_path / "b", *args, "--ppo.stop_token", ""), "ppo.stop_token", "ziegler")
    refused(script("run.py", "--preset", "ziegler", "--out", tmp_path / "b", *args, "--data.task", "poetry"), "data.task")


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
    r = SimpleNamespace(folder=str(tmp_path), enc=enc, posts={"valid": posts}, Q=80, R=6, seed=1, device="cpu", stop=None, round=1,
                        settings=run.preset("test"))
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


def test_the_task_says_what_is_written_and_for_which_labeler():
    """Catches a task that nothing reads: other posts, and the two styles the same stories for another judge."""
    made = {}
    for task in ("tldr", "sentiment", "descriptiveness"):
        s = run.preset("test")
        s.data.task = task
        made[task] = run.split_posts(SimpleNamespace(settings=s, posts_file=None, seed=1))["test"]
    assert [{**p, "task": "descriptiveness"} for p in made["sentiment"]] == made["descriptiveness"] and "task" not in made["tldr"][0]


def small(name, **more):
    """A preset at the sizes of the test preset, which lets it take data and language model from a finished run of that."""
    s = run.preset(name)
    for key, value in (run.PRESETS["test"] | {key.replace("__", "."): value for key, value in more.items()}).items():
        setattr(getattr(s, key.split(".")[0]), key.split(".")[1], value)
    return s


@pytest.mark.parametrize("name, more", [("stiennon", {}), ("instructgpt", {"sft__epochs": 2, "ppo__warmup": 1})])
def test_every_embedded_preset_runs_end_to_end(finished, tmp_path, name, more):
    """A few steps of each: choices that do not go together would stop one of its stages. (The default preset's are those of the test preset.)"""
    s = small(name, **more)
    without_report(s, tmp_path / "out", finished[0])
    rows = rows_of(tmp_path / "out" / "evaluation" / "samples.jsonl")
    assert len(rows) == 12 and any(row["policies"]["ppo"]["kl"] != 0 for row in rows)
    assert len(rows_of(tmp_path / "out" / "ppo" / "metrics.jsonl")) == 2
    assert len(list((tmp_path / "out" / "reward").glob("round-*"))) == s.collect.rounds - 1


def test_every_preset_builds_and_validates():
    for name, values in run.PRESETS.items():
        s = run.preset(name)
        assert all(getattr(getattr(s, key.split(".")[0]), key.split(".")[1]) == value for key, value in values.items())
    episodes = {name: run.preset(name).ppo.iterations * run.preset(name).ppo.batch for name in run.PRESETS if "-" in name}
    assert [episodes[name] for name in ("ziegler-774m", "stiennon-1.3b", "instructgpt-1.3b")] == [1999872, 999936, 256000]  # as published
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


def test_a_stage_alone_writes_over_no_run(finished, tmp_path):
    """Catches --out RUN: a model's config.json in the place of the run's."""
    shutil.copytree(finished[0], tmp_path / "run")
    before = (tmp_path / "run" / "config.json").read_bytes()
    for folder in (tmp_path / "run", tmp_path / "run" / "evaluation"):
        refused(script("ppo.py", tmp_path / "run", "--out", folder, "--device", "cpu"), str(folder), "not begun by this command")
    assert (tmp_path / "run" / "config.json").read_bytes() == before


@pytest.mark.parametrize("args, says", [
    (["--seed", "9" * 30], "0 to 999999999"), (["--seed", "-1"], "0 to 999999999"), (["--data.pretrain", "1", "--seed", "2"], "data.pretrain")])
def test_what_would_fail_hours_later_is_refused_at_once(tmp_path, monkeypatch, capsys, args, says):
    """Catches a seed that no generator takes, and a PPO without prompts behind four stages."""
    monkeypatch.setattr(sys, "argv", ["run.py", "--preset", "test", "--out", str(tmp_path / "o"), *args])
    with pytest.raises((DataError, SystemExit)) as error:
        run.main()
    assert says in str(error.value) + capsys.readouterr().err and not (tmp_path / "o" / "pretrained").exists()


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
    of = SimpleNamespace(folder=str(tmp_path), enc=None, settings=run.preset("test"))
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
    # only the policy differs: its row is new and belongs to it, the others are the base's
    base, new = ([json.loads(line) for line in (folder / "evaluation" / "samples.jsonl").open()] for folder in (out, tmp_path / "b"))
    from sft import open_run
    r, policy = open_run(str(out)), load_model(str(tmp_path / "b" / "ppo"), "cpu")
    own = sample_responses(policy, [encode_query(r.enc, row["post"], r.Q) for row in new], r.R, 0, None)
    for a, b, ids in zip(base, new, own):
        mine, theirs = b["policies"].pop("ppo"), a["policies"].pop("ppo")
        assert a == b and mine["text"] == decode_response(r.enc, ids) and mine["kl"] != theirs["kl"]


def test_an_interrupted_copy_from_a_base_goes_on(finished, tmp_path):
    """Catches a half-copied folder that stops every later command, and one that counts as whole."""
    out, config = str(finished[0]), json.loads((finished[0] / "config.json").read_text())
    (tmp_path / "sft.part").mkdir()
    (tmp_path / "sft.part" / "model.safetensors").write_bytes(b"half")
    run.share_stages(out, str(tmp_path), config)
    assert (tmp_path / "sft" / "model.safetensors").read_bytes() == (finished[0] / "sft" / "model.safetensors").read_bytes()
    assert not list(tmp_path.glob("*.part")) and not list(tmp_path.rglob("state.pt")) and list(finished[0].rglob("state.pt"))


def test_which_stages_a_base_shares(finished, monkeypatch):
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
    assert shared(model__n_layer=3) == shared(data__test=13) == shared(collect__posts=17) == shared(collect__held_out_posts=9) == []
    assert shared(collect__posts=15) == shared(collect__held_out_posts=7) == names[:3]  # the first of the base's posts will do
    assert shared(data__world="news") == shared(data__news=.5) == []
    before = json.loads(json.dumps(old))
    del before["settings"]["data"]["news"]  # a base from before there was this setting did what its default does
    assert run.same_stages(out, before, old) == names
    assert shared(pretrain__lr=1.0) == names[:1] and shared(sft__lr=1.0) == names[:2] and shared(collect__noise=2.0) == names[:3]
    assert shared(reward__lr=1.0) == names[:4] and shared(ppo__beta=1.0) == names[:5] and shared(evaluation__best_of=3) == names[:6]
    assert run.same_stages(out, {**old, "posts": "other.jsonl"}, old) == []
    assert shared(ppo__stop_token=".") == shared(ppo__truncate_after=3) == names[:3] and shared(ppo__temperature=1.0) == names[:5]
    scaled = json.loads(json.dumps(old))
    scaled["settings"]["reward"]["normalise"] = "gain_bias"  # on samples, which depend on the temperature
    other = json.loads(json.dumps(scaled))
    other["settings"]["ppo"]["temperature"] = 1.0
    assert run.same_stages(out, scaled, scaled) == names and run.same_stages(out, scaled, other) == names[:4]
    chosen = json.loads(json.dumps(old))
    chosen["settings"]["sft"]["choose"] = "reward"  # then the SFT model depends on the reward model
    other = json.loads(json.dumps(chosen))
    other["settings"]["reward"]["lr"] = 1.0
    # all other policies' samples are the base's while nothing before PPO differs, nor how everything is sampled
    alike = lambda **changes: run.same_but_policy(str(out), {**old, "seed": changes.pop("seed", old["seed"]), "settings": {
        part: s | {k.split("__")[1]: v for k, v in changes.items() if k.split("__")[0] == part} for part, s in old["settings"].items()}})
    assert alike() and alike(ppo__beta=1.0) and alike(ppo__lr=1.0, ppo__value="shared")
    assert not any((alike(reward__lr=1.0), alike(evaluation__best_of=3), alike(ppo__temperature=1.0), alike(ppo__stop_token="."),
                    alike(ppo__truncate_after=3), alike(seed=9)))
    monkeypatch.setattr(run, "open_run", lambda _: SimpleNamespace(config=chosen))
    assert alike(sft__choose="reward") and not alike(sft__choose="reward", ppo__beta=1.0)  # PPO's settings had a say in the SFT model
    assert run.same_stages(out, chosen, chosen) == names and run.same_stages(out, chosen, other) == names[:2]
    assert run.same_stages(out, chosen, {**chosen, "seed": 9}) == names[:2]  # another seed's reward model would choose another
    warm, old["settings"]["sft"]["epochs"] = json.loads(json.dumps(old)), 0
    warm["settings"]["sft"]["epochs"], warm["settings"]["ppo"]["temperature"] = 0, 1.0  # labels are on samples as PPO draws them
    assert run.same_stages(out, old, warm) == names[:3]


def rows_of(file):
    return [json.loads(line) for line in file.open()]


def weights(folder):
    return load_file(folder / "model.safetensors")


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def without_report(settings, out, base):
    with pytest.MonkeyPatch.context() as m:
        m.setattr(run.evaluation, "write_report", lambda *args: None)
        run.run_pipeline(settings, 1, str(out), "test", str(base), device="cpu")


@pytest.fixture(scope="module", params=[False, True], ids=["batched", "online"])
def two_rounds(finished, tmp_path_factory, request):
    """A run whose labels come in two rounds, data and SFT model taken over; and whether PPO goes on between them."""
    out = tmp_path_factory.mktemp("rounds") / "two"
    s = small("tiny", collect__rounds=2, collect__online=request.param)
    without_report(s, out, finished[0])
    return out, s, request.param


def test_labels_of_later_rounds_are_on_the_latest_policy(two_rounds, finished):
    """Catches posts labelled twice or never, more labels than offline, labels lost or on the first policies again."""
    out, s, _ = two_rounds
    rows, offline, earlier = (rows_of(folder / "comparisons.jsonl") for folder in (out, finished[0], out / "reward" / "round-1"))
    later = rows[len(earlier):]
    assert rows[:len(earlier)] == earlier and [{r["batch"] for r in part} for part in (earlier, later)] == [{"round-1"}, {"round-2"}]
    for split in ("train", "valid"):
        first, second, every = ({r["info"]["id"] for r in part if r["split"] == split} for part in (earlier, later, offline))
        assert not first & second and first | second == every and len(first) == len(second)
    names = [{s["policy"] for r in part for s in r["summaries"]} for part in (earlier, later)]
    assert names == [{"ref", "sft-0.3", "sft-0.5", "pretrained-0.5"}, {"ref", "ppo-1-0.7", "sft-0.5"}]
    r = SimpleNamespace(folder=str(out), settings=s, round=2, device="cpu")
    mixture = {name: policy for name, policy, _, _ in run.mixture(r)}
    assert same(load_model(str(out / "ppo" / "round-1"), "cpu").state_dict(), mixture["ppo-1-0.7"].state_dict())
    assert sum(n for *_, n in run.mixture(r)) == s.collect.k


def test_every_round_trains_its_reward_model_on_all_labels_from_sft(two_rounds, tmp_path):
    """Catches a reward model that goes on from the last round's, or sees the new labels alone: the same training once more."""
    import reward
    out, s, _ = two_rounds
    for folder, labels in (("reward/round-1", "reward/round-1/comparisons.jsonl"), ("reward", "comparisons.jsonl")):
        r = open_run(str(out))
        r.seed = 1
        torch.manual_seed(1)
        model = load_model(str(out / "sft"), "cpu", "scalar")
        train, _, _ = split_comparisons(r.enc, out / labels, r.Q, r.R)
        reward.train_reward(model, train, reward.normalising_rows(r, s.reward, "cpu"), s.reward, str(tmp_path / folder), 1)
        assert same(weights(tmp_path / folder), weights(out / folder))
    assert not same(weights(out / "reward"), weights(out / "reward" / "round-1"))


def test_a_later_round_begins_with_sft_or_goes_on(two_rounds):
    """Batched: a new policy from SFT. Online: one PPO with one plan, another reward model behind the pause."""
    out, _, online = two_rounds
    first, last = rows_of(out / "ppo" / "round-1" / "metrics.jsonl"), rows_of(out / "ppo" / "metrics.jsonl")
    assert [r["step"] for r in last] == [0, 1] and [r["step"] for r in first] == ([0] if online else [0, 1])
    assert (first[0] == last[0]) == online and last[0]["kl"] < 1e-3
    assert not same(weights(out / "ppo"), weights(out / "ppo" / "round-1"))


def test_rounds_resume_bit_for_bit(two_rounds, tmp_path):
    """Catches a round that depends on what is not on disk: all but its beginning is lost and made again."""
    out, s, _ = two_rounds
    again = tmp_path / "again"
    shutil.copytree(out, again)
    made = ("comparisons.jsonl", "reward/model.safetensors", "ppo/model.safetensors", "ppo/round-1/model.safetensors", "evaluation/samples.jsonl")
    for name in (*made, "reward/held_out.jsonl", "reward/state.pt", "ppo/state.pt"):
        os.remove(again / name)
    without_report(s, again, json.loads((again / "config.json").read_text())["base"])
    for file in made:
        assert (again / file).read_bytes() == (out / file).read_bytes(), file


def test_label_schedules_by_hand():
    """Batched: an equal share in each round. Online: Ziegler's, most labels early; all of them when the last reward model is trained."""
    def shares(**settings):
        s = CollectSettings(**settings)
        return [run.label_share(k, s) for k in range(s.rounds + 1)]
    assert shares() == [0, 1] and shares(rounds=4) == [0, .25, .5, .75, 1]
    assert shares(rounds=3, online=True) == pytest.approx([0, 1 / 3, 1 / 3 + 2 / 3 * .75, 1])
    assert shares(rounds=2, online=True) == pytest.approx([0, .5, 1])


def test_a_base_with_rounds_is_shared_whole_or_not(two_rounds):
    """Labels of later rounds depend on what PPO was: another β, and they are others."""
    out, _, _ = two_rounds
    old = json.loads((out / "config.json").read_text())
    new = json.loads(json.dumps(old))
    assert run.same_stages(out, old, new) == [name for name, _, _ in run.STAGES]
    new["settings"]["ppo"]["beta"] = 1.0
    assert run.same_stages(out, old, new) == ["data", "pretrain", "sft"]


@pytest.mark.parametrize("args, says", [
    (["--rounds", "0"], "rounds"), (["--rounds", "9"], "rounds"), (["--rounds", "3", "--collect.online", "true"], "iterations")])
def test_rounds_out_of_range_are_refused(tmp_path, monkeypatch, args, says):
    monkeypatch.setattr(sys, "argv", ["run.py", "--preset", "test", "--out", str(tmp_path / "o"), *args])
    with pytest.raises(DataError, match=says):
        run.main()
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("changes, files, says", [
    ({"data__filter": True}, False, "data.filter"), ({"data__filter": True, "data__task": "sentiment", "ppo__stop_token": "."}, True, "data.filter"),
    ({"data__task": "sentiment"}, True, "ppo.stop_token"),
    ({"data__world": "news"}, True, "data.world"), ({"data__news": .5}, True, "data.news"),
    ({"data__world": "news", "data__task": "sentiment", "ppo__stop_token": "."}, False, "data.world")])
def test_settings_that_nothing_would_read_are_refused(changes, files, says):
    """Catches a run that silently does without what was asked for."""
    with pytest.raises(DataError, match=says):
        run.check_together(small("test", **changes), files)
    run.check_together(small("test", **{key: value for key, value in changes.items() if key == "ppo__stop_token"}), files)
    for key in changes if "data__task" not in changes else ():
        run.check_together(small("test", **{key: changes[key]}), not files)  # where it is read


def test_what_goes_with_files_and_what_does_not_is_asked_of_the_command(monkeypatch, tmp_path):
    for args, says in ((["--data.filter", "true"], "data.filter"),
                       (["--posts", __file__, "--comparisons", __file__, "--data.news", "0.5"], "data.news")):
        monkeypatch.setattr(sys, "argv", ["run.py", "--preset", "test", "--out", str(tmp_path / "o"), *args])
        with pytest.raises(DataError, match=says):
            run.main()
        assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("module, args", [("sft", ["--choose", "reward"]), ("reward", ["--loss", "kwise"]), ("ppo", ["--stop_token", "no such token"]),
                                          ("ppo", ["--truncate_after", "48"])])
def test_a_stage_alone_is_refused_before_it_writes(finished, tmp_path, monkeypatch, module, args):
    """Catches a folder that, after a refusal, refuses the corrected command too."""
    monkeypatch.setattr(sys, "argv", [f"{module}.py", str(finished[0]), "--out", str(tmp_path / "o"), *args])
    with pytest.raises(DataError):
        __import__(module).main()
    assert not (tmp_path / "o").exists()


def test_a_run_may_end_early_and_compare_fewer_posts_than_its_base(finished, tmp_path):
    """Catches until that goes too far or writes a report, and comparisons about posts that were not asked for."""
    out, _ = finished
    settings = run.preset("test")
    settings.collect.posts, settings.collect.held_out_posts = 5, 3
    run.run_pipeline(settings, 1, str(tmp_path / "few"), "test", str(out), device="cpu", until="reward")
    assert sorted(p.name for p in (tmp_path / "few").iterdir()) == ["comparisons.jsonl", "config.json", "data", "labelers.json", "pretrained", "reward",
                                                                    "seconds.json", "sft", "tokenizer.json", "tokens"]
    assert not list((tmp_path / "few" / "sft").glob("state.pt"))  # nothing goes on from there
    ids = {c["info"]["id"] for c in map(json.loads, (tmp_path / "few" / "comparisons.jsonl").read_text().splitlines())}
    assert ids == {f"collect-{i}" for i in range(5)} | {f"held_out-{i}" for i in range(3)}


def test_posts_of_the_second_world():
    """Catches data.world and data.news that nothing reads, news among the prompts of PPO, or a first world that they change."""
    settings = run.preset("test")
    of = SimpleNamespace(settings=settings, seed=1, posts_file=None)
    plain = run.split_posts(of)
    settings.data.news = .25
    mixed = run.split_posts(of)
    about = [run.world.world_of(p) for p in mixed["pretrain"]]
    assert about.count("news") == 16 and len(about) == 64 and all(plain[name] == mixed[name] for name in plain if name != "pretrain")
    prompts = [p for p in mixed["pretrain"] if run.world.in_task(p, "reddit")]
    assert prompts and {run.world.world_of(p) for p in prompts} == {"reddit"} and any(run.world.in_task(p, "news") for p in mixed["pretrain"])
    settings.data.world, settings.data.news = "news", 0.
    assert {run.world.world_of(p) for posts in run.split_posts(of).values() for p in posts} == {"news"}
    settings.data.world = "mars"
    with pytest.raises(DataError, match="data.world"):
        settings.data.validate()
