"""
What the papers asked of their judges and their copies, asked of ours: figures 7 to 11 of `python run.py figures`.

References: Stiennon 2020 §4.3-4.4, appendices G.6 and G.7; Ziegler 2019 §4 and its blog post; InstructGPT 2022 §4.1.

    reward-model probes         does a reward model notice a swapped role, a wrong fact, an empty phrase, mere length?
    agreement                   who agrees with whom on two samples of one policy: people, judge, length, copying, ROUGE, log π, reward models
    copying                     Ziegler's tables: novelty and accuracy under honest labelers and under labelers who reward copying
    critics                     supervised training on the same labels; judges whose labels nobody trained on
    ladder                      Bradley-Terry ratings of all policies on the same posts

Measuring comes first, in functions of texts, folders and labelers; drawing comes behind it and reads nothing but measured rows.
Every rate stands beside its number n and a 95 % bootstrap interval lo to hi, in which posts are drawn whole.
"""
import itertools
import os
import random
import re
from collections import defaultdict

import numpy as np
import torch

import world
from data import decode_response, encode_query, encode_response, load_comparisons, pad_rows, post_key
from evaluation import (BLUE, GREEN, GREY, LABELS, ORANGE, RED, copy_fraction, elo, lead3, new_figure, read_samples,
                        save_figure, sentence_novelty, wins)
from reward import sample_responses, score_all, score_responses
from sft import SFTSettings, load_model, open_run, train_lm

STRANGERS = 10**6  # added to a labeler's seed: workers with other weights, whose labels nothing was trained on


def rate(values, posts, seeds, draws=1000):
    """{mean, lo, hi, n} of values [N] of these posts and seeds: the bootstrap draws whole posts and, of several, whole seeds."""
    values, rng = np.asarray(values, float), np.random.default_rng(0)
    weights = np.ones((draws, len(values)))
    for names in (posts, seeds):
        kinds, index = np.unique(np.asarray(names), return_inverse=True)
        weights *= rng.multinomial(len(kinds), np.full(len(kinds), 1 / len(kinds)), draws)[:, index]
    weights = weights[weights.sum(1) > 0]
    lo, hi = np.percentile(weights @ values / weights.sum(1), [2.5, 97.5])
    return {"mean": float(values.mean()), "lo": float(lo), "hi": float(hi), "n": len(values)}


def summarise(units, *keys):
    """Units, dicts of value, post, seed and these keys -> a table with one row for each combination of the keys."""
    groups = defaultdict(list)
    for unit in units:
        groups[tuple(unit[key] for key in keys)].append((unit["value"], unit["post"], unit["seed"]))
    return [dict(zip(keys, group)) | rate(*zip(*members)) for group, members in groups.items()]


def labeler_of(run, seed=None, **changes):
    """The run's labelers as stage_collect makes them; with another seed other people with the same habits."""
    s = run.config["settings"]["collect"]
    return world.Labeler(**{key: s[key] for key in ("noise", "length_bias", "copy_bias", "flipped")} | changes,
                         seed=run.config["seed"] if seed is None else seed)


def preference(labeler, post, a, b):
    """P(a ≻ b) by a worker drawn at random, exactly: the mean over workers of σ((u(a) - u(b)) / noise)."""
    gaps = [(labeler.worth(post, a, w) - labeler.worth(post, b, w)) / labeler.noise for w in range(labeler.workers)]
    return float(np.mean([1 / (1 + np.exp(-np.clip(gap, -500, 500))) for gap in gaps]))


@torch.no_grad()
def score_texts(run, model, asked, batch=16):
    """Scores of (post, text) pairs, each different text of a post once and nothing cut off where the positions reach. -> [N]"""
    posts = {post_key(post): post for post, _ in asked}
    texts, scores, limit = defaultdict(dict), {}, model.config.n_positions - run.Q
    for post, text in asked:
        texts[post_key(post)][text] = None
    keys = list(posts)
    for i in range(0, len(keys), batch):
        part = keys[i:i + batch]
        out = score_responses(model, [encode_query(run.enc, posts[k], run.Q) for k in part],
                              [[encode_response(run.enc, t, limit) for t in texts[k]] for k in part]).tolist()
        scores |= {(k, t): x for k, row in zip(part, out) for t, x in zip(texts[k], row)}
    return np.array([scores[post_key(post), text] for post, text in asked])


# ---------------------------------------------------------------------------------------------------------------------
# reward-model probes: pairs of texts, the first of which should win

