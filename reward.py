"""
Reward model: a scalar for a summary, learned from comparisons; and the collection of those comparisons.

References: Stiennon 2020 §3.3-3.4 and appendices B.1, C; Ziegler 2019 §2.1; InstructGPT 2022 §3.5.

    python reward.py out/tiny-seed1 --out out/tiny-seed1/reward-again --lr 3e-4

    r(x, y) = w·h(last token of y) + b      from the SFT model's trunk and a new linear head
    loss    = -E log σ(r(x, y_w) - r(x, y_l))

All comparisons of a post go into one step and each of its summaries through the model once (InstructGPT §3.5), so six
labels on four summaries cost four forward passes, not twelve. After training, b is set so that the reference summaries
score 0 on average (Stiennon §3.4): a positive score then means "better than what the author wrote".
"""
import os
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import world
from data import DataError, decode_response, encode_query, encode_response, load_comparisons, pad_rows, post_key
from sft import (MetricsLog, alone, batches, check, cosine, encode_posts, load_model, load_state, make_optimizer, run_main,
                 save_state, set_lr)


@dataclass
class RewardSettings:
    lr: float = 5e-4  # peak learning rate
    batch: int = 8  # posts per step, with all their comparisons
    epochs: int = 1  # passes over the comparisons; the papers take one
    warmup: int = 20  # steps of linear warm-up
    final_lr: float = 0.1  # the cosine ends at this share of the peak
    weight_decay: float = 0.01  # on matrices and embeddings

    def validate(self):
        check(self.lr > 0 and self.batch > 0 and self.epochs > 0, "lr, batch and epochs must be above 0")
        check(self.warmup >= 0 and self.weight_decay >= 0, "warmup and weight_decay must not be negative")
        check(0 <= self.final_lr <= 1, "final_lr must lie between 0 and 1")


@dataclass
class CollectSettings:
    posts: int = 1500  # posts whose summaries are compared for training
    pairs: int = 10  # comparisons per post, drawn from all pairs of its summaries
    held_out_posts: int = 500  # posts for testing the reward model
    noise: float = 0.95  # the labelers' temperature, in key facts: what 77 % agreement with the gold judge needs
    length_bias: float = 0.0  # key facts that a summary of e times the words is worth to the labelers
    copy_bias: float = 0.0  # key facts that a summary copied whole from the post is worth to them
    flipped: bool = False  # the labelers choose the worse one (the bug of Ziegler's blog post)

    def validate(self):
        check(self.posts > 0 and self.pairs > 0 and self.held_out_posts > 0, "posts, pairs and held_out_posts must be above 0")
        check(self.noise > 0, "noise must be above 0")


# ---------------------------------------------------------------------------------------------------------------------
# the loss

def pairwise_loss(chosen, rejected):
    """-E log σ(r_w - r_l). chosen, rejected [B] -> scalar. (Stiennon §3.4; the paper prints it without the minus.)"""
    return -F.logsigmoid(chosen - rejected).mean()


# ---------------------------------------------------------------------------------------------------------------------
# collecting comparisons

