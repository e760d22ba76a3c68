"""
PPO on the reward model's score with a KL penalty to the SFT model: the last stage of RLHF.

References: Ziegler 2019 §2.2 and its released code; Stiennon 2020 §3.4; InstructGPT 2022 §3.5; Schulman et al. 2017 (PPO),
2016 (GAE). Where they are silent (Stiennon's clip ranges, whitening) Ziegler's code decides.

    python ppo.py out/tiny-seed1 --out out/tiny-seed1/ppo-again --beta 0.1

    R(x, y) = r(x, y) - β log(π(y|x) / π_SFT(y|x))           maximised over π

One iteration: sample responses (rollout), score them, give each token its share of the reward (shaped_rewards, gae), and
take a few clipped steps on them (update). To change the reward, change `score` in stage 3 of rollout().
Where the three papers differ there is a setting, named in PPOSettings with whose choice it is.
Conventions: entry t of a [B, R] tensor belongs to response token y_t; the episode ends at EOS, where the score lands;
everything behind is masked, ignored on input and 0 on output.
"""
import copy
import json
import os
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tqdm import tqdm

import world
from data import DataError, decode_response, encode_query, pad_rows, save_vocabulary, write_atomic
from sft import (MetricsLog, alone, backward_parts, backward_rows, batches, check, load_model, load_state, make_optimizer, run_main, sample,
                 save_state, set_lr, stop_rule, stored_posts, tf_adam_step)


@dataclass
class PPOSettings:
    lr: float = 3e-4  # peak learning rate of policy and value model
    value_lr: float = 0.0  # that of a value model apart from the policy, 0: the same (InstructGPT 9e-6)
    schedule: str = "linear"  # linear: the learning rates fall to 0 (Ziegler, Stiennon); constant (InstructGPT)
    warmup: int = 0  # iterations over which they rise from a tenth (InstructGPT 10)
    iterations: int = 12  # rollouts
    batch: int = 64  # episodes per rollout
    minibatches: int = 2  # parts a rollout is cut into; one optimizer step each
    epochs: int = 4  # passes over each rollout
    beta: float = 0.05  # KL coefficient (Stiennon 0.05, InstructGPT 0.02); where an adaptive one starts (Ziegler 0.15)
    kl: str = "fixed"  # fixed or adaptive: how the KL coefficient goes on (Ziegler §2.2)
    kl_target: float = 6.0  # adaptive: the KL to the reference, in nats per response, that it steers to
    kl_horizon: int = 0  # adaptive: episodes over which it steers; 0: 1 % of the run's, as Ziegler's code, but a whole rollout at least
    kl_reward: str = "k1"  # k1: each token pays log π - log π_ref; exact: each state pays its KL over the whole vocabulary
    gamma: float = 1.0  # discount
    lam: float = 0.95  # GAE's λ
    clip: float = 0.2  # policy ratios are clipped to 1 ± clip
    value_clip: float = 0.2  # value predictions move at most so far from the old ones
    value_coef: float = 0.1  # weight of the value loss
    value: str = "separate"  # value model: separate (begins as the reward model), scratch (as SFT) or shared with the policy (Ziegler)
    whiten_rewards: bool = False  # rewards of a rollout are scaled to variance 1 (Ziegler's style tasks)
    temperature: float = 0.7  # of sampling and of every log-probability here
    no_eos_score: float = -1.0  # the score of a response that does not end within R tokens
    stop_token: str = ""  # the text, one token, that ends a response; empty means EOS (Ziegler '.')
    truncate_after: int = 0  # stop tokens before this index of the response do not count (Ziegler 16 of 24)
    ptx_coef: float = 0.0  # PPO-ptx: weight of the pretraining loss, in nats per token; 0 is plain PPO (InstructGPT §3.5)
    ptx_ratio: int = 8  # PPO-ptx: pretraining rows per episode
    ema: float = 0.0  # decay per step of the weight average that becomes the policy; 0: the last weights do (InstructGPT 0.992)
    adam_beta2: float = 0.95  # Adam's decay of squared gradients (InstructGPT 0.95, Ziegler 0.999)
    adam_eps: float = 1e-8  # Adam's ε (Ziegler 1e-5)
    tf_adam: bool = False  # ε where TensorFlow 1 adds it: smaller first steps (Ziegler's code)
    micro: int = 0  # episodes (PPO-ptx: rows) per forward and backward pass, 0: a whole minibatch; the same gradient in less memory
    recompute: bool = False  # compute activations again in the backward pass: less memory, more time
    max_grad_norm: float = 1.0  # gradient clipping, policy and value model apart; 0: none (Ziegler)
    snapshots: int = 0  # iterations between copies of the policy, which are kept in iteration-N/; 0 keeps none

    def validate(self):
        check(self.lr > 0 and self.iterations > 0 and self.batch > 0 and self.epochs > 0, "lr, iterations, batch and epochs "
              "must be above 0")
        check(0 < self.minibatches <= self.batch, "minibatches must be between 1 and batch")
        check(self.micro >= 0 and self.value_coef >= 0, "micro and value_coef must not be negative")
        check(self.max_grad_norm >= 0 and self.snapshots >= 0, "max_grad_norm and snapshots must not be negative")
        check(self.beta >= 0, "beta must not be negative: a negative KL penalty rewards leaving the reference")
        check(0 <= self.gamma <= 1 and 0 <= self.lam <= 1, "gamma and lam must lie between 0 and 1")
        check(self.clip > 0 and self.value_clip > 0, "clip and value_clip must be above 0")
        check(self.temperature > 0, "temperature must be above 0: PPO needs a policy that samples")
        check(self.kl in ("fixed", "adaptive"), "kl must be fixed or adaptive")
        check(self.kl_target > 0, "kl_target must be above 0")
        check(self.kl_horizon == 0 or self.kl_horizon > self.batch / 5, "kl_horizon must be above a fifth of batch, or 0: one rollout "
              "could turn the KL coefficient negative")
        check(self.kl_reward in ("k1", "exact"), "kl_reward must be k1 or exact")
        check(not (self.kl_reward == "exact" and self.whiten_rewards), "whiten_rewards goes with kl_reward k1 only")
        check(self.value in ("separate", "scratch", "shared"), "value must be separate, scratch or shared")
        check(self.value_lr == 0 or self.value_lr > 0 and self.value != "shared", "value_lr must not be negative, and 0 with value shared")
        check(self.schedule in ("linear", "constant") and self.warmup >= 0, "schedule must be linear or constant, warmup not negative")
        check(self.truncate_after >= 0, "truncate_after must not be negative")
        check(self.ptx_coef >= 0 and self.ptx_ratio > 0, "ptx_coef must not be negative and ptx_ratio must be above 0")
        check(0 <= self.ema < 1 and 0 <= self.adam_beta2 < 1, "ema and adam_beta2 must be at least 0 and below 1")
        check(self.adam_eps > 0, "adam_eps must be above 0")