def value_once(text, value):
    return len(re.findall(rf"\b{value}\b", text)) == 1


def replace_value(text, old, new):
    return re.sub(rf"\b{old}\b", new, text)


def another(rng, slot, value):
    return rng.choice([v for v in world.SLOTS[slot] if v != value])


def correct(rng, post, text):
    """One wrong fact of the writer put right: same length."""
    wrong = [(slot, value) for slot, value in world.read(text)[0] if value != post["facts"][slot]]
    if len(wrong) == 1 and value_once(text, wrong[0][1]):
        return replace_value(text, wrong[0][1], post["facts"][wrong[0][0]]), text


def plant(rng, post, text):
    """One right fact made wrong: the text as it was should win, at the same length."""
    right = [(slot, value) for slot, value in world.read(text)[0] if value == post["facts"][slot] and value_once(text, value)]
    if right:
        slot, value = rng.choice(right)
        return text, replace_value(text, value, another(rng, slot, value))


def state(text, facts, slot):
    """The text with one more fact in the world's own words, None where it has no place for it."""
    event = rf"\b{facts['verb']} my {facts['object']}\b"
    if slot in ("feeling", "wish", "question"):
        return f"{text} " + {"feeling": "i feel {feeling}.", "wish": "i want to {wish}.", "question": "should i {question}?"}[slot].format(**facts)
    if slot in ("place", "time") and re.search(event, text):
        return re.sub(event, r"\g<0> " + ("at the {place}" if slot == "place" else "{time}").format(**facts), text, count=1)
    if slot == "name" and re.search(rf"my {facts['relation']} {facts['verb']}", text):
        return re.sub(rf"my {facts['relation']}", r"\g<0> " + facts["name"], text, count=1)


def add_fact(rng, post, text):
    """One missing fact added: longer."""
    covered = world.tally(post, text)["covered"]
    options = [new for slot, hit in covered.items() if not hit for new in [state(text, post["facts"], slot)] if new]
    return (rng.choice(options), text) if options else None


def drop_wrong(rng, post, text):
    """A wrong statement dropped: shorter. (The statement is one that the text did not make, planted by us.)"""
    facts = {slot: another(rng, slot, value) if slot not in ("relation", "verb", "object") else value
             for slot, value in post["facts"].items()}
    said = {slot for slot, _ in world.read(text)[0]}
    options = [new for slot in world.SLOTS if slot not in said for new in [state(text, facts, slot)] if new]
    return (text, rng.choice(options)) if options else None


def drop_repetition(rng, post, text):
    """The same statement not made twice: shorter."""
    covered = [slot for slot in ("feeling", "wish", "question") if world.tally(post, text)["covered"][slot]]
    return (text, state(text, post["facts"], rng.choice(covered))) if covered else None


def drop_filler(rng, post, text):
    """A phrase that says nothing dropped: shorter. The judge minds such a phrase only beyond 36 words."""
    return text, f"{rng.choice([f for f in world.FILLERS if f not in text and f.endswith('.')])} {text}"


def reverse_roles(rng, post, text):
    """Who did it and what it was done to change places: the same words."""
    match = re.search(r"(my \w+ \w+|my \w+|\w+) ({}) (my \w+)".format("|".join(world.SLOTS["verb"])), text)
    return (text, text.replace(match.group(), "{2} {1} {0}".format(*match.groups()), 1)) if match else None


def sentences(text):
    return re.split(r"(?<=[.!?])\s+", text.strip())


def shuffle(parts, rng):
    """Another order than the given one; None where there is none."""
    for _ in range(20):
        new = rng.sample(parts, len(parts))
        if new != parts:
            return " ".join(new)


