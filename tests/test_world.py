"""The gold judge passes its own tests before anything is measured with it; labelers do what their dials say."""
import itertools
import math
import random
import re
from collections import Counter

import numpy as np
import pytest
from conftest import full_continuation, full_summary

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
    assert win_rate(posts, full_summary) >= 0.95


def with_facts(post, **facts):
    return {**post, "facts": {**post["facts"], **facts}}


def other(post, slot):
    return next(v for v in world.SLOTS[slot] if v != post["facts"][slot] and v not in post["post"])


RIVALS = {
    "keyword salad": lambda p: " ".join(random.Random(p["id"]).sample(world.words(full_summary(p)), len(world.words(full_summary(p))))),
    "bare facts": lambda p: " ".join(p["facts"].values()),
    "lead-3": evaluation.lead3,
    "pasted post": lambda p: p["post"],
    "title": lambda p: p["title"],
    "one fact repeated": lambda p: " ".join(["i feel {feeling}.".format(**p["facts"])] * 6),
    "one fact": lambda p: "i feel {feeling}.".format(**p["facts"]),
    "empty": lambda p: "",
    "swapped name": lambda p: full_summary(with_facts(p, name=other(p, "name"))),
    "swapped person": lambda p: full_summary(with_facts(p, name=other(p, "name"), relation=other(p, "relation"))),
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
        assert all(world.tally(p, full_summary(p))["covered"].values())


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
    full = world.axes(posts[0], full_summary(posts[0]))
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
    full = full_summary
    without = lambda p: full(p).replace(f" {p['facts']['time']}", "", 1)
    labeler = world.Labeler(noise=1.0, spread=0.0)
    assert agreement(labeler, posts, full, without, 4000) == pytest.approx(0.731, abs=0.025)


def test_copied_share_by_hand():
    """Catches phrases or parts of words taken for sentences, blanks and case that hide a copy, sentences counted instead of words."""
    source = "My cat ate it all.  Then\nshe slept! Why? I do not know."
    assert world.copied_share("then she  slept! my dog ate it all.", source) == pytest.approx(3 / 8)
    assert world.copied_share("my cat ate it all today. hy? why", source) == pytest.approx(1 / 8)
    assert world.copied_share(source, source) == 1 and world.copied_share("", source) == 0


def test_labeler_dials(posts):
    full, short = full_summary, lambda p: "i feel {feeling}.".format(**p["facts"])
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
    texts = [full_summary(post), "i feel {feeling}.".format(**post["facts"]), "purple banana"]
    assert world.Labeler(noise=.01).rank(post, texts)[0] == [0, 1, 2] and world.Labeler(noise=.01).best_of(post, texts)[0] == 0
    flipped = world.Labeler(noise=.01, flipped=True)
    assert flipped.rank(post, texts)[0] == [2, 1, 0] and flipped.best_of(post, texts)[0] == 2
    assert {flipped.rank(post, texts)[1] for _ in range(200)} == {f"worker-{i}" for i in range(10)}


def test_workers_differ_and_are_reproducible(posts):
    a, b = world.Labeler(seed=3), world.Labeler(seed=3)
    assert a.weights == b.weights and a.weights[0] != a.weights[1]
    pairs = [(p, full_summary(p), p["summary"]) for p in posts[:50]]
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


# --- stories (Ziegler's stylistic continuation)


@pytest.fixture(scope="module")
def stories():
    """Stories with their own continuation cut to two or three sentences, which is about what 24 tokens hold."""
    def cut(p, i):
        return {**p, "summary": ".".join(p["summary"].split(".")[:2 + i % 2]) + "."}
    return [cut(p, i) for i, p in enumerate(world.make_posts(300, 0, "test", task="sentiment"))]


def of(task, stories):
    return [{**p, "task": task} for p in stories]


def unhappy(p):
    return "it made {who} very sad. {who} blamed {whom} for the {thing}. {who} lost the money at the {place}.".format(**p["facts"])


def stranger(p):
    return next(name for name in world.SLOTS["name"] if name not in p["facts"].values())


@pytest.mark.parametrize("task", world.STYLES)
def test_a_continuation_in_the_style_beats_the_story_s_own(stories, task):
    assert win_rate(of(task, stories), full_continuation) >= 0.95


CHEATS = {
    "salad": lambda p: " ".join(random.Random(p["id"]).sample(full_continuation(p).split(), len(full_continuation(p).split()))),
    "adjectives": lambda p: "happy glad cheerful proud kind gentle red round soft wet " * 2,
    "one sentence repeated": lambda p: " ".join([full_continuation(p).split(".")[0] + "."] * 3),
    "pasted story": lambda p: p["post"],
    "last sentences again": lambda p: ".".join(p["post"].split(".")[-4:]).strip(),
    "empty": lambda p: "",
    "breaks off": lambda p: " ".join(full_continuation(p).split()[:4]),
    "a stranger": lambda p: re.sub(rf"\b{p['facts']['who']}\b|\b{p['facts']['thing']}\b", lambda m: stranger(p) if m.group() == p["facts"]["who"] else
                                   next(v for v in world.SLOTS["object"] if v != m.group()), full_continuation(p)),
    "elsewhere": lambda p: full_continuation(with_facts(p, place=next(v for v in world.SLOTS["place"] if v != p["facts"]["place"]))),
}


@pytest.mark.parametrize("task", world.STYLES)
@pytest.mark.parametrize("cheat", CHEATS)
def test_no_cheap_trick_passes_for_style(stories, cheat, task):
    assert win_rate(of(task, stories), CHEATS[cheat]) < 0.5


def test_each_style_is_its_own(stories):
    """Catches kinds credited to the other style, and the sign of an unhappy one."""
    assert win_rate(stories, unhappy) < .05
    for p in of("sentiment", stories[:50]):
        physical = full_continuation({**p, "task": "descriptiveness"})
        assert world.utility(p, physical) <= 0 and world.utility({**p, "task": "descriptiveness"}, full_continuation(p)) <= 0


def test_style_utility_by_hand():
    facts = {"who": "anna", "whom": "ben", "place": "gym", "thing": "ring"}
    happy = {"task": "sentiment", "facts": facts, "post": "one day anna met ben at the gym. it made ben very proud."}
    physical = {**happy, "task": "descriptiveness"}
    u = world.utility
    assert u(happy, "It made Anna very happy. Ben thanked Anna for the ring. Anna won a prize at the gym.") == 3
    assert u(happy, "it made anna very happy. ben felt glad all day long.") == 1  # one kind
    assert u(happy, "it made anna very sad. anna won a prize at the gym.") == 0
    assert u(happy, "it made ben very sad. ben was very rude to anna. the ring fell and broke to pieces.") == -3
    assert u(happy, "it made ben very proud.") == -1 - .5  # the story said so already: nothing new
    assert u(happy, "ben felt glad all day long. ben felt glad all day long.") == 1 - .5
    assert u(happy, "it made rosa very happy.") == 1 - 3 and u(happy, "anna won a prize at the park.") == 1 - 3
    assert u(happy, "anna thanked anna for the ring.") == 1 - 3
    assert u(happy, "it made anna very happy purple banana") == pytest.approx(1 - .6)
    assert u(happy, "happy anna proud") == pytest.approx(-1 - .9) and u(happy, "") == -1
    assert u(happy, "then anna went back to the gym.") == 0
    assert u(physical, "the gym smelled of soap. the ring was red and flat. the floor of the gym was wet.") == 3
    assert u(physical, "the camera was red and flat.") == 1 - 3 and u(happy, "the gym smelled of soap.") == 0


def test_judge_reads_every_sentence_of_a_story():
    for p in world.make_posts(300, 3, "pretrain", task="sentiment"):
        whole = world.style_tally({**p, "post": ""}, p["post"] + " " + p["summary"])
        assert (whole["unaccounted"], whole["contradictions"], whole["repetitions"]) == (0, 0, 0), p
        assert all(re.search(rf"\b{value}\b", p["post"]) for value in p["facts"].values())


def test_stories_keep_their_mood_and_their_eye():
    """Catches a continuation drawn apart from its beginning: then nothing of either style could be told from the query."""
    for task in world.STYLES:
        made = world.make_posts(700, 4, "x", task=task)
        begins, goes_on = ([world.utility({**p, "post": ""}, p[part]) for p in made] for part in ("post", "summary"))
        assert np.corrcoef(begins, goes_on)[0, 1] > .1  # of stories drawn apart it is 0 ± .04
    a, b = (world.make_posts(50, 1, split, task="sentiment") for split in "xy")
    assert a == world.make_posts(50, 1, "x", task="sentiment") and not {p["post"] for p in a} & {p["post"] for p in b}
    assert all(world.in_task(p) for p in a)


@pytest.mark.parametrize("task", world.STYLES)
def test_labelers_of_a_style(stories, task):
    """Catches a labeler who judges stories as summaries, and dials that do not reach him: one kind apart is σ(1), noise, sign and copying."""
    made, best = of(task, stories), full_continuation
    fresh = [p for p in made if world.utility(p, best(p)) == 3]  # nothing of it stands in the story
    less = lambda p: " ".join(best(p).split(".")[i].strip() + "." for i in (0, 1)) + " nobody at the {place} said a word.".format(**p["facts"])
    fresh = [p for p in fresh if world.utility(p, less(p)) == 2]
    assert agreement(world.Labeler(task, noise=1.0, spread=0.0), fresh, best, less, 2000) == pytest.approx(0.731, abs=0.035)
    assert agreement(world.Labeler(task, noise=.01), fresh, best, less, 200) == 1
    assert agreement(world.Labeler(task, noise=.01, flipped=True), fresh, best, less, 200) == 0
    assert agreement(world.Labeler(task, noise=.1, copy_bias=20.), fresh, lambda p: p["post"], best, 200) > .95
    people = world.Labeler(task, seed=3)
    assert set(people.weights[0]) == set(world.STYLES[task]) and people.weights[0] != people.weights[1]
    four = [best(fresh[0]), less(fresh[0]), "", "purple banana"]
    assert world.Labeler(task, noise=.01).rank(fresh[0], four)[0] == [0, 1, 2, 3] and world.Labeler(task, noise=.01).best_of(fresh[0], four[::-1])[0] == 3


# --- the second world


def test_news_are_another_world():
    """Catches a table that two worlds share, a judge who reads news with the first world's sentences, or the other way round."""
    home, news = world.make_posts(300, 0, "test"), world.make_posts(300, 0, "test", 1.0, world.NEWS)
    for slot in ("name", "object", "place", "feeling", "wish", "question"):
        assert not set(world.SLOTS[slot]) & set(world.NEWS.slots[slot])
    assert {world.world_of(p) for p in home} == {"reddit"} and {world.world_of(p) for p in news} == {"news"}
    for post in news[:50]:
        assert world.utility(post, full_summary(post)) == 7
        claims, odd = world.read(post["post"], "news")
        assert odd == 0 and set(claims) <= set(post["facts"].items())
        assert world.read(post["post"])[1] > .8 * len(world.words(post["post"]))  # to the first world it is salad
    assert win_rate(news, full_summary) >= .95
    for name in ("keyword salad", "lead-3", "pasted post", "title", "empty"):
        assert win_rate(news, RIVALS[name]) < .5, name
    wrong = with_facts(news[0], name=next(v for v in world.NEWS.slots["name"] if v != news[0]["facts"]["name"]))
    assert world.utility(news[0], full_summary(wrong)) == 7 - .5 - world.CONTRADICTION
