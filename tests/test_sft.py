"""sft.py: the loss token by token, the schedule, the order of rows, checkpoints that resume bit for bit, the metrics log."""
import copy
import dataclasses
import math
import threading
from types import SimpleNamespace

import pytest
import torch
from conftest import random_rows, tiny_model

import sft
from data import DataError
from model import GPT
from sft import (MetricsLog, SFTSettings, batches, cosine, dropout, evaluate_lm, lm_loss, load_state, make_optimizer, read_metrics,
                 row_loss, save_state, tf_adam_step, train_lm)


def nats(model, ids, i):
    """-log p of token i of a row, from a whole forward pass over the tokens before it."""
    return -model(torch.tensor([ids[:i]]))[0, -1].log_softmax(-1)[ids[i]].item()


def test_lm_loss_by_hand():
    """Catches a flipped sign, weights ignored, or a sum divided by N instead of by the weights."""
    logits = torch.tensor([[0., math.log(3)], [math.log(4), 0.], [5., 0.]])
    loss = lm_loss(logits, torch.tensor([1, 1, 0]), torch.tensor([1., .5, 0.]))
    assert loss.item() == pytest.approx((math.log(4 / 3) + .5 * math.log(5)) / 1.5, abs=1e-6)


@pytest.mark.parametrize("query_weight", [0.0, 0.3])
def test_row_loss_token_by_token(g, query_weight):
    """Catches a target shifted by one, query tokens that count (or do not), and padding in the mean."""
    model, (queries, responses) = tiny_model(), random_rows(g)
    total = weight = 0.0
    for q, r in zip(queries, responses):
        for i in range(1, len(q) + len(r)):
            w = query_weight if i < len(q) else 1.0
            total, weight = total + w * nats(model, q + r, i), weight + w
    assert row_loss(model, queries, responses, query_weight).item() == pytest.approx(total / weight, abs=1e-5)


def test_evaluate_lm_is_a_mean_over_all_response_tokens(g):
    """Catches a mean of batch means: batches differ in their number of tokens."""
    model, (queries, responses) = tiny_model(), random_rows(g)
    every = [nats(model, q + r, i) for q, r in zip(queries, responses) for i in range(len(q), len(q) + len(r))]
    assert evaluate_lm(model, queries, responses, batch=2) == pytest.approx(sum(every) / len(every), abs=1e-5)
    of_queries = [nats(model, q, i) for q in queries for i in range(1, len(q))]  # nothing predicts a query's first token
    weighted = (sum(every) + 0.3 * sum(of_queries)) / (len(every) + 0.3 * len(of_queries))
    assert evaluate_lm(model, queries, responses, 0.3, batch=2) == pytest.approx(weighted, abs=1e-5) != pytest.approx(sum(every) / len(every))


