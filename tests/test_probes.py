"""probes.py: every measurement finds what was planted, and nothing where nothing was."""
import itertools
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import full_summary, tiny_model

import probes
import world
from data import encode_query, encode_response, pad_rows, post_key
from evaluation import lead3

POSTS = world.make_posts(40, 3, "t")


def run_of(enc, **collect):
    s = {"noise": .95, "length_bias": 0.0, "copy_bias": 0.0, "flipped": False} | collect
    return SimpleNamespace(enc=enc, Q=600, R=60, config={"seed": 5, "settings": {"collect": s}})


# --- rates


def test_rate_is_over_posts_and_seeds():
    """Catches an interval that takes one post's values, or one seed's, for independent ones."""
    by_post, names = np.random.default_rng(0).random(100), [f"p{i}" for i in range(100)]
    one, copies = probes.rate(by_post, names, [1] * 100), probes.rate(np.tile(by_post, 3), names * 3, np.repeat([1, 2, 3], 100))
    assert one["n"] == 100 and one["mean"] == pytest.approx(by_post.mean()) and one["lo"] < one["mean"] < one["hi"]
    assert copies | {"n": 100} == pytest.approx(one) and copies["n"] == 300  # three seeds that say the same
    seeds = probes.rate(np.repeat([.4, .5, .6], 100), names * 3, np.repeat([1, 2, 3], 100))  # seeds that differ, posts that do not
    assert seeds["hi"] - seeds["lo"] > .4 and seeds["mean"] == pytest.approx(.5)


def test_preference_is_what_labelers_do():
    """Catches a lost noise, a forgotten worker, the sign: frequencies of Labeler.compare."""
    people = world.Labeler(noise=4.0, workers=4, spread=1.0, copy_bias=1.0, seed=1)
    for post in POSTS[:2]:
        a, b = full_summary(post), lead3(post)
        often = np.mean([people.compare(post, a, b)[0] == 0 for _ in range(2500)])
        assert probes.preference(people, post, a, b) == pytest.approx(often, abs=.04)
        assert probes.preference(people, post, a, a) == .5
        assert probes.preference(people, post, a, b) + probes.preference(people, post, b, a) == pytest.approx(1)


def test_identical_policies_win_half(enc):
    """Catches ties that do not count one half, for the judge and for labelers."""
    texts = [p["summary"] for p in POSTS]
    judges = {"gold judge": None, "labelers": world.Labeler(seed=1)}
    table = probes.summarise(probes.win_units({"same": texts}, POSTS, judges, 1), "policy", "judge")
    assert len(table) == 2 and all((r["mean"], r["lo"], r["hi"], r["n"]) == (.5, .5, .5, 40) for r in table)
    better = probes.win_units({"full": [full_summary(p) for p in POSTS], "worst": ["cat"] * 40}, POSTS, judges, 1)
    means = {(r["policy"], r["judge"]): r["mean"] for r in probes.summarise(better, "policy", "judge")}
    assert min(means["full", j] for j in judges) > .8 and max(means["worst", j] for j in judges) < .1


# --- probes of reward models


