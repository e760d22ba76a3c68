"""evaluation.py: statistics against brute force and known truth, text measures by hand, the two tables on made-up rows."""
import itertools
import json
import math
import random
import sys

import numpy as np
import pytest
import torch
from conftest import full_summary, random_rows, tiny_model

import evaluation
import world
from data import DataError, encode_query, encode_response, in_context_query, pad_rows, save_json_lines, save_vocabulary, train_bpe
from evaluation import (best_of_n_estimate, best_of_n_kl, bootstrap_ci, copy_fraction, crossed_ci, elo, entries, lead3, length_controlled_ci, length_controlled_win_rate,
                        measure_policies, measure_reward, responses_and_kl, reward_margins, rouge, rouge_means, sample_policies, sampled_kl, sentence_novelty,
                        wins)
from reward import group_by_post, sample_responses
from sft import load_model, open_run


# --- best of n


def test_best_of_n_kl():
    """Catches a wrong formula: vectors of 9.2, and the KL of picking the best of n among very many samples, summed up."""
    assert [best_of_n_kl(n) for n in (1, 8, 64, 512)] == pytest.approx([0, 1.2044, 3.1745, 5.2403], abs=5e-5)
    m = np.arange(1, 100001) / 100000  # the best of n stands at quantile m with probability m^n - (m - 1/M)^n
    p = m ** 8 - (m - 1e-5) ** 8
    assert best_of_n_kl(8) == pytest.approx((p * np.log(p * 100000)).sum(), abs=1e-3)


def test_best_of_n_estimate():
    """Catches sorting the wrong way, by the wrong score, or an off-by-one in the weights: every subset, one by one."""
    assert [best_of_n_estimate(range(4), [0, 1, 2, 1], n) for n in (1, 2, 4)] == pytest.approx([1, 4 / 3, 1])
    rng = random.Random(0)
    proxy, gold = rng.sample(range(100), 7), [rng.random() for _ in range(7)]
    for n in range(1, 8):
        best = [gold[max(subset, key=lambda i: proxy[i])] for subset in itertools.combinations(range(7), n)]
        assert best_of_n_estimate(proxy, gold, n) == pytest.approx(sum(best) / len(best), abs=1e-12)


# --- statistics


def test_wins():
    """Catches ties counted as losses, or a comparison the wrong way round."""
    assert wins([1, 2, 3, 0], [0, 2, 4, -1]).tolist() == [1, .5, 0, 1]


def test_bootstrap_covers_95_percent():
    """Catches an interval of the wrong width: of 300 samples of 60 numbers, some 285 must hold the true mean."""
    rng = np.random.default_rng(0)
    intervals = [bootstrap_ci(rng.exponential(size=60), draws=400, seed=i) for i in range(300)]
    assert 0.90 < np.mean([lo < 1 < hi for lo, hi in intervals]) < 0.98
    low, high = (np.mean([f(i) for i in intervals]) for f in (lambda i: i[0] > 1, lambda i: i[1] < 1))
    assert 0 < low < .07 and 0 < high < .1  # misses on both sides