def test_cosine():
    """Catches a warm-up that starts at 0 (a wasted step), a peak not reached, an end that is not `final`."""
    shares = [cosine(step, 111, 10, 0.1) for step in range(111)]
    assert shares[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert [shares[i] for i in (10, 35, 60, 110)] == pytest.approx([1, .1 + .45 * (1 + math.sqrt(.5)), .55, .1])
    assert all(a > b for a, b in zip(shares[10:], shares[11:]))
    assert cosine(0, 1, 0, 0.1) == 1


def test_batches_cover_every_row_once_per_epoch():
    """Catches rows skipped or seen twice, and an order that the seed does not decide."""
    plan = batches(12, 4, 3, seed=1)
    epochs = [sum(plan[i:i + 3], []) for i in (0, 3, 6)]
    assert len(plan) == 9 and all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert plan == batches(12, 4, 3, seed=1) != batches(12, 4, 3, seed=2)
    cut = batches(14, 4, 1, seed=1)  # the short last batch is dropped
    assert [len(b) for b in cut] == [4, 4, 4] and len(set(sum(cut, []))) == 12
    assert [sorted(b) for b in batches(3, 4, 2, seed=1)] == [[0, 1, 2]] * 2  # but kept where it is the only one


def test_batches_of_like_length():
    """Catches rows skipped or doubled by the sorting, an order by length over time, and a cut that always hits the longest."""
    lengths = list(range(64))
    plan = batches(64, 4, 2, 1, lengths)
    assert sorted(sum(plan[:16], [])) == lengths == sorted(sum(plan[16:], [])) and plan[:16] != plan[16:]
    assert all(max(b) - min(b) == 3 for b in plan)
    assert [min(b) for b in plan[:16]] != sorted(min(b) for b in plan[:16])
    dropped = [set(range(14)) - set(sum(batches(14, 4, 1, seed, lengths), [])) for seed in range(20)]
    assert all(len(d) == 2 for d in dropped) and len(set.union(*dropped)) > 5


def test_training_learns_and_weight_decay_spares_vectors(g, tmp_path):
    """Catches an optimizer that climbs, and decay on biases and norms."""
    model, (queries, _) = tiny_model(), random_rows(g, n=16)
    rows = queries, [[q[-1], 10] for q in queries]  # say the last token again, then stop
    before = evaluate_lm(model, *rows)
    after = train_lm(model, rows, rows, SFTSettings(lr=1e-2, batch=8, epochs=15, warmup=2), str(tmp_path), 0)
    assert after < 0.3 < 1.5 < before
    decayed, spared = make_optimizer([model], 1e-3, 0.1).param_groups
    assert decayed["weight_decay"] == 0.1 and all(p.dim() == 2 for p in decayed["params"])
    assert spared["weight_decay"] == 0 and all(p.dim() == 1 for p in spared["params"])
    assert len(decayed["params"]) + len(spared["params"]) == len(list(model.parameters()))


def test_tf_adam_by_hand():
    """Catches ε on the wrong side of the bias correction, and a step counted from 0: a constant gradient of 1e-5, ε = 1e-5."""
    for step, lr_share in ((tf_adam_step, {1: .0307, 10: .0907, 1000: .443}), (lambda o, eps: o.step(), {1: .5, 10: .5, 1000: .5})):
        p = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        optimizer, before = torch.optim.AdamW([p], lr=1.0, betas=(0.9, 0.999), eps=1e-5, weight_decay=0.0), 0.0
        for t in range(1, 1001):
            p.grad = torch.full((1,), 1e-5, dtype=torch.float64)
            step(optimizer, 1e-5)
            if t in lr_share:
                assert before - p.item() == pytest.approx(lr_share[t], rel=2e-3)
            before = p.item()


def test_tf_adam_against_its_formula(g):
    """TensorFlow 1's own update, written out, on gradients that change; a new optimizer goes on from the old one's state."""
    p, other = torch.zeros(5, dtype=torch.float64, requires_grad=True), torch.zeros(5, dtype=torch.float64)
    m = v = torch.zeros(5, dtype=torch.float64)
    optimizer = torch.optim.AdamW([p], lr=0.1, betas=(0.9, 0.95), eps=1.0, weight_decay=0.0)
    for t in range(1, 21):
        p.grad = torch.randn(5, generator=g, dtype=torch.float64) * 1e-3
        m, v = 0.9 * m + 0.1 * p.grad, 0.95 * v + 0.05 * p.grad ** 2
        other = other - 0.1 * math.sqrt(1 - 0.95 ** t) / (1 - 0.9 ** t) * m / (v.sqrt() + 1e-4)
        if t == 10:
            state, optimizer = optimizer.state_dict(), torch.optim.AdamW([p], lr=0.1)
            optimizer.load_state_dict(state)
        tf_adam_step(optimizer, 1e-4)
        torch.testing.assert_close(p.detach(), other, atol=1e-12, rtol=0)


def test_dropout_is_on_what_each_half_adds():
    """Catches a half without it, and dropout of the residual stream itself: with p = 1 only the embeddings are left."""
    model, tokens = tiny_model(), torch.randint(10, (3, 7), generator=torch.Generator().manual_seed(1))
    bare = model.ln_f(model.wte(tokens) + model.wpe.weight[:7])
    with dropout(model, 1.0, 0):
        torch.testing.assert_close(model.hidden(tokens), bare)
    with torch.no_grad():  # silence one half in turn: the other one still has it
        for block in model.blocks:
            block.attn_proj.weight.zero_(), block.attn_proj.bias.zero_()
    with dropout(model, 1.0, 0):
        torch.testing.assert_close(model.hidden(tokens), bare)
    plain = model.hidden(tokens)
    with dropout(model, 0.2, 0):
        assert (model.hidden(tokens) - plain).abs().max() > 0.01


def test_dropout_is_off_behind_its_step():
    """Catches noise where log-probabilities are compared, and masks that the seed does not decide."""
    model, tokens = tiny_model(), torch.randint(10, (3, 7))
    plain, noisy = model.hidden(tokens), []
    for seed in (0, 0, 1):
        with dropout(model, 0.2, seed):
            noisy.append(model.hidden(tokens))
        assert torch.equal(model.hidden(tokens), plain)
    assert torch.equal(noisy[0], noisy[1]) and not torch.equal(noisy[0], noisy[2]) and not torch.equal(noisy[0], plain)
    with pytest.raises(KeyboardInterrupt), dropout(model, 0.2, 0):
        raise KeyboardInterrupt
    assert torch.equal(model.hidden(tokens), plain)
    with dropout(model.eval(), 0.2, 0):
        assert torch.equal(model.hidden(tokens), plain)
    state = torch.get_rng_state()
    with dropout(model, 0.0, 0):
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("choose, losses, kept", [("loss", [3., 1., 2.], 2), ("loss", [1., 2., 3.], 1), ("reward", [3., 1., 2.], 2),
                                                  ("last", [1., 2., 3.], 3)])
def test_which_epoch_is_kept(g, tmp_path, monkeypatch, choose, losses, kept):
    """Catches the highest loss taken for the lowest, epochs off by one, and a model that is not the one it says; after a crash too."""
    rows, s = random_rows(g, n=8), SFTSettings(batch=2, epochs=3, warmup=2, choose=choose)
    weights, real, given = [], sft.row_loss, iter(losses + losses)
    crash_at = [7] if choose == "loss" else []

    def loss(model, *args):
        weights.append(copy.deepcopy(model.state_dict()))
        if [len(weights)] == crash_at:
            crash_at.clear()
            raise KeyboardInterrupt
        return real(model, *args)
    monkeypatch.setattr(sft, "row_loss", loss)
    monkeypatch.setattr(sft, "evaluate_lm", lambda *args: next(given))
    if crash_at:
        with pytest.raises(KeyboardInterrupt):
            train_lm(tiny_model(), rows, rows, s, str(tmp_path), 0, save_every=4)
        del weights[4:]  # it goes on behind its fourth step
    model = tiny_model()
    train_lm(model, rows, rows, s, str(tmp_path), 0, save_every=4)
    weights.append(model.state_dict() if choose == "last" else GPT.from_pretrained(tmp_path / "epoch-3").state_dict())
    expected = weights[4 * kept]  # before the first step of the next epoch
    for result in (model, GPT.from_pretrained(tmp_path)):
        assert all(torch.equal(p, expected[name]) for name, p in result.state_dict().items())
    if choose == "last":
        assert not (tmp_path / "epoch-1").exists() and not sft.epoch_losses(tmp_path)
    else:
        assert sft.epoch_losses(tmp_path) == dict(zip((1, 2, 3), losses))
        first = GPT.from_pretrained(tmp_path / "epoch-1").state_dict()
        assert all(torch.equal(p, weights[4][name]) for name, p in first.items())


SWITCHES = {"dropout": .2, "choose": "loss", "query_weight": .5, "epochs": 2, "lr": 1e-4, "batch": 3, "warmup": 0, "final_lr": 1.,
            "weight_decay": .5}


@pytest.mark.parametrize("switch", SWITCHES)
def test_no_switch_is_dead(g, tmp_path, monkeypatch, switch):
    """Catches a setting that nothing reads."""
    rows, results = random_rows(g, n=12), []
    for name, flipped in (("off", {}), ("on", {switch: SWITCHES[switch]})):
        model, losses = tiny_model(), iter([1., 2., 3., 4.])
        s = SFTSettings(**dict(batch=4, epochs=3, warmup=2, weight_decay=.1, lr=1e-2) | flipped)
        monkeypatch.setattr(sft, "evaluate_lm", lambda *args: next(losses))
        train_lm(model, rows, rows, s, str(tmp_path / name), 0)
        results.append(model.wte.weight)
    assert not torch.equal(*results)


def test_no_epoch_leaves_the_model_as_it_is(g, tmp_path):
    """Catches a preset without SFT that starts from another model than the language model."""
    rows, model = random_rows(g, n=5), tiny_model()
    loss = train_lm(model, rows, rows, SFTSettings(epochs=0), str(tmp_path), 0)
    kept = GPT.from_pretrained(str(tmp_path))
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*(m.parameters() for m in (tiny_model(), model, kept))))
    assert loss == sft.evaluate_lm(tiny_model(), *rows) and [row["step"] for row in sft.read_metrics(tmp_path)] == [0]
    with pytest.raises(DataError, match="nothing to choose"):
        SFTSettings(epochs=0, choose="loss").validate()


