"""
Reward model: a scalar for a summary, learned from comparisons; and the collection of those comparisons.

References: Stiennon 2020 §3.3-3.4 and appendices B.1, C; Ziegler 2019 §2; InstructGPT 2022 §3.5.

    python reward.py out/tiny-seed1 --out out/tiny-seed1/reward-again --lr 3e-4

    r(x, y) = w·h(last token of y) + b      from the SFT model's trunk and a new linear head
    loss    = -E log σ(r(x, y_w) - r(x, y_l))      or Ziegler's over the best of K, or InstructGPT's over a ranking of K

All comparisons of a post go into one step and each of its summaries through the model once (InstructGPT §3.5), so six
labels on four summaries cost four forward passes, not twelve. After training, b is set so that the reference summaries
score 0 on average (Stiennon §3.4): a positive score then means "better than what the author wrote".
"""
import itertools
import os
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import world
from corpus import parallel, store_rows
from data import EOS, TASKS, DataError, decode_response, encode_query, encode_response, load_comparisons, pad_rows, post_key
from sft import (MetricsLog, alone, batches, check, cosine, encode_posts, load_model, load_state, make_optimizer, run_main, sample,
                 save_state, set_lr)


@dataclass
class RewardSettings:
    lr: float = 5e-4  # peak learning rate
    batch: int = 8  # posts per step, with all their comparisons
    epochs: int = 1  # passes over the comparisons; the papers take one
    warmup: int = 20  # steps of linear warm-up
    final_lr: float = 0.1  # the cosine ends at this share of the peak
    weight_decay: float = 0.01  # on matrices and embeddings
    micro: int = 0  # posts per forward and backward pass, 0: the whole batch; the same gradient in less memory
    recompute: bool = False  # compute activations again in the backward pass: less memory, more time
    loss: str = "pairwise"  # pairwise (Stiennon), best_of (Ziegler: needs choices of the best) or kwise (InstructGPT: needs rankings)
    group: bool = True  # a post's comparisons share a step; false shuffles them over the epoch (InstructGPT §3.5: that overfits)
    normalise: str = "reference"  # reference: references score 0 (Stiennon); gain_bias: policy samples have mean 0, variance 1 (Ziegler)

    def validate(self):
        check(self.lr > 0 and self.batch > 0 and self.epochs > 0, "lr, batch and epochs must be above 0")
        check(self.warmup >= 0 and self.weight_decay >= 0 and self.micro >= 0, "warmup, weight_decay and micro must not be negative")
        check(0 <= self.final_lr <= 1, "final_lr must lie between 0 and 1")
        check(self.loss in ("pairwise", "best_of", "kwise"), "loss must be pairwise, best_of or kwise")
        check(self.normalise in ("reference", "gain_bias"), "normalise must be reference or gain_bias")
        check(self.group or self.loss == "pairwise", "group can be false with the pairwise loss only: the others are over all of a post")


@dataclass
class CollectSettings:
    posts: int = 1500  # posts whose summaries are compared for training
    pairs: int = 10  # comparisons per post, drawn from all pairs of its summaries
    held_out_posts: int = 500  # posts for testing the reward model
    rounds: int = 1  # 1: all labels are on the first policies' samples (offline); more: the posts are dealt out over rounds (batched)
    online: bool = False  # later rounds go on with PPO where the last one paused (Ziegler); false: each begins anew from SFT (Stiennon)
    labels: str = "pairs"  # what labelers give: pairs (Stiennon), best_of (Ziegler) or rank (InstructGPT); the last two see samples only
    k: int = 4  # samples per post; with pairs the author's reference comes on top (Ziegler 4, InstructGPT 4 to 9)
    k_min: int = 0  # a labeler is shown k_min to k of them, drawn for each post; 0: all k
    tie: float = 0.0  # key facts: summaries that a labeler sees within about so much of each other share a rank
    noise: float = 0.95  # the labelers' temperature, in key facts: what 78 % agreement with the gold judge needs
    length_bias: float = 0.0  # key facts that a summary of e times the words is worth to the labelers
    copy_bias: float = 0.0  # key facts that a summary copied whole from the post is worth to them
    flipped: bool = False  # the labelers choose the worse one (the bug of Ziegler's blog post)

    def validate(self):
        check(self.posts > 0 and self.pairs > 0 and self.held_out_posts > 0, "posts, pairs and held_out_posts must be above 0")
        check(self.noise > 0 and self.tie >= 0, "noise must be above 0 and tie not negative")
        check(self.labels in ("pairs", "best_of", "rank"), "labels must be pairs, best_of or rank")
        check(self.tie == 0 or self.labels == "rank", "tie must be 0 where labels is not rank: only in rankings do summaries share a rank")
        check(self.k >= 2, "k must be at least 2: one sample cannot be compared")
        check(self.k_min == 0 or 2 <= self.k_min <= self.k, "k_min must be 0 or lie between 2 and k")
        check(1 <= self.rounds <= min(self.posts, self.held_out_posts), "rounds must be between 1 and posts and held_out_posts")
        check(self.rounds > 1 or not self.online, "online needs rounds above 1: how many reward models there are while PPO runs")