def test_bootstrap_draws_clusters_whole():
    """Catches comparisons of one post taken for independent: copies of each value must not narrow the interval."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=50)
    names = np.repeat([f"post-{i}" for i in range(50)], 4)
    order = rng.permutation(200)
    width = [hi - lo for lo, hi in (bootstrap_ci(x), bootstrap_ci(np.repeat(x, 4)[order], names[order]),
                                    bootstrap_ci(np.repeat(x, 4)))]
    assert width[1] == pytest.approx(width[0], rel=.06) and width[2] == pytest.approx(width[0] / 2, rel=.06)
    lo, hi = bootstrap_ci([1, 1, 1, 0], ["a", "a", "a", "b"])  # uneven clusters: every comparison counts the same
    assert (lo, hi) == (0, 1) and bootstrap_ci([2, 2]) == [2, 2]
    values, clusters = np.repeat(rng.normal(size=400), np.tile([1, 9], 200)), np.repeat(np.arange(400), np.tile([1, 9], 200))
    assert np.mean(bootstrap_ci(values, clusters)) == pytest.approx(values.mean(), abs=.02)


@pytest.mark.parametrize("n, p", [(12, .95), (38, .98), (100, .98), (100, .5)])
def test_few_choices_do_not_make_a_narrow_interval(n, p):
    """Catches [1, 1] for 12 wins of 12: 95 % of the intervals hold the truth, for one seed's posts as for a bootstrap's."""
    rng = np.random.default_rng(n)
    samples = [(rng.random(n) < p).astype(float) for _ in range(300)]
    for interval in (lambda x: bootstrap_ci(x, draws=300), lambda x: crossed_ci(x, range(n), [1] * n)):
        assert np.mean([low <= p <= high for low, high in map(interval, samples)]) >= .92
    assert bootstrap_ci([1.] * 12)[1] == pytest.approx(1) and .7 < bootstrap_ci([1.] * 12)[0] < .8  # Wilson's for 12 of 12: 0.757
    assert bootstrap_ci([.02] * 12) == pytest.approx([.02, .02])  # no choices


def test_one_post_has_no_interval():
    """Catches an interval of width 0 for a single post, however many values it has: nothing is known of other posts."""
    assert bootstrap_ci([.3]) is None and bootstrap_ci([.3, .4], ["a", "a"]) is None and length_controlled_ci([1], [.2]) is None
    assert bootstrap_ci([.3, .4], ["a", "b"]) == [.3, .4] and length_controlled_ci([1, 1], [.2, .2]) is not None
    low, high = bootstrap_ci([1.])  # a choice: Wilson's for 1 of 1
    assert .2 < low < .21 and high == pytest.approx(1)
    rows = [axis_row("a", f"t3_{i}", overall=1, compatible=True) for i in range(9)]  # 1 of 7 is no choice
    assert (axes := evaluation.axis_means(rows)["a"])["overall"]["ci"] == [1, 1] and .6 < axes["compatible"]["ci"][0] < .8
    assert [evaluation.with_interval(x, ".1f") for x in (None, (2., None), (2., [1., 3.]))] == ["–", "2.0 (–)", "2.0 (1.0 – 3.0)"]
    row = evaluation.table_rows(measure_policies(policy_rows(lambda i, p: {"text": "cat"}, n=1)))[1][0]
    assert row[1:4] == ["50.0%", "5.5% – 94.5%", "50.0% ± –"]


@pytest.mark.parametrize("seeds, sd", [(3, 1.), (3, .3), (8, .3), (12, .3)])
def test_intervals_over_posts_and_seeds_hold_what_they_say(seeds, sd):
    """Catches an interval that forgets the seeds or the posts, or takes three seeds for many: where seeds are what differs, three drawn
    again and again hold the truth in three of four intervals."""
    rng, held = np.random.default_rng(seeds), 0
    for _ in range(400):  # seeds differ by sd, posts by 1, a seed's luck with a post by ½
        values = rng.normal(0, sd, (seeds, 1)) + rng.normal(0, 1, (1, 60)) + rng.normal(0, .5, (seeds, 60))
        low, high = crossed_ci(values.ravel(), np.tile(range(60), seeds), np.repeat(range(seeds), 60))
        held += low < 0 < high
    assert 370 <= held <= 396
    x = rng.normal(size=200)
    assert crossed_ci(x, range(200), [1] * 200) == pytest.approx(bootstrap_ci(x), abs=.02)
    assert crossed_ci([0.] * 9 + [1.] * 9, list(range(9)) * 2, [1] * 9 + [2] * 9) == [0, 1]
    low, high = crossed_ci([0.] * 9 + [1.] * 9, list(range(9)) * 2, [1] * 9 + [2] * 9, choices=False)  # no share: may pass 0 and 1
    assert low < -3 and high > 4
    low, high = crossed_ci([3., 5., 4.], [1, 1, 1], [1, 2, 3])
    assert (low, high) == pytest.approx((4 - 4.30 / 3**.5, 4 + 4.30 / 3**.5))


def test_length_control_recovers_what_was_planted():
    """Catches w and c mixed up, a sign lost, a win rate at some length other than equal."""
    rng = np.random.default_rng(0)
    w, c, x = 0.4, 1.5, rng.normal(0.5, 0.6, 100000)
    y = (rng.random(100000) < 1 / (1 + np.exp(-w - c * x))).astype(float)
    assert length_controlled_win_rate(y, x) == pytest.approx(1 / (1 + math.exp(-w)), abs=.01)
    assert y.mean() > .7  # the raw rate is something else
    assert length_controlled_win_rate(1 - y, -x) == pytest.approx(1 / (1 + math.exp(w)), abs=.01)


def test_the_rate_at_equal_length_has_an_interval_that_covers():
    """Catches an interval of the raw rate: where lengths lie far from the references' it is wider, and holds what was planted."""
    rng, truth, held, widths = np.random.default_rng(0), 1 / (1 + math.exp(-.4)), 0, []
    for i in range(60):
        x = rng.normal(.5, .3, 300)
        y = (rng.random(300) < 1 / (1 + np.exp(-.4 - 1.5 * x))).astype(float)
        low, high = length_controlled_ci(y, x, draws=100, seed=i)
        held, widths = held + (low < truth < high), widths + [(high - low) / np.subtract(*bootstrap_ci(y)[::-1])]
    assert 51 <= held and np.mean(widths) > 1.5


def test_length_control_changes_nothing_where_length_says_nothing():
    """Catches a fit that is biased: wins independent of length, ties, no spread of lengths, a policy that always wins."""
    y, x = np.tile([1, 1, .5, 0, 1], 400), np.repeat([-.7, .1, .2, .4], 500)
    assert length_controlled_win_rate(y, x) == pytest.approx(.7, abs=1e-5)
    assert length_controlled_win_rate(np.full(50, .5), np.zeros(50)) == .5
    assert length_controlled_win_rate(y, 0 * x) == pytest.approx(.7, abs=1e-5)
    assert .99 < length_controlled_win_rate(np.ones(50), x[:50]) <= 1
    separable = np.linspace(-2, 3, 200)
    assert length_controlled_win_rate((separable > 0).astype(float), separable) == pytest.approx(.5, abs=.1)


def test_elo_is_the_most_likely_one():
    """Catches an iteration that stops early or flips winners: gradient ascent on the log likelihood, and 400 per factor 10."""
    rng = random.Random(0)
    games = [rng.sample("abcde", 2) for _ in range(300)]
    games = [(a, b) if rng.random() < 1 / (1 + math.exp((ord(a) - ord(b)) * .5)) else (b, a) for a, b in games]
    ratings, theta = elo(*zip(*games)), dict.fromkeys("abcde", 0.0)
    for _ in range(3000):
        step = dict.fromkeys("abcde", 0.0)
        for w, l in games:
            p = 1 / (1 + math.exp(theta[w] - theta[l]))  # of the other outcome
            step[w], step[l] = step[w] + p, step[l] - p
        if max(map(abs, step.values())) < 1e-4:
            break
        theta = {k: v + 0.03 * step[k] for k, v in theta.items()}
    assert max(map(abs, step.values())) < 1e-3
    for k in "abcde":
        assert ratings[k] == pytest.approx(1000 + 400 / math.log(10) * theta[k], abs=.5)
    two = elo(["a"] * 10 + ["b"], ["b"] * 10 + ["a"])
    assert two["a"] - two["b"] == pytest.approx(400) and two["a"] + two["b"] == pytest.approx(2000)


