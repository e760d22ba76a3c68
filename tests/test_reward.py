"""reward.py: the loss and its sign, which text stands behind which score, training, the shift."""
import dataclasses
import itertools
import math
import random
from types import SimpleNamespace

import pytest
import torch
from conftest import random_rows, tiny_model

import reward
from data import DataError, encode_query, encode_response
from reward import (CollectSettings, RewardSettings, best_of_loss, check_labels, collect, group_by_post, group_loss, kwise_loss, normalise,
                    pairwise_loss, ranks_of, sample_responses, score_all, score_groups, score_responses, train_reward, ungroup)
from sft import read_metrics


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


def test_best_of_loss_by_hand_and_gradient():
    """Catches a flipped sign, an index off by one, and a query with fewer responses whose filler counts."""
    r, best = torch.tensor([[.1, .5, -.3, 0.]], requires_grad=True), torch.tensor([1])
    loss = best_of_loss(r, best)
    assert loss.item() == pytest.approx(1.002901, abs=1e-6)
    loss.backward()
    p = r.detach().exp() / r.detach().exp().sum()
    torch.testing.assert_close(r.grad, p - torch.tensor([[0., 1, 0, 0]]))  # what the best gains the others lose
    three = torch.cat([torch.tensor([[.1, .5, -.3]]), torch.tensor([[-float("inf")]])], 1)
    assert best_of_loss(three, best) == best_of_loss(three[:, :3], best)
    two = torch.tensor([[.5, .1], [2., 2.]])
    torch.testing.assert_close(best_of_loss(two, torch.tensor([0, 1])), pairwise_loss(*two.T))  # of two, the choice is the pair
    assert best_of_loss(two + torch.tensor([[7.], [-3.]]), torch.tensor([0, 1])).item() == pytest.approx(pairwise_loss(*two.T).item(), abs=1e-6)


def test_kwise_loss_by_hand():
    """Catches a flipped sign and ranks read upside down."""
    scores = torch.tensor([[.2, -.5, 1.]])
    assert kwise_loss(scores, torch.tensor([[1, 2, 0]])).item() == pytest.approx(.325233, abs=1e-6)
    assert kwise_loss(scores, torch.tensor([[1, 0, 2]])).item() == pytest.approx((.7 + 1.5 + .8) / 3 + .325233, abs=1e-6)
    w, l = torch.randn(2, 6)
    torch.testing.assert_close(kwise_loss(torch.stack([l, w], 1), torch.tensor([[1, 0]] * 6)), pairwise_loss(w, l))


def test_kwise_loss_is_the_mean_of_means_over_pairs(g):
    """Catches a mean over all pairs at once (a prompt of 9 would outweigh one of 2), ties that count, prompts where all is tied in
    the divisor, and fillers: against the sum over pairs, prompt by prompt, values and gradients."""
    ranks = [[3, 1, 0, 2, 4], [0, 1], [0, 0, 2, 2, 4], [1, 1, 1], [0, 2, 0]]
    scores = torch.randn(5, 5, generator=g).double().requires_grad_()
    table = torch.full((5, 5), float("nan")).double()
    means = []
    for b, rank in enumerate(ranks):
        table[b, :len(rank)] = torch.tensor(rank)
        pairs = [(i, j) for i, j in itertools.permutations(range(len(rank)), 2) if rank[i] < rank[j]]
        if pairs:
            means.append(sum(torch.log(1 + torch.exp(scores[b, j] - scores[b, i])) for i, j in pairs) / len(pairs))
    expected = sum(means) / 4
    loss = kwise_loss(scores, table)
    assert len(means) == 4 and loss.item() == pytest.approx(expected.item(), abs=1e-12)
    gradient, = torch.autograd.grad(loss, scores)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, scores)[0], atol=1e-12, rtol=0)
    assert (gradient[3] == 0).all() and (gradient[1, 2:] == 0).all() and abs(gradient.sum(1)).max() < 1e-12
    garbage = torch.where(table.isnan(), float("nan"), scores.detach()).requires_grad_()
    again = kwise_loss(garbage, table)
    torch.testing.assert_close(torch.autograd.grad(again, garbage)[0], gradient)
    tied = torch.zeros(2, 3, requires_grad=True)
    kwise_loss(tied, torch.ones(2, 3)).backward()  # nothing to learn from: 0 and no NaN
    assert (tied.grad == 0).all()


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