def test_micro_batches_and_recomputing_change_no_gradient(g):
    """Catches parts of a batch that count by their rows and not by their weighted tokens, and blocks recomputed differently."""
    queries, responses = random_rows(g, n=7, query=(3, 9), response=(1, 7))
    results = []
    for more in ({}, {"micro": 3}, {"recompute": True}, {"micro": 1, "recompute": True}):
        model, s = tiny_model(), SFTSettings(query_weight=.3, **more)
        model.recompute = s.recompute
        loss = sft.backward_rows(model, queries, responses, s.query_weight, s.micro)
        results.append([torch.tensor(loss)] + [p.grad for p in model.parameters()])
    torch.testing.assert_close(results[0][0], row_loss(tiny_model(), queries, responses, .3), atol=1e-6, rtol=0)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_two_halves_side_by_side_are_the_whole(g, monkeypatch):
    """Catches a half that is lost, doubled or counts by its rows, a gradient already there that is written over, and bits that depend on
    which thread was first."""
    rows, results, where = random_rows(g, n=17, query=(3, 9), response=(1, 7)), [], []
    monkeypatch.setattr(sft, "row_loss", lambda *a: (where.append((threading.current_thread(), len(a[1]))), row_loss(*a))[1])
    for threads, times in (1, 1), (2, 1), (2, 1), (2, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=threads: n)
        model = tiny_model()
        losses = [sft.backward_rows(model, *rows, .3) for _ in range(times)]
        results.append([torch.tensor(losses[-1])] + [p.grad / times for p in model.parameters()])
    assert where[0] == (threading.main_thread(), 17) and all(thread != threading.main_thread() for thread, _ in where[1:])
    assert sorted(n for _, n in where[1:]) == [8] * 4 + [9] * 4
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(*results[1:3]))