# ---------------------------------------------------------------------------------------------------------------------
# the losses

def pairwise_loss(chosen, rejected):
    """-E log σ(r_w - r_l). chosen, rejected [B] -> scalar. (Stiennon §3.4; the paper prints it without the minus.)"""
    return -F.logsigmoid(chosen - rejected).mean()


def best_of_loss(scores, best):
    """-E log(e^r_best / Σ_i e^r_i). scores [B, K], -inf where a query has fewer than K responses; best [B] their index -> scalar.
    (Ziegler eq. 1, K = 4; the paper prints it without the minus.)"""
    return F.cross_entropy(scores, best)


def kwise_loss(scores, ranks):
    """-E over prompts of the mean over pairs, rank_w < rank_l, of log σ(r_w - r_l).  (InstructGPT eq. 1)

    scores, ranks [B, K] -> scalar; a lower rank is better. Ties are dropped, and so are prompts where all is tied: the mean runs over
    the pairs kept, where the paper leaves open whether it divides by them or by K(K-1)/2. A rank of NaN says that this prompt has
    fewer than K responses (every comparison with NaN is false); what the score is there does not matter."""
    better = ranks[:, :, None] < ranks[:, None, :]  # [B, K, K] the first of the pair over the second
    margin = torch.where(better, scores[:, :, None] - scores[:, None, :], 0)
    pairs = better.sum((1, 2))
    per_prompt = torch.where(better, -F.logsigmoid(margin), 0).sum((1, 2)) / pairs.clamp(min=1)
    return per_prompt.sum() / (pairs > 0).sum().clamp(min=1)


# ---------------------------------------------------------------------------------------------------------------------
# collecting comparisons

