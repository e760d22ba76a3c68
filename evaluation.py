"""
Every measurement of the papers' result sections that the pipeline makes, and its figures.

References: Stiennon 2020 §4, appendices F and G; Ziegler 2019 §3; InstructGPT 2022 §4.

    python evaluation.py out/tiny-seed1        # measures again from the saved samples; no model is run
    python evaluation.py out/tiny-seed1 --posts cnn.csv                           # the policies on other posts, or on articles
    python evaluation.py out/tiny-seed1 --comparisons batch22.json                # the reward model against other people's labels
    python evaluation.py out/tiny-seed1 --axis tldraxis1.json                     # Likert scores: means and intervals

Measuring (measure_*) is apart from what runs models, such as sample_policies, and from drawing (draw_*). Win rates, accuracies, ROUGE and
scores come with their number of posts and a 95 % bootstrap interval over posts.
"""
import csv
import gzip
import io
import json
import lzma
import math
import os
from collections import defaultdict

import numpy as np
import torch
from tqdm import tqdm

import real
import sentiment
import world
from data import (DataError, decode_response, encode_query, encode_response, in_context_query, load_axis, load_comparisons,
                  load_posts, pad_rows, post_key, same_posts, save_json_lines, write_atomic)
from ppo import compare_policies
from reward import group_by_post, sample_responses, score_all, score_groups
from sft import Parser, evaluate_lm, load_fitting, load_model, open_run, pick_device, read_metrics, run_main, run_text, stored_posts

POLICIES = ["reference", "lead3", "pretrained", "in_context", "sft", "sft_sampled", "best_of_n", "ppo"]


# ---------------------------------------------------------------------------------------------------------------------
# statistics

