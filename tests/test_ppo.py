"""ppo.py: the equations by hand, by brute force and by enumerating every response of a tiny world; one iteration."""
import copy
import dataclasses
import functools
import itertools
import math
import shutil

import pytest
import torch
from conftest import random_rows, tiny_model
from safetensors.torch import load_file

import ppo
import sft
from data import DataError, pad_rows
from model import GPT
from ppo import (AdaptiveKL, FixedKL, PPOSettings, check_ratio, compare_policies, gae, kl_estimates, make_value_model, move_average,
                 own_kl_advantage, policy_loss, rollout, shaped_rewards, update, value_loss, whiten)
from sft import make_optimizer, read_metrics, row_loss, stop_rule, truncate

ONES = torch.ones(1, 4)
A = torch.tensor([[.49065, .727, .66, .8]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 0]])


def close(a, b, atol=1e-6):
    torch.testing.assert_close(a, torch.as_tensor(b, dtype=a.dtype), atol=atol, rtol=0)


# --- vectors worked by hand


def test_gae_by_hand():
    """Catches a wrong delta, λ, or V behind the end."""
    advantages, returns = gae(torch.tensor([[-.1, .2, 0, 1]]), torch.tensor([[.5, .4, .3, .2]]), ONES, 1.0, 0.95)
    close(advantages, A)
    close(returns, [[.99065, 1.127, .96, 1.0]])


def test_whiten_by_hand():
    """Catches the unbiased variance, and a mean that is dropped or kept at the wrong time."""
    close(whiten(A, ONES), [[-1.561645, .503077, -.082226, 1.140795]], 2e-6)
    close(whiten(torch.tensor([[-.1, .2, 0, 1]]), ONES, shift_mean=False), [[-.592472, .101506, -.361146, 1.952113]], 2e-6)


@pytest.mark.parametrize("kl, beta", [(12, .151536), (6, .15), (3, .148464), (6.6, .150768)])
def test_adaptive_kl_by_hand(kl, beta):
    """Catches a controller that pushes the wrong way, does not clip, or forgets n / horizon."""
    controller = AdaptiveKL(.15, 6, 10000)
    controller.update(kl, 512)
    assert controller.beta == pytest.approx(beta, abs=1e-9)
    fixed = FixedKL(.15)
    fixed.update(kl, 512)
    assert fixed.beta == .15


def test_adaptive_kl_finds_its_target():
    """Catches a controller whose error grows: here KL = 1 / β, so the target 6 means β = 1/6."""
    controller = AdaptiveKL(1.0, 6, 1000)
    for _ in range(400):
        controller.update(1 / controller.beta, 100)
    assert controller.beta == pytest.approx(1 / 6, rel=1e-3)


@pytest.mark.parametrize("advantage, ratio, loss, clipped", [(1, 1.5, -1.2, 1), (1, .5, -.5, 0), (-1, 1.5, 1.5, 0), (-1, .5, .8, 1)])
def test_policy_loss_by_hand(advantage, ratio, loss, clipped):
    """Catches min for max, a flipped ratio or sign; a clipped term must have no gradient and the others one."""
    logprobs = torch.tensor([[math.log(ratio) - 2]], requires_grad=True)
    out, stats = policy_loss(logprobs, torch.tensor([[-2.]]), torch.tensor([[float(advantage)]]), torch.ones(1, 1), 0.2)
    out.backward()
    close(out.detach(), loss)
    close(logprobs.grad, [[0. if clipped else loss]])
    assert stats["clip_fraction"] == clipped


@pytest.mark.parametrize("value, ret, loss", [(1, .9, .02), (1, .4, .18), (.6, .9, .045), (.8, 1., .045)])
def test_value_loss_by_hand(value, ret, loss):
    """Catches a lost ½, min for max, and clipping around anything but the old value."""
    out, _ = value_loss(torch.tensor([[float(value)]]), torch.tensor([[.5]]), torch.tensor([[ret]]), torch.ones(1, 1), 0.2)
    close(out, loss)


def test_truncation_by_hand():
    """Ziegler's rule: 24 tokens, '.' at 3, 18 and 21, none before 16 counts: the response keeps the one at 18 and ends there."""
    tokens = torch.full((2, 30), 7)  # the first query has 2 tokens, the second 6
    for row, q in enumerate((2, 6)):
        tokens[row, [q + 3, q + 18, q + 21]] = 13
    tokens[0, 26:], tokens[:, 1] = 0, 13  # padding behind the first row; a '.' in both queries
    out, lengths, ended = truncate(tokens, torch.tensor([2, 6]), 24, 13, 16)
    assert lengths.tolist() == [2 + 19, 6 + 19] and ended.all()
    for row, q in enumerate((2, 6)):
        assert torch.equal(out[row, :q + 19], tokens[row, :q + 19]) and (out[row, q + 19:] == 0).all()


# --- against brute force


def test_truncation_row_by_row(g):
    """Catches a window off by one, a stop in the query or in the padding that ends a response, and a missing one that does not."""
    for stop, after in itertools.product((0, 2), (0, 2, 4)):
        query_lengths = torch.randint(1, 5, (60,), generator=g)
        columns = torch.arange(9)
        tokens = torch.randint(3, (60, 9), generator=g) * (columns < query_lengths[:, None] + 5)
        out, lengths, ended = truncate(tokens, query_lengths, 5, stop, after)
        for row, q in enumerate(query_lengths.tolist()):
            ends = [q + t for t in range(after, 5) if tokens[row, q + t] == stop]
            assert ended[row] == bool(ends) and lengths[row] == (ends[0] + 1 if ends else q + 5)
            assert out[row].tolist() == [t if i < lengths[row] else 0 for i, t in enumerate(tokens[row].tolist())]
        assert 5 < ended.sum() < 60


def test_average_is_the_weighted_sum_of_all_weights(g):
    """Catches the decay on the wrong side: θ̄ = d^n θ_0 + (1-d) Σ d^(n-k) θ_k."""
    model, d = tiny_model(), 0.9
    average, history = copy.deepcopy(model), [model.wte.weight.detach().clone()]
    for _ in range(5):
        with torch.no_grad():
            for p in model.parameters():
                p += torch.randn(p.shape, generator=g)
        move_average(average, model, d)
        history.append(model.wte.weight.detach().clone())
    close(average.wte.weight.detach(), d ** 5 * history[0] + (1 - d) * sum(d ** (5 - k) * history[k] for k in range(1, 6)), 1e-5)
    assert torch.equal(model.wte.weight, history[-1])


