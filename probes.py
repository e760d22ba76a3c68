"""
What the papers asked of their judges and their copies, asked of ours: figures 7 to 11 of `python run.py figures`.

References: Stiennon 2020 §4.3-4.4, appendices G.6 and G.7; Ziegler 2019 §4 and its blog post; InstructGPT 2022 §4.1.

    reward-model probes         does a reward model notice a swapped role, a wrong fact, an empty phrase, mere length?
    agreement                   who agrees with whom on two samples of one policy: people, judge, length, copying, ROUGE, reward models
    copying                     Ziegler's tables: novelty and accuracy under honest labelers and under labelers who reward copying
    critics                     supervised training on the same labels; judges whose labels nobody trained on
    ladder                      Bradley-Terry ratings of all policies on the same posts

Measuring comes first, in functions of texts, folders and labelers; drawing comes behind it and reads nothing but measured rows.
Every rate stands beside its number n and a 95 % interval lo to hi, for other posts and other seeds.
"""
import itertools
import os
import random
import re
from collections import defaultdict

import numpy as np
import torch

import world
from data import decode_response, encode_query, encode_response, load_comparisons, one_at_a_time, pad_rows, post_key
from evaluation import (BLUE, GREEN, GREY, LABELS, ORANGE, PURPLE, RED, SKY, STUDENT, copy_fraction, crossed_ci, elo, greedy_texts, lead3,
                        new_figure, once, read_samples, rouge, save_figure, sentence_novelty, wins)
from reward import sample_responses, score_all, score_responses
from sft import SFTSettings, load_model, open_run, pick_device, train_lm

STRANGERS = 10**6  # added to a labeler's seed: workers with other weights, whose labels nothing was trained on


def rate(values, posts, seeds):
    """{mean, lo, hi, n} of values [N] of these posts and seeds."""
    lo, hi = crossed_ci(values, posts, seeds)
    return {"mean": float(np.mean(values)), "lo": lo, "hi": hi, "n": len(values)}


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
        sentence = {"feeling": "i feel {feeling}.", "wish": "i want to {wish}.", "question": "should i {question}?"}[slot]
        return f"{text} {sentence.format(**facts)}"
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
    story = world.sentences(post["post"])
    three = " ".join(story[i] for i in sorted(rng.sample(range(len(story)), min(3, len(story)))))
    stranger = rng.choice([d for d in world.DISTRACTORS if "{time2}" not in d])
    irrelevant = stranger.format(**{slot + "2": another(rng, slot, post["facts"][slot]) for slot in world.SLOTS})
    edits = {"own wrong fact corrected": correct, "planted wrong fact corrected": plant, "missing fact added": add_fact,
             "wrong statement dropped": drop_wrong, "repetition dropped": drop_repetition}
    pairs = {name: edit(rng, post, sample) for name, edit in edits.items()} | {"roles not reversed": reverse_roles(rng, post, ref)}
    pairs = {name: p for name, p in pairs.items() if p and world.utility(post, p[0]) > world.utility(post, p[1])}
    pairs |= {"empty phrase dropped": drop_filler(rng, post, sample),
              "words not shuffled": (ref, shuffle(ref.split(), rng)), "lead-3 not shuffled": (lead, shuffle(world.sentences(lead), rng)),
              "rand-3 not shuffled": (three, shuffle(world.sentences(three), rng)),
              "nothing irrelevant appended": (ref, f"{ref} {irrelevant}"),
              '"what should i do?" not appended': (ref, f"{ref} what should i do?"), "title, not another post's": (title, other["title"]),
              "title once, not twice": (title, f"{title} {title}"), "reference, not title": (ref, title),
              "reference, not lead-3": (ref, lead), "reference, not rand-3": (ref, three)}
    return {name: p for name, p in pairs.items() if p and all(p) and p[0] != p[1]}


ORDER = ["planted wrong fact corrected", "own wrong fact corrected", "missing fact added", "wrong statement dropped", "repetition dropped",
         "empty phrase dropped", "roles not reversed", "words not shuffled", "lead-3 not shuffled", "rand-3 not shuffled",
         "nothing irrelevant appended", '"what should i do?" not appended', "title, not another post's", "title once, not twice",
         "reference, not title", "reference, not lead-3", "reference, not rand-3"]