def bootstrap_ci(values, clusters=None, draws=2000, seed=0, choices=True):
    """95 % percentile interval of the mean. clusters: what to draw as a whole (comparisons of one post hang together). choices: whether
    values of 0, ½ and 1 alone are choices (see not_too_narrow). Of anything else None where there is only one to draw: it says nothing of
    others."""
    values = np.asarray(values, float)
    if clusters is None:
        sums, sizes = values, np.ones(len(values))
    else:
        names, index = np.unique(np.asarray(clusters), return_inverse=True)
        sums, sizes = np.bincount(index, values, len(names)), np.bincount(index, minlength=len(names))
    if len(sums) < 2 and not (choices and np.isin(values, (0, .5, 1)).all()):
        return None
    draw = np.random.default_rng(seed).integers(0, len(sums), (draws, len(sums)))
    means = sums[draw].sum(1) / sizes[draw].sum(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return not_too_narrow(low, high, values, len(sums)) if choices else [float(low), float(high)]


def not_too_narrow(low, high, values, n):
    """An interval, widened to Wilson's where values are choices (0, ½ or 1), about n posts, of which fewer than ten went one way: 12 wins
    of 12 are no proof that all would be won, but all that can be drawn from them."""
    p = values.mean()
    if np.isin(values, (0, .5, 1)).all() and n * min(p, 1 - p) < 10:
        z = 1.96
        centre, half = (p + z * z / (2 * n)) / (1 + z * z / n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
        low, high = min(low, centre - half), max(high, centre + half)
    return [float(low), float(high)]


STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # 97.5 % quantiles of t at 1 to 9 degrees of freedom


def crossed_ci(values, posts, seeds, choices=True):
    """95 % interval of the mean of values [N], each of a post and of a seed, for other posts and other seeds:

        mean ± √((1.96 s_posts)² / P + (t s_seeds)² / S),    t of S - 1 degrees of freedom

    s_posts, s_seeds: standard deviations of the means by post and by seed. Three seeds say little about how much seeds differ; t says so,
    where three seeds drawn again and again would not. Of one seed, an interval for that seed. Choices and shares (0 to 1) stay within 0 and 1."""
    values, variance = np.asarray(values, float), 0.0
    groups = [np.unique(np.asarray(names), return_inverse=True)[1] for names in (posts, seeds)]
    P, S = (group.max() + 1 for group in groups)
    for group, n, t in zip(groups, (P, S), (1.96, STUDENT[min(S, 10) - 2])):
        variance += t**2 * np.var(np.bincount(group, values) / np.bincount(group), ddof=1) / n if n > 1 else 0.0
    low, high = values.mean() - math.sqrt(variance), values.mean() + math.sqrt(variance)
    if not choices:
        return [float(low), float(high)]
    if values.min() >= 0 and values.max() <= 1:
        low, high = max(0, low), min(1, high)
    return not_too_narrow(low, high, values, P)


def wins(a, b):
    """1 where a > b, 0 where a < b, ½ for a tie."""
    a, b = np.asarray(a, float), np.asarray(b, float)
    return (a > b) + 0.5 * (a == b)


def length_controlled_win_rate(wins, log_length_ratio):
    """σ(w) of the logistic fit P(win) = σ(w + c·log(length / reference length)): the win rate at equal length.

    wins in [0, 1] (½ for ties), both [N]. Stiennon's appendix F fits one c to all policies; here each has its own. A ridge of 1e-3 keeps
    separable data finite."""
    y, x = np.asarray(wins, float), np.asarray(log_length_ratio, float)
    X, theta = np.stack([np.ones_like(x), x], 1), np.zeros(2)
    for _ in range(50):  # Newton's method
        p = 1 / (1 + np.exp(-X @ theta))
        gradient = X.T @ (y - p) - 1e-3 * theta
        step = np.linalg.solve((X * (p * (1 - p))[:, None]).T @ X + 1e-3 * np.eye(2), gradient)
        theta = theta + step
        if abs(step).max() < 1e-9:
            break
    return float(1 / (1 + np.exp(-theta[0])))


def length_controlled_ci(wins, log_length_ratio, draws=300, seed=0):
    """Its 95 % bootstrap interval over posts: where all lengths differ from the references', equal length is far from the data. None for
    a single post."""
    if len(wins) < 2:
        return None
    y, x, rng = np.asarray(wins, float), np.asarray(log_length_ratio, float), np.random.default_rng(seed)
    fits = [length_controlled_win_rate(y[rows], x[rows]) for rows in rng.integers(0, len(y), (draws, len(y)))]
    return [float(bound) for bound in np.percentile(fits, [2.5, 97.5])]


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
    return " ".join(world.sentences(post["post"])[:3])


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
    sentences = [flat(s) for s in world.sentences(summary) if s.strip()]
    return sum(s not in flat(source) for s in sentences) / max(1, len(sentences))


ROUGE = ("rouge1", "rouge2", "rougeL")


def rouge(summaries, references, kinds=ROUGE):
    """F1 of as many summaries as references, by rouge-score. -> [N, kinds]

    Lower case, Porter's stemmer, letters a to z and digits only, as this field reports it (ROUGE-1.5.5 -m). rougeL takes the whole text
    for one sentence; rougeLsum (summary-level, papers on CNN/DM mean it by ROUGE-L) for a sentence a line."""
    from rouge_score.rouge_scorer import RougeScorer  # nltk comes with it: slow to import, and not every run has use for it
    scorer = RougeScorer(list(kinds), use_stemmer=True)
    pairs = tqdm(list(zip(summaries, references, strict=True)), desc="ROUGE", unit="text", leave=False, delay=2)
    return np.array([[s[kind].fmeasure for kind in kinds] for text, reference in pairs for s in [scorer.score(reference, text)]])


def rouge_means(summaries, references, articles=False):
    """{"rouge1", "rouge2", "rougeL": (mean F1, 95 % interval over texts)}; of articles "rougeLsum" in place of rougeL, with a line for
    each sentence: highlights have lines, but what a policy writes has none."""
    kinds = (*ROUGE[:2], "rougeLsum") if articles else ROUGE
    if articles:
        summaries, references = (["\n".join(world.sentences(text)) for text in texts] for texts in (summaries, references))
    return {kind: (float(np.mean(f)), bootstrap_ci(f, choices=False)) for kind, f in zip(kinds, rouge(summaries, references, kinds).T)}


# ---------------------------------------------------------------------------------------------------------------------
# a language model of real text against gzip and xz

def held_out_bits(model, run):
    """Bits per byte of the run's held-out posts (query and summary) and held-out text, beside what gzip and xz make of the same text.

    -> {"posts": {model, gzip, xz, bytes}, "text": the same, or absent}. The first token of each row is given, and its bytes are not
    counted; that a post ends costs the model its bits too."""
    queries, responses = (rows[:500] for rows in stored_posts(run, "valid"))
    text, out = run_text(run), {}
    parts = {"posts": [q + r for q, r in zip(queries, responses)]} | ({"text": list(text[1])[:500]} if text else {})
    for name, rows in ((name, [row for row in rows if len(row) > 1]) for name, rows in parts.items()):
        if rows:
            tokens = sum(len(row) - 1 for row in rows)
            nats = tokens * evaluate_lm(model, [row[:1] for row in rows], [row[1:] for row in rows], batch=16)
            raw = b"".join(run.enc.decode_bytes([i for i in row[1:] if i != run.enc.n_vocab - 1]) for row in rows)
            out[name] = {"model": nats / math.log(2) / len(raw), "gzip": 8 * len(gzip.compress(raw, 9)) / len(raw),
                         "xz": 8 * len(lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME)) / len(raw), "bytes": len(raw)}
    return out


def bits_text(bits):
    """held_out_bits in sentences."""
    return [f"Held-out {name} ({b['bytes']:,} bytes): {b['model']:.3f} bits per byte; gzip -9 {b['gzip']:.3f}, xz -9e {b['xz']:.3f}."
            for name, b in bits.items()]


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
    """Accuracy, that of the noise-free judge, and the baseline; accuracy by labeler confidence; calibration. rows: of reward_margins."""
    margin, posts = np.array([r["margin"] for r in rows]), [r["post"] for r in rows]
    right, longer = wins(margin, 0 * margin), np.array([r["longer_wins"] for r in rows])
    out = {"accuracy": float(right.mean()), "accuracy_ci": bootstrap_ci(right, posts), "n": len(rows),
           "longer_wins": float(longer.mean()), "longer_wins_ci": bootstrap_ci(longer, posts),
           "noise_free_judge": None, "gap_to_judge": None, "gap_to_judge_ci": None}
    if all(r["gold_agrees"] is not None for r in rows):
        gold = np.array([r["gold_agrees"] for r in rows])
        out |= {"noise_free_judge": float(gold.mean()), "gap_to_judge": float((gold - right).mean()),
                "gap_to_judge_ci": bootstrap_ci(gold - right, posts, choices=False)}
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

def sample_policies(enc, posts, models, reward_model, Q, R, temperature, best_of, generator, stop=None, examples=()):
    """Every policy's summary of every post, with all that measuring needs. models: {"pretrained", "sft", "ppo"}; best_of 0 leaves
    best of n out; examples: posts for the zero-shot baseline, which is left out where one of the posts has room for none.

    -> one row per post: {"post": ..., "policies": {name: {"text", "length", "eos", "score", "kl"}}}"""
    queries, rows = [encode_query(enc, p, Q) for p in posts], [{"post": p, "policies": {}} for p in posts]

    def add(name, responses, kls=None):
        for row, entry in zip(rows, entries(enc, reward_model, queries, responses, kls, stop)):
            row["policies"][name] = entry

    def encoded(texts, most):
        return [encode_response(enc, text, most, p.get("task", "tldr"), stop) for p, text in zip(posts, texts)]

    add("reference", encoded([p["summary"] for p in posts], R))
    story = posts[0].get("task") in world.STYLES
    if not story:  # whose beginning is no continuation
        add("lead3", encoded([lead3(p) for p in posts], reward_model.config.n_positions - Q))
        for row in rows:  # what is scored is cut to the reward model's context, what is judged is not
            row["policies"]["lead3"]["text"] = lead3(row["post"])
    for name in ("pretrained", "sft", "ppo"):
        add(name, *responses_and_kl(models[name], models["sft"], queries, R, temperature, generator, stop, greedy=not story))
    in_context = [] if story else in_context_responses(enc, posts, examples, models["pretrained"], Q, R, generator)
    if in_context:
        add("in_context", encoded([text for text, _ in in_context], R))
        for row, (_, ended) in zip(rows, in_context):
            row["policies"]["in_context"]["eos"] = ended
    if best_of:
        many = sample_responses(models["sft"], queries, R, temperature, generator, n=best_of, stop=stop)
        scores = score_all(reward_model, queries, many, best_of)
        if not story:  # what best of n begins from: greedy decoding alone changes a win rate
            add("sft_sampled", many[::best_of], [0.0] * len(posts))
        add("best_of_n", [many[i * best_of + j] for i, j in enumerate(scores.argmax(1).tolist())],
            [best_of_n_kl(best_of)] * len(posts))
    return rows


def greedy_texts(run, policy, posts):
    """One greedy summary per post."""
    samples = sample_responses(policy, [encode_query(run.enc, p, run.Q) for p in posts], run.R, 0, torch.Generator())
    return [decode_response(run.enc, ids) for ids in samples]


def in_context_responses(enc, posts, examples, model, Q, R, generator):
    """Greedy zero-shot summaries behind examples, ended by a newline or EOS. -> [(text, whether it ended)], or None where the model's
    context has no room for even one example in front of some post. (Stiennon's zero-shot baseline)"""
    queries = []
    for post in tqdm(posts if examples else [], desc="examples", unit="post", leave=False, delay=2):
        query, n = in_context_query(enc, post, examples, Q, model.config.n_positions - R)
        if n == 0:
            return None
        queries.append(query)
    out, ends = [], (enc.encode_ordinary("\n")[0], enc.n_vocab - 1)
    for ids in sample_responses(model, queries, R, 0, generator, stop=(ends[0], 0)) if queries else []:
        length = next((t for t, token in enumerate(ids) if token in ends), len(ids))
        out.append((decode_response(enc, ids[:length]), length < len(ids)))
    return out or None


def pick_examples(enc, posts, n=13):
    """The first n posts whose summaries have 24 to 47 tokens. (Stiennon's code takes 13 posts, or 3 articles, of that length)"""
    lengths = (len(encode_response(enc, p["summary"], 10**6, p.get("task", "tldr"))) - 1 for p in posts)
    return [p for p, length in zip(posts, lengths) if 24 <= length <= 47][:n]


def entries(enc, reward_model, queries, responses, kls=None, stop=None):
    """What is kept of each response: text, length, whether it ended, the reward model's score, KL."""
    scores, (token, after) = score_all(reward_model, queries, responses).squeeze(1).tolist(), stop or (enc.n_vocab - 1, 0)
    return [{"text": decode_response(enc, response), "length": len(response), "eos": response[-1] == token and len(response) > after,
             "score": score, "kl": None if kls is None else kls[i]} for i, (response, score) in enumerate(zip(responses, scores))]


def responses_and_kl(policy, sft, queries, R, temperature, generator, stop=None, greedy=True):
    """A policy's responses, and the KL from SFT of one sample at the rollout temperature each: it is the response too where that is not
    greedy. (What continues a story is judged as a sample, as in Ziegler: there is no one right continuation.)"""
    responses = sample_responses(policy, queries, R, 0 if greedy else temperature, generator, stop=stop)
    if policy is sft:
        return responses, [0.0] * len(queries)
    samples = sample_responses(policy, queries, R, temperature, generator, stop=stop) if greedy else responses
    return responses, sampled_kl(policy, sft, queries, samples, temperature)


def sampled_kl(policy, ref_policy, queries, samples, temperature, batch=64):
    """Σ_t KL(π(·|s_t) ‖ π_ref(·|s_t)) along one sample per query, a list. Its mean over samples is the KL of whole responses, as that of
    k1 = Σ_t log π/π_ref is, with a fraction of the noise and never negative."""
    out = []
    for i in range(0, len(queries), batch):
        q, r = queries[i:i + batch], samples[i:i + batch]
        tokens, lengths = pad_rows([a + b for a, b in zip(q, r)], policy.device)
        query_lengths = torch.tensor([len(a) for a in q], device=policy.device)
        kl = compare_policies(policy, ref_policy, tokens, query_lengths, lengths, max(map(len, r)), temperature)[3]
        out += kl.sum(1).tolist()
    return out


def ask_mock(folder, enc, rows, device):
    """Add r_s to each entry of these rows, of the excerpt with this continuation, where the run in `folder` has a mock labeler."""
    if os.path.exists(os.path.join(folder, "mock", "held_out.json")):
        labeler = sentiment.MockLabeler(enc, load_model(os.path.join(folder, "mock"), device, "scalar"))
        for row in tqdm(rows, desc="mock labeler", unit="post", leave=False, delay=2):
            for entry, score in zip(row["policies"].values(), labeler.scores(row["post"], [s["text"] for s in row["policies"].values()])):
                entry["mock"] = score


def mock_text(m):
    """What stands in mock/held_out.json, in a sentence."""
    return (f"The labels are of a classifier, which is right on {m['accuracy']:.1%} of {m['n']} held-out sentences (95 % interval "
            f"{m['accuracy_ci'][0]:.1%} to {m['accuracy_ci'][1]:.1%}); always the same label would be right on {m['majority']:.1%}.")


def measure_policies(rows):
    """{policy: what report/results.json says of it}. Win rates are against the reference of the same post; *_sft against SFT's response."""
    out = {}
    gold_known = all("facts" in row["post"] for row in rows)
    for name in rows[0]["policies"]:
        mine, ref, sft = ([row["policies"].get(who) for row in rows] for who in (name, "reference", "sft"))
        entry = dict.fromkeys(["gold_win_rate", "gold_win_rate_ci", "gold_win_rate_length_controlled", "gold_win_rate_length_controlled_ci",
                               "gold_utility", "gold_win_rate_sft", "gold_win_rate_sft_ci"])
        if gold_known:
            u, v = (np.array([world.utility(row["post"], s["text"]) for row, s in zip(rows, side)]) for side in (mine, ref))
            w = wins(u, v)
            ratio = [math.log(a["length"] / b["length"]) for a, b in zip(mine, ref)]
            entry |= {"gold_win_rate": float(w.mean()), "gold_win_rate_ci": bootstrap_ci(w),
                     "gold_win_rate_length_controlled": length_controlled_win_rate(w, ratio),
                     "gold_win_rate_length_controlled_ci": length_controlled_ci(w, ratio), "gold_utility": float(u.mean())}
            if sft[0] is not None:
                w = wins(u, [world.utility(row["post"], s["text"]) for row, s in zip(rows, sft)])
                entry |= {"gold_win_rate_sft": float(w.mean()), "gold_win_rate_sft_ci": bootstrap_ci(w)}
        entry["rouge"] = None  # asked where no gold judge says more
        if not gold_known and name != "reference" and all(row["post"].get("summary") for row in rows):
            entry["rouge"] = rouge_means([s["text"] for s in mine], [row["post"]["summary"] for row in rows],
                                         all(row["post"].get("task", "").startswith("cnndm") for row in rows))
        if "mock" in mine[0]:
            scores = np.array([s["mock"] for s in mine])
            entry |= {"mock_score": (float(scores.mean()), bootstrap_ci(scores)),
                      "mock_positive": float((1 / (1 + np.exp(-scores))).mean())}
        rm = wins([s["score"] for s in mine], [s["score"] for s in ref])
        kls = [s["kl"] for s in mine if s["kl"] is not None]
        out[name] = entry | {
            "rm_win_rate": float(rm.mean()), "rm_win_rate_ci": bootstrap_ci(rm), "rm_score": float(np.mean([s["score"] for s in mine])),
            "kl": float(np.mean(kls)) if kls else None, "length": float(np.mean([s["length"] for s in mine])),
            "no_eos": float(np.mean([not s["eos"] for s in mine])),
            "copy_fraction": float(np.mean([copy_fraction(s["text"], row["post"]["post"]) for row, s in zip(rows, mine)])),
            "n": len(rows)}
    return out


# ---------------------------------------------------------------------------------------------------------------------
# drawing and the report

BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#777777"  # Okabe and Ito: colour-blind safe
PURPLE, SKY = "#CC79A7", "#56B4E9"
LABELS = {"reference": "reference", "lead3": "lead-3", "pretrained": "pretrained\n(zero-shot)",
          "in_context": "pretrained\n(in context)", "sft": "SFT", "sft_sampled": "SFT\n(sampled)", "best_of_n": "best of n", "ppo": "PPO"}


def new_figure(columns=1, rows=1, width=5.0, height=3.4):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(rows, columns, figsize=(width * columns, height * rows), squeeze=False)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=.25)
    return figure, axes