# --- texts


def test_copy_fraction_by_brute_force():
    """Catches a wrong LCS: the longest subsequence of the summary's bigrams found in the source, all of them tried."""
    rng = random.Random(0)
    for _ in range(60):
        summary, source = ([rng.choice("abc") for _ in range(rng.randrange(n))] for n in (8, 12))
        a, b = list(zip(summary, summary[1:])), list(zip(source, source[1:]))

        def stands_in(sub):
            rest = iter(b)
            return all(x in rest for x in sub)
        longest = max(k for k in range(len(a) + 1) for sub in itertools.combinations(a, k) if stands_in(sub))
        assert copy_fraction(" ".join(summary), " ".join(source)) == (longest / len(a) if a else 0)
    assert copy_fraction("my cat ate", "then my cat ate it") == 1 and copy_fraction("cat my ate", "my cat ate") == 0


def test_sentence_novelty_and_lead3_by_hand():
    """Catches case or blanks that make a copy look new, and a share of the wrong thing."""
    source = "My cat ate it.  Then\nshe slept! Why? I do not know. Nobody does."
    assert sentence_novelty("then she  slept! my cat ate it. i am sad.", source) == pytest.approx(1 / 3)
    assert sentence_novelty(source, source) == 0 and sentence_novelty("Something else.", source) == 1
    assert sentence_novelty("", source) == 0
    assert lead3({"post": source}) == "My cat ate it. Then\nshe slept! Why?"


def test_rouge_by_hand_and_by_brute_force():
    """Catches precision or recall for F1, no stemmer, a mean over something else, summaries and references that are not paired."""
    by_hand = rouge_means(["the cats sat", "my dog"], ["The cat sat on a mat.", "your horse"])  # 3 of 3 and 6 words, 2 of 2 and 5 bigrams
    assert [by_hand[name][0] for name in ("rouge1", "rouge2", "rougeL")] == pytest.approx([2 / 6, 2 * 1 * .4 / 1.4 / 2, 2 / 6])
    assert by_hand["rouge1"][1] == [0, pytest.approx(2 / 3)] and rouge_means(["", "x"], ["a cat", "x"])["rougeL"][0] == .5
    assert rouge(["cats", "x"], ["cat", "x"], ["rougeL"]).tolist() == [[1], [1]]
    assert rouge(["cats", "x"], ["cat", "x"], ["rougeL"]).tolist() == [[1], [1]]
    rng = random.Random(0)
    for _ in range(20):
        a, b = ([rng.choice("abcd") for _ in range(rng.randrange(2, 8))] for _ in range(2))
        out = {}
        for n in (1, 2):
            grams, others = ([tuple(t[i:i + n]) for i in range(len(t) - n + 1)] for t in (a, b))
            out[n] = 2 * sum(min(grams.count(x), others.count(x)) for x in set(grams)) / (len(grams) + len(others))
        subsequences = {s for k in range(len(a) + 1) for s in itertools.combinations(a, k)}
        longest = max(k for k in range(len(b) + 1) if subsequences & set(itertools.combinations(b, k)))
        expected = [out[1], out[2], 2 * longest / (len(a) + len(b))]
        assert rouge([" ".join(a)], [" ".join(b)])[0].tolist() == pytest.approx(expected)
    with pytest.raises(ValueError):
        rouge(["a"], ["a", "b"])


def test_rouge_of_articles_is_summary_level():
    """Catches ROUGE-L of the whole text where papers on CNN/DM mean that of its sentences, or lines of one side only."""
    summary, reference = ["My cat ate. A dog ran!"], ["A dog ran . My cat ate ."]
    assert rouge_means(summary, reference)["rougeL"][0] == pytest.approx(3 / 6)
    assert rouge_means(summary, reference, articles=True)["rougeLsum"][0] == 1
    within = rouge_means(["ate cat the. dogs sat"], ["Dogs sat . The cat ate ."], True)  # order counts in a sentence: 2 and 1 of 5 words
    assert within["rougeLsum"][0] == pytest.approx(3 / 5) and list(within) == ["rouge1", "rouge2", "rougeLsum"]
    rows = [{"post": {"id": "1", "post": "x", "summary": reference[0], "task": "cnndm-transfer"}, "policies": {
        name: {"text": summary[0], "length": 9, "eos": True, "score": 0., "kl": None} for name in ("reference", "sft")}}]
    header, table = evaluation.table_rows(measure_policies(rows))
    assert header[3] == "ROUGE-Lsum" and table[1][3].startswith("100.0%")
    del rows[0]["post"]["task"]
    header, table = evaluation.table_rows(measure_policies(rows))
    assert header[3] == "ROUGE-L" and table[1][3].startswith("50.0%")


# --- the two tables


def reward_row(margin, gold, longer, confidence=3, post="a"):
    return {"margin": margin, "confidence": confidence, "post": post, "longer_wins": longer, "gold_agrees": gold}


