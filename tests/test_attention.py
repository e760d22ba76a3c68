"""The fused kernels against float64, in Triton's interpreter where there is no GPU, and compiled for sm_90 anyway."""
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

CUDA = torch.cuda.is_available()
pytest.importorskip("triton")  # comes with PyTorch's CUDA builds, and from tests/requirements.txt
import model as attention  # noqa: E402
from model import fused_attention, plain_attention  # noqa: E402

DEVICE = "cuda" if CUDA else "cpu"
needs_cuda = pytest.mark.skipif(not CUDA, reason="needs a GPU: the interpreter knows neither bf16 nor compiled code")


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Each empty tensor starts as NaN: what a kernel forgets to write shows."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def inputs(B, H, T, D, dtype=torch.float32, layout="fused", seed=0):
    """q, k, v [B, H, T, D] in a memory layout, and a gradient of o."""
    g = torch.Generator().manual_seed(seed)
    shape = (3, B, H, D, T) if layout == "columns" else (B, T, 3, H, D)
    order = (0, 1, 2, 4, 3) if layout == "columns" else (2, 0, 3, 1, 4)
    q, k, v = torch.randn(shape, generator=g).to(DEVICE, dtype).permute(order)
    if layout == "mixed":  # strides of q, k, v all different
        k, v = k.contiguous(), v.transpose(1, 2).contiguous().transpose(1, 2)
    return q, k, v, torch.randn(B, H, T, D, generator=g).to(DEVICE, dtype)


def value_and_gradients(f, q, k, v, do):
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    o = f(q, k, v)
    return o, *torch.autograd.grad(o, (q, k, v), do)


def reference(q, k, v, do):
    """Another implementation, in float64: o, dq, dk, dv."""
    double = [x.double().cpu() for x in (q, k, v, do)]
    return value_and_gradients(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), *double)


def check(f, q, k, v, do, tolerance):
    got = value_and_gradients(f, q, k, v, do)
    for name, x, want in zip(("o", "dq", "dk", "dv"), got, reference(q, k, v, do)):
        assert x.dtype == q.dtype and x.shape == q.shape
        torch.testing.assert_close(x.double().cpu(), want, rtol=tolerance, atol=tolerance, msg=lambda m: f"{name}: {m}")


def use_blocks(monkeypatch, M, N):
    if not CUDA:  # small tiles, so that short sequences have all kinds of them; on a GPU the table's
        monkeypatch.setattr(attention, "BLOCKS_FP32", (M, N, 4, 1))


@pytest.mark.parametrize("layout", ["fused", "mixed", "columns"])
def test_plain_is_the_specification(layout):
    check(plain_attention, *inputs(2, 3, 37, 16, layout=layout), 1e-5)


@pytest.mark.parametrize("T, D, M, N, layout", [
    (1, 16, 32, 32, "fused"),
    (17, 16, 16, 32, "mixed"),
    (64, 32, 16, 16, "fused"),  # T a multiple of both: no tile is cut
    (75, 32, 32, 16, "columns"),
    (100, 64, 16, 32, "fused"),
    (97, 64, 64, 16, "mixed"),
    (70, 80, 32, 64, "fused"),  # D padded to 128
    (65, 128, 32, 32, "fused"),
    (45, 20, 32, 16, "mixed"),
])
def test_float32(monkeypatch, T, D, M, N, layout):
    use_blocks(monkeypatch, M, N)
    check(fused_attention, *inputs(2, 2, T, D, layout=layout), 1e-5)


@pytest.mark.parametrize("T, D", [(200, 64), (130, 128), (129, 32), (5, 16), (140, 80)])
def test_float16_at_the_blocks_of_the_table(T, D):
    check(fused_attention, *inputs(1, 2, T, D, torch.float16), 2e-3)


def test_random_shapes(monkeypatch):
    g = torch.Generator().manual_seed(1)
    pick = lambda *of: of[torch.randint(len(of), (), generator=g)]  # noqa: E731
    for seed in range(8):
        use_blocks(monkeypatch, pick(16, 32, 64), pick(16, 32, 64))
        B, H, T = (int(torch.randint(1, high, (), generator=g)) for high in (3, 4, 100))
        check(fused_attention, *inputs(B, H, T, pick(16, 32, 48, 64), layout=pick("fused", "mixed"), seed=seed), 1e-5)


def test_large_scores_and_expanded_gradient(monkeypatch):
    """Scores in the hundreds overflow exp unless the maximum comes off first; o.sum() sends a gradient of strides 0."""
    use_blocks(monkeypatch, 32, 16)
    q, k, v, do = inputs(1, 2, 70, 32)
    check(fused_attention, 30 * q, 10 * k, v, do.new_ones(()).expand_as(do), 1e-3)


