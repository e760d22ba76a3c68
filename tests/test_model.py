"""model.py: causality and alignment, the transformer against a naive one, the sampler, weights in and out."""
import hashlib
import json
import math
import os
import platform
import subprocess
import sys

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from conftest import random_rows, tiny_model
from safetensors.numpy import load_file

import download
import model
from data import DataError, pad_rows
from model import GPT, GPTConfig, LogPi, Sampler, attention, attention_in_parts, logits, plain_attention, read_config
from sft import load_model, pick_device


def padded(queries, responses):
    """-> tokens, query_lengths, lengths, R of rows query + response."""
    tokens, lengths = pad_rows([q + r for q, r in zip(queries, responses)])
    return tokens, torch.tensor([len(q) for q in queries]), lengths, max(map(len, responses))


def behind(tokens, lengths):
    """bool [B, T]: columns behind each row's end."""
    return torch.arange(tokens.shape[1]) >= lengths[:, None]


# --- causality and alignment


def test_hidden_is_causal(g):
    """Catches a missing or shifted causal mask: a token seen from the position before it, or not seen at its own."""
    model, tokens = tiny_model(), torch.randint(11, (2, 9), generator=g)
    before = model.hidden(tokens)
    for i in range(8):
        changed = tokens.clone()
        changed[:, i + 1:] = (changed[:, i + 1:] + 1) % 11
        after = model.hidden(changed)
        torch.testing.assert_close(after[:, :i + 1], before[:, :i + 1], atol=1e-6, rtol=0)
        assert ((after - before)[:, i + 1:].abs().amax(-1) > 1e-2).all()


def test_what_stands_behind_the_end_and_padding_change_nothing(g):
    """Catches reading a score, value or log-probability from padding."""
    lm, scalar = tiny_model(), tiny_model("scalar")
    tokens, q, lengths, R = padded(*random_rows(g))
    garbage = torch.where(behind(tokens, lengths), torch.randint(1, 11, tokens.shape, generator=g), tokens)
    wider = torch.cat([garbage, torch.randint(11, (len(tokens), 4), generator=g)], 1)
    assert (garbage != tokens).any()
    for other in (garbage, wider):
        for now, then in ((lm.logprobs(other, q, lengths, R), lm.logprobs(tokens, q, lengths, R)),
                          (scalar.values(other, q, lengths, R), scalar.values(tokens, q, lengths, R)),
                          (scalar.scores(other, lengths), scalar.scores(tokens, lengths))):
            torch.testing.assert_close(now, then, atol=1e-5, rtol=0)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_the_next_token(g, temperature):
    """Catches an index shifted by one, a forgotten temperature, numbers behind the end."""
    model, (queries, responses) = tiny_model(), random_rows(g)
    tokens, q, lengths, R = padded(queries, responses)
    expected = torch.zeros(len(queries), R)
    for b, (query, response) in enumerate(zip(queries, responses)):
        for t, y in enumerate(response):
            logits = model.forward(torch.tensor([query + response[:t]]))[0, -1]
            expected[b, t] = (logits / temperature).softmax(-1)[y].log()
    out = model.logprobs(tokens, q, lengths, R, temperature)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)
    assert (out[expected == 0] == 0).all() and (expected == 0).any()


