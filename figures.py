"""
The papers' figures on the embedded world, with error bars, from one command:

    python run.py figures                       # all of them -> out/figures/report.html; it says how long it will take
    python run.py figures overoptimization      # one
    python run.py figures --quick               # small data, one seed: the machinery, not the findings

A figure is measured (NAME.json, and NAME-TABLE.csv of each table), then drawn from what was measured alone (NAME.png). What is
measured already is not measured again. One pretrained and one SFT model per model size serve all; seeds vary what comes after:
comparisons, reward model, PPO. Every model lies in a run's folder under runs/, as `python run.py` leaves it. On a CPU two figures are
measured at a time, in processes of their own with half the threads: small models leave much of a second core idle.

References: Stiennon 2020 §4 and appendix G; Gao, Schulman & Hilton 2022 (functional forms of over-optimisation).
"""
import base64
import contextlib
import dataclasses
import html
import json
import math
import multiprocessing
import os
import sys
import time
from collections import namedtuple
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch
from safetensors import safe_open

import probes
import real
import world
from data import DataError, decode_response, encode_query, encode_response, one_at_a_time, save_json_lines, write_atomic
from estimate import show_time
from evaluation import (BLUE, GREEN, GREY, LABELS, ORANGE, PPO_CURVES, PURPLE, RED, bar, best_of_n_estimate, best_of_n_kl, crossed_ci,
                        draw_curves, greedy_texts, lead3, length_controlled_win_rate, markdown_table, new_figure, once, read_samples, reward_margins,
                        rouge, sampled_kl, save_csv, save_figure, trained_by, wins)
from reward import normalising_rows, sample_responses, score_all, split_comparisons, train_reward
from run import preset, run_pipeline, same_stages
from sft import Parser, load_model, open_run, pick_device, read_metrics, seed_list

# name; title with the paper's own number; measure(lab) -> {"tables": {table: [flat dict]}, "facts": {name: number}};
# draw(measured, path) from that alone; caption(measured) -> text; minutes of a run of all, two at a time on two cores
Figure = namedtuple("Figure", "name title measure draw caption minutes")

SIZES = {"small": 0.5, "medium": 0.75, "default": 1.0}  # share of the preset's width and depth; nothing is larger, for time
QUICK = {"data.pretrain": 4000, "collect.posts": 300, "collect.held_out_posts": 100, "data.test": 100, "ppo.iterations": 8,
         "evaluation.best_of": 1}
FULL = {"collect.held_out_posts": 250, "data.test": 300, "evaluation.best_of": 1}  # best of n has a figure of its own


# ---------------------------------------------------------------------------------------------------------------------
# the laboratory: runs that the figures share

def make_lab(out, seeds=(1, 2, 3), quick=False, preset_name="tiny", device="auto", given=None, jobs=1):
    """What a measure() is given. Its three functions return the folder of a run, made when first asked for.

        lab.base(size, **changes)               data, pretrained and SFT model
        lab.labelled(seed, size, **changes)     and comparisons and reward model
        lab.finished(seed, size, **changes)     and PPO and evaluation/samples.jsonl (until="ppo": without)

    size: one of SIZES; changes: settings such as **{"ppo.beta": 0.1}. given: a run that the default size's base takes stages from.
    jobs: figures measured at a time."""
    options = {"out": out, "seeds": list(seeds), "quick": quick, "preset_name": preset_name, "device": device, "given": given}
    changes = {} if preset_name == "test" else QUICK if quick else FULL
    lab = SimpleNamespace(**options, changes=changes, made=set(), jobs=jobs, options=options)
    lab.base, lab.labelled, lab.finished = (partial(f, lab) for f in (base, labelled, finished))
    return lab


def lab_settings(lab, size, changes):
    """The lab's preset at this size with these changes, validated."""
    m, scale = preset(lab.preset_name).model, SIZES[size]
    shape = {"model.n_layer": max(1, round(scale * m.n_layer)), "model.n_embd": round(scale * m.n_embd)}
    return preset(lab.preset_name, shape | lab.changes | changes)


def make(lab, name, until, seed, size, changes, base=None):
    """The run's folder, its stages up to `until` done."""
    name = "-".join([name] + [f"{key}={value}" for key, value in sorted(changes.items())])
    folder = os.path.join(lab.out, "runs", name)
    if (folder, until) in lab.made:
        return folder
    began = time.time()
    with one_at_a_time(folder):
        run_pipeline(lab_settings(lab, size, changes), seed, folder, lab.preset_name, base, device=lab.device, until=until)
    if time.time() - began > 2:
        say(f"    {name} up to {until}: {time.time() - began:.0f} s")
    lab.made.add((folder, until))
    return folder


def until_stages(changes, *stages):
    return {key: value for key, value in changes.items() if key.split(".")[0] in stages}


def base(lab, size="default", **changes):
    if until_stages(changes, "sft") == changes != {}:  # another SFT model of the same pretrained one
        below = base(lab, size)
    else:
        below = lab.given if size == "default" else None
    return make(lab, size, "sft", lab.seeds[0], size, changes, below)


def labelled(lab, seed, size="default", **changes):
    below = base(lab, size, **until_stages(changes, "model", "data", "pretrain", "sft"))
    return make(lab, f"{size}-seed{seed}", "reward", seed, size, changes, below)


def finished(lab, seed, size="default", until="evaluation", **changes):
    before = until_stages(changes, "model", "data", "pretrain", "sft")
    if "collect.rounds" in changes:  # PPO's samples are labelled too: nobody shares these labels
        below = base(lab, size, **before)
    else:
        below = labelled(lab, seed, size, **before, **until_stages(changes, "collect", "reward"))
    return make(lab, f"{size}-seed{seed}-ppo", until, seed, size, changes, below)


# ---------------------------------------------------------------------------------------------------------------------
# statistics over seeds

def row_of(values, choices=True):
    """{name, name_low, name_high: mean and crossed_ci} of each of values, {name: [seeds, posts]}, as columns of a table."""
    row = {}
    for name, of_seeds in values.items():
        seeds, posts = np.indices(np.shape(of_seeds))
        row[name] = float(np.mean(of_seeds))
        row[name + "_low"], row[name + "_high"] = crossed_ci(np.ravel(of_seeds), posts.ravel(), seeds.ravel(), choices)
    return row


def percent(row, name):
    return f"{row[name]:.0%} ({row[name + '_low']:.0%} to {row[name + '_high']:.0%})"


# ---------------------------------------------------------------------------------------------------------------------
# Stiennon figure 1: preference over the references, by model size

def read_size(folder):
    """Parameters of a run's models."""
    with safe_open(os.path.join(folder, "pretrained", "model.safetensors"), "pt") as f:
        return sum(math.prod(f.get_slice(key).get_shape()) for key in f.keys())


