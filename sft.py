"""
Supervised fine-tuning, and what all training here shares: optimizer, schedule, checkpoint, metrics log, settings.

References: Stiennon 2020 §3.4 and appendix B.1 (supervised baselines); InstructGPT 2022 appendix C.1.

    python sft.py out/tiny-seed1 --out out/tiny-seed1/sft-again --lr 5e-4

trains on the filtered posts of a run, starting from its pretrained model. The same loop, `train_lm`, makes the
"pretrained" model from the world's unfiltered text: this stands for GPT-2, a model that has seen TL;DRs of all qualities.
"""
import argparse
import dataclasses
import functools
import inspect
import itertools
import json
import math
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from tqdm import tqdm

from corpus import held_out_text, post_rows, store_rows, stored_text, text_files
from data import (DataError, encode_query, encode_response, gpt2_encoding, load_encoding, load_posts, pad_rows, save_vocabulary,
                  write_atomic)
from model import GPT, choose_precision, keep_freed_memory, multiply_float32_by_onednn


@dataclass
class SFTSettings:
    lr: float = 1e-3  # peak learning rate
    batch: int = 32  # rows per step
    epochs: int = 1  # passes over the posts; 0 leaves the model as it is (Ziegler has no SFT)
    warmup: int = 20  # steps of linear warm-up
    final_lr: float = 0.1  # the cosine ends at this share of the peak
    weight_decay: float = 0.01  # on matrices and embeddings
    query_weight: float = 0.0  # what a query token counts in the loss; a response token counts 1
    micro: int = 0  # rows per forward and backward pass, 0: the whole batch; the same gradient in less memory
    recompute: bool = False  # compute activations again in the backward pass: less memory, more time
    dropout: float = 0.0  # residual dropout while training (InstructGPT 0.2)
    mix: float = 0.0  # share of pretraining rows among those of fine-tuning (InstructGPT's start of PPO 0.1)
    choose: str = "last"  # the epoch whose weights are kept: last, loss (lowest held out) or reward (the reward model's; InstructGPT C.1)

    def validate(self):
        check(self.lr > 0 and self.batch > 0 and self.epochs >= 0, "lr and batch must be above 0, epochs must not be negative")
        check(self.warmup >= 0 and self.weight_decay >= 0 and self.micro >= 0, "warmup, weight_decay and micro must not be negative")
        check(0 <= self.final_lr <= 1 and 0 <= self.query_weight <= 1, "final_lr and query_weight must lie between 0 and 1")
        check(0 <= self.dropout < 1 and 0 <= self.mix < 1, "dropout and mix must be at least 0 and below 1")
        check(self.choose in ("last", "loss", "reward"), "choose must be last, loss or reward")
        check(self.epochs > 0 or self.choose == "last", "with epochs 0 there is nothing to choose")


# ---------------------------------------------------------------------------------------------------------------------
# the loss

def lm_loss(logits, targets, weights):
    """Weighted mean of -log π(target). logits [N, V], targets [N], weights [N] -> scalar."""
    return weighted_mean(F.cross_entropy(logits, targets, reduction="none"), weights)


def weighted_mean(x, weights):
    return (weights * x).sum() / weights.sum()


# ---------------------------------------------------------------------------------------------------------------------
# what all training shares

def check(ok, message):
    """Settings are validated in one line each."""
    if not ok:
        raise DataError(f"setting out of range: {message}")