def test_values_see_the_state_and_not_the_action(g):
    """Catches V(s_t) read at y_t (too late) or before y_{t-1} (too early)."""
    model, (queries, responses) = tiny_model("scalar"), random_rows(g)
    tokens, q, lengths, R = padded(queries, responses)
    expected = torch.zeros(len(queries), R)
    for b, (query, response) in enumerate(zip(queries, responses)):
        for t in range(len(response)):
            state = torch.tensor([query + response[:t]])
            expected[b, t] = model.scores(state, torch.tensor([state.shape[1]]))[0]
    torch.testing.assert_close(model.values(tokens, q, lengths, R), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("columns", [[8, 0, 3, 7], [20, 37, 18, 33]])  # behind 16 columns their queries are left out
def test_the_last_block_may_answer_at_few_positions(g, columns):
    """Catches a position read from another row or column, in values and in gradients."""
    model, tokens = tiny_model(), torch.randint(11, (3, 39), generator=g)
    rows, columns, weight = torch.tensor([2, 0, 1, 1]), torch.tensor(columns), torch.randn(4, 32, generator=g)
    gradients = []
    for h in (model.hidden(tokens)[rows, columns], model.hidden(tokens, rows, columns)):
        gradients.append([h.detach()] + list(torch.autograd.grad((h * weight).sum(), [p for n, p in model.named_parameters()])))
    for one, other in zip(*gradients):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def exact_attention(q, k, v):
    """Another implementation, in float64, of which the last T queries are kept."""
    S, T = k.shape[2], q.shape[2]
    whole = F.pad(q.double(), (0, 0, S - T, 0))
    return F.scaled_dot_product_attention(whole, k.double(), v.double(), is_causal=True)[:, :, S - T:]


def same_attention(f, q, k, v, weight):
    """Values and gradients, in float32."""
    both = []
    for function in (f, exact_attention):
        x = [part.detach().requires_grad_() for part in (q, k, v)]
        y = function(*x)
        both.append((y.double(), *torch.autograd.grad((y * weight).sum(), x)))
    for one, other in zip(*both):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("T", [1, 5, 13])
def test_queries_at_the_end_of_a_row(g, T):
    """Catches a mask that counts a query's position from the first key, not from the row's beginning."""
    q, k, v = torch.randn(3, 2, 3, 13, 8, generator=g)
    same_attention(plain_attention, q[:, :, 13 - T:], k, v, torch.randn(2, 3, T, 8, generator=g))


@pytest.mark.parametrize("T", [4, 8, 9, 30, 41])
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_attention_in_parts_is_the_specification(g, T, rows):
    """Catches a lost or doubled row or strip, a last strip of another size, keys cut off too early."""
    q, k, v = torch.randn(3, 5, 2, 41, 8, generator=g)
    f = lambda q, k, v: attention_in_parts(q, k, v, most=rows * 2 * T * 41, strip=8)  # noqa: E731
    same_attention(f, q[:, :, 41 - T:], k, v, torch.randn(5, 2, T, 8, generator=g))


def test_attention_in_parts_can_be_recomputed(g):
    """Catches saved tensors that are asked for part by part: a checkpointed block hands them out once."""
    q, k, v = (torch.randn(5, 2, 9, 8, generator=g, requires_grad=True) for _ in range(3))
    weight, grads = torch.randn(5, 2, 9, 8, generator=g), []
    f = lambda q, k, v: attention_in_parts(q, k, v, most=2 * 2 * 9 * 9, strip=4)  # noqa: E731  three groups of rows, three strips
    for y in (f(q, k, v), torch.utils.checkpoint.checkpoint(f, q, k, v, use_reentrant=False)):
        grads.append(torch.autograd.grad((y * weight).sum(), (q, k, v)))
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_logprobs_in_chunks_are_those_of_all_rows(g, monkeypatch):
    """Catches chunks in another order, a lost last chunk, and a recomputed backward that differs from the kept one."""
    model = tiny_model()
    tokens, q, lengths, R = padded(*random_rows(g))
    weight, results = torch.randn(len(q), R, generator=g), []
    for size in (1000, 4):  # one chunk, whose logits are kept for the backward pass, and many, made again
        monkeypatch.setattr(model, "chunk", size)
        logp = model.logprobs(tokens, q, lengths, R, 0.7)
        results.append([logp.detach()] + list(torch.autograd.grad((logp * weight).sum(), list(model.parameters()))))
    assert (lengths - q).sum() > 8  # three chunks at least
    for one, other in zip(*results):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_no_chunk_of_logits_is_large(monkeypatch):
    """667 rows of GPT-2's vocabulary in float32 are 128 MB. Catches logits of all rows at once, with and without a gradient."""
    model, made = tiny_model(vocab_size=50257), []
    assert model.chunk * 50257 * 4 <= 2**27
    monkeypatch.setattr("model.logits", lambda h, *more: made.append(len(h)) or logits(h, *more))
    model.chunk = 100
    h = torch.randn(250, 32, requires_grad=True)
    model.log_pi(h, torch.zeros(250, dtype=torch.long)).sum().backward()
    assert made == [100, 100, 56] * 2  # forward, backward; rows are rounded up to 256


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_pi_and_its_gradient_are_those_of_a_log_softmax(g, dtype):
    """Catches a wrong sign, a temperature forgotten on one way, a target's gradient on another token."""
    model = tiny_model()
    model.amp_dtype = dtype
    h, y, weight = torch.randn(9, 32, generator=g, requires_grad=True), torch.randint(11, (9,), generator=g), torch.randn(9, generator=g)
    both = h, model.wte.weight
    ours = model.log_pi(h, y, 0.7)
    exact = ((h.double() @ model.wte.weight.double().T) / 0.7).log_softmax(-1)[range(9), y]
    torch.testing.assert_close(ours.double(), exact, atol=1e-5, rtol=1e-5)
    for one, other in zip(torch.autograd.grad((ours * weight).sum(), both), torch.autograd.grad((exact * weight).sum(), both)):
        assert (one - other).abs().max() < (1e-5 if dtype == torch.float32 else 2e-2) * other.abs().max()


def test_log_pi_where_pi_is_zero_in_float32():
    """Catches log π taken of π: -inf where a token is hundreds of nats below the likeliest, and a gradient that is no number."""
    h, w, y = torch.tensor([[90.0], [-200.0], [1.0]]), torch.tensor([[1.0], [0.0], [-1.5]], requires_grad=True), torch.tensor([2, 0, 1])
    ours = LogPi.apply(h, w, y, 1.0, torch.float32, 3)
    exact = (h.double() @ w.double().T).log_softmax(-1)[range(3), y]
    torch.testing.assert_close(ours.double(), exact)
    assert exact[:2].tolist() == [-225, -500] and torch.autograd.grad(ours.sum(), w)[0].isfinite().all()


def test_logits_keep_float32_beside_bf16_matrix_products():
    """Catches logits rounded to bf16: at GPT-2's offset of -100 they would come in steps of a half."""
    model = tiny_model()
    model.amp_dtype = torch.bfloat16
    h = torch.randn(64, 32, generator=torch.Generator().manual_seed(1)) * 20
    h[:, 0] = 500
    exact = h.double() @ model.wte.weight.double().T
    assert exact.abs().max() > 60
    error = (model.unembed(h) - exact).abs().max()
    rounded = ((h @ model.wte.weight.T).bfloat16() - exact).abs().max()
    assert error < 1e-3 < 0.05 < rounded
    both = h.requires_grad_(), model.wte.weight
    for dtype, tolerance in ((torch.bfloat16, 2e-2), (torch.float32, 1e-4)):
        model.amp_dtype = dtype
        gradients = torch.autograd.grad(model.unembed(h).logsumexp(-1).sum(), both)
        expected = torch.autograd.grad((h.double() @ model.wte.weight.double().T).logsumexp(-1).sum(), both)
        for ours, exact in zip(gradients, expected):
            assert (ours - exact).abs().max() < tolerance * exact.abs().max()


def test_score_is_read_at_the_last_token(g):
    """Catches a score read one token before the end, where EOS is not seen, or from the last column."""
    model, (queries, responses) = tiny_model("scalar"), random_rows(g)
    tokens, _, lengths, _ = padded(queries, responses)
    expected = [(model.hidden(torch.tensor([q + r]))[0, -1] @ model.score.weight[0] + model.score.bias[0]).item()
                for q, r in zip(queries, responses)]
    torch.testing.assert_close(model.scores(tokens, lengths), torch.tensor(expected), atol=1e-5, rtol=0)


def test_branch_scores_are_the_scores_of_each_response_alone(g):
    """Catches a response that sees its siblings or its query's padding, or stands at the wrong position; and its gradient."""
    model, (queries, _), (_, responses) = tiny_model("scalar"), random_rows(g), random_rows(g, n=15)
    tokens, q = pad_rows(queries)
    tokens = torch.where(behind(tokens, q), 7, tokens)
    branches, lengths = pad_rows(responses)
    garbage = torch.where(behind(branches, lengths), 5, branches).view(5, 3, -1)
    rows, _, ends, _ = padded([query for query in queries for _ in range(3)], responses)
    gradients = []
    for scores in (model.branch_scores(tokens, q, garbage, lengths.view(5, 3)), model.scores(rows, ends).view(5, 3)):
        (scores * torch.arange(15.).view(5, 3)).sum().backward()
        gradients.append((scores.detach(), [p.grad for p in model.parameters()]))
        model.zero_grad()
    torch.testing.assert_close(gradients[0][0], gradients[1][0], atol=1e-5, rtol=0)
    for a, b in zip(gradients[0][1], gradients[1][1]):
        torch.testing.assert_close(a, b, atol=1e-4 * b.abs().max().item(), rtol=0)


# --- the transformer against naive ones


def test_attention_against_a_loop(g):
    """Catches a wrong scale, mask or axis."""
    q, k, v = (torch.randn(2, 3, 6, 4, generator=g) for _ in range(3))
    expected = torch.zeros_like(v)
    for b in range(2):
        for h in range(3):
            for i in range(6):
                w = [math.exp(sum(a * c for a, c in zip(q[b, h, i].tolist(), k[b, h, j].tolist())) / 2) for j in range(i + 1)]
                expected[b, h, i] = sum(x / sum(w) * v[b, h, j] for j, x in enumerate(w))
    torch.testing.assert_close(attention(q, k, v), expected, atol=1e-6, rtol=1e-5)


def naive_gpt2(folder, ids):
    """GPT-2 in numpy from a folder in Hugging Face's layout, one position after the other. -> hidden [T, d], tensors"""
    t = {k.removeprefix("transformer."): v.astype(np.float64) for k, v in load_file(folder / "model.safetensors").items()}
    c = json.loads((folder / "config.json").read_text())
    D = c["n_embd"] // c["n_head"]

    def norm(x, name):
        return (x - x.mean()) / np.sqrt(x.var() + 1e-5) * t[name + ".weight"] + t[name + ".bias"]

    def linear(x, name):
        return x @ t[name + ".weight"] + t[name + ".bias"]

    x = [t["wte.weight"][y] + t["wpe.weight"][i] for i, y in enumerate(ids)]
    for layer in (f"h.{i}." for i in range(c["n_layer"])):
        qkv = [np.split(linear(norm(y, layer + "ln_1"), layer + "attn.c_attn"), 3) for y in x]
        for i in range(len(x)):
            heads = []
            for s in (slice(h * D, h * D + D) for h in range(c["n_head"])):
                w = np.exp([qkv[i][0][s] @ qkv[j][1][s] / math.sqrt(D) for j in range(i + 1)])
                heads.append(sum(w[j] * qkv[j][2][s] for j in range(i + 1)) / w.sum())
            x[i] = x[i] + linear(np.concatenate(heads), layer + "attn.c_proj")
            u = linear(norm(x[i], layer + "ln_2"), layer + "mlp.c_fc")
            if c["activation_function"] == "gelu":  # x Φ(x)
                phi = [(1 + math.erf(z / math.sqrt(2))) / 2 for z in u]
            else:
                phi = 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u ** 3)))
            x[i] = x[i] + linear(u * phi, layer + "mlp.c_proj")
    return np.stack([norm(y, "ln_f") for y in x]), t