def measure_preference(lab):
    rows = []
    for size in SIZES:
        runs = [read_samples(lab.finished(seed, size)) for seed in lab.seeds]
        for policy in ("pretrained", "sft", "ppo"):
            gold, ratio = [], []
            for samples in runs:
                mine, reference = ([row["policies"][who] for row in samples] for who in (policy, "reference"))
                u, v = ([world.utility(row["post"], s["text"]) for row, s in zip(samples, side)] for side in (mine, reference))
                gold.append(wins(u, v))
                ratio.append([math.log(a["length"] / b["length"]) for a, b in zip(mine, reference)])
            controlled = [length_controlled_win_rate(w, x) for w, x in zip(gold, ratio)]
            rows.append({"size": size, "parameters": read_size(lab.base(size)), "policy": policy, **row_of({"preferred": gold}),
                         "equal_length": float(np.mean(controlled)), "equal_length_lowest": min(controlled),
                         "equal_length_highest": max(controlled), "length_ratio": float(np.exp(np.mean(ratio))),
                         "posts": len(runs[0]), "seeds": len(runs)})
    return {"tables": {"preference": rows}, "facts": {"posts": rows[0]["posts"], "seeds": rows[0]["seeds"]}}


def draw_preference(measured, path):
    rows = measured["tables"]["preference"]
    figure, ((raw, controlled),) = new_figure(columns=2, width=4.6)
    for policy, colour, marker in (("pretrained", GREY, "s"), ("sft", ORANGE, "^"), ("ppo", BLUE, "o")):
        mine = [r for r in rows if r["policy"] == policy]
        x, label = [r["parameters"] for r in mine], LABELS[policy].replace("\n", " ")
        for ax, key, low, high in ((raw, "preferred", "preferred_low", "preferred_high"),
                                   (controlled, "equal_length", "equal_length_lowest", "equal_length_highest")):
            y = [r[key] for r in mine]
            error = [[a - r[low] for a, r in zip(y, mine)], [r[high] - a for a, r in zip(y, mine)]]
            ax.errorbar(x, y, np.maximum(error, 0), color=colour, marker=marker, capsize=3, label=label)
    for ax, title in ((raw, "as written"), (controlled, "at equal length")):
        ax.axhline(.5, color=GREY, ls="--", lw=1)
        ax.set(xscale="log", xlabel="parameters", title=title, ylim=(0, 1))
        ticks = sorted({r["parameters"] for r in rows})
        ax.set_xticks(ticks, [f"{t / 1e6:.2f}M" for t in ticks])
        ax.minorticks_off()
    raw.set_ylabel("share of posts preferred\nto the reference")
    controlled.legend(frameon=False, loc="center left", bbox_to_anchor=(1, .5))
    save_figure(figure, path)


def caption_preference(measured):
    rows, facts = measured["tables"]["preference"], measured["facts"]
    by = {(r["size"], r["policy"]): r for r in rows}
    largest = list(dict.fromkeys(r["size"] for r in rows))[-1]
    sft, ppo = by[largest, "sft"], by[largest, "ppo"]
    return ("In the paper human feedback lies above supervised training, and supervised above pretrained, at every size; curves rise "
            "with size; only human feedback passes 50 % (61 % at 1.3B, about 70 % at 6.7B, some 5 points less at equal length). Ours, "
            f"largest size: SFT {percent(sft, 'preferred')}, PPO {percent(ppo, 'preferred')}; at equal length {sft['equal_length']:.0%} "
            f"and {ppo['equal_length']:.0%}. Gold judge, greedy decoding, ties count one half; {facts['posts']} posts, {facts['seeds']} "
            f"seeds of comparisons, reward model and PPO; bars: 95 % over {probes.over(facts)} on the left, lowest and highest "
            f"seed on the right. PPO's summaries have {ppo['length_ratio']:.2f} times the tokens of the references. One pretrained and one "
            "SFT model per size.")


# ---------------------------------------------------------------------------------------------------------------------
# Stiennon figure 3: the axes of quality

AXES = ("coverage", "accuracy", "coherence", "overall")


def measure_axes(lab):
    runs, rows = [read_samples(lab.finished(seed)) for seed in lab.seeds], []
    for policy in ("reference", "lead3", "pretrained", "sft", "ppo"):
        marks = [[world.axes(row["post"], row["policies"][policy]["text"]) for row in samples] for samples in runs]
        row = {"policy": policy} | row_of({axis: [[m[axis] for m in of_run] for of_run in marks] for axis in AXES}, choices=False)
        top = np.mean([[m["overall"] >= 6.5 for m in of_run] for of_run in marks])
        rows.append(row | {"overall_at_least_6_5": float(top), "posts": len(runs[0]), "seeds": len(runs)})
    return {"tables": {"axes": rows}, "facts": {"posts": rows[0]["posts"], "seeds": rows[0]["seeds"]}}


def draw_axes(measured, path):
    rows = measured["tables"]["axes"]
    figure, ((ax,),) = new_figure(width=8)
    for k, (row, colour) in enumerate(zip(rows, (GREEN, PURPLE, GREY, ORANGE, BLUE))):
        for i, axis in enumerate(AXES):
            bar(ax, i + .17 * (k - 2), *(row[axis + end] for end in ("", "_low", "_high")), colour, .16,
                LABELS[row["policy"]].replace("\n", " ") if i == 0 else None)
    ax.set_xticks(range(len(AXES)), AXES)
    ax.set(ylabel="mean mark (1 to 7)", ylim=(1, 7.2))
    ax.legend(frameon=False, ncols=5, loc="lower center", bbox_to_anchor=(.5, 1), columnspacing=1, handlelength=1)
    save_figure(figure, path)


def caption_axes(measured):
    rows, facts = {r["policy"]: r for r in measured["tables"]["axes"]}, measured["facts"]
    gain = {axis: rows["ppo"][axis] - rows["sft"][axis] for axis in AXES}
    return ("In the paper human feedback is ahead of supervised training on every axis, most of all on coverage. Ours: PPO over SFT by "
            + ", ".join(f"{gain[axis]:+.2f} in {axis}" for axis in AXES)
            + f"; overall marks of 6.5 and more: PPO {rows['ppo']['overall_at_least_6_5']:.0%}, SFT "
            f"{rows['sft']['overall_at_least_6_5']:.0%}, reference {rows['reference']['overall_at_least_6_5']:.0%} (the paper's 7 of 7: "
            f"45 %, 20 %, 23 %). The gold judge's marks, {facts['posts']} posts, {facts['seeds']} seeds, 95 % over "
            f"{probes.over(facts)}. SFT's accuracy, {rows['sft']['accuracy']:.2f}, and coherence, {rows['sft']['coherence']:.2f}, say how "
            "much there was to gain: who writes the world's own sentences is coherent to the judge.")


# ---------------------------------------------------------------------------------------------------------------------
# Stiennon figure 4: transfer to another world