def test_gain_bias_gives_mean_0_and_variance_1(g):
    """Catches gain and bias in the wrong order, the unbiased variance, and a gain that does not reach the saved model."""
    model, rows = tiny_model("scalar"), random_rows(g, n=20)
    with torch.no_grad():
        model.score.bias += 5
    before = score_all(model, *rows)
    normalise(model, *rows, gain=True)
    after = score_all(model, *rows)
    assert abs(after.mean()) < 1e-5 and after.std(unbiased=False).item() == pytest.approx(1, abs=1e-4)
    torch.testing.assert_close(after, (before - before.mean()) / before.std(unbiased=False), atol=1e-4, rtol=0)
    with torch.no_grad():
        model.score.weight.zero_()
    with pytest.raises(DataError, match="same score"):
        normalise(model, *rows, gain=True)


def test_gain_bias_is_applied_before_and_after_training(g, tmp_path):
    """Catches a switch that is dead on either side: the first loss is that of unit variance, and so are the last scores."""
    rows, logs = random_rows(g, n=20), {}
    for how in ("reference", "gain_bias"):
        model, s = tiny_model("scalar"), RewardSettings(normalise=how, lr=3e-3)
        with torch.no_grad():
            model.score.weight *= 100
        train_reward(model, separable_groups(40, 0), rows, s, str(tmp_path / how), 0)
        spread = score_all(model, *rows).std(unbiased=False).item()
        logs[how] = read_metrics(tmp_path / how)[0]["loss"]
        loaded = score_all(type(model).from_pretrained(str(tmp_path / how), "scalar"), *rows)
        assert abs(loaded.mean()) < 1e-4 and loaded.std(unbiased=False).item() == pytest.approx(spread, rel=1e-3)
        assert (abs(spread - 1) < 1e-3) == (how == "gain_bias")
    assert logs["reference"] > 2 * logs["gain_bias"]


def test_normalising_rows_are_references_or_samples(enc, g, tmp_path):
    """Catches references taken for samples: a model that says one word only gives itself away."""
    posts = [comparison(str(i), "a", "b", 0)["info"] | {"summary": "good cat"} for i in range(3)]
    model = tiny_model(vocab_size=enc.n_vocab, n_positions=90)
    model.save_pretrained(tmp_path / "sft")
    config = {"settings": {"ppo": {"temperature": 1e-4}}}
    run = SimpleNamespace(folder=str(tmp_path), enc=enc, posts={"sft": posts}, Q=80, R=6, seed=0, config=config, stop=None)
    queries, references = reward.normalising_rows(run, RewardSettings(), "cpu")
    same, samples = reward.normalising_rows(run, RewardSettings(normalise="gain_bias"), "cpu")
    assert queries == same == [encode_query(enc, p, 80) for p in posts]
    assert references == [encode_response(enc, "good cat", 6)] * 3
    assert samples == sample_responses(model, queries, 6, 0, g) != references  # nearly greedy at this temperature
    run.stop = samples[0][1], 2  # another token ends a response: samples do, and references have no EOS
    assert reward.normalising_rows(run, RewardSettings(), "cpu")[1] == [encode_response(enc, "good cat", 6)[:-1]] * 3
    _, ended = reward.normalising_rows(run, RewardSettings(normalise="gain_bias"), "cpu")
    assert ended == sample_responses(model, queries, 6, 0, g, stop=run.stop) != samples


# --- rankings and choices of the best, from the labeler to the loss


class Reader:
    """A labeler without noise: the more a's the better; as many are a tie."""

    def compare(self, post, a, b):
        return int(a.count("a") < b.count("a")), 5, "me"

    def rank(self, post, texts):
        return [sum(t.count("a") > text.count("a") for t in texts) for text in texts], "me"

    def best_of(self, post, texts):
        return max(range(len(texts)), key=lambda i: texts[i].count("a")), "me"