def test_edits_do_what_they_say():
    """Catches an edit that does not improve, touches more than one thing, or has the longer side where the shorter should be."""
    rng, seen = random.Random(0), {}
    for post, other in zip(POSTS, POSTS[1:]):
        wrong = probes.replace_value(post["summary"], post["facts"]["verb"], probes.another(rng, "verb", post["facts"]["verb"]))
        for name, (a, b) in probes.text_probes(post, other, {"reference": post["summary"], "sample": wrong}, rng).items():
            seen.setdefault(name, []).append((post, a, b))
    assert set(seen) == set(probes.ORDER)
    for name, sign in {"missing fact added": 1, "wrong statement dropped": -1, "repetition dropped": -1, "empty phrase dropped": -1,
                       "own wrong fact corrected": 0, "planted wrong fact corrected": 0, "roles not reversed": 0, "words not shuffled": 0,
                       "title once, not twice": -1, '"what should i do?" not appended': -1}.items():
        for post, a, b in seen[name]:
            longer = len(world.words(a)) - len(world.words(b))
            assert longer * sign > 0 if sign else name.endswith("corrected") or longer == 0
            if name != "empty phrase dropped":
                assert world.utility(post, a) > world.utility(post, b), (name, a, b)
    for post, a, b in seen["own wrong fact corrected"]:
        assert [w for w in zip(a.split(), b.split()) if w[0] != w[1]] != [] and world.tally(post, a)["contradictions"] == 0
        assert post["facts"]["verb"] in a and post["facts"]["verb"] not in b
    for post, a, b in seen["missing fact added"]:
        gained = [world.tally(post, t)["covered"] for t in (a, b)]
        assert sum(gained[0].values()) == sum(gained[1].values()) + 1
    for post, a, b in seen["wrong statement dropped"]:
        assert world.tally(post, b)["contradictions"] == world.tally(post, a)["contradictions"] + 1
    for post, a, b in seen["roles not reversed"] + seen["words not shuffled"]:
        assert sorted(a.replace(",", "").split()) != [] and sorted(world.words(a)) == sorted(world.words(b)) and a != b


def test_probes_find_a_planted_taste(enc, monkeypatch):
    """Catches judges of the wrong pair, the wrong side, the wrong post: reward models that are length, its opposite, and the gold judge."""
    rows = [{"post": p, "policies": {"reference": {"text": p["summary"]}, "sft": {"text": p["summary"]}}} for p in POSTS]
    tastes = {"longer": lambda p, t: len(t.split()), "shorter": lambda p, t: -len(t.split()), "gold": world.utility,
              "none": lambda p, t: 0.}
    monkeypatch.setattr(probes, "score_texts", lambda run, model, asked: np.array([tastes[model](*x) for x in asked]))
    people = world.Labeler(seed=1)
    units = probes.judge_probes(None, probes.probe_pairs(rows, 1), {name: name for name in tastes}, people, 1)
    table = {(r["probe"], r["judge"]): r for r in probes.summarise(units, "probe", "judge")}
    for probe, longer_wins in (("missing fact added", 1), ("repetition dropped", 0), ("empty phrase dropped", 0),
                               ("reference, not title", 1)):
        assert table[probe, "longer"]["mean"] == pytest.approx(longer_wins, abs=.06)
        assert table[probe, "shorter"]["mean"] == pytest.approx(1 - longer_wins, abs=.06)
    for probe in probes.ORDER:
        if (probe, "gold") in table:
            assert table[probe, "gold"]["mean"] == table[probe, "gold judge"]["mean"] and table[probe, "none"]["mean"] == .5
    assert table["planted wrong fact corrected", "gold"]["mean"] == 1 > table["planted wrong fact corrected", "labelers"]["mean"] > .8
    assert table["planted wrong fact corrected", "longer"]["mean"] == pytest.approx(.5, abs=.1)


def test_length_units_find_a_planted_bias():
    """Catches shorter for longer, and pairs in the class of ties that the judge does not find equal."""
    pairs = [(p, p["summary"], f"{p['summary']} my boss got a new job.") for p in POSTS]  # the judge minds it beyond 36 words only
    pairs += [(p, b, a) for p, a, b in pairs] + [(p, a, a) for p, a, _ in pairs]
    longer = np.sign([len(a) - len(b) for _, a, b in pairs])
    units = probes.length_units(pairs, {"likes": longer, "hates": -longer, "does not care": 0 * longer}, 1)
    table = {(r["judge"], r["pairs"]): r for r in probes.summarise(units, "judge", "pairs")}
    equal = sum(world.utility(p, a) == world.utility(p, b) and a != b for p, a, b in pairs)
    assert 10 < equal < 80 and table["likes", "equal to the gold judge"]["n"] == equal and table["likes", "all"]["n"] == 80
    assert [table[who, "all"]["mean"] for who in ("likes", "hates", "does not care")] == [1, 0, .5]


