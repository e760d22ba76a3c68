"""
Every measurement of the papers' result sections that the pipeline makes, and its figures.

References: Stiennon 2020 §4, appendices F and G; Ziegler 2019 §3; InstructGPT 2022 §4.

    python evaluation.py out/tiny-seed1        # measures again from the saved samples; no model is run

Measuring is apart from sampling (sample_policies, the only part that runs models) and from drawing (draw_*).
Every rate comes with its number of posts and a 95 % bootstrap interval over posts.
"""
import argparse
import csv
import json
import math
import os
import re
from collections import defaultdict

import numpy as np
import torch
from tqdm import tqdm

import world
from data import DataError, decode_response, encode_query, encode_response, pad_rows, post_key, save_json_lines, write_atomic
from ppo import compare_policies, kl_estimates
from reward import sample_responses, score_groups, score_rows
from sft import read_metrics

POLICIES = ["reference", "lead3", "pretrained", "sft", "best_of_n", "ppo"]


# ---------------------------------------------------------------------------------------------------------------------
# statistics

def bootstrap_ci(values, clusters=None, draws=2000, seed=0):
    """95 % percentile interval of the mean. clusters: what to draw as a whole (comparisons of one post hang together)."""
    values = np.asarray(values, float)
    if clusters is None:
        sums, sizes = values, np.ones(len(values))
    else:
        names, index = np.unique(np.asarray(clusters), return_inverse=True)
        sums, sizes = np.bincount(index, values, len(names)), np.bincount(index, minlength=len(names))
    draw = np.random.default_rng(seed).integers(0, len(sums), (draws, len(sums)))
    means = sums[draw].sum(1) / sizes[draw].sum(1)
    return [float(x) for x in np.percentile(means, [2.5, 97.5])]


def wins(a, b):
    """1 where a > b, 0 where a < b, ½ for a tie."""
    a, b = np.asarray(a, float), np.asarray(b, float)
    return (a > b) + 0.5 * (a == b)


def length_controlled_win_rate(wins, log_length_ratio):
    """σ(w) of the logistic fit P(win) = σ(w + c·log(length / reference length)): the win rate at equal length.

    wins in [0, 1] (½ for ties), both [N]. (Stiennon appendix F.) A ridge of 1e-3 keeps separable data finite."""
    y, x = np.asarray(wins, float), np.asarray(log_length_ratio, float)
    X, theta = np.stack([np.ones_like(x), x], 1), np.zeros(2)
    for _ in range(50):  # Newton's method
        p = 1 / (1 + np.exp(-X @ theta))
        gradient = X.T @ (y - p) - 1e-3 * theta
        theta = theta + np.linalg.solve((X * (p * (1 - p))[:, None]).T @ X + 1e-3 * np.eye(2), gradient)
    return float(1 / (1 + np.exp(-theta[0])))


def best_of_n_kl(n):
    """KL(best of n ‖ the policy) = log n - (n - 1) / n, an upper bound where scores tie. (Stiennon G.3)"""
    return math.log(n) - (n - 1) / n


def best_of_n_estimate(proxy, gold, n):
    """Unbiased estimate of E[gold of the best of n by proxy] from M >= n samples, proxy and gold [M]. (WebGPT)

    Sorted by proxy, sample i (1-based) is the best of a random n-subset with probability C(i-1, n-1) / C(M, n)."""
    gold = np.asarray(gold, float)[np.argsort(np.asarray(proxy, float), kind="stable")]
    M = len(gold)
    return float(sum(math.comb(i - 1, n - 1) / math.comb(M, n) * gold[i - 1] for i in range(n, M + 1)))


def elo(winners, losers):
    """Bradley-Terry ratings on the Elo scale from a list of games. -> {player: rating}, mean 1000

    Maximum likelihood by the minorize-maximize iteration; players need a path of wins in both directions."""
    players = sorted(set(winners) | set(losers))
    index = {p: i for i, p in enumerate(players)}
    beat = np.zeros((len(players), len(players)))
    for w, l in zip(winners, losers):
        beat[index[w], index[l]] += 1
    games, strength = beat + beat.T, np.ones(len(players))
    for _ in range(10000):
        new = beat.sum(1) / (games / (strength[:, None] + strength)).sum(1)
        new /= np.exp(np.log(np.maximum(new, 1e-300)).mean())
        if np.abs(np.log(np.maximum(new, 1e-300) / strength)).max() < 1e-10:
            break
        strength = np.maximum(new, 1e-300)
    ratings = 400 * np.log10(strength)
    return {p: float(1000 + r) for p, r in zip(players, ratings)}