def text_probes(post, other, texts, rng):
    """All probes of one post. other: another post, texts: {"reference", "sample"}. -> {probe: (should win, should lose)}

    A probe is left out where the text offers no occasion for it, and an edit where the gold judge does not think it an improvement."""
    ref, sample, lead, title = texts["reference"], texts["sample"], lead3(post), post["title"]
    story = sentences(post["post"])
    three = " ".join(story[i] for i in sorted(rng.sample(range(len(story)), min(3, len(story)))))
    stranger = rng.choice([d for d in world.DISTRACTORS if "{time2}" not in d])
    irrelevant = stranger.format(**{slot + "2": another(rng, slot, post["facts"][slot]) for slot in world.SLOTS})
    edits = {"own wrong fact corrected": correct, "planted wrong fact corrected": plant, "missing fact added": add_fact,
             "wrong statement dropped": drop_wrong, "repetition dropped": drop_repetition}
    pairs = {name: edit(rng, post, sample) for name, edit in edits.items()}
    pairs = {name: p for name, p in pairs.items() if p and world.utility(post, p[0]) > world.utility(post, p[1])}
    pairs |= {"empty phrase dropped": drop_filler(rng, post, sample), "roles not reversed": reverse_roles(rng, post, ref),
              "words not shuffled": (ref, shuffle(ref.split(), rng)), "lead-3 not shuffled": (lead, shuffle(sentences(lead), rng)),
              "rand-3 not shuffled": (three, shuffle(sentences(three), rng)), "nothing irrelevant appended": (ref, f"{ref} {irrelevant}"),
              '"what should i do?" not appended': (ref, f"{ref} what should i do?"), "title, not another post's": (title, other["title"]),
              "title once, not twice": (title, f"{title} {title}"), "reference, not lead-3": (ref, lead), "reference, not title": (ref, title),
              "reference, not rand-3": (ref, three)}
    return {name: p for name, p in pairs.items() if p and all(p) and p[0] != p[1]}


PAPER_PROBES = {  # share that prefers the first, in %: reward models of 1.3B and 6.7B, people (Stiennon, table 17 for edits, 16 for the rest)
    "missing fact added": (86.8, 89.2, 88.6), "wrong statement dropped": (63.6, 66.0, 76.2), "repetition dropped": (63.6, 66.0, 76.2),
    "roles not reversed": (93.1, 97.4, None), "lead-3 not shuffled": (68.1, 75.5, None), "rand-3 not shuffled": (60.8, 76.1, None),
    "title, not another post's": (97.4, 98.5, None), "title once, not twice": (84.6, 58.4, None),
    '"what should i do?" not appended': (34.3, 74.5, None), "reference, not lead-3": (63.0, 56.4, None),
    "reference, not rand-3": (69.5, 59.5, None)}


def probe_pairs(rows, seed):
    """Probes of all posts of an evaluation's rows -> [(probe, post, should win, should lose)]"""
    rng, out = random.Random(f"probes-{seed}"), []
    for i, row in enumerate(rows):
        texts = {"reference": row["policies"]["reference"]["text"], "sample": row["policies"]["sft"]["text"]}
        out += [(name, row["post"], *p) for name, p in text_probes(row["post"], rows[i - 1]["post"], texts, rng).items()]
    return out


def judge_probes(run, pairs, reward_models, labeler, seed):
    """Units: does a judge prefer the first text of each of probe_pairs? A labeler counts with the probability that one does."""
    asked, names, posts = [(post, t) for _, post, *texts in pairs for t in texts], [p[0] for p in pairs], [p[1] for p in pairs]
    says = {"gold judge": [wins(world.utility(post, a), world.utility(post, b)) for _, post, a, b in pairs],
            "labelers": [preference(labeler, post, a, b) for _, post, a, b in pairs]}
    says |= {name: wins(*score_texts(run, model, asked).reshape(-1, 2).T) for name, model in reward_models.items()}
    return [{"probe": name, "judge": judge, "value": float(value), "post": post_key(post), "seed": seed}
            for judge, values in says.items() for name, post, value in zip(names, posts, values)]


def length_bias(margin, gold_gap, log_ratio):
    """Slopes (a, c) of P(model prefers A) = σ(a·gold gap + c·log(length A / length B)) on pairs of texts, all [N].

    c is what length is worth beyond what the judge sees; c / a says it in key facts per factor e. Every pair counts in both orders, so
    that there is no intercept. (The fit of Stiennon's appendix F, asked of a model instead of people.)"""
    X, theta = np.stack([np.asarray(gold_gap, float), np.asarray(log_ratio, float)], 1), np.zeros(2)
    y = wins(margin, 0 * np.asarray(margin, float))
    for _ in range(50):  # Newton's method, a ridge of 1e-3 keeps separable data finite
        p = 1 / (1 + np.exp(-X @ theta))
        theta = theta + np.linalg.solve((X * (p * (1 - p))[:, None]).T @ X + 1e-3 * np.eye(2), X.T @ (y - p) - 1e-3 * theta)
    return [float(t) for t in theta]


# ---------------------------------------------------------------------------------------------------------------------
# the agreement matrix