def asked(enc, texts, labels, monkeypatch, pairs=99):
    """collect() on one post whose samples are given."""
    monkeypatch.setattr(reward, "sample_responses", lambda *a, stop: [encode_response(enc, t, 20) for t in texts])
    post = comparison("one", "", "", 0)["info"] | {"summary": "ref aaaaaaa", "facts": {}}
    rows = collect(enc, [post], [("p", None, 1., len(texts))], Reader(), pairs, 80, 20, None, random.Random(0), "train", labels)
    said = [tuple(r["summaries"][k]["text"].strip() for k in (r["choice"], 1 - r["choice"])) for r in rows]
    return rows, said


def test_a_ranking_is_its_pairs(enc, monkeypatch):
    """Catches ties and equal or empty texts written down, the reference taken for a sample, a choice that tells its place, and ranks
    that do not come back."""
    texts = ["a", "aaa b", "c", "aaa d", "c", "", "aa"]
    rows, said = asked(enc, texts, "rank", monkeypatch)
    rank = {"aaa b": 0, "aaa d": 0, "aa": 2, "a": 3, "c": 4}
    assert sorted(said) == sorted((x, y) for x, y in itertools.permutations(rank, 2) if rank[x] < rank[y])
    assert all(r["extra"] == {"confidence": None} and r["worker"] == "me" for r in rows) and {r["choice"] for r in rows} == {0, 1}
    group, = group_by_post(enc, rows, 80, 20)
    ranks = ranks_of([group])[0]
    assert {enc.decode(ids[:-1]).strip(): int(r) for ids, r in zip(group["responses"], ranks)} == rank
    check_labels([group], "kwise")


def test_a_choice_of_the_best_is_its_pairs(enc, monkeypatch):
    """Catches a choice read as another's; the loss over the group is the one over the scores as they stand."""
    rows, said = asked(enc, ["a", "aaa", "c", "aa"], "best_of", monkeypatch)
    assert sorted(said) == [("aaa", "a"), ("aaa", "aa"), ("aaa", "c")]
    group, = group_by_post(enc, rows, 80, 20)
    check_labels([group], "best_of")
    pairs, said = asked(enc, ["a", "aaa", "c", "aa"], "pairs", monkeypatch)  # and with pairs, as before, the reference takes part
    assert len(pairs) == 10 and ("ref aaaaaaa", "aaa") in said and len(asked(enc, ["a", "b"], "pairs", monkeypatch, 2)[0]) == 2
    assert asked(enc, ["", ""], "best_of", monkeypatch)[0] == asked(enc, ["a", "a"], "rank", monkeypatch)[0] == []  # nothing to choose


def test_samples_without_an_end_are_not_shown(enc, monkeypatch):
    """Catches labels on what PPO never scores, and samples that did end taken away."""
    dot, said = enc.encode_ordinary(".")[0], {}
    monkeypatch.setattr(reward, "sample_responses", lambda *a, stop: [enc.encode_ordinary(" " + t) for t in ("a.", "aa", "aaa aaa.", "good good.")])
    post = comparison("one", "", "", 0)["info"] | {"summary": "bad", "facts": {}, "task": "sentiment"}
    for stop, task in (((dot, 0), "sentiment"), ((dot, 2), "sentiment"), (None, "tldr")):
        post["task"] = task
        rows = collect(enc, [post], [("p", None, 1., 4)], Reader(), 9, 80, 20, None, random.Random(0), "train", "best_of", stop)
        said[stop] = sorted(r["summaries"][k]["text"].strip() for r in rows for k in (r["choice"], 1 - r["choice"]))
        assert all(r["info"]["task"] == task for r in rows)
    assert said[dot, 0] == ["a.", "aaa aaa.", "aaa aaa.", "good good."] and said[dot, 2] == ["aaa aaa.", "good good."] and len(said[None]) == 6