@pytest.mark.parametrize("gamma, lam", [(1, .95), (.9, .8), (1, 1), (.97, 0)])
def test_gae_is_the_weighted_sum_of_n_step_advantages(g, gamma, lam):
    """Catches λ or γ in a wrong place, and an episode that goes on behind its end: (1-λ) Σ λ^(n-1) A⁽ⁿ⁾ in ragged rows."""
    r, v = torch.randn(4, 5, generator=g).double(), torch.randn(4, 5, generator=g).double()
    advantages, returns = gae(r, v, MASK, gamma, lam)
    expected = torch.zeros(4, 5).double()
    for b, L in enumerate(MASK.sum(1).tolist()):
        for t in range(L):
            def n_step(n):  # from t on, n rewards and then the value, which is 0 behind the end
                out = sum(gamma ** k * r[b, t + k] for k in range(min(n, L - t)))
                return out + (gamma ** n * v[b, t + n] if t + n < L else 0) - v[b, t]
            last = L - t  # all longer ones are equal to this; together they weigh λ^(last-1)
            expected[b, t] = sum((1 - lam) * lam ** (n - 1) * n_step(n) for n in range(1, last)) + lam ** (last - 1) * n_step(last)
    close(advantages, expected, 1e-12)
    close(returns, (expected + v) * MASK, 1e-12)


def test_shaped_rewards_sum_to_the_score_less_the_kl(g):
    """Catches a score on the wrong token, a flipped KL sign, a lost β."""
    score, lp, ref = torch.randn(4, generator=g), torch.randn(4, 5, generator=g), torch.randn(4, 5, generator=g)
    rewards = shaped_rewards(score, lp, ref, MASK, 0.3)
    close(rewards.sum(1), score - 0.3 * ((lp - ref) * MASK).sum(1))
    moved = shaped_rewards(score + 1, lp, ref, MASK, 0.3) - rewards
    close(moved, [[0, 0, 0, 0, 1], [0, 1, 0, 0, 0], [1, 0, 0, 0, 0], [0, 0, 0, 1, 0]])
    close(shaped_rewards(0 * score, lp, lp - 2, MASK, 0.3), -0.6 * MASK)  # likelier than under the reference: a cost


def test_whitened_has_mean_0_and_biased_variance_1(g):
    """Catches statistics that count what is masked."""
    x = 3 + 2 * torch.randn(4, 5, generator=g).double()
    kept = whiten(x, MASK)[MASK.bool()]
    assert abs(kept.mean()) < 1e-12 and abs(kept.var(unbiased=False) - 1) < 1e-8
    kept = whiten(x, MASK, shift_mean=False)[MASK.bool()]
    assert abs(kept.mean() - x[MASK.bool()].mean()) < 1e-12 and abs(kept.var(unbiased=False) - 1) < 1e-8


def _policy_loss(*a):
    return policy_loss(*a, 0.2)[0]


def _value_loss(*a):
    return value_loss(*a, 0.2)[0]


MASKED = {"shaped_rewards": (lambda lp, ref, m: shaped_rewards(torch.ones(4), lp, ref, m, 0.3), 2),
          "gae": (lambda r, v, m: torch.stack(gae(r, v, m, 0.9, 0.95)), 2),
          "whiten": (lambda x, m: whiten(x, m), 1), "whiten_keep_mean": (lambda x, m: whiten(x, m, False), 1),
          "policy_loss": (_policy_loss, 3), "value_loss": (_value_loss, 3),
          "kl_estimates": (lambda lp, ref, m: torch.stack(kl_estimates(lp, ref, m)), 2)}


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 1e9])
@pytest.mark.parametrize("name", MASKED)
def test_what_is_masked_changes_nothing(g, name, garbage):
    """Catches a mask that is dropped, multiplied (0 · NaN) or applied after a mean; forward and gradient."""
    function, n = MASKED[name]
    clean = [torch.randn(4, 5, generator=g) * MASK for _ in range(n)]
    weights = torch.randn(2, 4, 5, generator=g)
    results = []
    for inputs in (clean, [torch.where(MASK.bool(), x, garbage) for x in clean]):
        inputs = [x.requires_grad_() for x in inputs]
        out = function(*inputs, MASK)
        if out.shape[-2:] == (4, 5):
            assert (out[(MASK == 0).expand_as(out)] == 0).all()
        (out * weights.flatten()[:out.numel()].view(out.shape)).sum().backward()
        results.append([out.detach()] + [x.grad if x.grad is not None else torch.zeros(4, 5) for x in inputs])
    for a, b in zip(*results):
        assert torch.equal(a, b)
    assert all((grad[MASK == 0] == 0).all() for grad in results[1][1:])


def test_losses_are_means_over_tokens(g):
    """Catches a mean over rows or over masked positions too: a row of five tokens counts five times a row of one."""
    lp, old, adv = (torch.randn(4, 5, generator=g) for _ in range(3))
    v, old_v, ret = (torch.randn(4, 5, generator=g) for _ in range(3))
    tokens = MASK.nonzero().tolist()
    one = torch.ones(1, 1)
    policy = [policy_loss(*(x[b, t].view(1, 1) for x in (lp, old, adv)), one, 0.2)[0] for b, t in tokens]
    value = [value_loss(*(x[b, t].view(1, 1) for x in (v, old_v, ret)), one, 0.2)[0] for b, t in tokens]
    close(policy_loss(lp, old, adv, MASK, 0.2)[0], sum(policy) / 12)
    close(value_loss(v, old_v, ret, MASK, 0.2)[0], sum(value) / 12)


# --- a world of three tokens (2 is EOS) and three steps: all 15 responses can be written down


def every_response(V=3, R=3, eos=2):
    for L in range(1, R + 1):
        for y in itertools.product(range(V), repeat=L):
            if eos not in y[:-1] and (L == R or y[-1] == eos):
                yield list(y)


QUERY, RESPONSES, T = [1, 0, 1], list(every_response()), 0.7
REWARD = torch.tensor([math.sin(3.0 * i) for i in range(15)])


def exact_logprobs(model):
    """log π(y|x) of each response from whole forward passes, [15] with gradient."""
    def step(y, t):
        return (model(torch.tensor([QUERY + y[:t]]))[0, -1] / T).log_softmax(-1)[y[t]]
    return torch.stack([sum(step(y, t) for t in range(len(y))) for y in RESPONSES])


@pytest.fixture(scope="module")
def three():
    """policy, reference, the rows of all responses, p and q their probabilities."""
    policy, ref = (tiny_model(seed=seed, vocab_size=3) for seed in (0, 1))
    tokens, lengths = pad_rows([QUERY + y for y in RESPONSES])
    rows = tokens, torch.full((15,), len(QUERY)), lengths, 3
    with torch.no_grad():
        p, q = exact_logprobs(policy).exp(), exact_logprobs(ref).exp()
    assert len(RESPONSES) == 15 and abs(p.sum() - 1) < 1e-5
    return policy, ref, rows, p, q