def test_measure_reward_by_hand():
    """Catches a gap with the wrong sign, ties that count whole, a calibration of something else than the preferred side."""
    rows = [reward_row(2., 1., 1., 9, "a"), reward_row(-2., 1., 0., 9, "a"), reward_row(0., 0., .5, 1, "b"),
            reward_row(3., 1., 0., 1, "c"), reward_row(2.1, .5, 1., 1, "d")]
    out = measure_reward(rows)
    assert (out["accuracy"], out["noise_free_judge"], out["longer_wins"], out["n"]) == pytest.approx((.7, .7, .5, 5))
    assert out["gap_to_judge"] == pytest.approx(0, abs=1e-12)
    assert [(c["confidence"], c["n"]) for c in out["by_confidence"]] == [(1, 3), (9, 2)]
    assert [c["accuracy"] for c in out["by_confidence"]] == pytest.approx([2.5 / 3, .5])
    bins = [(c["predicted"], c["observed"], c["n"]) for c in out["calibration"]]
    s = [1 / (1 + math.exp(-m)) for m in (2, 2.1, 3)]
    assert np.array(bins) == pytest.approx(np.array([(.5, .5, 1), ((2 * s[0] + s[1]) / 3, 2 / 3, 3), (s[2], 1, 1)]))
    better = measure_reward([reward_row(-1., 1., 1., post=str(i)) for i in range(9)] + [reward_row(1., 1., 1.)])
    assert (better["accuracy"], better["gap_to_judge"]) == pytest.approx((.1, .9))
    lo, hi = better["gap_to_judge_ci"]
    assert .5 < lo < .9 < hi <= 1
    real = measure_reward([{**row, "gold_agrees": None, "confidence": None} for row in rows])
    assert real["noise_free_judge"] is None and real["gap_to_judge"] is None and real["by_confidence"][0]["n"] == 5


def test_reward_margins_belong_to_their_comparisons(enc):
    """Catches margins, judge and labels of different comparisons in one row."""
    posts = world.make_posts(3, 1, "t")
    texts = [[" cat", " " + full_summary(p), " my dog ate the cat bad dog ate", " good"] for p in posts]
    comparisons = [{"info": posts[i], "summaries": [{"text": texts[i][a]}, {"text": texts[i][b]}], "choice": choice,
                    "extra": {"confidence": k}} for k, (i, a, b, choice) in enumerate(
                        [(0, 0, 1, 1), (1, 2, 1, 0), (0, 2, 3, 0), (2, 1, 0, 1), (1, 0, 2, 1), (0, 3, 1, 1)])]
    model = tiny_model("scalar", vocab_size=enc.n_vocab, n_positions=700)
    groups = group_by_post(enc, comparisons, 600, 90)
    rows = reward_margins(model, groups, comparisons)
    assert sorted(row["confidence"] for row in rows) == list(range(6))
    for row in rows:
        c = comparisons[row["confidence"]]
        group = next(g for g in groups if row["confidence"] in g["index"])
        better, worse = group["pairs"][group["index"].index(row["confidence"])]
        tokens, lengths = pad_rows([group["query"] + group["responses"][i] for i in (better, worse)])
        scores = model.scores(tokens, lengths).tolist()
        assert row["margin"] == pytest.approx(scores[0] - scores[1], abs=1e-5) and row["post"] == c["info"]["id"]
    rows = {row["confidence"]: row for row in rows}
    assert [rows[k]["gold_agrees"] for k in (0, 1, 3, 5)] == [1, 0, 0, 1]  # the full summary is the judge's best
    assert [rows[k]["longer_wins"] for k in range(6)] == [1, 0, 1, 0, 1, 1]


def policy_rows(change, n=40):
    """Posts with a reference and two policies: `same`, and one whose text, score, length and eos are `change` of them."""
    def summary(text, score=0., length=30, eos=True, kl=None):
        return {"text": text, "length": length, "eos": eos, "score": score, "kl": kl}
    return [{"post": p, "policies": {"reference": summary(p["summary"]), "same": summary(p["summary"], kl=2.0 * i),
                                     "other": summary(**change(i, p))}} for i, p in enumerate(world.make_posts(n, 3, "t"))]


def test_a_policy_that_is_the_reference_wins_half():
    """Catches ties that do not count one half, and a comparison with another post's reference."""
    rows = policy_rows(lambda i, p: {"text": full_summary(p), "score": 1. if i % 4 else -1., "length": 36, "eos": i % 5 > 0})
    out = measure_policies(rows)
    for name in ("reference", "same"):
        assert out[name]["gold_win_rate"] == out[name]["rm_win_rate"] == out[name]["gold_win_rate_length_controlled"] == .5
        assert out[name]["gold_win_rate_ci"] == [.5, .5] and out[name]["n"] == 40 and out[name]["no_eos"] == 0
    assert out["reference"]["kl"] is None and out["same"]["kl"] == pytest.approx(39)
    other = out["other"]
    assert other["gold_win_rate"] > .9 and other["gold_utility"] > out["same"]["gold_utility"] + 1
    assert (other["rm_win_rate"], other["no_eos"], other["length"], other["rm_score"]) == pytest.approx((.75, .2, 36, .5))
    worse = measure_policies(policy_rows(lambda i, p: {"text": "cat cat cat cat cat"}))["other"]
    assert worse["gold_win_rate"] < .1 and worse["copy_fraction"] == 0
    assert measure_policies([{**row, "post": {"post": row["post"]["post"]}} for row in rows])["other"]["gold_win_rate"] is None


def test_win_rate_over_sft_by_hand():
    """Catches SFT's response taken for the reference's or another post's, and its own rate other than one half."""
    rows = policy_rows(lambda i, p: {"text": full_summary(p) if i % 4 else "cat"})
    for i, row in enumerate(rows):
        row["policies"]["sft"] = row["policies"]["same"] | {"text": full_summary(row["post"]) if i < 4 else "cat cat"}
    out = measure_policies(rows)
    assert out["sft"]["gold_win_rate_sft"] == .5 and out["sft"]["gold_win_rate_sft_ci"] == [.5, .5]
    assert out["other"]["gold_win_rate_sft"] == pytest.approx((1.5 + 36) / 40)  # of the first four a loss and three ties; then all won
    lo, hi = out["other"]["gold_win_rate_sft_ci"]
    assert .8 < lo < .94 < hi < 1 and measure_policies(policy_rows(lambda i, p: {"text": "cat"}))["other"]["gold_win_rate_sft"] is None