def save_figure(figure, path):
    import matplotlib.pyplot as plt
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def bar(ax, x, y, low, high, colour, width=.36, label=None):
    """A bar with its interval."""
    ax.bar(x, y, width, color=colour, label=label)
    ax.errorbar(x, y, [[max(0, y - low)], [max(0, high - y)]], color="black", capsize=3, lw=1)


def draw_win_rates(policies, path):
    """Bars of the share of posts on which each policy is preferred to the reference (Stiennon figure 1)."""
    names = [name for name in POLICIES if name in policies and name != "reference"]
    figure, ((ax,),) = new_figure(width=7)
    sides = [("rm_win_rate", ORANGE, "by the reward model")]
    if policies["reference"]["gold_win_rate"] is not None:
        sides.insert(0, ("gold_win_rate", BLUE, "by the gold judge"))
    for k, (key, colour, label) in enumerate(sides):
        for i, name in enumerate(names):
            bar(ax, i + .38 * k, policies[name][key], *policies[name][key + "_ci"], colour, label=label if i == 0 else None)
    ax.axhline(.5, color=GREY, ls="--", lw=1)
    ax.set_xticks([i + .19 * (len(sides) - 1) for i in range(len(names))], [LABELS[n] for n in names])
    ax.set(ylabel="share of posts preferred\nto the reference", ylim=(0, 1.05))
    ax.legend(frameon=False, loc="upper left")
    save_figure(figure, path)