def test_kl_estimates_are_unbiased(three):
    """Catches the wrong sign in k3 (expm1(Δ) - Δ has mean χ² - KL per token) and k2 without its ½."""
    policy, ref, rows, p, q = three
    logprobs, ref_logprobs, mask, exact, entropy = compare_policies(policy, ref, *rows, T)
    kl = (p * (p / q).log()).sum()
    k1, k2, k3 = kl_estimates(logprobs, ref_logprobs, mask)
    delta = logprobs - ref_logprobs
    assert kl > 0.3
    close((p * k1).sum(), kl, 1e-5)
    close((p * k3).sum(), kl, 1e-5)
    close(k2, (delta ** 2).sum(1) / 2)
    assert (k3 >= 0).all() and (k1 < 0).any()
    assert abs((p * (torch.expm1(delta) - delta).sum(1)).sum() - kl) > 0.3 * kl
    # compare_policies: KL at each state, averaged over the policy's own states, is the KL of whole responses
    close((p * exact.sum(1)).sum(), kl, 1e-5)
    close((p * entropy.sum(1)).sum(), -(p * p.log()).sum(), 1e-5)
    assert (exact[mask] >= 0).all() and (exact[~mask] == 0).all() and (entropy[~mask] == 0).all()
    close(logprobs.sum(1), p.log(), 1e-5)
    close(ref_logprobs.sum(1), q.log(), 1e-5)


def gradient(model, loss):
    grads = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([x.flatten() for x in grads])


def test_policy_gradient_is_the_gradient_of_expected_reward(three):
    """Catches a flipped sign or ratio: Σ_y p(y) (r(y) - b) ∇ log p(y) must be ∇ Σ_y p(y) r(y), whatever b."""
    policy, _, rows, p, _ = three
    logprobs = policy.logprobs(*rows, T)
    mask = torch.arange(3) < (rows[2] - rows[1])[:, None]
    advantages = (p * (REWARD - 0.4))[:, None].expand(-1, 3) * mask.sum()  # undoes the mean over tokens
    loss, _ = policy_loss(logprobs, logprobs.detach(), advantages, mask, 0.2)
    expected = gradient(policy, (exact_logprobs(policy).exp() * REWARD).sum())
    close(-gradient(policy, loss), expected, 1e-5)
    assert expected.norm() > 0.3


@pytest.mark.parametrize("kl_reward", ["k1", "exact"])
def test_the_whole_chain_is_the_gradient_of_score_less_kl(three, kl_reward):
    """Catches any misalignment between values, rewards, advantages and log-probabilities: with γ = λ = 1 and any values
    that see only the state, the chain's expected gradient is that of E[score] - β KL(π‖π_ref), by enumeration. With the exact KL as
    a reward too, but only if the action's own share comes on top."""
    policy, ref, rows, p, q = three
    values = tiny_model("scalar", seed=4, vocab_size=3).values(*rows).detach()
    old, ref_logprobs, mask, kl, _ = compare_policies(policy, ref, *rows, T)

    def chain(own):
        if kl_reward == "k1":
            advantages, _ = gae(shaped_rewards(REWARD, old, ref_logprobs, mask, 0.5), values, mask, 1.0, 1.0)
        else:
            advantages, _ = gae(shaped_rewards(REWARD, kl, 0 * kl, mask, 0.5), values, mask, 1.0, 1.0)
            advantages = advantages + own * own_kl_advantage(old, ref_logprobs, kl, 0.5)
        loss, stats = policy_loss(policy.logprobs(*rows, T), old, p[:, None] * advantages * mask.sum(), mask, 0.2)
        assert stats["max_log_ratio"] < 1e-5
        return -gradient(policy, loss)

    now = exact_logprobs(policy)
    expected = gradient(policy, (now.exp() * (REWARD - 0.5 * (now - q.log()))).sum())
    close(chain(1), expected, 1e-5)
    assert expected.norm() > 0.3
    assert kl_reward == "k1" or (chain(0) - expected).norm() > 0.1 * expected.norm()


def test_own_kl_advantage_has_mean_0_at_every_state(three):
    """Catches a flipped sign or another policy's KL: what is added must not change what a state is worth."""
    policy, ref, rows, p, q = three
    logprobs, ref_logprobs, mask, kl, _ = compare_policies(policy, ref, *rows, T)
    own = own_kl_advantage(logprobs, ref_logprobs, kl, 0.5)
    states = {}
    for y, weight, row in zip(RESPONSES, p, own):
        for t in range(len(y)):
            states[tuple(y[:t])] = states.get(tuple(y[:t]), 0) + weight * row[t]
    assert len(states) == 7 and max(abs(x) for x in states.values()) < 1e-6 and own.abs().max() > 0.05
    assert (own[~mask] == 0).all()
    close(own.sum(1) - 0.5 * kl.sum(1), -0.5 * (p / q).log(), 1e-5)  # with the exact KL's cost it is k1's


# --- PPO finds the optimum that theory names


@pytest.mark.parametrize("beta", [0.5, 1.0, 20.0])
def test_ppo_reaches_the_reference_tilted_by_the_reward(beta):
    """Catches a wrong objective as a whole: two tokens, two steps, π* ∝ π_ref exp(r / β); a large β stays at π_ref."""
    g = torch.Generator().manual_seed(0)
    reward = torch.tensor([[0., 1.], [.8, -.5]])  # of (y_0, y_1)
    ref = torch.tensor([[.4, -.4], [.7, 0.], [-.5, .3]])  # logits in the states: start, after 0, after 1
    logits, values = ref.clone().requires_grad_(), torch.zeros(3, requires_grad=True)
    optimizer, mask = torch.optim.Adam([logits, values], 0.03), torch.ones(256, 2)
    for i in range(150):
        optimizer.param_groups[0]["lr"] = 0.03 * (1 - i / 150)
        p = logits.detach().softmax(-1)
        first = torch.multinomial(p[0], 256, True, generator=g)
        second = torch.multinomial(p[1 + first], 1, generator=g)[:, 0]
        states, actions = torch.stack([0 * first, 1 + first], 1), torch.stack([first, second], 1)

        def logprobs(table):
            return table.log_softmax(-1)[states, actions]

        old, old_values = logprobs(logits).detach(), values[states].detach()
        rewards = shaped_rewards(reward[first, second], old, logprobs(ref), mask, beta)
        advantages, returns = gae(rewards, old_values, mask, 1.0, 0.95)
        for _ in range(4):
            loss = policy_loss(logprobs(logits), old, advantages, mask, 0.2)[0]
            loss = loss + value_loss(values[states], old_values, returns, mask, 0.2)[0]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def joint(table):
        p = table.detach().softmax(-1)
        return p[0][:, None] * p[1:]

    best = joint(ref) * (reward / beta).exp()
    best /= best.sum()
    close(joint(logits), best, 0.02)
    assert beta > 1 or (joint(ref) - best).abs().max() > 0.1  # the optimum is not where it starts