# ---------------------------------------------------------------------------------------------------------------------
# the equations; masks are bool or 0/1, all sums and means run over mask 1 only

def masked_mean(x, mask):
    mask = mask.bool()
    return torch.where(mask, x, 0).sum() / mask.sum()


def shaped_rewards(score, logprobs, ref_logprobs, mask, beta):
    """r_t = -β (log π(y_t) - log π_ref(y_t)) + 1[t = last] score.  (Stiennon §3.4, Ziegler eq. 2)

    score [B], the others [B, R] -> [B, R]. Summed over a row: score - β·k1. A reward, not a loss: rollout() takes no gradient
    through it."""
    mask = mask.bool()
    rewards = torch.where(mask, -beta * (logprobs - ref_logprobs), 0)
    last = mask.sum(1) - 1
    rewards[torch.arange(len(score)), last] += score
    return rewards


def own_kl_advantage(logprobs, ref_logprobs, kl, beta):
    """-β (log π(y_t)/π_ref(y_t) - KL(s_t)), what an action adds where the reward is the exact KL of its state.  all [B, R]

    KL(s_t) is the same whatever is done at s_t: as a reward it teaches to stay away from states where π differs from π_ref, but not
    to differ less in them. The action's own share has mean 0 at every state and brings the rest of the gradient back: on average
    it is the gradient with k1, less the noise of all later log ratios."""
    return -beta * (logprobs - ref_logprobs - kl)