def make_optimizer(models, lr, weight_decay, beta2=0.95, eps=1e-8):
    """AdamW over one or several models; weight decay on matrices only."""
    groups = []
    for model in models:  # two groups each, see set_lr
        params = [p for p in model.parameters() if p.requires_grad]
        groups += [{"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
                   {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, beta2), eps=eps, fused=models[0].device.type != "mps")


def tf_adam_step(optimizer, eps):
    """optimizer.step() as TensorFlow 1 takes it: Δ = -lr √(1 - β2^t) / (1 - β1^t) · m / (√v + ε).

    PyTorch adds its ε to √(v / (1 - β2^t)): with ε / √(1 - β2^t) the two are one. (Ziegler's code; at β2 = 0.999 the first ε is 32 times as
    large, and so the first steps on small gradients are far shorter.)"""
    t = 1 + int(next(iter(optimizer.state.values()), {"step": 0})["step"])
    for group in optimizer.param_groups:
        group["eps"] = eps / math.sqrt(1 - group["betas"][1] ** t)
    optimizer.step()


def cosine(step, steps, warmup, final):
    """Share of the peak learning rate: linear warm-up, then a cosine down to `final` at the last step."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def set_lr(optimizer, *rates):
    """One learning rate, or one for each model of make_optimizer."""
    for i, group in enumerate(optimizer.param_groups):
        group["lr"] = rates[i // 2 if len(rates) > 1 else 0]


@functools.cache
def two_threads():
    return ThreadPoolExecutor(2, initializer=torch.set_num_threads, initargs=(max(1, torch.get_num_threads() // 2),))


def side_by_side(device, n, micro):
    """Whether backward_parts takes n rows as two halves at the same time."""
    return device == "cpu" and not micro and n >= 16 and torch.get_num_threads() > 1


def backward_parts(model, loss, n, micro=0):
    """The gradient of Σ loss(part), the parts being slices of n rows: `micro` rows each, or all of them, one part after the other; but
    on a CPU, from 16 rows on, two halves side by side, in threads with half of the cores each: between two products of matrices a good
    part of a step keeps one core busy, however many there are. loss(part) -> scalar, what is to be known of it. -> the latter, by part"""
    if side_by_side(model.device.type, n, micro) and not model.blocks[0].dropout:  # its masks come from one generator, in the order of its use
        params = [p for p in model.parameters() if p.requires_grad]

        def half(part):
            value, known = loss(part)
            return torch.autograd.grad(value, params, allow_unused=True), known

        (one, known), (other, more) = two_threads().map(half, (slice(n // 2), slice(n // 2, n)))
        for p, a, b in zip(params, one, other):  # in this order, whichever came first: a run can be repeated to the bit
            if a is not None:
                p.grad = a.add_(b) if p.grad is None else p.grad.add_(a).add_(b)
        return [known, more]
    out = []
    for i in range(0, n, micro or n):
        value, known = loss(slice(i, i + (micro or n)))
        value.backward()
        out.append(known)
    return out


def save_state(folder, step, models, optimizer, generator, **more):
    """Everything that the next step depends on, in one file that is all there or not there at all."""
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, "state.pt")
    state = {"step": step, "optimizer": optimizer.state_dict(), "generator": generator.get_state(), "more": more,
             "models": [model.state_dict() for model in models]}
    with open(path + ".tmp", "wb") as f:
        torch.save(state, f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(path + ".tmp", path)


def load_state(folder, models, optimizer, generator):
    """Restore what save_state wrote. -> (next step, more), or (0, {}) where nothing was saved yet."""
    path = os.path.join(folder, "state.pt")
    if not os.path.exists(path):
        return 0, {}
    state = torch.load(path, map_location=models[0].device, weights_only=True)
    try:
        for model, tensors in zip(models, state["models"], strict=True):
            model.load_state_dict(tensors)
    except (RuntimeError, ValueError):
        raise DataError(f"{path} belongs to a model of another shape; remove the folder or name another with --out") from None
    optimizer.load_state_dict(state["optimizer"])
    generator.set_state(state["generator"].cpu())
    return state["step"], state["more"]


class MetricsLog:
    """metrics.jsonl: one JSON object per step. Resuming at step s drops the lines from s on."""

    def __init__(self, folder, start):
        os.makedirs(folder, exist_ok=True)
        self.path = os.path.join(folder, "metrics.jsonl")
        kept = [row for row in read_metrics(folder) if row["step"] < start]
        write_atomic(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        self.file = open(self.path, "a")

    def write(self, step, **values):
        for name, value in values.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise DataError(f"{name} is {value} at step {step} of {os.path.dirname(self.path)}: training has diverged; lower its learning rate")
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()


def read_metrics(folder):
    path = os.path.join(folder, "metrics.jsonl")
    if not os.path.exists(path):
        return []
    with open(path) as f:
        return [json.loads(line) for line in f if line.endswith("\n")]  # a line cut by a crash has no end


def batches(n, batch, epochs, seed, lengths=None):
    """The order in which an epoch loop visits n rows: a list of index lists, each epoch its own permutation. The last
    short batch of an epoch is kept where it is the only one, else dropped.

    With lengths, rows of like length share a batch (sorted within stretches of 32 batches, then shuffled): less padding."""
    generator = torch.Generator().manual_seed(seed)
    out, whole = [], max(n // batch * batch, min(n, batch))
    for _ in range(epochs):
        order = torch.randperm(n, generator=generator).tolist()[:whole]
        if lengths:
            stretch = 32 * batch
            order = [i for k in range(0, whole, stretch) for i in sorted(order[k:k + stretch], key=lambda i: lengths[i])]
        steps = [order[i:i + batch] for i in range(0, whole, batch)]
        if lengths:
            steps = [steps[i] for i in torch.randperm(len(steps), generator=generator).tolist()]
        out += steps
    return out


def settings_help(cls):
    """{field: its trailing comment}: the comments of a settings class are its documentation."""
    return dict(re.findall(r"^    (\w+): .*?#\s*(.*)$", inspect.getsource(cls), re.M))


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one sentence; its description is the script's docstring."""

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)

    def error(self, message):
        self.exit(2, f"error: {message}; --help lists every option\n")