# --- one iteration of the real thing


@pytest.fixture
def iteration(g):
    """policy, reference, reward and value model, settings, queries, and their rollout; token 10 ends a response."""
    policy, reward, value = tiny_model(seed=3), tiny_model("scalar", seed=1), tiny_model("scalar", seed=2)
    ref, s = copy.deepcopy(policy), PPOSettings(batch=24, no_eos_score=-7.0, lr=1e-3, gamma=0.99)
    with torch.no_grad():
        for m in (policy, ref):
            m.wte.weight[10] *= 1.2  # some rows stop, some do not
    queries, _ = random_rows(g, n=24)
    return policy, ref, reward, value, s, queries, rollout(policy, ref, reward, value, queries, 6, s, 0.3, g)


def test_rollout_starts_at_ratio_1_and_kl_0(iteration, g):
    """Catches a sampler that disagrees with training, and a reference that is not the start."""
    policy, _, _, value, s, _, r = iteration
    assert (r.kl == 0).all() and torch.equal(r.logprobs, r.ref_logprobs)
    stats = update(policy, value, make_optimizer([policy, value], s.lr, 0.0), r, s, g)
    assert 0 <= stats["first_log_ratio"] < 1e-4
    assert stats["approx_kl"] > 1e-6  # and then it moves


def test_rollout_against_a_calculation_row_by_row(iteration):
    """Catches rows mixed up, KL at the wrong temperature, and returns taken from whitened advantages."""
    policy, _, reward, value, s, queries, _ = iteration
    other = tiny_model(seed=8)
    r = rollout(policy, other, reward, value, queries, 6, s, 0.3, torch.Generator().manual_seed(7))
    assert 2 < r.no_eos.sum() < 22
    advantages, entropy = [], []
    for b, query in enumerate(queries):
        q, end = len(query), int(r.lengths[b])
        row, L = r.tokens[b, :end].tolist(), end - q
        assert row[:q] == query and (r.tokens[b, end:] == 0).all() and 10 not in row[q:-1]
        assert r.no_eos[b] == (row[-1] != 10) and (L == 6 or row[-1] == 10)
        score = -7.0 if row[-1] != 10 else reward.scores(torch.tensor([row]), torch.tensor([end])).item()
        assert r.score[b].item() == pytest.approx(score, abs=1e-5)
        lp, ref = ((m(torch.tensor([row]))[0, q - 1:-1] / 0.7).log_softmax(-1).detach() for m in (policy, other))
        close(r.kl[b], (lp.exp() * (lp - ref)).sum(), 1e-5)
        entropy += (-(lp.exp() * lp).sum(-1)).tolist()
        lp, ref = (x[torch.arange(L), row[q:]] for x in (lp, ref))
        close(r.logprobs[b, :L], lp, 1e-5)
        close(r.ref_logprobs[b, :L], ref, 1e-5)
        v = [value.scores(torch.tensor([row[:i]]), torch.tensor([i])).item() for i in range(q, end)] + [0.0]
        rewards = (-0.3 * (lp - ref)).tolist()
        rewards[-1] += score
        deltas = [rewards[t] + 0.99 * v[t + 1] - v[t] for t in range(L)]
        a = [sum((0.99 * 0.95) ** (k - t) * deltas[k] for k in range(t, L)) for t in range(L)]
        close(r.returns[b, :L], [x + y for x, y in zip(a, v)], 3e-5)
        assert r.mask[b].tolist() == [t < L for t in range(r.mask.shape[1])] and (r.returns[b, L:] == 0).all()
        advantages.append(torch.tensor(a))
    a = torch.cat(advantages)
    close(r.advantages[r.mask], (a - a.mean()) / a.std(unbiased=False), 3e-5)
    assert r.entropy.item() == pytest.approx(sum(entropy) / len(entropy), abs=1e-5)


def test_zero_advantages_give_the_policy_no_gradient(iteration, g):
    """Catches a loss term that pulls at the policy by itself; the value model must still learn."""
    policy, _, _, value, s, _, r = iteration
    r.advantages.zero_()
    before = [copy.deepcopy(m.state_dict()) for m in (policy, value)]
    update(policy, value, make_optimizer([policy, value], s.lr, 0.0), r, s, g)
    assert all(torch.equal(x, before[0][name]) for name, x in policy.state_dict().items())
    assert not torch.equal(value.score.weight, before[1]["score.weight"])


def test_update_raises_what_had_an_advantage(iteration, g):
    """Catches an update that climbs down: the probability of good tokens must rise against that of bad ones."""
    policy, _, _, value, s, _, r = iteration
    update(policy, value, make_optimizer([policy, value], s.lr, 0.0), r, s, g)
    now = policy.logprobs(r.tokens, r.query_lengths, r.lengths, r.mask.shape[1], s.temperature)
    assert ((now - r.logprobs) * r.advantages)[r.mask].mean() > 0.01


def test_update_brings_values_closer_to_returns(iteration, g):
    """Catches a value loss that is climbed, or weighted away."""
    policy, _, _, value, s, _, r = iteration
    error = lambda v: ((v - r.returns)[r.mask] ** 2).mean().item()
    update(policy, value, make_optimizer([policy, value], s.lr, 0.0), r, s, g)
    assert error(value.values(r.tokens, r.query_lengths, r.lengths, r.mask.shape[1])) < 0.9 * error(r.values)