@pytest.mark.parametrize("activation", ["gelu_new", "gelu"])
def test_forward_and_saved_layout_against_numpy(tmp_path, g, activation):
    """Catches a departure from GPT-2 (GELU, norms, heads, residuals, positions) and from Hugging Face's layout."""
    ids = torch.randint(11, (7,), generator=g).tolist()
    model = tiny_model(activation=activation)
    model.save_pretrained(tmp_path / "lm")
    assert json.loads((tmp_path / "lm/config.json").read_text())["activation_function"] == activation
    hidden, t = naive_gpt2(tmp_path / "lm", ids)
    torch.testing.assert_close(model(torch.tensor([ids]))[0].double(), torch.tensor(hidden @ t["wte.weight"].T),
                               atol=2e-5, rtol=0)
    scalar = tiny_model("scalar", seed=1, activation=activation)
    scalar.save_pretrained(tmp_path / "scalar")
    with pytest.raises(ValueError, match="not a language model"):
        GPT.from_pretrained(tmp_path / "scalar")
    hidden, t = naive_gpt2(tmp_path / "scalar", ids)
    assert scalar.scores(torch.tensor([ids]), torch.tensor([7])).item() == pytest.approx(hidden[-1] @ t["score.weight"][0], abs=1e-5)


# --- the sampler


def naive_generate(model, queries, R, temperature, eos, uniform):
    """One row, one token at a time, with a whole forward pass each. -> list of (response ids, logprobs)"""
    out = []
    for query, u in zip(queries, uniform.tolist()):
        ids, logps = [], []
        while len(ids) < R and (not ids or ids[-1] != eos):
            logits = model.forward(torch.tensor([query + ids]))[0, -1]
            p = (logits / (temperature or 1)).softmax(-1)
            below = (p.cumsum(0) <= u[len(ids)] * p.sum()).sum().item()
            ids.append(int(logits.argmax()) if temperature == 0 else below)
            logps.append(p[ids[-1]].log().item() if temperature else 0.0)
        out.append((ids, logps))
    return out