PAPER_PROBES = {  # prefer the first, in %: reward models of 1.3B and 6.7B, people (Stiennon, table 17 for edits, 16 for the rest)
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


def length_units(pairs, signs, seed):
    """Units: is the longer text of (post, a, b) the preferred one? Of all pairs, and of those that the gold judge finds equal."""
    longer, gold = (np.sign([f(p, a) - f(p, b) for p, a, b in pairs]) for f in (lambda p, t: len(t.split()), world.utility))
    return [{"judge": judge, "pairs": which, "value": float(x == l) if x else .5, "post": post_key(p), "seed": seed}
            for judge, sign in signs.items() for x, l, g, (p, _, _) in zip(sign, longer, gold, pairs) if l
            for which in (["all"] if g else ["all", "equal to the gold judge"])]


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


def people_signs(run, pairs):
    """{who: signs [N]}: +1 where a labeler prefers the first of (post, a, b), -1 the second; with a prime: the same people asked again."""
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
    signs["ROUGE-L"] = sign(lambda side: rouge([t for _, t in side], [p["summary"] for p, _ in side], ["rougeL"])[:, 0])
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

def start_words(text, n=3):
    return world.words(text)[:n]


def behind_preamble(post):
    """(whether the post begins with words that say nothing, its text behind them)"""
    for preamble in world.PREAMBLES:
        if post["post"].startswith(preamble):
            return True, post["post"][len(preamble):].strip()
    return False, post["post"]


BINS, SUMMARY_WORDS, SOURCE_WORDS = 12, 36, 60  # of the heat maps


def bigram_matches(summary, source):
    """Where bigrams of the summary stand in the source: counts [position in summary, position in source] in BINS stretches of SUMMARY_WORDS
    and of SOURCE_WORDS words; what lies beyond counts in the last one. (Ziegler's picture of copying)"""
    a, b = world.words(summary), world.words(source)
    at, out = defaultdict(list), np.zeros((BINS, BINS))
    for j, pair in enumerate(zip(b, b[1:])):
        at[pair].append(j)
    for i, pair in enumerate(zip(a, a[1:])):
        for j in at[pair]:
            out[min(BINS - 1, i * BINS // SUMMARY_WORDS), min(BINS - 1, j * BINS // SOURCE_WORDS)] += 1
    return out


def copying_units(policies, posts, judges, seed):
    """Units of what Ziegler's tables ask of texts. policies: {name: one text per post}; judges: {name: labelers}"""
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
            **{f"preferred to lead-3 by {who}": [preference(people, *x) for x in zip(posts, texts, leads)]
               for who, people in judges.items()}}
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
    """The SFT model trained on by SFT's own recipe on rows() = [(post, text)]. -> the model; what lies in `out` is not trained again"""
    if not os.path.exists(os.path.join(out, "model.safetensors")):
        posts, texts = zip(*rows())
        data = [encode_query(run.enc, p, run.Q) for p in posts], [encode_response(run.enc, t, run.R) for t in texts]
        settings = SFTSettings(**run.config["settings"]["sft"] | {"choose": "last", "epochs": epochs})
        sft, first = load_model(os.path.join(run.folder, "sft"), device), [x[:100] for x in data]
        train_lm(sft, data, first, settings, out, run.config["seed"], name="supervised")
    return load_model(out, device)


def win_units(policies, posts, judges, seed):
    """Units: is a policy's text preferred to the reference? policies: {name: texts}; judges: {name: labelers, None for the gold judge}"""
    def value(people, p, t):
        gold = people is None
        return float(wins(world.utility(p, t), world.utility(p, p["summary"]))) if gold else preference(people, p, t, p["summary"])
    return [{"policy": name, "judge": judge, "post": post_key(p), "seed": seed, "value": value(people, p, t)}
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
    """A round robin on every post. prefers(post, a, b) -> 1, ½ or 0. -> [(winner, loser)] of each post, twice, a tie once each way"""
    games = [[] for _ in posts]
    for i, post in enumerate(posts):
        for a, b in itertools.combinations(policies, 2):
            won = prefers(post, policies[a][i], policies[b][i])
            games[i] += [(a, b)] * int(2 * won) + [(b, a)] * int(2 - 2 * won)
    return games


def elo_table(games, anchor, draws=100):
    """Elo ratings, the anchor's 1000, with 95 % intervals for other posts (bootstrap) and other seeds (Student's t), as in crossed_ci.
    games [seeds][posts] of play() -> rows"""
    S, N, rng = len(games), len(games[0]), np.random.default_rng(0)

    def fit(seeds, posts):
        ratings = elo(*zip(*[game for s in seeds for i in posts for game in games[s][i]]))
        return {name: r - ratings[anchor] + 1000 for name, r in ratings.items()}

    point, redrawn = fit(range(S), range(N)), [fit(range(S), rng.integers(0, N, N)) for _ in range(draws)]
    of_seed, rows = [fit([s], range(N)) for s in range(S)], []
    for name, r in sorted(point.items(), key=lambda kv: kv[1]):
        over_posts = 1.96 * np.std([ratings[name] for ratings in redrawn])
        over_seeds = STUDENT[min(S, 10) - 2] * np.std([ratings[name] for ratings in of_seed], ddof=1) / S ** .5 if S > 1 else 0.0
        half = float(np.hypot(over_posts, over_seeds))
        rows.append({"policy": name, "elo": r, "lo": r - half, "hi": r + half, "n": S * N})
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# the figures: what is measured of which runs. lab is figures.make_lab()'s; -> {"tables": {name: rows}, "facts": {name: number}}

RM_SIZES = {"small": "small reward model", "default": "reward model"}


def reward_models(lab, seed, device):
    return {name: load_model(os.path.join(lab.labelled(seed, size), "reward"), device, "scalar") for size, name in RM_SIZES.items()}


def generator_of(run):
    return torch.Generator().manual_seed(run.config["seed"])


def temperature_of(run):
    return run.config["settings"]["ppo"]["temperature"]


def sampled_pairs(run, stage, device):
    """Pairs of samples of one of the run's policies, for posts nothing was trained on."""
    return sample_pairs(run, load_model(os.path.join(run.folder, stage), device), run.posts["test"] + run.posts["held_out"],
                        temperature_of(run), generator_of(run))


def facts_of(lab, posts, seeds=None):
    return {"posts": len(posts), "seeds": len(seeds or lab.seeds)}


def measure_probes(lab):
    units, lengths, device = [], [], pick_device(lab.device)
    for seed in lab.seeds:
        run, models = open_run(lab.finished(seed)), reward_models(lab, seed, device)
        rows, people = read_samples(run.folder), labeler_of(run)
        units += judge_probes(run, probe_pairs(rows, seed), models, people, seed)
        pairs = sampled_pairs(run, "sft", device)
        asked = [(p, t) for p, *texts in pairs for t in texts]
        signs = {name: np.sign(np.subtract(*score_texts(run, model, asked).reshape(-1, 2).T)) for name, model in models.items()}
        signs["labelers"] = people_signs(run, pairs)["labeler"]
        lengths += length_units(pairs, signs, seed)
    return {"tables": {"probes": summarise(units, "probe", "judge"), "length": summarise(lengths, "judge", "pairs")},
            "facts": facts_of(lab, rows)}


def measure_agreement(lab):
    units, device = [], pick_device(lab.device)
    for seed in lab.seeds:
        run, models = open_run(lab.finished(seed)), reward_models(lab, seed, device)
        sft = load_model(os.path.join(run.folder, "sft"), device)
        for stage in ("sft", "ppo"):
            pairs = sampled_pairs(run, stage, device)
            found = agreements(judge_pairs(run, pairs, sft, models), [post_key(p) for p, _, _ in pairs], seed)
            units += [{"samples": stage, **unit} for unit in found]
    return {"tables": {"agreement": summarise(units, "samples", "judge", "other")},
            "facts": facts_of(lab, run.posts["test"] + run.posts["held_out"])}


COPY_BIAS = 30.0  # key facts that a summary copied whole is worth to the copying labelers: they look for little else
# For honest labelers too. In one round the reward model never meets what PPO makes of it, sentences that are nearly copied, and likes them best:
# after labels on PPO's own samples it knows copies from paraphrases, and PPO goes on from there (Ziegler's online collection). It takes many
# steps before it sees at all what is copied; small steps on many, warmer rollouts and a dearer KL keep the policy from settling on a phrase.
LONGER = {"collect.rounds": 2, "collect.online": True, "reward.batch": 4, "reward.epochs": 2, "ppo.iterations": 96, "ppo.epochs": 2,
          "ppo.minibatches": 4, "ppo.lr": 2e-4, "ppo.temperature": 1.0, "ppo.beta": 0.15}
# An SFT stage that changes nothing: PPO and reward model start from the pretrained model. With sft.epochs 0 the labelers would also be
# shown other samples (all of them at PPO's temperature, see run.mixture).
UNSUPERVISED = {"sft.lr": 1e-12}


def measure_copying(lab):
    units, maps, device, seeds = [], defaultdict(list), pick_device(lab.device), lab.seeds[:1]  # one: its four runs take as long as any two other figures
    longer = {} if lab.quick or lab.preset_name == "test" else LONGER
    for seed in seeds:
        folders = {(start, labels): lab.finished(seed, until="ppo", **how, **bias, **longer)
                   for labels, bias in (("honest", {}), ("copying", {"collect.copy_bias": COPY_BIAS}))
                   for start, how in (("fine-tuned", UNSUPERVISED), ("supervised + fine-tuned", {}))}
        run = open_run(folders["supervised + fine-tuned", "honest"])
        posts = run.posts["test"]
        policies = {"reference": [p["summary"] for p in posts], "lead-3": [lead3(p) for p in posts]}
        for name, stage in (("zero-shot", "pretrained"), ("supervised", "sft")):
            policies[name] = greedy_texts(run, load_model(os.path.join(run.folder, stage), device), posts)
        for (start, labels), folder in folders.items():
            policies[f"{start}, {labels}"] = greedy_texts(run, load_model(os.path.join(folder, "ppo"), device), posts)
        judges = {"honest labelers": labeler_of(run), "copying labelers": labeler_of(run, copy_bias=COPY_BIAS)}
        units += copying_units(policies, posts, judges, seed)
        for name, texts in policies.items():
            maps[name].append(match_map(texts, posts))
    heat = [{"policy": name, "summary_bin": i, "post_bin": j, "matches": float(x), "n": len(posts) * len(seeds)}
            for name, of_seeds in maps.items() for (i, j), x in np.ndenumerate(np.mean(of_seeds, 0))]
    table = summarise(units, "policy", "measure")
    novelty = {r["policy"]: r["mean"] for r in table if r["measure"] == "sentence novelty"}
    ratio = {f"novelty_ratio_{start}": novelty[f"{start}, copying"] / max(novelty[f"{start}, honest"], 1e-9)
             for start in ("fine-tuned", "supervised + fine-tuned")}
    return {"tables": {"texts": table, "bigrams": heat}, "facts": facts_of(lab, posts, seeds) | ratio | {"copy_bias": COPY_BIAS, "longer": longer}}


BEST_OF = 8  # samples of each labelled post from which the reward model chooses what supervised training imitates


def supervised_rivals(lab, run, seed, device):
    """What becomes of the labels that PPO's reward model had without PPO: SFT trained on with what they prefer, and the reward model's
    choice among samples, made once. -> {name: texts for the test posts}, number of labels"""
    comparisons, _ = load_comparisons(os.path.join(run.folder, "comparisons.jsonl"))
    train = [c for c in comparisons if c["split"] == "train"]

    def texts():
        sft, reward_model = (load_model(os.path.join(run.folder, name), device, head) for name, head in (("sft", "lm"), ("reward", "scalar")))

        def best(posts):
            return best_samples(run, sft, reward_model, posts, temperature_of(run), BEST_OF, generator_of(run))
        rows = {"preferred": lambda: preferred(train), "most-preferred": lambda: most_preferred(train),
                "favourite": lambda: best([post for post, _ in win_shares(train)])}
        models = {name: train_supervised(run, of, os.path.join(lab.out, "runs", f"supervised-{name}-seed{seed}"), device) for name, of in rows.items()}
        return {name: greedy_texts(run, model, run.posts["test"]) for name, model in models.items()} | {
            "best_of_n": [text for _, text in best(run.posts["test"])]}
    file = os.path.join(lab.out, "runs", f"supervised-seed{seed}.json")
    with one_at_a_time(file):
        return once(file, texts), len(train)


def measure_critics(lab):
    rates, accuracy, device = [], [], pick_device(lab.device)
    for seed in lab.seeds:
        run = open_run(lab.finished(seed))
        rows, posts = read_samples(run.folder), run.posts["test"]
        rivals, labels = supervised_rivals(lab, run, seed, device)
        policies = {name: [row["policies"][name]["text"] for row in rows] for name in ("sft", "ppo")} | rivals
        judges = {"training labelers": labeler_of(run), "other labelers": labeler_of(run, run.config["seed"] + STRANGERS)}
        rates += win_units(policies, posts, {"gold judge": None} | judges, seed)
        comparisons, _ = load_comparisons(os.path.join(run.folder, "comparisons.jsonl"))
        accuracy += accuracy_units(run, load_model(os.path.join(run.folder, "reward"), device, "scalar"), comparisons, judges, seed)
    return {"tables": {"win-rates": summarise(rates, "policy", "judge"), "accuracy": summarise(accuracy, "model", "judge")},
            "facts": facts_of(lab, posts) | {"labels": labels}}


def measure_ladder(lab):
    games, units, device = {"gold judge": [], "labelers": []}, [], pick_device(lab.device)
    for seed in lab.seeds:
        run = open_run(lab.finished(seed))
        rows, small = read_samples(run.folder), read_samples(lab.finished(seed, "small"))
        posts = run.posts["test"]
        policies = {name: [row["policies"][name]["text"] for row in rows] for name in rows[0]["policies"] if name not in ("best_of_n", "sft_sampled")}
        policies |= {f"{name}, small": [row["policies"][name]["text"] for row in small] for name in ("sft", "ppo")}
        policies |= supervised_rivals(lab, run, seed, device)[0]
        people = labeler_of(run)
        people.rng = random.Random(f"ladder-{seed}")
        games["gold judge"].append(play(posts, policies, lambda p, a, b: float(wins(world.utility(p, a), world.utility(p, b)))))
        games["labelers"].append(play(posts, policies, lambda p, a, b: .5 if a == b else 1.0 - people.compare(p, a, b)[0]))
        every = [(p, *(policies[name][i] for name in people.rng.sample(list(policies), 2))) for i, p in enumerate(posts) for _ in range(4)]
        every = [(p, a, b) for p, a, b in every if a != b and a and b]
        for which, pairs in (("one policy (SFT)", sampled_pairs(run, "sft", device)), ("two policies", every)):
            signs = people_signs(run, pairs) | {"gold judge": np.sign([world.utility(p, a) - world.utility(p, b) for p, a, b in pairs])}
            units += [{"pairs": which, **unit} for unit in agreements(signs, [post_key(p) for p, _, _ in pairs], seed)]
    return {"tables": {"elo": [{"judge": judge, **row} for judge, played in games.items()
                               for row in elo_table(played, "reference")],
                       "agreement": summarise(units, "pairs", "judge", "other")}, "facts": facts_of(lab, posts)}


# ---------------------------------------------------------------------------------------------------------------------
# drawing, from measured rows alone

def percent_axis(ax, which="x"):
    axis = ax.xaxis if which == "x" else ax.yaxis
    axis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")


def point(ax, x, y, row, colour, marker, label=None, key="mean", across=True, size=5):
    """A mean with its interval, lying (across) or standing."""
    low, high = max(0, row[key] - row["lo"]), max(0, row["hi"] - row[key])
    ax.errorbar(row[key] if across else x, y if across else row[key], **{"xerr" if across else "yerr": [[low], [high]]}, color=colour,
                marker=marker, ms=size, ls="", capsize=2, lw=1.2, label=label)


def draw_probes(measured, path):
    rows = {(r["probe"], r["judge"]): r for r in measured["tables"]["probes"]}
    probes = list(dict.fromkeys(probe for probe, _ in rows))
    probes = [p for p in ORDER if p in probes]
    figure, ((ax, right),) = new_figure(columns=2, width=5.6, height=7.2)
    judges = [("gold judge", GREY, "D"), ("labelers", GREEN, "s"), (RM_SIZES["small"], ORANGE, "^"), (RM_SIZES["default"], BLUE, "o")]
    for i, probe in enumerate(probes):
        for k, (judge, colour, marker) in enumerate(judges):
            if (probe, judge) in rows:
                point(ax, None, -i - .16 * (k - 1.5), rows[probe, judge], colour, marker, judge if i == 0 else None, size=4)
        for x, marker, colour, label in zip(PAPER_PROBES.get(probe, ()), "vP*", (SKY, RED, PURPLE), ("1.3B", "6.7B", "people")):
            if x is not None:
                ax.plot(x / 100, -i + .38, marker=marker, color=colour, ls="", ms=5,
                        label=f"paper, {label}" if probe == "missing fact added" else None)
    for i in range(len(probes) - 1):
        ax.axhline(-i - .5, color=GREY, lw=.3)
    ax.set_yticks([-i for i in range(len(probes))], probes)
    ax.axvline(.5, color=GREY, ls="--", lw=1)
    ax.set(xlabel="share of pairs on which the text named first is preferred", xlim=(-.03, 1.03), ylim=(-len(probes) + .4, .6))
    percent_axis(ax)
    ax.grid(axis="y", visible=False)
    ax.legend(frameon=False, ncols=4, loc="lower left", bbox_to_anchor=(-.75, 1), fontsize=8, columnspacing=1, handletextpad=.3)
    lengths = measured["tables"]["length"]
    for i, judge in enumerate(dict.fromkeys(r["judge"] for r in lengths)):
        for k, (which, colour, marker) in enumerate((("all", GREY, "D"), ("equal to the gold judge", BLUE, "o"))):
            for row in lengths:
                if (row["judge"], row["pairs"]) == (judge, which):
                    label = "all pairs" if which == "all" else f"pairs {which}"
                    point(right, None, -i - .2 * (k - .5), row, colour, marker, label if i == 0 else None)
    names = list(dict.fromkeys(r["judge"] for r in lengths))
    right.set_yticks([-i for i in range(len(names))], names)
    right.axvline(.5, color=GREY, ls="--", lw=1)
    right.set(xlabel="share of pairs of SFT samples on which\nthe longer one is preferred", xlim=(0, 1), ylim=(-len(names) + .4, .6))
    percent_axis(right)
    right.legend(frameon=False, loc="lower left", bbox_to_anchor=(-.1, 1), fontsize=8)
    right.set_box_aspect(.6)
    right.set_anchor("N")
    save_figure(figure, path)


def draw_agreement(measured, path):
    rows = measured["tables"]["agreement"]
    figure, (axes,) = new_figure(columns=2, width=7.6, height=7)
    for ax, stage in zip(axes, ("sft", "ppo")):
        mine = {(r["judge"], r["other"]): r for r in rows if r["samples"] == stage}
        names = list(dict.fromkeys(name for pair in mine for name in pair))
        cells = np.full((len(names), len(names)), np.nan)
        for (a, b), r in mine.items():
            i, j = names.index(a), names.index(b)
            cells[i, j] = cells[j, i] = 100 * r["mean"]
        shown = ax.imshow(np.ma.masked_invalid(cells), cmap="PuOr_r", vmin=0, vmax=100)
        for i, j in itertools.product(range(len(names)), repeat=2):
            if cells[i, j] == cells[i, j]:
                r = mine.get((names[i], names[j])) or mine[names[j], names[i]]
                half = 50 * (r["hi"] - r["lo"])
                ax.text(j, i, f"{cells[i, j]:.0f}\n±{half:.0f}", ha="center", va="center", fontsize=7,
                        color="white" if abs(cells[i, j] - 50) > 35 else "black", linespacing=.9)
        ax.set_xticks(range(len(names)), names, rotation=40, ha="right")
        ax.set_yticks(range(len(names)), names if stage == "sft" else [""] * len(names))
        ax.set_title({"sft": "two samples of the SFT policy", "ppo": "two samples of the PPO policy"}[stage])
        ax.grid(visible=False)
        figure.colorbar(shown, ax=ax, shrink=.8, label="pairs on which both prefer the same text (%)")
    save_figure(figure, path)


def label_copying(name):
    return name + " labelers" * (", " in name)


def draw_copying(measured, path):
    rows = {(r["policy"], r["measure"]): r for r in measured["tables"]["texts"]}
    names = list(dict.fromkeys(policy for policy, _ in rows))
    figure, axes = new_figure(columns=4, rows=3, width=4.1, height=3.6)
    panels = [
        ("share of its sentences\nthat are not in the post", [("sentence novelty", BLUE, "o", None)]),
        ("share that is right", [("stated facts that are right", BLUE, "o", "of stated facts, right"),
                      ("summaries without a wrong fact", ORANGE, "^", "of summaries, without a wrong fact")]),
        ("share of summaries whose\nfirst three words are", [("copies the start, no preamble", GREY, "D", "the post's, no preamble"),
                                          ("copies the start, a preamble", ORANGE, "^", "the post's, a preamble"),
                                          ("copies what follows a preamble", BLUE, "o", "those behind the preamble")]),
        ("preferred to lead-3;\nROUGE-L with the reference",
         [("preferred to lead-3 by the gold judge", GREY, "D", "by the gold judge"),
          ("preferred to lead-3 by honest labelers", BLUE, "o", "by honest labelers"),
          ("preferred to lead-3 by copying labelers", ORANGE, "^", "by copying labelers"),
          ("ROUGE-L", PURPLE, "s", "ROUGE-L (F1)")])]
    for k, (ax, (title, series)) in enumerate(zip(axes[0], panels)):
        for m, (measure, colour, marker, label) in enumerate(series):
            for i, name in enumerate(names):
                if (name, measure) in rows:
                    y = -i - .16 * (m - (len(series) - 1) / 2)
                    point(ax, None, y, rows[name, measure], colour, marker, label if i == 0 else None, size=4)
        ax.set_yticks([-i for i in range(len(names))], [label_copying(n) for n in names] if k == 0 else [""] * len(names))
        ax.set(xlabel=title, xlim=(-.04, 1.04), ylim=(-len(names) + .4, .6))
        percent_axis(ax)
        if len(series) > 1 and ax.get_legend_handles_labels()[0]:
            ax.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(.5, 1))
    heat = measured["tables"]["bigrams"]
    top = max(np.quantile([r["matches"] for r in heat], .995), 1e-9)
    bins = 1 + max(r["post_bin"] for r in heat)
    for ax, name in zip(axes[1:].flat, names):
        cells = np.zeros((bins, bins))
        for r in heat:
            if r["policy"] == name:
                cells[r["summary_bin"], r["post_bin"]] = r["matches"]
        extent = (0, SOURCE_WORDS, 0, SUMMARY_WORDS)
        shown = ax.imshow(cells, origin="lower", aspect="auto", cmap="cividis", vmin=0, vmax=top, extent=extent)
        ax.set_title(label_copying(name), fontsize=9)
        ax.set(xlabel="word of the post", ylabel="word of the summary")
        ax.grid(visible=False)
        figure.colorbar(shown, ax=ax, label="bigram matches per summary")
    save_figure(figure, path)


RIVALS = {"sft": "SFT", "preferred": "SFT on samples and references\nthat won more than they lost",
          "most-preferred": "SFT on each post's most\npreferred sample or reference",
          "favourite": f"SFT on the reward\nmodel's best of {BEST_OF}",
          "best_of_n": f"best of {BEST_OF}, not trained on", "ppo": "PPO"}
JUDGES = (("gold judge", GREY, "D"), ("training labelers", BLUE, "o"), ("other labelers", ORANGE, "^"))


def draw_critics(measured, path):
    rates = {(r["policy"], r["judge"]): r for r in measured["tables"]["win-rates"]}
    accuracy = {(r["model"], r["judge"]): r for r in measured["tables"]["accuracy"]}
    figure, ((left, right),) = new_figure(columns=2, width=6, height=3.8)
    for ax, rows, names in ((left, rates, {name: label for name, label in RIVALS.items() if (name, "gold judge") in rates}),
                            (right, accuracy, {"reward model": "reward model", "gold judge": "gold judge:\nwhat noise leaves"})):
        for k, (judge, colour, marker) in enumerate(JUDGES):
            for i, name in enumerate(names):
                if (name, judge) in rows:
                    point(ax, None, -i - .2 * (k - 1), rows[name, judge], colour, marker, judge if i == 0 else None)
        ax.set_yticks([-i for i in range(len(names))], names.values())
        ax.axvline(.5, color=GREY, ls="--", lw=1)
        ax.set(ylim=(-len(names) + .4, .6))
        percent_axis(ax)
        ax.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(.5, 1), ncols=3)
    left.set(xlabel="share of posts preferred to the reference", xlim=(0, 1))
    right.set(xlabel="agreement with labels on held-out pairs")
    save_figure(figure, path)


def ladder_name(name):
    plain, _, size = name.partition(", ")
    return RIVALS.get(plain, LABELS.get(plain, plain)).replace("\n", " ") + (f", {size} model" if size else "")


def draw_ladder(measured, path):
    rows = {(r["policy"], r["judge"]): r for r in measured["tables"]["elo"]}
    names = [r["policy"] for r in measured["tables"]["elo"] if r["judge"] == "gold judge"]
    figure, ((left, right),) = new_figure(columns=2, width=6, height=4.4)
    for k, (judge, colour, marker) in enumerate((("gold judge", BLUE, "o"), ("labelers", ORANGE, "^"))):
        for i, name in enumerate(names):
            point(left, None, i - .2 * (k - .5), rows[name, judge], colour, marker, judge if i == 0 else None, key="elo")
    left.axvline(1000, color=GREY, ls="--", lw=1)
    left.set_yticks(range(len(names)), [ladder_name(n) for n in names])
    elos = [r["elo"] for r in measured["tables"]["elo"]]  # whoever wins or loses all has an interval without end, which may leave the picture
    low, high = max(left.get_xlim()[0], min(elos) - 400), min(left.get_xlim()[1], max(elos) + 400)
    left.set(xlabel="Elo rating (reference = 1000; 400 points are odds of 10 to 1)", xlim=(low, high))
    left.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(.5, 1), ncols=2)
    agreement = {(r["pairs"], r["judge"], r["other"]): r for r in measured["tables"]["agreement"]}
    kinds = [("labeler", "labeler"), ("labeler", "other labeler"), ("other labeler", "other labeler"), ("labeler", "gold judge"),
             ("other labeler", "gold judge"), ("majority of 3", "gold judge")]
    for k, (pairs, colour, marker) in enumerate((("one policy (SFT)", BLUE, "o"), ("two policies", ORANGE, "^"))):
        for i, (a, b) in enumerate(kinds):
            if (pairs, a, b) in agreement:
                point(right, None, -i - .2 * (k - .5), agreement[pairs, a, b], colour, marker, f"texts of {pairs}" if i == 0 else None)
    right.set_yticks([-i for i in range(len(kinds))], [f"{a} and\n{'another' if a == b else b}" for a, b in kinds], fontsize=8)
    right.set(xlabel="pairs on which both prefer the same text", xlim=(.5, 1))
    percent_axis(right)
    right.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(.5, 1), ncols=2)
    save_figure(figure, path)