UNEVEN = [{"query": [1, 2, 3], "responses": [[4, 10], [5, 6, 10], [7, 10]], "pairs": [(1, 0), (1, 2)]},
          {"query": [4], "responses": [[3, 10], [2, 10]], "pairs": [(0, 1)]}]


def test_group_loss_is_the_loss_of_the_labels():
    """Catches ranks or the best given to another response, and fillers of uneven groups that count."""
    scores = torch.tensor([[.3, -.2, 1.1], [.7, .4, 0.]])
    assert torch.equal(ranks_of(UNEVEN)[0], torch.tensor([1., 0, 1])) and ranks_of(UNEVEN)[1].isnan().tolist() == [False, False, True]
    one, two = scores[0].exp(), scores[1, :2].exp()
    both = (one[1] / one.sum()).log() + (two[0] / two.sum()).log()
    assert group_loss(scores, UNEVEN, "best_of").item() == pytest.approx(-both.item() / 2, abs=1e-6)
    nll = [math.log(1 + math.exp(l - w)) for w, l in [(-.2, .3), (-.2, 1.1), (.7, .4)]]
    assert group_loss(scores, UNEVEN, "kwise").item() == pytest.approx(((nll[0] + nll[1]) / 2 + nll[2]) / 2, abs=1e-6)
    assert group_loss(scores, UNEVEN, "pairwise").item() == pytest.approx(sum(nll) / 3, abs=1e-6)


@pytest.mark.parametrize("pairs", [[(0, 1), (1, 2), (2, 0)], [(0, 1), (1, 2)], [(0, 1), (0, 1), (0, 2), (1, 2)]])
def test_comparisons_that_are_no_ranking_are_refused(pairs):
    """A cycle, a pair that nobody compared, and one compared twice; the pairwise loss takes them all."""
    group = {"query": [1], "responses": [[2], [3], [4]], "pairs": pairs}
    check_labels([group], "pairwise")
    for loss in ("kwise", "best_of"):
        with pytest.raises(DataError, match=loss):
            check_labels([group], loss)


def test_a_tie_for_the_best_is_no_choice():
    check_labels([UNEVEN[0]], "best_of")
    tied = {"query": [1], "responses": [[2], [3], [4]], "pairs": [(0, 2), (1, 2)]}
    check_labels([tied], "kwise")
    with pytest.raises(DataError, match="choice of the best"):
        check_labels([tied], "best_of")


@pytest.mark.parametrize("loss", ["best_of", "kwise"])
def test_training_learns_from_choices_and_rankings(tmp_path, loss):
    """Catches a loss that climbs, end to end; two losses on the same labels are not the same training."""
    def ranked(n, seed):
        groups = separable_groups(n, seed)
        for group in groups:
            order = [w for w, _ in group["pairs"][:3]] + [group["pairs"][2][1]]
            group["pairs"] = list(itertools.combinations(order, 2)) if loss == "kwise" else [(order[0], i) for i in order[1:]]
        return groups
    model, s = tiny_model("scalar"), RewardSettings(lr=3e-3, batch=8, warmup=3, loss=loss)
    rows = random_rows(torch.Generator().manual_seed(1))
    train_reward(model, ranked(200, 0), rows, s, str(tmp_path / loss), 0)
    assert accuracy(model, ranked(50, 1)) > 0.98
    train_reward(tiny_model("scalar"), ranked(200, 0), rows, RewardSettings(lr=3e-3, batch=8, warmup=3), str(tmp_path / "pairwise"), 0)
    first, other = (read_metrics(tmp_path / name)[0]["loss"] for name in (loss, "pairwise"))
    assert (abs(first - other) > .1) == (loss == "best_of")  # every post has six pairs: here kwise and pairwise begin alike