def sample_pairs(run, policy, posts, temperature, generator, n=4):
    """Two different samples of one policy for each post, where n samples hold two. -> [(post, a, b)]"""
    samples, out = sample_responses(policy, [encode_query(run.enc, p, run.Q) for p in posts], run.R, temperature, generator, n), []
    for i, post in enumerate(posts):
        texts = [t for t in dict.fromkeys(decode_response(run.enc, ids).strip() for ids in samples[i * n:(i + 1) * n]) if t]
        if len(texts) > 1:
            out.append((post, *texts[:2]))
    return out


@torch.no_grad()
def mean_logprobs(run, policy, asked, batch=64):
    """Average log π per token of (post, text) pairs. (Stiennon §4.4) -> [N]"""
    out = []
    for i in range(0, len(asked), batch):
        queries, responses = zip(*[(encode_query(run.enc, p, run.Q), encode_response(run.enc, t, run.R)) for p, t in asked[i:i + batch]])
        tokens, lengths = pad_rows([q + r for q, r in zip(queries, responses)], policy.device)
        query_lengths = torch.tensor([len(q) for q in queries], device=policy.device)
        sums = policy.logprobs(tokens, query_lengths, lengths, max(map(len, responses))).sum(1)
        out += (sums / (lengths - query_lengths)).tolist()
    return np.array(out)


def rouge(texts, references, kinds=("rougeL",)):
    """F1 of rouge-score, stemmed -> [N, kinds]"""
    from rouge_score.rouge_scorer import RougeScorer
    scorer = RougeScorer(list(kinds), use_stemmer=True)
    return np.array([[s[k].fmeasure for k in kinds] for t, r in zip(texts, references) for s in [scorer.score(r, t)]])


def people_signs(run, pairs):
    """{who: signs [N]}: +1 where a labeler prefers the first of (post, a, b), -1 the second; with a prime: the same population asked again."""
    own, strangers, three = labeler_of(run), labeler_of(run, run.config["seed"] + STRANGERS), labeler_of(run)
    own.rng, three.rng = random.Random("asked again"), random.Random("asked three times")  # not the very draws of the training labels
    signs = {name: np.array([1 - 2 * people.compare(*pair)[0] for pair in pairs])
             for name, people in (("labeler", own), ("labeler'", own), ("other labeler", strangers), ("other labeler'", strangers))}
    signs["majority of 3"] = np.array([np.sign(sum(1 - 2 * three.compare(*pair)[0] for _ in range(3))) for pair in pairs])
    return signs


def judge_pairs(run, pairs, sft, reward_models):
    """{judge: signs [N]}: as people_signs, of every judge there is; 0 where it sees no difference."""
    sides = [[(post, texts[k]) for post, *texts in pairs] for k in (0, 1)]

    def sign(f):
        return np.sign(np.round(np.subtract(*(np.asarray(f(side), float) for side in sides)), 9))

    signs = people_signs(run, pairs)
    signs["gold judge"] = sign(lambda side: [world.utility(*x) for x in side])
    signs["length"] = sign(lambda side: [len(text.split()) for _, text in side])
    signs["copying"] = sign(lambda side: [copy_fraction(text, post["post"]) for post, text in side])
    signs["ROUGE-L"] = sign(lambda side: rouge([t for _, t in side], [p["summary"] for p, _ in side])[:, 0])
    signs["log π SFT"] = sign(lambda side: mean_logprobs(run, sft, side))
    for name, model in reward_models.items():
        signs[name] = sign(lambda side: score_texts(run, model, side))
    return signs


def agreements(signs, posts, seed):
    """Units: do two judges prefer the same text? Pairs in which one of them sees no difference are left out.

    On the diagonal a labeler meets another of the population; of the other judges each would meet itself, and has none."""
    names, out = [name for name in signs if not name.endswith("'")], []
    for a, b in itertools.combinations_with_replacement(names, 2):
        x, y = signs[a], signs.get(a + "'", signs[a]) if a == b else signs[b]
        if a != b or a + "'" in signs:
            out += [{"judge": a, "other": b, "value": float(u == v), "post": post, "seed": seed}
                    for u, v, post in zip(x, y, posts) if u and v]
    return out


# ---------------------------------------------------------------------------------------------------------------------
# copying: Ziegler's tables

def facts_right(post, text):
    """(stated facts that are right, stated facts)"""
    claims = world.read(text)[0]
    return sum(value == post["facts"][slot] for slot, value in claims), len(claims)


def start_words(text, n=3):
    return world.words(text)[:n]