def gae(rewards, values, mask, gamma, lam):
    """Generalized advantage estimation (Schulman 2016), all [B, R] -> advantages, returns.

    δ_t = r_t + γ V_{t+1} - V_t,  A_t = δ_t + γλ A_{t+1},  returns = A + V;  V behind the last token is 0."""
    mask = mask.bool()
    rewards, values = torch.where(mask, rewards, 0), torch.where(mask, values, 0)
    advantages, after = torch.zeros_like(values), torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        next_value = values[:, t + 1] if t + 1 < values.shape[1] else 0
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantages[:, t] = after = torch.where(mask[:, t], delta + gamma * lam * after, 0)
    return advantages, torch.where(mask, advantages + values, 0)


def whiten(x, mask, shift_mean=True):
    """(x - mean) / sqrt(var + 1e-8), biased variance; shift_mean=False puts the mean back. (Ziegler's code)"""
    mask = mask.bool()
    x = torch.where(mask, x, 0)  # before anything is computed: a NaN behind the end would come back in the gradient
    mean = masked_mean(x, mask)
    var = masked_mean((x - mean) ** 2, mask)
    white = (x - mean) * torch.rsqrt(var + 1e-8)
    return torch.where(mask, white if shift_mean else white + mean, 0)


def policy_loss(logprobs, old_logprobs, advantages, mask, clip):
    """Clipped surrogate (Schulman 2017): mean of max(-A ρ, -A clip(ρ, 1-ε, 1+ε)), ρ = π(y_t) / π_old(y_t).

    -> loss, {clip_fraction, approx_kl, max_log_ratio, mean_log_ratio}"""
    mask = mask.bool()
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0)
    ratio = log_ratio.exp()
    advantages = torch.where(mask, advantages, 0)
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)
    with torch.no_grad():
        stats = {"clip_fraction": masked_mean((clipped > plain).float(), mask).item(),
                 "approx_kl": 0.5 * masked_mean(log_ratio ** 2, mask).item(),
                 "max_log_ratio": log_ratio.abs().max().item(), "mean_log_ratio": masked_mean(log_ratio.abs(), mask).item()}
    return masked_mean(torch.maximum(plain, clipped), mask), stats


def value_loss(values, old_values, returns, mask, clip):
    """½ mean of max((V - R)², (V_clipped - R)²), V_clipped within ±clip of the old value. (Ziegler's code)

    -> loss, {value_clip_fraction, value_error}"""
    mask = mask.bool()
    values, old_values, returns = (torch.where(mask, x, 0) for x in (values, old_values, returns))
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    plain_error, clipped_error = (values - returns) ** 2, (clipped - returns) ** 2
    with torch.no_grad():
        stats = {"value_clip_fraction": masked_mean((clipped_error > plain_error).float(), mask).item(),
                 "value_error": masked_mean(plain_error, mask).item()}
    return 0.5 * masked_mean(torch.maximum(plain_error, clipped_error), mask), stats


def kl_estimates(logprobs, ref_logprobs, mask):
    """Estimates of KL(π‖π_ref) from samples of π, per sequence: k1, k2, k3, each [B].  (Schulman's note on KL)

    With Δ_t = log π(y_t) - log π_ref(y_t):  k1 = Σ Δ,  k2 = Σ ½Δ²,  k3 = Σ (exp(-Δ) - 1 + Δ).
    k1 and k3 are unbiased. Beware of exp(Δ) - 1 - Δ: from samples of π its mean is χ²(π‖π_ref) - KL, another quantity."""
    delta = torch.where(mask.bool(), logprobs - ref_logprobs, 0)
    return delta.sum(1), (0.5 * delta ** 2).sum(1), (torch.expm1(-delta) + delta).sum(1)


class FixedKL:
    """β stays what it is. (Stiennon, InstructGPT)"""

    def __init__(self, beta):
        self.beta = beta

    def update(self, kl, n_episodes):
        pass


class AdaptiveKL:
    """β ← β (1 + clip(KL / target - 1, ±0.2) · n / horizon): a proportional controller in log space. (Ziegler §2.2)"""

    def __init__(self, beta, target, horizon):
        self.beta, self.target, self.horizon = beta, target, horizon

    def update(self, kl, n_episodes):
        error = min(0.2, max(-0.2, kl / self.target - 1))
        self.beta *= 1 + error * n_episodes / self.horizon


@torch.no_grad()
def move_average(average, model, decay):
    """θ̄ ← decay · θ̄ + (1 - decay) · θ, in place. (InstructGPT appendix C.4)"""
    for mean, p in zip(average.parameters(), model.parameters()):
        mean.lerp_(p, 1 - decay)