@torch.no_grad()
def sample_responses(policy, queries, R, temperature, generator, n=1, batch=384, stop=None):
    """Lists of response ids, n per query in a row; queries are sorted by length for speed, the order is kept. stop: as in sample()."""
    out = [None] * (len(queries) * n)
    order = sorted(range(len(queries)), key=lambda i: len(queries[i]))
    size = max(1, batch // n)
    for i in tqdm(range(0, len(order), size), desc="sampling", unit="batch", leave=False):
        rows = order[i:i + size]
        tokens, lengths = pad_rows([queries[j] for j in rows], policy.device)
        tokens, ends, _, _ = sample(policy, tokens, lengths, R, temperature, stop, generator, n)
        tokens, ends = tokens.tolist(), ends.tolist()
        for k, j in enumerate(rows):
            for s in range(n):
                out[j * n + s] = tokens[k * n + s][len(queries[j]):ends[k * n + s]]
    return out


def ask_pairs(labeler, post, candidates, pairs, rng):
    """Random pairs of (policy, text) -> (first, second, choice, confidence, worker) of each."""
    every = [(i, j) for i in range(len(candidates)) for j in range(i)]
    for i, j in rng.sample(every, min(pairs, len(every))):
        if rng.random() < .5:
            i, j = j, i
        a, b = candidates[i], candidates[j]
        if a[1] != b[1] and a[1] and b[1]:
            yield a, b, *labeler.compare(post, a[1], b[1])


def ask_all(labeler, post, candidates, labels, rng):
    """One ranking of all different (policy, text), or one choice of the best -> its pairs, as ask_pairs gives them; ties are left out."""
    candidates = list({text: (name, text) for name, text in candidates if text}.values())
    texts = [text for _, text in candidates]
    if len(texts) < 2:
        return
    if labels == "rank":
        ranks, worker = labeler.rank(post, texts)
    else:
        best, worker = labeler.best_of(post, texts)
        ranks = [int(i != best) for i in range(len(texts))]
    for i, j in itertools.combinations(range(len(texts)), 2):
        if rng.random() < .5:
            i, j = j, i
        if ranks[i] != ranks[j]:
            yield candidates[i], candidates[j], int(ranks[j] < ranks[i]), None, worker


def collect(enc, posts, policies, labeler, pairs, Q, R, generator, rng, split="train", labels="pairs", stop=None, k_min=0,
            batch="round-1"):
    """Sample summaries of each post, ask the labeler about them, return comparisons in OpenAI's format.

    policies: list of (name, model, temperature, samples per post); with labels = "pairs" the author's reference takes part too.
    A ranking or a choice of the best is written as the pairs that it implies, in the same format: whatever reads comparisons reads
    them, and nothing is lost, since the rank of a summary is the number of comparisons that it lost (see ranks_of). So a post is
    ranked once; ties have no row. Of a task whose texts go on, samples without an end are not shown, as in Ziegler's
    collection, whose own files hold GPT-2's token ids, which mean nothing to another vocabulary."""
    queries = [encode_query(enc, post, Q) for post in posts]
    texts = [[("ref", post["summary"])] for post in posts]
    for name, model, temperature, n in policies:
        samples = sample_responses(model, queries, R, temperature, generator, n, stop=stop)
        for i, ids in enumerate(samples):
            if TASKS[posts[i // n].get("task", "tldr")].stop == EOS or ids[-1] == stop[0] and len(ids) > stop[1]:
                texts[i // n].append((name, decode_response(enc, ids)))
    comparisons = []
    for post, candidates in tqdm(zip(posts, texts), desc="labelling", unit="post", total=len(posts), leave=False, delay=2):
        if k_min and len(candidates) > k_min:
            candidates = candidates[:1] + rng.sample(candidates[1:], rng.randint(k_min, len(candidates) - 1))
        answers = (ask_pairs(labeler, post, candidates, pairs, rng) if labels == "pairs" else
                   ask_all(labeler, post, candidates[1:], labels, rng))
        for a, b, choice, confidence, worker in answers:
            comparisons.append({
                "info": {key: post[key] for key in ("id", "task", "subreddit", "title", "post", "facts") if key in post},
                "summaries": [{"text": " " + t, "policy": name} for name, t in (a, b)], "choice": choice,
                "worker": worker, "batch": batch, "split": split, "extra": {"confidence": confidence}})
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
    if not between:
        return None
    return {"with_judge": float(np.mean(with_judge)), "between_labelers": float(np.mean(between)), "pairs": len(between)}


# ---------------------------------------------------------------------------------------------------------------------
# training

def group_texts(comparisons):
    """Comparisons -> one entry per post: {query: the post, responses: [text], pairs: [(better, worse)], index: [comparison]}.
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
        groups.append({"query": comparisons[members[0]]["info"], "responses": list(texts), "pairs": pairs, "index": members})
    return groups


def encode_group(enc, group, Q, R, stop=None):
    """-> ids of the query, ids of each response"""
    info = group["query"]
    return [encode_query(enc, info, Q)] + [encode_response(enc, text, R, info.get("task", "tldr"), stop) for text in group["responses"]]


def group_by_post(enc, comparisons, Q, R, stop=None):
    """group_texts with token ids in place of the texts."""
    groups = []
    for group in group_texts(comparisons):
        query, *responses = encode_group(enc, group, Q, R, stop)
        groups.append({**group, "query": query, "responses": responses})
    return groups


class StoredGroups:
    """group_by_post of a file of comparisons: encoded once into `folder`, mapped from there afterwards; an entry is read when it is asked
    for. take(indices) is such a list again."""

    def __init__(self, groups, rows, starts):
        self.groups, self.rows, self.starts = groups, rows, starts

    @classmethod
    def of(cls, folder, path, enc, comparisons, Q, R, stop=None):
        groups = group_texts(comparisons)
        rows = itertools.chain.from_iterable(parallel(lambda group: encode_group(enc, group, Q, R, stop), groups, 1024))
        starts = [0, *itertools.accumulate(1 + len(g["responses"]) for g in groups)][:-1]
        return cls(groups, store_rows(folder, [path], enc, ["groups", Q, R, stop], rows), starts)

    def __len__(self):
        return len(self.groups)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        query, *responses = self.rows[self.starts[i]:self.starts[i] + 1 + len(self.groups[i]["responses"])]
        return {**self.groups[i], "query": query, "responses": responses}

    def take(self, which):
        return StoredGroups([self.groups[i] for i in which], self.rows, [self.starts[i] for i in which])


def score_responses(model, queries, responses):
    """Scores of several responses to each query. queries: [ids], responses: [[ids, ...], ...] -> [P, n], 0 where a query
    has fewer than n."""
    n = max(map(len, responses))
    query_tokens, query_lengths = pad_rows(queries, model.device)
    tokens, lengths = pad_rows([r for rs in responses for r in rs + [[0]] * (n - len(rs))], model.device)
    scores = model.branch_scores(query_tokens, query_lengths, tokens.view(len(queries), n, -1), lengths.view(-1, n))
    real = torch.tensor([[i < len(rs) for i in range(n)] for rs in responses], device=scores.device)
    return torch.where(real, scores, 0)


def score_pairs(scores, groups):
    """Scores [P, n] of these posts' summaries -> of the better and the worse one of each comparison: chosen [C], rejected [C]"""
    rows, better, worse = zip(*[(i, w, l) for i, g in enumerate(groups) for w, l in g["pairs"]])
    return scores[list(rows), list(better)], scores[list(rows), list(worse)]


def score_groups(model, groups):
    """score_pairs of what the model says."""
    return score_pairs(score_responses(model, [g["query"] for g in groups], [g["responses"] for g in groups]), groups)


def ranks_of(groups):
    """How many comparisons each summary of a post lost: its rank, where they come from one ranking or one choice of the best.
    -> [P, n], NaN where a post has fewer than n."""
    ranks = torch.full((len(groups), max(len(g["responses"]) for g in groups)), float("nan"))
    for rank, g in zip(ranks, groups):
        rank[:len(g["responses"])] = 0
        for _, worse in g["pairs"]:
            rank[worse] += 1
    return ranks


def check_labels(groups, loss):
    """The losses over all of a post need comparisons that come from one ranking; any will do for pairs."""
    for g in groups if loss != "pairwise" else []:
        ranks = ranks_of([g])[0].tolist()
        implied = [(i, j) for i, j in itertools.permutations(range(len(ranks)), 2) if ranks[i] < ranks[j]]
        if sorted(g["pairs"]) != implied or loss == "best_of" and ranks.count(0) != 1:
            raise DataError(f"the {len(g['pairs'])} comparisons of a post are not those of one "
                            f"{'ranking' if loss == 'kwise' else 'choice of the best'} of its {len(ranks)} summaries, which the loss "
                            f"{loss} needs; take reward.loss pairwise")


def group_loss(scores, groups, loss):
    """One of the three losses on the scores [P, n] of these posts' summaries -> scalar"""
    if loss == "pairwise":
        return pairwise_loss(*score_pairs(scores, groups))
    ranks = ranks_of(groups).to(scores.device)
    if loss == "kwise":
        return kwise_loss(scores, ranks)
    return best_of_loss(scores.masked_fill(ranks.isnan(), float("-inf")), (ranks == 0).long().argmax(1))


def ungroup(groups):
    """One entry per comparison: a post's comparisons fall into different steps, and each reads its two summaries anew."""
    return [{"query": g["query"], "responses": [g["responses"][w], g["responses"][l]], "pairs": [(0, 1)]}
            for g in groups for w, l in g["pairs"]]


def split_comparisons(enc, path, Q, R, stop=None):
    """Read comparisons.jsonl -> (groups to train on, groups held out, the comparisons)."""
    comparisons, _ = load_comparisons(path)
    check_sides([c.get("split") for c in comparisons], path)
    groups = StoredGroups.of(os.path.join(os.path.dirname(path), "tokens"), path, enc, comparisons, Q, R, stop)
    train, held_out = (groups.take([i for i, g in enumerate(groups.groups) if comparisons[g["index"][0]].get("split") == split])
                       for split in ("train", "valid"))
    return train, held_out, comparisons


def check_sides(splits, path):
    """Comparisons must be there to train on, and others to measure with."""
    train, held_out = (splits.count(name) for name in ("train", "valid"))
    if not train or not held_out:
        raise DataError(f"{path} leaves {train} comparisons to train on and {held_out} held out, on posts of their own; each side needs one")


def backward_groups(model, part, loss, micro):
    """The gradient of group_loss over these posts, `micro` of them at a time: each counts by what the loss is a mean of, pairs or posts.
    -> the loss, the share of pairs that the model has right"""
    weights = [len(g["pairs"]) if loss == "pairwise" else 1 for g in part]
    size, total, right = micro or len(part), 0.0, 0
    for i in range(0, len(part), size):
        rows = part[i:i + size]
        scores = score_responses(model, [g["query"] for g in rows], [g["responses"] for g in rows])
        value = group_loss(scores, rows, loss) * (sum(weights[i:i + size]) / sum(weights))
        value.backward()
        chosen, rejected = score_pairs(scores.detach(), rows)
        total, right = total + value.item(), right + (chosen > rejected).sum().item()
    return total, right / sum(len(g["pairs"]) for g in part)


def train_reward(model, groups, rows, settings, folder, seed, save_every=50):
    """Epochs of the loss, then the shift (with gain_bias also the scale) that normalises the scores of rows (queries, responses)."""
    s, model.recompute = settings, settings.recompute
    check_labels(groups, s.loss)
    entries = groups if s.group else ungroup(groups)
    plan = batches(len(entries), max(1, round(s.batch * len(entries) / len(groups))), s.epochs, seed)  # as many comparisons a step
    optimizer, generator = make_optimizer([model], s.lr, s.weight_decay), torch.Generator().manual_seed(seed)
    start, _ = load_state(folder, [model], optimizer, generator)
    if start == 0 and s.normalise == "gain_bias":  # before as well as after (Ziegler): training starts at the scale that it ends on
        normalise(model, *rows, gain=True)
    log = MetricsLog(folder, start)
    for step in tqdm(range(start, len(plan)), initial=start, total=len(plan), desc="reward", unit="step"):
        set_lr(optimizer, s.lr * cosine(step, len(plan), s.warmup, s.final_lr))
        part = [entries[i] for i in plan[step]]
        optimizer.zero_grad(set_to_none=True)
        loss, accuracy = backward_groups(model, part, s.loss, s.micro)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        log.write(step, loss=loss, accuracy=accuracy, grad_norm=norm.item())
        if (step + 1) % save_every == 0 and step + 1 < len(plan):
            save_state(folder, step + 1, [model], optimizer, generator)
    normalise(model, *rows, gain=s.normalise == "gain_bias")
    save_state(folder, len(plan), [model], optimizer, generator)
    model.save_pretrained(folder)


@torch.no_grad()
def normalise(model, queries, responses, gain):
    """r ← g·r + c so that these responses score 0 on average and, with gain, have variance 1 (biased). (Stiennon §3.4; Ziegler §2)

    The gain goes into the head's weights and the shift into its bias: both train on from there, where Ziegler's code keeps two more
    variables that say the same."""
    scores = score_all(model, queries, responses)
    if gain:
        if not scores.max() > scores.min():
            raise DataError("the reward model gives all of the policy's samples the same score; no gain makes their variance 1")
        spread = scores.std(unbiased=False)
        model.score.weight /= spread
        model.score.bias /= spread
        scores /= spread
    model.score.bias -= scores.mean()


def normalising_rows(run, settings, device):
    """queries, responses whose scores train_reward normalises: references or, for gain_bias, the policy's samples of the same posts."""
    queries, responses = encode_posts(run.enc, run.posts["sft"][:500], run.Q, run.R, run.stop)
    if settings.normalise == "gain_bias":
        policy, temperature = load_model(os.path.join(run.folder, "sft"), device), run.config["settings"]["ppo"]["temperature"]
        responses = sample_responses(policy, queries, run.R, temperature, torch.Generator().manual_seed(run.seed), stop=run.stop)
    return queries, responses


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
    def groups(run):
        return split_comparisons(run.enc, os.path.join(run.folder, "comparisons.jsonl"), run.Q, run.R, run.stop)
    run, settings, out, device = alone(__doc__, "reward", RewardSettings, lambda run, s: check_labels(groups(run)[0], s.loss))
    torch.manual_seed(run.seed)
    model, (train, held_out, _) = load_model(os.path.join(run.folder, "sft"), device, "scalar"), groups(run)
    train_reward(model, train, normalising_rows(run, settings, device), settings, out, run.seed)
    with torch.no_grad():
        right = torch.cat([(chosen > rejected).float() for g in held_out for chosen, rejected in [score_groups(model, [g])]])
    print(f"held-out accuracy {right.mean():.3f} on {len(right)} comparisons; model in {out}")


if __name__ == "__main__":
    run_main(main)
