"""
How fast are we, in how much memory, and how fast are others with the same work?

    python bench/bench.py --quick                          # CPU, one round with few repeats: minutes
    python bench/bench.py --nanogpt ../nanoGPT             # CPU, three rounds: an hour or two
    python bench/bench.py --gpu                            # all GPU cases: minutes on one card
    python bench/bench.py --only sampling,ppo              # these cases alone; --help names them

Each case runs ours and the peers in turn (ours, peer, ours, peer, ...), each time in a fresh process, so that its peak memory is
its own. The table shows medians over all rounds; JSON lines keep every time. Peers are measured where they are installed:

    pip install transformers "trl==1.12.0" accelerate datasets       # the last TRL with a PPOTrainer; nanoGPT is cloned

and peers.py says how each of them is called. Weights and tokens are random; nothing stops a response: each has its full length.

Caveats: wall-clock times want a machine of their own. Peak memory on a CPU is the process's, libraries included, on a GPU what
PyTorch allocated. TRL runs without its default gradient checkpointing: faster, in more memory. The GELU of our small model, which is
one from scratch, is the exact one, as nanoGPT's is; transformers' models and TRL's on them come with GPT-2's approximation, which they
put together from slow pieces. In the rows "exact GELU" they have ours. At GPT-2's size all but nanoGPT have GPT-2's.
What sft.pick_device sets for our scripts (freed memory is kept, oneDNN multiplies float32) is ours alone: the peers run as they come.
MFU follows PaLM's convention: it counts the attention scores that a causal kernel skips.
"""
import functools
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from types import SimpleNamespace

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # torch is imported where it is needed, ours too

EXACT = "exact GELU"  # a peer whose name ends so has the activation function that ours has, and not GPT-2's, its default
TINY = dict(n_layer=4, n_head=4, n_embd=128, vocab_size=1024, n_positions=256, activation="gelu")
GPT2 = dict(n_layer=12, n_head=12, n_embd=768, vocab_size=50257, n_positions=1024, activation="gelu_new")  # 124M
SMOKE = dict(n_layer=1, n_head=2, n_embd=32, vocab_size=64, n_positions=32, batch=2, query=8, response=4, warmup=0, repeats=1)