def ptx_backward(policy, pretraining, n, s, generator):
    """PPO-ptx (InstructGPT eq. 2): to the policy's gradient adds that of ptx_coef · E[-log π(x)], x from pretraining. -> E[-log π(x)]

    E is the mean over ptx_ratio draws of n rows, each a mean per token at temperature 1, tokens weighted as in pretraining; the policy
    loss is a mean per token too. The paper does not state its normalisation. pretraining: queries, responses, query_weight."""
    (queries, responses, query_weight), total = pretraining, 0.0
    for _ in range(s.ptx_ratio):
        rows = torch.randint(len(queries), (n,), generator=generator).tolist()
        total += backward_rows(policy, [queries[i] for i in rows], [responses[i] for i in rows], query_weight, s.micro,
                               s.ptx_coef / s.ptx_ratio)
    return total / s.ptx_ratio


# ---------------------------------------------------------------------------------------------------------------------
# one iteration

@dataclass
class Rollout:
    tokens: torch.Tensor  # [B, T] query, response, zeros
    query_lengths: torch.Tensor  # [B]
    lengths: torch.Tensor  # [B] query and response with its EOS
    mask: torch.Tensor  # [B, R] 1 where a response token stands
    logprobs: torch.Tensor  # [B, R] of the policy that sampled, from the forward pass that training uses
    sampler_gap: torch.Tensor  # [] mean |difference| to the log-probabilities that the sampler itself reports
    ref_logprobs: torch.Tensor  # [B, R]
    values: torch.Tensor  # [B, R]
    score: torch.Tensor  # [B] reward model's, or no_eos_score
    advantages: torch.Tensor  # [B, R] whitened
    returns: torch.Tensor  # [B, R]
    no_eos: torch.Tensor  # [B] bool
    kl: torch.Tensor  # [B] exact: Σ_t KL(π(·|s_t) ‖ π_ref(·|s_t)) over the full vocabulary
    entropy: torch.Tensor  # [] mean per token


@torch.no_grad()
def compare_policies(policy, ref_policy, tokens, query_lengths, lengths, R, temperature):
    """Log-probabilities of the responses under both, and what only the full distributions tell.

    -> logprobs [B, R], ref_logprobs [B, R], mask [B, R], exact KL [B, R], entropy [B, R]"""
    h, targets, mask = policy.response_hidden(tokens, query_lengths, lengths, R)
    ref_h, _, _ = ref_policy.response_hidden(tokens, query_lengths, lengths, R)
    parts = []
    for rows in torch.arange(len(h), device=h.device).split(policy.chunk):  # [n, V], never [N, V]
        logp, ref_logp = (F.log_softmax(model.unembed(x[rows]) / temperature, -1) for model, x in ((policy, h), (ref_policy, ref_h)))
        p, y = logp.exp(), targets[rows, None]
        parts.append(torch.stack([logp.gather(1, y).squeeze(1), ref_logp.gather(1, y).squeeze(1),
                                  (p * (logp - ref_logp)).sum(-1), -(p * logp).sum(-1)]))
    flat = torch.cat(parts, 1)
    logprobs, ref_logprobs, kl, entropy = (torch.zeros(mask.shape, device=h.device).masked_scatter(mask, x) for x in flat)
    return logprobs, ref_logprobs, mask, kl, entropy