def test_micro_batches_and_recomputing_change_no_gradient(iteration, g, monkeypatch):
    """Catches parts of a minibatch that count by their rows and not by their tokens, and a block recomputed differently."""
    policy, _, _, value, s, _, r = iteration
    s.epochs, s.minibatches, s.max_grad_norm, gradients = 1, 2, 1e9, []
    s.ptx_coef, s.ptx_ratio, rows, cut = 0.5, 2, random_rows(g, n=9), []
    monkeypatch.setattr(sft, "row_loss", lambda model, q, *a: (cut.append(len(q)), row_loss(model, q, *a))[1])
    for micro, recompute in ((0, False), (5, False), (0, True)):
        s.micro, policy.recompute, value.recompute = micro, recompute, recompute
        stats = update(policy, value, make_optimizer([policy, value], 0.0, 0.0), r, s, torch.Generator().manual_seed(1), (*rows, .3))
        gradients.append([torch.tensor([stats["policy_loss"], stats["value_loss"], stats["value_error"], stats["ptx_loss"]])]
                         + [p.grad.clone() for model in (policy, value) for p in model.parameters() if p.grad is not None])
    assert cut == [12] * 4 + [5, 5, 2] * 4 + [12] * 4  # PPO-ptx's rows are cut as the episodes are
    assert len(set(r.mask.sum(1).tolist())) > 1
    for other in gradients[1:]:
        for a, b in zip(gradients[0], other, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_the_largest_log_ratio_is_that_of_all_parts(iteration, g):
    """Catches a mean of maxima, which moves with the size of the parts that a minibatch is cut into."""
    policy, _, _, value, s, _, r = iteration
    s.epochs, s.minibatches, out = 2, 2, []
    for micro in (0, 2):
        s.micro, models = micro, [copy.deepcopy(policy), copy.deepcopy(value)]
        out.append(update(*models, make_optimizer(models, 1e-3, 0.0), r, s, torch.Generator().manual_seed(1)))
    assert out[1]["max_log_ratio"] == pytest.approx(out[0]["max_log_ratio"], rel=1e-2) and out[0]["max_log_ratio"] > .01
    assert max(stats["first_log_ratio"] for stats in out) < 1e-4


def test_update_refuses_a_policy_that_did_not_sample(iteration, g):
    """Catches a temperature that differs between sampling and training, at run time."""
    policy, _, _, value, s, _, r = iteration
    s.temperature = 1.0
    with pytest.raises(DataError, match="log ratio"):
        update(policy, value, make_optimizer([policy, value], s.lr, 0.0), r, s, g)


def returns_by_hand(rewards, values, L, gamma=0.99, lam=0.95):
    """Advantages and returns of one row of L tokens, term by term."""
    v = values[:L].tolist() + [0.0]
    deltas = [rewards[t] + gamma * v[t + 1] - v[t] for t in range(L)]
    advantages = [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, L)) for t in range(L)]
    return torch.tensor(advantages), torch.tensor(advantages) + values[:L]


def test_rollout_with_the_exact_kl(iteration):
    """Catches the exact KL taken at another state or temperature, and an own share that reaches the returns."""
    policy, _, reward, value, s, queries, _ = iteration
    other, s.kl_reward = tiny_model(seed=8), "exact"
    r = rollout(policy, other, reward, value, queries, 6, s, 0.3, torch.Generator().manual_seed(7))
    every = []
    for b in range(len(queries)):
        q, end = int(r.query_lengths[b]), int(r.lengths[b])
        lp, ref = ((m(r.tokens[b:b + 1, :end])[0, q - 1:-1] / 0.7).log_softmax(-1).detach() for m in (policy, other))
        kl = (lp.exp() * (lp - ref)).sum(-1)
        rewards = (-0.3 * kl).tolist()
        rewards[-1] += r.score[b].item()
        advantages, returns = returns_by_hand(rewards, r.values[b], end - q)
        close(r.returns[b, :end - q], returns, 3e-5)
        every.append(advantages - 0.3 * (r.logprobs - r.ref_logprobs)[b, :end - q] + 0.3 * kl)
    every = torch.cat(every)
    close(r.advantages[r.mask], (every - every.mean()) / every.std(unbiased=False), 5e-5)


def test_rollout_with_whitened_rewards(iteration):
    """Catches rewards whose mean is dropped, whitening after the advantages, and statistics of one row or of what is masked."""
    policy, _, reward, value, s, queries, _ = iteration
    s.whiten_rewards = True
    r = rollout(policy, tiny_model(seed=8), reward, value, queries, 6, s, 0.3, torch.Generator().manual_seed(7))
    rewards = -0.3 * (r.logprobs - r.ref_logprobs)
    lengths = r.mask.sum(1)
    for b, L in enumerate(lengths):
        rewards[b, L - 1] += r.score[b]
    x = rewards[r.mask]
    rewards = (rewards - x.mean()) / x.std(unbiased=False) + x.mean()
    for b, L in enumerate(lengths.tolist()):
        close(r.returns[b, :L], returns_by_hand(rewards[b].tolist(), r.values[b], L)[1], 5e-5)


def test_rollout_ends_by_the_truncation_rule(iteration):
    """Catches a sampler that stops too early for the rule, a score at another token, and a penalty given to the wrong rows."""
    policy, _, reward, value, s, queries, _ = iteration
    r = rollout(policy, tiny_model(seed=8), reward, value, queries * 3, 6, s, 0.3, torch.Generator().manual_seed(7), stop=(4, 2))
    early = 0
    for b, query in enumerate(queries * 3):
        q, end = len(query), int(r.lengths[b])
        y = r.tokens[b, q:end].tolist()
        early += 4 in y[:2]
        assert 4 not in y[2:-1] and r.no_eos[b] == (y[-1] != 4) and (len(y) == 6 or len(y) > 2 and y[-1] == 4)
        expected = -7.0 if r.no_eos[b] else reward.scores(r.tokens[b:b + 1, :end], r.lengths[b:b + 1]).item()
        assert r.score[b].item() == pytest.approx(expected, abs=1e-5)
        assert r.mask[b].tolist() == [t < len(y) for t in range(r.mask.shape[1])]
    assert early > 3 and 5 < r.no_eos.sum() < 67 and r.sampler_gap < 1e-4
    assert (r.tokens == 10).any()  # EOS is a token like any other here


def gradients_of_one_step(iteration, g, s, pretraining=None):
    """What update() hands to the optimizer in one step over the whole rollout: {id of parameter: gradient}."""
    policy, _, _, value, _, _, r = iteration
    optimizer = torch.optim.SGD([*policy.parameters(), *value.parameters()], 0.0)
    stats = update(policy, value, optimizer, r, s, g, pretraining)
    return stats, torch.cat([p.grad.flatten() for p in policy.parameters()])


@pytest.mark.parametrize("ratio", [1, 3])
def test_ptx_adds_its_coefficient_times_the_gradient_of_the_pretraining_loss(iteration, g, ratio):
    """Catches a flipped sign, a coefficient lost or squared, a sum over draws, a temperature, another query weight."""
    policy, _, _, value, _, _, r = iteration
    rows = [[1, 2, 3]], [[4, 5, 10]]
    s = PPOSettings(minibatches=1, epochs=1, max_grad_norm=1e9, ptx_coef=2.5, ptx_ratio=ratio)
    stats, both = gradients_of_one_step(iteration, g, s, (*rows, 0.3))
    plain_stats, alone = gradients_of_one_step(iteration, g, PPOSettings(minibatches=1, epochs=1, max_grad_norm=1e9))
    loss = row_loss(policy, *rows, 0.3)
    expected = gradient(policy, loss)
    close(both - alone, 2.5 * expected, 1e-5)
    assert expected.norm() > 0.1 and alone.norm() > 0.01
    assert stats["ptx_loss"] == pytest.approx(loss.item(), abs=1e-5) and "ptx_loss" not in plain_stats