def test_scores_belong_to_their_texts(enc):
    """Catches scores of other texts or posts where posts have unequal numbers of texts and some repeat."""
    model = tiny_model("scalar", vocab_size=enc.n_vocab, n_positions=700)
    asked = [(POSTS[i % 5], t) for i in range(12) for t in ("cat", POSTS[i % 5]["summary"], lead3(POSTS[i % 5]))[:1 + i % 3]]
    run = run_of(enc)
    found = probes.score_texts(run, model, asked, batch=2)
    for (post, text), score in zip(asked, found):
        tokens, lengths = pad_rows([encode_query(enc, post, run.Q) + encode_response(enc, text, 100)])
        assert model.scores(tokens, lengths).item() == pytest.approx(score, abs=1e-4)


# --- agreement


def test_agreement_of_planted_judges():
    """Catches pairs without a difference counted, a diagonal that compares a labeler with themselves, n of another cell."""
    rng = np.random.default_rng(0)
    truth, flips = rng.choice([-1, 1], 3000), lambda p: np.where(rng.random(3000) < p, -1, 1)
    truth[:300] = 0
    noisy = np.where(truth == 0, rng.choice([-1, 1], 3000), truth)
    signs = {"labeler": noisy * flips(.2), "labeler'": noisy * flips(.2), "gold judge": truth, "contrary": -truth}
    table = {(r["judge"], r["other"]): r for r in probes.summarise(probes.agreements(signs, range(3000), 1), "judge", "other")}
    assert set(table) == {("labeler", "labeler"), ("labeler", "gold judge"), ("labeler", "contrary"), ("gold judge", "contrary")}
    assert table["labeler", "gold judge"]["mean"] == pytest.approx(.8, abs=.03) and table["labeler", "gold judge"]["n"] == 2700
    assert table["labeler", "labeler"]["mean"] == pytest.approx(.8 ** 2 + .2 ** 2, abs=.03) and table["labeler", "labeler"]["n"] == 3000
    assert table["gold judge", "contrary"]["mean"] == 0
    assert table["labeler", "contrary"]["mean"] == pytest.approx(.2, abs=.03)


def test_metrics_judge_the_right_text(enc):
    """Catches a metric with the sign turned or the reference of another post: the first text is longer, copied, and holds it."""
    model, reward_model = (tiny_model(head, vocab_size=enc.n_vocab, n_positions=700) for head in ("lm", "scalar"))
    pairs = [(p, f"{p['summary']} {lead3(p)}", "cat dog") for p in POSTS[:6]]
    run = run_of(enc, noise=1e-3)
    run.R = 200  # nothing is cut off
    signs = probes.judge_pairs(run, pairs, model, {"rm": reward_model})
    for name in ("length", "copying", "ROUGE-L"):
        assert signs[name].tolist() == [1] * 6, name
    back = probes.judge_pairs(run, [(p, b, a) for p, a, b in pairs], model, {"rm": reward_model})
    for name in ("length", "copying", "ROUGE-L", "log π SFT", "rm", "gold judge"):
        assert (back[name] == -signs[name]).all(), name
    clear = np.array([abs(world.utility(p, a) - world.utility(p, b)) > 1 for p, a, b in pairs])
    for name in ("labeler", "labeler'", "other labeler", "majority of 3"):  # without noise labelers see what the judge sees
        assert clear.sum() >= 3 and (signs[name] == signs["gold judge"])[clear].all(), name
    pairs, alike = [(p, p["summary"], other["summary"]) for p, other in zip(POSTS, POSTS[1:])], 0
    said = probes.judge_pairs(run, pairs, model, {})["log π SFT"]
    for (post, *texts), sign in zip(pairs, said):
        sums, lengths = [], []
        for text in texts:
            q, r = encode_query(enc, post, run.Q), encode_response(enc, text, run.R)
            tokens, length = pad_rows([q + r])
            sums.append(model.logprobs(tokens, length - len(r), length, len(r)).sum().item())
            lengths.append(len(r))
        assert sign == np.sign(sums[0] / lengths[0] - sums[1] / lengths[1])
        alike += sign == np.sign(sums[0] - sums[1])
    assert alike < len(pairs)  # so the mean is not the sum