def draw_training(folder, path):
    """Loss of every supervised stage by step."""
    figure, (axes,) = new_figure(columns=3, width=4)
    for ax, (stage, label) in zip(axes, (("pretrained", "pretraining"), ("sft", "SFT"), ("reward", "reward model"))):
        rows = [r for r in read_metrics(os.path.join(folder, stage)) if "loss" in r]
        if not rows:  # Ziegler has no SFT
            ax.axis("off")
            continue
        ax.plot([r["step"] for r in rows], [r["loss"] for r in rows], color=BLUE, alpha=.3, lw=.8)
        window = max(1, len(rows) // 20)
        smooth = np.convolve([r["loss"] for r in rows], np.ones(window) / window, "valid")
        ax.plot([r["step"] for r in rows][window - 1:], smooth, color=BLUE)
        ax.set(title=label, xlabel="step", ylabel="loss (nats)")
    save_figure(figure, path)


PPO_CURVES = [("score", "reward model's score"), ("gold", "gold utility"), ("kl", "KL to SFT (nats)"),
              ("entropy", "entropy (nats per token)"), ("length", "response length (tokens)"), ("clip_fraction", "share of ratios clipped"),
              ("approx_kl", "approx. KL of one update (nats per token)"), ("explained_variance", "explained variance of values")]
HEALTHY = os.path.join(os.path.dirname(os.path.abspath(__file__)), "docs", "healthy_run.json")  # curves.json of figures.py


def trained_by(config):
    """Of a run's configuration what its training depends on, but the seed: its files, and the settings less those of testing."""
    settings = {stage: {key: value for key, value in part.items() if key not in ("held_out_posts", "test")}
                for stage, part in config["settings"].items() if stage != "evaluation"}
    return {key: value for key, value in config.items() if value is not None and key not in ("preset", "seed", "base", "versions")} | {
        "settings": settings}


def healthy_band(config):
    """What PPO's curves look like over seeds where all is well: rows of curve, step, mean, low, high, seeds; none where there is no file,
    or it comes from runs that were trained otherwise than the one of this configuration."""
    if not os.path.exists(HEALTHY):
        return []
    with open(HEALTHY) as f:
        measured = json.load(f)
    return measured["tables"]["curves"] if measured["facts"]["trained_by"] == trained_by(config) else []


def draw_curves(rows, band, path):
    """PPO's curves of one run (metrics of each iteration), and in grey the band of others: lowest and highest seed, and their mean."""
    shown = [(key, label) for key, label in PPO_CURVES if (rows and rows[0].get(key) is not None) or not rows]
    figure, axes = new_figure(columns=4, rows=2, width=3.2, height=2.6)
    for ax, (key, label) in zip(axes.flat, shown):
        of = [r for r in band if r["curve"] == key]
        if of:
            steps = [r["step"] for r in of]
            ax.fill_between(steps, [r["low"] for r in of], [r["high"] for r in of], color=GREY, alpha=.3, lw=0,
                            label=f"{of[0]['seeds']} seeds, lowest to highest")
            ax.plot(steps, [r["mean"] for r in of], color=GREY, label="their mean")
        if rows:
            ax.plot([r["step"] for r in rows], [r[key] for r in rows], color=BLUE, label="this run")
        ax.set(xlabel="iteration", title=label)
        ax.title.set_fontsize(9)
        ax.xaxis.get_major_locator().set_params(integer=True)
    for ax in list(axes.flat)[len(shown):]:
        ax.axis("off")
    if band:
        axes.flat[0].legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1.1))
    last = axes.flat[len(shown) - 1]  # explained variance starts far below 0
    last.set_ylim(bottom=max(-1, last.get_ylim()[0]))
    save_figure(figure, path)