def test_stories_are_judged_by_samples(enc, g):
    """Catches greedy continuations, a KL of other samples than those shown, and an excerpt's first sentences as a baseline."""
    policy, sft, dot = *(tiny_model(seed=i, vocab_size=enc.n_vocab, n_positions=200) for i in (0, 1)), enc.encode_ordinary(".")[0]
    queries, seed = [[1, 2, 3], [4, 5]] * 3, torch.Generator().manual_seed
    shown, kls = responses_and_kl(policy, sft, queries, 8, 1.0, seed(5), (dot, 4), greedy=False)
    assert shown == sample_responses(policy, queries, 8, 1.0, seed(5), stop=(dot, 4))
    assert kls == pytest.approx(sampled_kl(policy, sft, queries, shown, 1.0), abs=1e-5) and max(map(abs, kls)) > .01
    greedy, _ = responses_and_kl(policy, sft, queries, 8, 1.0, seed(5), (dot, 4))
    assert greedy == sample_responses(policy, queries, 8, 0, g, stop=(dot, 4)) != shown
    posts = [{**p, "post": "a dog. " * 4} for p in world.make_posts(3, 1, "t", task="sentiment")]
    models = {"pretrained": sft, "sft": sft, "ppo": policy}
    rows = sample_policies(enc, posts, models, tiny_model("scalar", vocab_size=enc.n_vocab, n_positions=200), 60, 8, 1.0, 2, g, (dot, 4))
    assert set(rows[0]["policies"]) == {"reference", "pretrained", "sft", "best_of_n", "ppo"}


def test_a_sample_of_sft_stands_beside_its_greedy_summary(enc, g):
    """Catches greedy decoding where best of n draws: with n = 1 the two are one."""
    posts, sft = world.make_posts(6, 1, "t"), tiny_model(seed=1, vocab_size=enc.n_vocab, n_positions=200)
    rows = sample_policies(enc, posts, dict.fromkeys(("pretrained", "sft", "ppo"), sft),
                           tiny_model("scalar", vocab_size=enc.n_vocab, n_positions=200), 100, 8, 1.0, 1, g)
    text = {name: [row["policies"][name]["text"] for row in rows] for name in ("sft", "sft_sampled", "best_of_n")}
    assert text["sft_sampled"] == text["best_of_n"] != text["sft"] and rows[0]["policies"]["sft_sampled"]["kl"] == 0
    rows = sample_policies(enc, posts, dict.fromkeys(("pretrained", "sft", "ppo"), sft),
                           tiny_model("scalar", vocab_size=enc.n_vocab, n_positions=200), 100, 8, 1.0, 4, g)
    assert all(row["policies"]["best_of_n"]["score"] >= row["policies"]["sft_sampled"]["score"] for row in rows)  # of the same post


def test_the_table_controls_for_length():
    """Catches a table whose length-controlled rate is the raw one: here long summaries win and short ones mostly lose."""
    rows = policy_rows(lambda i, p: {"text": full_summary(p) if i % 10 < 7 else "cat", "length": 60 if i % 10 < 6 else 33})
    w = [1.0 if i % 10 < 7 else 0.0 for i in range(40)]
    out = measure_policies(rows)["other"]
    assert out["gold_win_rate"] == pytest.approx(np.mean(w), abs=.05)
    expected = length_controlled_win_rate(w, [math.log(60 / 30) if i % 10 < 6 else math.log(33 / 30) for i in range(40)])
    assert out["gold_win_rate_length_controlled"] == pytest.approx(expected, abs=.05) and expected < .3


def test_what_has_ended_is_what_the_rule_says(enc):
    """Catches responses that ended with '.' counted as unfinished, and a '.' that stands too early counted as an end."""
    model, dot = tiny_model("scalar", vocab_size=enc.n_vocab), enc.encode_ordinary(".")[0]
    responses = [[1, 2, dot], [1, dot], [1, 2, 3], [1, 2, enc.n_vocab - 1]]
    ended = [[e["eos"] for e in entries(enc, model, [[1, 2]] * 4, responses, stop=stop)] for stop in ((dot, 2), None)]
    assert ended == [[True, False, False, False], [False, False, False, True]]


def test_sampled_kl_is_0_for_the_policy_itself_and_exact_in_each_state_of_another(g):
    """Catches policy and reference swapped, queries counted into the KL, another temperature, and a mean in place of the sum."""
    policy, ref, (queries, samples) = tiny_model(seed=0), tiny_model(seed=1), random_rows(g, n=7)
    assert sampled_kl(policy, policy, queries, samples, 0.7, batch=3) == [0.0] * 7
    for q, r, kl in zip(queries, samples, sampled_kl(policy, ref, queries, samples, 0.7, batch=3)):
        a, b = (torch.log_softmax(m(torch.tensor([q + r]))[0, len(q) - 1:-1].double() / 0.7, -1) for m in (policy, ref))
        assert kl == pytest.approx((a.exp() * (a - b)).sum().item(), abs=1e-4)


# --- zero-shot with examples in context