def test_batch_of_one_head_sharing_its_keys(monkeypatch):
    """k and v expanded over the heads, strides 0: read in place, gradients summed by autograd."""
    use_blocks(monkeypatch, 32, 32)
    q, k, v, do = inputs(2, 3, 40, 16)
    share = lambda q, k, v: fused_attention(q, k[:, :1].expand_as(q), v[:, :1].expand_as(q))  # noqa: E731
    spec = lambda q, k, v: plain_attention(q, k[:, :1].expand_as(q), v[:, :1].expand_as(q))  # noqa: E731
    want = value_and_gradients(spec, *(x.double() for x in (q, k, v, do)))
    for x, y in zip(value_and_gradients(share, q, k, v, do), want):
        torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-5)


def test_neither_reads_nor_writes_past_T(monkeypatch):
    """Tensors that are windows of larger ones full of NaN: the windows come out right, the rest stays NaN."""
    use_blocks(monkeypatch, 32, 32)
    B, H, T, D = 2, 2, 41, 20
    x = inputs(B, H, T, D)
    frame = lambda: torch.full((B, H, T + 64, D + 7), float("nan"), device=DEVICE)  # noqa: E731
    frames = [frame() for _ in range(8)]
    q, k, v, do, o, dq, dk, dv = windows = [f[:, :, 5:T + 5, :D] for f in frames]
    for window, values in zip(windows, x):
        window.copy_(values)
    lse, delta = (torch.full((B * H * T + 64,), float("nan"), device=DEVICE) for _ in range(2))
    rows = [r[:B * H * T].view(B, H, T) for r in (lse, delta)]
    attention._launch("fwd", attention._attn_fwd, q, k, v, o, rows[0])
    attention._launch("dq", attention._attn_bwd_dq, q, k, v, o, do, dq, *rows)
    attention._launch("dkdv", attention._attn_bwd_dkdv, q, k, v, do, dk, dv, *rows)
    for got, want in zip((o, dq, dk, dv), reference(*x)):
        torch.testing.assert_close(got.double().cpu(), want, rtol=1e-5, atol=1e-5)
    assert all(f.isnan().sum() == f.numel() - B * H * T * D for f in frames)
    assert lse[B * H * T:].isnan().all() and delta[B * H * T:].isnan().all()


def test_causal_to_the_bit(monkeypatch):
    use_blocks(monkeypatch, 32, 16)
    q, k, v, do = inputs(1, 2, 80, 16)
    t = 43
    changed = [torch.cat([x[:, :, :t], 50 * torch.randn_like(x[:, :, t:])], 2) for x in (q, k, v)]
    do[:, :, t:] = 0  # the loss looks at the rows before t
    o, dq, dk, dv = value_and_gradients(fused_attention, q, k, v, do)
    o2, dq2, dk2, dv2 = value_and_gradients(fused_attention, *changed, do)
    assert torch.equal(o[:, :, :t], o2[:, :, :t]) and not torch.equal(o[:, :, t:], o2[:, :, t:])
    assert all(torch.equal(x[:, :, :t], y[:, :, :t]) for x, y in ((dq, dq2), (dk, dk2), (dv, dv2)))
    assert all((x[:, :, t:] == 0).all() for x in (dq, dk, dv, dq2, dk2, dv2))


def test_output_joins_heads_without_a_copy():
    q, k, v, _ = inputs(2, 3, 9, 16)
    o = fused_attention(q, k, v)
    assert o.transpose(1, 2).reshape(2, 9, 48).data_ptr() == o.data_ptr()


def test_bfloat16_runs_in_the_interpreter_too():
    q, k, v, do = inputs(1, 1, 33, 16, torch.bfloat16)
    check(fused_attention, q, k, v, do, 3e-2)


def test_torch_compile_keeps_one_graph():
    q, k, v, do = inputs(1, 2, 40, 16)
    f = torch.compile(lambda q, k, v: 2 * fused_attention(q, k, v).relu(), fullgraph=True,
                      backend="inductor" if CUDA else "aot_eager")
    eager = value_and_gradients(lambda q, k, v: 2 * fused_attention(q, k, v).relu(), q, k, v, do)
    for x, y in zip(value_and_gradients(f, q, k, v, do), eager):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("arguments, message", [
    (lambda: [torch.zeros(1, 1, 4, 16, device=DEVICE, dtype=torch.float64)] * 3, "bf16, fp16 or fp32"),
    (lambda: [torch.zeros(1, 1, 4, 8, device=DEVICE)] * 3, "16 <= D <= 128"),
    (lambda: [torch.zeros(1, 1, t, 16, device=DEVICE) for t in (1, 4, 4)], "of one shape"),
])
def test_rejects(arguments, message):
    with pytest.raises(ValueError, match=message):
        fused_attention(*arguments())