def draw_reward(measured, path):
    """Calibration of the reward model and its accuracy by the labeler's confidence."""
    figure, ((left, right),) = new_figure(columns=2, width=4.2)
    c = measured["calibration"]
    left.plot([.5, 1], [.5, 1], color=GREY, ls="--", lw=1)
    error = [math.sqrt(b["observed"] * (1 - b["observed"]) / b["n"]) for b in c]
    left.errorbar([b["predicted"] for b in c], [b["observed"] for b in c], error, color=BLUE, marker="o", capsize=3)
    left.set(xlabel="predicted preference", ylabel="observed preference", title="calibration")
    b = [row for row in measured["by_confidence"] if row["confidence"] is not None]
    right.bar([str(row["confidence"]) for row in b], [row["accuracy"] for row in b], color=BLUE)
    right.axhline(.5, color=GREY, ls="--", lw=1)
    right.set(xlabel="labeler's confidence", ylabel="agreement with labeler", ylim=(0, 1), title="accuracy by confidence")
    save_figure(figure, path)


def show(value, form=".1%"):
    return "–" if value is None else format(value, form)


def with_interval(mean_ci, form=".1%"):
    if mean_ci is None or mean_ci[1] is None:
        return "–" if mean_ci is None else f"{mean_ci[0]:{form}} (–)"
    return f"{mean_ci[0]:{form}} ({mean_ci[1][0]:{form}} – {mean_ci[1][1]:{form}})"


def table_rows(policies):
    """Header and rows of the table that the run ends with: by the gold judge, or where there is none by the mock labeler, or ROUGE, with
    95 % intervals."""
    gold, mock = policies["reference"]["gold_win_rate"] is not None, "mock_score" in policies["reference"]
    kinds = next((p["rouge"] for p in policies.values() if p["rouge"]), ROUGE)
    header, rows = ["policy"], []
    header += ["gold win rate", "95 % interval", "equal length", "RM win rate", "gold utility"] if gold else [
        *(["log-odds of positive", "positive"] if mock else ["ROUGE-" + kind[5:] for kind in kinds]), "RM win rate"]
    for name in [n for n in POLICIES if n in policies]:
        p = policies[name]
        judged = [show(p["gold_win_rate"]), "{:.1%} – {:.1%}".format(*p["gold_win_rate_ci"]), equal_length(p),
                  show(p["rm_win_rate"]), show(p["gold_utility"], ".2f")] if gold else [
            *((with_interval(p["mock_score"], ".2f"), show(p["mock_positive"])) if mock else
              (with_interval((p["rouge"] or {}).get(key)) for key in kinds)), show(p["rm_win_rate"])]
        rows.append([LABELS[name].replace("\n", " "), *judged, show(p["rm_score"], ".2f"), show(p["kl"], ".1f"), show(p["length"], ".1f"),
                     show(p["no_eos"])])
    return header + ["RM score", "KL", "length", "no EOS"], rows