def test_in_context_query_by_hand(enc):
    """Catches another template, separator or order, an example without its summary, and one that does not fit."""
    posts = [{"subreddit": "x", "title": t, "post": p, "summary": s} for t, p, s in [("A", "one.", " s1"), ("B", "two " * 40, "s2"), ("C", "three", "s3")]]
    query, text = {"subreddit": "y", "title": "Q", "post": "mine"}, "Subreddit: r/y\n\nTitle: Q\n\nmine\n\nTL;DR:"
    one = "Subreddit: r/x\n\nTitle: A\n\none.\n\nTL;DR: s1\n\n=====\n\n"
    three = "Subreddit: r/x\n\nTitle: C\n\nthree\n\nTL;DR: s3\n\n=====\n\n"

    def size(text):
        return len(enc.encode_ordinary(text))
    for most, expected, n in [(size(text), text, 0), (size(one + text) - 1, text, 0), (size(one + text), one + text, 1),
                              (size(three + one + text), three + one + text, 2)]:
        ids, count = in_context_query(enc, query, posts, 200, most)
        assert (enc.decode(ids), count, len(ids) <= most) == (expected, n, True)
    assert in_context_query(enc, query, posts, 200, 10**6)[1] == 3
    article, other = {"post": "News.", "task": "cnndm-transfer"}, {"post": "Old.", "summary": "o", "task": "cnndm-transfer"}
    ids, _ = in_context_query(enc, article, [other], 200, 400)
    assert enc.decode(ids) == "Article:\n\nOld.\n\nTL;DR: o\n\n=====\n\nArticle:\n\nNews.\n\nTL;DR:"
    ids, n = in_context_query(enc, {**article, "post": "long " * 90}, [other], 60, 400)
    assert n == 1 and enc.decode(ids).startswith("Article:\n\nOld.") and size(enc.decode(ids).split("=====\n\n")[1]) in range(50, 61)


def test_in_context_responses_end_at_a_newline(enc, monkeypatch):
    """Catches text behind the line, a baseline where some post has no room for an example, and the wrong stop token."""
    newline, eos = enc.encode_ordinary("\n")[0], enc.n_vocab - 1
    cat, asked = enc.encode_ordinary(" cat"), []

    def sampled(model, queries, R, temperature, generator, stop):
        asked.append((temperature, stop, [enc.decode(q) for q in queries]))
        return [cat + [newline], cat + [eos] + cat, cat][:len(queries)]
    monkeypatch.setattr(evaluation, "sample_responses", sampled)
    post = {"subreddit": "x", "title": "A", "post": "one.", "summary": "two"}
    posts, model = [{**post, "post": p} for p in ("a", "b", "c")], tiny_model(n_positions=110)
    assert evaluation.in_context_responses(enc, posts, [post], model, 200, 10, None) == [("cat", True), ("cat", True), ("cat", False)]
    assert asked[0][:2] == (0, (newline, 0)) and all("one.\n\nTL;DR: two\n\n=====" in q for q in asked[0][2])
    assert evaluation.in_context_responses(enc, posts + [{**post, "post": "c " * 30}], [post], model, 200, 10, None) is None
    assert evaluation.in_context_responses(enc, posts, [], model, 200, 10, None) is None and len(asked) == 1


def test_examples_have_24_to_47_tokens(enc):
    posts = [{"summary": "z" * n} for n in (22, 23, 46, 47, 30)]  # and a blank before each
    assert [len(p["summary"]) for p in evaluation.pick_examples(enc, posts)] == [23, 46, 30]
    assert len(evaluation.pick_examples(enc, posts * 20)) == 13


# --- other people's files


def test_every_policy_answers_in_the_format_of_the_task(enc, monkeypatch):
    """Catches posts formatted as TL;DRs whatever they are, a lead-3 judged on less than three sentences, an in-context row in another place."""
    posts = [{"post": f"My cat ate {i}. It ran. " + "x" * 60 + ". No.", "summary": "cat ate", "task": "cnndm", "title": "", "subreddit": ""} for i in range(3)]
    models = {name: tiny_model(seed=i, vocab_size=enc.n_vocab, n_positions=160) for i, name in enumerate(("pretrained", "sft", "ppo"))}
    reward_model = tiny_model("scalar", vocab_size=enc.n_vocab, n_positions=130)
    monkeypatch.setattr(evaluation, "in_context_responses", lambda *args: [("dog", True), ("a", False), ("b", True)])
    rows = evaluation.sample_policies(enc, posts, models, reward_model, 110, 12, .7, 0, torch.Generator())
    assert list(rows[0]["policies"]) == ["reference", "lead3", "pretrained", "sft", "ppo", "in_context"]
    for row, post, text in zip(rows, posts, ("dog", "a", "b")):
        query = encode_query(enc, post, 110)
        assert enc.decode(query) == f"Article:\n{post['post']}\n\nTL;DR:\n"
        with torch.no_grad():
            for name, said, most in (("reference", "cat ate", 12), ("lead3", lead3(post), 20), ("in_context", text, 12)):
                ids = query + encode_response(enc, said, most, "cnndm")
                assert row["policies"][name]["score"] == pytest.approx(reward_model.scores(torch.tensor([ids]), torch.tensor([len(ids)])).item(), abs=.02)
                assert row["policies"][name]["text"] == said
        assert row["policies"]["in_context"]["eos"] == (text != "a")
    measured = measure_policies(rows)
    assert measured["lead3"]["rouge"] == rouge_means([lead3(p) for p in posts], ["cat ate"] * 3, True) and measured["reference"]["rouge"] is None
    header, table = evaluation.table_rows(measured)
    assert header[1:4] == ["ROUGE-1", "ROUGE-2", "ROUGE-Lsum"] and [r[0] for r in table][3] == "pretrained (in context)"
    assert table[0][1] == "–" and table[1][1].startswith(f"{measured['lead3']['rouge']['rouge1'][0]:.1%} (") and len(set(map(len, [header] + table))) == 1
    with_gold = evaluation.table_rows(measure_policies(policy_rows(lambda i, p: {"text": "cat"})))
    assert with_gold[0][1] == "gold win rate" and "ROUGE-1" not in with_gold[0]


