"""
What a run will take: memory of each stage before it begins, time by this machine's speed at matrix products. What cannot fit is refused.

Counted are weights, gradients and Adam's two moments in float32, what the backward pass keeps of the forward, logits, and the sampler's
cache; not counted are allocators and libraries, data, evaluation and the choice of an SFT epoch by reward. Time is floating-point
operations over a speed measured here, of which a training step is taken to reach a third: right within a factor of about two.
"""
import os
import time

import torch

from data import DataError
from model import choose_precision
from sft import side_by_side

EFFICIENCY = 1 / 3  # of the speed at large matrix products
GB = 2**30


def parameters(c):
    """Numbers in a GPT of this GPTConfig."""
    d = c.n_embd
    return c.vocab_size * d + c.n_positions * d + c.n_layer * (12 * d * d + 13 * d) + 2 * d


def kept(c, rows, T, device, recompute=False):
    """Bytes that the backward pass keeps of the blocks' forward over rows [rows, T], half of them in bf16 where matrix products are."""
    half = 2 if choose_precision(device)[0] == torch.bfloat16 else 4
    # two inputs of layer norms; in matrix products' precision the norms, q k v, mixed values, twice 4d of the MLP
    block = rows * T * c.n_embd * (8 + (14 if half == 2 else 16) * half)
    if device != "cuda":  # the softmax [T, T] of each head; the kernels on a GPU keep none
        block += rows * c.n_head * T * T * half
    inputs = rows * T * c.n_embd * 4  # of a block, and of the last layer norm
    return inputs * (c.n_layer + 1) + block if recompute else inputs + c.n_layer * block


def parts_memory(P, V, rows, predicted, micro, device):
    """Bytes of the logits of so many rows, their softmax and gradient; on a CPU they and the gradients are there in two halves
    (sft.backward_parts)."""
    parts = 2 if side_by_side(device, rows, micro) else 1
    return parts * 3 * min(2**27, 4 * rows * predicted * V / parts) + (parts - 1) * 4 * P


def forward_flops(c, tokens, T):
    """Of the blocks, for so many tokens in rows of T."""
    return tokens * c.n_layer * (24 * c.n_embd**2 + 2 * T * c.n_embd)