def test_strangers_are_other_people(enc):
    """Catches held-out judges who are the training labelers."""
    run = run_of(enc)
    own, again, others = probes.labeler_of(run), probes.labeler_of(run), probes.labeler_of(run, 5 + probes.STRANGERS)
    assert own.weights == again.weights != others.weights and own.noise == others.noise == .95
    assert probes.labeler_of(run_of(enc, copy_bias=3.0)).copy_bias == 3 and probes.labeler_of(run, copy_bias=4.0).copy_bias == 4


# --- copying


def test_bigram_matches_by_hand():
    """Catches positions of the wrong text, axes exchanged, a bigram lost that stands in the source twice or beyond the last bin."""
    source = " ".join(f"w{i}" for i in range(58)) + " x y x y"  # words 58 to 61
    heat = probes.bigram_matches("w10 w11 new x y", source)  # bigrams 0 and 3 of the summary match
    cell_s, cell_p = probes.SUMMARY_WORDS / probes.BINS, probes.SOURCE_WORDS / probes.BINS
    expected = np.zeros((probes.BINS, probes.BINS))
    expected[0, int(10 // cell_p)] += 1
    expected[int(3 // cell_s), probes.BINS - 1] += 2
    assert (heat == expected).all()
    assert probes.bigram_matches("a b", "c d").sum() == 0
    long = " ".join(f"w{i}" for i in range(50))
    assert probes.bigram_matches(long, long).sum() == 49 and probes.bigram_matches(long, long)[-1, -3:].sum() > 0


def test_copying_table_on_planted_writers():
    """Catches novelty of the copier and of the original writer exchanged, facts counted per summary, preambles of other posts."""
    verbs = [p["facts"]["verb"] for p in POSTS]
    wrong = [probes.replace_value(full_summary(p), v, probes.another(random.Random(0), "verb", v)) for p, v in zip(POSTS, verbs)]
    behind = [probes.behind_preamble(p)[1] for p in POSTS]
    policies = {"copier": [lead3(p) for p in POSTS], "liar": wrong, "skipper": behind, "reference": [p["summary"] for p in POSTS]}
    judges = {"honest labelers": world.Labeler(seed=1), "copying labelers": world.Labeler(seed=1, copy_bias=50.)}
    units = probes.copying_units(policies, POSTS, judges, 1)
    table = {(r["policy"], r["measure"]): r for r in probes.summarise(units, "policy", "measure")}
    assert table["copier", "sentence novelty"]["mean"] == 0 and table["copier", "bigrams copied"]["mean"] > .95
    assert table["liar", "sentence novelty"]["mean"] > .5
    right = table["liar", "stated facts that are right"]
    assert right["n"] == 9 * 40 and right["mean"] == pytest.approx(8 / 9) and table["liar", "summaries without a wrong fact"]["mean"] == 0
    has = [post["post"].startswith(tuple(world.PREAMBLES)) for post in POSTS]
    assert 10 < sum(has) < 35
    assert table["copier", "copies the start, a preamble"]["mean"] == 1 and table["copier", "copies the start, a preamble"]["n"] == sum(has)
    assert table["skipper", "copies the start, a preamble"]["mean"] < .1 and table["skipper", "copies what follows a preamble"]["mean"] == 1
    plain = table["skipper", "copies the start, no preamble"]
    assert plain["mean"] == 1 and plain["n"] == 40 - sum(has)
    assert table["reference", "ROUGE-L"]["mean"] == 1 > table["copier", "ROUGE-L"]["mean"]
    assert table["copier", "preferred to lead-3 by the gold judge"]["mean"] == .5
    honest, copying = (table["liar", f"preferred to lead-3 by {who}"]["mean"] for who in judges)
    assert copying < .1 < honest


# --- the same labels without PPO


def comparison(post, a, b, choice, split="train"):
    return {"info": post, "summaries": [{"text": " " + a}, {"text": " " + b}], "choice": choice, "split": split}


def test_what_the_labels_prefer():
    """Catches the loser taken for the winner, and shares over another post's comparisons."""
    comparisons = [comparison(POSTS[0], "a", "b", 0), comparison(POSTS[0], "b", "c", 1), comparison(POSTS[0], "c", "a", 1),
                   comparison(POSTS[1], "a", "b", 1), comparison(POSTS[1], "b", "a", 1), comparison(POSTS[1], "a", "c", 0)]
    shares = dict((post_key(p), s) for p, s in probes.win_shares(comparisons))
    assert shares[post_key(POSTS[0])] == {"a": 1, "b": 0, "c": .5}
    assert shares[post_key(POSTS[1])] == pytest.approx({"a": 2 / 3, "b": .5, "c": 0})
    assert [(p["id"], t) for p, t in probes.most_preferred(comparisons)] == [(POSTS[0]["id"], "a"), (POSTS[1]["id"], "a")]
    assert [t for _, t in probes.preferred(comparisons)] == ["a", "a"]


def test_accuracy_by_judge_is_what_their_labels_say(enc, monkeypatch):
    """Catches training rows among the held-out ones, a sign, a model's ties: a planted model that is the judge, turned over, or mute."""
    pairs = [(p, p["summary"], lead3(p)) for p in POSTS] + [(p, lead3(p), full_summary(p)) for p in POSTS]
    comparisons = [comparison(*pair, 0, "valid") for pair in pairs] + [comparison(POSTS[0], "a", "b", 0)]
    people = world.Labeler(seed=3)
    said = {}
    for name, factor in (("judge", 1), ("turned", -1), ("mute", 0)):
        monkeypatch.setattr(probes, "score_texts", lambda run, model, asked: factor * np.array([world.utility(*x) for x in asked]))
        units = probes.accuracy_units(None, None, comparisons, {"labelers": people}, 1)
        said[name] = {r["model"]: r for r in probes.summarise(units, "model", "judge")}
    gold = said["judge"]["gold judge"]
    assert said["judge"]["reward model"]["mean"] == gold["mean"] > .6 and gold["n"] == 80
    assert said["turned"]["reward model"]["mean"] == pytest.approx(1 - gold["mean"]) and said["mute"]["reward model"]["mean"] == .5
    draws = [people.compare(*pair)[0] == int(world.utility(pair[0], pair[1]) < world.utility(pair[0], pair[2])) for _ in range(40)
             for pair in pairs if world.utility(pair[0], pair[1]) != world.utility(pair[0], pair[2])]
    assert gold["mean"] == pytest.approx(np.mean(draws), abs=.03)


# --- the ladder


def test_ladder_recovers_planted_strengths():
    """Catches winner and loser exchanged, ties lost, an interval that misses: strengths planted in a round robin."""
    rng = random.Random(0)
    strength = {"a": 0., "b": .5, "c": 1.2}
    policies = {name: [name] * 320 for name in strength}

    def prefers(post, x, y):
        return float(rng.random() < 1 / (1 + math.exp(strength[y] - strength[x])))
    rows = probes.elo_table([probes.play(POSTS * 8, policies, prefers) for _ in range(3)], "a", draws=40)
    assert [r["policy"] for r in rows] == ["a", "b", "c"] and rows[0]["elo"] == rows[0]["lo"] == rows[0]["hi"] == 1000
    for row in rows[1:]:
        assert row["elo"] == pytest.approx(1000 + 400 / math.log(10) * strength[row["policy"]], abs=45)
        assert row["lo"] < row["elo"] < row["hi"] and 20 < row["hi"] - row["lo"] < 150 and row["n"] == 3 * 320


def test_an_interval_of_ratings_is_for_other_seeds_too():
    """Catches seeds drawn again and again in place of Student's t: b's strength differs by seed, and no post by itself says anything."""
    def games(wins_of_8):
        return probes.play(POSTS[:8], {"a": ["a"] * 8, "b": ["b"] * 8}, lambda post, x, y: float(POSTS.index(post) >= wins_of_8))
    b = {r["policy"]: r for r in probes.elo_table([games(3), games(4), games(5)], "a", draws=40)}["b"]
    spread = 400 * math.log10(5 / 3)  # of b's rating at 3, 4 and 5 wins of 8: -spread, 0, spread around 1000
    assert b["elo"] == pytest.approx(1000, abs=.1) and b["elo"] - b["lo"] == pytest.approx(b["hi"] - b["elo"])
    assert b["hi"] - b["elo"] > 4.30 * spread / math.sqrt(3)


def test_an_interval_without_end_does_not_flatten_the_ladder(monkeypatch):
    """Catches a picture as wide as the interval of a policy that lost every game, and one that cuts off ordinary intervals."""
    seen = []
    monkeypatch.setattr(probes, "save_figure", lambda figure, path: seen.append(figure.axes[0].get_xlim()))
    for lo, hi in ((-25000, 25000), (150, 250)):
        rows = [{"judge": judge, "policy": policy, "elo": elo, "lo": low, "hi": high} for judge in ("gold judge", "labelers")
                for policy, elo, low, high in (("reference", 1000, 1000, 1000), ("sft", 200, lo, hi))]
        probes.draw_ladder({"tables": {"elo": rows, "agreement": []}}, "nowhere")
    assert seen[0] == (-200, 1400) and -200 < seen[1][0] < 150 and 1000 < seen[1][1] < 1400


def test_identical_policies_share_a_rung():
    """Catches ties that go to the one named first."""
    def prefers(post, x, y):  # y beats x on three posts of four
        return .5 if x == y else float((x > y) == (POSTS.index(post) % 4 > 0))
    rows = probes.elo_table([probes.play(POSTS, {"a": "x" * 40, "b": "x" * 40, "c": "y" * 40}, prefers)], "a", draws=20)
    ratings = {r["policy"]: r for r in rows}
    assert ratings["b"]["elo"] == pytest.approx(1000, abs=1e-6) and abs(ratings["b"]["lo"] - 1000) < 1e-6
    assert ratings["c"]["elo"] == pytest.approx(1000 + 400 * math.log10(3), abs=.1)
    games = probes.play(POSTS[:1], {"a": ["x"], "b": ["y"]}, lambda p, a, b: .5)[0]
    assert sorted(games) == [("a", "b"), ("b", "a")]


# --- drawing


@pytest.mark.parametrize("name", ["probes", "agreement", "copying", "critics", "ladder"])
def test_figures_are_drawn_from_rows_alone(name, tmp_path, monkeypatch):
    """Catches a picture or caption that needs more than the measured rows, or that no row reaches."""
    monkeypatch.setattr(probes, "save_figure", lambda figure, path: figure.savefig(path, dpi=15))  # coarse, for time
    row = {"mean": .6, "lo": .5, "hi": .7, "n": 9}
    judges = ["gold judge", "labelers", *probes.RM_SIZES.values()]
    names = ["labeler", "gold judge", *probes.RM_SIZES.values()]
    starts = ("supervised + fine-tuned", "fine-tuned")
    policies = ["lead-3"] + [f"{start}, {labels}" for start in starts for labels in ("honest", "copying")]
    measures = ["sentence novelty", "stated facts that are right", "preferred to lead-3 by the gold judge"]
    tables = {
        "probes": {"probes": [{"probe": p, "judge": j, **row} for p in probes.ORDER[1:4] for j in judges],
                   "length": [{"judge": j, "pairs": p, **row} for j in judges for p in ("all", "equal to the gold judge")]},
        "agreement": {"agreement": [{"samples": s, "judge": a, "other": b, **row} for s in ("sft", "ppo")
                                    for a, b in itertools.combinations_with_replacement(names, 2)]},
        "copying": {"texts": [{"policy": p, "measure": m, **row} for p in policies for m in measures],
                    "bigrams": [{"policy": p, "summary_bin": i, "post_bin": j, "matches": .1 * i, "n": 9} for p in policies
                                for i in range(3) for j in range(3)]},
        "critics": {"win-rates": [{"policy": p, "judge": j, **row} for p in probes.RIVALS for j, _, _ in probes.JUDGES],
                    "accuracy": [{"model": m, "judge": j, **row} for m in ("reward model", "gold judge") for j, _, _ in probes.JUDGES[1:]]},
        "ladder": {"elo": [{"judge": j, "policy": p, "elo": 1000 + 9 * i, "lo": 990, "hi": 1100, "n": 9} for j in ("gold judge", "labelers")
                           for i, p in enumerate(("reference", "ppo", "ppo, small", "favourite"))],
                   "agreement": [{"pairs": p, "judge": "labeler", "other": o, **row} for p in ("one policy (SFT)", "two policies")
                                 for o in ("labeler", "gold judge")]}}[name]
    facts = {"posts": 40, "seeds": 2, "copy_bias": 9., "longer": {"ppo.lr": 4e-4}, "labels": 77, **{f"novelty_ratio_{start}": .4 for start in starts}}
    measured = {"tables": tables, "facts": facts}
    getattr(probes, "draw_" + name)(measured, tmp_path / "a.png")
    for r in next(iter(tables.values())):
        r |= {key: r[key] + .1 for key in ("mean", "elo", "lo", "hi") if key in r}
    caption = getattr(probes, "caption_" + name)(measured)
    getattr(probes, "draw_" + name)(measured, tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()
    assert ("70 % (60 to 80)" in caption or "1027 (990 to 1100)" in caption) and "40 posts, 2 seeds" in caption and "{" not in caption


def test_captions_find_what_was_measured():
    """Catches findings that stand in a caption whatever was measured, and intervals over the seeds of one seed."""
    def says(added, planted):
        rows = [{"probe": probe, "judge": probes.RM_SIZES["default"], "mean": .7, "lo": lo, "hi": .9, "n": 9}
                for probe, lo in (("missing fact added", added), ("planted wrong fact corrected", planted))]
        return probes.caption_probes({"tables": {"probes": rows, "length": []}, "facts": {"posts": 4, "seeds": 2}})
    assert "it is shown that ours notices whether a fact is stated, and not shown that it checks it against" in says(.6, .4)
    assert "it is not shown that ours notices whether a fact is stated, and shown that it checks it against" in says(.5, .6)

    def ladder(step, seeds=2):
        rows = [{"judge": judge, "policy": p, "elo": 1000 + i * by, "lo": 990, "hi": 1100, "n": 9}
                for judge, by in (("gold judge", 20), ("labelers", step)) for i, p in enumerate(("reference", "sft", "ppo"))]
        return probes.caption_ladder({"tables": {"elo": rows, "agreement": []}, "facts": {"posts": 4, "seeds": seeds}})
    assert "is 40 points by the gold judge and 30 by labelers, whose noise makes games more even. Right" in ladder(15)
    assert "is 40 points by the gold judge and 50 by labelers. Right" in ladder(25)
    assert "4 posts, 2 seeds" in ladder(9) and "intervals over posts and, by Student's t, seeds;" in ladder(9)
    assert "4 posts, 1 seed of" in ladder(9, 1) and "intervals over posts;" in ladder(9, 1)
    assert all("reference" in probes.RIVALS[name] for name in ("preferred", "most-preferred"))  # their pairs hold references too