def measure_transfer(lab):
    """Policies of the first world, of which the language model alone has read news, on news; and a model fine-tuned on news."""
    device, read = pick_device(lab.device), {"data.news": .25}
    folders = [lab.finished(seed, "medium", until="ppo", **read) for seed in lab.seeds]
    home, away = open_run(lab.base("medium", **read)), open_run(lab.base("medium", **{"data.world": "news"}))
    test = away.posts["test"]

    def greedy(run, folder):
        return greedy_texts(run, load_model(folder, device), test)

    texts = {"reference": [[p["summary"] for p in test]], "lead3": [[lead3(p) for p in test]],
             **{name: [greedy(home, os.path.join(home.folder, name))] for name in ("pretrained", "sft")},
             "ppo": [greedy(home, os.path.join(folder, "ppo")) for folder in folders],
             "news_sft": [greedy(away, os.path.join(away.folder, "sft"))]}
    rows = []
    for policy, of_seed in texts.items():
        marks = [[world.axes(p, text) for p, text in zip(test, of_run)] for of_run in of_seed]
        rows.append({"policy": policy, "words": float(np.mean([len(t.split()) for of_run in of_seed for t in of_run])),
                     **row_of({axis: [[m[axis] for m in of_run] for of_run in marks] for axis in AXES}, choices=False),
                     "posts": len(test), "seeds": len(of_seed)})
    facts = {"posts": len(test), "seeds": len(lab.seeds), "news": read["data.news"], "parameters": read_size(home.folder)}
    return {"tables": {"transfer": rows}, "facts": facts}


TRANSFER = {"reference": ("reference", GREEN, "s"), "lead3": ("lead-3", PURPLE, "D"), "pretrained": ("pretrained", GREY, "v"),
            "sft": ("SFT on the first world", ORANGE, "^"), "ppo": ("PPO on the first world", BLUE, "o"),
            "news_sft": ("SFT on news", RED, "P")}  # policy: label, colour, marker


def draw_transfer(measured, path):
    figure, ((ax,),) = new_figure(width=6.6, height=3.8)
    for row in measured["tables"]["transfer"]:
        label, colour, marker = TRANSFER[row["policy"]]
        error = [[row["overall"] - row["overall_low"]], [row["overall_high"] - row["overall"]]]
        ax.errorbar(row["words"], row["overall"], np.maximum(error, 0), color=colour, marker=marker, ls="", capsize=3, ms=7, label=label)
    ax.set(xlabel="mean length (words)", ylabel="overall mark on news (1 to 7)", ylim=(.9, 7))
    ax.legend(frameon=False, loc="center left", bbox_to_anchor=(1, .5))
    save_figure(figure, path)


def caption_transfer(measured):
    rows, facts = {r["policy"]: r for r in measured["tables"]["transfer"]}, measured["facts"]

    def mark(policy):
        r = rows[policy]
        return f"{r['overall']:.2f} ({r['overall_low']:.2f} to {r['overall_high']:.2f})"
    return ("In the paper models that learned from TL;DR alone summarise CNN/DM news: human feedback well above the supervised model of "
            "its size, close to a model that was fine-tuned on news although half as long; references and lead-3 are hard to beat. Ours, "
            f"overall marks on news: PPO on the first world {mark('ppo')}, its SFT {mark('sft')}, pretrained {mark('pretrained')}, SFT on "
            f"news {mark('news_sft')}, references {mark('reference')}, lead-3 {mark('lead3')}. SFT, reward model and PPO never saw news; "
            f"{facts['news']:.0%} of the pretraining posts are news, as GPT-3 had read news too (a language model that has read none "
            f"writes of the first world only). {facts['parameters'] / 1e6:.2f}M parameters, {facts['posts']} posts, {facts['seeds']} "
            "seeds of comparisons, reward model and PPO, gold judge, greedy decoding; bars: 95 % over posts"
            + (" and, for PPO, seeds." if facts["seeds"] > 1 else "."))


# ---------------------------------------------------------------------------------------------------------------------
# Stiennon figure 5: over-optimisation

# what brings the turn out within minutes: a reward model from a few hundred comparisons, and PPO without a KL penalty
WEAK = {"collect.posts": 40, "collect.held_out_posts": 100, "reward.batch": 2, "reward.epochs": 4}
LONG = {"ppo.beta": 0.0, "ppo.iterations": 20, "ppo.snapshots": 2}
TEST_WEAK, TEST_LONG = {"collect.posts": 8}, {"ppo.iterations": 2, "ppo.snapshots": 1}  # of the preset test
CHOSEN, MEASURED = ("gold", "labelers", "predicted"), ("utility", "score")  # shares preferred; means
CURVES = CHOSEN + MEASURED


def judged(labeler, posts, texts, scores, reference_scores):
    """What every curve is made of, per post: gold and labelers' preference over the reference, what the reward model predicts of it,
    E[σ(r - r_reference)] (Stiennon figure 5), gold utility and score."""
    utility = [world.utility(p, t) for p, t in zip(posts, texts)]
    predicted = 1 / (1 + np.exp(np.asarray(reference_scores) - np.asarray(scores)))
    return {"gold": wins(utility, [world.utility(p, p["summary"]) for p in posts]).tolist(), "predicted": predicted.tolist(),
            "labelers": [probes.preference(labeler, p, t, p["summary"]) for p, t in zip(posts, texts)],
            "utility": utility, "score": list(scores)}


def many_samples(lab, posts):
    """64 samples (fewer with --quick) of the default size's SFT model for each post, made once. -> texts[post][sample]"""
    run, n = open_run(lab.base()), 8 if lab.preset_name == "test" else 16 if lab.quick else 64

    def texts():
        queries, temperature = [encode_query(run.enc, p, run.Q) for p in posts], run.config["settings"]["ppo"]["temperature"]
        policy = load_model(os.path.join(run.folder, "sft"), pick_device(lab.device))
        responses = sample_responses(policy, queries, run.R, temperature, torch.Generator().manual_seed(0), n)
        flat = [decode_response(run.enc, r) for r in responses]
        return [flat[i * n:(i + 1) * n] for i in range(len(posts))]
    file = os.path.join(lab.out, "runs", f"default-{len(posts)}x{n}.json")
    with one_at_a_time(file):
        return once(file, texts)


def score_samples(run, folder, posts, texts, device):
    """Scores of the reward model in a folder. texts[post][sample] -> [post][sample]"""
    queries = [encode_query(run.enc, p, run.Q) for p in posts]
    responses = [encode_response(run.enc, t, run.R) for of_post in texts for t in of_post]
    return score_all(load_model(folder, device, "scalar"), queries, responses, len(texts[0])).tolist()


def powers_of_2(most):
    return [2 ** k for k in range(most.bit_length())]