def test_ptx_draws_every_row_and_as_many_as_it_says(iteration, g, monkeypatch):
    """Catches a draw that never reaches the last row, rows whose query and response do not belong together, and a wrong number."""
    seen = []
    monkeypatch.setattr(sft, "row_loss", lambda model, q, r, w: (seen.append((q, r, w)), row_loss(model, q, r, w))[1])
    queries, responses = [[i, 1] for i in range(5)], [[i, 10] for i in range(5)]
    s = PPOSettings(minibatches=2, epochs=1, ptx_coef=1., ptx_ratio=4)
    gradients_of_one_step(iteration, g, s, (queries, responses, 0.3))
    assert len(seen) == 2 * 4 and all(len(q) == len(r) == 12 and w == 0.3 for q, r, w in seen)
    assert {(*q, *r) for qs, rs, _ in seen for q, r in zip(qs, rs)} == {(i, 1, i, 10) for i in range(5)}


def test_ptx_holds_the_language_model(iteration, g):
    """What it is for: after updates with it, the pretraining loss is lower than after the same updates without it."""
    policy, _, _, value, _, _, r = iteration
    start, rows, losses = [copy.deepcopy(m.state_dict()) for m in (policy, value)], ([[1, 2, 3], [2, 2]], [[4, 10], [5, 5, 10]]), {}
    for coef in (0., 5.):
        s = PPOSettings(ptx_coef=coef)
        update(policy, value, make_optimizer([policy, value], 1e-3, 0.0), r, s, g, (*rows, 1.0))
        losses[coef] = row_loss(policy, *rows, 1.0).item()
        for m, weights in zip((policy, value), start):
            m.load_state_dict(weights)
    assert losses[5.] < losses[0.] - 0.05


def test_update_moves_the_average_every_step(iteration, g):
    """Catches an average moved once per update, and one that pulls at the policy: with 1 - d tiny it counts the steps."""
    policy, _, _, value, s, _, r = iteration
    s.ema, s.minibatches, s.epochs = 1 - 1e-3, 3, 2
    average, calls, real = copy.deepcopy(policy), [], ppo.move_average
    ppo.move_average = lambda *args: (calls.append([p.detach().clone() for p in policy.parameters()]), real(*args))
    try:
        update(policy, value, make_optimizer([policy, value], s.lr, 0.0), r, s, g, average=average)
    finally:
        ppo.move_average = real
    assert len(calls) == 6 and not torch.equal(calls[0][0], calls[1][0])
    assert all(torch.equal(a, p) for a, p in zip(calls[-1], policy.parameters()))  # after the last step, not before it


def test_a_shared_value_head_trains_the_trunk(iteration, g):
    """Catches a head that does not start at 0, value gradients cut off from the policy, and parameters in the optimizer twice."""
    policy, _, reward, _, s, queries, _ = iteration
    s.value = "shared"
    value = make_value_model(s, "nowhere", "nowhere", policy, "cpu")
    assert value is policy
    r = rollout(policy, tiny_model(seed=8), reward, value, queries, 6, s, 0.3, g)
    assert (r.values == 0).all() and r.values.shape == r.mask.shape
    r.advantages.zero_()  # so that only the value loss is left
    before = policy.blocks[0].c_fc.weight.detach().clone()
    update(policy, value, make_optimizer([policy], 1e-2, 0.0), r, s, g)
    assert (policy.values(r.tokens, r.query_lengths, r.lengths, r.mask.shape[1])[r.mask] != 0).all()
    assert (policy.blocks[0].c_fc.weight - before).abs().max() > 1e-3


def test_check_ratio():
    """Catches a check that never fires, fires always, or is blind to NaN."""
    def stats(mean, largest):
        return {"mean_log_ratio": mean, "max_log_ratio": largest}
    check_ratio(stats(0., 0.), torch.float32)
    check_ratio(stats(1e-3, 1e-2), torch.bfloat16)
    for bad in (stats(1e-5, 1e-3), stats(2e-4, 2e-4), stats(math.nan, math.nan)):
        with pytest.raises(DataError):
            check_ratio(bad, torch.float32)
    for bad in (stats(1e-2, 2e-2), stats(1e-3, 1e-1)):
        with pytest.raises(DataError):
            check_ratio(bad, torch.bfloat16)


POSTS = [{"id": str(i), "subreddit": "x", "title": "a dog", "post": f"my {'cat ' * i}ate.", "summary": "bad"} for i in range(8)]


@pytest.fixture(scope="module")
def run_folder(enc, tmp_path_factory):
    """A run's sft/ and reward/: random, but for a liking for EOS and for "a", so that some responses end."""
    folder = tmp_path_factory.mktemp("run")
    for seed, (stage, head) in enumerate((("sft", "lm"), ("reward", "scalar")), 5):
        model = tiny_model(head, seed, vocab_size=enc.n_vocab, n_positions=80)
        with torch.no_grad():
            model.wte.weight[[enc.n_vocab - 1, stop_rule(enc, "a", 0, 8)[0]]] += 2 * model.ln_f.bias
        model.save_pretrained(folder / stage)
    return folder


def train(run_folder, enc, out, s, **more):
    """train_ppo -> weights of policy and value model, metrics, samples."""
    ppo.train_ppo(str(run_folder), enc, POSTS, 70, 8, s, str(out), 0, "cpu", save_every=2,
                  pretraining=([[1, 2, 3], [2, 2]], [[4, enc.n_vocab - 1], [5, 5]], 0.5), **more)
    rows = [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in read_metrics(out)]
    return [load_file(out / folder / "model.safetensors") for folder in ("", "value")], rows, (out / "samples.jsonl").read_text()


PLAIN = dict(batch=4, iterations=4, epochs=1)
EVERYTHING = PLAIN | dict(kl="adaptive", kl_target=.1, kl_horizon=20, value="shared", whiten_rewards=True, stop_token="a", truncate_after=2,
                          ptx_coef=.5, ptx_ratio=2, ema=.9, tf_adam=True, adam_eps=1e-5, adam_beta2=.999)


@pytest.mark.parametrize("settings", [PLAIN, EVERYTHING])
def test_ppo_resumes_bit_for_bit(enc, run_folder, tmp_path, monkeypatch, settings):
    """Catches state that a checkpoint forgets (β, generators, either model, the average, the place in the plan), and logs doubled."""
    s, real = PPOSettings(**settings), ppo.update
    calls = iter([None, None, None, KeyboardInterrupt])

    def stops(*args):
        if next(calls, None):
            raise KeyboardInterrupt
        return real(*args)

    whole = train(run_folder, enc, tmp_path / "whole", s)
    monkeypatch.setattr(ppo, "update", stops)
    with pytest.raises(KeyboardInterrupt):
        train(run_folder, enc, tmp_path / "halves", s)
    halves = train(run_folder, enc, tmp_path / "halves", s)
    for a, b in zip(whole[0], halves[0]):
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert whole[1:] == halves[1:] and [row["step"] for row in whole[1]] == [0, 1, 2, 3]
    assert whole[1][0]["kl"] < 1e-3 < whole[1][3]["kl"]


