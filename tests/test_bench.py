"""The benchmark counts the work it says it counts and compares the right way round; no time decides anything here."""
import json
import os
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_model

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, os.path.join(ROOT, "bench"))
import bench  # noqa: E402
import model  # noqa: E402
import peers  # noqa: E402
from data import DataError  # noqa: E402


def case(name="sft", cases=bench.CPU_CASES, **more):
    return {**cases[name], **bench.SMOKE, "who": "ours", "precision": "fp32", "label": "", "device": "cpu", "temperature": 0.7,
            "threads": None, "inner": 1, "peak_tflops": None, **more}


@pytest.mark.parametrize("name", list(bench.CPU_CASES))
def test_every_case_of_ours_runs(name):
    result = bench.measure(SimpleNamespace(**case(name, repeats=2, warmup=1)))
    assert len(result["seconds"]) == 2 and min(result["seconds"]) > 0 and result["peak_mb"] > 0


@pytest.mark.parametrize("who", ["ours", "ours, plain", "PyTorch default", "PyTorch FlashAttention"])
def test_attention_contenders_run(who):
    """On a CPU, where all of them exist too."""
    assert len(bench.measure(SimpleNamespace(**case("attention", bench.GPU_CASES, who=who, inner=2)))["seconds"]) == 1


def test_warm_up_is_dropped_and_repeats_within_a_step_are_divided_out(monkeypatch):
    monkeypatch.setattr(peers, "attention_pytorch", lambda c: [9.0, 8.0, 6.0])
    c = case("attention", bench.GPU_CASES, who="PyTorch default", warmup=1, repeats=2, inner=2)
    assert bench.measure(SimpleNamespace(**c))["seconds"] == [4.0, 3.0]


def test_attention_contenders_compute_the_same(monkeypatch):
    """What is timed as PyTorch's is causal attention at our scale."""
    found = []
    monkeypatch.setattr(peers, "attention_step", lambda c, f: found.append(f))
    for who, variant in (("ours", ""), ("ours, plain", ""), ("PyTorch", "default"), ("PyTorch", "FlashAttention")):
        c = SimpleNamespace(**case("attention", bench.GPU_CASES, who=who, variant=variant))
        (bench.attention if who.startswith("ours") else peers.attention_pytorch)(c)
    q, k, v = torch.randn(3, 2, 2, 9, 16)
    torch.testing.assert_close([f(q, k, v) for f in found[1:]], [found[0](q, k, v)] * 3)


def test_sft_trains_on_every_position(monkeypatch):
    """As many predictions as the peers make: all but each row's first token."""
    import sft
    counted, mean = [], sft.weighted_mean
    monkeypatch.setattr(sft, "weighted_mean", lambda *args: counted.append(args[1]) or mean(*args))
    bench.measure(SimpleNamespace(**case(batch=3, query=5, response=7)))
    assert counted[0].tolist() == [1.0] * (3 * 11)


@pytest.mark.parametrize("name, tokens", [("ppo", 21), ("sampling", 21), ("logprobs", 21), ("sft", 36), ("reward", 72)])
def test_tokens_counted(name, tokens):
    """A response's where only responses cost vocabulary or sampling, else the whole rows', both rows of a pair."""
    assert bench.tokens_per_step(case(name, batch=3, query=5, response=7)) == tokens


def test_flops_count_every_parameter_but_the_positions():
    c = SimpleNamespace(**case(vocab_size=11, n_layer=2, n_embd=32, query=30, response=10))
    gpt = tiny_model()
    N = sum(p.numel() for p in gpt.parameters()) - gpt.wpe.weight.numel()
    assert bench.flops_per_token(c) == 6 * N + 12 * 2 * 32 * 40


def test_speed_of_ours_is_above_1_where_ours_is_faster():
    def run(who, precision, seconds, label=""):
        return case("ppo", who=who, precision=precision, seconds=seconds, label=label)
    runs = [run("ours", "fp32", [9., 2., 1.]), run("ours", "bf16", [1.]), run("peer", "fp32", [6., 5., 7.]),
            {**run("peer", "bf16", []), "error": "no memory"}]
    ours, fast, peer, broken = runs
    bench.summarize(runs)
    assert (ours["median_s"], ours["min_s"], ours["max_s"], ours["tokens_per_s"]) == (2, 1, 9, 4)
    assert peer["speed_of_ours"] == {"fp32": 3, "bf16": 6} and fast["speed_of_ours"] == {"fp32": 0.5, "bf16": 1}
    assert "median_s" not in broken
    runs = [run(who, "fp32", [s], label) for who, s, label in
            (("ours", 1., "x1"), ("peer", 3., "x1"), ("ours", 2., "batch x2"), ("peer", 12., "batch x2"))]
    bench.summarize(runs)
    assert [r["growth"] for r in runs] == [1, 1, 2, 4] and [r["speed_of_ours"]["fp32"] for r in runs] == [1, 3, 1, 6]


def test_growth_scales_one_axis_and_keeps_the_heads():
    runs = bench.contenders(bench.CPU_CASES["sampling"], ["fp32", "bf16"], lambda who: True, (2, 4))
    base = runs[0]
    assert [r["who"] for r in runs] == ["ours", "transformers static cache"] * 7
    assert {r["precision"] for r in runs[::2]} == {"bf16"}
    for r in runs[2:]:
        axis, by = r["label"].split(" x")
        changed = {"n_embd", "n_head"} if axis == "width" else {axis}
        for key in ("batch", "query", "response", "n_embd", "n_head", "n_layer"):
            assert r[key] == base[key] * (int(by) if key in changed else 1)


def test_script_leaves_json_lines_and_a_table(tmp_path, monkeypatch, capsys):
    out = tmp_path / "new" / "bench.jsonl"
    monkeypatch.setattr(model, "choose_precision", lambda device: (torch.float32, "one precision, one child process"))
    monkeypatch.setattr(sys, "argv", ["bench.py", "--smoke", "--ours", "--only", "sampling", "--threads", "1", "--out", str(out)])
    with pytest.raises(SystemExit) as status:
        bench.main()
    printed = capsys.readouterr().out
    assert status.value.code == 0, printed
    line, = [json.loads(line) for line in out.read_text().splitlines()]
    assert line["case"] == "sampling" and line["who"] == "ours" and len(line["seconds"]) == 1 and line["peak_mb"] > 50
    assert line["tokens_per_s"] == pytest.approx(2 * 4 / line["seconds"][0]) and f"{line['tokens_per_s']:,.0f}" in printed


def test_a_case_that_fails_is_one_line_of_the_table():
    runs = [case("ppo"), case("ppo", who="TRL nonsense", n_head=3)]
    runs[0].update(seconds=[1.0], peak_mb=1, note="")
    bench.add_round(runs[1])
    text = bench.table("ppo", bench.summarize(runs))
    assert "failed: " in text and len(text.splitlines()) == 4


def test_unknown_case_is_refused():
    args = SimpleNamespace(only="sampling,nonsense", gpu=False)
    with pytest.raises(DataError, match="nonsense"):
        bench.plan(args, bench.CPU_CASES, ["fp32"], lambda who: False)