# name: which function measures it, its shape, the untimed and timed repeats of a process, and peers as (who, precision), the
# last of them at its best, as measured before: it is the one that growth is compared with
CPU_CASES = {
    "sampling": dict(run="sampling", **TINY, batch=64, query=112, response=48, warmup=2, repeats=5, peers=[
        ("transformers dynamic cache", "fp32"), ("transformers static cache", "fp32"),
        ("transformers dynamic cache exact GELU", "fp32"), ("transformers dynamic cache", "bf16 weights"),
        ("transformers static cache", "bf16 weights")]),
    "sft": dict(run="sft", **TINY, batch=32, query=112, response=48, warmup=5, repeats=10, peers=[
        ("nanoGPT", "fp32"), ("nanoGPT", "bf16"), ("transformers sdpa", "fp32"), ("transformers eager", "fp32"),
        ("transformers sdpa exact GELU", "fp32"), ("transformers sdpa", "bf16"), ("transformers eager", "bf16"),
        ("transformers eager exact GELU", "bf16")]),
    "reward": dict(run="reward", **TINY, batch=16, query=112, response=48, warmup=2, repeats=5, peers=[
        ("TRL RewardTrainer", "fp32"), ("TRL RewardTrainer", "bf16"), ("transformers loop", "fp32"),
        ("transformers loop", "bf16"), ("transformers loop exact GELU", "bf16")]),
    "ppo": dict(run="ppo", **TINY, batch=64, query=112, response=48, epochs=4, minibatches=1, warmup=2, repeats=2, peers=[
        ("TRL PPOTrainer", "fp32"), ("TRL PPOTrainer exact GELU", "fp32"), ("TRL PPOTrainer", "bf16 weights"),
        ("TRL PPOTrainer exact GELU", "bf16 weights")]),
    "ppo-gpt2": dict(run="ppo", **GPT2, batch=4, query=464, response=48, epochs=1, minibatches=1, warmup=1, repeats=1, peers=[
        ("TRL PPOTrainer", "fp32"), ("TRL PPOTrainer", "bf16 weights")]),
    "logprobs": dict(run="logprobs", **TINY | {"vocab_size": 50257}, batch=32, query=112, response=48, warmup=2, repeats=3, peers=[
        ("transformers all logits", "fp32"), ("transformers logits_to_keep", "fp32"), ("transformers all logits", "bf16"),
        ("transformers logits_to_keep", "bf16"), ("transformers logits_to_keep exact GELU", "bf16")]),
}
GROWING = ["sampling", "sft", "reward", "ppo", "logprobs"]  # the case "growth": each of these at 1, 2 and 4 times ...
AXES = ["batch", "response", "width"]  # ... one of these
GPU_CASES = {
    "attention": dict(run="attention", **GPT2, batch=16, query=1024, response=0, inner=20, warmup=1, repeats=5, peers=[
        ("ours, plain", "bf16"), ("PyTorch FlashAttention", "bf16"), ("PyTorch default", "bf16")]),
    "sft": dict(run="sft", **GPT2, batch=32, query=512, response=512, warmup=3, repeats=5, peers=[
        ("nanoGPT", "bf16"), ("transformers sdpa", "bf16")]),
    "sampling": dict(run="sampling", **GPT2, batch=512, query=512, response=48, warmup=1, repeats=2, peers=[
        ("transformers dynamic cache", "bf16 weights")]),
    "ppo": dict(run="ppo", **GPT2, batch=512, query=512, response=48, epochs=4, minibatches=8, warmup=1, repeats=1, peers=[]),
}
PEAK_TFLOPS = {"H100 PCIe": 756, "H100 NVL": 835, "H200 NVL": 835, "H100": 989, "H200": 989, "A100": 312, "B200": 2250,
               "L40S": 362, "RTX 4090": 165}  # dense bf16, from data sheets; the first name found in the device's name counts


# ---------------------------------------------------------------------------------------------------------------------
# ours: each function takes the case and returns the step to be timed, made of what sft.py, reward.py and ppo.py are made of

def gpt(c, head="lm"):
    import torch
    from model import GPT, GPTConfig
    eos = c.vocab_size  # no token has this id: nothing stops
    with torch.device(c.device):
        model = GPT(GPTConfig(c.vocab_size, max(c.n_positions, c.query + c.response), c.n_layer, c.n_head, c.n_embd, eos, c.activation), head)
    model.amp_dtype = torch.float32 if c.precision == "fp32" else torch.bfloat16
    return model


def sampling(c):
    import torch
    from peers import random_ids
    model, generator = gpt(c), torch.Generator().manual_seed(0)
    queries, lengths = random_ids(c, c.batch, c.query).to(c.device), torch.full((c.batch,), c.query, device=c.device)

    def step():
        tokens, ends, _ = model.generate(queries, lengths, c.response, c.temperature, None, generator)
        assert tokens.shape == (c.batch, c.query + c.response)
    return step


def sft(c):
    from peers import random_ids, training_step
    from sft import backward_rows, make_optimizer
    model = gpt(c)
    queries, responses = random_ids(c, c.batch, c.query).tolist(), random_ids(c, c.batch, c.response).tolist()
    every_token = 1.0  # what a query token counts
    return training_step(model, make_optimizer([model], 1e-4, 0.01), lambda: backward_rows(model, queries, responses, every_token))


def reward(c):
    from peers import random_ids, training_step
    from reward import pairwise_loss, score_groups
    from sft import make_optimizer
    model = gpt(c, "scalar")
    groups = [{"query": query, "responses": random_ids(c, 2, c.response).tolist(), "pairs": [(0, 1)]}
              for query in random_ids(c, c.batch, c.query).tolist()]
    return training_step(model, make_optimizer([model], 1e-4, 0.01), lambda: pairwise_loss(*score_groups(model, groups)).backward())