# ---------------------------------------------------------------------------------------------------------------------
# captions: what the paper's picture looks like, what ours says, where they differ

def find(measured, table, **where):
    """The row of a table with these values, None where there is none."""
    return next((r for r in measured["tables"][table] if all(r[k] == v for k, v in where.items())), None)


def says(row):
    """'61 % (57 to 65)' of a row"""
    if row is None:
        return "not measured"
    return "{:.0f} % ({:.0f} to {:.0f})".format(*(100 * row[key] for key in ("mean", "lo", "hi")))


def over(facts):
    """What intervals are over."""
    return "posts and, by Student's t, seeds" if facts["seeds"] > 1 else "posts"


def basis(measured):
    f = measured["facts"]
    return (f"{f['posts']} posts, {f['seeds']} seed{'s' * (f['seeds'] > 1)} of labels, reward model and PPO; in brackets and as bars 95 % "
            f"intervals over {over(f)}; n is in the tables.")


def caption_probes(measured):
    def rm(probe):
        return says(find(measured, "probes", probe=probe, judge=RM_SIZES["default"]))

    def length(judge):
        return says(find(measured, "length", judge=judge, pairs="equal to the gold judge"))

    def shown(probe):
        row = find(measured, "probes", probe=probe, judge=RM_SIZES["default"])
        return "" if row and row["lo"] > .5 else "not "
    return ("In the paper (Stiennon 2020, tables 16 and 17) reward models notice reversed roles (93 to 97 %), shuffled sentences (61 to "
            "76 %) and another post's title (97 to 99 %), like improving edits that lengthen (87 to 89 %; people 89 %) and much less "
            "those that shorten (64 to 66 %; people 76 %; the paper's body gives other numbers than its tables, the tables are drawn "
            f"here), and the smaller one likes a useless last question (34 %). Ours: adding a missing fact {rm('missing fact added')}, "
            f"dropping a wrong statement {rm('wrong statement dropped')}, dropping a repetition {rm('repetition dropped')}, correcting a "
            f"planted wrong fact {rm('planted wrong fact corrected')}, words not shuffled {rm('words not shuffled')}, roles not reversed "
            f"{rm('roles not reversed')}, no useless question {rm(chr(34) + 'what should i do?' + chr(34) + ' not appended')}. By "
            f"intervals above 50 % it is {shown('missing fact added')}shown that ours notices whether a fact is stated, and "
            f"{shown('planted wrong fact corrected')}shown that it checks it against the post. Bias to length: where the gold judge sees "
            f"no difference the longer of two SFT samples (of test and held-out posts) is preferred by the reward model on {length(RM_SIZES['default'])}, by labelers "
            f"on {length('labelers')}. The world made the edits, and the judge found each an improvement; he does not mind an empty phrase "
            "or the order of sentences, where 50 % is right. Labelers, on the left: the probability that a worker prefers the first. "
            + basis(measured))


