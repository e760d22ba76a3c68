"""ppo.py: the equations by hand, by brute force and by enumerating every response of a tiny world; one iteration."""
import copy
import itertools
import math

import pytest
import torch
from conftest import random_rows, tiny_model
from safetensors.torch import load_file

import ppo
from data import DataError, pad_rows
from ppo import (AdaptiveKL, FixedKL, PPOSettings, check_ratio, compare_policies, gae, kl_estimates, policy_loss, rollout,
                 shaped_rewards, update, value_loss, whiten)
from sft import make_optimizer, read_metrics

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


@pytest.mark.parametrize("value, ret, loss", [(1, .9, .02), (1, .4, .18), (.6, .9, .045)])
def test_value_loss_by_hand(value, ret, loss):
    """Catches a lost ½, min for max, and clipping around anything but the old value."""
    out, _ = value_loss(torch.tensor([[float(value)]]), torch.tensor([[.5]]), torch.tensor([[ret]]), torch.ones(1, 1), 0.2)
    close(out, loss)


# --- against brute force


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


def test_the_whole_chain_is_the_gradient_of_score_less_kl(three):
    """Catches any misalignment between values, rewards, advantages and log-probabilities: with γ = λ = 1 and any values
    that see only the state, the chain's expected gradient is that of E[score] - β KL(π‖π_ref), by enumeration."""
    policy, ref, rows, p, q = three
    values = tiny_model("scalar", seed=4, vocab_size=3).values(*rows).detach()
    old, ref_logprobs, mask, _, _ = compare_policies(policy, ref, *rows, T)
    advantages, _ = gae(shaped_rewards(REWARD, old, ref_logprobs, mask, 0.5), values, mask, 1.0, 1.0)
    loss, stats = policy_loss(policy.logprobs(*rows, T), old, p[:, None] * advantages * mask.sum(), mask, 0.2)
    now = exact_logprobs(policy)
    expected = gradient(policy, (now.exp() * (REWARD - 0.5 * (now - q.log()))).sum())
    close(-gradient(policy, loss), expected, 1e-5)
    assert expected.norm() > 0.3 and stats["max_log_ratio"] < 1e-5


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


def test_update_refuses_a_policy_that_did_not_sample(iteration, g):
    """Catches a temperature that differs between sampling and training, at run time."""
    policy, _, _, value, s, _, r = iteration
    s.temperature = 1.0
    with pytest.raises(DataError, match="log ratio"):
        update(policy, value, make_optimizer([policy, value], s.lr, 0.0), r, s, g)


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


def test_ppo_resumes_bit_for_bit(enc, tmp_path, monkeypatch):
    """Catches state that a checkpoint forgets (β, generators, either model, the place in the plan), and logs doubled."""
    posts = [{"id": str(i), "subreddit": "x", "title": "a dog", "post": f"my {'cat ' * i}ate.", "summary": "bad"} for i in range(8)]
    for stage, head in (("sft", "lm"), ("reward", "scalar")):
        tiny_model(head, vocab_size=enc.n_vocab, n_positions=80).save_pretrained(tmp_path / stage)
    s, real = PPOSettings(batch=4, iterations=4, epochs=1), ppo.update
    calls = iter([None, None, None, KeyboardInterrupt])

    def train(name):
        ppo.train_ppo(str(tmp_path), enc, posts, 70, 8, s, str(tmp_path / name), 0, "cpu", save_every=2)
        rows = [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in read_metrics(tmp_path / name)]
        weights = [load_file(tmp_path / name / folder / "model.safetensors") for folder in ("", "value")]
        return weights, rows, (tmp_path / name / "samples.jsonl").read_text()

    def stops(*args):
        if next(calls, None):
            raise KeyboardInterrupt
        return real(*args)

    whole = train("whole")
    monkeypatch.setattr(ppo, "update", stops)
    with pytest.raises(KeyboardInterrupt):
        train("halves")
    halves = train("halves")
    for a, b in zip(whole[0], halves[0]):
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert whole[1:] == halves[1:] and [row["step"] for row in whole[1]] == [0, 1, 2, 3]
    assert whole[1][0]["kl"] < 1e-3 < whole[1][3]["kl"]


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
