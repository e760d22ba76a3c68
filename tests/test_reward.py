"""reward.py: the loss and its sign, which text stands behind which score, training, the shift."""
import random

import pytest
import torch
from conftest import random_rows, tiny_model

from data import encode_query, encode_response
from reward import (RewardSettings, group_by_post, pairwise_loss, sample_responses, score_all, score_groups, score_responses,
                    train_reward)


def alone(model, query, response):
    return model.scores(torch.tensor([query + response]), torch.tensor([len(query + response)])).item()


def test_pairwise_loss_by_hand_and_sign():
    """Catches the minus that the papers forgot to print, and chosen and rejected swapped (Ziegler's bug)."""
    r_w, r_l = torch.tensor([.5]), torch.tensor([.1])
    assert pairwise_loss(r_w, r_l).item() == pytest.approx(.513015, abs=1e-6)
    assert pairwise_loss(r_l, r_w).item() == pytest.approx(.513015 + .4, abs=1e-6)
    assert pairwise_loss(r_w, r_w).item() == pytest.approx(.693147, abs=1e-6)
    assert pairwise_loss(torch.tensor([.5, 2.]), torch.tensor([.1, 2.])).item() == pytest.approx((.513015 + .693147) / 2, abs=1e-6)
    assert pairwise_loss(r_w - 200, r_l).item() == pytest.approx(199.6, abs=1e-3)  # and not inf


def test_pairwise_loss_sees_differences_only(g):
    """Catches a loss that cares for the level of the scores; its gradient raises the chosen as it lowers the rejected."""
    w, l = torch.randn(6, generator=g, requires_grad=True), torch.randn(6, generator=g, requires_grad=True)
    assert pairwise_loss(w + 3, l + 3).item() == pytest.approx(pairwise_loss(w, l).item(), abs=1e-6)
    pairwise_loss(w, l).backward()
    assert (w.grad < 0).all() and torch.equal(w.grad, -l.grad)


def comparison(post, a, b, choice, name="some"):
    info = {"id": post, "subreddit": "x", "title": "my dog", "post": f"the {name} dog ate {post}."}
    return {"info": info, "summaries": [{"text": " " + t, "policy": "p"} for t in (a, b)], "choice": choice}


COMPARISONS = [comparison("one", "good cat", "bad dog", 0), comparison("two", "my cat", "the dog", 1, "very big"),
               comparison("one", "the", "good cat", 0), comparison("one", "bad dog", "the", 1),
               comparison("three", "dog", "cat ate the dog", 1), comparison("two", "the dog", "ate", 1, "very big")]


def test_scores_belong_to_their_texts(enc):
    """Catches a wrong offset, a choice read the wrong way round, and rows mixed up between posts."""
    model = tiny_model("scalar", vocab_size=enc.n_vocab, n_positions=90)
    groups = group_by_post(enc, COMPARISONS, 80, 8)
    with torch.no_grad():
        chosen, rejected = score_groups(model, groups)
    order = [i for group in groups for i in group["index"]]
    assert sorted(order) == list(range(6)) == sorted(range(len(chosen)))

    def score(c, which):
        return alone(model, encode_query(enc, c["info"], 80), encode_response(enc, c["summaries"][which]["text"], 8))
    for k, i in enumerate(order):
        c = COMPARISONS[i]
        assert chosen[k].item() == pytest.approx(score(c, c["choice"]), abs=1e-5)
        assert rejected[k].item() == pytest.approx(score(c, 1 - c["choice"]), abs=1e-5)
    assert (chosen - rejected).abs().min() > 1e-3  # so that a swap would show


def test_a_post_is_one_group_and_a_summary_one_response(enc):
    """Catches comparisons of one post in two groups (they could be trained on and held out) and forward passes doubled."""
    groups = group_by_post(enc, COMPARISONS, 80, 8)
    assert [g["index"] for g in groups] == [[0, 2, 3], [1, 5], [4]]
    assert [len(g["responses"]) for g in groups] == [3, 3, 2]
    unnamed = [{**c, "info": {k: v for k, v in c["info"].items() if k != "id"}} for c in COMPARISONS]  # no id: by text
    assert [g["index"] for g in group_by_post(enc, unnamed, 80, 8)] == [[0, 2, 3], [1, 5], [4]]
    rng = random.Random(0)
    many = [comparison(f"p{rng.randrange(20)}", "good", "bad", 0) for _ in range(100)]
    seen = [{many[i]["info"]["id"] for i in group["index"]} for group in group_by_post(enc, many, 80, 8)]
    assert all(len(s) == 1 for s in seen) and len(set.union(*seen)) == len(seen)


