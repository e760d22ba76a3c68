"""
GPT-2 from scratch, in one file: the transformer, its attention, the way in and out of weights, and the sampler.

References: Radford et al. 2019 (GPT-2); Stiennon 2020 appendix B (scalar head); Hugging Face's GPT-2 checkpoint layout.

    model = GPT(GPTConfig(vocab_size=1024))            # or GPT.from_pretrained("out/tiny-seed1/sft")
    tokens, lengths, logprobs = model.generate(queries, lengths, max_new_tokens=48, temperature=0.7, eos=model.config.eos)

Rows are right-padded everywhere and carry `lengths`. Causality hides what stands to the right of a position, so the
attention over whole rows needs the causal mask alone, positions are 0..T-1, and nothing is ever shifted; only where
responses share a query (Block.branch) and where the sampler reads its cache are keys masked by length.
Shapes: B rows, Q query tokens, R response tokens, T = Q + R, V vocabulary, d width, H heads, D = d / H.
"""
import ctypes
import functools
import json
import math
import os
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from download import GPT2_FILES, fetch

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU and MPS need none
    triton = None


@dataclass
class GPTConfig:
    vocab_size: int = 50257
    n_positions: int = 1024  # longest row, query and response together
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768  # d
    eos: int = 50256  # written to config.json so that other programs know where a text ends
    activation: str = "gelu_new"  # Hugging Face's names: GPT-2's own, or "gelu", for models from scratch (GELU says why)


# GELU(x) = x Φ(x), Φ the normal distribution function (Hendrycks & Gimpel 2016). GPT-2 takes a formula with tanh for Φ, which moves
# GELU by 5e-4 at most and for which PyTorch has a slow kernel on CPUs: three times the exact one's time, 7 % of a training step.
GELU = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "none"}  # config.json's name: F.gelu's `approximate`


# ---------------------------------------------------------------------------------------------------------------------
# precision and memory: chosen once per device, with the reason

def choose_precision(device):
    """(dtype of the matrix products, reason). Everything that a loss is made of stays float32 in any case."""
    if device == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "this GPU multiplies bf16 natively"
        return torch.float32, "this GPU has no native bf16"
    if device == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return torch.bfloat16, "this processor multiplies bf16 natively (AVX512-BF16 or AMX)"
    return torch.float32, f"no fast bf16 on this {device}"


def keep_freed_memory():
    """Have the C library of Linux keep what tensors free. -> whether it will

    By default it gives large blocks back and asks for them again at the next step, and the system hands them out zeroed, page by
    page: of a training step of our small model that was 10 to 20 %. Threads share two heaps. With one, the two halves of
    sft.backward_parts wait for each other when they ask for memory, and are given what lies in the other core's cache: that was 5 %; with
    many, each would keep what its threads have freed. Of blocks above 64 MB the second heap keeps none."""
    M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # of mallopt(3)
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # macOS, Windows and musl have none
        return False
    return bool(mallopt(M_TRIM_THRESHOLD, 2**31 - 1) and mallopt(M_MMAP_MAX, 0) and mallopt(M_ARENA_MAX, 2))


def multiply_float32_by_onednn():
    """Have oneDNN multiply float32 matrices on a CPU, where PyTorch takes MKL: on an AMD EPYC with AVX512 that takes 10 % off a training
    step in float32. -> whether it does

    PyTorch's way to say so, "medium", also lets oneDNN round the factors to bf16. It does so with AMX, and not with AVX512-BF16,
    whose products it makes of bf16 alone: so it is tried out, and where it rounds MKL stays. Without AVX512, and on Arm, PyTorch would not heed it."""
    if not torch.backends.mkl.is_available() or not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return False
    torch.set_float32_matmul_precision("medium")
    x = torch.full((2, 256, 256), 1 + 2**-12)  # in bf16 it would be 1, and 256 the sum of 256 squares
    exact = not torch.cpu._is_amx_tile_supported() and min((y @ x[1]).min().item() for y in (x[0], x[0].T, x)) > 256.1
    torch.set_float32_matmul_precision("medium" if exact else "highest")
    multiply_float32_by_onednn.does = exact
    return exact


multiply_float32_by_onednn.does = False


@contextmanager
def float32_by_mkl():
    """Within, MKL again, if oneDNN had taken its place: MKL is the faster one at the few rows of a decoding step, by a fifth."""
    if not multiply_float32_by_onednn.does:
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("medium")