@torch.no_grad()
def sample_responses(policy, queries, R, temperature, generator, n=1, batch=384):
    """Lists of response ids, n per query in a row; queries are sorted by length for speed, the order is kept."""
    eos, out = policy.config.eos, [None] * (len(queries) * n)
    order = sorted(range(len(queries)), key=lambda i: len(queries[i]))
    size = max(1, batch // n)
    for i in tqdm(range(0, len(order), size), desc="sampling", unit="batch", leave=False):
        rows = order[i:i + size]
        tokens, lengths = pad_rows([queries[j] for j in rows], policy.device)
        tokens, ends, _ = policy.generate(tokens, lengths, R, temperature, eos, generator, n)
        tokens, ends = tokens.tolist(), ends.tolist()
        for k, j in enumerate(rows):
            for s in range(n):
                out[j * n + s] = tokens[k * n + s][len(queries[j]):ends[k * n + s]]
    return out


def collect(enc, posts, policies, labeler, pairs, Q, R, generator, rng, split="train"):
    """Sample summaries of each post, ask the labeler about pairs of them, return comparisons in OpenAI's format.

    policies: list of (name, model, temperature, samples per post); the author's reference always takes part."""
    queries = [encode_query(enc, post, Q) for post in posts]
    texts = [[("ref", post["summary"])] for post in posts]
    for name, model, temperature, n in policies:
        samples = sample_responses(model, queries, R, temperature, generator, n)
        for i, ids in enumerate(samples):
            texts[i // n].append((name, decode_response(enc, ids)))
    comparisons = []
    for post, candidates in zip(posts, texts):
        every = [(i, j) for i in range(len(candidates)) for j in range(i)]
        for i, j in rng.sample(every, min(pairs, len(every))):
            if rng.random() < .5:
                i, j = j, i
            a, b = candidates[i], candidates[j]
            if a[1] == b[1] or not a[1] or not b[1]:
                continue
            choice, confidence, worker = labeler.compare(post, a[1], b[1])
            comparisons.append({
                "info": {key: post[key] for key in ("id", "subreddit", "title", "post", "facts")},
                "summaries": [{"text": " " + t, "policy": name} for name, t in (a, b)], "choice": choice,
                "worker": worker, "batch": "round-0", "split": split, "extra": {"confidence": confidence}})
    return comparisons


def labeler_agreement(labeler, comparisons, policy="sft-0.5"):
    """How often labelers agree with the gold judge and with each other on pairs of one policy's samples, each pair shown
    twice; pairs that the judge finds equal are left out. (Stiennon appendix C: labelers and researchers agree on 77 %)"""
    with_judge, between = [], []
    for c in comparisons:
        a, b = (s["text"].strip() for s in c["summaries"])
        gold = world.utility(c["info"], a) - world.utility(c["info"], b)
        if gold and all(s["policy"] == policy for s in c["summaries"]):
            first, second = (labeler.compare(c["info"], a, b)[0] for _ in range(2))
            with_judge += [choice == int(gold < 0) for choice in (first, second)]
            between.append(first == second)
    return {"with_judge": float(np.mean(with_judge)), "between_labelers": float(np.mean(between)), "pairs": len(between)} if between else None


# ---------------------------------------------------------------------------------------------------------------------
# training

def group_by_post(enc, comparisons, Q, R):
    """Comparisons -> one entry per post: {query: ids, responses: [ids], pairs: [(better, worse)], index: [comparison]}.
    Each distinct summary of a post becomes one response."""
    posts = defaultdict(list)
    for i, c in enumerate(comparisons):
        posts[post_key(c["info"])].append(i)
    groups = []
    for members in posts.values():
        texts, pairs = {}, []
        for i in members:
            c = comparisons[i]
            a, b = (texts.setdefault(s["text"].strip(), len(texts)) for s in c["summaries"])
            pairs.append((a, b) if c["choice"] == 0 else (b, a))
        groups.append({"query": encode_query(enc, comparisons[members[0]]["info"], Q), "pairs": pairs, "index": members,
                       "responses": [encode_response(enc, text, R) for text in texts]})
    return groups


def score_responses(model, queries, responses):
    """Scores of several responses to each query. queries: [ids], responses: [[ids, ...], ...] -> [P, n], 0 where a query
    has fewer than n."""
    n = max(map(len, responses))
    query_tokens, query_lengths = pad_rows(queries, model.device)
    tokens, lengths = pad_rows([r for rs in responses for r in rs + [[0]] * (n - len(rs))], model.device)
    scores = model.branch_scores(query_tokens, query_lengths, tokens.view(len(queries), n, -1), lengths.view(-1, n))
    real = torch.tensor([[i < len(rs) for i in range(n)] for rs in responses], device=scores.device)
    return torch.where(real, scores, 0)


def score_groups(model, groups):
    """Scores of the better and the worse summary of each comparison of these posts. -> chosen [C], rejected [C]"""
    scores = score_responses(model, [g["query"] for g in groups], [g["responses"] for g in groups])
    rows, better, worse = zip(*[(i, w, l) for i, g in enumerate(groups) for w, l in g["pairs"]])
    return scores[list(rows), list(better)], scores[list(rows), list(worse)]


def split_comparisons(enc, path, Q, R):
    """Read comparisons.jsonl -> (groups to train on, groups held out, the comparisons)."""
    comparisons, _ = load_comparisons(path)
    groups = group_by_post(enc, comparisons, Q, R)
    train, held_out = ([g for g in groups if comparisons[g["index"][0]].get("split") == split] for split in ("train", "valid"))
    if not train or not held_out:
        raise DataError(f"{path} leaves {len(train)} posts to train on and {len(held_out)} held out; each side needs one")
    return train, held_out, comparisons


def train_reward(model, groups, references, settings, folder, seed, save_every=50):
    """One epoch of pairwise loss, then the shift that makes references (queries, responses) score 0 on average."""
    s = settings
    plan = batches(len(groups), s.batch, s.epochs, seed)
    optimizer, generator = make_optimizer([model], s.lr, s.weight_decay), torch.Generator().manual_seed(seed)
    start, _ = load_state(folder, [model], optimizer, generator)
    log = MetricsLog(folder, start)
    for step in tqdm(range(start, len(plan)), initial=start, total=len(plan), desc="reward", unit="step"):
        set_lr(optimizer, s.lr * cosine(step, len(plan), s.warmup, s.final_lr))
        chosen, rejected = score_groups(model, [groups[i] for i in plan[step]])
        loss = pairwise_loss(chosen, rejected)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        log.write(step, loss=loss.item(), accuracy=(chosen > rejected).float().mean().item(), grad_norm=norm.item())
        if (step + 1) % save_every == 0 and step + 1 < len(plan):
            save_state(folder, step + 1, [model], optimizer, generator)
    with torch.no_grad():
        model.score.bias -= score_all(model, *references).mean()
    save_state(folder, len(plan), [model], optimizer, generator)
    model.save_pretrained(folder)


@torch.no_grad()
def score_all(model, queries, responses, n=1, batch=256):
    """Scores of n responses to each query, which stand in a row in `responses`. -> [len(queries), n] on the CPU"""
    out, step = torch.zeros(len(queries), n), max(1, batch // n)
    order = sorted(range(len(queries)), key=lambda i: len(queries[i]))
    for i in tqdm(range(0, len(order), step), desc="scoring", unit="batch", leave=False):
        take = order[i:i + step]
        out[take] = score_responses(model, [queries[j] for j in take], [responses[j * n:(j + 1) * n] for j in take]).cpu()
    return out


def main():
    run, settings, out, device = alone(__doc__, "reward", RewardSettings)
    torch.manual_seed(run.seed)
    model = load_model(os.path.join(run.folder, "sft"), device, "scalar")
    train, held_out, _ = split_comparisons(run.enc, os.path.join(run.folder, "comparisons.jsonl"), run.Q, run.R)
    train_reward(model, train, encode_posts(run.enc, run.posts["sft"][:500], run.Q, run.R), settings, out, run.seed)
    with torch.no_grad():
        right = torch.cat([(chosen > rejected).float() for g in held_out for chosen, rejected in [score_groups(model, [g])]])
    print(f"held-out accuracy {right.mean():.3f} on {len(right)} comparisons; model in {out}")


if __name__ == "__main__":
    run_main(main)