def gao_terms(kl, form):
    """[d, -d log d] for "ppo", [d, -d²] for "best_of_n", with d = √KL: the columns that α and β multiply."""
    d = np.sqrt(np.asarray(kl, float))
    return np.stack([d, -d * (np.log(d) if form == "ppo" else d)], 1)


def fit_gao(kl, gain, form):
    """α, β of R(d) = d (α - β log d) for PPO, d (α - β d) for best of n, by least squares; and the root mean squared residual.
    (Gao, Schulman & Hilton 2022, section 3.1)"""
    X, gain = gao_terms(kl, form), np.asarray(gain, float)
    theta = np.linalg.lstsq(X, gain, rcond=None)[0]
    return float(theta[0]), float(theta[1]), float(np.sqrt(np.mean((X @ theta - gain) ** 2)))


def turn(ppo):
    """Where the curve turns and where it ends: peak_ and last_ of the rows with the best gold preference and with the most steps."""
    rows = {"peak": max(ppo, key=lambda r: r["gold"]), "last": ppo[-1]}
    return {f"{name}_{key}": row[key] for name, row in rows.items() for key in ("iteration", "kl", *CURVES)}


def measure_overoptimization(lab):
    weak, long = (TEST_WEAK, TEST_LONG) if lab.preset_name == "test" else (WEAK, LONG)
    device, of_iteration, of_n, per_seed = pick_device(lab.device), {}, {}, []
    for seed in lab.seeds:
        folder = lab.finished(seed, until="ppo", **weak, **long)
        run = open_run(folder)
        settings, temperature = run.config["settings"]["collect"], run.config["settings"]["ppo"]["temperature"]
        labeler = probes.labeler_of(run)
        posts = run.posts["test"][:100 if lab.quick else 250]
        queries, reward = [encode_query(run.enc, p, run.Q) for p in posts], os.path.join(folder, "reward")
        reference_scores = [s for s, in score_samples(run, reward, posts, [[p["summary"]] for p in posts], device)]
        sft = load_model(os.path.join(folder, "sft"), device)
        for iteration in range(0, long["ppo.iterations"] + 1, long["ppo.snapshots"]):
            policy = load_model(os.path.join(folder, "ppo", f"iteration-{iteration}"), device) if iteration else sft
            samples = sample_responses(policy, queries, run.R, temperature, torch.Generator().manual_seed(iteration))
            texts = [decode_response(run.enc, r) for r in samples]
            scores = [s for s, in score_samples(run, reward, posts, [[t] for t in texts], device)]
            marks = judged(labeler, posts, texts, scores, reference_scores)
            marks["kl"] = sampled_kl(policy, sft, queries, samples, temperature) if iteration else [0.0] * len(posts)
            of_iteration.setdefault(iteration, []).append(marks)
            per_seed.append({"seed": seed, "iteration": iteration, **{key: float(np.mean(v)) for key, v in marks.items()}})
        fewer = posts[:len(posts) * 2 // 5]
        many = many_samples(lab, fewer)
        scores = score_samples(run, reward, fewer, many, device)
        marks = [judged(labeler, [p] * len(texts), texts, s, r) for p, texts, s, r in zip(fewer, many, scores, reference_scores)]
        for n in powers_of_2(len(many[0])):
            of_n.setdefault(n, []).append({key: [best_of_n_estimate(s, m[key], n) for s, m in zip(scores, marks)] for key in CURVES})

    def rows_of(marks, *measured):
        return row_of({key: [m[key] for m in marks] for key in CHOSEN}) | row_of({key: [m[key] for m in marks] for key in measured}, choices=False)
    ppo = [{"iteration": i, **rows_of(marks, "kl", *MEASURED)} for i, marks in of_iteration.items()]
    best_of_n = [{"n": n, "kl": best_of_n_kl(n), **rows_of(marks, *MEASURED)} for n, marks in of_n.items()]
    fits = []
    for curve, rows in (("ppo", ppo), ("best_of_n", best_of_n)):
        far = [r for r in rows[1:] if r["kl"] > .1]  # Gao does not trust the forms near 0; log d needs d > 0
        for gain in ("utility", "score"):
            alpha, beta, residual = fit_gao([r["kl"] for r in far], [r[gain] - rows[0][gain] for r in far], curve)
            fits.append({"curve": curve, "gain": gain, "alpha": alpha, "beta": beta, "residual": residual, "points": len(far)})
    facts = {"posts": len(posts), "posts_best_of_n": len(fewer), "seeds": len(lab.seeds), "posts_compared": settings["posts"],
             "comparisons": settings["posts"] * settings["pairs"], "temperature": temperature, **turn(ppo)}
    peak, last = (np.array([m["gold"] for m in of_iteration[facts[name]]]) for name in ("peak_iteration", "last_iteration"))
    facts |= row_of({"drop": peak - last}, choices=False)  # of the same posts and seeds
    return {"tables": {"ppo": ppo, "best_of_n": best_of_n, "fits": fits, "seeds": per_seed}, "facts": facts}


def draw_overoptimization(measured, path):
    tables = measured["tables"]
    figure, ((left, right),) = new_figure(columns=2, width=5.2, height=4.2)
    for key, colour, label in (("predicted", ORANGE, "reward model predicts"), ("gold", BLUE, "gold judge"),
                               ("labelers", GREEN, "labelers")):
        for table, marker, style, how in (("ppo", "o", "-", "PPO"), ("best_of_n", "^", ":", "best of n")):
            x, y, low, high = ([r[k] for r in tables[table]] for k in ("kl", key, key + "_low", key + "_high"))
            left.plot(x, y, color=colour, marker=marker, ms=4, ls=style, label=f"{label}, {how}")
            if table == "ppo":
                left.fill_between(x, low, high, color=colour, alpha=.15, lw=0)
    left.axhline(.5, color=GREY, ls="--", lw=1)
    left.set(xlabel="KL from SFT (nats)", ylabel="share preferred to the reference", ylim=(0, 1))
    for fit in tables["fits"]:
        rows, ppo = tables[fit["curve"]], fit["curve"] == "ppo"
        colour, label = (ORANGE, "reward model's score") if fit["gain"] == "score" else (BLUE, "gold utility")
        right.plot([math.sqrt(max(0, r["kl"])) for r in rows], [r[fit["gain"]] - rows[0][fit["gain"]] for r in rows], color=colour,
                   marker="o" if ppo else "^", ms=4, ls="")
        x = np.linspace(.05, max(r["kl"] for r in rows), 200)
        right.plot(np.sqrt(x), gao_terms(x, fit["curve"]) @ [fit["alpha"], fit["beta"]], color=colour, ls="-" if ppo else ":",
                   label=f"{label}, {'PPO' if ppo else 'best of n'}")
    right.set(xlabel="d = √KL from SFT (√nats)", ylabel="gain over SFT (score; key facts)", title="lines: Gao's forms, fitted")
    right.title.set_fontsize(10)
    for ax in (left, right):
        ax.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(.5, -.17), ncols=2)
    save_figure(figure, path)