def test_shuffled_comparisons_are_the_same_ones_in_as_many_steps(tmp_path):
    """Catches comparisons lost, swapped or still together, and steps of another size."""
    groups = separable_groups(40, 0)
    single = ungroup(groups)
    assert len(single) == 160 and all(g["pairs"] == [(0, 1)] for g in single)
    assert sorted((g["query"], *g["responses"]) for g in single) == sorted((g["query"], g["responses"][w], g["responses"][l])
                                                                          for g in groups for w, l in g["pairs"])
    rows, sizes, real, logs = random_rows(torch.Generator().manual_seed(1)), [], reward.group_loss, {}
    for group in (True, False):
        def spy(scores, part, loss):
            sizes.append((sum(len(g["pairs"]) for g in part), len({tuple(g["query"]) for g in part})))
            return real(scores, part, loss)
        reward.group_loss = spy
        try:
            train_reward(tiny_model("scalar"), groups, rows, RewardSettings(group=group), str(tmp_path / str(group)), 0)
        finally:
            reward.group_loss = real
        logs[group] = [row["loss"] for row in read_metrics(tmp_path / str(group))]
    assert [pairs for pairs, _ in sizes] == [32] * 10 and len(logs[True]) == len(logs[False]) == 5
    assert all(posts == 8 for _, posts in sizes[:5]) and min(posts for _, posts in sizes[5:]) > 12
    assert logs[True] != logs[False]


SWITCHES = {"loss": "kwise", "group": False, "normalise": "gain_bias", "lr": 1e-3, "batch": 1, "epochs": 2, "warmup": 1, "final_lr": 1.,
            "weight_decay": .5}


@pytest.mark.parametrize("switch, value", [*SWITCHES.items(), ("loss", "best_of")])
def test_no_switch_is_dead(g, tmp_path, switch, value):
    """Catches a setting that nothing reads: other weights than without it, on posts with two and three summaries."""
    assert set(SWITCHES) | {"micro", "recompute"} == {f.name for f in dataclasses.fields(RewardSettings)}
    rows, weights = random_rows(g, n=8), []
    for name, flipped in (("off", {}), ("on", {switch: value})):
        model = tiny_model("scalar")
        s = RewardSettings(**dict(batch=3, lr=1e-2, warmup=2, weight_decay=.1) | flipped)
        train_reward(model, UNEVEN * 6, rows, s, str(tmp_path / name), 0)
        weights.append(model.wte.weight)
    assert (weights[0] - weights[1]).abs().max() > 1e-4


@pytest.mark.parametrize("settings, says", [
    (RewardSettings(loss="elo"), "loss"), (RewardSettings(normalise="no"), "normalise"), (RewardSettings(loss="kwise", group=False), "group"),
    (CollectSettings(labels="elo"), "labels"), (CollectSettings(k=1), "k must"), (CollectSettings(tie=-1.), "tie"),
    (CollectSettings(tie=.5), "rank"),
    (CollectSettings(rounds=0), "rounds"), (CollectSettings(rounds=501), "rounds"), (CollectSettings(online=True), "online"),
    (CollectSettings(k_min=1), "k_min"), (CollectSettings(k_min=5), "k_min"), (RewardSettings(micro=-1), "micro")])
def test_settings_out_of_range_are_refused(settings, says):
    with pytest.raises(DataError, match=says):
        settings.validate()


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


def test_samples_end_by_the_truncation_rule(g):
    """Catches labels given to other responses than PPO's: a rule that is not passed on, or counts from another query's end."""
    model, (queries, _) = tiny_model(seed=3), random_rows(g, n=20)
    every = sample_responses(model, queries, 6, 1.0, g, n=3, batch=24, stop=(4, 2))
    assert all(4 not in y[2:-1] and (len(y) == 6 or len(y) > 2 and y[-1] == 4) for y in every)
    assert any(4 in y[:2] for y in every) and 5 < sum(y[-1] == 4 and len(y) < 6 for y in every) and any(10 in y for y in every)
    whole, cut = (sample_responses(model, queries, 6, 1.0, g.manual_seed(5), n=2, stop=stop) for stop in ((10, 5), (4, 1)))
    ends = [next((i + 1 for i in range(1, 6) if y[i] == 4), 6) for y in whole]  # the same draws, ended by hand
    assert cut == [y[:end] for y, end in zip(whole, ends)] and min(ends) < 6 < sum(len(y) == 6 for y in whole)