def equal_length(p):
    """'65.8% ± 4.1%': half of its interval is as far as it goes on average to both sides."""
    ci = p["gold_win_rate_length_controlled_ci"]
    return f"{p['gold_win_rate_length_controlled']:.1%} ± " + ("–" if ci is None else f"{(ci[1] - ci[0]) / 2:.1%}")


def print_table(header, rows):
    widths = [max(len(r[i]) for r in [header] + rows) for i in range(len(header))]
    for row in [header] + rows:
        print("  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))))


def markdown_table(header, rows):
    """-> lines"""
    return ["| " + " | ".join(header) + " |", "|" + "---|" * len(header), *("| " + " | ".join(row) + " |" for row in rows)]


def over_sft(ppo):
    return "against what it began as (SFT), PPO wins {:.1%} of the posts by the gold judge ({:.1%} – {:.1%})".format(
        ppo["gold_win_rate_sft"], *ppo["gold_win_rate_sft_ci"])


def save_csv(path, rows):
    """Rows, each a dict, with one column for every key."""
    file = io.StringIO()
    writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, file.getvalue())


def save_table(folder, name, header, rows):
    """-> path of the CSV in the run's report/"""
    path = os.path.join(folder, "report", f"{name}.csv")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    save_csv(path, [dict(zip(header, row)) for row in rows])
    return path


def report_text(settings, seconds, reward, policies, samples, bits=None, band=()):
    """report.md; band: what draw_curves drew in grey"""
    header, rows = table_rows(policies)
    n = policies["reference"]["n"]
    out = [f"# Report of a run: preset {settings['preset']}, seed {settings['seed']}", "",
           f"Win rates are against the reference of the same held-out post ({n} posts, ties count one half), "
           f"{'samples at the rollout temperature' if policies.get('lead3') is None else 'greedy decoding'}; "
           "best of n takes the reward model's favourite of n samples of SFT, the first of which is SFT (sampled). KL is from the SFT model, at "
           "the rollout temperature. Intervals are over posts, for these very policies: training once more with another seed moves a rate by more."
           + (" ROUGE is F1 against the whole reference, by rouge-score with its stemmer; 95 % intervals." if "ROUGE-1" in header else "")
           + ("" if "in_context" in policies or policies.get("lead3") is None else " The zero-shot baseline with examples in its context "
              "is left out: in front of some post the language model's context has no room for one."),
           *([] if settings["settings"]["sft"]["epochs"] else ["SFT is the language model itself: nothing was fine-tuned before PPO."]), "",
           *markdown_table(header, rows)]
    out += ["", over_sft(policies["ppo"])] if policies["ppo"]["gold_win_rate_sft"] is not None else []
    if bits:
        out += ["", "## Language model", "", *bits_text(bits)]
    out += ["", "![win rates](win_rates.png)", "", "## Reward model", "",
            f"It agrees with {show(reward['accuracy'])} of {reward['n']} labels on posts it has not seen (95 % interval "
            f"{reward['accuracy_ci'][0]:.1%} to {reward['accuracy_ci'][1]:.1%}). The longer summary is the preferred one in "
            f"{show(reward['longer_wins'])}" + (", which is what a reward model has to beat." if reward["noise_free_judge"] is None else
            f"; the noise-free judge agrees with {show(reward['noise_free_judge'])}: what the labelers' noise leaves him. Who also knew "
            "their habits, which are not his, would agree a little more.")]
    if reward.get("mock"):
        out.append(mock_text(reward["mock"]) + " The table's log-odds and probability of positive are its, of excerpt and continuation.")
    if reward.get("labeler_agreement"):
        a = reward["labeler_agreement"]
        out.append(f"On {a['pairs']} pairs of SFT samples the labelers agree with the judge {a['with_judge']:.1%} of the time and with "
                   f"each other {a['between_labelers']:.1%}.")
    if reward["accuracy_ci"][0] <= reward["longer_wins"]:
        out += ["", "**Its interval reaches down to 'longer wins': on these labels it has not shown that it learned more than length.**"]
    out += ["", "![reward model](reward.png)", "", "## Training", "", "![losses](training.png)", "", "![PPO](ppo.png)", "",
            *([f"Grey in the last picture: what the same settings gave with {band[0]['seeds']} seeds of comparisons, reward model and PPO; "
               "lowest to highest, the line is their mean.", ""] if band else []),
            "## Samples", "", "The first five held-out posts, not chosen."]
    for row in samples[:5]:
        post = row["post"]
        out += ["", f"**r/{post['subreddit']}: {post['title']}**" if post["title"] else f"**{post['id']}**", "",
                *("> " + line for line in post["post"][:1500].split("\n")), ""]
        for name in [n for n in POLICIES if n in row["policies"]]:
            s = row["policies"][name]
            gold = f"; gold {world.utility(post, s['text']):.1f}" if "facts" in post else ""
            text = " ".join(s["text"].split()) or "(empty)"
            out.append(f"- *{LABELS[name]}* ({s['length']} tokens; RM {s['score']:.2f}{gold}): {text}".replace("\n", " "))
    out += ["", "## Time", "", ", ".join(f"{stage} {t:.0f} s" for stage, t in seconds.items()) + "."]
    return "\n".join(out) + "\n"


def once(file, measure):
    """What measure() says, or said to an earlier command."""
    if not os.path.exists(file):
        write_atomic(file, json.dumps(measure()))
    with open(file) as f:
        return json.load(f)


def read_samples(folder):
    """What sample_policies left in a run's folder."""
    path = os.path.join(folder, "evaluation", "samples.jsonl")
    try:
        with open(path) as f:
            return [json.loads(line) for line in f]
    except FileNotFoundError:
        raise DataError(f"{path} does not exist: `python run.py --out {folder}` has not finished") from None
    except ValueError as e:
        raise DataError(f"{path} is damaged ({e})") from None