def axis_row(policy, post, **axes):
    return {"info": {"id": post}, "summary": {"policy": policy, "axes": axes}}


def test_rouge_of_nothing_has_no_width():
    """Catches F1 of 0 taken for choices that were lost: none of 12 texts shares a word, and that is what was measured."""
    assert all((mean, ci) == (0, [0, 0]) for mean, ci in evaluation.rouge_means(["a b"] * 12, ["c d"] * 12).values())


def test_axis_means_by_hand():
    """Catches axes or policies in one heap, and evaluations of one post taken for independent."""
    rows = [axis_row("a", "p", overall=7, compatible=True), axis_row("a", "p", overall=5), axis_row("a", "q", overall=3, compatible=False),
            axis_row(None, "p", accuracy=2)]
    out = evaluation.axis_means(rows)
    assert {policy: set(axes) for policy, axes in out.items()} == {"a": {"overall", "compatible"}, "unknown": {"accuracy"}}
    assert (out["a"]["overall"]["mean"], out["a"]["overall"]["n"], out["a"]["compatible"]["mean"]) == (5, 3, .5)
    assert out["a"]["overall"]["ci"] == [3, 6] and out["unknown"]["accuracy"]["ci"] is None  # 7 and 5 stand together or not at all


def compared(post, title="t", id=None, choice=0, split=None, confidence=None, a=" cat cat", b=" dog", **more):
    return {"info": {"id": id, "subreddit": "x", "title": title, "post": post, **more}, "summaries": [{"text": a}, {"text": b}], "choice": choice,
            "split": split, "extra": {"confidence": confidence}}


def test_comparisons_of_posts_that_were_trained_on_are_left_out():
    trained = [{"id": "a", "post": "A"}, {"id": None, "post": "C"}, {"id": "x", "post": "F"}]
    asked = [compared("A", id="a"), compared("A"), compared("B", id="b"), compared("C", id="c"), compared("D", id="a"), compared("D"), compared("E", id="d")]
    asked.append(compared("F ", id="f"))
    assert evaluation.unseen_comparisons(asked, trained) == [asked[i] for i in (2, 6)]  # the text D has the id of the text A


def evaluate(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["evaluation.py", *map(str, args)])
    evaluation.main()


def test_agreement_with_a_file_is_counted_one_by_one(small_run, enc, tmp_path, monkeypatch, capsys):
    """Catches another model, format or side, and a table whose rows are not of their confidence."""
    rows = [compared(f"cat {i // 2}", choice=i % 2, confidence=1 + i % 3, a=f" cat {i}", b=" my dog" * (i % 4 + 1), facts=[]) for i in range(12)]
    save_json_lines(tmp_path / "some.json", rows + [compared("my dog ate the cat", title="my dog", id="a")])
    evaluate(monkeypatch, small_run, "--comparisons", tmp_path / "some.json", "--device", "cpu")
    model, right = load_model(small_run + "/reward", "cpu", "scalar"), []
    for c in rows:
        scores = []
        for s in c["summaries"]:
            ids = encode_query(enc, c["info"], 70) + encode_response(enc, s["text"], 12)
            with torch.no_grad():
                scores.append(model.scores(torch.tensor([ids]), torch.tensor([len(ids)])).item())
        right.append(scores[c["choice"]] > scores[1 - c["choice"]])
    table = {line.split()[0]: line.split()[1:3] for line in capsys.readouterr().out.splitlines()[3:7]}
    assert table == {"all": ["12", f"{np.mean(right):.1%}"], **{str(k + 1): ["4", f"{np.mean(right[k::3]):.1%}"] for k in range(3)}}
    assert 0 < sum(right) < 12 and open(small_run + "/report/some-agreement.csv").read().count("\n") == 5
    save_json_lines(tmp_path / "seen.json", [compared("other", id="a")])
    with pytest.raises(DataError, match="trained its reward model on every post"):
        evaluate(monkeypatch, small_run, "--comparisons", tmp_path / "seen.json", "--device", "cpu")


def test_a_policy_of_another_run_is_refused(small_run, enc, tmp_path, monkeypatch, capsys):
    """Catches ids that mean other texts, where as many tokens hide it, and shapes that do not fit."""
    with open(small_run + "/data/test.jsonl") as f:
        posts = [json.loads(line) for line in f]
    entry = {"text": "cat", "length": 2, "eos": True, "score": 0., "kl": None}
    (tmp_path / "run" / "evaluation").mkdir()
    save_json_lines(small_run + "/evaluation/samples.jsonl", [{"post": p, "policies": {"reference": entry, "ppo": entry}} for p in posts])
    other = train_bpe(["the dogs ran and the office ran on and on; mornings and evenings of running dogs, " * 9], enc.n_vocab)
    assert other.n_vocab == enc.n_vocab
    for name, theirs, size, positions, says in [("own", enc, enc.n_vocab, 90, None), ("bare", None, enc.n_vocab, 90, None),
                                                ("other", other, enc.n_vocab, 90, "another vocabulary.*another run"),
                                                ("short", enc, enc.n_vocab, 81, "81 positions"), ("large", None, 300, 90, "300 tokens")]:
        tiny_model(vocab_size=size, n_positions=positions).save_pretrained(tmp_path / name)
        if theirs:
            save_vocabulary(theirs, str(tmp_path / name))
        if says is None:
            evaluate(monkeypatch, small_run, "--policy", tmp_path / name, "--device", "cpu")
            assert f"is the policy in {tmp_path / name}" in capsys.readouterr().out
        else:
            with pytest.raises(DataError, match=says):
                evaluate(monkeypatch, small_run, "--policy", tmp_path / name, "--device", "cpu")