@torch.no_grad()
def rollout(policy, ref_policy, reward_model, value_model, queries, R, s, beta, generator, stop=None):
    """Sample one response to each query and work out what each of its tokens was worth. stop: of stop_rule, None is EOS."""
    # 1. sample
    tokens, query_lengths = pad_rows(queries, policy.device)
    tokens, lengths, ended, sampled = sample(policy, tokens, query_lengths, R, s.temperature, stop, generator)
    tokens = tokens[:, :int(lengths.max())]
    # 2. log-probabilities under policy and reference, at the temperature of the samples
    logprobs, ref_logprobs, mask, kl, entropy = compare_policies(policy, ref_policy, tokens, query_lengths, lengths, R,
                                                                 s.temperature)
    sampler_gap = masked_mean((sampled - logprobs).abs(), mask)
    # 3. score; a response that did not end gets a fixed one instead
    score = torch.where(ended, reward_model.scores(tokens, lengths), s.no_eos_score)
    # 4. per-token rewards, KL included
    exact = s.kl_reward == "exact"
    if exact:
        rewards = shaped_rewards(score, kl, torch.zeros_like(kl), mask, beta)  # -β KL(π ‖ π_ref) of each state
    else:
        rewards = shaped_rewards(score, logprobs, ref_logprobs, mask, beta)  # -β (log π - log π_ref) of each token
    if s.whiten_rewards:
        rewards = whiten(rewards, mask, shift_mean=False)
    # 5. advantages from the value model; returns from the advantages as they are, only then whitening
    values = value_model.values(tokens, query_lengths, lengths, R)
    advantages, returns = gae(rewards, values, mask, s.gamma, s.lam)
    if exact:
        advantages = advantages + own_kl_advantage(logprobs, ref_logprobs, kl, beta)
    return Rollout(tokens, query_lengths, lengths, mask, logprobs, sampler_gap, ref_logprobs, values, score, whiten(advantages, mask),
                   returns, ~ended, kl.sum(1), masked_mean(entropy, mask))


def update(policy, value_model, optimizer, r, s, generator, pretraining=None, average=None):
    """epochs × minibatches of clipped steps on one rollout; pretraining is for ptx_backward, average moves along with the policy.
    -> mean statistics; largest |log ratio| of the first minibatch and of all."""
    totals, steps, first, largest = {}, 0, 0.0, 0.0
    R = r.mask.shape[1]
    for _ in range(s.epochs):
        for minibatch in torch.randperm(len(r.tokens), generator=generator).chunk(s.minibatches):
            minibatch = minibatch.to(r.tokens.device)
            optimizer.zero_grad(set_to_none=True)

            def rows_of(part):
                rows = minibatch[part]
                batch = r.tokens[rows, :int(r.lengths[rows].max())], r.query_lengths[rows], r.lengths[rows], R
                return rows, batch, (r.mask[rows].sum() / r.mask[minibatch].sum()).item()  # losses are means over tokens

            def policy_part(part):
                rows, batch, share = rows_of(part)
                pg, stats = policy_loss(policy.logprobs(*batch, s.temperature), r.logprobs[rows], r.advantages[rows], r.mask[rows], s.clip)
                if steps == 0:
                    check_ratio(stats, policy.amp_dtype)
                return share * pg, (share, {"policy_loss": pg.item(), **stats})

            def value_part(part):
                rows, batch, share = rows_of(part)
                vf, stats = value_loss(value_model.values(*batch), r.values[rows], r.returns[rows], r.mask[rows], s.value_clip)
                return share * s.value_coef * vf, (share, {"value_loss": vf.item(), **stats})

            # first the policy, then the value model: the activations of one network at a time
            parts = backward_parts(policy, policy_part, len(minibatch), s.micro)
            largest = max(largest, *(stats["max_log_ratio"] for _, stats in parts))
            first = first if steps else largest
            for share, stats in parts + backward_parts(value_model, value_part, len(minibatch), s.micro):
                for key, value in stats.items():
                    totals[key] = totals.get(key, 0.0) + share * value
            if s.ptx_coef:
                loss = ptx_backward(policy, pretraining, len(minibatch), s, generator)
                totals["ptx_loss"] = totals.get("ptx_loss", 0.0) + loss
            for model in {policy, value_model}:  # one and the same where the value head is shared
                torch.nn.utils.clip_grad_norm_(model.parameters(), s.max_grad_norm or float("inf"))
            tf_adam_step(optimizer, s.adam_eps) if s.tf_adam else optimizer.step()
            if average is not None:
                move_average(average, policy, s.ema)
            steps += 1
    return {key: value / steps for key, value in totals.items()} | {"first_log_ratio": first, "max_log_ratio": largest}


def check_ratio(stats, dtype):
    """Before the first step the policy is the one that sampled: every ratio is 1 up to rounding. If it is not, sampling and
    training disagree (temperature, positions, dropout, masks) and nothing that follows could be trusted."""
    mean_bound, max_bound = (1e-4, 1e-4) if dtype == torch.float32 else (5e-3, 5e-2)
    if not (stats["mean_log_ratio"] <= mean_bound and stats["max_log_ratio"] <= max_bound):  # so that NaN stops it too
        raise DataError(f"PPO's first minibatch has log ratios up to {stats['max_log_ratio']:.2g} (mean "
                        f"{stats['mean_log_ratio']:.2g}), above rounding: the policy that trains is not the one that sampled")