def caption_agreement(measured):
    def cell(stage, a, b):
        return says(find(measured, "agreement", samples=stage, judge=a, other=b))
    rm = RM_SIZES["default"]
    return ("In the paper (Stiennon 2020, tables 20 and 22) labelers agree with another labeler on 69 %, with researchers on 78 %, with "
            "the 1.3B and 6.7B reward models on 66 and 71 %, with length on 54 %, copying 58 %, ROUGE 58 %, log-probability 59 to 62 % "
            "of pairs of SFT samples; on samples of PPO all of these fall (length 56, copying 53, ROUGE 50, log-probability 47 to 48, "
            f"reward models 57 to 62 %). Ours, labelers on SFT samples: another labeler {cell('sft', 'labeler', 'labeler')}, gold judge "
            f"{cell('sft', 'labeler', 'gold judge')}, reward model {cell('sft', 'labeler', rm)}, length "
            f"{cell('sft', 'labeler', 'length')}, copying {cell('sft', 'labeler', 'copying')}, ROUGE-L "
            f"{cell('sft', 'labeler', 'ROUGE-L')}, log-probability {cell('sft', 'labeler', 'log π SFT')}. On PPO samples: another labeler "
            f"{cell('ppo', 'labeler', 'labeler')}, gold judge {cell('ppo', 'labeler', 'gold judge')}, reward model "
            f"{cell('ppo', 'labeler', rm)}, length {cell('ppo', 'labeler', 'length')}, copying {cell('ppo', 'labeler', 'copying')}, "
            f"ROUGE-L {cell('ppo', 'labeler', 'ROUGE-L')}, log-probability {cell('ppo', 'labeler', 'log π SFT')}. Two different samples "
            "of one policy at the rollout temperature for each post; pairs in which a judge sees no difference are left out. The gold "
            "judge takes the part of the researchers; other labelers are workers with other weights. "
            + basis(measured))