@pytest.mark.parametrize("trained, asked, format, name", [
    ("tldr", [], "{}\n\nTL;DR:", "cnndm-transfer"), ("tldr", ["--task", "cnndm"], "Article:\n{}\n\nTL;DR:\n", "cnndm"),
    ("cnndm", [], "Article:\n{}\n\nTL;DR:\n", "cnndm"), ("cnndm", ["--task", "tldr"], "{}\n\nTL;DR:", "cnndm-transfer")])
def test_articles_have_the_format_that_the_run_was_trained_in(small_run, tmp_path, monkeypatch, capsys, trained, asked, format, name):
    """Catches a run that is judged in a format it has never seen, and a table named after another task than its posts'."""
    config, seen = json.loads((tmp_path / "run" / "config.json").read_text()), []
    config["settings"]["data"]["task"] = trained
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(evaluation, "group_by_post", lambda enc, comparisons, *more: seen.extend(
        groups := group_by_post(enc, comparisons, *more)) or groups)
    monkeypatch.setattr(evaluation, "sample_policies", lambda enc, posts, models, reward_model, Q, *more: seen.extend(
        {"query": encode_query(enc, post, Q)} for post in posts) or policy_rows(lambda i, p: {"text": "cat"}, n=2))
    (tmp_path / "cnn.csv").write_text("id,article,highlights\n1,My dog ate.,The dog ate\n")
    article = compared("My dog ate.")
    article["info"] = {"id": "7", "site": "cnn", "title": "", "article": "My dog ate."}
    save_json_lines(tmp_path / "cc.jsonl", [article])
    for option, file in (("--posts", "cnn.csv"), ("--comparisons", "cc.jsonl")):
        evaluate(monkeypatch, small_run, option, tmp_path / file, *asked, "--device", "cpu")
    enc = open_run(small_run).enc
    assert [enc.decode(group["query"]) for group in seen] == [format.format("My dog ate.")] * 2
    assert f"1 posts as {name}, " in capsys.readouterr().out and (tmp_path / "run" / "evaluation" / f"cnn-{name}.jsonl").exists()


def test_posts_that_were_trained_on_are_left_out(small_run, tmp_path, monkeypatch, capsys):
    """Catches a table on posts that the language model, SFT, PPO or the reward model has seen, by id or by text, and a count of others."""
    def post(text, id=None, **more):
        return {"id": id, "subreddit": "cat", "title": "t", "post": text, "summary": "cat", **more}
    for i, split in enumerate(("pretrain", "sft", "prompts", "test")):
        save_json_lines(f"{small_run}/data/{split}.jsonl", [post(f"cat {i}", f"{split}-id")])
    save_json_lines(small_run + "/comparisons.jsonl", [compared("dog 1", id="5th", split="train"), compared("dog 2", id="6th", split="valid")])
    asked = [post("new", f"{split}-id") for split in ("pretrain", "sft", "prompts", "test")]  # the last was not trained on
    asked += [post(f"cat {i}") for i in range(4)] + [post("new", "5th"), post("dog 1"), post("dog 2"), post("new", "6th")]
    save_json_lines(tmp_path / "asked.jsonl", asked)
    evaluate(monkeypatch, small_run, "--posts", tmp_path / "asked.jsonl", "--device", "cpu")
    rows = [json.loads(line)["post"] for line in open(small_run + "/evaluation/asked-tldr.jsonl")]
    assert [(row["post"], row["id"]) for row in rows] == [("new", "test-id"), ("cat 3", "line-8"), ("dog 2", "line-11"), ("new", "6th")]
    assert "4 posts as tldr" in (out := capsys.readouterr().out) and "8 left out because the run was trained on them" in out
    with pytest.raises(DataError, match="trained on every one of these posts"):
        evaluate(monkeypatch, small_run, "--posts", small_run + "/data/sft.jsonl", "--device", "cpu")


def test_articles_and_axes_from_files(small_run, tmp_path, monkeypatch, capsys):
    """The transfer to articles and the Likert table, from the command line to the CSV."""
    (tmp_path / "cnn.csv").write_text("id,article,highlights\n1,My dog ate.,The dog ate\n2,A cat ate my dog. Bad.,Bad cat\n")
    evaluate(monkeypatch, small_run, "--posts", tmp_path / "cnn.csv", "--device", "cpu")
    out = capsys.readouterr().out
    assert "2 posts as cnndm-transfer" in out and out.count(" – ") >= 12 and [w for w in ("lead-3", "SFT", "PPO") if w not in out] == []
    rows = [json.loads(line) for line in open(small_run + "/evaluation/cnn-cnndm-transfer.jsonl")]
    assert rows[1]["policies"]["lead3"]["text"] == "A cat ate my dog. Bad." and rows[0]["post"]["task"] == "cnndm-transfer"
    save_json_lines(tmp_path / "axis.json", [{"info": {"id": f"t3_{i}", "subreddit": "x", "title": "t", "post": "p"}, "summary": {
        "text": "x", "policy": "sup", "axes": {"overall": 3 + i, "accuracy": None}}} for i in range(3)])
    evaluate(monkeypatch, small_run, "--axis", tmp_path / "axis.json")
    assert "sup     3  4.00 (3.00 – 5.00)" in capsys.readouterr().out
    assert open(small_run + "/report/axis-axes.csv").read().splitlines() == ["policy,n,overall", "sup,3,4.00 (3.00 – 5.00)"]