def test_dropout_and_few_rows_stay_in_one_thread(g, monkeypatch):
    """Catches masks of one generator drawn by two threads: no two runs would be alike."""
    where, (queries, responses) = set(), random_rows(g, n=16)
    monkeypatch.setattr(sft, "row_loss", lambda *a: (where.add(threading.current_thread()), row_loss(*a))[1])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    model = tiny_model()
    with dropout(model, .2, seed=1):
        sft.backward_rows(model, queries, responses, 0.0)
    sft.backward_rows(model, queries[:15], responses[:15], 0.0)
    sft.backward_rows(model, queries, responses, 0.0, micro=8)
    assert where == {threading.main_thread()}


def test_recomputing_keeps_fewer_activations(g, tmp_path):
    """Catches a switch that does nothing, and dropout masks that differ between a forward and its recomputation."""
    rows, saved, results = random_rows(g, n=8), [], []
    for recompute in (False, True):
        sizes, model = [], tiny_model()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            model.recompute = recompute
            row_loss(model, *rows, .3)
        saved.append(sum(sizes))
        s = SFTSettings(batch=8, epochs=1, warmup=0, dropout=.2, recompute=recompute)
        train_lm(model, rows, rows, s, str(tmp_path / str(recompute)), 0)
        results.append(model.wte.weight)
    assert saved[1] < .5 * saved[0]
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-4)


def test_settings_out_of_range_are_refused():
    assert set(SWITCHES) | {"micro", "recompute", "mix"} == {f.name for f in dataclasses.fields(SFTSettings)}
    for bad in ({"dropout": 1.}, {"dropout": -.1}, {"choose": "best"}, {"mix": 1.}):
        with pytest.raises(DataError, match=next(iter(bad))):
            SFTSettings(**bad).validate()


