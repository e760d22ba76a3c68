"""The gold judge passes its own tests before anything is measured with it; labelers do what their dials say."""
import itertools
import math
import random
import re
from collections import Counter

import numpy as np
import pytest

import data
import evaluation
import world


@pytest.fixture(scope="module")
def posts():
    """Held-out posts as the evaluation has them: TL;DRs of 24 to 48 tokens."""
    made = world.make_posts(1200, 0, "test")
    enc = data.train_bpe([data.query_text(p) + " " + p["summary"] for p in made], 1024)
    return [p for p in made if world.is_filtered(len(data.encode_response(enc, p["summary"], 1000)))]


def win_rate(posts, write):
    """Share of posts on which the judge prefers write(post) to the reference, ties one half."""
    return np.mean(evaluation.wins([world.utility(p, write(p)) for p in posts], [world.utility(p, p["summary"]) for p in posts]))


def test_complete_honest_summary_beats_the_references(posts):
    assert win_rate(posts, world.full_summary) >= 0.95


def with_facts(post, **facts):
    return {**post, "facts": {**post["facts"], **facts}}


def other(post, slot):
    return next(v for v in world.SLOTS[slot] if v != post["facts"][slot] and v not in post["post"])


RIVALS = {
    "keyword salad": lambda p: " ".join(random.Random(p["id"]).sample(world.words(world.full_summary(p)), len(world.words(world.full_summary(p))))),
    "bare facts": lambda p: " ".join(p["facts"].values()),
    "lead-3": evaluation.lead3,
    "pasted post": lambda p: p["post"],
    "title": lambda p: p["title"],
    "one fact repeated": lambda p: " ".join(["i feel {feeling}.".format(**p["facts"])] * 6),
    "one fact": lambda p: "i feel {feeling}.".format(**p["facts"]),
    "empty": lambda p: "",
    "swapped name": lambda p: world.full_summary(with_facts(p, name=other(p, "name"))),
    "swapped person": lambda p: world.full_summary(with_facts(p, name=other(p, "name"), relation=other(p, "relation"))),
    "fillers": lambda p: " ".join(world.FILLERS),
}


@pytest.mark.parametrize("rival", RIVALS)
def test_cheap_tricks_stay_under_one_half(posts, rival):
    assert win_rate(posts, RIVALS[rival]) < 0.5


def test_judge_reads_every_sentence_that_the_world_writes():
    """A pattern that the judge does not know would cost honest authors."""
    for p in world.make_posts(500, 3, "pretrain", listed=.5):
        for text in (p["title"], p["post"], p["summary"]):
            assert world.read(text)[1] == 0, text
        assert all(p["facts"][slot] == value for slot, value in world.read(p["post"])[0])  # stories are true
        assert all(world.tally(p, world.full_summary(p))["covered"].values())


def test_utility_by_hand():
    p = {"facts": {"relation": "sister", "name": "anna", "verb": "broke", "object": "laptop", "place": "gym", "time": "last week",
                   "feeling": "sad", "wish": "move out", "question": "break up"}}
    assert world.utility(p, "My sister Anna broke my laptop at the gym last week. I feel sad and want to move out. Should I break up?") == 7
    assert world.utility(p, "my sister broke my laptop.") == 1.5
    assert world.utility(p, "my brother broke my laptop.") == 1 - 3  # a wrong relation: half a fact lost, and a contradiction
    assert world.utility(p, "i feel sad. i feel sad.") == 1 - .5
    assert world.utility(p, "i feel sad purple banana.") == pytest.approx(1 - .6)
    assert world.utility(p, "anna sad laptop") == pytest.approx(-.9)  # keywords state nothing
    assert world.utility(p, "i feel sad. " + "any help is welcome. " * 9) == pytest.approx(1 - .3 * (3 + 36 - 36))


def test_axes_lie_between_1_and_7(posts):
    full = world.axes(posts[0], world.full_summary(posts[0]))
    assert full == {"coverage": 7, "accuracy": 7, "coherence": 7, "overall": 7}
    for text in ("", "banana " * 60, posts[0]["post"]):
        assert all(1 <= v <= 7 for v in world.axes(posts[0], text).values())


def agreement(labeler, posts, better, worse, n=1500):
    rng, right = random.Random(1), 0
    for i in range(n):
        p, flip = posts[i % len(posts)], rng.random() < .5
        a, b = (worse(p), better(p)) if flip else (better(p), worse(p))
        right += labeler.compare(p, a, b)[0] == int(flip)
    return right / n


def test_labeler_is_bradley_terry(posts):
    """One fact apart at temperature 1: σ(1) = 0.731; the worker's own weights are switched off."""
    full = world.full_summary
    without = lambda p: full(p).replace(f" {p['facts']['time']}", "", 1)
    labeler = world.Labeler(noise=1.0, spread=0.0)
    assert agreement(labeler, posts, full, without, 4000) == pytest.approx(0.731, abs=0.025)


def test_labeler_dials(posts):
    full, short = world.full_summary, lambda p: "i feel {feeling}.".format(**p["facts"])
    assert agreement(world.Labeler(noise=.01), posts, full, short) == 1
    assert agreement(world.Labeler(noise=.01, flipped=True), posts, full, short) == 0
    assert agreement(world.Labeler(noise=100.), posts, full, short) == pytest.approx(.5, abs=.06)
    longer = lambda p: full(p) + " any help is welcome."
    assert agreement(world.Labeler(noise=.1, length_bias=20.), posts, longer, full) > .95
    copied = lambda p: p["post"].split("\n")[0]
    assert agreement(world.Labeler(noise=.1, copy_bias=20.), posts, copied, full) > .95
    assert agreement(world.Labeler(noise=.1), posts, copied, full) < .05