@pytest.mark.parametrize("temperature, eos, n", [(0, None, 1), (0, 3, 1), (0.7, None, 1), (1.3, 3, 1), (0.7, 3, 3)])
def test_generate_equals_the_naive_loop(temperature, eos, n):
    """Catches a wrong cache column, position, visible key or dropped row in ragged prompts, and n samples mixed up."""
    model = tiny_model(seed=3)
    queries, _ = random_rows(torch.Generator().manual_seed(1), n=8)
    tokens, lengths = pad_rows(queries)
    tokens = torch.where(behind(tokens, lengths), 7, tokens)  # garbage behind the prompts
    R = 9
    out, ends, logprobs = model.generate(tokens, lengths, R, temperature, eos, torch.Generator().manual_seed(5), n)
    uniform = torch.rand(8 * n, R, generator=torch.Generator().manual_seed(5))
    repeated = [q for q in queries for _ in range(n)]
    expected = naive_generate(model, repeated, R, temperature, eos, uniform)
    for b, (query, (ids, logps)) in enumerate(zip(repeated, expected)):
        assert out[b].tolist() == query + ids + [0] * (out.shape[1] - len(query) - len(ids))
        assert ends[b] == len(query) + len(ids)
        torch.testing.assert_close(logprobs[b], torch.tensor(logps + [0.0] * (R - len(logps))), atol=1e-4, rtol=0)
    if eos is not None:  # the case is worth its name: some stop at different times, some do not
        assert len({len(ids) for ids, _ in expected}) >= 3


@pytest.mark.parametrize("activation", ["gelu_new", "gelu"])
def test_generate_logprobs_are_the_models(g, activation):
    """Catches a sampler and a training forward that disagree: PPO's ratio would not start at 1."""
    model, (queries, _) = tiny_model(seed=3, activation=activation), random_rows(g, n=8)
    with torch.no_grad():  # so large that the two kinds of GELU differ by more than rounding
        for block in model.blocks:
            block.mlp_proj.weight *= 8
    tokens, lengths = pad_rows(queries)
    out, ends, logprobs = model.generate(tokens, lengths, 9, 0.7, 3, g, n=3)
    again = model.logprobs(out, lengths.repeat_interleave(3), ends, 9, 0.7)
    torch.testing.assert_close(logprobs, again, atol=1e-4, rtol=0)
    mask = torch.arange(9) < (ends - lengths.repeat_interleave(3))[:, None]
    assert (logprobs[~mask] == 0).all() and (logprobs[mask] < 0).all()
    assert (out[behind(out, ends)] == 0).all()
    stopped = mask.sum(1) < 9
    assert (out[torch.arange(24), ends - 1][stopped] == 3).all() and 0 < stopped.sum() < 24


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("rows, n, static", [(160, 1, False), (40, 4, False), (20, 8, False), (24, 6, False), (20, 8, True), (160, 1, True)])
def test_dropping_finished_rows_changes_nothing(rows, n, static, seed):
    """Catches a cache, mask, position or uniform that goes with another row once most rows have ended and left: by query, by
    sample, by both, by sample while a query without living samples stays; and a step of fixed shapes, as GPUs take it, that
    reads columns not written yet."""
    model, (queries, _) = tiny_model(seed=3), random_rows(torch.Generator().manual_seed(seed), n=rows)
    tokens, lengths = pad_rows(queries)
    (all_tokens, _, all_logprobs), (out, ends, logprobs) = (
        model.generate(tokens, lengths, 16, 1.0, eos, torch.Generator().manual_seed(5), n, static and eos == 3)
        for eos in (None, 3))
    sizes = []
    for b, start in enumerate(lengths.repeat_interleave(n).tolist()):
        sampled = all_tokens[b, start:start + 16].tolist()
        size = sampled.index(3) + 1 if 3 in sampled else 16
        assert ends[b] == start + size
        assert out[b, start:].tolist() == sampled[:size] + [0] * (out.shape[1] - start - size)
        torch.testing.assert_close(logprobs[b, :size], all_logprobs[b, :size], atol=1e-5, rtol=0)
        sizes.append(size)
    assert sum(size < 8 for size in sizes) > .4 * len(sizes) and sum(size == 16 for size in sizes) > 5


@pytest.mark.parametrize("n", [1, 3])
def test_the_cache_need_not_be_clean(n):
    """Catches columns still to come that are read as memory left them: NaN times a weight of 0 is NaN."""
    results = []
    for fill_with_nan in (False, True):
        torch.use_deterministic_algorithms(fill_with_nan)  # which fills what torch.empty gives
        try:
            results.append(tiny_model(seed=3).generate(torch.ones(2, 5, dtype=torch.long), torch.tensor([5, 3]), 7, 0.7,
                                                       generator=torch.Generator().manual_seed(0), n=n))
        finally:
            torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(*results))


@torch.no_grad()
def test_a_step_works_in_place():
    """Catches a step that a CUDA graph could not repeat, which reads and writes the very tensors that it was captured with."""
    sampler = Sampler(tiny_model(), torch.ones(2, 5, dtype=torch.long), torch.tensor([5, 3]), 7, 0.7, 3, None, 3, True)
    before = dict(vars(sampler))
    sampler.choose()
    sampler.read()
    assert vars(sampler).keys() == before.keys() and all(x is before[name] for name, x in vars(sampler).items())


