"""`pytest -m mutation`: each equation is broken in a copy of the repository (a sign, an index, a mask), and the tests that guard it
must fail. Without it a test that checks nothing would look like one that passes."""
import os
import re
import shutil
import subprocess
import sys

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

MUTATIONS = [  # file, what stands there once, what it becomes, the tests that must notice (of tests/test_FILE.py)
    # sft.py and what of model.py stands behind every loss
    ("sft", "/ weights.sum()", "/ len(weights)", "lm_loss_by_hand"),
    ("sft", "return (weights * x)", "return -(weights * x)", "lm_loss_by_hand"),
    ("sft", "torch.where(in_query, query_weight, 1.0)", "torch.where(in_query, 1.0, query_weight)", "row_loss_token_by_token"),
    ("sft", "0.5 * (1 + math.cos(", "0.5 * (1 - math.cos(", "cosine"),
    ("sft", '= eps / math.sqrt(1 - group', '= eps * math.sqrt(1 - group', "tf_adam_by_hand"),
    ("sft", "t = 1 + int(", "t = int(", "tf_adam_by_hand"),
    ("sft", "            block.dropout = 0.0", "            block.dropout = p", "dropout_is_off_behind_its_step"),
    ("sft", "min(losses, key=losses.get)", "max(losses, key=losses.get)", "which_epoch_is_kept"),
    ("model", "F.dropout(self.attn_proj(a), self.dropout, self.training)", "self.attn_proj(a)", "sft::dropout_is_on_what_each_half_adds"),
    ("model", "return x + F.dropout(self.mlp_proj(", "return F.dropout(x + self.mlp_proj(", "sft::dropout_is_on_what_each_half_adds"),
    ("model", "rows, columns - 1), tokens[rows, columns]", "rows, columns), tokens[rows, columns]", "sft::row_loss_token_by_token"),
    ("model", "x[rows, columns], a[rows, columns - first]", "x[rows, columns], a[rows, columns]", "the_last_block_may_answer_at_few_positions"),
    ("model", "triu(1 + S - T)", "triu(1)", "queries_at_the_end_of_a_row"),
    ("model", "k[:, :, :end], v[:, :, :end]", "k[:, :, :end - 1], v[:, :, :end - 1]", "attention_in_parts_is_the_specification"),
    ("model", "mul_(-g).scatter_add_(1, y[:, None], g)", "mul_(g).scatter_add_(1, y[:, None], g)", "log_pi_and_its_gradient_are_those_of_a_log_softmax"),
    ("model", "dz @ w.to(ctx.dtype)", "dz @ w.to(ctx.dtype) * ctx.temperature", "log_pi_and_its_gradient_are_those_of_a_log_softmax"),
    ("model", "return (g @ w).float(), (g.T @ h).float(), None", "return (g @ w).float(), (h.T @ g).T.float() * 2, None",
     "logits_keep_float32_beside_bf16_matrix_products"),
    ("model", "x[keep], row[keep], alive[keep], position[keep]", "x[keep], row[keep], alive[keep], position[:len(keep)]",
     "dropping_finished_rows_changes_nothing"),
    ("model", "own, P, m = own[:, :, keep], P_left", "own, P, m = own[:, :, :len(keep)], P_left",
     "dropping_finished_rows_changes_nothing"),
    ("model", "torch.minimum(drawn, last)", "drawn.clamp(max=c.vocab_size - 1)", "the_largest_uniform_draws_a_token_of_some_probability"),
    ("model", "[:P_left].sort().values", "[:P_left]", "dropping_finished_rows_changes_nothing"),
    ("model", "mask.index_fill_(3, Q16 + t, 0)", "mask[..., Q16:].zero_()", "dropping_finished_rows_changes_nothing"),
    ("model", "if ctx.kept is None else ctx.kept", "if ctx.kept is None else ctx.kept * 0", "log_pi_and_its_gradient_are_those_of_a_log_softmax"),
    ("reward", "-F.logsigmoid(chosen - rejected)", "-F.logsigmoid(rejected - chosen)", "pairwise_loss_by_hand_and_sign"),
    ("reward", "return F.cross_entropy(scores, best)", "return -F.cross_entropy(scores, best)", "best_of_loss_by_hand_and_gradient"),
    ("reward", "ranks[:, :, None] < ranks[:, None, :]", "ranks[:, :, None] > ranks[:, None, :]", "kwise_loss_by_hand"),
    ("reward", "ranks[:, :, None] < ranks[:, None, :]", "ranks[:, :, None] <= ranks[:, None, :]", "kwise_loss_is_the_mean_of_means_over_pairs"),
    ("reward", "torch.where(better, scores[:, :, None] - scores[:, None, :], 0)", "scores[:, :, None] - scores[:, None, :]",
     "kwise_loss_is_the_mean_of_means_over_pairs"),
    ("reward", "/ pairs.clamp(min=1)", "/ pairs.max()", "kwise_loss_is_the_mean_of_means_over_pairs"),
    ("reward", "(pairs > 0).sum()", "(pairs >= 0).sum()", "kwise_loss_is_the_mean_of_means_over_pairs"),
    ("reward", "(ranks == 0).long()", "(ranks == 1).long()", "group_loss_is_the_loss_of_the_labels"),
    ("reward", 'scores.masked_fill(ranks.isnan(), float("-inf"))', "scores", "group_loss_is_the_loss_of_the_labels"),
    ("reward", 'for _, worse in g["pairs"]', 'for worse, _ in g["pairs"]', "group_loss_is_the_loss_of_the_labels"),
    ("reward", '(a, b) if c["choice"] == 0 else', '(a, b) if c["choice"] == 1 else', "scores_belong_to_their_texts"),
    ("reward", "list(better)], scores[list(rows), list(worse)]", "list(worse)], scores[list(rows), list(better)]", "scores_belong_to_their_texts"),
    ("reward", "return torch.where(real, scores, 0)", "return scores", "score_responses_of_uneven_groups"),
    ("reward", "int(ranks[j] < ranks[i])", "int(ranks[j] > ranks[i])", "a_ranking_is_its_pairs"),
    ("reward", "if ranks[i] != ranks[j]", "if i != j", "a_ranking_is_its_pairs"),
    ("reward", "post, candidates[1:], labels", "post, candidates, labels", "a_ranking_is_its_pairs"),
    ("reward", "int(i != best)", "int(i == best)", "a_choice_of_the_best_is_its_pairs"),
    ("reward", '"pairs": [(0, 1)]', '"pairs": [(1, 0)]', "training_learns_what_was_chosen shuffled_comparisons_are_the_same_ones_in_as_many_steps"),
    ("reward", "model.score.bias -= scores.mean()", "model.score.bias += scores.mean()", "the_shift_makes_references_0_and_moves_nothing_else"),
    ("reward", "model.score.weight /= spread", "model.score.weight *= spread", "gain_bias_gives_mean_0_and_variance_1"),
    ("reward", "scores.std(unbiased=False)", "scores.std()", "gain_bias_gives_mean_0_and_variance_1"),
    ("reward", 'if start == 0 and s.normalise == "gain_bias"', "if start == -1", "gain_bias_is_applied_before_and_after_training"),
    ("world", "- self.noise * math.log(-math.log(", "+ self.noise * math.log(-math.log(", "rankings_are_plackett_luce"),
    ("world", "sum(other > u for other in seen)", "sum(other < u for other in seen)", "ranks_ties_and_dials"),
    ("world", "seen.index(max(seen))", "seen.index(min(seen))", "ranks_ties_and_dials"),
    ("world", '"grief": -1.', '"grief": 1.', "style_utility_by_hand each_style_is_its_own"),
    ("world", "- SALAD * t[\"unaccounted\"] - (not", "- (not", "style_utility_by_hand"),
    ("world", " - (not t[\"kinds\"])", "", "style_utility_by_hand"),
    ("world", "value not in people if slot", "value in people if slot", "style_utility_by_hand"),
    ("world", 'wrong += "who" in claims and', 'wrong += 0 and', "style_utility_by_hand"),
    ("world", "        told.add(said)\n", "", "style_utility_by_hand"),
    ("world", 'in read_story(post["post"])[0]}', 'in read_story("")[0]}', "style_utility_by_hand"),
    ("world", "TASK_WEIGHTS[self.task]", "TASK_WEIGHTS['tldr']", "labelers_of_a_style"),
    ("data", "(TASKS[task].stop == EOS if stop is None else", "(True if stop is None else", "the_query_of_each_task"),
    ("reward", "ids[-1] == stop[0] and len(ids) > stop[1]", "ids[-1] == stop[0]", "samples_without_an_end_are_not_shown"),
    ("evaluation", "0 if greedy else temperature", "0", "stories_are_judged_by_samples"),
    ("evaluation", "zip(rows, sft)])", "zip(rows, ref)])", "win_rate_over_sft_by_hand"),
    ("ppo", 's.max_grad_norm or float("inf")', "s.max_grad_norm", "gradients_are_not_clipped_at_0"),
    ("run", "zip(stories, tokens, lengths, ended) if ok]", "zip(stories, tokens, lengths, ended)]", "pipeline::stories_go_through_every_stage"),
    ("run", "max(scores, key=scores.get)", "min(scores, key=scores.get)", "pipeline::the_reward_model_chooses_the_checkpoint"),
    # ppo.py: the equations
    ("ppo", ".sum() / mask.sum()", ".sum() / mask.numel()", "losses_are_means_over_tokens"),
    ("ppo", "torch.where(mask, -beta * (logprobs", "torch.where(mask, beta * (logprobs", "shaped_rewards_sum_to_the_score_less_the_kl"),
    ("ppo", "torch.where(mask, -beta * (logprobs - ref_logprobs), 0)", "-beta * (logprobs - ref_logprobs)", "what_is_masked_changes_nothing"),
    ("ppo", "last = mask.sum(1) - 1", "last = 0 * mask.sum(1) - 1", "shaped_rewards_sum_to_the_score_less_the_kl"),
    ("ppo", "rewards[:, t] + gamma * next_value", "rewards[:, t] - gamma * next_value", "gae_by_hand"),
    ("ppo", "next_value = values[:, t + 1]", "next_value = values[:, t]", "gae_by_hand"),
    ("ppo", "delta + gamma * lam * after", "delta + lam * after", "gae_is_the_weighted_sum_of_n_step_advantages"),
    ("ppo", "torch.where(mask, rewards, 0), torch.where(mask, values, 0)", "torch.where(mask, rewards, 0), values",
     "gae_is_the_weighted_sum_of_n_step_advantages"),
    ("ppo", "torch.where(mask, advantages + values, 0)", "torch.where(mask, advantages - values, 0)", "gae_by_hand"),
    ("ppo", "var = masked_mean((x - mean) ** 2, mask)", "var = ((x - mean) ** 2).mean()", "whitened_has_mean_0_and_biased_variance_1"),
    ("ppo", "white if shift_mean else white + mean", "white + mean if shift_mean else white", "whiten_by_hand"),
    ("ppo", "torch.maximum(plain, clipped)", "torch.minimum(plain, clipped)", "policy_loss_by_hand"),
    ("ppo", "torch.where(mask, logprobs - old_logprobs, 0)", "torch.where(mask, old_logprobs - logprobs, 0)", "policy_loss_by_hand"),
    ("ppo", "plain, clipped = -advantages * ratio,", "plain, clipped = advantages * ratio,", "policy_loss_by_hand"),
    ("ppo", "return 0.5 * masked_mean(torch.maximum(plain_error", "return masked_mean(torch.maximum(plain_error", "value_loss_by_hand"),
    ("ppo", "clipped = old_values + (values", "clipped = returns + (values", "value_loss_by_hand"),
    ("ppo", "torch.expm1(-delta) + delta", "torch.expm1(delta) - delta", "kl_estimates_are_unbiased"),
    ("ppo", "delta = torch.where(mask.bool(), logprobs - ref_logprobs, 0)", "delta = logprobs - ref_logprobs", "what_is_masked_changes_nothing"),
    ("ppo", "kl / self.target - 1", "1 - kl / self.target", "adaptive_kl_by_hand"),
    ("ppo", "min(0.2, max(-0.2, kl / self.target - 1))", "kl / self.target - 1", "adaptive_kl_by_hand"),
    ("ppo", "error * n_episodes / self.horizon", "error * self.horizon / n_episodes", "adaptive_kl_by_hand"),
    ("sft", "(index >= after)", "(index > after)", "ppo::truncation_row_by_row"),
    ("sft", " & (index < R)", "", "ppo::truncation_row_by_row"),
    ("sft", "stops.long().argmax(1) + 1", "stops.long().argmax(1)", "ppo::truncation_by_hand"),
    ("sft", "query_lengths.repeat_interleave(n)", "query_lengths.repeat(n)", "reward::samples_end_by_the_truncation_rule"),
    ("sft", "return ids[0], after", "return ids[0], 0", "pipeline::choices_as_in_ziegler_go_through_every_stage"),
    ("data", "(TASKS[task].stop == EOS if stop is None else stop[0] == eos)", "True", "response_starts_with_a_blank_and_keeps_eos reward::normalising_rows_are_references_or_samples"),
    ("evaluation", " and len(response) > after", "", "what_has_ended_is_what_the_rule_says"),
    ("run", 'of_round(run, "comparisons.jsonl"), run.Q, run.R, run.stop)', 'of_round(run, "comparisons.jsonl"), run.Q, run.R)',
     "pipeline::choices_as_in_ziegler_go_through_every_stage"),
    ("ppo", "lerp_(p, 1 - decay)", "lerp_(p, decay)", "average_is_the_weighted_sum_of_all_weights"),
    ("ppo", "return -beta * (logprobs - ref_logprobs - kl)", "return beta * (logprobs - ref_logprobs - kl)",
     "the_whole_chain_is_the_gradient_of_score_less_kl"),
    ("ppo", "s.ptx_coef / s.ptx_ratio)", "-s.ptx_coef / s.ptx_ratio)", "ptx_adds_its_coefficient_times_the_gradient_of_the_pretraining_loss"),
    ("ppo", "s.ptx_coef / s.ptx_ratio)", "s.ptx_coef)", "ptx_adds_its_coefficient_times_the_gradient_of_the_pretraining_loss"),
    # schedules, rounds, micro-batches
    ("ppo", "0.1 + 0.9 * iteration / s.warmup", "0.9 * iteration / s.warmup", "schedules_by_hand"),
    ("ppo", "(1 - iteration / s.iterations if", "(1 - (iteration + 1) / s.iterations if", "schedules_by_hand"),
    ("ppo", "s.kl_horizon or max(s.batch, ", "s.kl_horizon or min(s.batch, ", "the_horizon_is_one_percent_of_the_episodes"),
    ("ppo", "tqdm(range(start, until)", "tqdm(range(start, s.iterations)", "ppo_that_pauses_goes_on_as_if_it_had_not"),
    ("sft", "rates[i // 2 if len", "rates[i % 2 if len", "ppo::each_network_has_its_learning_rate"),
    ("sft", "* s.mix / (1 - s.mix))", "* s.mix)", "pretraining_rows_are_the_share_of_all_that_it_says"),
    ("reward", '[len(g["pairs"]) if loss == "pairwise" else 1 for', '[len(g["pairs"]) for', "micro_batches_and_recomputing_change_no_gradient"),
    ("reward", '[len(g["pairs"]) if loss == "pairwise" else 1 for', '[1 for', "micro_batches_and_recomputing_change_no_gradient"),
    ("reward", "candidates[:1] + rng.sample(candidates[1:]", "rng.sample(candidates", "a_labeler_is_shown_between_k_min_and_k"),
    ("run", "(1 - (1 - (k - 1) / (s.rounds - 1)) ** 2)", "((k - 1) / (s.rounds - 1)) ** 2", "pipeline::label_schedules_by_hand"),
    ("run", 'load_comparisons(of_round(run, "comparisons.jsonl", run.round - 1))[0]', "[]", "pipeline::labels_of_later_rounds_are_on_the_latest_policy"),
    ("run", 'load_model(of_round(run, "ppo", run.round - 1), run.device)', "sft", "pipeline::labels_of_later_rounds_are_on_the_latest_policy"),
    ("run", "round(s.ppo.iterations * run.round / s.collect.rounds)", "s.ppo.iterations", "pipeline::a_later_round_begins_with_sft_or_goes_on"),
    # ppo.py: what the equations are given
    ("ppo", "model.unembed(x[rows]) / temperature, -1)", "model.unembed(x[rows]), -1)", "rollout_against_a_calculation_row_by_row"),
    ("ppo", "(p * (logp - ref_logp)).sum(-1)", "(ref_logp.exp() * (ref_logp - logp)).sum(-1)", "kl_estimates_are_unbiased"),
    ("sft", "None if after else stop", "stop", "ppo::rollout_ends_by_the_truncation_rule"),
    ("ppo", "torch.where(ended, reward_model", "torch.where(~ended, reward_model", "rollout_against_a_calculation_row_by_row"),
    ("ppo", "mask, shift_mean=False)", "mask)", "rollout_with_whitened_rewards"),
    ("ppo", "advantages = advantages + own_kl", "advantages = advantages - own_kl", "rollout_with_the_exact_kl"),
    ("ppo", "score, whiten(advantages, mask)", "score, advantages", "rollout_against_a_calculation_row_by_row"),
    ("ppo", "(share * s.value_coef * vf)", "(-share * s.value_coef * vf)", "update_brings_values_closer_to_returns"),
    ("ppo", "(share * pg)", "(-share * pg)", "update_raises_what_had_an_advantage"),
    ("ppo", "(share * pg)", "pg", "micro_batches_and_recomputing_change_no_gradient"),
    ("ppo", "(share * s.value_coef * vf)", "(s.value_coef * vf)", "micro_batches_and_recomputing_change_no_gradient"),
    ("sft", "(sum(tokens[part]) / sum(tokens))", "(len(queries[part]) / len(queries))", "micro_batches_and_recomputing_change_no_gradient"),
    ("model", "checkpoint(block, *args, use_reentrant=False)", "checkpoint(block, *args, use_reentrant=False).detach()",
     "sft::micro_batches_and_recomputing_change_no_gradient"),
    ("ppo", "zeros_(policy.score.weight)", "normal_(policy.score.weight)", "a_shared_value_head_trains_the_trunk"),
    ("ppo", "[policy] if value_model is policy else [policy, value_model]", "[policy]", "value_model_is_trained"),
    ("ppo", "controller.update(k1, len(rows))", "controller.update(k1, 1)", "adaptive_kl_steers_the_next_rollout"),
    ("ppo", "final = average if s.ema else policy", "final = policy", "what_is_saved_as_the_policy"),
    # the ablations' table
    ("sft", "query_weight * (len(q) - 1) for q, r in zip(*part)", "query_weight * len(q) for q, r in zip(*part)",
     "evaluate_lm_is_a_mean_over_all_response_tokens"),
    ("run", "sampling[0] == sampling[1] and ", "", "pipeline::which_stages_a_base_shares"),
    ("run", '"reward" in same_stages(base, old, config)', "True", "pipeline::which_stages_a_base_shares"),
    ("ablations", "np.logaddexp(0, -margin)", "np.logaddexp(0, margin)", "reward_fit_by_hand"),
    ("ablations", "rows[-max(1, len(rows) // 5):]", "rows[:max(1, len(rows) // 5)]", "steered_kl_by_hand"),
    ("ablations", 'kl / s["kl_target"]', 's["kl_target"] / kl', "steered_kl_by_hand"),
    ("ablations", 'np.subtract(arm[s]["wins"], default[s]["wins"])', 'np.subtract(default[s]["wins"], arm[s]["wins"])', "arm_row_by_hand"),
    ("ablations", 'bootstrap_ci(np.concatenate(paired))', 'bootstrap_ci(np.concatenate([100 * np.array(arm[s]["wins"]) for s in seeds]))',
     "arm_row_by_hand a_pair_is_worth_more_than_two_samples"),
    ("ablations", "ddof=1", "ddof=0", "arm_row_by_hand"),
    # summarize.py, and what evaluation.py says of other people's files
    ("summarize", "tokens(window[:end]) > room", "tokens(window[:end]) > room + 1", "cutting_by_hand"),
    ("summarize", "2 * tokens(window[:ends[k - 1]]) >= room or at", "True or at", "cutting_by_hand"),
    ("summarize", "ends[k - 1]]) >= room or at + ends[k - 1] == len(text) or not mark", "ends[k - 1]]) >= room", "parts_fit_and_lose_nothing"),
    ("summarize", "for i in group]} for group in groups]", "for i in groups[0]]} for group in groups]", "the_tree_by_hand"),
    ("summarize", ">= len(level) or any", "> len(level) or any", "it_ends_whatever_the_summaries_are"),
    ("summarize", "or any(tokens(paragraphs(texts, g)) > room for g in groups)", "", "it_ends_whatever_the_summaries_are"),
    ("summarize", "args.n).argmax(1)", "args.n).argmin(1)", "best_of_n_is_the_reward_models"),
    ("summarize", "many[i * args.n + b]", "many[i * args.n]", "best_of_n_is_the_reward_models"),
    ("summarize", "if room < run.R and", "if room < 0 and", "what_cannot_be_is_one_sentence"),
    ("evaluation", "s[kind].fmeasure", "s[kind].recall", "rouge_by_hand_and_by_brute_force"),
    ("evaluation", "use_stemmer=stem", "use_stemmer=False", "rouge_by_hand_and_by_brute_force"),
    ("data", "if len(enc.encode_ordinary(\"\\n\\n=====\\n\\n\".join(more))) <= most", "if True", "evaluation::in_context_query_by_hand"),
    ("data", '.removesuffix("-transfer")', "", "evaluation::in_context_query_by_hand"),
    ("evaluation", "if token in ends), len(ids))", "if token == ends[0]), len(ids))", "in_context_responses_end_at_a_newline"),
    ("evaluation", "length < len(ids)))", "length <= len(ids)))", "in_context_responses_end_at_a_newline"),
    ("evaluation", "        if n == 0:\n", "        if n < 0:\n", "in_context_responses_end_at_a_newline"),
    ("evaluation", "if 24 <= length <= 47", "if 23 <= length <= 48", "examples_have_24_to_47_tokens"),
    ("evaluation", 'encode_response(enc, text, most, p.get("task", "tldr"), stop)', "encode_response(enc, text, most, stop=stop)",
     "every_policy_answers_in_the_format_of_the_task"),
    ("evaluation", '["lead3"]["text"] = lead3', '["lead3"]["_"] = lead3', "every_policy_answers_in_the_format_of_the_task"),
    ("reward", 'R, info.get("task", "tldr"), stop)', "R, stop=stop)", "a_comparison_of_articles_has_their_format"),
    ("evaluation", '"ci": bootstrap_ci(*zip(*of))', '"ci": bootstrap_ci([x for x, _ in of])', "axis_means_by_hand"),
    ("evaluation", "names[len(comparisons):]", "names[len(comparisons) + 1:]", "comparisons_of_posts_that_were_trained_on_are_left_out"),
    ("evaluation", ' == "train"] + posts)', ' == "train"])', "comparisons_of_posts_that_were_trained_on_are_left_out"),
    ("evaluation", 'in seen if c.get("split") == "train"]', 'in seen]', "comparisons_of_posts_that_were_trained_on_are_left_out"),
    ("evaluation", 'if r["confidence"] == b["confidence"]]', "]", "agreement_with_a_file_is_counted_one_by_one"),
    ("ppo", "(iteration + 1) % s.snapshots == 0", "iteration % s.snapshots == 0", "snapshots_are_the_policy_along_the_way"),
    # figures.py
    ("figures", "np.stack([d, -d * (", "np.stack([d, d * (", "gao_forms_recover_what_was_planted"),
    ("figures", 'np.log(d) if form == "ppo" else d)]', 'd if form == "ppo" else np.log(d))]', "gao_forms_recover_what_was_planted"),
    ("figures", "d = np.sqrt(np.asarray(kl, float))", "d = np.asarray(kl, float)", "gao_forms_recover_what_was_planted"),
    ("figures", "np.sqrt(np.mean((X @ theta - gain) ** 2))", "np.sqrt(np.sum((X @ theta - gain) ** 2))", "gao_forms_recover_what_was_planted"),
    ("figures", 'probes.preference(labeler, p, t, p["summary"])', 'probes.preference(labeler, p, p["summary"], t)', "what_a_curve_is_made_of"),
    ("figures", "np.asarray(reference_scores) - np.asarray(scores)", "np.asarray(scores) - np.asarray(reference_scores)", "what_a_curve_is_made_of"),
    ("figures", 'math.log2(r["comparisons"]), math.log2(r["parameters"])]', 'math.log2(r["parameters"]), math.log2(r["comparisons"])]',
     "points_per_doubling_recover_what_was_planted"),
    ("figures", "/ math.sqrt(len(values))) if len(values)", ") if len(values)", "points_per_doubling_recover_what_was_planted"),
    ("figures", 'max(ppo, key=lambda r: r["gold"])', 'min(ppo, key=lambda r: r["gold"])', "where_the_curve_turns"),
    ("world", "unaccounted = read(summary, world_of(post))", "unaccounted = read(summary)", "news_are_another_world"),
    ("run", 'run.posts["collect"][:s.posts]', 'run.posts["collect"]', "pipeline::a_run_may_end_early_and_compare_fewer_posts_than_its_base"),
    # probes.py
    ("probes", "labeler.worth(post, a, w) - labeler.worth(post, b, w)", "labeler.worth(post, b, w) - labeler.worth(post, a, w)",
     "preference_is_what_labelers_do"),
    ("probes", "labeler.worth(post, b, w)) / labeler.noise", "labeler.worth(post, b, w)) * labeler.noise", "preference_is_what_labelers_do"),
    ("probes", "for u, v, post in zip(x, y, posts) if u and v]", "for u, v, post in zip(x, y, posts)]", "agreement_of_planted_judges"),
    ("probes", "signs.get(a + \"'\", signs[a]) if a == b", "signs[a] if a == b", "agreement_of_planted_judges"),
    ("probes", "(sums / (lengths - query_lengths))", "sums", "metrics_judge_the_right_text"),
    ("probes", "float(x == l) if x else .5", "float(x != l) if x else .5", "length_units_find_a_planted_bias"),
    ("probes", '(["all"] if g else', '(["all"] if not g else', "length_units_find_a_planted_bias"),
    ("probes", "out[min(BINS - 1, i * BINS // SUMMARY_WORDS), min(BINS - 1, j", "out[min(BINS - 1, j * BINS // SUMMARY_WORDS), min(BINS - 1, i",
     "bigram_matches_by_hand"),
    ("probes", '.append(c["choice"] == k)', '.append(c["choice"] != k)', "what_the_labels_prefer"),
    ("probes", "if share > .5]", "if share >= .5]", "what_the_labels_prefer"),
    ("probes", ".5 + sign * (first - .5)", ".5 - sign * (first - .5)", "accuracy_by_judge_is_what_their_labels_say"),
    ("probes", 'if c["split"] == "valid"]', "]", "accuracy_by_judge_is_what_their_labels_say"),
    ("probes", "[(b, a)] * int(2 - 2 * won)", "[(a, b)] * int(2 - 2 * won)", "ladder_recovers_planted_strengths identical_policies_share_a_rung"),
    ("probes", "[value == p[\"facts\"][slot] for slot, value in c]", "[value != p[\"facts\"][slot] for slot, value in c]",
     "copying_table_on_planted_writers"),
    # real data: what is held out, labels, weights and vocabulary, measures
    ("real", "left = [post for post in posts if not names & names_of(post)]", "left = posts", "no_post_that_is_tested_on_is_trained_on"),
    ("real", "post.pop(\"facts\", None)  # the", "pass  # the", "no_post_that_is_tested_on_is_trained_on"),
    ("real", "else held:], tests, ", "else held:], tests[:s.test], ", "no_post_that_is_tested_on_is_trained_on"),
    ("data", "else {text, (\"id\", id)}", "else {(\"id\", id)}", "real::no_post_that_is_tested_on_is_trained_on"),
    ("data", "if not id or id.isdecimal() or", "if not id or", "real::no_post_that_is_tested_on_is_trained_on"),
    ("data", "return id if id and not id.isdecimal() else", "return id if id else", "real::no_post_that_is_tested_on_is_trained_on"),
    ("real", "for c in comparisons] + tested)", "for c in comparisons] + tested[:0])", "comparisons_are_split_by_post_and_tested_posts_are_held_out"),
    ("data", "            parent[name] = least\n", "            pass\n", "real::comparisons_are_split_by_post_and_tested_posts_are_held_out"),
    ("data", "    return [root(name) for name in firsts]", "    return firsts", "real::comparisons_are_split_by_post_and_tested_posts_are_held_out"),
    ("real", "((best, other), (other, best))[choice]", "((best, other), (other, best))[1 - choice]", "four_way_labels_become_one_choice_of_the_best"),
    ("real", "if Q + R > c.n_positions", "if Q > c.n_positions", "weights_and_vocabulary_must_agree"),
    ("real", " or c.eos != enc.n_vocab - 1", "", "weights_and_vocabulary_must_agree"),
    ("corpus", "(first == last) & (first % 20 == 1)", "first % 20 == 1", "rows_of_every_length_agree_on_what_is_held_out"),
    ("corpus", "else 1.05 * len(", "else len(", "filter_drops_by_each_rule_once"),
    ("corpus", 'or row.get("selftext")}', '}', "real::the_filter_drops_what_the_paper_drops"),
    ("corpus", " if k % 20 != 1)", ")", "a_vocabulary_does_not_read_what_is_held_out"),
    ("corpus", "+ [0], np.uint16)", "+ [13], np.uint16)", "a_vocabulary_does_not_read_what_is_held_out"),
    ("corpus", "rows.starts[i:i + n] - first,", "rows.starts[i:i + n] - rows.starts[0],", "rows_of_every_length_agree_on_what_is_held_out"),
    ("corpus", "(first + 18) // 20", "(first + 19) // 20", "rows_of_every_length_agree_on_what_is_held_out real::stored_rows_of_a_run"),
    ("run", '["seed", "collect", *later] if', '["collect", *later] if', "pipeline::which_stages_a_base_shares"),
    ("run", '["seed", "collect", *later] if', '["seed", "collect", "ppo"] if', "pipeline::which_stages_a_base_shares"),
    ("run", '["ppo.temperature"] if s["sft"]["epochs"] == 0 else []', "[]", "pipeline::which_stages_a_base_shares"),
    ("run", '["ppo.temperature"] if s["reward"]["normalise"] == "gain_bias" else []', "[]", "pipeline::which_stages_a_base_shares"),
    ("run", '"ppo.stop_token", "ppo.truncate_after", *', "*", "pipeline::which_stages_a_base_shares"),
    ("corpus", "all_ids[len(ids):len(ids)", "all_ids[len(ids) + 1:len(ids)", "real::excerpts_have_what_follows_as_reference"),
    ("corpus", "after.index(stop, TASKS[task].earliest) + 1", "after.index(stop, TASKS[task].earliest)", "real::excerpts_have_what_follows_as_reference"),
    ("sft", "(row[:1], row[1:])", "(row[:2], row[2:])", "real::stored_rows_of_a_run"),
    ("evaluation", "nats = tokens * ", "nats = len(rows) * ", "real::bits_per_byte_token_by_token"),
    ("evaluation", "nats / math.log(2) / len(raw)", "nats / len(raw)", "real::bits_per_byte_token_by_token"),
    ("estimate", "block += rows * c.n_head * T * T * half", "block += 0", "real::what_is_kept_is_what_autograd_keeps"),
    ("estimate", "memory > free:", "memory < free:", "real::what_cannot_fit_is_refused_with_advice"),
    # intervals: for other posts and seeds, and not too narrow for few choices
    ("evaluation", "t**2 * np.var(", "np.var(", "intervals_over_posts_and_seeds_hold_what_they_say"),
    ("evaluation", "for names in (posts, seeds)]", "for names in (posts, posts)]", "intervals_over_posts_and_seeds_hold_what_they_say"),
    ("evaluation", "STUDENT[min(S, 10) - 2]", "STUDENT[min(S, 9) - 1]", "intervals_over_posts_and_seeds_hold_what_they_say"),
    ("evaluation", "n * min(p, 1 - p) < 10", "n * min(p, 1 - p) < 0", "few_choices_do_not_make_a_narrow_interval"),
    ("evaluation", "np.isin(values, (0, .5, 1)).all() and ", "", "few_choices_do_not_make_a_narrow_interval"),
    ("evaluation", "(p + z * z / (2 * n))", "p", "few_choices_do_not_make_a_narrow_interval"),
    ("evaluation", "length_controlled_win_rate(y[rows], x[rows]) for", "y[rows].mean() for", "the_rate_at_equal_length_has_an_interval_that_covers"),
    ("evaluation", "out += kl.sum(1).tolist()", "out += kl.mean(1).tolist()",
     "sampled_kl_is_0_for_the_policy_itself_and_exact_in_each_state_of_another"),
    ("evaluation", "compare_policies(policy, ref_policy, tokens, query_lengths", "compare_policies(ref_policy, policy, tokens, query_lengths",
     "sampled_kl_is_0_for_the_policy_itself_and_exact_in_each_state_of_another"),
    ("figures", "posts.ravel(), seeds.ravel())", "seeds.ravel(), posts.ravel())", "columns_of_a_table_are_over_posts_and_seeds"),
    ("probes", "crossed_ci(values, posts, seeds)", "crossed_ci(values, range(len(posts)), seeds)", "rate_is_over_posts_and_seeds"),
    # people's splits; what is refused before any work
    ("real", "if not train or not held_out or train & held_out or", "if not train or not held_out or", "a_files_own_split_counts"),
    ("real", " or len(train) + len(held_out) < len(posts):", ":", "a_files_own_split_counts"),
    ("real", 'name in held_out or name in tested else', "name in held_out else", "a_files_own_split_counts"),
    ("run", "splits[name] = real.without(splits[name], ", "real.without(splits[name], ", "real::posts_of_held_out_comparisons_are_not_trained_on"),
    ("real", 'last_words(enc, row["info"]["post"], run.settings.model.max_query)', 'row["info"]["post"]', "a_labelled_excerpt_keeps_its_end"),
    ("run", "Q = max(needed, *(", "Q = max(0, *(", "real::a_labelled_excerpt_keeps_its_end"),
    ("real", "    left = [post for post in posts if fits(post)]", "    left = posts", "posts_with_titles_too_long_are_left_out"),
    ("ppo", 'largest = max(largest, stats["max_log_ratio"])', 'largest += stats["max_log_ratio"]', "the_largest_log_ratio_is_that_of_all_parts"),
    # the mock labeler
    ("sentiment", "-(labels * F.logsigmoid(scores)", "(labels * F.logsigmoid(scores)", "log_odds_loss_by_hand"),
    ("sentiment", "(1 - labels) * F.logsigmoid(-scores)", "(1 - labels) * F.logsigmoid(scores)", "log_odds_loss_by_hand"),
    ("sentiment", "F.logsigmoid(-scores)).mean()", "F.logsigmoid(-scores)).sum()", "log_odds_loss_by_hand"),
    ("sentiment", "[-(most - 1):]", "[:most - 1]", "rows_are_the_ends_of_texts_as_sst2_writes_them"),
    ("sentiment", "rows[len(rows) // 10:]", "rows", "sentences_are_tested_on_or_trained_on"),
    ("sentiment", 'post["post"] + " " + text', "text", "the_labeler_takes_the_best_of_excerpt_and_continuation"),
    ("sentiment", "int(second > first)", "int(second < first)", "the_labeler_takes_the_best_of_excerpt_and_continuation"),
    ("sentiment", "sum(other > score", "sum(other < score", "the_labeler_takes_the_best_of_excerpt_and_continuation"),
    ("sentiment", "scores.index(max(scores))", "scores.index(min(scores))", "the_labeler_takes_the_best_of_excerpt_and_continuation"),
    ("evaluation", 'labeler.scores(row["post"]', 'labeler.scores(rows[0]["post"]', "sentiment::what_the_mock_says_of_policies"),
    ("evaluation", "(1 / (1 + np.exp(-scores)))", "(1 / (1 + np.exp(scores)))", "sentiment::what_the_mock_says_of_policies"),
    ("run", "[:, 0].numpy() > 0) == labels", "[:, 0].numpy() < 0) == labels", "sentiment::a_whole_run_is_labelled_by_the_classifier"),
    ("run", ', *(["reward"] if real.has_mock(config) else [])', "", "sentiment::labels_depend_on_what_the_classifier_was_trained_with"),
    ("real", '(("held_out",), tested, c.held_out_posts)', '(("held_out",), trained, c.held_out_posts)', "sentiment::a_whole_run_is_labelled_by_the_classifier"),
    ("estimate", '3 * sizes["mock"] * s.reward.epochs + rows * T', "rows * T", "sentiment::operations_of_the_labeler_are_those_done"),
]