COMPILE = """
import re, subprocess, sys, torch, triton
from pathlib import Path
from types import SimpleNamespace
from triton.backends.compiler import GPUTarget

# A driver that knows its target and nothing else: enough to compile, through the very calls that would launch.
triton.runtime.driver.set_active(SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32),
    get_current_device=lambda: 0, get_current_stream=lambda device=0: 0))
import model as attention

class Compile:
    def __init__(self, name):
        self.name, self.kernel = name, getattr(attention, name)
        setattr(attention, name, self)
    def __getitem__(self, grid):
        return self.compile
    def compile(self, *args, **kwargs):
        compiled = self.kernel.warmup(*args, **kwargs, grid=(1,))
        Path("kernel.cubin").write_bytes(compiled.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        use = subprocess.check_output([tool, "-res-usage", "kernel.cubin"], text=True, stderr=subprocess.STDOUT)
        use = [re.search(what + r":(\\d+)", use)[1] for what in ("REG", "STACK", "LOCAL")]
        print(self.name, D, compiled.asm["ptx"].count("wgmma.mma_async"), *use, compiled.metadata.shared)

for name in ("_attn_fwd", "_attn_bwd_dq", "_attn_bwd_dkdv"):
    Compile(name)
for D in map(int, sys.argv[1:]):
    q, k, v = torch.empty(3, 2, 200, 4, D, dtype=torch.bfloat16).transpose(2, 3)
    o, lse = attention._attn_forward(q, k, v)
    attention._attn_backward(q, k, v, o, lse, o)
"""


def test_compiles_for_sm_90(tmp_path):
    """No GPU needed. At the table's blocks: matrix instructions, no spilled register, shared memory that fits."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(Path(attention.__file__).parent)}
    run = subprocess.run([sys.executable, "-c", COMPILE, "64", "128"], env=env, cwd=tmp_path, capture_output=True,
                         text=True)
    assert run.returncode == 0, run.stderr
    kernels = re.findall(r"^(\w+) (\d+) (\d+) (\d+) (\d+) (\d+) (\d+)$", run.stdout, re.M)
    assert len(kernels) == 6, run.stdout
    for name, D, matrix_instructions, registers, stack, local, shared in kernels:
        assert int(matrix_instructions) >= 8, (name, D)
        assert int(stack) == int(local) == 0, f"{name} at D = {D} spills: {stack} bytes of stack"
        assert int(shared) <= 227 * 1024, (name, D, shared)


@needs_cuda
@pytest.mark.parametrize("T, D", [(1, 64), (127, 64), (999, 64), (128, 128), (257, 128), (99, 80), (99, 16), (98, 32)])
def test_bfloat16_on_a_gpu(T, D):
    q, k, v, do = inputs(2, 3, T, D, torch.bfloat16)
    got = value_and_gradients(fused_attention, q, k, v, do)
    for name, x, want in zip(("o", "dq", "dk", "dv"), got, reference(q, k, v, do)):
        error = (x.double().cpu() - want).norm() / want.norm().clamp(min=1e-3)
        assert error < 1e-2, f"{name}: relative error {error:.1e}"  # rounding p and ds to bf16 gives about 3e-3


@needs_cuda
def test_compiled_model_and_large_offsets_on_a_gpu():
    """torch.compile(fullgraph) around a fused projection in bf16, and a batch stride that passes 2^31 elements."""
    x = torch.randn(2, 100, 128, device=DEVICE, dtype=torch.bfloat16)
    w = torch.randn(128, 384, device=DEVICE, dtype=torch.bfloat16) / 128**0.5

    def block(x, attend):
        q, k, v = (x @ w).view(2, 100, 3, 2, 64).permute(2, 0, 3, 1, 4)
        return attend(q, k, v).transpose(1, 2).reshape(2, 100, 128)

    f = torch.compile(lambda x: block(x, fused_attention), fullgraph=True)
    torch.testing.assert_close(f(x).float(), block(x, plain_attention).float(), rtol=3e-2, atol=3e-2)
    memory = torch.empty(2**31 + 2**16, device=DEVICE, dtype=torch.bfloat16)
    far = memory.as_strided((3, 1, 100, 64), (2**30, 0, 64, 1)).normal_()
    torch.testing.assert_close(fused_attention(far, far, far)[2], fused_attention(far[2:], far[2:], far[2:])[0])