def separable_groups(n, seed, flipped=False):
    """Posts of random tokens with four summaries of two tokens; better is the one with more 1s and fewer 2s."""
    rng, groups = random.Random(seed), []
    for _ in range(n):
        query = [rng.randrange(10) for _ in range(rng.randrange(3, 8))]
        best_first, order = [[1, 1], [3, 1], [2, 3], [2, 2]], rng.sample(range(4), 4)
        pairs = [(order.index(w), order.index(l)) for w, l in [(0, 1), (1, 2), (2, 3), (0, 3)]]
        groups.append({"query": query, "responses": [best_first[i] + [10] for i in order], "index": [],
                       "pairs": [(l, w) if flipped else (w, l) for w, l in pairs]})
    return groups


def accuracy(model, groups):
    with torch.no_grad():
        chosen, rejected = score_groups(model, groups)
    return (chosen > rejected).float().mean().item()


@pytest.mark.parametrize("flipped", [False, True])
def test_training_learns_what_was_chosen(tmp_path, flipped):
    """Catches a reward model that learns the opposite; flipped labels must give exactly that."""
    model = tiny_model("scalar")
    s = RewardSettings(lr=3e-3, batch=8, warmup=3)
    train_reward(model, separable_groups(200, 0, flipped), random_rows(torch.Generator().manual_seed(1)), s, str(tmp_path), 0)
    held_out = accuracy(model, separable_groups(50, 1))
    assert held_out < 0.02 if flipped else held_out > 0.98


def test_the_shift_makes_references_0_and_moves_nothing_else(tmp_path, g):
    """Catches a shift with the wrong sign or of the wrong rows, and one that changes preferences."""
    held_out, references = separable_groups(10, 1), [random_rows(g, n=20) for _ in range(2)]
    margins = []
    for i, refs in enumerate(references):
        model = tiny_model("scalar")
        train_reward(model, separable_groups(40, 0), refs, RewardSettings(), str(tmp_path / str(i)), 0)
        assert abs(score_all(model, *refs).mean()) < 1e-4
        with torch.no_grad():
            margins.append(torch.sub(*score_groups(model, held_out)))
            assert abs(score_all(model, *references[1 - i]).mean()) > 1e-3
    torch.testing.assert_close(margins[0], margins[1], atol=1e-5, rtol=0)


def test_score_all_keeps_the_order(g):
    """Catches scores handed back sorted by length, and responses of one query given to another."""
    model, (queries, _), (_, responses) = tiny_model("scalar"), random_rows(g, n=9), random_rows(g, n=27)
    expected = [[alone(model, q, responses[3 * i + k]) for k in range(3)] for i, q in enumerate(queries)]
    torch.testing.assert_close(score_all(model, queries, responses, n=3, batch=12), torch.tensor(expected), atol=1e-5, rtol=0)


def test_score_responses_of_uneven_groups(g):
    """Catches padding taken for a response, where queries have different numbers of them."""
    model, (queries, responses) = tiny_model("scalar"), random_rows(g, n=3)
    groups = [responses[:1], responses, responses[1:]]
    out = score_responses(model, queries, groups)
    for i, group in enumerate(groups):
        expected = [alone(model, queries[i], r) for r in group] + [0.0] * (3 - len(group))
        torch.testing.assert_close(out[i], torch.tensor(expected), atol=1e-5, rtol=0)


def test_sample_responses_keeps_the_order(g):
    """Catches samples handed to another query: greedy samples of a batch must be those of each query alone."""
    model, (queries, _) = tiny_model(seed=3), random_rows(g, n=9)
    together = sample_responses(model, queries, 6, 0, g, n=2, batch=8)
    for i, query in enumerate(queries):
        tokens, ends, _ = model.generate(torch.tensor([query]), torch.tensor([len(query)]), 6, 0, 10)
        assert together[2 * i] == together[2 * i + 1] == tokens[0, len(query):ends[0]].tolist()
    drawn = sample_responses(model, queries, 6, 1.0, g, n=2)
    assert len(drawn) == 18 and any(a != b for a, b in zip(drawn[::2], drawn[1::2]))
    assert all(len(r) == 6 or r[-1] == 10 for r in drawn)