def seed_number(text):
    """The type of --seed: what every generator takes."""
    if not re.fullmatch(r"\d{1,9}", text):
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 to 999999999, found {text!r}")
    return int(text)


def seed_list(text):
    """The value of --seeds: different seeds with commas between them."""
    if not re.fullmatch(r"\d{1,9}(,\d{1,9})*", text):
        raise DataError(f"--seeds must be whole numbers with commas between, such as 1,2,3, found {text!r}")
    return list(dict.fromkeys(map(int, text.split(","))))


def true_or_false(text):
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected true or false, found {text!r}")
    return text.lower() == "true"


def add_settings(parser, settings, prefix="", default=None):
    """One option per field of a settings object, --help from the trailing comments of its class."""
    comments = settings_help(type(settings))
    for field in dataclasses.fields(settings):
        parser.add_argument(f"--{prefix}{field.name}", type=true_or_false if field.type is bool else field.type, default=None,
                            metavar=field.type.__name__, help=f"{comments[field.name]} "
                            f"(default {default or getattr(settings, field.name)})".replace("%", "%%"))


def override(settings, args, prefix=""):
    """A copy of settings with what the command line named; validated."""
    named = {f.name: getattr(args, prefix + f.name) for f in dataclasses.fields(settings)
             if getattr(args, prefix + f.name) is not None}
    settings = dataclasses.replace(settings, **named)
    settings.validate()
    return settings


def run_main(main):
    """Run a script's main(): bad input ends in one sentence and exit status 2, never in a traceback."""
    try:
        main()
    except DataError as e:
        sys.exit(_say(e, 2))
    except KeyboardInterrupt:
        sys.exit(_say("stopped; the same command goes on from its last checkpoint", 130))
    except OSError as e:
        sys.exit(_say(f"{e.filename or 'a file'}: {e.strerror or e}", 2))


def _say(message, status):
    print(f"error: {message}" if status == 2 else message, file=sys.stderr)
    return status