# ---------------------------------------------------------------------------------------------------------------------
# properties of texts

def lead3(post):
    """The first three sentences of the post: the baseline that is hard to beat."""
    return " ".join(s for s in re.split(r"(?<=[.!?])\s+", post["post"].strip())[:3])


def copy_fraction(summary, source):
    """Longest common subsequence of the whitespace-word bigrams over the summary's bigrams. (Stiennon footnote 9)"""
    a, b = ([tuple(pair) for pair in zip(t.split(), t.split()[1:])] for t in (summary, source))
    if not a:
        return 0.0
    row = [0] * (len(b) + 1)
    for x in a:
        diagonal = 0
        for j, y in enumerate(b):
            diagonal, row[j + 1] = row[j + 1], (diagonal + 1 if x == y else max(row[j], row[j + 1]))
    return row[-1] / len(a)


def sentence_novelty(summary, source):
    """Share of the summary's sentences that do not stand in the source, blanks and case apart. (Ziegler, table of copying)"""
    def flat(text):
        return " ".join(text.lower().split())
    sentences = [flat(s) for s in re.split(r"(?<=[.!?])\s+", summary.strip()) if s.strip()]
    return sum(s not in flat(source) for s in sentences) / max(1, len(sentences))


# ---------------------------------------------------------------------------------------------------------------------
# the reward model against held-out comparisons

@torch.no_grad()
def reward_margins(model, groups, comparisons):
    """One row per held-out comparison: margin r_chosen - r_rejected, confidence, post, and what the baselines say."""
    rows = []
    for i in tqdm(range(0, len(groups), 16), desc="reward model", unit="batch", leave=False):
        part = groups[i:i + 16]
        chosen, rejected = score_groups(model, part)
        for j, margin in zip((j for g in part for j in g["index"]), (chosen - rejected).tolist()):
            c = comparisons[j]
            better, worse = (c["summaries"][k]["text"].strip() for k in (c["choice"], 1 - c["choice"]))
            row = {"margin": margin, "confidence": c["extra"]["confidence"], "post": post_key(c["info"]),
                   "longer_wins": float(wins(len(better.split()), len(worse.split()))), "gold_agrees": None}
            if "facts" in c["info"]:
                row["gold_agrees"] = float(wins(world.utility(c["info"], better), world.utility(c["info"], worse)))
            rows.append(row)
    return rows


def measure_reward(rows):
    """Accuracy, its ceiling and its baseline; accuracy by labeler confidence; calibration. rows: of reward_margins."""
    margin, posts = np.array([r["margin"] for r in rows]), [r["post"] for r in rows]
    right, longer = wins(margin, 0 * margin), np.array([r["longer_wins"] for r in rows])
    out = {"accuracy": float(right.mean()), "accuracy_ci": bootstrap_ci(right, posts), "n": len(rows),
           "longer_wins": float(longer.mean()), "longer_wins_ci": bootstrap_ci(longer, posts),
           "labeler_ceiling": None, "gap_to_ceiling": None, "gap_to_ceiling_ci": None}
    if all(r["gold_agrees"] is not None for r in rows):
        gold = np.array([r["gold_agrees"] for r in rows])
        out |= {"labeler_ceiling": float(gold.mean()), "gap_to_ceiling": float((gold - right).mean()),
                "gap_to_ceiling_ci": bootstrap_ci(gold - right, posts)}
    by_confidence = defaultdict(list)
    for r, ok in zip(rows, right):
        by_confidence[r["confidence"]].append(ok)
    out["by_confidence"] = [{"confidence": c, "accuracy": float(np.mean(ok)), "n": len(ok)}
                            for c, ok in sorted(by_confidence.items(), key=lambda kv: (kv[0] is None, kv[0]))]
    # calibration: of the summary that the model prefers, how often does it say so, how often is it so?
    predicted, edges = 1 / (1 + np.exp(-np.abs(margin))), np.linspace(.5, 1, 11)
    which = np.clip(np.digitize(predicted, edges) - 1, 0, 9)
    out["calibration"] = [{"predicted": float(predicted[which == b].mean()), "observed": float(right[which == b].mean()),
                           "n": int((which == b).sum())} for b in range(10) if (which == b).any()]
    return out