def logprobs(c):
    import torch
    from peers import random_ids
    model, tokens = gpt(c), random_ids(c, c.batch, c.query + c.response).to(c.device)
    query_lengths, lengths = (torch.full((c.batch,), n, device=c.device) for n in (c.query, c.query + c.response))

    def step():
        model.zero_grad(set_to_none=True)
        model.logprobs(tokens, query_lengths, lengths, c.response, c.temperature).sum().backward()
    return step


def ppo(c):
    import torch
    from peers import random_ids
    from ppo import PPOSettings, rollout, update
    from sft import make_optimizer
    policy, ref_policy, reward_model, value_model = gpt(c), gpt(c), gpt(c, "scalar"), gpt(c, "scalar")
    ref_policy.load_state_dict(policy.state_dict())
    s = PPOSettings(batch=c.batch, epochs=c.epochs, minibatches=c.minibatches, temperature=c.temperature)
    optimizer, generator = make_optimizer([policy, value_model], 1e-5, 0.0), torch.Generator().manual_seed(0)

    def step():
        queries = random_ids(c, c.batch, c.query).tolist()
        r = rollout(policy, ref_policy, reward_model, value_model, queries, c.response, s, s.beta, generator)
        assert int(r.mask.sum()) == c.batch * c.response  # as long as the peer's
        update(policy, value_model, optimizer, r, s, generator)
    return step


def attention(c):
    import model
    from peers import attention_step
    return attention_step(c, model.attention if c.who == "ours" else model.plain_attention)


# ---------------------------------------------------------------------------------------------------------------------
# one case, in its own process

def peak_mb(device):
    if device == "cuda":
        import torch
        return torch.cuda.max_memory_allocated() / 2**20
    try:  # on Linux a process starts with its parent's peak: ours imports torch and no more, which every child does as well
        import resource
    except ImportError:  # Windows
        return float("nan")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def time_steps(step, c):
    import torch
    synchronize = torch.cuda.synchronize if c.device == "cuda" else lambda: None
    seconds = []
    for _ in range(c.warmup + c.repeats):
        synchronize()
        began = time.perf_counter()
        step()
        synchronize()
        seconds.append(time.perf_counter() - began)
    return seconds


def measure(c):
    """Run one case here and now. -> {seconds: of each timed repeat, peak_mb, threads, note}"""
    import torch
    import peers
    if c.threads:
        torch.set_num_threads(c.threads)
    torch.manual_seed(0)
    package, _, variant = c.who.partition(" ")
    c.variant, c.exact_gelu = variant.removesuffix(EXACT).strip(), variant.endswith(EXACT)
    if package.startswith("ours"):
        from sft import pick_device
        pick_device(c.device)
        result = {f.__name__: f for f in (sampling, sft, reward, logprobs, ppo, attention)}[c.run](c)
    else:
        result = getattr(peers, f"{c.run}_{package.lower()}")(c)
    seconds = result if isinstance(result, list) else time_steps(result, c)
    seconds = [s / c.inner for s in seconds[c.warmup:]]
    assert len(seconds) == c.repeats
    note = speed_note(c, statistics.median(seconds), torch.cuda.get_device_name()) if c.device == "cuda" else ""
    return {"seconds": seconds, "peak_mb": peak_mb(c.device), "threads": torch.get_num_threads(), "note": note}


def flops_per_token(c):
    """Of a training step: 6N + 12 L d T, N parameters without the positions. (PaLM appendix B)"""
    d, L = c.n_embd, c.n_layer
    N = c.vocab_size * d + L * (12 * d * d + 13 * d) + 2 * d
    return 6 * N + 12 * L * d * (c.query + c.response)


def speed_note(c, seconds, device_name):
    """What share of the GPU's peak a training step reaches; TFLOP/s of attention, of which the causal half is counted."""
    T, d = c.query + c.response, c.n_embd
    if c.run == "attention":  # two products forward, five backward, T²/2 scores each
        return f"{7 * c.batch * T * T * d / seconds / 1e12:.0f} TFLOP/s"
    if c.run != "sft":
        return ""
    tflops = c.batch * T * flops_per_token(c) / seconds / 1e12
    peak = c.peak_tflops or next((p for name, p in PEAK_TFLOPS.items() if name in device_name), None)
    return f"MFU {tflops / peak:.1%} of {peak:g} TFLOP/s" if peak else f"{tflops:.0f} TFLOP/s; --peak-tflops would tell the MFU"