def write_report(folder, seconds=None, peak_rss_mb=None):
    """Measure what a run left, draw it, write report/, print the table. Time and memory stay what they were where not given."""
    samples = read_samples(folder)
    try:
        with open(os.path.join(folder, "reward", "held_out.jsonl")) as f:
            margins = [json.loads(line) for line in f]
        with open(os.path.join(folder, "config.json")) as f:
            config = json.load(f)
    except FileNotFoundError as e:
        raise DataError(f"{e.filename} does not exist: `python run.py --out {folder}` has not finished") from None
    except ValueError as e:
        raise DataError(f"{folder} holds a damaged file ({e})") from None
    report = os.path.join(folder, "report")
    os.makedirs(report, exist_ok=True)
    results_file = os.path.join(report, "results.json")
    old = {}
    if os.path.exists(results_file):
        with open(results_file) as f:
            old = json.load(f)
    policies, reward = measure_policies(samples), measure_reward(margins)
    labelers = os.path.join(folder, "labelers.json")  # written where the labelers are programs
    if os.path.exists(labelers):
        with open(labelers) as f:
            reward["labeler_agreement"] = json.load(f)
    if os.path.exists(os.path.join(folder, "mock", "held_out.json")):
        with open(os.path.join(folder, "mock", "held_out.json")) as f:
            reward["mock"] = json.load(f)
    bits, held_out = None, os.path.join(folder, "pretrained", "held_out.json")  # written where the text is real
    if os.path.exists(held_out):
        with open(held_out) as f:
            bits = json.load(f)
    seconds = dict(seconds or old.get("seconds", {}))
    seconds["total"] = sum(t for stage, t in seconds.items() if stage != "total")
    results = {"settings": {k: v for k, v in config.items() if k != "versions"}, "seconds": seconds,
               "peak_rss_mb": peak_rss_mb or old.get("peak_rss_mb"), "reward_model": reward,
               "policies": {name: policies.get(name) for name in POLICIES}}
    if bits:
        results["bits_per_byte"] = bits
    write_atomic(results_file, json.dumps(results, indent=1))
    draw_win_rates(policies, os.path.join(report, "win_rates.png"))
    draw_reward(reward, os.path.join(report, "reward.png"))
    draw_training(folder, os.path.join(report, "training.png"))
    band = healthy_band(config)
    draw_curves(read_metrics(os.path.join(folder, "ppo")), band, os.path.join(report, "ppo.png"))
    write_atomic(os.path.join(report, "report.md"), report_text(results["settings"], seconds, reward, policies, samples, bits, band))
    header, rows = table_rows(policies)
    save_table(folder, "policies", header, rows)
    print_table(header, rows)
    if policies["ppo"]["gold_win_rate_sft"] is not None:
        print(over_sft(policies["ppo"]))
    print(f"reward model: {reward['accuracy']:.1%} of {reward['n']} held-out labels; noise-free judge {show(reward['noise_free_judge'])}; "
          f"longer wins {reward['longer_wins']:.1%}")
    memory = "" if peak_rss_mb is None else f", peak memory {peak_rss_mb:.0f} MB"
    print(f"{seconds['total']:.0f} s of stages{memory}; report in {os.path.join(report, 'report.md')}")


def judge_policy(folder, policy_folder, device):
    """The run's rows, as sample_policies gave them, with another policy in PPO's place: only that one is sampled and scored."""
    run = open_run(folder)
    samples, temperature = read_samples(folder), run.config["settings"]["ppo"]["temperature"]
    policy, sft = load_fitting(policy_folder, run, device), load_model(os.path.join(folder, "sft"), device)
    reward_model = load_model(os.path.join(folder, "reward"), device, "scalar")
    queries, generator = [encode_query(run.enc, row["post"], run.Q) for row in samples], torch.Generator().manual_seed(run.config["seed"])
    responses, kls = responses_and_kl(policy, sft, queries, run.R, temperature, generator, run.stop,
                                      samples[0]["post"].get("task") not in world.STYLES)
    for row, entry in zip(samples, entries(run.enc, reward_model, queries, responses, kls, run.stop)):
        row["policies"]["ppo"] = entry
    ask_mock(folder, run.enc, samples, device)
    return samples


# ---------------------------------------------------------------------------------------------------------------------
# on other people's files

def stem(file):
    return os.path.basename(file).split(".")[0]


def show_table(folder, name, header, rows):
    print_table(header, rows)
    print(f"table in {save_table(folder, name, header, rows)}")


def task_of(run):
    """The task that the run was trained for; data.py takes its articles as cnndm-transfer where that is tldr."""
    return run.config["settings"]["data"].get("task", "tldr")


def trained_posts(run, splits=("pretrain", "sft", "prompts")):
    """Every post that the run's models were trained on, with a summary, as a prompt of PPO, or in a comparison."""
    posts = [p for split in splits if os.path.exists(os.path.join(run.folder, "data", split + ".jsonl")) for p in run.posts[split]]
    comparisons, _ = load_comparisons(os.path.join(run.folder, "comparisons.jsonl"))
    return posts + [c["info"] for c in comparisons if c["split"] == "train"]