def pick_device(name):
    """"auto" takes a GPU where there is one. Says which device and precision, and why."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name not in ("cpu", "cuda", "mps"):
        raise DataError(f"--device must be auto, cpu, cuda or mps, found {name!r}")
    if (name == "cuda" and not torch.cuda.is_available()) or (name == "mps" and not torch.backends.mps.is_available()):
        raise DataError(f"--device {name}: this machine has none, or its PyTorch cannot use it; try --device auto")
    dtype, reason = choose_precision(name)
    more = ""
    if name == "cpu":
        more += "; freed memory is kept, so that a step need not ask the system for it again" if keep_freed_memory() else ""
        more += "; float32 products by oneDNN in place of MKL, but for the sampler's" if multiply_float32_by_onednn() else ""
    print(f"device {name}, matrix products in {str(dtype)[6:]}: {reason}{more}")
    return name


def open_run(folder):
    """What run.py's first stage left in a run's folder: its config, tokenizer, lengths, stop rule and posts by split."""
    try:
        with open(os.path.join(folder, "config.json")) as f:
            config = json.load(f)
        with open(os.path.join(folder, "data", "lengths.json")) as f:
            lengths = json.load(f)
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{folder} is not the folder of a run; `python run.py --out {folder}` makes one") from None
    except ValueError as e:
        raise DataError(f"{folder}: config.json or data/lengths.json is damaged ({e})") from None
    enc, s = load_encoding(os.path.join(folder, "tokenizer.json")), config["settings"]["ppo"]
    return SimpleNamespace(folder=folder, config=config, enc=enc, Q=lengths["Q"], R=lengths["R"],
                           stop=stop_rule(enc, s["stop_token"], s["truncate_after"], lengths["R"]),
                           posts=Posts(os.path.join(folder, "data")))


class Posts(dict):
    """{split: posts}, each split read when it is first asked for: of a large set most stages need little."""

    def __init__(self, folder):
        self.folder = folder

    def __missing__(self, split):
        self[split] = load_posts(os.path.join(self.folder, split + ".jsonl"), need_summary=split != "prompts")[0]
        return self[split]


def alone(doc, stage, settings_class, refuse):
    """What `python sft.py`, `reward.py` and `ppo.py` share: a stage of a finished run once more, with other settings.

    refuse(run, settings) raises what would stop it later, before anything is written. -> run, settings, folder for the result, device"""
    parser = Parser(doc)
    parser.add_argument("run", help="folder of a run that run.py made")
    parser.add_argument("--out", help=f"where the result goes (default RUN/{stage}-alone)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default auto)")
    parser.add_argument("--seed", type=seed_number, help="seed (default the run's)")
    add_settings(parser, settings_class(), default="the run's")
    args = parser.parse_args()
    run = open_run(args.run)
    run.seed = run.config["seed"] if args.seed is None else args.seed
    settings = override(settings_class(**run.config["settings"][stage]), args)
    refuse(run, settings)
    out = args.out or os.path.join(args.run, f"{stage}-alone")
    if os.path.exists(os.path.join(out, "model.safetensors")):
        raise DataError(f"{out} already holds a trained model; name another folder with --out")
    os.makedirs(out, exist_ok=True)
    file, asked = os.path.join(out, "settings.json"), {"seed": run.seed, **dataclasses.asdict(settings)}
    if os.listdir(out) and not os.path.exists(file):  # a run's folder, say: its config.json is not ours to write
        raise DataError(f"{out} is not empty and was not begun by this command; name another folder with --out")
    if os.path.exists(file):
        with open(file) as f:
            old = json.load(f)
        for name, value in asked.items():
            if old.get(name) != value:
                raise DataError(f"{out} was begun with {name} = {old.get(name)}, now it is {value}; name another folder with --out")
    write_atomic(file, json.dumps(asked))
    save_vocabulary(run.enc, out)
    return run, settings, out, pick_device(args.device)


def load_model(folder, device, head="lm"):
    """GPT.from_pretrained with the device's precision; a missing or unusable folder is one sentence."""
    try:
        model = GPT.from_pretrained(folder, head).to(device)
    except DataError:  # its download failed
        raise
    except FileNotFoundError:
        raise DataError(f"{folder} holds no model (model.safetensors and config.json)") from None
    except (ValueError, KeyError, OSError) as e:
        raise DataError(f"the model in {folder} cannot be loaded: {e}") from None
    except Exception as e:  # safetensors' own error type for a damaged file
        raise DataError(f"the model in {folder} is damaged: {e}") from None
    model.amp_dtype = choose_precision(device)[0]
    return model


def load_fitting(folder, run, device, head="lm"):
    """load_model, and a model of another vocabulary or too short a context is one sentence."""
    c = (model := load_model(folder, device, head)).config
    if c.vocab_size != run.enc.n_vocab or c.n_positions < run.Q + run.R:
        raise DataError(f"the model in {folder} has {c.vocab_size} tokens and {c.n_positions} positions, the run {run.folder} needs "
                        f"{run.enc.n_vocab} and {run.Q + run.R}; it belongs to another run")
    if os.path.exists(os.path.join(folder, "vocab.json")) and gpt2_encoding(folder)._mergeable_ranks != run.enc._mergeable_ranks:
        raise DataError(f"the model in {folder} has another vocabulary than the run {run.folder}: its tokens mean other texts; "
                        "it belongs to another run")
    return model


# ---------------------------------------------------------------------------------------------------------------------
# where a response ends: with its first EOS, or by Ziegler's rule

def stop_rule(enc, text, after, R):
    """-> (token, after): what ends a response, and the index of the response before which it does not. text: of one token, "" is EOS."""
    ids = enc.encode_ordinary(text) if text else [enc.n_vocab - 1]
    check(len(ids) == 1, f"ppo.stop_token {text!r} is {len(ids)} tokens of this vocabulary, it must be one")
    check(after < R, f"ppo.truncate_after must be below the {R} tokens of a response")
    return ids[0], after