def caption_overoptimization(measured):
    f, fits = measured["facts"], {(r["curve"], r["gain"]): r for r in measured["tables"]["fits"]}
    rl, bon = fits["ppo", "utility"], fits["best_of_n", "utility"]
    turned = f["last_gold"] < f["peak_gold"] and f["last_predicted"] > f["peak_predicted"] and f["peak_iteration"] > 0
    shows = "does not show here" if not turned else "shows" if f["drop_low"] > 0 else "shows in the mean, and not yet by this interval"
    return ("In the paper the reward model's prediction keeps rising with KL while people's preference rises, turns and falls below 50 "
            f"%. Ours: gold preference is best at {f['peak_kl']:.1f} nats with {f['peak_gold']:.0%} (prediction "
            f"{f['peak_predicted']:.0%}, labelers {f['peak_labelers']:.0%}); at {f['last_kl']:.1f} nats it is {f['last_gold']:.0%}, the "
            f"prediction {f['last_predicted']:.0%}, labelers {f['last_labelers']:.0%}. On the same posts it falls by {100 * f['drop']:.0f} points "
            f"({100 * f['drop_low']:.0f} to {100 * f['drop_high']:.0f}): the turn {shows}. (The best point is chosen "
            f"on these very posts, which makes the fall look a little larger than it is.) The dials: a reward model from about {f['comparisons']} comparisons on "
            f"{f['posts_compared']} posts (the default run has 1500 posts), and PPO without KL penalty for {f['last_iteration']} "
            "iterations, whose policies are taken along the way; Gao finds that a penalty acts like stopping early. Gao's forms, fitted "
            f"to the mean gain in gold utility: PPO d({rl['alpha']:.2f} - {rl['beta']:.2f} log d), best of n d({bon['alpha']:.2f} - "
            f"{bon['beta']:.2f} d), d = √KL. Samples at temperature {f['temperature']}; {f['posts']} posts ({f['posts_best_of_n']} for "
            f"best of n), {f['seeds']} seeds of comparisons, reward model and PPO; bands: 95 % over {probes.over(f)}.")


# ---------------------------------------------------------------------------------------------------------------------
# Stiennon figure 6: reward models by data and by size