@pytest.mark.parametrize("loss", ["pairwise", "best_of", "kwise"])
def test_micro_batches_and_recomputing_change_no_gradient(loss):
    """Catches parts of a batch that count by their posts where the loss is a mean over pairs, or the other way round."""
    part = UNEVEN + [{"query": [7, 7], "responses": [[1, 10], [2, 10], [8, 10]], "pairs": [(0, 1), (0, 2)]}, UNEVEN[1]]
    results = []
    for micro, recompute in ((0, False), (1, False), (3, False), (0, True)):
        model = tiny_model("scalar")
        model.recompute = recompute
        value, accuracy = reward.backward_groups(model, part, loss, micro)
        results.append([torch.tensor([value, accuracy])] + [p.grad for p in model.parameters()])
    whole = group_loss(score_responses(tiny_model("scalar"), [g["query"] for g in part], [g["responses"] for g in part]), part, loss)
    assert results[0][0][0].item() == pytest.approx(whole.item(), abs=1e-5)
    chosen, rejected = score_groups(tiny_model("scalar"), part)
    assert results[0][0][1].item() == pytest.approx((chosen > rejected).float().mean().item())
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_recomputing_keeps_fewer_activations():
    saved = []
    for recompute in (False, True):
        sizes, model = [], tiny_model("scalar")
        model.recompute = recompute
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            score_responses(model, [[1, 2, 3]] * 4, [[[4, 10], [5, 10]]] * 4)
        saved.append(sum(sizes))
    assert saved[1] < .5 * saved[0]


def test_a_labeler_is_shown_between_k_min_and_k(enc, monkeypatch):
    """Catches a number that is always the same, candidates that come twice, and a reference that takes a sample's place."""
    texts, sizes, firsts = ["a" * i for i in range(1, 7)], set(), set()
    for seed in range(40):
        monkeypatch.setattr(reward, "sample_responses", lambda *a, stop: [encode_response(enc, t, 20) for t in texts])
        post = comparison("one", "", "", 0)["info"] | {"summary": "ref", "facts": {}}
        rows = collect(enc, [post], [("p", None, 1., 6)], Reader(), 9, 80, 20, None, random.Random(seed), "train", "rank", k_min=3, batch="b")
        shown = {s["text"].strip() for r in rows for s in r["summaries"]}
        assert len(rows) == math.comb(len(shown), 2) and shown <= set(texts) and {r["batch"] for r in rows} == {"b"}
        sizes.add(len(shown))
        firsts |= shown
    texts = ["a" * i + "." * (i < 3) for i in range(1, 7)]  # of a story samples that never end are not shown: fewer than k_min are left
    (dot,), story = enc.encode_ordinary("."), post | {"task": "sentiment"}
    monkeypatch.setattr(reward, "sample_responses", lambda *a, stop: [encode_response(enc, t, 20, stop=stop) for t in texts])
    few = collect(enc, [story], [("p", None, 1., 6)], Reader(), 9, 80, 20, None, random.Random(0), "train", "rank", (dot, 0), 3)
    assert {s["text"].strip() for r in few for s in r["summaries"]} == {"a.", "aa."}
    assert sizes == {3, 4, 5, 6} and firsts == {"a" * i for i in range(1, 7)}


def test_a_comparison_of_articles_has_their_format(enc):
    """Catches the lead of a TL;DR in front of an article's summary."""
    info = {"id": "1", "title": "", "post": "My cat ate.", "task": "cnndm"}
    comparisons = [{"info": info, "summaries": [{"text": " cat"}, {"text": "dog"}], "choice": 0}]
    (group,) = group_by_post(enc, comparisons, 90, 20)
    assert enc.decode(group["query"]) == "Article:\nMy cat ate.\n\nTL;DR:\n" and [enc.decode(r[:-1]) for r in group["responses"]] == ["cat", "dog"]
    del info["task"]
    info["subreddit"] = "x"
    assert [enc.decode(r[:-1]) for r in group_by_post(enc, comparisons, 90, 20)[0]["responses"]] == [" cat", " dog"]