def child(case):
    stdout, sys.stdout = sys.stdout, sys.stderr  # libraries print; the last line of stdout is the result
    result = measure(SimpleNamespace(**case))
    print(json.dumps(result), file=stdout, flush=True)


def add_round(case):
    """Measure a case once more, in a fresh process, and add what it says to the case. One that failed is not tried again."""
    if "error" not in case:
        result = run_child(case)
        if "seconds" in result:
            result["seconds"] = case.get("seconds", []) + result["seconds"]
            result["peak_mb"] = max(result["peak_mb"], case.get("peak_mb", 0))
        case.update(result)


def run_child(case):
    done = subprocess.run([sys.executable, os.path.abspath(__file__), "--case", json.dumps(case)], capture_output=True, text=True)
    if done.returncode == 0:
        *said, last = done.stdout.splitlines()
        result = json.loads(last)
        fallen_back = [line for line in said if line.startswith(("attention: plain", "sampler: no CUDA graph"))]
        return result | {"note": " ".join([result["note"]] * bool(result["note"]) + fallen_back)}
    if done.returncode < 0:
        return {"error": f"ended by signal {-done.returncode}" + (" (out of memory?)" if done.returncode == -9 else "")}
    return {"error": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]}


# ---------------------------------------------------------------------------------------------------------------------
# all cases: the plan, the rounds, the table

def contenders(case, precisions, installed, growth=()):
    """One entry per run of a case: ours in each precision, then the peers that are installed; with `growth`, ours in the default
    precision and the last peer, at each of these multiples of each axis. label says which entries compare with each other."""
    case, peers = {k: v for k, v in case.items() if k != "peers"}, case["peers"]
    peers = [(who, precision) for who, precision in peers if installed(who)]
    if not growth:
        return [case | {"who": who, "precision": precision, "label": ""}
                for who, precision in [("ours", p) for p in precisions] + peers]
    scales = [("batch", 1)] + [(axis, by) for axis in AXES for by in growth]
    return [scaled(case, axis, by) | {"who": who, "precision": precision, "label": f"{axis} x{by}" if by > 1 else "x1"}
            for axis, by in scales for who, precision in [("ours", precisions[-1])] + peers[-1:]]