# ---------------------------------------------------------------------------------------------------------------------
# the policies against the references

def sample_policies(enc, posts, models, reward_model, Q, R, temperature, best_of, generator):
    """Every policy's summary of every post, with all that measuring needs. models: {"pretrained", "sft", "ppo"}.

    -> one row per post: {"post": ..., "policies": {name: {"text", "length", "eos", "score", "kl"}}}"""
    queries, rows = [encode_query(enc, p, Q) for p in posts], [{"post": p, "policies": {}} for p in posts]
    eos = enc.n_vocab - 1

    def add(name, responses, kls=None):
        scores = score_rows(reward_model, [q + r for q, r in zip(queries, responses)]).tolist()
        for i, response in enumerate(responses):
            rows[i]["policies"][name] = {
                "text": decode_response(enc, response), "length": len(response), "eos": response[-1] == eos,
                "score": scores[i], "kl": None if kls is None else kls[i]}

    add("reference", [encode_response(enc, p["summary"], R) for p in posts])
    add("lead3", [encode_response(enc, lead3(p), reward_model.config.n_positions - Q) for p in posts])
    for name in ("pretrained", "sft", "ppo"):
        greedy = sample_responses(models[name], queries, R, 0, generator)
        if name == "sft":
            kls = [0.0] * len(posts)
        else:
            samples = sample_responses(models[name], queries, R, temperature, generator)
            kls = sampled_kl(models[name], models["sft"], queries, samples, temperature)
        add(name, greedy, kls)
    many = sample_responses(models["sft"], queries, R, temperature, generator, n=best_of)
    scores = score_rows(reward_model, [queries[i // best_of] + r for i, r in enumerate(many)]).view(-1, best_of)
    add("best_of_n", [many[i * best_of + j] for i, j in enumerate(scores.argmax(1).tolist())],
        [best_of_n_kl(best_of)] * len(posts))
    return rows


def sampled_kl(policy, ref_policy, queries, samples, temperature, batch=64):
    """k1 = Σ_t log π/π_ref of one sample per query, a list."""
    out = []
    for i in range(0, len(queries), batch):
        q, r = queries[i:i + batch], samples[i:i + batch]
        tokens, lengths = pad_rows([a + b for a, b in zip(q, r)], policy.device)
        query_lengths = torch.tensor([len(a) for a in q], device=policy.device)
        logprobs, ref_logprobs, mask, _, _ = compare_policies(policy, ref_policy, tokens, query_lengths, lengths,
                                                              max(map(len, r)), temperature)
        out += kl_estimates(logprobs, ref_logprobs, mask)[0].tolist()
    return out


def measure_policies(rows):
    """{policy: what report/results.json says of it}. Win rates are against the reference of the same post."""
    out = {}
    gold_known = all("facts" in row["post"] for row in rows)
    for name in rows[0]["policies"]:
        mine, ref = ([row["policies"][who] for row in rows] for who in (name, "reference"))
        entry = {"gold_win_rate": None, "gold_win_rate_ci": None, "gold_win_rate_length_controlled": None, "gold_utility": None}
        if gold_known:
            u, v = (np.array([world.utility(row["post"], s["text"]) for row, s in zip(rows, side)]) for side in (mine, ref))
            w = wins(u, v)
            ratio = [math.log(a["length"] / b["length"]) for a, b in zip(mine, ref)]
            entry = {"gold_win_rate": float(w.mean()), "gold_win_rate_ci": bootstrap_ci(w),
                     "gold_win_rate_length_controlled": length_controlled_win_rate(w, ratio), "gold_utility": float(u.mean())}
        rm = wins([s["score"] for s in mine], [s["score"] for s in ref])
        kls = [s["kl"] for s in mine if s["kl"] is not None]
        out[name] = entry | {
            "rm_win_rate": float(rm.mean()), "rm_win_rate_ci": bootstrap_ci(rm), "rm_score": float(np.mean([s["score"] for s in mine])),
            "kl": float(np.mean(kls)) if kls else None, "length": float(np.mean([s["length"] for s in mine])),
            "no_eos": float(np.mean([not s["eos"] for s in mine])),
            "copy_fraction": float(np.mean([copy_fraction(s["text"], row["post"]["post"]) for row, s in zip(rows, mine)])),
            "n": len(rows)}
    return out