def judge_posts(folder, file, task, device):
    """Every policy on posts or articles that are not the run's own: table, report/FILE-TASK.csv, evaluation/FILE-TASK.jsonl.

    (Stiennon §4.2: a model of TL;DRs transfers to CNN/DM, whose articles it meets as cnndm-transfer.)"""
    run = open_run(folder)
    every, skipped = load_posts(file, task or task_of(run))
    posts = real.without(every, trained_posts(run))
    if not posts:
        raise DataError(f"{file}: the run {folder} was trained on every one of these posts; take others")
    task = "+".join(sorted({post.get("task", "tldr") for post in posts}))  # a file may hold both
    for post in posts:
        post.pop("facts", None)  # the gold judge speaks of its own world only
    device = pick_device(device)
    models = {name: load_model(os.path.join(folder, name), device) for name in ("pretrained", "sft", "ppo")}
    examples = [p for p in run.posts["sft"] if p.get("task", "tldr") == task]  # of another task than the run's there are none
    samples = sample_policies(run.enc, posts, models, load_model(os.path.join(folder, "reward"), device, "scalar"), run.Q, run.R,
                              run.config["settings"]["ppo"]["temperature"], 0, torch.Generator().manual_seed(run.config["seed"]), run.stop,
                              pick_examples(run.enc, examples))
    os.makedirs(os.path.join(folder, "evaluation"), exist_ok=True)
    save_json_lines(os.path.join(folder, "evaluation", f"{stem(file)}-{task}.jsonl"), samples)
    print(f"{file}: {len(posts)} posts as {task}, cut to {run.Q} tokens; {skipped} more skipped because a text is empty, "
          f"{len(every) - len(posts)} left out because the run was trained on them; ROUGE is F1, stemmed")
    show_table(folder, f"{stem(file)}-{task}", *table_rows(measure_policies(samples)))


def axis_means(evaluations):
    """{policy: {axis: {"mean", "ci", "n"}}} of load_axis's evaluations: 1 to 7, or the share of yes. Intervals draw whole posts."""
    answers = defaultdict(lambda: defaultdict(list))
    for row in evaluations:
        for axis, answer in row["summary"]["axes"].items():
            answers[row["summary"]["policy"] or "unknown"][axis].append((float(answer), post_key(row["info"])))
    return {policy: {axis: {"mean": float(np.mean([x for x, _ in of])), "n": len(of),
                            "ci": bootstrap_ci(*zip(*of), choices=axis == "compatible")}
                     for axis, of in axes.items()} for policy, axes in sorted(answers.items())}


def judge_axes(folder, file):
    """Likert evaluations in OpenAI's format: table and report/FILE-axes.csv."""
    open_run(folder)
    evaluations, skipped = load_axis(file)
    measured = axis_means(evaluations)
    names = sorted({axis for axes in measured.values() for axis in axes}, key=lambda axis: (axis != "overall", axis))
    rows = [[policy, str(max(a["n"] for a in axes.values())),
             *(with_interval((axes[name]["mean"], axes[name]["ci"]) if name in axes else None, ".2f") for name in names)]
            for policy, axes in measured.items()]
    print(f"{file}: {len(evaluations)} evaluations, {skipped} more skipped because a text or all answers are missing; intervals over posts")
    show_table(folder, f"{stem(file)}-axes", ["policy", "n", *names], rows)


def unseen_comparisons(comparisons, trained):
    """Those of other posts than the trained ones: neither the same id nor the same text, be it by way of others."""
    names = same_posts([c["info"] for c in comparisons] + trained)
    seen = set(names[len(comparisons):])
    return [c for c, name in zip(comparisons, names) if name not in seen]


def judge_comparisons(folder, file, task, device):
    """How far the run's reward model agrees with a file of human comparisons: table by confidence, report/FILE-agreement.csv."""
    run = open_run(folder)
    every, _ = load_comparisons(file, task or task_of(run))
    comparisons = unseen_comparisons(every, trained_posts(run, ("pretrain", "sft")))  # a reward model never met PPO's prompts
    if not comparisons:
        raise DataError(f"{file}: the run {folder} has trained its reward model on every post of these comparisons; take others")
    for c in comparisons:
        c["info"].pop("facts", None)
    model = load_model(os.path.join(folder, "reward"), pick_device(device), "scalar")
    margins = reward_margins(model, group_by_post(run.enc, comparisons, run.Q, run.R, run.stop), comparisons)
    parts = {"all": margins} | {show(b["confidence"], ""): [r for r in margins if r["confidence"] == b["confidence"]]
                                for b in measure_reward(margins)["by_confidence"]}
    rows = [[label, str(m["n"]), with_interval((m["accuracy"], m["accuracy_ci"])), with_interval((m["longer_wins"], m["longer_wins_ci"]))]
            for label, m in ((label, measure_reward(part)) for label, part in parts.items())]
    print(f"{file}: {len(comparisons)} comparisons of {len({r['post'] for r in margins})} posts, {len(every) - len(comparisons)} more "
          "left out because the reward or language model was trained on their posts; 95 % intervals over posts")
    show_table(folder, f"{stem(file)}-agreement", ["confidence", "n", "reward model agrees", "longer wins"], rows)


def main():
    parser = Parser(__doc__)
    parser.add_argument("run", help="folder of a finished run")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--policy", help="judge this policy, such as ppo.py leaves, in place of the run's own; the report stays as it is")
    what.add_argument("--posts", metavar="FILE", help="the run's policies on these posts, or articles, and their references")
    what.add_argument("--comparisons", metavar="FILE", help="agreement of the run's reward model with these comparisons")
    what.add_argument("--axis", metavar="FILE", help="means of these Likert evaluations, in OpenAI's axis_evals format")
    parser.add_argument("--task", choices=["tldr", "cnndm", "cnndm-transfer"],
                        help="format of --posts, or of the articles in --comparisons (default the run's own; of articles, for a run of "
                             "tldr, cnndm-transfer)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default auto)")
    args = parser.parse_args()
    if args.policy is not None:
        rows = judge_policy(args.run, args.policy, pick_device(args.device))
        print(f"the row of PPO is the policy in {args.policy}")
        print_table(*table_rows(measure_policies(rows)))
    elif args.posts is not None:
        judge_posts(args.run, args.posts, args.task, args.device)
    elif args.comparisons is not None:
        judge_comparisons(args.run, args.comparisons, args.task, args.device)
    elif args.axis is not None:
        judge_axes(args.run, args.axis)
    else:
        write_report(args.run)


if __name__ == "__main__":
    run_main(main)