def scaled(case, axis, by):
    """The case with `by` times the batch, the response length or the width; heads keep their size."""
    changed = {"n_embd": case["n_embd"] * by, "n_head": case["n_head"] * by} if axis == "width" else {axis: case[axis] * by}
    return case | changed | {"warmup": (case["warmup"] + 1) // 2, "repeats": (case["repeats"] + 1) // 2}


RESPONSES_COUNT = ("sampling", "ppo", "logprobs")  # tokens/s there are response tokens, elsewhere all of a row's


def tokens_per_step(c):
    if c["run"] in RESPONSES_COUNT:
        return c["batch"] * c["response"]
    return c["batch"] * (c["query"] + c["response"]) * (2 if c["run"] == "reward" else 1)


def summarize(runs):
    """Add the medians, and to every run the speed of ours over its own, by our precision: above 1, ours is faster."""
    for c in runs:
        if "error" not in c:
            c["median_s"], c["min_s"], c["max_s"] = statistics.median(c["seconds"]), min(c["seconds"]), max(c["seconds"])
            c["tokens_per_s"] = tokens_per_step(c) / c["median_s"]
    done = [c for c in runs if "error" not in c]
    for c in done:
        c["speed_of_ours"] = {o["precision"]: c["median_s"] / o["median_s"] for o in done
                              if o["who"] == "ours" and o["label"] == c["label"]}
        c["growth"] = next((c["median_s"] / o["median_s"] for o in done if o["label"] == "x1" and
                            (o["who"], o["precision"]) == (c["who"], c["precision"])), None)
    return runs


def table(name, runs):
    """The lines of one case."""
    c = SimpleNamespace(**runs[0])
    what = (f"{c.batch} {'pairs' if c.run == 'reward' else 'rows'} of {c.query} + {c.response} tokens, "
            f"{c.n_layer} layers of {c.n_embd}, vocabulary {c.vocab_size}")
    if c.run == "attention":
        what = f"forward and backward, B = {c.batch}, H = {c.n_head}, T = {c.query}, D = {c.n_embd // c.n_head}, causal"
    if c.run == "ppo":
        what += f", epochs: {c.epochs}, minibatches: {c.minibatches}"
    counted = "response tokens" if c.run in RESPONSES_COUNT else "tokens"
    ours = list(dict.fromkeys(p for r in runs for p in r.get("speed_of_ours", ())))
    names = [f"{r['who']} {r['label']}" for r in runs]
    wide = max(map(len, names)) + 2
    heads = "".join(f"{f'ours {p}':>11}" for p in ours)
    lines = [f"{name}: {what}; {counted} per second",
             f"{'':{wide + 15}}{'seconds (min – max)':>26}{'tokens/s':>11}{'peak MB':>9}{heads}"]
    for r, who in zip(runs, names):
        head = f"  {who:{wide}}{r['precision']:13}"
        if "error" in r:
            lines.append(f"{head}  failed: {r['error']}")
            continue
        ratios = "".join(f"{f'{x:.2f}x':>11}" if (x := r["speed_of_ours"].get(p)) else " " * 11 for p in ours)
        growth = f"  {r['growth']:.2f} times x1" if r["growth"] and r["label"] != "x1" else ""
        seconds = f"{r['median_s']:.3g} ({r['min_s']:.3g} – {r['max_s']:.3g})"
        lines.append(f"{head}{seconds:>26}{r['tokens_per_s']:>11,.0f}{r['peak_mb']:>9,.0f}{ratios}{growth}  {r['note']}".rstrip())
    return "\n".join(lines) + "\n"


def machine(device):
    import torch
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        with open("/proc/cpuinfo") as f:
            return next(line.split(":")[1].strip() for line in f if line.startswith("model name"))
    except (OSError, StopIteration):  # macOS, Windows, some Arm
        return platform.processor() or platform.machine()


def installed_peers(args):
    """-> installed(who): whether its package is there; says once of each that is not."""
    needs = {"transformers": ["transformers"], "TRL": ["trl", "transformers", "accelerate", "datasets"]}

    @functools.cache
    def there(name):
        missing = [p for p in needs.get(name, []) if importlib.util.find_spec(p) is None]
        if missing:
            print(f"{name} is left out: pip install {' '.join(missing).replace('trl', 'trl==1.12.0')}")
        if name == "nanoGPT" and not args.nanogpt:
            print("nanoGPT is left out: --nanogpt names the folder with its model.py")
        return bool(args.nanogpt) if name == "nanoGPT" else not missing

    return lambda who: not args.ours and there(who.split()[0])


def plan(args, cases, precisions, installed):
    """-> [(name, runs)] in the order in which they are measured."""
    from sft import DataError
    names = list(cases) + ["growth"] * (not args.gpu)
    chosen = args.only.split(",") if args.only else names
    for name in chosen:
        if name not in names:
            raise DataError(f"--only {name}: there is no such case; choose among {','.join(names)}")
    sections = [(name, contenders(cases[name], precisions, installed)) for name in names if name in chosen and name != "growth"]
    if "growth" in chosen:
        multiples, peers = ((2,), lambda who: False) if args.quick else ((2, 4), installed)
        sections += [(f"growth of {name}", contenders(cases[name], precisions, peers, multiples)) for name in GROWING]
    for name, runs in sections:
        for c in runs:
            c.update(case=name, device="cuda" if args.gpu else "cpu", temperature=0.7, threads=args.threads, nanogpt=args.nanogpt,
                     peak_tflops=args.peak_tflops, inner=c.get("inner", 1))
            if args.quick:
                c.update(warmup=c["warmup"] // 2, repeats=max(1, c["repeats"] // 2))
            if args.repeats:
                c["repeats"] = args.repeats
    return sections


def measure_all(sections, rounds, path, about):
    """Case by case: the rounds, the table's lines, the JSON lines."""
    from tqdm import tqdm
    with open(path, "a") as out, tqdm(total=rounds * sum(len(runs) for _, runs in sections), unit="process") as bar:
        for name, runs in sections:
            for _ in range(rounds):
                for c in runs:
                    bar.set_description(f"{name}, {c['who']} {c['precision']} {c['label']}".strip())
                    add_round(c)
                    bar.update()
            bar.write(table(name, summarize(runs)))
            out.writelines(json.dumps(about | c) + "\n" for c in runs)
            out.flush()


def main():
    import torch
    from model import choose_precision
    from sft import DataError, Parser
    parser = Parser(__doc__)
    parser.add_argument("--only", help=f"comma list of cases: {','.join(CPU_CASES)},growth; with --gpu {','.join(GPU_CASES)}")
    parser.add_argument("--gpu", action="store_true", help="the GPU cases instead of the CPU cases")
    parser.add_argument("--quick", action="store_true", help="one round, half the repeats; growth at 2x only, without peers")
    parser.add_argument("--smoke", action="store_true", help="toy sizes, once: does every case run? The times mean nothing")
    parser.add_argument("--ours", action="store_true", help="leave all peers out")
    parser.add_argument("--nanogpt", metavar="FOLDER", help="folder with nanoGPT's model.py")
    parser.add_argument("--rounds", type=int, help="processes per contender (default 3, with --gpu 2, with --quick or --smoke 1)")
    parser.add_argument("--repeats", type=int, help="timed repeats in each process (default by case)")
    parser.add_argument("--threads", type=int, help="CPU threads (default PyTorch's choice)")
    parser.add_argument("--peak-tflops", type=float, help="the GPU's dense bf16 peak, for the MFU of a card unknown here")
    parser.add_argument("--out", default="out/bench.jsonl", help="file that JSON lines are added to (default out/bench.jsonl)")
    args = parser.parse_args()
    for name in ("rounds", "repeats", "threads", "peak_tflops"):
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            raise DataError(f"--{name.replace('_', '-')} must be above 0")
    if args.nanogpt and not os.path.isfile(os.path.join(args.nanogpt, "model.py")):
        raise DataError(f"--nanogpt {args.nanogpt}: there is no model.py; name a folder that holds nanoGPT's")
    if not torch.cuda.is_available():
        print("GPU cases are skipped: PyTorch finds no GPU here")
        if args.gpu:
            return
    device = "cuda" if args.gpu else "cpu"
    default = "bf16" if choose_precision(device)[0] == torch.bfloat16 else "fp32"
    cases = GPU_CASES if args.gpu else CPU_CASES
    if args.smoke:
        cases = {name: case | SMOKE for name, case in cases.items()}
    precisions = [default] if args.gpu else list(dict.fromkeys(["fp32", default]))
    sections = plan(args, cases, precisions, installed_peers(args))
    rounds = args.rounds or (1 if args.quick or args.smoke else 2 if args.gpu else 3)

    about = {"date": time.strftime("%Y-%m-%dT%H:%M:%S"), "machine": machine(device), "torch": torch.__version__}
    print(f"{about['machine']}, {args.threads or torch.get_num_threads()} threads, torch {about['torch']}, {about['date']}; "
          f"rounds: {rounds}; our default precision: {default}")
    print("'ours fp32 2.00x' in a peer's row: our median is half of its median, we are twice as fast")
    if hasattr(os, "getloadavg") and os.getloadavg()[0] > 0.5:
        print(f"others are using this machine (load {os.getloadavg()[0]:.1f}): the times will be noisy")
    print(flush=True)
    os.makedirs(os.path.dirname(os.path.abspath(args.out)), exist_ok=True)
    try:
        measure_all(sections, rounds, args.out, about)
    except KeyboardInterrupt:
        sys.exit(f"stopped; finished cases are in {args.out}")
    print(f"every time in {args.out}")
    sys.exit(int(any("error" in c for _, runs in sections for c in runs)))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--case"]:  # a process that measures one thing, and imports nothing else before
        child(json.loads(sys.argv[2]))
    else:
        from sft import run_main
        run_main(main)