def caption_copying(measured):
    f = measured["facts"]

    def of(policy, measure):
        return says(find(measured, "texts", policy=policy, measure=measure))
    novelty = {name: of(name, "sentence novelty") for name in dict.fromkeys(r["policy"] for r in measured["tables"]["texts"])}
    ratio = f["novelty_ratio_supervised + fine-tuned"]
    longer = ("All four were trained with " + ", ".join(f"{key} {x}".lower() for key, x in f["longer"].items())
              + ", which leaves PPO time to find what is hardly sampled at first. ") if f["longer"] else ""
    return ("In Ziegler 2019 (tables and blog post) the novel sentences of TL;DR summaries are 98.9 % for references, 96.3 % zero-shot, "
            "29.0 % fine-tuned, 96.9 % supervised, 94.0 % supervised + fine-tuned; accurate are 6, 26, 8 and 11 of 30 summaries of the "
            "last four; the fine-tuned model copies the start of 28 % of posts and of 0.2 % behind an empty preamble; labelers prefer "
            "lead-3, supervised + fine-tuned beats it by ROUGE. "
            "Ours, novel sentences: " + ", ".join(f"{label_copying(name)} {x}" for name, x in novelty.items()) +
            f". The copying labelers hold a summary copied whole to be worth {f['copy_bias']:.0f} key facts (collect.copy_bias) and leave "
            f"of the honest ones' sentence novelty {ratio:.0%} (supervised + fine-tuned) and {f['novelty_ratio_fine-tuned']:.0%} "
            f"(fine-tuned). {longer}Stated facts that are right: supervised + fine-tuned "
            f"{of('supervised + fine-tuned, honest', 'stated facts that are right')} honest and "
            f"{of('supervised + fine-tuned, copying', 'stated facts that are right')} copying. Lead-3: by ROUGE-L "
            f"{of('lead-3', 'ROUGE-L')} against {of('supervised + fine-tuned, honest', 'ROUGE-L')}; preferred to it are the summaries of "
            "supervised + fine-tuned for copying labelers by the gold judge on "
            f"{of('supervised + fine-tuned, copying', 'preferred to lead-3 by the gold judge')}, by the copying labelers on "
            f"{of('supervised + fine-tuned, copying', 'preferred to lead-3 by copying labelers')}. Lower panels: where bigrams of a "
            f"summary stand in the post, mean per summary, cells of {SUMMARY_WORDS // BINS} by {SOURCE_WORDS // BINS} words; every equal pair counts "
            "(the blog draws longest common subsequences). Fine-tuned: "
            "reward model and PPO start from the pretrained model, the KL penalty is to it. Greedy decoding. " + basis(measured))