def test_samples_follow_the_distribution():
    """Catches a biased sampler and one temperature too many or too few: chi-square over all pairs of first two tokens."""
    model, prompt, T, N = tiny_model(seed=2), [4, 1, 7], 0.7, 4000
    with torch.no_grad():
        first = (model(torch.tensor([prompt]))[0, -1] / T).softmax(-1)
        second = (model(torch.tensor([prompt + [y] for y in range(11)]))[:, -1] / T).softmax(-1)
    out, _, _ = model.generate(torch.tensor([prompt]), torch.tensor([3]), 2, T, None, torch.Generator().manual_seed(1), N)
    seen = torch.bincount(out[:, 3] * 11 + out[:, 4], minlength=121).double()

    def chi_square(p):
        p = p.flatten().double() * N
        big = p > 5
        cells = list(zip(seen[big], p[big])) + [(seen[~big].sum(), p[~big].sum())]
        return sum((o - e) ** 2 / e for o, e in cells).item(), len(cells) - 1

    value, freedom = chi_square(first[:, None] * second)
    assert abs(value - freedom) < 3.3 * math.sqrt(2 * freedom)  # 99.9 %
    value, freedom = chi_square((first ** T / (first ** T).sum())[:, None] * second)  # the first token at temperature 1
    assert value - freedom > 6 * math.sqrt(2 * freedom)


def test_the_largest_uniform_draws_a_token_of_some_probability(monkeypatch):
    """Catches the end of the vocabulary, of probability 0, drawn where a uniform times the total rounds up to the total."""
    model = tiny_model()
    with torch.no_grad():
        model.wte.weight[6:] = -1e4 * model.ln_f.bias / model.ln_f.bias.norm() ** 2  # their logits: about -10,000
        model.ln_f.weight.mul_(1e-3)
    monkeypatch.setattr(torch, "rand", lambda *shape, generator=None: torch.ones(*shape))
    out, ends, logprobs = model.generate(torch.tensor([[1, 2]]), torch.tensor([2]), 5, 1.0)
    assert (out[0, 2:] < 6).all() and logprobs.isfinite().all()


def test_what_was_sampled_can_be_trained_on():
    """Catches tensors of inference mode handed out: a backward pass refuses to keep them."""
    net, q = tiny_model(), torch.tensor([2, 3])
    tokens, lengths, logprobs = net.generate(torch.ones(2, 3, dtype=torch.long), q, 4)
    ratio = (net.logprobs(tokens, q, lengths, 4) - logprobs).exp()
    assert torch.autograd.grad((ratio * logprobs).sum(), net.wte.weight)[0].isfinite().all() and not logprobs.requires_grad


def test_generate_shapes():
    """Catches internal padding that leaks into what is handed back: tokens are [B·n, Q + R], whatever Q is."""
    for Q in (1, 5, 16, 17, 33):
        tokens, ends, logprobs = tiny_model().generate(torch.ones(2, Q, dtype=torch.long), torch.tensor([Q, 1]), 7, 1.0, n=3)
        assert tokens.shape == (6, Q + 7) and logprobs.shape == (6, 7) and ends.tolist() == [Q + 7] * 3 + [8] * 3


def test_what_does_not_fit_is_refused():
    """Catches positions running off the table, and a row that is cut without a word."""
    model = tiny_model()
    with pytest.raises((ValueError, RuntimeError)):
        model(torch.zeros(1, 41, dtype=torch.long))
    assert model(torch.zeros(1, 40, dtype=torch.long)).shape == (1, 40, 11)
    with pytest.raises(ValueError):
        model.generate(torch.zeros(1, 30, dtype=torch.long), torch.tensor([30]), 11)
    assert model.generate(torch.zeros(1, 30, dtype=torch.long), torch.tensor([30]), 10)[1] == 40


# --- weights in and out


def test_round_trip_of_a_language_model_is_exact(tmp_path):
    """Catches a tensor that is not saved, not loaded, or transposed once too often."""
    model = tiny_model()
    model.save_pretrained(tmp_path)
    again = GPT.from_pretrained(tmp_path)
    assert again.config == model.config
    assert all(torch.equal(p, again.state_dict()[name]) for name, p in model.state_dict().items())


def test_round_trip_of_a_scalar_model_keeps_its_scores(tmp_path, g):
    """Catches a score bias lost on the way into Hugging Face's head, which has none."""
    model, (queries, responses) = tiny_model("scalar"), random_rows(g)
    torch.nn.init.constant_(model.score.bias, 1.7)
    tokens, q, lengths, R = padded(queries, responses)
    model.save_pretrained(tmp_path)
    again = GPT.from_pretrained(tmp_path, "scalar")
    torch.testing.assert_close(again.scores(tokens, lengths), model.scores(tokens, lengths), atol=1e-5, rtol=0)
    torch.testing.assert_close(again.values(tokens, q, lengths, R), model.values(tokens, q, lengths, R), atol=1e-5, rtol=0)


def test_a_reward_model_starts_from_the_language_models_trunk(tmp_path, g):
    """Catches a reward model that starts from a random trunk."""
    model, tokens = tiny_model(), torch.randint(11, (2, 6), generator=g)
    model.save_pretrained(tmp_path)
    scalar = GPT.from_pretrained(tmp_path, "scalar")
    assert torch.equal(scalar.hidden(tokens), model.hidden(tokens))
    assert scalar.score.weight.std() > 0 and scalar.score.bias == 0


def test_a_damaged_shape_is_refused(tmp_path):
    """Catches weights of another size being broadcast or ignored."""
    tiny_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"n_positions": 41}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="wpe"):
        GPT.from_pretrained(tmp_path)