SWITCHES = [  # (what else is set, the switch): PPO computes something else with it
    ({}, {"kl_reward": "exact"}), ({}, {"value": "scratch"}), ({}, {"value": "shared"}), ({}, {"whiten_rewards": True}),
    ({}, {"stop_token": "a"}), ({}, {"truncate_after": 3}), ({}, {"ptx_coef": .5}), ({"ptx_coef": .5}, {"ptx_ratio": 2}), ({}, {"ema": .9}),
    ({}, {"adam_beta2": .999}), ({}, {"adam_eps": 1e-2}), ({"adam_eps": 1e-2}, {"tf_adam": True}),
    ({"kl_target": .01, "kl_horizon": 20}, {"kl": "adaptive"}), ({"kl": "adaptive", "kl_horizon": 20, "iterations": 3}, {"kl_target": .01}),
    ({"kl": "adaptive"}, {"kl_horizon": 20}), ({}, {"no_eos_score": -3.}), ({}, {"lam": .5}), ({}, {"gamma": .9}), ({}, {"clip": 1e-4}),
    ({"epochs": 2}, {"value_clip": 1e-4}), ({}, {"value_coef": 1.}), ({}, {"temperature": 1.}), ({}, {"max_grad_norm": .01}), ({}, {"epochs": 2}),
    ({}, {"minibatches": 1}), ({}, {"beta": .5}), ({}, {"lr": 1e-4}), ({}, {"value_lr": 1e-4}), ({}, {"schedule": "constant"}), ({}, {"warmup": 2})]


@pytest.fixture(scope="module")
def weights_of(enc, run_folder, tmp_path_factory):
    """Settings -> the weights that they lead to, each trained once."""
    @functools.cache
    def weights(**settings):
        s = PPOSettings(**PLAIN | {"iterations": 2, "beta": 1.0, "batch": 8, "lr": 3e-3} | settings)
        return train(run_folder, enc, tmp_path_factory.mktemp("switch"), s)[0]
    return weights


@pytest.mark.parametrize("others, switch", SWITCHES, ids=[next(iter(s)) for _, s in SWITCHES])
def test_no_switch_is_dead(weights_of, others, switch):
    """Catches a setting that nothing reads: each gives other weights, value model included, than the same run without it."""
    before, after = weights_of(**others), weights_of(**others | switch)
    assert any(not torch.equal(a[name], b[name]) for a, b in zip(before, after) for name in a)


def test_gradients_are_not_clipped_at_0(weights_of):
    """Catches a bound of 0 taken at its word, which would stop all training."""
    free, wide = weights_of(max_grad_norm=0.), weights_of(max_grad_norm=1e9)
    assert all(torch.equal(a[name], b[name]) for a, b in zip(free, wide) for name in a)
    assert any(not torch.equal(a[name], b[name]) for a, b in zip(free, weights_of(max_grad_norm=.01)) for name in a)


def test_every_setting_has_its_switch_test():
    flipped = {name for _, switch in SWITCHES for name in switch}
    assert {f.name for f in dataclasses.fields(PPOSettings)} - flipped == {"iterations", "batch", "micro", "recompute", "snapshots"}


def test_snapshots_are_the_policy_along_the_way(enc, run_folder, tmp_path):
    """Catches copies of another iteration, or copies that change the training: the last is the result, none is kept unasked."""
    (kept, _), _, _ = train(run_folder, enc, tmp_path / "kept", PPOSettings(**PLAIN, snapshots=2))
    (plain, _), _, _ = train(run_folder, enc, tmp_path / "plain", PPOSettings(**PLAIN))
    assert sorted(f.name for f in tmp_path.glob("*/iteration-*")) == ["iteration-2", "iteration-4"]
    half, last = (load_file(tmp_path / "kept" / f"iteration-{i}" / "model.safetensors") for i in (2, 4))
    assert all(torch.equal(kept[name], plain[name]) and torch.equal(kept[name], last[name]) for name in kept)
    assert any(not torch.equal(half[name], last[name]) for name in last)


@pytest.mark.parametrize("settings, shares", [
    (dict(iterations=4), [1, .75, .5, .25]), (dict(iterations=4, schedule="constant"), [1, 1, 1, 1]),
    (dict(iterations=5, schedule="constant", warmup=3), [.1, .4, .7, 1, 1]), (dict(iterations=4, warmup=2), [.1, .55 * .75, .5, .25])])
def test_schedules_by_hand(settings, shares):
    """Catches a warm-up from 0 or of another length, and a line that does not reach 0 behind the last iteration."""
    assert [ppo.lr_share(i, PPOSettings(**settings)) for i in range(len(shares))] == pytest.approx(shares)


def test_each_network_has_its_learning_rate(enc, run_folder, tmp_path, monkeypatch):
    """Catches rates swapped, a schedule that only one of them follows, and parameters that belong to another model's group."""
    seen, real = [], ppo.update

    def spy(policy, value, optimizer, *args):
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        seen.append([{rates[id(p)] for p in model.parameters()} for model in (policy, value)])
        return real(policy, value, optimizer, *args)
    monkeypatch.setattr(ppo, "update", spy)
    train(run_folder, enc, tmp_path / "apart", PPOSettings(**PLAIN | dict(iterations=2, lr=1e-3, value_lr=4e-3)))
    train(run_folder, enc, tmp_path / "alike", PPOSettings(**PLAIN | dict(iterations=2, lr=1e-3)))
    assert seen == [[{1e-3}, {4e-3}], [{5e-4}, {2e-3}], [{1e-3}, {1e-3}], [{5e-4}, {5e-4}]]


def test_the_horizon_is_one_percent_of_the_episodes():
    """Catches the published constant where a run has other episodes, and a β that one rollout could turn round."""
    def horizon(**settings):
        return ppo.make_controller(PPOSettings(kl="adaptive", **settings)).horizon
    assert horizon(batch=512, iterations=1953) == 9999 and horizon(batch=512, iterations=1953, kl_horizon=7) == 7  # Ziegler's code: 10,000
    assert horizon(batch=64, iterations=12) == 64 and isinstance(ppo.make_controller(PPOSettings()), FixedKL)