def caption_critics(measured):
    def of(policy, judge="gold judge"):
        return says(find(measured, "win-rates", policy=policy, judge=judge))

    def accuracy(judge, model="reward model"):
        return says(find(measured, "accuracy", model=model, judge=judge))
    return (f"Not in the papers; their critics asked for it. Left: the same labels ({measured['facts']['labels']:,} of the last seed), used without PPO. "
            f"Preferred to the reference by the gold judge: SFT {of('sft')}, trained on with samples and references that won more "
            f"comparisons than they lost {of('preferred')}, with the most preferred of each post {of('most-preferred')}, with the reward "
            f"model's favourite of {BEST_OF} samples {of('favourite')}; PPO {of('ppo')}. All start from the SFT model, the "
            "supervised ones by its own recipe, one pass. Right, and by colour: judges who are not the training labelers, workers with "
            f"other weights for the facts. The reward model agrees with labels of the training labelers on "
            f"{accuracy('training labelers')}, of the others on {accuracy('other labelers')} of held-out posts' pairs (InstructGPT 72.4 and 69.6 %), the gold judge on "
            f"{accuracy('training labelers', 'gold judge')} and {accuracy('other labelers', 'gold judge')}; PPO is preferred to the "
            f"reference by the training labelers on {of('ppo', 'training labelers')}, by the others on {of('ppo', 'other labelers')}. "
            "Labelers count with the probability that a worker prefers the text. Greedy decoding, best of n at the rollout temperature. "
            + basis(measured))