def truncate(tokens, query_lengths, R, stop, after):
    """A response ends with its first `stop` at index `after` or later; stops before that do not count. (Ziegler's code)

    tokens [B, T] with R sampled tokens behind each query -> tokens [B, T], 0 behind the end; lengths [B]; ended [B]"""
    columns = torch.arange(tokens.shape[1], device=tokens.device)
    index = columns - query_lengths[:, None]  # within the response
    stops = (tokens == stop) & (index >= after) & (index < R)
    ended = stops.any(1)
    lengths = torch.where(ended, stops.long().argmax(1) + 1, query_lengths + R)
    return torch.where(columns < lengths[:, None], tokens, 0), lengths, ended


def sample(policy, tokens, query_lengths, R, temperature, stop, generator, n=1):
    """n responses to each query in a row, at most R tokens, ended by the rule. stop: of stop_rule, None is EOS wherever it stands.

    -> tokens [B·n, T], lengths [B·n], ended [B·n], the sampler's own log-probabilities [B·n, R]"""
    stop, after = stop or (policy.config.eos, 0)
    tokens, _, logprobs = policy.generate(tokens, query_lengths, R, temperature, None if after else stop, generator, n)
    return *truncate(tokens, query_lengths.repeat_interleave(n), R, stop, after), logprobs


# ---------------------------------------------------------------------------------------------------------------------
# training a language model on (query, response) rows: pretraining and supervised fine-tuning

def encode_posts(enc, posts, Q, R, stop=None):
    """-> queries, responses: lists of token ids; the response is the author's summary."""
    return [encode_query(enc, p, Q) for p in posts], [encode_response(enc, p["summary"], R, p.get("task", "tldr"), stop) for p in posts]


def split_rows(folder, split, enc, most, R):
    """Tokens of a split of the run in `folder`: query, response, query, ...; encoded once, mapped from there afterwards."""
    file = os.path.join(folder, "data", split + ".jsonl")
    return store_rows(os.path.join(folder, "tokens"), [file], enc, ["posts", most, R],
                      post_rows(file, enc, most, R, need_summary=split != "prompts"))


def run_text(run):
    """The run's text in rows of Q + R tokens: TokenRows to train on, TokenRows to test on; None where it has none."""
    if run.config.get("text"):
        rows = stored_text(os.path.join(run.folder, "tokens"), run.config["text"], run.enc, run.Q + run.R)
        return [rows.take(part) for part in held_out_text(rows, run.enc)]


def stored_posts(run, split):
    """encode_posts of a split as TokenRows. What is pretrained on holds the run's text too: rows of it, as queries of one token and
    responses of all others. -> queries, responses"""
    rows = split_rows(run.folder, split, run.enc, run.config["settings"]["model"]["max_query"], run.R)
    text = run_text(run) if split == "pretrain" else None
    if text:
        files = [file for path in run.config["text"] for file in text_files(path)]
        both = itertools.chain(rows, (part for row in text[0] if len(row) > 1 for part in (row[:1], row[1:])))
        rows = store_rows(os.path.join(run.folder, "tokens"), [os.path.join(run.folder, "data", "pretrain.jsonl"), *files], run.enc,
                          ["posts and text, by bytes", run.Q, run.R], both)
    return rows.columns(2)


def sft_posts(run, s):
    """What fine-tuning trains on: its own posts, and as many of pretraining's that they are the share s.mix of all. (InstructGPT C.3)"""
    return run.posts["sft"] + run.posts["pretrain"][:round(len(run.posts["sft"]) * s.mix / (1 - s.mix))]


def sft_rows(run, s):
    """sft_posts as rows: those of large sets, which mix nothing in, are stored."""
    return encode_posts(run.enc, sft_posts(run, s), run.Q, run.R) if s.mix else stored_posts(run, "sft")


def row_loss(model, queries, responses, query_weight):
    """lm_loss over query ⧺ response: a response token counts 1, a query token query_weight."""
    tokens, lengths = pad_rows([q + r for q, r in zip(queries, responses)], model.device)
    query_lengths = torch.tensor([len(q) for q in queries], device=model.device)
    first = torch.ones_like(query_lengths) if query_weight else query_lengths  # the first column to be predicted
    h, targets, mask = model.response_hidden(tokens, first, lengths, int((lengths - first).max()))
    in_query = torch.arange(mask.shape[1], device=model.device) < (query_lengths - first)[:, None]
    return weighted_mean(-model.log_pi(h, targets), torch.where(in_query, query_weight, 1.0)[mask])  # without all logits at once