def stages(s, c, Q, R, sizes, device):
    """-> {stage: (bytes, floating-point operations)}. sizes: {"pretrain", "sft": tokens in all, "query": mean length of sft's, "groups":
    posts of comparisons, "responses": compared texts, "sampled": posts that the collection samples for, held out ones too; left out
    where people have labelled, "mock": tokens that a classifier in their place is trained on}; pretrain 0 where weights are given."""
    P, T, V = parameters(c), Q + R, c.vocab_size
    unembed, trained = 2 * V * c.n_embd, 16 * P  # operations per token; bytes of weights, gradients and moments
    out = {}
    for name in ("pretrain", "sft"):
        part, tokens = getattr(s, name), sizes[name] * getattr(s, name).epochs / (1 - getattr(s, name).mix)
        rows = min(part.micro or part.batch, part.batch)
        predicted = T if part.query_weight else R
        memory = trained + kept(c, rows, T, device, part.recompute) + parts_memory(P, V, rows, predicted, part.micro, device)
        out[name] = memory, (4 if part.recompute else 3) * forward_flops(c, tokens, T) + 3 * unembed * tokens * predicted / T
    half = 2 if choose_precision(device)[0] == torch.bfloat16 else 4
    cache = T * c.n_layer * 2 * c.n_embd * (4 if device == "cpu" else half)  # per row; model.generate steps in float32 on a CPU
    if sizes.get("sampled"):  # of two models, 384 rows at a time; for three policies each query is read
        rows = sizes["sampled"] * s.collect.k
        tokens = 3 * sizes["sampled"] * sizes["query"] + rows * R
        out["collect"] = 8 * P + min(384, rows) * cache, forward_flops(c, tokens, T) + rows * R * unembed
        if sizes.get("mock"):  # is trained, then reads every sample behind its query
            memory, flops = out["collect"]
            out["collect"] = (max(memory, trained + kept(c, s.reward.batch, T, device, s.reward.recompute)),
                              flops + forward_flops(c, 3 * sizes["mock"] * s.reward.epochs + rows * T, T))
    each = sizes["query"] + R * sizes["responses"] / max(1, sizes["groups"])
    posts = min(s.reward.micro or s.reward.batch, s.reward.batch)
    rows, layers = posts * each / T, 1 if s.reward.recompute else c.n_layer
    branch = 2 * half * layers * c.n_head * T * posts * R * sizes["responses"] / max(1, sizes["groups"])  # the softmax over the query
    out["reward"] = (trained + kept(c, rows, T, device, s.reward.recompute) + branch,
                     (4 if s.reward.recompute else 3) * forward_flops(c, sizes["groups"] * each * s.reward.epochs, T)
                     * (s.collect.rounds + 1) / 2)  # labels grow from 1 / rounds to all
    p = s.ppo
    per_minibatch = -(-p.batch // p.minibatches)
    networks = {"separate": 2, "scratch": 2, "shared": 1}[p.value]
    held = trained * networks + 8 * P + (4 * P if p.ema else 0)  # policy and value model; reference and reward model
    sampling = p.batch * cache
    judging = kept(c, p.batch, T, device) / c.n_layer * 2
    predicted = T if p.ptx_coef and s.pretrain.query_weight else R
    rows = min(p.micro or per_minibatch, per_minibatch)
    update = kept(c, rows, T, device, p.recompute) + parts_memory(P, V, rows, predicted, p.micro, device)
    episodes = p.iterations * p.batch * (1 if s.collect.online else s.collect.rounds)
    there_and_back = 4 if p.recompute else 3
    passes = 1 + 4 + p.epochs * 2 * there_and_back  # sampling; policy, reference, score, value; policy and value model trained
    flops = passes * forward_flops(c, episodes * (sizes["query"] + R), T) + (3 + p.epochs * 3) * unembed * episodes * R
    if p.ptx_coef:
        rows = episodes * p.epochs * p.ptx_ratio
        flops += there_and_back * forward_flops(c, rows * T, T) + 3 * unembed * rows * predicted
    out["ppo"] = held + max(sampling, judging, update), flops
    return out


def free_memory(device):
    """Bytes that a run may take on this device; None where the system does not tell."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    try:
        with open("/proc/meminfo") as f:
            return next(int(line.split()[1]) * 1024 for line in f if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        try:
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        except (AttributeError, ValueError, OSError):
            return None


def matmul_speed(device, seconds=0.2):
    """Operations per second of matrix products of 1024 x 1024 in the precision of the run."""
    a = torch.ones(1024, 1024, dtype=choose_precision(device)[0], device=device)
    a @ a  # the first one compiles

    def done():
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()
    began, n = done(), 0
    while done() - began < seconds:
        a @ a
        n += 1
    return 2 * 1024**3 * n / (done() - began)


def advice(stage, s):
    """What makes a stage smaller."""
    if stage == "collect":
        return f"--model.max_query below {s.model.max_query}, or a smaller model"
    part = getattr(s, stage)
    ways = [f"{stage}.batch below {part.batch}"]
    if hasattr(part, "micro"):
        ways = [f"{stage}.micro below {part.micro or part.batch}", *ways, *([] if part.recompute else [f"{stage}.recompute true"])]
    return ", ".join(f"--{way}" for way in ways) + ", or a smaller model"


def check_resources(s, c, Q, R, sizes, device, weights_given):
    """Print what the run will take; raise DataError where a stage cannot fit."""
    needs = stages(s, c, Q, R, sizes, device)
    if weights_given:
        del needs["pretrain"]
    free, speed = free_memory(device), matmul_speed(device)
    seconds = {name: flops / (speed * EFFICIENCY) for name, (_, flops) in needs.items()}
    print(f"estimate: {parameters(c):,} parameters; {speed / 1e9:,.0f} GFLOP/s at matrix products here, a third of it in training")
    for name, (memory, _) in needs.items():
        print(f"  {name:8} {memory / GB:6.2f} GB  {show_time(seconds[name])}")
    print(f"  in all, besides data{'' if 'collect' in needs else ', collection'} and evaluation, {show_time(sum(seconds.values()))}"
          + (f"; {free / GB:.1f} GB are free" if free else ""))
    for name, (memory, _) in needs.items():
        if free is not None and memory > free:
            raise DataError(f"stage {name} needs about {memory / GB:.1f} GB of memory and {free / GB:.1f} GB are free; "
                            f"try {advice(name, s)}")


def show_time(seconds):
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