def caption_ladder(measured):
    gold = [r for r in measured["tables"]["elo"] if r["judge"] == "gold judge"]
    far, near = (max(elos) - min(elos) for who in ("gold judge", "labelers")
                 for elos in [[r["elo"] for r in measured["tables"]["elo"] if r["judge"] == who]])

    def agree(pairs, a, b):
        return says(find(measured, "agreement", pairs=pairs, judge=a, other=b))
    return ("None of the papers rates its policies by Elo; agreement is in Stiennon 2020, appendix C (labelers and researchers 77 %, "
            "labelers among themselves 72 %, three labelers' majority and researchers 84 %). Left: Bradley-Terry ratings from a round "
            "robin of all policies on the same posts, a tie half a win for both; by the gold judge "
            + ", ".join(f"{ladder_name(r['policy'])} {r['elo']:.0f} ({r['lo']:.0f} to {r['hi']:.0f})" for r in gold) +
            f". From lowest to highest it is {far:.0f} points by the gold judge and {near:.0f} by labelers"
            + (", whose noise makes games more even" if near < far else "") + ". Right (SFT samples of test and held-out posts): two labelers of one population "
            f"agree on {agree('one policy (SFT)', 'labeler', 'labeler')} of pairs of SFT samples, a labeler and the gold judge on "
            f"{agree('one policy (SFT)', 'labeler', 'gold judge')}, the majority of three and the judge on "
            f"{agree('one policy (SFT)', 'majority of 3', 'gold judge')}; on texts of two policies "
            f"{agree('two policies', 'labeler', 'labeler')}, {agree('two policies', 'labeler', 'gold judge')} and "
            f"{agree('two policies', 'majority of 3', 'gold judge')}. " + basis(measured))