def backward_rows(model, queries, responses, query_weight, micro=0, scale=1.0):
    """The gradient of scale · row_loss over all rows, `micro` at a time: each part counts by its tokens. -> the loss, not scaled"""
    tokens = [len(r) + query_weight * (len(q) - 1) for q, r in zip(queries, responses)]

    def loss(part):
        value = row_loss(model, queries[part], responses[part], query_weight) * (sum(tokens[part]) / sum(tokens))
        return scale * value, value.detach()

    return sum(value.item() for value in backward_parts(model, loss, len(queries), micro))  # not before: a GPU would be waited for


@torch.no_grad()
def evaluate_lm(model, queries, responses, query_weight=0.0, batch=64):
    """Mean of -log π per token, in nats; a response token counts 1, a query token query_weight."""
    total, count = 0.0, 0
    for i in range(0, len(queries), batch):
        part = queries[i:i + batch], responses[i:i + batch]
        n = sum(len(r) + query_weight * (len(q) - 1) for q, r in zip(*part))
        total += n * row_loss(model, *part, query_weight).item()
        count += n
    return total / count


@contextmanager
def dropout(model, p, seed):
    """Residual dropout p within, 0 behind: it is off wherever log-probabilities are compared. The masks come from the seed alone."""
    if p:
        torch.manual_seed(seed)
    for block in model.blocks:
        block.dropout = p
    try:
        yield
    finally:
        for block in model.blocks:
            block.dropout = 0.0


def epoch_folder(folder, epoch):
    return os.path.join(folder, f"epoch-{epoch}")


def epoch_losses(folder):
    """{epoch: held-out loss} of a training that kept its epochs."""
    return {row["epoch"]: row["valid_loss"] for row in read_metrics(folder) if "epoch" in row}


def train_lm(model, train, valid, settings, folder, seed, save_every=50, name="sft"):
    """Train on rows (queries, responses); writes state.pt and metrics.jsonl while it goes, the model at its end.

    With choose = loss or reward every epoch's model is kept in epoch-N/, and the one with the lowest held-out loss is the result: for
    reward until there is a reward model to choose (run.py)."""
    s, model.recompute = settings, settings.recompute
    queries, responses = train
    plan = batches(len(queries), s.batch, s.epochs, seed, [len(q) + len(r) for q, r in zip(queries, responses)])
    per_epoch = len(plan) // max(1, s.epochs)
    optimizer, generator = make_optimizer([model], s.lr, s.weight_decay), torch.Generator().manual_seed(seed)
    start, _ = load_state(folder, [model], optimizer, generator)
    log = MetricsLog(folder, start)
    for step in tqdm(range(start, len(plan)), initial=start, total=len(plan), desc=name, unit="step"):
        set_lr(optimizer, s.lr * cosine(step, len(plan), s.warmup, s.final_lr))
        rows = plan[step]
        optimizer.zero_grad(set_to_none=True)
        with dropout(model, s.dropout, seed * 10**6 + step):  # the backward pass may compute the forward again
            loss = backward_rows(model, [queries[i] for i in rows], [responses[i] for i in rows], s.query_weight, s.micro)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        kept = {}
        if s.choose != "last" and (step + 1) % per_epoch == 0:
            kept = {"epoch": (step + 1) // per_epoch, "valid_loss": evaluate_lm(model, *valid)}
            model.save_pretrained(epoch_folder(folder, kept["epoch"]))
        log.write(step, loss=loss, grad_norm=norm.item(), lr=optimizer.param_groups[0]["lr"], **kept)
        if (step + 1) % save_every == 0 and step + 1 < len(plan):
            save_state(folder, step + 1, [model], optimizer, generator)
    if s.choose != "last":
        losses = epoch_losses(folder)
        best = load_model(epoch_folder(folder, min(losses, key=losses.get)), model.device.type)
        model.load_state_dict(best.state_dict())
    valid_loss = evaluate_lm(model, *valid)
    log.write(len(plan), valid_loss=valid_loss)
    save_state(folder, len(plan), [model], optimizer, generator)
    model.save_pretrained(folder)
    return valid_loss


def main():
    run, settings, out, device = alone(__doc__, "sft", SFTSettings, lambda run, s: check(
        s.choose != "reward", "choose reward takes a whole run of run.py; alone there are last and loss"))
    loss = train_lm(load_model(os.path.join(run.folder, "pretrained"), device), sft_rows(run, settings),
                    encode_posts(run.enc, run.posts["valid"], run.Q, run.R), settings, out, run.seed)
    print(f"held-out loss {loss:.3f} nats per summary token; model in {out}")


if __name__ == "__main__":
    run_main(main)