def check_sampler(gap, dtype):
    """The sampler and the training forward are two programs for one policy; their log-probabilities differ by rounding only."""
    if not gap <= (1e-4 if dtype == torch.float32 else 3e-2):  # a wrong temperature or position gives 0.1 and more
        raise DataError(f"the sampler's log-probabilities are {gap:.2g} from the training forward's on average, above rounding: "
                        "the two disagree about the policy, or it has diverged (lower ppo.lr)")


def mean_utility(posts, texts):
    """The gold judge's mean utility of summaries, None where the posts are real and nobody knows."""
    if "facts" not in posts[0]:
        return None
    return sum(world.utility(post, text) for post, text in zip(posts, texts)) / len(posts)


class SampleLog:
    """samples.jsonl: the first episodes of each iteration with score, kl and what is left of the score after the KL penalty."""

    def __init__(self, folder, start, per_iteration=4):
        self.path, self.per_iteration = os.path.join(folder, "samples.jsonl"), per_iteration
        kept = []
        if start and os.path.exists(self.path):
            with open(self.path) as f:
                kept = [line for line in f if line.endswith("\n") and json.loads(line)["iteration"] < start]
        write_atomic(self.path, "".join(kept))

    def write(self, iteration, texts, scores, kls):
        with open(self.path, "a") as f:
            for (query, response), score, kl in list(zip(texts, scores, kls))[:self.per_iteration]:
                f.write(json.dumps({"iteration": iteration, "query": query, "response": response, "score": score, "kl": kl}) + "\n")