def labeler_of(worth, **dials):
    """A labeler to whom text t is worth worth[t] key facts."""
    labeler = world.Labeler(**dials)
    labeler.worth = lambda post, text, worker: worth[text]
    return labeler


def test_rankings_are_plackett_luce():
    """Catches mistakes of another distribution or scale, and ranks that run from worst to best: every order of three, and the best
    of them, against Π e^u_i / Σ_{j≥i} e^u_j; a ranking of two is as noisy as compare()."""
    worth, n = {"a": 1.3, "b": .4, "c": -.5}, 20000
    labeler = labeler_of(worth, noise=0.9)
    e = {t: math.exp(u / 0.9) for t, u in worth.items()}
    orders = Counter("".join(t for _, t in sorted(zip(labeler.rank(None, list("abc"))[0], "abc"))) for _ in range(n))
    for order in itertools.permutations("abc"):
        p = math.prod(e[t] / sum(e[s] for s in order[i:]) for i, t in enumerate(order))
        assert orders["".join(order)] / n == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / n))
    best = Counter(labeler.best_of(None, list("abc"))[0] for _ in range(n))
    for i, t in enumerate("abc"):
        assert best[i] / n == pytest.approx(e[t] / sum(e.values()), abs=.015)
    two = [np.mean([answer(None) for _ in range(n)]) for answer in (lambda p: labeler.rank(p, ["a", "b"])[0] == [0, 1],
                                                                    lambda p: labeler.compare(p, "a", "b")[0] == 0)]
    assert two == pytest.approx([1 / (1 + math.exp(-1))] * 2, abs=.015)


def test_ranks_ties_and_dials():
    """Catches ranks that skip or count ties twice, ties where none are wanted, and a flipped labeler who ranks as others do."""
    worth = {"a": 3.1, "b": 1., "c": 2.9, "d": .9}
    assert labeler_of(worth, noise=1e-9).rank(None, list("abcd"))[0] == [0, 2, 1, 3]
    assert labeler_of(worth, noise=1e-9, tie=.5).rank(None, list("abcd"))[0] == [0, 2, 0, 2]  # how many are better
    assert labeler_of(worth, noise=1e-9, tie=50.).rank(None, list("abcd"))[0] == [0, 0, 0, 0]
    assert labeler_of(worth, noise=1e-9, tie=.5).best_of(None, list("bdac"))[0] == 2
    post = world.make_posts(1, 0, "x")[0]
    texts = [world.full_summary(post), "i feel {feeling}.".format(**post["facts"]), "purple banana"]
    assert world.Labeler(noise=.01).rank(post, texts)[0] == [0, 1, 2] and world.Labeler(noise=.01).best_of(post, texts)[0] == 0
    flipped = world.Labeler(noise=.01, flipped=True)
    assert flipped.rank(post, texts)[0] == [2, 1, 0] and flipped.best_of(post, texts)[0] == 2
    assert {flipped.rank(post, texts)[1] for _ in range(200)} == {f"worker-{i}" for i in range(10)}


def test_workers_differ_and_are_reproducible(posts):
    a, b = world.Labeler(seed=3), world.Labeler(seed=3)
    assert a.weights == b.weights and a.weights[0] != a.weights[1]
    pairs = [(p, world.full_summary(p), p["summary"]) for p in posts[:50]]
    assert [a.compare(*pair) for pair in pairs] == [b.compare(*pair) for pair in pairs]
    assert {a.compare(*pairs[0])[2] for _ in range(200)} == {f"worker-{i}" for i in range(10)}
    assert all(1 <= a.compare(*pair)[1] <= 9 for pair in pairs)


def test_posts_are_reproducible_and_splits_disjoint():
    a, b, c = world.make_posts(50, 1, "x"), world.make_posts(50, 1, "x"), world.make_posts(50, 1, "y")
    assert a == b and not {p["post"] for p in a} & {p["post"] for p in c}
    assert all(p["subreddit"] in world.SUBREDDITS for p in a)
    assert all(p["subreddit"] in world.OTHER_SUBREDDITS for p in world.make_posts(50, 1, "z", listed=0))


def test_facts_stand_in_the_post():
    for p in world.make_posts(200, 2, "x"):
        assert all(re.search(rf"\b{value}\b", p["post"]) for value in p["facts"].values())


# --- the second world


def test_news_are_another_world():
    """Catches a table that two worlds share, a judge who reads news with the first world's sentences, or the other way round."""
    home, news = world.make_posts(300, 0, "test"), world.make_posts(300, 0, "test", 1.0, world.NEWS)
    for slot in ("name", "object", "place", "feeling", "wish", "question"):
        assert not set(world.SLOTS[slot]) & set(world.NEWS.slots[slot])
    assert {world.world_of(p) for p in home} == {"reddit"} and {world.world_of(p) for p in news} == {"news"}
    for post in news[:50]:
        assert world.utility(post, world.full_summary(post)) == 7
        claims, odd = world.read(post["post"], "news")
        assert odd == 0 and set(claims) <= set(post["facts"].items())
        assert world.read(post["post"])[1] > .8 * len(world.words(post["post"]))  # to the first world it is salad
    assert win_rate(news, world.full_summary) >= .95
    for name in ("keyword salad", "lead-3", "pasted post", "title", "empty"):
        assert win_rate(news, RIVALS[name]) < .5, name
    wrong = with_facts(news[0], name=next(v for v in world.NEWS.slots["name"] if v != news[0]["facts"]["name"]))
    assert world.utility(news[0], world.full_summary(wrong)) == 7 - .5 - world.CONTRADICTION