def behind_preamble(post):
    """(whether the post begins with words that say nothing, its text behind them)"""
    for preamble in world.PREAMBLES:
        if post["post"].startswith(preamble):
            return True, post["post"][len(preamble):].strip()
    return False, post["post"]


def bigram_matches(summary, source, bins=12, summary_words=36, source_words=72):
    """Where bigrams of the summary stand in the source: counts [position in summary, position in source], positions in words cut into
    bins of summary_words / bins and source_words / bins; what lies beyond counts in the last one. (Ziegler's picture of copying)"""
    a, b = world.words(summary), world.words(source)
    at, out = defaultdict(list), np.zeros((bins, bins))
    for j, pair in enumerate(zip(b, b[1:])):
        at[pair].append(j)
    for i, pair in enumerate(zip(a, a[1:])):
        for j in at[pair]:
            out[min(bins - 1, i * bins // summary_words), min(bins - 1, j * bins // source_words)] += 1
    return out


def copying_units(policies, posts, labeler, seed):
    """Units of what Ziegler's tables ask of texts. policies: {name: one text per post}"""
    keys, leads, refs, out = [post_key(p) for p in posts], [lead3(p) for p in posts], [p["summary"] for p in posts], []
    preamble, rests = zip(*[behind_preamble(p) for p in posts])
    for name, texts in policies.items():
        claims, starts = [world.read(t)[0] for t in texts], [start_words(t) == start_words(p["post"]) for p, t in zip(posts, texts)]
        right = [[value == p["facts"][slot] for slot, value in c] for p, c in zip(posts, claims)]
        r1, r2, rl = rouge(texts, refs, ("rouge1", "rouge2", "rougeL")).T
        gold = [world.utility(p, t) for p, t in zip(posts, texts)]
        measures = {
            "sentence novelty": [sentence_novelty(t, p["post"]) for p, t in zip(posts, texts)],
            "bigrams copied": [copy_fraction(t, p["post"]) for p, t in zip(posts, texts)],
            "stated facts that are right": right,  # one value per fact, not per summary
            "summaries without a wrong fact": [len(r) > 0 and all(r) for r in right],
            "copies the start": starts,
            "copies the start, no preamble": [None if has else x for x, has in zip(starts, preamble)],
            "copies the start, a preamble": [x if has else None for x, has in zip(starts, preamble)],
            "copies what follows a preamble": [start_words(t) == start_words(rest) if has else None
                                               for t, rest, has in zip(texts, rests, preamble)],
            "ROUGE-1": r1, "ROUGE-2": r2, "ROUGE-L": rl, "words": [len(t.split()) for t in texts],
            "preferred to lead-3 by the gold judge": wins(gold, [world.utility(p, t) for p, t in zip(posts, leads)]),
            "preferred to the reference by the gold judge": wins(gold, [world.utility(p, t) for p, t in zip(posts, refs)]),
            "preferred to lead-3 by its labelers": [preference(labeler, *x) for x in zip(posts, texts, leads)]}
        out += [{"policy": name, "measure": measure, "value": float(v), "post": key, "seed": seed}
                for measure, values in measures.items() for key, value in zip(keys, values)
                for v in (value if isinstance(value, list) else [value]) if v is not None]
    return out


def match_map(texts, posts):
    """Mean of bigram_matches over summaries."""
    return sum(bigram_matches(t, p["post"]) for t, p in zip(texts, posts)) / len(posts)


# ---------------------------------------------------------------------------------------------------------------------
# supervised training on the labels, and judges who are strangers

def win_shares(comparisons):
    """[(post, {summary: share of its comparisons that it won})]: what all labels of a post together say."""
    won, posts = defaultdict(lambda: defaultdict(list)), {}
    for c in comparisons:
        posts[post_key(c["info"])] = c["info"]
        for k, s in enumerate(c["summaries"]):
            won[post_key(c["info"])][s["text"].strip()].append(c["choice"] == k)
    return [(posts[key], {text: float(np.mean(w)) for text, w in texts.items()}) for key, texts in won.items()]


def preferred(comparisons):
    """Summaries that won more comparisons than they lost -> [(post, text)]"""
    return [(post, text) for post, shares in win_shares(comparisons) for text, share in shares.items() if share > .5]


def most_preferred(comparisons):
    """The summary of each post that won the largest share -> [(post, text)]"""
    return [(post, max(shares, key=shares.get)) for post, shares in win_shares(comparisons)]


def best_samples(run, policy, reward_model, posts, temperature, n, generator):
    """The reward model's favourite of n samples for each post. -> [(post, text)]"""
    queries = [encode_query(run.enc, p, run.Q) for p in posts]
    samples = sample_responses(policy, queries, run.R, temperature, generator, n)
    best = score_all(reward_model, queries, samples, n).argmax(1).tolist()
    return [(p, decode_response(run.enc, samples[i * n + j]).strip()) for i, (p, j) in enumerate(zip(posts, best))]


def train_supervised(run, rows, out, device, epochs=1):
    """The SFT model trained on by SFT's own recipe on rows [(post, text)]. -> the model; a finished folder is read, not trained again"""
    if not os.path.exists(os.path.join(out, "model.safetensors")):
        posts, texts = zip(*rows)
        data = [encode_query(run.enc, p, run.Q) for p in posts], [encode_response(run.enc, t, run.R) for t in texts]
        settings = SFTSettings(**run.config["settings"]["sft"] | {"choose": "last", "epochs": epochs})
        train_lm(load_model(os.path.join(run.folder, "sft"), device), data, [x[:100] for x in data], settings, out, run.config["seed"], name="supervised")
    return load_model(out, device)


def greedy_texts(run, policy, posts):
    """One greedy summary per post."""
    generator = torch.Generator().manual_seed(run.config["seed"])
    return [decode_response(run.enc, ids) for ids in sample_responses(policy, [encode_query(run.enc, p, run.Q) for p in posts], run.R, 0, generator)]


def win_units(policies, posts, judges, seed):
    """Units: is a policy's text preferred to the reference? policies: {name: texts}; judges: {name: labelers, or None for the gold judge}"""
    return [{"policy": name, "judge": judge, "post": post_key(p), "seed": seed,
             "value": float(wins(world.utility(p, t), world.utility(p, p["summary"]))) if people is None else preference(people, p, t, p["summary"])}
            for name, texts in policies.items() for judge, people in judges.items() for p, t in zip(posts, texts)]


def accuracy_units(run, reward_model, comparisons, judges, seed):
    """Units: how probably labelers choose what the reward model prefers on held-out pairs. The gold judge is the other model there.

    judges: {name: labelers}"""
    pairs = [(c["info"], *(s["text"].strip() for s in c["summaries"])) for c in comparisons if c["split"] == "valid"]
    model = np.sign(np.subtract(*score_texts(run, reward_model, [(p, t) for p, *texts in pairs for t in texts]).reshape(-1, 2).T))
    gold = np.sign([world.utility(p, a) - world.utility(p, b) for p, a, b in pairs])
    out = []
    for judge, people in judges.items():
        first = np.array([preference(people, *pair) for pair in pairs])
        for name, sign in (("reward model", model), ("gold judge", gold)):
            out += [{"model": name, "judge": judge, "value": float(v), "post": post_key(p), "seed": seed}
                    for v, (p, _, _) in zip(.5 + sign * (first - .5), pairs)]
    return out


# ---------------------------------------------------------------------------------------------------------------------
# the ladder

def play(posts, policies, prefers):
    """A round robin on every post. prefers(post, a, b) -> 1, ½ or 0. -> for each post [(winner, loser)], a game twice, a tie once each way"""
    games = [[] for _ in posts]
    for i, post in enumerate(posts):
        for a, b in itertools.combinations(policies, 2):
            won = prefers(post, policies[a][i], policies[b][i])
            games[i] += [(a, b)] * int(2 * won) + [(b, a)] * int(2 - 2 * won)
    return games


def elo_table(games, anchor, draws=200):
    """Elo ratings, the anchor's 1000, with 95 % bootstrap intervals over posts and seeds. games [seeds][posts] of play() -> rows"""
    S, N, rng = len(games), len(games[0]), np.random.default_rng(0)

    def fit(seeds, posts):
        ratings = elo(*zip(*[game for s in seeds for i in posts for game in games[s][i]]))
        return {name: r - ratings[anchor] + 1000 for name, r in ratings.items()}

    point, many = fit(range(S), range(N)), [fit(rng.integers(0, S, S), rng.integers(0, N, N)) for _ in range(draws)]
    return [{"policy": name, "elo": r, "lo": float(np.percentile([m[name] for m in many], 2.5)),
             "hi": float(np.percentile([m[name] for m in many], 97.5)), "n": S * N} for name, r in sorted(point.items(), key=lambda kv: kv[1])]