def posts_per_step(posts):
    """Few posts are read in smaller steps, so that they make more than a handful: 23 of one post, 187 of eight."""
    return max(1, min(8, posts // 32))


def reward_on_fewer(lab, seed, size, run, train, held_out, comparisons):
    """A reward model of this size from the groups `train`. -> rows of reward_margins on the groups held out"""
    posts, device = len(train), pick_device(lab.device)
    own = size == "default" and posts == lab_settings(lab, size, {}).collect.posts  # the seed's own reward model is this one
    folder = os.path.join(lab.labelled(seed), "reward") if own else os.path.join(lab.out, "runs", f"{size}-seed{seed}-comparisons-of-{posts}-posts")
    file = os.path.join(folder, "held_out.jsonl")
    if not os.path.exists(file):
        torch.manual_seed(seed)
        run.seed, batch = seed, posts_per_step(posts)
        settings = dataclasses.replace(lab_settings(lab, size, {}).reward, batch=batch, warmup=min(20, posts // batch // 4))
        model = load_model(os.path.join(run.folder, "sft"), device, "scalar")
        train_reward(model, train, normalising_rows(run, settings, device), settings, folder, seed)
        save_json_lines(file, reward_margins(model, held_out, comparisons))
    with open(file) as f:
        return [json.loads(line) for line in f]


def slopes(rows):
    """Least squares of accuracy = a + b log2(comparisons) + c log2(parameters). -> b, c: change per doubling"""
    X = [[1, math.log2(r["comparisons"]), math.log2(r["parameters"])] for r in rows]
    return np.linalg.lstsq(np.array(X), np.array([r["accuracy"] for r in rows]), rcond=None)[0][1:].tolist()


def mean_se(values):
    """Mean, and standard error of it; None with one value."""
    return float(np.mean(values)), float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None


def measure_reward_scaling(lab):
    per_seed, judge, rows = [], [], []
    most = lab_settings(lab, "default", {}).collect.posts
    parts = [most // 4 ** k for k in (3, 2, 1, 0) if most // 4 ** k >= 4]
    runs = {size: open_run(lab.base(size)) for size in SIZES}  # of one tokenizer, for their posts are the same
    for seed in lab.seeds:
        run = runs["default"]
        train, held_out, comparisons = split_comparisons(run.enc, os.path.join(lab.labelled(seed), "comparisons.jsonl"), run.Q, run.R)
        for size, run in runs.items():
            for posts in parts:
                margins = reward_on_fewer(lab, seed, size, run, train[:posts], held_out, comparisons)
                per_seed.append({"seed": seed, "size": size, "parameters": read_size(run.folder), "posts": posts,
                                 "comparisons": sum(len(g["pairs"]) for g in train[:posts]),
                                 "accuracy": float(np.mean([wins(r["margin"], 0) for r in margins])), "labels": len(margins)})
        judge.append(float(np.mean([r["gold_agrees"] for r in margins])))
    for size in SIZES:
        for posts in parts:
            mine = [r for r in per_seed if r["size"] == size and r["posts"] == posts]
            mean, se = mean_se([r["accuracy"] for r in mine])
            rows.append({"size": size, "parameters": mine[0]["parameters"], "comparisons": float(np.mean([r["comparisons"] for r in mine])),
                         "accuracy": mean, "standard_error": se, "seeds": len(mine), "labels": sum(r["labels"] for r in mine)})
    by_data, by_size = zip(*[slopes([r for r in per_seed if r["seed"] == seed]) for seed in lab.seeds])
    facts = {"seeds": len(lab.seeds), "labels": rows[0]["labels"], "noise_free_judge": float(np.mean(judge)), "smallest": rows[0]["accuracy"],
             "largest": rows[-1]["accuracy"]}
    for name, values in (("per_doubling_of_data", by_data), ("per_doubling_of_size", by_size)):
        facts[name], facts[name + "_se"] = mean_se(values)
    return {"tables": {"reward": rows, "seeds": per_seed}, "facts": facts}


def draw_reward_scaling(measured, path):
    rows = measured["tables"]["reward"]
    figure, ((ax,),) = new_figure(width=6)
    for size, colour, marker in zip(SIZES, (GREY, ORANGE, BLUE), "s^o"):
        mine = [r for r in rows if r["size"] == size]
        ax.errorbar([r["comparisons"] for r in mine], [r["accuracy"] for r in mine], [r["standard_error"] or 0 for r in mine], color=colour,
                    marker=marker, capsize=3, label=f"{mine[0]['parameters'] / 1e6:.2f}M parameters")
    ax.axhline(measured["facts"]["noise_free_judge"], color=GREEN, ls="--", lw=1.2, label="noise-free judge")
    ticks = [r["comparisons"] for r in mine]
    ax.set(xscale="log", xlabel="comparisons trained on", ylabel="agreement with held-out labels")
    ax.set_xticks(ticks, [f"{t:,.0f}" for t in ticks])
    ax.yaxis.set_major_formatter(lambda y, _: f"{y:.0%}")
    ax.minorticks_off()
    ax.legend(frameon=False)
    save_figure(figure, path)


def caption_reward_scaling(measured):
    f = measured["facts"]

    def points(name):
        se = f[name + "_se"]
        return f"{100 * f[name]:+.2f}" + (" (one seed, no standard error)" if se is None else f" ± {100 * se:.2f}")
    parts = sorted({r["posts"] for r in measured["tables"]["seeds"]})
    return ("In the paper accuracy rises with both, by about 1.1 points per doubling of the data and 1.8 per doubling of the model. "
            f"Ours: {points('per_doubling_of_data')} points per doubling of the comparisons, {points('per_doubling_of_size')} per "
            "doubling of the parameters (regression on both logarithms, one per seed; ± is the standard error over seeds); from "
            f"{f['smallest']:.1%} to {f['largest']:.1%}, the noise-free judge {f['noise_free_judge']:.1%}. {f['labels']:,} held-out labels of "
            f"{f['seeds']} seeds; all sizes train on the same comparisons, of samples of the default size's models, in one pass: "
            + " or ".join(f"{posts // posts_per_step(posts)} steps of {posts_per_step(posts)}" for posts in parts) + " posts; bars: standard error "
            "over seeds. Different from the paper: what the labelers' noise leaves to a judge without any is known.")


# ---------------------------------------------------------------------------------------------------------------------
# Stiennon figure 7: what best of n optimises

def measure_best_of_n(lab):
    device, run, weak = pick_device(lab.device), open_run(lab.base()), TEST_WEAK if lab.preset_name == "test" else WEAK
    posts = run.posts["test"][:40 if lab.quick else 100]
    many = many_samples(lab, posts)
    utility = [[world.utility(p, t) for t in texts] for p, texts in zip(posts, many)]
    gold = [wins(u, world.utility(p, p["summary"])).tolist() for p, u in zip(posts, utility)]
    proxies = {"reward model": [], "earlier reward model": [], "smaller reward model": [], "gold judge": [utility],
               "ROUGE-L": [[rouge(texts, [p["summary"]] * len(texts), ["rougeL"])[:, 0] for p, texts in zip(posts, many)]]}
    for seed in lab.seeds:
        for name, folder in (("reward model", lab.labelled(seed)), ("earlier reward model", lab.labelled(seed, **weak)),
                             ("smaller reward model", lab.labelled(seed, "small"))):
            proxies[name].append(score_samples(open_run(folder), os.path.join(folder, "reward"), posts, many, device))
    rows = [{"by": name, "n": n, "kl": best_of_n_kl(n), "posts": len(posts), "seeds": len(of_seed),
             **row_of({"gold": [[best_of_n_estimate(s, g, n) for s, g in zip(scores, gold)] for scores in of_seed]})}
            for name, of_seed in proxies.items() for n in powers_of_2(len(many[0]))]
    return {"tables": {"best_of_n": rows}, "facts": {
        "posts": len(posts), "samples": len(many[0]), "seeds": len(lab.seeds), "posts_compared": weak["collect.posts"]}}


def draw_best_of_n(measured, path):
    rows = measured["tables"]["best_of_n"]
    figure, ((ax,),) = new_figure(width=6.6, height=3.8)
    styles = {"gold judge": (GREEN, "--", "D"), "reward model": (BLUE, "-", "o"), "earlier reward model": (PURPLE, "-", "v"),
              "smaller reward model": (ORANGE, "-", "^"), "ROUGE-L": (RED, ":", "s")}
    for name, (colour, style, marker) in styles.items():
        x, y, low, high = ([r[k] for r in rows if r["by"] == name] for k in ("n", "gold", "gold_low", "gold_high"))
        ax.fill_between(x, low, high, color=colour, alpha=.1, lw=0)
        ax.plot(x, y, color=colour, ls=style, marker=marker, ms=4, label=name)
    ax.axhline(.5, color=GREY, ls="--", lw=1)
    ax.set_xscale("log", base=2)
    ax.set_xticks(x, [str(n) for n in x])
    ax.set(xlabel="n, samples of the SFT model to choose from", ylabel="share preferred to the reference\nby the gold judge", ylim=(0, 1))
    ax.legend(frameon=False, title="best of n by", loc="center left", bbox_to_anchor=(1, .5))
    save_figure(figure, path)


def caption_best_of_n(measured):
    rows, f = measured["tables"]["best_of_n"], measured["facts"]
    last, first = {r["by"]: r for r in rows if r["n"] == max(q["n"] for q in rows)}, rows[0]
    peak = max((r for r in rows if r["by"] == "ROUGE-L"), key=lambda r: r["gold"])
    return ("In the paper choosing by ROUGE peaks sooner and far lower than choosing by any reward model, an earlier one from three "
            f"quarters of the data among them. Ours: from {percent(first, 'gold')} at n = {first['n']} to, at n = {last['ROUGE-L']['n']}, "
            + ", ".join(f"{percent(r, 'gold')} by {name}" for name, r in last.items())
            + f"; ROUGE-L is at its best at n = {peak['n']} with {peak['gold']:.0%}. ROUGE is measured against the very reference that "
            "the choice is compared with; the earlier reward model is that of the over-optimisation figure, from the comparisons of "
            f"{f['posts_compared']} posts, the smaller one that of the small models. {f['posts']} posts, {f['samples']} "
            f"samples of each (the estimate runs over all subsets of n), {f['seeds']} seeds of comparisons and reward model; bands: 95 % over {probes.over(f)} "
            "(gold judge and ROUGE-L, which have no seeds: posts).")


# ---------------------------------------------------------------------------------------------------------------------
# not in the papers: what the curves of a healthy run look like

def measure_curves(lab):
    folders, rows = [lab.finished(seed) for seed in lab.seeds], []
    logs = [read_metrics(os.path.join(folder, "ppo")) for folder in folders]
    for key, _ in PPO_CURVES:
        for step in range(len(logs[0])):
            values = [log[step][key] for log in logs]
            rows.append({"curve": key, "step": step, "mean": float(np.mean(values)), "low": min(values), "high": max(values),
                         "seeds": len(values)})
    return {"tables": {"curves": rows}, "facts": {"seeds": len(logs), "iterations": len(logs[0]),
                                               "trained_by": trained_by(open_run(folders[0]).config)}}


def draw_healthy(measured, path):
    draw_curves([], measured["tables"]["curves"], path)


def caption_curves(measured):
    rows, f = measured["tables"]["curves"], measured["facts"]
    first, last = ({r["curve"]: r for r in rows if r["step"] == step} for step in (0, f["iterations"] - 1))
    return ("Lay yours on top: the report of a run draws it over the band of docs/healthy_run.json, where all settings of training are "
            f"that band's (this figure's curves.json, kept, makes another). {f['iterations']} iterations, {f['seeds']} seeds of "
            "comparisons, reward model and PPO; line: mean, band: lowest and highest seed. From first "
            "to last " + ", ".join(f"{label} {first[key]['mean']:.2f} to {last[key]['mean']:.2f}" for key, label in PPO_CURVES) + ".")


FIGURES = [
    Figure("preference", "Preference over the references by model size (Stiennon 2020, figure 1)", measure_preference, draw_preference,
           caption_preference, 7),
    Figure("axes", "Quality by axis (Stiennon 2020, figure 3)", measure_axes, draw_axes, caption_axes, 0.2),
    Figure("transfer", "Transfer to another world (Stiennon 2020, figure 4)", measure_transfer, draw_transfer, caption_transfer, 3.5),
    Figure("overoptimization", "Over-optimisation of the reward model (Stiennon 2020, figure 5; Gao 2022, figure 1)",
           measure_overoptimization, draw_overoptimization, caption_overoptimization, 4),
    Figure("reward_scaling", "Reward models by data and by size (Stiennon 2020, figure 6)", measure_reward_scaling, draw_reward_scaling,
           caption_reward_scaling, 2.5),
    Figure("best_of_n", "Best of n by reward models and by ROUGE (Stiennon 2020, figure 7)", measure_best_of_n, draw_best_of_n,
           caption_best_of_n, 0.4),
    Figure("probes", "Probes of reward models (Stiennon 2020, tables 16 and 17)", probes.measure_probes, probes.draw_probes,
           probes.caption_probes, 0.5),
    Figure("agreement", "Who agrees with whom (Stiennon 2020, tables 20 and 22)", probes.measure_agreement, probes.draw_agreement,
           probes.caption_agreement, 0.8),
    Figure("copying", "Novelty, accuracy and where summaries copy from (Ziegler 2019, tables and pictures of copying)", probes.measure_copying,
           probes.draw_copying, probes.caption_copying, 15),
    Figure("critics", "The same labels without PPO, and judges who did not train it (asked by critics; InstructGPT 2022, section 4.1)",
           probes.measure_critics, probes.draw_critics, probes.caption_critics, 2.5),
    Figure("ladder", "Elo ladder of all policies, and who agrees with whom (Stiennon 2020, appendix C)", probes.measure_ladder,
           probes.draw_ladder, probes.caption_ladder, 1.5),
    Figure("curves", "PPO's curves when all is well (default preset)", measure_curves, draw_healthy, caption_curves, 0.1),
]


# ---------------------------------------------------------------------------------------------------------------------
# the command

def say(text):
    """A line for the person who waits; what the stages print goes to the log."""
    print(text, file=SCREEN or sys.stdout, flush=True)


SCREEN = None  # the standard output while it is redirected


@contextlib.contextmanager
def stages_into(path):
    """What is printed within goes to a file, except by say()."""
    global SCREEN
    with open(path, "a") as f:
        SCREEN = sys.stdout
        try:
            with contextlib.redirect_stdout(f):
                yield
        finally:
            SCREEN = None


def save_tables(out, name, tables):
    for table, rows in tables.items():
        save_csv(os.path.join(out, f"{name}-{table}.csv"), rows)


def save_drawn(out, figure, measured):
    """What is made of a measured figure: its tables, then its picture, in one piece: where there is one, there are tables."""
    save_tables(out, figure.name, measured["tables"])
    part = os.path.join(out, figure.name + ".part.png")
    figure.draw(measured, part)
    os.replace(part, os.path.join(out, figure.name + ".png"))


def load_measured(out, name):
    """What a figure's measure() gave when it was measured, or None."""
    path = os.path.join(out, name + ".json")
    if not os.path.exists(path):
        return None
    try:
        with open(path) as f:
            return json.load(f)
    except ValueError as e:
        raise DataError(f"{path} is damaged ({e}); remove it and it will be measured again") from None


def cell(value):
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def report(out, done):
    """report.md, and report.html with the pictures inside. done: [(figure, measured)]"""
    markdown, page = ["# Figures of the papers on the embedded world", ""], []
    for figure, measured in done:
        caption = figure.caption(measured)
        markdown += [f"## {figure.title}", "", f"![{figure.name}]({figure.name}.png)", "", caption, ""]
        with open(os.path.join(out, figure.name + ".png"), "rb") as f:
            picture = base64.b64encode(f.read()).decode()
        page += [f"<h2 id='{figure.name}'>{html.escape(figure.title)}</h2>",
                 f"<img alt='{html.escape(figure.title, True)}' src='data:image/png;base64,{picture}'>", f"<p>{html.escape(caption)}</p>"]
        for table, rows in measured["tables"].items():
            header = list(dict.fromkeys(key for row in rows for key in row))
            cells = [[cell(row.get(key)) for key in header] for row in rows]
            markdown += [f"`{figure.name}-{table}.csv`", "", *markdown_table(header, cells), ""]
            page += [f"<details><summary>{figure.name}-{table}.csv, {len(rows)} rows</summary><div><table><tr>"
                     + "".join(f"<th>{html.escape(key)}</th>" for key in header) + "</tr>"
                     + "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in cells)
                     + "</table></div></details>"]
    write_atomic(os.path.join(out, "report.md"), "\n".join(markdown))
    contents = "".join(f"<li><a href='#{f.name}'>{html.escape(f.title)}</a></li>" for f, _ in done)
    write_atomic(os.path.join(out, "report.html"), PAGE.replace("CONTENTS", contents).replace("FIGURES", "\n".join(page)))


PAGE = """<!DOCTYPE html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Figures of the papers on the embedded world</title><style>
body { font: 17px/1.55 Georgia, serif; max-width: 52rem; margin: 2rem auto; padding: 0 1rem; color: #222; background: #fff }
h1, h2, summary, table, li { font-family: system-ui, sans-serif } h2 { margin-top: 3rem; font-size: 1.2rem }
img { max-width: 100% } details div { overflow-x: auto } summary { cursor: pointer; font-size: .85rem; color: #555 }
table { border-collapse: collapse; font-size: .75rem } th, td { padding: .15rem .5rem; border-bottom: 1px solid #ddd; text-align: right }
</style><h1>Figures of the papers on the embedded world</h1><ul>CONTENTS</ul>
FIGURES
</html>
"""


def open_lab_folder(out, config):
    """Make the folder, or check that it was made with the same options."""
    file = os.path.join(out, "lab.json")
    os.makedirs(out, exist_ok=True)
    if not os.path.exists(file):
        write_atomic(file, json.dumps(config))
    with open(file) as f:
        old = json.load(f)
    for key, value in config.items():
        if old.get(key) != value:
            raise DataError(f"{out} was made with {key} = {old.get(key)}, now it is {value}; name another folder with --out")


def check_base(lab):
    """Refuses a given run whose pretrained and SFT model the default size could not take over."""
    config, ours = open_run(lab.given).config, dataclasses.asdict(lab_settings(lab, "default", {}))
    if "sft" in same_stages(lab.given, config, {**config, **dict.fromkeys(real.FILES), "settings": ours}):
        return
    theirs = config["settings"]
    differ = [f"--{part}.{key} {value}" for part in ("model", "data", "pretrain", "sft") for key, value in ours[part].items()
              if theirs[part].get(key, value) != value]
    differ += [f"--collect.{key} {ours['collect'][key]}" for key in ("posts", "held_out_posts") if theirs["collect"][key] < ours["collect"][key]]
    raise DataError(f"--base {lab.given} is not the figures' model of the default size; `{' '.join(['python run.py', *differ])}` makes one")


def main(argv):
    parser = Parser(__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which figures (default all): {', '.join(f.name for f in FIGURES)}")
    parser.add_argument("--quick", action="store_true", help="small data and one seed: shows the machinery, not the findings")
    parser.add_argument("--seeds", help="seeds of comparisons, reward model and PPO (default 1,2,3; with --quick 1)")
    parser.add_argument("--out", help="folder of the figures (default out/figures, with --quick out/figures-quick)")
    parser.add_argument("--base", help="folder of an earlier run of `python run.py`: its pretrained and SFT model serve the default size; "
                        "its seed must be the first of --seeds")
    parser.add_argument("--preset", choices=("tiny", "test"), default="tiny", help="preset of the runs; test is for tests")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default auto)")
    parser.add_argument("--jobs", type=int, help="figures measured at a time (default 2 on a CPU of two cores and more, else 1)")
    args = parser.parse_args(argv)
    known = {figure.name: figure for figure in FIGURES}
    for name in args.names:
        if name not in known:
            raise DataError(f"there is no figure {name!r}; there are {', '.join(known)}")
    seeds = seed_list(args.seeds or ("1" if args.quick else "1,2,3"))
    if args.base is not None:
        seed = open_run(args.base).config["seed"]
        if seed != seeds[0]:  # the other sizes' posts and tokens are those of the first seed
            raise DataError(f"--base {args.base} is a run of seed {seed} and the first of --seeds is {seeds[0]}: the model sizes would not "
                            "share posts and tokenizer; name a run of that seed, or this seed first")
    if args.jobs is not None and args.jobs < 1:
        raise DataError(f"--jobs must be 1 or more, found {args.jobs}")
    jobs = args.jobs or (2 if pick_device(args.device) == "cpu" and torch.get_num_threads() > 1 else 1)
    out = args.out or os.path.join("out", "figures-quick" if args.quick else "figures")
    lab = make_lab(out, seeds, args.quick, args.preset, args.device, args.base, jobs)
    if args.base is not None:
        check_base(lab)
    open_lab_folder(out, {"preset": args.preset, "quick": args.quick, "seeds": seeds})
    draw_all(lab, [known[name] for name in args.names or known])


def measure(lab, figure):
    """Measure a figure and keep what was found. What its stages print goes to NAME.log."""
    say(f"{figure.name}: {figure.title}")
    began = time.time()
    with stages_into(os.path.join(lab.out, figure.name + ".log")):
        measured = figure.measure(lab)
    measured["seconds"] = time.time() - began
    write_atomic(os.path.join(lab.out, figure.name + ".json"), json.dumps(measured, indent=1))
    return measured


def measure_named(options, name, threads):
    """measure() in a process of its own."""
    torch.set_num_threads(threads)
    return measure(make_lab(**options), next(figure for figure in FIGURES if figure.name == name))


def measure_all(lab, figures):
    """(figure, measured) of each, as they come: in turn, or lab.jobs at a time, the longest first, where one that fails does not stop the
    others."""
    jobs = min(lab.jobs, len(figures))
    if jobs < 2:
        for figure in figures:
            yield figure, measure(lab, figure)
        return
    os.environ["TQDM_DISABLE"] = "1"  # of the other processes; their bars would write over each other
    failed = None
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        try:
            threads = max(1, torch.get_num_threads() // jobs)
            waiting = {pool.submit(measure_named, lab.options, figure.name, threads): figure
                       for figure in sorted(figures, key=lambda figure: -figure.minutes)}
            for future in as_completed(waiting):
                failed = failed or future.exception()
                if future.exception() is None:
                    yield waiting[future], future.result()
        except BaseException:  # Ctrl-C: nobody waits for figures that are half measured
            for process in multiprocessing.active_children():
                process.terminate()
            raise
        finally:
            del os.environ["TQDM_DISABLE"]
    if failed:
        raise failed


def draw_all(lab, figures):
    """Measure what is not measured yet, draw, and report."""
    todo, began = [], time.time()
    for figure in figures:
        if (measured := load_measured(lab.out, figure.name)) is None:
            todo.append(figure)
        else:
            say(f"{figure.name}: measured before, {figure.name}.json")
            save_drawn(lab.out, figure, measured)
    left, planned = sum(figure.minutes for figure in todo), 0.0
    if todo:
        of_all = f", about {show_time(60 * left * (0.2 if lab.quick else 1))} on two cores" if len(todo) == len(FIGURES) else ""
        say(f"{len(todo)} to measure{of_all}")  # some alone make runs that are others' share of that time
    try:
        for number, (figure, measured) in enumerate(measure_all(lab, todo), 1):
            planned, left = planned + figure.minutes, left - figure.minutes
            save_drawn(lab.out, figure, measured)
            more = f"; about {show_time(left * (time.time() - began) / planned)} for the others" if left > 0.01 else ""
            say(f"[{number}/{len(todo)}] {figure.name} in {show_time(measured['seconds'])}{more}\n    {figure.caption(measured)}")
    except Exception:  # one failed: what there is
        report_all(lab)
        raise
    report_all(lab)
    say(f"report in {os.path.join(lab.out, 'report.html')}, {show_time(time.time() - began)}")


def report_all(lab):
    """The report of every figure that the folder holds."""
    done = [(f, m) for f in FIGURES for m in [load_measured(lab.out, f.name)] if m]
    for figure, measured in done:
        if not os.path.exists(os.path.join(lab.out, figure.name + ".png")):  # an earlier command was stopped between the two
            save_drawn(lab.out, figure, measured)
    report(lab.out, done)