def test_ppo_that_pauses_goes_on_as_if_it_had_not(enc, run_folder, tmp_path):
    """Catches schedules or a prompt plan cut to the first part, and a state that a copy of the folder does not carry; with another
    reward model behind the pause it becomes another policy."""
    s = PPOSettings(**EVERYTHING | dict(value="separate"))
    tiny_model("scalar", 9, vocab_size=enc.n_vocab, n_positions=80).save_pretrained(run_folder / "reward" / "other")
    whole = train(run_folder, enc, tmp_path / "whole", s)
    train(run_folder, enc, tmp_path / "part", s, until=2)
    assert GPT.from_pretrained(tmp_path / "part") and len(read_metrics(tmp_path / "part")) == 2
    shutil.copytree(tmp_path / "part", tmp_path / "other")
    rest, other = train(run_folder, enc, tmp_path / "part", s), train(run_folder, enc, tmp_path / "other", s, reward="reward/other")
    for a, b, c in zip(whole[0], rest[0], other[0]):
        assert all(torch.equal(a[name], b[name]) for name in a) and any(not torch.equal(a[name], c[name]) for name in a)
    assert whole[1:] == rest[1:] and whole[1][:2] == other[1][:2] and whole[1][2]["score"] != other[1][2]["score"]


def test_adaptive_kl_steers_the_next_rollout(enc, run_folder, tmp_path):
    """Catches a controller fed with another KL or number of episodes, or one whose β is used an iteration early."""
    _, rows, _ = train(run_folder, enc, tmp_path / "out", PPOSettings(**PLAIN, kl="adaptive", kl_target=.05, kl_horizon=16))
    for now, then in zip(rows, rows[1:]):
        assert then["beta"] == pytest.approx(now["beta"] * (1 + max(-.2, min(.2, now["kl_k1"] / .05 - 1)) * 4 / 16))
    assert rows[0]["beta"] == .05 and len({row["beta"] for row in rows}) > 2


@pytest.mark.parametrize("kind", ["separate", "scratch"])
def test_value_model_is_trained(enc, run_folder, tmp_path, kind):
    """Catches an optimizer that has the policy alone."""
    before = GPT.from_pretrained(run_folder / ("reward" if kind == "separate" else "sft"), "scalar").state_dict()
    policy, value = train(run_folder, enc, tmp_path / "out", PPOSettings(**PLAIN, value=kind))[0]
    for weights in (policy, value):
        assert (weights["transformer.wte.weight"] - before["wte.weight"]).abs().max() > 1e-4


def test_value_models_start_where_they_should(enc, run_folder):
    """Catches scratch that starts from the reward model, separate that does not, and a head that the seed does not decide."""
    policy, reward = GPT.from_pretrained(run_folder / "sft"), GPT.from_pretrained(run_folder / "reward", "scalar")
    models = {}
    for kind in ("separate", "scratch"):
        torch.manual_seed(0)
        models[kind] = make_value_model(PPOSettings(value=kind), str(run_folder / "sft"), str(run_folder / "reward"), policy, "cpu").state_dict()
    assert all(torch.equal(p, reward.state_dict()[name]) for name, p in models["separate"].items())
    assert all(torch.equal(p, models["scratch"][name]) for name, p in policy.state_dict().items())
    assert models["scratch"]["score.weight"].std() > 0.1 and not torch.equal(models["scratch"]["score.weight"], reward.score.weight)


@pytest.mark.parametrize("value, ema", [("shared", 0.), ("shared", .9), ("separate", .9)])
def test_what_is_saved_as_the_policy(enc, run_folder, tmp_path, value, ema, monkeypatch):
    """Catches a value head that goes out with the policy, last weights saved for the average, and a value model without its head."""
    last, real = {}, ppo.move_average

    def spy(average, model, decay):
        real(average, model, decay)
        last.update(average=copy.deepcopy(average), policy=copy.deepcopy(model))
    monkeypatch.setattr(ppo, "move_average", spy)
    train(run_folder, enc, tmp_path / "out", PPOSettings(**PLAIN, value=value, ema=ema, lr=3e-3))
    policy, head = GPT.from_pretrained(tmp_path / "out"), GPT.from_pretrained(tmp_path / "out" / "value", "scalar")
    assert policy.score is None and "score.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    assert head.score.weight.abs().max() > 0 and torch.equal(head.wte.weight, policy.wte.weight) == (value == "shared" and not ema)
    if ema:
        assert torch.equal(policy.wte.weight, last["average"].wte.weight) and not torch.equal(policy.wte.weight, last["policy"].wte.weight)


def test_stop_token_is_one_token(enc, run_folder, tmp_path):
    """Catches a stop text that the vocabulary cannot say in one token, and a window that no response reaches."""
    assert stop_rule(enc, "", 0, 8) == (enc.n_vocab - 1, 0) and enc.decode([stop_rule(enc, ".", 3, 8)[0]]) == "."
    with pytest.raises(DataError, match="stop_token"):
        stop_rule(enc, "purple banana", 0, 8)
    with pytest.raises(DataError, match="truncate_after"):
        train(run_folder, enc, tmp_path, PPOSettings(truncate_after=8))


@pytest.mark.parametrize("bad", [{"kl": "no"}, {"kl_target": 0.}, {"kl_horizon": 12}, {"kl_horizon": -1}, {"kl_reward": "k2"}, {"value": "no"}, {"truncate_after": -1},
                                 {"ptx_coef": -1.}, {"ptx_ratio": 0}, {"ema": 1.}, {"adam_eps": 0.}, {"adam_beta2": 1.},
                                 {"kl_reward": "exact", "whiten_rewards": True}, {"value_lr": -1.}, {"value_lr": 1e-4, "value": "shared"},
                                 {"schedule": "cosine"}, {"warmup": -1}])
def test_settings_out_of_range_are_refused(bad):
    with pytest.raises(DataError, match=next(iter(bad))):
        PPOSettings(**bad).validate()


def test_check_sampler():
    """Catches a sampler that reports another policy's log-probabilities, and a check that is blind to NaN."""
    ppo.check_sampler(1e-5, torch.float32)
    ppo.check_sampler(6e-3, torch.bfloat16)
    for gap, dtype in ((1e-3, torch.float32), (1e-1, torch.bfloat16), (math.nan, torch.float32)):
        with pytest.raises(DataError):
            ppo.check_sampler(gap, dtype)


@pytest.mark.parametrize("n", [8, 9, 15, 16, 23])
def test_plan_lasts_for_every_iteration(n):
    """Catches a plan that runs out when the number of posts is no multiple of the batch."""
    plan = ppo.prompt_plan(n, PPOSettings(batch=8, iterations=7), 0)
    assert len(plan) >= 7 and all(len(rows) == 8 and max(rows) < n for rows in plan)