def guards(file, names):
    """Test ids such as tests/test_ppo.py::test_gae_by_hand."""
    ids = (name.split("::") if "::" in name else (file, name) for name in names.split())
    return [f"tests/test_{where}.py::test_{name}" for where, name in ids]


def run_tests(folder, ids):
    command = [sys.executable, "-B", "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *ids]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.fixture
def copy(tmp_path):
    skip = shutil.ignore_patterns(".*", "out", "__pycache__", "v", "*.md")
    return shutil.copytree(ROOT, tmp_path / "copy", ignore=skip)


def test_the_table_fits_the_code():
    """Quick, and always run: what is to be broken stands there exactly once, and the tests named exist."""
    for file, line, mutated, names in MUTATIONS:
        with open(os.path.join(ROOT, file + ".py")) as f:
            assert f.read().count(line) == 1 and mutated != line, (file, line)
        for module, name in (guard.split("::") for guard in guards(file, names)):
            with open(os.path.join(ROOT, module)) as f:
                assert re.search(rf"^def {name}\(", f.read(), re.M), (module, name)


@pytest.mark.mutation
def test_unbroken_code_passes(copy):
    """Otherwise the failures below would say nothing."""
    done = run_tests(copy, sorted({guard for file, _, _, names in MUTATIONS for guard in guards(file, names)}))
    assert done.returncode == 0, done.stdout


@pytest.mark.mutation
@pytest.mark.parametrize("file, line, mutated, names", MUTATIONS, ids=[f"{file}: {mutated}" for file, _, mutated, _ in MUTATIONS])
def test_broken_code_fails(copy, file, line, mutated, names):
    path = copy / f"{file}.py"
    path.write_text(path.read_text().replace(line, mutated))
    done = run_tests(copy, guards(file, names))
    assert done.returncode == 1, f"nobody noticed:\n{done.stdout}{done.stderr}"  # 1: tests ran and one failed