def prompt_plan(n, s, seed):
    """Which of n queries each iteration takes: as many passes over them as the iterations need."""
    return batches(n, s.batch, -(-s.iterations // max(1, n // s.batch)), seed)


def lr_share(iteration, s):
    """Share of the peak learning rate: up from a tenth over `warmup` iterations (InstructGPT C.4), and constant or on a line down to 0."""
    rise = 0.1 + 0.9 * iteration / s.warmup if iteration < s.warmup else 1.0
    return rise * (1 - iteration / s.iterations if s.schedule == "linear" else 1.0)


def make_controller(s):
    """What β does. Where the horizon is below a rollout, one iteration could move β by more than the 20 % of its clipped error."""
    if s.kl == "fixed":
        return FixedKL(s.beta)
    return AdaptiveKL(s.beta, s.kl_target, s.kl_horizon or max(s.batch, s.iterations * s.batch // 100))


def make_value_model(s, sft_folder, reward_folder, policy, device):
    """The reward model (Stiennon, InstructGPT), the SFT model with a new head, or a head of zeros on the policy (Ziegler)."""
    if s.value != "shared":
        return load_model(reward_folder if s.value == "separate" else sft_folder, device, "scalar")
    policy.score = torch.nn.Linear(policy.config.n_embd, 1, device=device)
    torch.nn.init.zeros_(policy.score.weight)
    torch.nn.init.zeros_(policy.score.bias)
    return policy


def pretraining_rows(run, s):
    """What PPO-ptx draws from: the rows that the language model was pretrained on, and their weighting. None where it is off."""
    if s.ptx_coef:
        return *stored_posts(run, "pretrain"), run.config["settings"]["pretrain"]["query_weight"]


def prompts(run):
    """The posts that PPO writes summaries of: a set of their own, or those of pretraining that belong to the task."""
    own = "prompts" in run.posts or os.path.exists(os.path.join(run.folder, "data", "prompts.jsonl"))
    return run.posts["prompts"] if own else [p for p in run.posts["pretrain"]
                                              if world.in_task(p, run.config["settings"]["data"].get("world", "reddit"))]


def train_ppo(folder_of_run, enc, posts, Q, R, s, folder, seed, device, save_every=5, pretraining=None, reward="reward", until=None):
    """The algorithm, on the models in a run's folder; the true utility of samples is logged where it is known, never used.

    until: stop before this iteration, all schedules being those of the whole run; a copy of `folder` goes on from there, with another
    reward model too (online collection in run.py)."""
    stop = stop_rule(enc, s.stop_token, s.truncate_after, R)
    until = until or s.iterations
    torch.manual_seed(seed)  # for the head of a value model from scratch
    sft_folder, reward_folder = (os.path.join(folder_of_run, name) for name in ("sft", reward))
    policy, ref_policy = (load_model(sft_folder, device) for _ in range(2))
    reward_model = load_model(reward_folder, device, "scalar")
    value_model = make_value_model(s, sft_folder, reward_folder, policy, device)
    average = copy.deepcopy(policy) if s.ema else None
    trained = [policy] if value_model is policy else [policy, value_model]
    for model in trained:
        model.recompute = s.recompute
    saved = trained + [average] if s.ema else trained
    plan = prompt_plan(len(posts), s, seed)
    controller = make_controller(s)
    optimizer, generator = make_optimizer(trained, s.lr, 0.0, s.adam_beta2, s.adam_eps), torch.Generator().manual_seed(seed)
    start, more = load_state(folder, saved, optimizer, generator)
    controller.beta = more.get("beta", controller.beta)
    log = MetricsLog(folder, start)
    samples = SampleLog(folder, start)
    bar = tqdm(range(start, until), initial=start, total=until, desc="ppo", unit="iteration")
    for iteration in bar:
        began = time.time()
        share = lr_share(iteration, s)
        set_lr(optimizer, s.lr * share, (s.value_lr or s.lr) * share)
        rows = plan[iteration]
        queries = [encode_query(enc, posts[i], Q) for i in rows]
        r = rollout(policy, ref_policy, reward_model, value_model, queries, R, s, controller.beta, generator, stop)
        k1, _, k3 = (k.mean().item() for k in kl_estimates(r.logprobs, r.ref_logprobs, r.mask))
        if iteration == 0 and r.kl.mean().item() > 1e-3:
            raise DataError(f"the policy starts {r.kl.mean().item():.2g} nats from its reference; both must be the SFT model")
        check_sampler(r.sampler_gap.item(), policy.amp_dtype)
        stats = update(policy, value_model, optimizer, r, s, generator, pretraining, average)
        texts = [decode_response(enc, r.tokens[i, q:n].tolist()) for i, (q, n) in enumerate(zip(r.query_lengths, r.lengths))]
        spread = masked_mean((r.returns - masked_mean(r.returns, r.mask)) ** 2, r.mask).item()
        log.write(iteration, score=r.score.mean().item(), kl=r.kl.mean().item(), kl_k1=k1, kl_k3=k3, beta=controller.beta,
                  entropy=r.entropy.item(), sampler_gap=r.sampler_gap.item(), length=r.mask.sum(1).float().mean().item(),
                  no_eos=r.no_eos.float().mean().item(),
                  explained_variance=1 - masked_mean((r.values - r.returns) ** 2, r.mask).item() / max(spread, 1e-8),
                  gold=mean_utility([posts[i] for i in rows], texts),
                  tokens_per_second=int(r.mask.sum()) / (time.time() - began), **stats)
        samples.write(iteration, list(zip(map(enc.decode, queries), texts)), r.score.tolist(), r.kl.tolist())
        controller.update(k1, len(rows))  # for the next rollout
        if s.snapshots and (iteration + 1) % s.snapshots == 0:
            policy.save_pretrained(os.path.join(folder, f"iteration-{iteration + 1}"))
        bar.set_postfix(score=f"{r.score.mean().item():.2f}", kl=f"{r.kl.mean().item():.1f}")
        if (iteration + 1) % save_every == 0 and iteration + 1 < until:
            save_state(folder, iteration + 1, saved, optimizer, generator, beta=controller.beta)
    save_state(folder, until, saved, optimizer, generator, beta=controller.beta)
    for part in (folder, os.path.join(folder, "value")):
        save_vocabulary(enc, part)
    value_model.save_pretrained(os.path.join(folder, "value"))
    final = average if s.ema else policy
    final.score = None  # a shared value head is saved with the value model, not with the policy
    final.save_pretrained(folder)


def main():
    run, settings, out, device = alone(__doc__, "ppo", PPOSettings,
                                       lambda run, s: stop_rule(run.enc, s.stop_token, s.truncate_after, run.R))
    train_ppo(run.folder, run.enc, prompts(run), run.Q, run.R, settings, out, run.seed, device,
              pretraining=pretraining_rows(run, settings))
    print(f"policy in {out}, curves in {os.path.join(out, 'metrics.jsonl')}")


if __name__ == "__main__":
    run_main(main)