@pytest.mark.parametrize("activation", ["gelu_new", "gelu"])
def test_language_model_against_transformers(tmp_path, g, activation):
    """Catches any difference from Hugging Face's GPT-2: logits, gradients, greedy tokens, both directions."""
    hf = pytest.importorskip("transformers")
    model, tokens = tiny_model(activation=activation), torch.randint(11, (2, 8), generator=g)
    model.save_pretrained(tmp_path / "ours")
    theirs = hf.GPT2LMHeadModel.from_pretrained(tmp_path / "ours").eval()
    theirs.save_pretrained(tmp_path / "theirs")
    again = GPT.from_pretrained(tmp_path / "theirs")
    assert again.config == model.config
    logits = theirs(tokens).logits
    torch.testing.assert_close(model(tokens), logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(again(tokens), logits, atol=1e-4, rtol=0)
    for m, x in ((model, model(tokens)), (theirs, logits)):
        torch.nn.functional.cross_entropy(x[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    pairs = [(p.grad.T if transposed else p.grad, theirs.get_parameter(name).grad) for p, name, transposed in model._hf_names()]
    assert len(pairs) == len(list(theirs.parameters()))
    for ours, other in pairs:
        torch.testing.assert_close(ours, other, atol=1e-4, rtol=0)
    greedy = theirs.generate(tokens[:1], attention_mask=torch.ones(1, 8), max_new_tokens=10, do_sample=False,
                             eos_token_id=None, pad_token_id=0)
    assert model.generate(tokens[:1], torch.tensor([8]), 10, 0)[0].tolist() == greedy.tolist()


def test_scalar_model_against_transformers(tmp_path, g):
    """Catches a reward model that scores otherwise in Hugging Face's classifier, or whose gradients differ."""
    hf = pytest.importorskip("transformers")
    model, tokens = tiny_model("scalar"), torch.randint(1, 11, (1, 8), generator=g)
    torch.nn.init.constant_(model.score.bias, 1.7)
    model.save_pretrained(tmp_path / "ours")
    theirs = hf.GPT2ForSequenceClassification.from_pretrained(tmp_path / "ours").eval()
    theirs.save_pretrained(tmp_path / "theirs")
    again = GPT.from_pretrained(tmp_path / "theirs", "scalar")
    score = theirs(tokens).logits[:, 0]
    for m in (model, again):
        torch.testing.assert_close(m.scores(tokens, torch.tensor([8])), score, atol=1e-4, rtol=0)
    score.sum().backward()
    again.scores(tokens, torch.tensor([8])).sum().backward()
    for p, name, transposed in again._hf_names():
        torch.testing.assert_close(p.grad.T if transposed else p.grad, theirs.get_parameter(name).grad, atol=1e-4, rtol=0)


def rewrite(folder, change, **config):
    """Change the tensors ({name: tensor} -> the same) and config.json of a saved folder."""
    file = folder / "model.safetensors"
    safetensors.torch.save_file({k: v.contiguous() for k, v in change(safetensors.torch.load_file(file)).items()}, file)
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | config))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_old_uploads_and_other_dtypes(tmp_path, dtype):
    """Catches a need of the transformer. prefix, a trip over masks and a tied head in the file, weights left in their dtype."""
    model = tiny_model("scalar")
    model.save_pretrained(tmp_path)
    extra = {"h.0.attn.bias": torch.ones(1, 1, 40, 40), "h.0.attn.masked_bias": torch.tensor(-1e4), "lm_head.weight": torch.zeros(11, 32)}
    rewrite(tmp_path, lambda tensors: {k.removeprefix("transformer."): v.to(dtype) for k, v in tensors.items()} | extra,
            activation_function="gelu_pytorch_tanh", n_inner=128)
    for head in ("scalar", "lm"):
        if head == "lm":
            rewrite(tmp_path, lambda tensors: {k: v for k, v in tensors.items() if k != "score.weight"})
        again = GPT.from_pretrained(tmp_path, head)
        trunk = [name for name, _ in model.named_parameters() if name not in ("ln_f.bias", "score.bias") and (head == "scalar" or "score" not in name)]
        assert len(trunk) == len(list(again.parameters())) - (1 if head == "lm" else 2)
        for name in trunk:
            assert torch.equal(again.get_parameter(name), model.get_parameter(name).to(dtype).float()), name
        assert {p.dtype for p in again.parameters()} == {torch.float32} and all(p.requires_grad for p in again.parameters())


def test_loading_draws_the_new_head_and_nothing_else(tmp_path):
    """Catches time spent on initial weights that are overwritten, and a head that is left as the memory was."""
    model = tiny_model()
    model.save_pretrained(tmp_path)
    torch.manual_seed(5)
    GPT.from_pretrained(tmp_path)
    scalar = GPT.from_pretrained(tmp_path, "scalar")
    torch.manual_seed(5)
    assert torch.equal(scalar.score.weight, torch.empty(1, 32).normal_(std=1 / math.sqrt(33)))
    scalar.save_pretrained(tmp_path)
    torch.manual_seed(5)
    assert torch.equal(GPT.from_pretrained(tmp_path, "scalar").score.weight, scalar.score.weight)
    assert torch.equal(torch.get_rng_state(), torch.manual_seed(5).get_state())


@pytest.mark.parametrize("field, value", [
    ("model_type", "llama"), ("activation_function", "relu"), ("layer_norm_epsilon", 1e-6), ("n_inner", 64), ("scale_attn_weights", False),
    ("scale_attn_by_inverse_layer_idx", True), ("add_cross_attention", True), ("tie_word_embeddings", False), ("n_layer", 0), ("n_embd", "32"),
    ("vocab_size", None), ("n_head", 5), ("n_positions", 40.0), ("eos_token_id", [1, 2]), ("eos_token_id", None)])
def test_another_architecture_is_refused_by_field(tmp_path, field, value):
    """Catches a checkpoint that loads and computes something else."""
    tiny_model().save_pretrained(tmp_path)
    rewrite(tmp_path, dict, **{field: value})
    with pytest.raises(ValueError) as e:
        GPT.from_pretrained(tmp_path)
    assert field in str(e.value) and str(tmp_path / "config.json") in str(e.value) and "\n" not in str(e.value)
    with pytest.raises(DataError, match=field):
        load_model(tmp_path, "cpu")


HUB_CONFIG = """{
  "activation_function": "gelu_new",
  "architectures": [
    "GPT2LMHeadModel"
  ],
  "attn_pdrop": 0.1,
  "bos_token_id": 50256,
  "embd_pdrop": 0.1,
  "eos_token_id": 50256,
  "initializer_range": 0.02,
  "layer_norm_epsilon": 1e-05,
  "model_type": "gpt2",
  "n_ctx": 1024,
  "n_embd": %d,
  "n_head": %d,
  "n_layer": %d,
  "n_positions": 1024,%s
  "resid_pdrop": 0.1,
  "summary_activation": null,
  "summary_first_dropout": 0.1,
  "summary_proj_to_labels": true,
  "summary_type": "cls_index",
  "summary_use_proj": true,
  "task_specific_params": {
    "text-generation": {
      "do_sample": true,
      "max_length": 50
    }
  },
  "vocab_size": 50257
}"""


@pytest.mark.parametrize("name, layers, heads, width, more", [
    ("gpt2", 12, 12, 768, ""), ("gpt2-medium", 24, 16, 1024, '\n  "n_special": 0,\n  "predict_special_tokens": true,'),
    ("gpt2-large", 36, 20, 1280, ""), ("gpt2-xl", 48, 25, 1600, '\n  "output_past": true,')])
def test_openais_own_configs(name, layers, heads, width, more):
    """The hub's config.json to the byte, as its hash tells, is one that we take."""
    text = HUB_CONFIG % (width, heads, layers, more)
    assert hashlib.sha256(text.encode()).hexdigest() == download.FILES[f"{name}/config.json"][1]
    config = read_config(json.loads(text), "config.json")
    assert (config.n_layer, config.n_head, config.n_embd, config.n_positions) == (layers, heads, width, 1024)
    assert (config.vocab_size, config.eos) == (50257, 50256)


@pytest.mark.parametrize("name", ["gpt2", "gpt2-xl"])
def test_weights_by_name_are_downloaded_once(server, tmp_path, monkeypatch, name):
    """Catches a wrong address, a second download, a folder of that name passed over, and an unclear word without network."""
    monkeypatch.chdir(tmp_path)
    small = tiny_model()
    small.save_pretrained(tmp_path / "there")
    for file in ("config.json", "model.safetensors"):
        content = (tmp_path / "there" / file).read_bytes()
        server.files[f"{name}/{file}"] = content
        monkeypatch.setitem(download.FILES, f"{name}/{file}", ("https://127.0.0.1:1/" + file, hashlib.sha256(content).hexdigest()))
    for head in ("lm", "scalar", "lm"):
        model = GPT.from_pretrained(name, head)
        assert all(torch.equal(p, model.state_dict()[key]) for key, p in small.state_dict().items())
    assert [file for file, _ in server.asked] == [f"{name}/config.json", f"{name}/model.safetensors"]
    os.remove(server.cache / name / "model.safetensors")
    monkeypatch.setenv("RLHF_MIRROR", "http://127.0.0.1:1")
    for load in (GPT.from_pretrained, lambda name: load_model(name, "cpu")):
        with pytest.raises(DataError) as e:
            load(name)
        assert str(e.value).startswith(f"http://127.0.0.1:1/{name}/model.safetensors cannot be fetched")
        assert str(e.value).endswith(f"put it at {server.cache}/{name}/model.safetensors") and "\n" not in str(e.value)
    (tmp_path / "there").rename(tmp_path / name)
    assert GPT.from_pretrained(name).config == small.config
    with pytest.raises(FileNotFoundError):
        GPT.from_pretrained("gpt2-huge")


@pytest.mark.parametrize("kind", ["GPT2LMHeadModel", "GPT2Model", "GPT2ForSequenceClassification"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_what_transformers_saves(tmp_path, g, kind, dtype):
    """Catches a layout, prefix or dtype of transformers' own that we read wrongly; its random weights, its numbers."""
    hf = pytest.importorskip("transformers")
    torch.manual_seed(3)
    config = hf.GPT2Config(vocab_size=11, n_positions=40, n_layer=2, n_head=2, n_embd=32, num_labels=1, initializer_range=0.3,
                           eos_token_id=10, bos_token_id=10)
    theirs, tokens = getattr(hf, kind)(config).to(dtype), torch.randint(11, (1, 8), generator=g)
    theirs.save_pretrained(tmp_path)
    stored = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert {t.dtype for t in stored.values()} == {dtype} and any(k.startswith("transformer.") for k in stored) == (kind != "GPT2Model")
    theirs = theirs.float().eval()
    with torch.no_grad():
        if kind == "GPT2ForSequenceClassification":
            ours = GPT.from_pretrained(tmp_path, "scalar")
            torch.testing.assert_close(ours.scores(tokens, torch.tensor([8])), theirs(tokens).logits[:, 0], atol=1e-4, rtol=0)
        else:
            h = (theirs if kind == "GPT2Model" else theirs.transformer)(tokens).last_hidden_state
            for head in ("lm", "scalar"):
                torch.testing.assert_close(GPT.from_pretrained(tmp_path, head).hidden(tokens), h, atol=1e-4, rtol=0)


# --- precision and memory


precision = torch.get_float32_matmul_precision  # a setting of the whole process; conftest puts it back behind each test


def test_float32_by_onednn_is_float32(g):
    """Catches products whose factors are rounded to bf16, 65,536 times as coarse, at any shape that training has."""
    if not model.multiply_float32_by_onednn():
        pytest.skip("not on this processor")
    for B, M, K, N in ((1, 64, 128, 512), (1, 2560, 512, 128), (40, 160, 160, 32), (40, 160, 32, 160)):
        a, b, c = (torch.randn(shape, generator=g) for shape in ((B, M, K), (B, K, N), (M, N)))
        exact = a.double() @ b.double()
        for product in (a @ b, torch.baddbmm(c, a, b, alpha=0.5) * 2 - 2 * c, (b.mT @ a.mT).mT, F.linear(a[0], b[0].T.contiguous(), c[0])[None] - c[0]):
            assert (product - exact[:len(product)]).abs().max() < 3e-6 * exact.abs().max()
    assert precision() == "medium"


def test_onednn_and_mkl_agree(g):
    """Catches a mask, stride or transposed factor that one of the libraries takes otherwise: hidden states, log π, gradients, a sampled response."""
    net, results = GPT(GPTConfig(200, 128, 2, 2, 64, 0, "gelu")), []
    tokens, q, lengths = torch.randint(200, (8, 90), generator=g), torch.full((8,), 50), torch.full((8,), 90)
    for library in ("MKL", "oneDNN"):
        if library == "oneDNN" and not model.multiply_float32_by_onednn():
            pytest.skip("not on this processor")
        logp = net.logprobs(tokens, q, lengths, 40, 0.7)
        results.append([net.hidden(tokens), logp, *torch.autograd.grad(logp.mean(), list(net.parameters())),
                        *net.generate(tokens[:, :50], q, 20, 0.7, None, torch.Generator().manual_seed(1))])
    for one, other in zip(*results):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name, value", [("full", lambda *args: torch.ones(2, 256, 256)), ("cpu._is_amx_tile_supported", lambda: True)])
def test_float32_stays_with_mkl_where_onednn_rounds(monkeypatch, name, value):
    """Catches float32 given up: on a processor that would take 1 + 2^-12 for 1, and on one known to have such instructions."""
    for what, says in (("backends.mkl.is_available", True), ("backends.cpu.get_cpu_capability", "AVX512"),
                       ("cpu._is_amx_tile_supported", False), ("full", torch.full((2, 256, 256), 1.01))):  # that passes anywhere
        monkeypatch.setattr(f"torch.{what}", lambda *args, says=says: says)
    assert model.multiply_float32_by_onednn() and precision() == "medium"
    monkeypatch.setattr(f"torch.{name}", value)
    assert not model.multiply_float32_by_onednn() and precision() == "highest"
    with model.float32_by_mkl():
        assert precision() == "highest"
    assert precision() == "highest"


@pytest.mark.parametrize("name, value", [("mkl.is_available", False), ("cpu.get_cpu_capability", "AVX2")])
def test_onednn_is_not_asked_where_pytorch_would_not_heed_it(monkeypatch, name, value):
    """Catches "by oneDNN" said of a processor or a build where the setting changes nothing."""
    for what, says in (("mkl.is_available", True), ("cpu.get_cpu_capability", "AVX512"), (name, value)):
        monkeypatch.setattr(f"torch.backends.{what}", lambda says=says: says)
    monkeypatch.setattr("torch.full", lambda *args: 1.01 * torch.ones(2, 256, 256))
    assert not model.multiply_float32_by_onednn() and precision() == "highest"


def test_decoding_steps_go_to_mkl_and_training_does_not(monkeypatch):
    """Catches either left with the slower library, also behind a generation that was broken off."""
    seen = []
    monkeypatch.setattr(model.multiply_float32_by_onednn, "does", True)
    torch.set_float32_matmul_precision("medium")
    monkeypatch.setattr(Sampler, "prefill", lambda self, f=Sampler.prefill: seen.append(precision()) or f(self))
    monkeypatch.setattr(Sampler, "read", lambda self: seen.append(precision()) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tiny_model().generate(torch.ones(2, 3, dtype=torch.long), torch.tensor([2, 3]), 4)
    assert seen + [precision()] == ["medium", "highest", "medium"]


def test_the_device_brings_its_settings(monkeypatch, capsys):
    """Catches a setting that is made and not said, or said and not made."""
    for works in (True, False):
        monkeypatch.setattr("sft.multiply_float32_by_onednn", lambda: works)
        monkeypatch.setattr("sft.keep_freed_memory", lambda: works)
        assert pick_device("cpu") == "cpu"
        said = capsys.readouterr().out
        assert ("oneDNN" in said) == ("freed memory" in said) == works


glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="not the C library of Linux")


def in_a_process(script, how):
    """What the script prints in a Python of its own, with no other settings of malloc."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD"))}
    return subprocess.run([sys.executable, "-c", script, how], cwd=os.path.dirname(model.__file__), check=True, capture_output=True, text=True,
                          env=env).stdout


FAULTS = """
import ctypes, resource, sys
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # no huge pages: they would hide the faults
import torch
import model
if sys.argv[1] == "keep":
    assert model.keep_freed_memory()
torch.set_num_threads(1)
def step():  # blocks above and below 32 MB, where the C library's own rules differ
    return sum(float(torch.zeros(n).sum()) for n in (2**24, 2**22, 2**24))
for _ in range(6):  # the heap may grow once more after a few
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@glibc
def test_freed_memory_is_not_asked_for_again():
    """Page faults of eight steps that allocate 144 MB each: as many as the memory has pages, eight times over, or next to none."""
    faults = {how: int(in_a_process(FAULTS, how)) for how in ("keep", "as it is")}
    assert faults["keep"] < 100 < 8 * 1024 < faults["as it is"]


HEAPS = """
import ctypes, sys, threading, torch
import model
if sys.argv[1] == "keep":
    assert model.keep_freed_memory()
libc, barrier = ctypes.CDLL(None), threading.Barrier(6)
def work():
    torch.ones(10**6)
    barrier.wait()
threads = [threading.Thread(target=work) for _ in range(6)]
for do in (threading.Thread.start, threading.Thread.join):
    for thread in threads:
        do(thread)
libc.malloc_info(0, ctypes.c_void_p.in_dll(libc, "stdout"))
libc.fflush(None)
"""


@glibc
def test_threads_share_two_heaps():
    """Catches a heap for each thread, whose freed memory no other thread can use, and one for all, on which two threads wait."""
    heaps = {how: in_a_process(HEAPS, how).count("<heap nr=") for how in ("keep", "as it is")}
    assert heaps["keep"] == 2 < heaps["as it is"]