@pytest.mark.parametrize("settings", [{}, {"dropout": .2, "choose": "loss", "epochs": 2}])
def test_training_resumes_bit_for_bit(g, tmp_path, monkeypatch, settings):
    """Catches state that a checkpoint forgets: optimizer moments, schedule, the order of rows, dropout's masks."""
    rows, s, real = random_rows(g, n=12), SFTSettings(**dict(batch=2, warmup=2) | settings), sft.row_loss

    def train(name, stop_at=None):
        steps = iter(range(100))

        def loss(*args):
            if torch.is_grad_enabled() and next(steps) == stop_at:  # a training step
                raise KeyboardInterrupt
            return real(*args)
        model = tiny_model()
        monkeypatch.setattr(sft, "row_loss", loss)
        valid_loss = train_lm(model, rows, rows, s, str(tmp_path / name), 0, save_every=3)
        return model.state_dict(), valid_loss, read_metrics(tmp_path / name)

    whole = train("whole")
    with pytest.raises(KeyboardInterrupt):
        train("halves", stop_at=4)  # step 3 is done and lost
    assert [row["step"] for row in read_metrics(tmp_path / "halves")] == [0, 1, 2, 3]
    halves = train("halves")
    assert all(torch.equal(p, halves[0][name]) for name, p in whole[0].items())
    assert whole[1:] == halves[1:] and [row["step"] for row in whole[2]] == list(range(6 * s.epochs + 1))


def test_metrics_log_drops_what_comes_again(tmp_path):
    """Catches doubled rows after a resume, and a line cut by a crash that makes the file unreadable."""
    log = MetricsLog(tmp_path, 0)
    for step in range(5):
        log.write(step, loss=step / 2)
    with open(tmp_path / "metrics.jsonl", "a") as f:
        f.write('{"step": 5, "lo')
    log = MetricsLog(tmp_path, 3)
    assert read_metrics(tmp_path) == [{"step": i, "loss": i / 2} for i in range(3)]
    log.write(3, loss=9.0)
    assert read_metrics(tmp_path)[-1] == {"step": 3, "loss": 9.0} and len(read_metrics(tmp_path)) == 4
    assert read_metrics(tmp_path / "nowhere") == []


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_training_that_has_diverged_says_so(tmp_path, value):
    """Catches NaN weights that later draw a token that there is not."""
    with pytest.raises(DataError, match="loss is -?(nan|inf) at step 7 .*diverged"):
        MetricsLog(tmp_path, 0).write(7, grad_norm=1.0, loss=value)


def test_state_goes_out_and_in(g, tmp_path):
    """Catches a generator, optimizer or extra value that does not come back; another shape is refused in a sentence."""
    model = tiny_model()
    optimizer = make_optimizer([model], 1e-3, 0.0)
    assert load_state(tmp_path, [model], optimizer, g) == (0, {})
    row_loss(model, [[1, 2]], [[3]], 0.0).backward()
    optimizer.step()
    save_state(tmp_path, 7, [model], optimizer, g, beta=0.25)
    drawn, weights = torch.rand(3, generator=g), [p.detach().clone() for p in model.parameters()]
    other = tiny_model(seed=9)
    other_optimizer = make_optimizer([other], 1e-3, 0.0)
    assert load_state(tmp_path, [other], other_optimizer, g) == (7, {"beta": 0.25})
    assert torch.equal(torch.rand(3, generator=g), drawn)
    assert all(torch.equal(p, w) for p, w in zip(other.parameters(), weights))
    for (_, a), (_, b) in zip(optimizer.state.items(), other_optimizer.state.items()):
        assert torch.equal(a["exp_avg"], b["exp_avg"]) and a["step"] == b["step"]
    wide, lm_only = tiny_model(n_embd=64), [model, tiny_model()]
    for models in ([wide], [tiny_model("scalar")], lm_only):
        with pytest.raises(DataError, match="another shape"):
            load_state(tmp_path, models, make_optimizer(models, 1e-3, 0.0), g)


def test_pretraining_rows_are_the_share_of_all_that_it_says():
    """Catches a share of the fine-tuning rows taken for one of all: 10 % of all is a ninth of the others."""
    run = SimpleNamespace(posts={"sft": list(range(90)), "pretrain": list(range(1000, 2000))})
    assert sft.sft_posts(run, SFTSettings()) == run.posts["sft"]
    assert sft.sft_posts(run, SFTSettings(mix=.1)) == run.posts["sft"] + list(range(1000, 1010))