def round_up(n, multiple):
    """Shapes are padded up to a few sizes: oneDNN compiles a kernel for each new shape, which costs more time than the padding,
    and memory for each kernel."""
    return -(-n // multiple) * multiple


# ---------------------------------------------------------------------------------------------------------------------
# attention: the specification

def attention_weights(q, k):
    """softmax(q kᵀ / √D + mask), causal. q [N, T, D], k [N, S, D] -> [N, T, S]; the T <= S queries are the last ones of the row."""
    T, S = q.shape[1], k.shape[1]
    mask = torch.full((T, S), float("-inf"), dtype=q.dtype, device=q.device).triu(1 + S - T)  # keys behind a query: the future
    return torch.baddbmm(mask, q, k.transpose(1, 2), alpha=1 / math.sqrt(q.shape[-1])).softmax(-1)  # scale, product, mask in one pass


def plain_attention(q, k, v):
    """Causal attention, softmax(q kᵀ / √D + mask) v. k, v [B, H, S, D], q [B, H, T, D] -> [B, H, T, D]; the T <= S queries
    are the last ones of the row."""
    return (attention_weights(q.flatten(0, 1), k.flatten(0, 1)) @ v.flatten(0, 1)).view(q.shape)


class AttentionInParts(torch.autograd.Function):
    """plain_attention as a CPU likes it: a few rows at a time, so that their scores stay in the processor's cache (`most` of them), of
    long rows a strip of queries, whose product leaves out the keys behind its last query. Each part writes where its numbers
    belong. The backward pass, of p = softmax(q kᵀ / √D) and o = p v:

        dv = pᵀ do,   dp = do vᵀ,   ds = p (dp - rowsum(p dp)),   dq = ds k / √D,   dk = dsᵀ q / √D"""

    @staticmethod
    def forward(ctx, q, k, v, most, strip):
        (B, H, T, D), S = q.shape, k.shape[2]
        n, kept, ctx.parts = max(1, most // (H * T * S)), [], []
        o = q.new_empty(B, T, H, D).transpose(1, 2)  # in memory as [B, T, H, D]: the caller joins the heads without a copy
        for b in range(0, B, n):
            for t in reversed(range(0, T, strip)):  # the last strip first: it sees every key
                rows, end = slice(b, b + n), S - T + min(t + strip, T)
                queries, keys = (rows, slice(None), slice(t, t + strip)), (rows, slice(None), slice(end))
                qi, kj, vj = (x.reshape(-1, x.shape[2], D) for x in (q[queries], k[keys], v[keys]))
                p = attention_weights(qi, kj)
                o[queries] = (p @ vj).view(o[queries].shape)
                if any(ctx.needs_input_grad):
                    ctx.parts.append((queries, keys))
                    kept += [qi, kj, vj, p]
        ctx.save_for_backward(*kept)
        ctx.shapes = q.shape, k.shape
        return o

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do):
        (B, H, T, D), (_, _, S, _) = ctx.shapes
        dq, dk, dv = (do.new_empty(B, n, H, D).transpose(1, 2) for n in (T, S, S))
        saved = ctx.saved_tensors  # read once: a checkpointed block allows no more
        for (queries, keys), q, k, v, p in zip(ctx.parts, *(saved[i::4] for i in range(4))):
            doi = do[queries].reshape(q.shape)
            ds = torch._softmax_backward_data(doi @ v.transpose(1, 2), p, -1, p.dtype).mul_(1 / math.sqrt(D))
            dq[queries] = (ds @ k).view(dq[queries].shape)
            for dx, add in (dk, ds.transpose(1, 2) @ q), (dv, p.transpose(1, 2) @ doi):
                add = add.view(dx[keys].shape)
                dx[keys] = add if add.shape[2] == S else add.add_(dx[keys])  # nothing is there yet when the last strip comes
        return dq, dk, dv, None, None


def attention_in_parts(q, k, v, most=2**20, strip=256):
    """plain_attention on a CPU"""
    return AttentionInParts.apply(q, k, v, most, strip)


# ---------------------------------------------------------------------------------------------------------------------
# attention: the kernels
#
# FlashAttention-2 (Dao 2023, arXiv:2307.08691, algorithms 1 and 2): neither the scores s nor p = softmax(s), [T, T] each,
# ever reaches memory; the backward recomputes p tile by tile from q, k and lse = logsumexp(s) [B, H, T]. Two differences:
# dq has a kernel of its own instead of atomic adds (7 products for 5, but every run gives the same bits), and delta =
# rowsum(o * do) is made by that kernel, which reads these rows anyway.
#
# Caveats: compiled for Hopper (no register spills) and checked against float64 in Triton's interpreter, but timed on no GPU
# yet; no dropout, no bias, no mask but the causal one, no second derivative.

# (M query rows, N keys, num_warps, num_stages) by padded head size. A table, not autotune: two runs compute the same
# bits. On sm_90 none spills; a warp group (4 warps) wants 64 rows of its left operand: q in fwd and dq, k in dkdv.
BLOCKS = {
    "fwd": {16: (128, 64, 4, 3), 32: (128, 64, 4, 3), 64: (128, 64, 4, 3), 128: (128, 64, 8, 3)},
    "dq": {16: (128, 64, 8, 3), 32: (128, 64, 8, 3), 64: (128, 64, 8, 3), 128: (128, 64, 8, 2)},
    "dkdv": {16: (64, 64, 4, 2), 32: (64, 64, 4, 2), 64: (64, 64, 4, 2), 128: (32, 128, 8, 2)},
}
BLOCKS_FP32 = (32, 32, 4, 1)  # exact float32 has no matrix instruction: tiles for tests, not for speed

if triton is not None:
    INTERPRET = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1, set before the import: kernels run on the CPU
    LOG2E = tl.constexpr(1.4426950408889634)  # softmax in base 2: the GPU has exp2 only, exp costs a multiply more

    @triton.jit
    def _dot(a, b, acc=None):
        return tl.dot(a, b, acc, input_precision="ieee")  # or float32 would be cut to TF32's 10 bits

    @triton.jit
    def _head(x, stride):
        """Address of x[b, h]. In 64 bits: b * stride passes 2^31 at batch sizes that fit in memory."""
        return x + tl.program_id(2).to(tl.int64) * stride[0] + tl.program_id(1).to(tl.int64) * stride[1]

    @triton.jit
    def _head_rows(x, T):
        """Address of x[b, h] for lse and delta: contiguous [B, H, T]."""
        return x + (tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * T

    @triton.jit
    def _rows(start, T, BLOCK: tl.constexpr, EDGE: tl.constexpr):
        """start .. start+BLOCK. Where the tile may cross the EDGE, rows past T repeat row T-1: cheaper than masked
        loads, and nothing is read out of bounds. No caller lets the repeats count."""
        if EDGE:
            return start + tl.minimum(tl.arange(0, BLOCK), T - 1 - start)
        else:
            return start + tl.arange(0, BLOCK)

    @triton.jit
    def _load(x, stride, rows, D: tl.constexpr, DP: tl.constexpr):
        """x[rows] of x [T, D] as [len(rows), DP], zeros past D."""
        cols = tl.arange(0, DP)
        x += rows.to(tl.int64)[:, None] * stride[2] + cols[None, :]
        if D == DP:
            return tl.load(x)
        else:
            return tl.load(x, mask=cols[None, :] < D, other=0.0)

    @triton.jit
    def _store(x, stride, start, T, tile, D: tl.constexpr):
        rows, cols = start + tl.arange(0, tile.shape[0]), tl.arange(0, tile.shape[1])
        x += rows.to(tl.int64)[:, None] * stride[2] + cols[None, :]
        tl.store(x, tile.to(x.dtype.element_ty), mask=(rows < T)[:, None] & (cols < D)[None, :])

    @triton.jit(do_not_specialize=["T"])
    def _attn_fwd(q, k, v, o, lse, sq, sk, sv, so, T,
                  D: tl.constexpr, DP: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
        """o and lse of M query rows, by online softmax over the keys up to the diagonal."""
        q, k, v, o, lse = _head(q, sq), _head(k, sk), _head(v, sv), _head(o, so), _head_rows(lse, T)
        m0 = (tl.num_programs(0) - 1 - tl.program_id(0)) * M  # the last rows see the most keys: start the longest first
        rows = m0 + tl.arange(0, M)
        scale: tl.constexpr = LOG2E / D**0.5

        qi = _load(q, sq, _rows(m0, T, M, True), D, DP)
        m = tl.full([M], -float("inf"), tl.float32)  # running maximum of s log2(e)
        l = tl.zeros([M], tl.float32)  # running sum of exp2(s log2(e) - m)
        acc = tl.zeros([M, DP], tl.float32)
        diagonal = m0 // N * N  # key tiles left of it lie wholly in the past: no mask, 8 instructions per score, not 11
        for MASKED in tl.static_range(2):
            lo = diagonal if MASKED else 0
            hi = tl.minimum(m0 + M, T) if MASKED else diagonal
            for n0 in range(lo, hi, N):
                keys = _rows(n0, T, N, MASKED)
                kj = _load(k, sk, keys, D, DP)
                vj = _load(v, sv, keys, D, DP)
                s = _dot(qi, tl.trans(kj))
                if MASKED:  # hides keys past T too: they come after every real row
                    s = tl.where(rows[:, None] >= n0 + tl.arange(0, N)[None, :], s, -float("inf"))
                m_new = tl.maximum(m, tl.max(s, 1) * scale)  # finite from the first tile on: each row sees a key of it
                p = tl.exp2(s * scale - m_new[:, None])
                alpha = tl.exp2(m - m_new)
                l = l * alpha + tl.sum(p, 1)
                acc = _dot(p.to(vj.dtype), vj, acc * alpha[:, None])
                m = m_new
        _store(o, so, m0, T, acc / l[:, None], D)
        tl.store(lse + rows, m + tl.log2(l), mask=rows < T)  # in base 2, as the backward takes it

    @triton.jit(do_not_specialize=["T"])
    def _attn_bwd_dq(q, k, v, o, do, dq, lse, delta, sq, sk, sv, so, sdo, sdq, T,
                     D: tl.constexpr, DP: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
        """dp = do v^T,  ds = p * (dp - delta),  dq = ds k / sqrt(D) of M query rows; leaves delta for dkdv."""
        q, k, v, lse = _head(q, sq), _head(k, sk), _head(v, sv), _head_rows(lse, T)
        o, do, dq, delta = _head(o, so), _head(do, sdo), _head(dq, sdq), _head_rows(delta, T)
        m0 = (tl.num_programs(0) - 1 - tl.program_id(0)) * M
        rows = m0 + tl.arange(0, M)
        scale: tl.constexpr = LOG2E / D**0.5

        near = _rows(m0, T, M, True)
        qi, doi, li = _load(q, sq, near, D, DP), _load(do, sdo, near, D, DP), tl.load(lse + near)
        di = tl.sum(_load(o, so, near, D, DP).to(tl.float32) * doi.to(tl.float32), 1)
        tl.store(delta + rows, di, mask=rows < T)
        acc = tl.zeros([M, DP], tl.float32)
        diagonal = m0 // N * N
        for MASKED in tl.static_range(2):
            lo = diagonal if MASKED else 0
            hi = tl.minimum(m0 + M, T) if MASKED else diagonal
            for n0 in range(lo, hi, N):
                keys = _rows(n0, T, N, MASKED)
                kj = _load(k, sk, keys, D, DP)
                vj = _load(v, sv, keys, D, DP)
                p = tl.exp2(_dot(qi, tl.trans(kj)) * scale - li[:, None])
                if MASKED:
                    p = tl.where(rows[:, None] >= n0 + tl.arange(0, N)[None, :], p, 0.0)
                dp = _dot(doi, tl.trans(vj))
                ds = p * (dp - di[:, None])
                acc = _dot(ds.to(kj.dtype), kj, acc)
        _store(dq, sdq, m0, T, acc * (1 / D**0.5), D)

    @triton.jit(do_not_specialize=["T"])
    def _attn_bwd_dkdv(q, k, v, do, dk, dv, lse, delta, sq, sk, sv, sdo, sdk, sdv, T,
                       D: tl.constexpr, DP: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
        """dv = p^T do,  dk = ds^T q / sqrt(D) of N keys. Score tiles are transposed, [keys, rows]: p^T and ds^T leave
        one matmul laid out, in registers, as the left operand of the next."""
        q, k, v, lse = _head(q, sq), _head(k, sk), _head(v, sv), _head_rows(lse, T)
        do, dk, dv, delta = _head(do, sdo), _head(dk, sdk), _head(dv, sdv), _head_rows(delta, T)
        n0 = tl.program_id(0) * N  # the first keys are seen by the most rows: longest first as it is
        keys = n0 + tl.arange(0, N)
        scale: tl.constexpr = LOG2E / D**0.5

        near = _rows(n0, T, N, True)
        kj, vj = _load(k, sk, near, D, DP), _load(v, sv, near, D, DP)
        acc_k = tl.zeros([N, DP], tl.float32)
        acc_v = tl.zeros([N, DP], tl.float32)
        past = tl.cdiv(n0 + N, M) * M  # from this row on, all N keys lie in the past
        last = tl.maximum(past, T // M * M)  # the tile that T cuts
        for PART in tl.static_range(3):  # diagonal, interior, last
            lo = n0 // M * M if PART == 0 else (past if PART == 1 else last)
            hi = tl.minimum(past, T) if PART == 0 else (last if PART == 1 else T)
            for m0 in range(lo, hi, M):
                rows = _rows(m0, T, M, PART != 1)
                qi, doi = _load(q, sq, rows, D, DP), _load(do, sdo, rows, D, DP)
                pT = tl.exp2(_dot(kj, tl.trans(qi)) * scale - tl.load(lse + rows)[None, :])
                if PART != 1:
                    row = m0 + tl.arange(0, M)
                    row = tl.where(row < T, row, -1)  # past T: sees no key
                    pT = tl.where(row[None, :] >= keys[:, None], pT, 0.0)
                acc_v = _dot(pT.to(doi.dtype), doi, acc_v)
                dpT = _dot(vj, tl.trans(doi))
                dsT = pT * (dpT - tl.load(delta + rows)[None, :])
                acc_k = _dot(dsT.to(qi.dtype), qi, acc_k)
        _store(dv, sdv, n0, T, acc_v, D)
        _store(dk, sdk, n0, T, acc_k * (1 / D**0.5), D)

    def _launch(name, kernel, *args):
        """kernel(*args, the strides of those args that are [B, H, T, D], in order, ...) over all tiles of all heads."""
        q = args[0]
        B, H, T, D = q.shape
        DP = max(16, triton.next_power_of_2(D))
        M, N, warps, stages = BLOCKS_FP32 if q.dtype == torch.float32 else BLOCKS[name][DP]
        grid = (triton.cdiv(T, N if name == "dkdv" else M), H, B)
        strides = [x.stride()[:3] for x in args if x.dim() == 4]
        kernel[grid](*args, *strides, T, D, DP, M, N, num_warps=warps, num_stages=stages, enable_fp_fusion=True)

    def _unit_stride(*tensors):
        """The kernels take any strides but the last, which is not 1 in, say, the gradient of o.sum()."""
        return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]

    # Custom ops are opaque to torch.compile, which then runs these very launches; triton_op would have it retrace and
    # recompile the kernels, in which it has nothing to fuse.
    @torch.library.custom_op("fused_attention::forward", mutates_args=())
    def _attn_forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v = _unit_stride(q, k, v)
        o, lse = _fake_forward(q, k, v)
        _launch("fwd", _attn_fwd, q, k, v, o, lse)
        return o, lse

    @_attn_forward.register_fake
    def _fake_forward(q, k, v):
        B, H, T, D = q.shape  # o lies in memory as [B, T, H, D]: the caller joins the heads without a copy
        return q.new_empty(B, T, H, D).transpose(1, 2), q.new_empty(B, H, T, dtype=torch.float32)

    @torch.library.custom_op("fused_attention::backward", mutates_args=())
    def _attn_backward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, o: torch.Tensor, lse: torch.Tensor,
                  do: torch.Tensor) -> torch.Tensor:
        q, k, v, do = _unit_stride(q, k, v, do)
        grad = _fake_backward(q, k, v, o, lse, do)
        dq, dk, dv = grad.permute(2, 0, 3, 1, 4)
        delta = torch.empty_like(lse)
        _launch("dq", _attn_bwd_dq, q, k, v, o, do, dq, lse, delta)  # first: it writes delta
        _launch("dkdv", _attn_bwd_dkdv, q, k, v, do, dk, dv, lse, delta)
        return grad

    @_attn_backward.register_fake
    def _fake_backward(q, k, v, o, lse, do):
        B, H, T, D = q.shape  # one tensor [B, T, 3, H, D], since an op's outputs must not share memory
        return q.new_empty(B, T, 3, H, D)


class FusedAttention(torch.autograd.Function):
    """The two ops as one differentiable function. No second derivative."""

    @staticmethod
    def forward(ctx, q, k, v):
        o, lse = _attn_forward(q, k, v)
        ctx.save_for_backward(q, k, v, o, lse)
        return o

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do):
        return _attn_backward(*ctx.saved_tensors, do).permute(2, 0, 3, 1, 4).unbind(0)


def fused_attention(q, k, v):
    """plain_attention by the kernels: q, k, v [B, H, T, D] of one shape and one dtype (bfloat16, float16, float32), any
    strides (views of a fused projection are not copied), 16 <= D <= 128. Returns [B, H, T, D] whose transpose(1, 2) is
    contiguous. Raises ValueError for anything else."""
    if triton is None or not (q.is_cuda or INTERPRET):
        raise ValueError("fused_attention needs Triton and a GPU (or TRITON_INTERPRET=1): use plain_attention")
    if not q.shape == k.shape == v.shape or q.dim() != 4 or not 16 <= q.shape[-1] <= 128:
        shapes = ", ".join(str(list(x.shape)) for x in (q, k, v))
        raise ValueError(f"fused_attention needs q, k, v of one shape [B, H, T, D], 16 <= D <= 128, got {shapes}")
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"fused_attention needs q, k, v all bf16, fp16 or fp32, got {q.dtype}, {k.dtype}, {v.dtype}")
    if INTERPRET and q.dtype == torch.bfloat16:  # the interpreter would compute on its bit patterns, silently
        return FusedAttention.apply(q.float(), k.float(), v.float()).to(q.dtype)
    return FusedAttention.apply(q, k, v)


# ---------------------------------------------------------------------------------------------------------------------
# attention: the choice

@functools.cache
def fused_attention_works(device_index, D):
    """Whether the kernels give plain_attention's numbers on this GPU, tried once per head size; the answer is printed."""
    why = "no Triton here"
    if triton is not None and 16 <= D <= 128:
        generator = torch.Generator().manual_seed(0)
        q, k, v, do = (torch.randn(1, 2, 150, D, generator=generator).to(f"cuda:{device_index}", torch.bfloat16).requires_grad_()
                       for _ in range(4))
        try:
            with torch.enable_grad(), torch.autocast("cuda", enabled=False):  # whoever asks first may be sampling
                fused, plain = (torch.autograd.grad(f(q, k, v), (q, k, v), do) for f in (fused_attention, plain_attention))
            error = torch.stack([(a - b).abs().max() for a, b in zip(fused, plain)]).max().item()  # NaN stays NaN
            why = f"gradients within {error:.2g} of the plain ones"
            if error < 0.1:
                print(f"attention: fused Triton kernels, head size {D} ({why})")
                return True
        except Exception as e:  # whatever a compiler or driver of another version may raise
            why = f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"
    print(f"attention: plain PyTorch, head size {D} ({why})")
    return False


def attention(q, k, v):
    """Causal attention [B, H, T, D]: the kernels on a GPU where they work, the specification everywhere else, on a CPU in parts."""
    if q.is_cuda and fused_attention_works(q.device.index, q.shape[-1]):
        return fused_attention(q, k, v)
    return (attention_in_parts if q.device.type == "cpu" else plain_attention)(q, k, v)


# ---------------------------------------------------------------------------------------------------------------------
# the transformer

def logits(h, w, dtype, temperature=1.0):
    """h wᵀ / temperature of h [N, d] and w [V, d] in float32, the factors in `dtype` where the device can do that. A result in bf16
    would be off by up to ¼: GPT-2's logits lie around -100, where bf16 has steps of ½."""
    z = torch.mm(h.to(dtype), w.to(dtype).T, out_dtype=torch.float32) if h.is_cuda and dtype != torch.float32 else F.linear(h, w)
    return z if temperature == 1 else z.div_(temperature)


class Unembed(torch.autograd.Function):
    """logits() with a gradient, whose products are in `dtype`: gradients of logits are small and bear the rounding."""

    @staticmethod
    def forward(ctx, h, w, dtype):
        ctx.save_for_backward(h, w)
        ctx.dtype = dtype
        return logits(h, w, dtype)

    @staticmethod
    def backward(ctx, g):
        h, w, g = (x.to(ctx.dtype) for x in (*ctx.saved_tensors, g))
        return (g @ w).float(), (g.T @ h).float(), None


class LogPi(torch.autograd.Function):
    """log softmax(z)[y], [N], of the logits z = h wᵀ / temperature of hidden states h [N, d], embeddings w [V, d] and tokens y [N].

    With π = softmax(z) it is z_y - max z + log max π, as max π = 1 / Σ exp(z - max z): finite also where π(y) is 0 in float32.
    d log π(y) / dz = 1[y] - π, and so it is π that is made and kept, not log π. The logits are made in chunks of rows, [n, V]; the
    backward pass makes those of more than one chunk again, so that [N, V] in float32 never exists at once."""

    @staticmethod
    def forward(ctx, h, w, y, temperature, dtype, rows):
        ctx.save_for_backward(h, w, y)
        ctx.temperature, ctx.dtype, ctx.rows, ctx.kept = temperature, dtype, rows, None
        out = []
        for h, y in zip(h.split(rows), y.split(rows)):
            z = logits(h, w, dtype, temperature)
            pi = z.softmax(-1)
            out.append(z.gather(1, y[:, None]).squeeze(1) - z.amax(1) + pi.amax(1).log())
        if len(out) == 1 and any(ctx.needs_input_grad):
            ctx.kept = pi
        return torch.cat(out)

    @staticmethod
    def backward(ctx, g):
        h, w, y = ctx.saved_tensors
        g, dw, dh = g[:, None] / ctx.temperature, torch.zeros_like(w), []
        for h, y, g in zip(h.split(ctx.rows), y.split(ctx.rows), g.split(ctx.rows)):
            pi = logits(h, w, ctx.dtype, ctx.temperature).softmax(-1) if ctx.kept is None else ctx.kept
            ctx.kept = None  # written over
            dz = pi.mul_(-g).scatter_add_(1, y[:, None], g).to(ctx.dtype)  # small numbers, which bear the rounding
            dh.append((dz @ w.to(ctx.dtype)).float())
            dw += dz.T @ h.to(ctx.dtype)
        return torch.cat(dh), dw, None, None, None, None


class Block(nn.Module):
    """x + attention(LN(x)), then x + MLP(LN(x)): pre-LN, GELU."""

    def __init__(self, c):
        super().__init__()
        self.n_head = c.n_head
        self.ln_1 = nn.LayerNorm(c.n_embd, eps=1e-5)
        self.c_attn = nn.Linear(c.n_embd, 3 * c.n_embd)  # q, k, v in one product
        self.attn_proj = nn.Linear(c.n_embd, c.n_embd)
        self.ln_2 = nn.LayerNorm(c.n_embd, eps=1e-5)
        self.c_fc = nn.Linear(c.n_embd, 4 * c.n_embd)
        self.mlp_proj = nn.Linear(4 * c.n_embd, c.n_embd)
        self.approximate = GELU[c.activation]
        self.dropout = 0.0  # on what each half adds; sft.dropout turns it on for a training step, and off again

    def mlp(self, x):
        return x + F.dropout(self.mlp_proj(F.gelu(self.c_fc(self.ln_2(x)), approximate=self.approximate)), self.dropout, self.training)

    def forward(self, x, rows=None, columns=None):
        """x [B, T, d] -> [B, T, d], or [N, d] at (rows [N], columns [N]) alone: the last block's answer is read at few."""
        B, T, d = x.shape
        q, k, v = (z.view(B, T, self.n_head, d // self.n_head).transpose(1, 2) for z in self.c_attn(self.ln_1(x)).split(d, -1))
        # the queries before the first column are left out where that costs no waiting for a GPU
        first = int(columns.min()) // 16 * 16 if rows is not None and x.device.type == "cpu" else 0
        a = attention(q[:, :, first:], k, v).transpose(1, 2).reshape(B, T - first, d)
        if rows is not None:
            # as an embedding: the gradient of x[rows, columns] is made one number at a time
            x, a = F.embedding(rows * T + columns, x.view(-1, d)), F.embedding(rows * (T - first) + columns - first, a.view(-1, d))
        return self.mlp(x + F.dropout(self.attn_proj(a), self.dropout, self.training))

    def branch(self, x, y, visible, at=None):
        """The same block for n responses y [P, n, R, d] that share the query x [P, Q, d]: a response attends to the query,
        as far as `visible` [P, Q] says, and causally to itself, but not to its siblings. -> x, y; or, as the last block,
        None and y at one column of each response, at [P, n] -> [P, n, d]."""
        (P, n, R, d), Q, H, D = y.shape, x.shape[1], self.n_head, y.shape[-1] // self.n_head
        q, k, v = self.c_attn(self.ln_1(x)).view(P, Q, 3, H, D).permute(2, 0, 3, 1, 4)  # [P, H, Q, D]
        qy, ky, vy = self.c_attn(self.ln_1(y)).view(P, n, R, 3, H, D).permute(3, 0, 4, 1, 2, 5)  # [P, H, n, R, D]
        past = torch.where(visible, 0.0, float("-inf")).to(q.dtype)[:, None, None]  # [P, 1, 1, Q]
        future = torch.full((R, R), float("-inf"), dtype=q.dtype, device=q.device).triu(1)
        qy = qy / math.sqrt(D)
        to_query = (qy.reshape(P, H, n * R, D) @ k.transpose(-1, -2) + past).view(P, H, n, R, Q)
        to_self = qy @ ky.transpose(-1, -2) + future
        weights = torch.cat([to_query, to_self], -1).softmax(-1)
        mixed = (weights[..., :Q].reshape(P, H, n * R, Q) @ v).view(P, H, n, R, D) + weights[..., Q:] @ vy
        mixed = mixed.permute(0, 2, 3, 1, 4).reshape(P, n, R, d)
        if at is not None:
            y, mixed = (z.gather(2, at[..., None, None].expand(-1, -1, 1, d)).squeeze(2) for z in (y, mixed))
            return None, self.mlp(y + self.attn_proj(mixed))
        x = x + self.attn_proj(attention(q, k, v).transpose(1, 2).reshape(P, Q, d))
        return self.mlp(x), self.mlp(y + self.attn_proj(mixed))


class GPT(nn.Module):
    """GPT-2 with a language-model head (tied to the token embedding) or, for reward and value models, a scalar head."""

    def __init__(self, config, head="lm"):
        super().__init__()
        assert head in ("lm", "scalar")
        self.config = c = config
        self.wte = nn.Embedding(c.vocab_size, c.n_embd)
        self.wpe = nn.Embedding(c.n_positions, c.n_embd)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.ln_f = nn.LayerNorm(c.n_embd, eps=1e-5)
        self.score = nn.Linear(c.n_embd, 1) if head == "scalar" else None
        self.amp_dtype = torch.float32  # see choose_precision
        self.chunk = max(1, 2**25 // c.vocab_size)  # rows of logits made at once, 128 MB in float32: 667 of 50,257 tokens
        self.recompute = False  # keep of each block its input alone and compute the rest again in the backward pass
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """For training from scratch. Two departures from GPT-2 make small models learn to copy much sooner:
        the scale is 1/√d (GPT-2's 0.02 is 0.55/√768, and far too small at d = 128), and positions start as sinusoids,
        so that "the token before" is a rotation to be learned once, not once per position."""
        c, std = self.config, 1 / math.sqrt(self.config.n_embd)
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                p.zero_()
            elif "score" in name:
                p.normal_(std=1 / math.sqrt(c.n_embd + 1))  # Stiennon appendix B; both OpenAI codebases
            elif "ln_" not in name:  # residual projections shrunk by the depth that they add up over, as in GPT-2
                p.normal_(std=std / math.sqrt(2 * c.n_layer) if "proj" in name else std)
        frequency = 1000 ** (-torch.arange(c.n_embd // 2) / (c.n_embd // 2))
        angle = torch.arange(c.n_positions)[:, None] * frequency
        self.wpe.weight.copy_(std * torch.cat([angle.sin(), angle.cos()], 1))

    @property
    def device(self):
        return self.wte.weight.device

    def amp(self):
        """Matrix products in bf16 where that is fast; a no-op in float32."""
        if self.amp_dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.amp_dtype)

    def run(self, block, *args):
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(block, *args, use_reentrant=False)
        return block(*args)

    def hidden(self, tokens, rows=None, columns=None):
        """tokens [B, T] -> float32 hidden states after the final layer norm [B, T, d]; at the positions (rows [N],
        columns [N]) alone, which saves most of the last block, [N, d]."""
        T = tokens.shape[1]
        if T > self.config.n_positions:
            raise ValueError(f"rows of {T} tokens do not fit into {self.config.n_positions} positions")
        tokens = F.pad(tokens, (0, min(round_up(T, 16), self.config.n_positions) - T))
        with self.amp():
            x = self.wte(tokens) + self.wpe.weight[:tokens.shape[1]]
            for block in self.blocks[:-1]:
                x = self.run(block, x)
            if rows is None:
                return self.ln_f(self.run(self.blocks[-1], x)[:, :T].float())
            N = len(rows)
            fill = round_up(max(N, 1), 128) - N
            rows, columns = F.pad(rows, (0, fill)), torch.cat([columns, columns[:1].expand(fill) if N else columns.new_zeros(fill)])
            x = self.run(self.blocks[-1], x, rows, columns)[:N]
        return self.ln_f(x.float())

    def unembed(self, h):
        """h [..., d] -> float32 logits [..., V]; tied weights."""
        n = h.numel() // h.shape[-1]
        rows = F.pad(h.reshape(n, -1), (0, 0, 0, round_up(n, 128) - n))
        return Unembed.apply(rows, self.wte.weight, self.amp_dtype)[:n].view(*h.shape[:-1], -1)

    def forward(self, tokens):
        """tokens [B, T] -> logits [B, T, V]; column i predicts token i + 1."""
        return self.unembed(self.hidden(tokens))

    def response_hidden(self, tokens, query_lengths, lengths, R):
        """The hidden states that predict response tokens, and where they belong.

        Entry t of a row belongs to action y_t, which stands at column query_length + t and is predicted from the column
        before it. Returns h [N, d], targets [N], mask [B, R] with N = mask.sum(): the vocabulary is never projected
        where no log-probability is wanted."""
        columns = query_lengths[:, None] + torch.arange(R, device=tokens.device)  # [B, R] where y_t stands
        mask = columns < lengths[:, None]
        rows = torch.arange(len(tokens), device=tokens.device)[:, None].expand_as(columns)[mask]
        columns = columns[mask]
        return self.hidden(tokens, rows, columns - 1), tokens[rows, columns], mask

    def logprobs(self, tokens, query_lengths, lengths, R, temperature=1.0):
        """log π(y_t | x, y_<t) at the sampling temperature, [B, R], exactly 0 behind each row's end."""
        h, targets, mask = self.response_hidden(tokens, query_lengths, lengths, R)
        return torch.zeros(mask.shape, device=h.device).masked_scatter(mask, self.log_pi(h, targets, temperature))

    def log_pi(self, h, targets, temperature=1.0):
        """h [N, d] before each token, targets [N] -> log π(target) [N]"""
        rows = F.pad(h, (0, 0, 0, round_up(len(h), 128) - len(h)))
        targets = F.pad(targets, (0, len(rows) - len(h)))
        return LogPi.apply(rows, self.wte.weight, targets, temperature, self.amp_dtype, self.chunk)[:len(h)]

    def scores(self, tokens, lengths):
        """Reward model: the scalar at each row's last token, which is its EOS (Stiennon: code, not text). -> [B]"""
        rows = torch.arange(len(tokens), device=tokens.device)
        return self.score(self.hidden(tokens, rows, lengths - 1)).squeeze(-1)

    def branch_scores(self, queries, query_lengths, responses, lengths):
        """scores() of n responses to each query, the query read once: a third of the tokens where n is 5.

        queries [P, Q], query_lengths [P], responses [P, n, R], lengths [P, n] (of the responses alone) -> [P, n]"""
        if int((query_lengths[:, None] + lengths).max()) > self.config.n_positions:
            raise ValueError(f"a query and its response do not fit into {self.config.n_positions} positions")
        Q, R = round_up(queries.shape[1], 16), round_up(responses.shape[2], 16)
        queries, responses = F.pad(queries, (0, Q - queries.shape[1])), F.pad(responses, (0, R - responses.shape[2]))
        position = query_lengths[:, None] + torch.arange(R, device=queries.device)
        visible = torch.arange(Q, device=queries.device) < query_lengths[:, None]
        with self.amp():
            x = self.wte(queries) + self.wpe(torch.arange(Q, device=queries.device).clamp(max=self.config.n_positions - 1))
            y = self.wte(responses) + self.wpe(position.clamp(max=self.config.n_positions - 1))[:, None]
            for block in self.blocks[:-1]:
                x, y = self.run(block.branch, x, y, visible)
            _, y = self.run(self.blocks[-1].branch, x, y, visible, lengths - 1)
        return self.score(self.ln_f(y.float())).squeeze(-1)

    def values(self, tokens, query_lengths, lengths, R):
        """Value model: V(s_t), read where y_t is predicted from. -> [B, R], 0 behind each row's end."""
        h, _, mask = self.response_hidden(tokens, query_lengths, lengths, R)
        return torch.zeros(mask.shape, device=h.device).masked_scatter(mask, self.score(h).squeeze(-1))

    def generate(self, tokens, lengths, max_new_tokens, temperature=1.0, eos=None, generator=None, n=1, static=None):
        """Sample n responses to each ragged right-padded query.

        tokens [B, Q], lengths [B] -> tokens [B·n, Q+R] (query, response, zeros), lengths [B·n] (EOS included),
        logprobs [B·n, R] at the given temperature. temperature 0 is argmax; eos None never stops. All uniforms are drawn up
        front, so what one row draws does not depend on when other rows finish. `generator` is a CPU generator on every device.
        `static` is for GPUs and on there: every step has the same shapes and is replayed as one CUDA graph; otherwise rows that
        are done are dropped, as suits a CPU. How it is done: Sampler.
        """
        Q, R = tokens.shape[1], max_new_tokens
        if Q + R > self.config.n_positions:
            raise ValueError(f"{Q} query tokens and {R} new ones do not fit into {self.config.n_positions} positions")
        static = self.device.type == "cuda" if static is None else static
        with torch.inference_mode():  # no_grad with still less bookkeeping per operation: 4 % of the time at batch 64, 13 % at batch 1
            sampler = Sampler(self, tokens, lengths, R, temperature, eos, generator, n, static)
            with float32_by_mkl():
                out = sampler.run()
        return tuple(x.clone() for x in out)  # what inference mode makes could not be kept for a backward pass

    # -----------------------------------------------------------------------------------------------------------------
    # weights in and out: Hugging Face's GPT-2 layout

    def _hf_names(self):
        """Pairs (our parameter, Hugging Face's name, transposed?): their Conv1D keeps weights as [in, out]."""
        yield self.wte.weight, "transformer.wte.weight", False
        yield self.wpe.weight, "transformer.wpe.weight", False
        for i, b in enumerate(self.blocks):
            parts = {"ln_1": b.ln_1, "attn.c_attn": b.c_attn, "attn.c_proj": b.attn_proj,
                     "ln_2": b.ln_2, "mlp.c_fc": b.c_fc, "mlp.c_proj": b.mlp_proj}
            for name, module in parts.items():
                yield module.weight, f"transformer.h.{i}.{name}.weight", isinstance(module, nn.Linear)
                yield module.bias, f"transformer.h.{i}.{name}.bias", False
        yield self.ln_f.weight, "transformer.ln_f.weight", False
        yield self.ln_f.bias, "transformer.ln_f.bias", False
        if self.score is not None:
            yield self.score.weight, "score.weight", False

    @torch.no_grad()
    def save_pretrained(self, folder):
        """Write model.safetensors and config.json so that transformers' GPT2LMHeadModel, or for a scalar head
        GPT2ForSequenceClassification, loads the folder and gives the same numbers.

        Their classification head has no bias, so ours, c, moves into the final layer norm: bias += c·w / ‖w‖² adds
        exactly c to w·h."""
        os.makedirs(folder, exist_ok=True)
        tensors = {name: (p.T if transposed else p).detach().cpu().contiguous()
                   for p, name, transposed in self._hf_names()}
        if self.score is not None:
            w = self.score.weight[0].double()
            shifted = self.ln_f.bias.double() + self.score.bias.double() * w / w.dot(w)
            tensors["transformer.ln_f.bias"] = shifted.float().cpu()
        c = self.config
        kind = "GPT2LMHeadModel" if self.score is None else "GPT2ForSequenceClassification"
        config = {"model_type": "gpt2", "architectures": [kind], "vocab_size": c.vocab_size, "n_positions": c.n_positions,
                  "n_ctx": c.n_positions, "n_layer": c.n_layer, "n_head": c.n_head, "n_embd": c.n_embd,
                  "activation_function": c.activation, "layer_norm_epsilon": 1e-5, "bos_token_id": c.eos, "eos_token_id": c.eos,
                  "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "tie_word_embeddings": True}
        if self.score is not None:
            config["num_labels"] = 1
        with open(os.path.join(folder, "config.json.tmp"), "w") as f:
            json.dump(config, f, indent=1)
            f.flush()
            os.fsync(f.fileno())
        os.replace(f.name, os.path.join(folder, "config.json"))
        path = os.path.join(folder, "model.safetensors")
        save_file(tensors, path + ".tmp", metadata={"format": "pt"})
        with open(path + ".tmp", "r+b") as f:
            os.fsync(f.fileno())
        os.replace(path + ".tmp", path)  # last: where it stands, the folder is whole

    @classmethod
    @torch.no_grad()
    def from_pretrained(cls, folder, head="lm"):
        """Load a folder in Hugging Face's GPT-2 layout, in float32; tensors of other dtypes are converted, those that GPT-2
        does not need (old causal masks, a copy of the tied head) ignored. "gpt2", "gpt2-medium", "gpt2-large" and "gpt2-xl",
        where no folder has that name, are OpenAI's weights, downloaded once (download.fetch).

        head="scalar" on a language model keeps the trunk and draws a new scalar head (std 1/√(d+1)): how the reward model
        starts from the SFT model. Raises FileNotFoundError where there is no model, ValueError, in one sentence, where
        config.json is not a GPT-2's or the shapes are not what it says, and DataError where the download fails."""
        if folder in GPT2_FILES and not os.path.isdir(folder):
            fetch(f"{folder}/config.json")
            folder = os.path.dirname(fetch(f"{folder}/model.safetensors"))
        path = os.path.join(folder, "config.json")
        with open(path) as f:
            config = read_config(json.load(f), path)
        with NoInit():
            model = cls(config, head)
        path = os.path.join(folder, "model.safetensors")
        tensors = load_file(path)  # mapped, not read: a page can leave memory once it is copied
        if head == "lm" and "score.weight" in tensors:
            raise ValueError(f"{path} has a scalar head: it is a reward or value model, not a language model")
        for p, name, transposed in model._hf_names():
            t = tensors.get(name, tensors.get(name.removeprefix("transformer.")))  # OpenAI's upload has no prefix
            if t is None and name == "score.weight":
                p.normal_(std=1 / math.sqrt(config.n_embd + 1))
                continue
            if t is None:
                raise ValueError(f"{path} has no tensor {name}; is it a GPT-2 checkpoint?")
            t = t.T if transposed else t
            if t.shape != p.shape:
                raise ValueError(f"{path}: {name} has shape {tuple(t.shape)}, config.json says {tuple(p.shape)}")
            p.copy_(t)
        return model


class NoInit(TorchFunctionMode):
    """Draws no initial weights, which a file will overwrite: seconds for a large model. (The meta device does it too, but
    normal_ on it first imports 900 modules: a second, and 74 MB.)"""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function.__name__ not in ("normal_", "uniform_", "kaiming_uniform_"):
            return function(*args, **(kwargs or {}))


def read_config(c, path):
    """GPTConfig from Hugging Face's config.json. Raises ValueError on a field that asks for another architecture."""
    for field in ("vocab_size", "n_positions", "n_layer", "n_head", "n_embd"):
        if type(c.get(field)) is not int or c[field] < 1:
            raise ValueError(f"{path}: {field} must be a whole number above 0, found {c.get(field)!r}")
    for field, allowed in {"model_type": ("gpt2",), "activation_function": tuple(GELU),
                           "layer_norm_epsilon": (1e-5,), "n_inner": (None, 4 * c["n_embd"]), "scale_attn_weights": (True,),
                           "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,),
                           "tie_word_embeddings": (True,)}.items():  # absent means the first
        if c.get(field, allowed[0]) not in allowed:
            raise ValueError(f"{path}: {field} is {c[field]!r}, but this GPT-2 has {' or '.join(map(repr, allowed))}")
    if c["n_embd"] % c["n_head"]:
        raise ValueError(f"{path}: n_embd {c['n_embd']} is not a multiple of n_head {c['n_head']}")
    eos = c.get("eos_token_id", GPTConfig.eos)
    if type(eos) is not int:
        raise ValueError(f"{path}: eos_token_id must be one whole number, found {eos!r}")
    activation = c.get("activation_function", GPTConfig.activation)
    return GPTConfig(c["vocab_size"], c["n_positions"], c["n_layer"], c["n_head"], c["n_embd"], eos, activation)


# ---------------------------------------------------------------------------------------------------------------------
# the sampler

def cuda_graph(step):
    """The launches of step() as one graph: one replay takes the place of hundreds of launches. None,
    with the reason printed, where it cannot be had; nothing has run then."""
    if cuda_graph.fails:
        return None
    stream = torch.cuda.current_stream()
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return graph
    except RuntimeError as e:
        torch.cuda.set_stream(stream)  # a capture that fails at its end leaves its own
        cuda_graph.fails = True
        print(f"sampler: no CUDA graph, each step is launched by itself ({str(e.__context__ or e).splitlines()[0]})")
        return None


cuda_graph.fails = False


class Sampler:
    """n responses to each of B right-padded queries, token by token: one GPT.generate, whose arguments these are.

    The rows in work, N = P·m, are m samples of each of P queries: n of B at first, fewer where drop_finished() lets some go.
    The cache has two parts: `past`, keys and values of the queries, which all samples of a query read in one product, and
    `own`, those of the responses, in which token t of every row stands in column first + t. Where n is 1 nothing is shared: past is
    empty, and the query stands in own, before the response.

    Caveats: draws from the whole softmax (no top-k, no top-p); the cache is made for all R tokens at once; a step is rounded
    otherwise than the training forward (on a CPU it is in float32 whatever amp_dtype is), and so are the logprobs."""

    def __init__(self, model, tokens, lengths, R, temperature, eos, generator, n, static):
        (B, Q), c, device = tokens.shape, model.config, model.device
        H, D, Q16 = c.n_head, c.n_embd // c.n_head, min(round_up(Q, 16), c.n_positions)
        self.model, self.tokens, self.lengths, self.R, self.n = model, tokens, lengths, R, n
        self.temperature, self.eos, self.static, self.m = temperature, eos, static, n
        self.dtype = torch.float32 if device.type == "cpu" else model.amp_dtype  # a few rows gain nothing from bf16 on a CPU
        self.Q16, self.shared, self.first = Q16, n > 1, 0 if n > 1 else Q16
        self.past = torch.empty(c.n_layer, 2, B, H, Q16 if self.shared else 0, D, dtype=self.dtype, device=device)
        self.own = torch.empty(c.n_layer, 2, B * n, H, self.first + R, D, dtype=self.dtype, device=device)
        self.own[:, :, :, :, -R:] = 0  # what the mask hides must be finite all the same
        self.keys, self.values = self.views()
        self.mask = torch.where(torch.arange(Q16 + R, device=device) < lengths[:, None], 0.0, -math.inf).to(self.dtype)[:, None, None]
        self.x = self.prefill()  # [N, d] what y_t is drawn from. Before the rest: whole queries take memory
        self.layers, self.wte = self.weights_in(self.dtype), model.wte.weight.to(self.dtype)
        self.row = torch.arange(B * n, device=device)  # [N] where in the batch it stands
        self.alive = torch.ones(B * n, dtype=torch.bool, device=device)  # [N] no EOS yet
        self.position = lengths.repeat_interleave(n)  # [N] of y_t
        self.step, self.t = 0, torch.zeros(1, dtype=torch.long, device=device)  # one number: as a tensor, so that a CUDA graph can count
        self.token = torch.zeros(B * n, dtype=torch.long, device=device)  # [N] y_t
        self.uniform = torch.rand(B * n, R, generator=generator).to(device)  # this and the next two: of the whole batch
        self.sampled = torch.zeros(B * n, R, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(B * n, R, device=device)

    def run(self):
        """R times: choose y_t of every row, then read it. -> what GPT.generate returns"""
        graph = None
        for step in range(self.R):
            self.step = step
            if self.eos is not None and step and (not self.static or step % 8 == 0):  # on a GPU asking means waiting for it
                if not self.alive.any():
                    break
                if not self.static:
                    self.drop_finished()
            if self.static and self.x.is_cuda and step == 1:  # step 0 has warmed everything up
                # A graph reads and writes the very tensors it was captured with: choose and read bind no attribute anew, but write
                # x, token, alive, position, t, own, mask, sampled and logprobs in place. drop_finished does bind: never if static
                graph = cuda_graph(lambda: (self.choose(), self.read()))
            if graph is not None:
                graph.replay()
                continue
            self.choose()
            if step < self.R - 1:
                self.read()
        return self.result()

    def views(self):
        """own as the products of a step read it: of each layer kᵀ [N·H, D, S] and v [N·H, S, D]"""
        return self.own[:, 0].flatten(1, 2).transpose(2, 3).unbind(), self.own[:, 1].flatten(1, 2).unbind()

    def prefill(self):
        """Read each query once, whatever n is, into past or own. -> x [B·n, d], from which y_0 is drawn"""
        model, B, (H, _, D), Q16 = self.model, len(self.tokens), self.own.shape[3:], self.Q16
        cache = self.past if self.shared else self.own[:, :, :, :, :Q16]
        row, last = torch.arange(B, device=model.device), self.lengths - 1

        def attend(i, qkv):
            q, k, v = qkv.view(B, Q16, 3, H, D).permute(2, 0, 3, 1, 4)
            cache[i, 0], cache[i, 1] = k, v
            if i < len(cache) - 1:
                return attention(q, k, v).transpose(1, 2).reshape(-1, H * D)
            q = q[row, :, last, None] / math.sqrt(D)  # behind the last layer only the last token is read
            return ((q @ k.transpose(2, 3) + self.mask[..., :Q16].to(q.dtype)).softmax(-1) @ v).view(-1, H * D)

        x = (model.wte(F.pad(self.tokens, (0, Q16 - self.tokens.shape[1]))) + model.wpe.weight[:Q16]).flatten(0, 1)
        return self.through_blocks(x, self.weights_in(model.amp_dtype), attend, row * Q16 + last).repeat_interleave(self.n, 0)

    def choose(self):
        """y_t [N] from x [N, d], and its log-probability."""
        z = logits(self.x, self.wte, self.dtype)
        if self.temperature == 0:
            self.token.copy_(z.argmax(-1))  # greedy: all mass on one token, log-probability 0
        else:
            p = (z / self.temperature).softmax(-1)
            cdf = p.cumsum(-1)  # inverse CDF: much cheaper on a CPU than torch.multinomial
            total = cdf[:, -1:].contiguous()
            drawn = torch.searchsorted(cdf, self.uniform[self.row, self.t, None] * total, right=True)
            last = torch.searchsorted(cdf, total)  # the last token of any probability, should the product round up to total
            self.token.copy_(torch.minimum(drawn, last).squeeze(-1))
            self.logprobs[self.row, self.t] = p.gather(1, self.token[:, None]).squeeze(1).log()
        self.sampled[self.row, self.t] = self.token
        if self.eos is not None:
            self.alive.logical_and_(self.token != self.eos)

    def read(self):
        """Take y_t in: x [N, d] becomes the hidden state before y_{t+1}."""
        self.mask.index_fill_(3, self.Q16 + self.t, 0)
        x = self.model.wte(self.token) + self.model.wpe(self.position)
        self.x.copy_(self.through_blocks(x, self.layers, self.attend))
        self.position.add_(1)
        self.t.add_(1)

    def attend(self, i, qkv):
        """Layer i's attention from y_t to its query and its response so far; qkv [N, 3d] -> [N, d]. The whole cache is read each
        time, columns to come under the mask [P, 1, 1, Q16 + R]: products with a part of it would first copy that part."""
        (N, H, S, D), m, Q16, past, own = self.own.shape[2:], self.m, self.Q16, self.past[i], self.own[i]
        q, kv = qkv[:, :H * D].view(N, H, D) / math.sqrt(D), qkv.view(N, 3, H, D)[:, 1:].transpose(0, 1)
        if self.static:
            own.index_copy_(3, self.first + self.t, kv[:, :, :, None])
        else:
            own.select(3, self.first + self.step).copy_(kv)  # in less than half of the time
        to_self = torch.bmm(q.view(N * H, 1, D), self.keys[i]).view(N, H, 1, S)
        if not self.shared:
            return torch.bmm(to_self.add_(self.mask).softmax(-1).view(N * H, 1, S), self.values[i]).view(N, H * D)
        to_query = q.view(N // m, m, H, D).transpose(1, 2) @ past[0].transpose(-1, -2)  # [P, H, m, Q16]
        weights = torch.cat([to_query, to_self.view(N // m, m, H, S).transpose(1, 2)], -1).add_(self.mask).softmax(-1)
        from_query = (weights[..., :Q16] @ past[1]).transpose(1, 2)  # [P, m, H, D]
        from_self = torch.bmm(weights[..., Q16:].transpose(1, 2).reshape(N * H, 1, S), self.values[i])
        return from_query.reshape(N, H * D) + from_self.view(N, H * D)

    def drop_finished(self):
        """Go on with fewer queries, fewer samples of each, in steps: a copy of the cache for each row that ends would cost more."""
        living = self.alive.view(-1, self.m)
        P, m = living.shape
        m_left = min(m, round_up(int(living.sum(1).max()), 4))
        P_left = min(P, round_up(int(living.any(1).sum()), 8 if m % 4 == 0 else 32))
        if P_left * m_left <= 0.75 * P * m:  # a few finished ones fill up the sizes
            # queries keep their order: where all of them stay, their caches stay as they are
            query = living.any(1).long().argsort(descending=True, stable=True)[:P_left].sort().values
            sample = living[query].long().argsort(dim=1, descending=True, stable=True)[:, :m_left]
            keep = (query[:, None] * m + sample).flatten()
            self.x, self.row, self.alive, self.position = self.x[keep], self.row[keep], self.alive[keep], self.position[keep]
            self.token, self.own, self.m = self.token[keep], self.own[:, :, keep], m_left
            self.keys, self.values = self.views()
            if P_left < P:
                self.past, self.mask = self.past[:, :, query], self.mask[query]

    def result(self):
        """A response ends with its first EOS; what was sampled behind it never happened. -> tokens, lengths, logprobs"""
        tokens, start, R = self.tokens, self.lengths.repeat_interleave(self.n)[:, None], self.R
        column = torch.arange(R, device=tokens.device)
        stop = R if self.eos is None else (((self.sampled == self.eos).cumsum(1) == 0).sum(1, keepdim=True) + 1).clamp(max=R)
        sampled, logprobs = torch.where(column < stop, self.sampled, 0), torch.where(column < stop, self.logprobs, 0)
        query = torch.where(torch.arange(tokens.shape[1], device=tokens.device) < self.lengths[:, None], tokens, 0)
        out = F.pad(query, (0, R)).repeat_interleave(self.n, 0).scatter_(1, start + column, sampled)
        return out, (start + stop).flatten(), logprobs

    def weights_in(self, dtype):
        """[weight, bias, ...] of the four products of each layer, cast once and not at every step."""
        return [[w.to(dtype) for product in (b.c_attn, b.attn_proj, b.c_fc, b.mlp_proj) for w in (product.weight, product.bias)]
                for b in self.model.blocks]

    def through_blocks(self, x, layers, attend, at=None):
        """Block.forward and the final layer norm for rows side by side, x [N, d] in float32, with weights_in(dtype) as `layers` and
        attend(i, qkv [N, 3d]) as layer i's attention. -> [N, d], or the rows `at` of it alone, and then the
        last layer's attend must give these alone"""
        for i, (block, (w1, b1, w2, b2, w3, b3, w4, b4)) in enumerate(zip(self.model.blocks, layers)):
            a = attend(i, F.linear(block.ln_1(x).to(w1.dtype), w1, b1))
            if at is not None and i == len(layers) - 1:
                x = x[at]
            x += F.linear(a, w2, b2)
            h = F.gelu(F.linear(block.ln_2(x).to(w3.dtype), w3, b3), approximate=block.approximate)
            x += F.linear(h, w4, b4)
        return self.model.ln_f(x)
