"""
Every figure of the papers on the embedded world, with error bars, from one command:

    python run.py figures                       # all of them -> out/figures/report.html, under 40 minutes on two cores
    python run.py figures overoptimization      # one
    python run.py figures --quick               # small data, one seed, in under 8 minutes: the machinery, not the findings

A figure is measured (NAME.json, and NAME-TABLE.csv of each table), then drawn from what was measured alone (NAME.png). What is
measured already is not measured again. One pretrained and one SFT model per model size serve all; seeds vary what comes after:
comparisons, reward model, PPO. Every model lies in a run's folder under runs/, as `python run.py` leaves it.

References: Stiennon 2020 §4 and appendix G; Gao, Schulman & Hilton 2022 (functional forms of over-optimisation).
"""
import base64
import contextlib
import csv
import dataclasses
import html
import json
import math
import os
import time
from collections import namedtuple
from functools import partial
from types import SimpleNamespace

import numpy as np

from data import DataError, write_atomic
from evaluation import BLUE, GREEN, GREY, LABELS, ORANGE, length_controlled_win_rate, new_figure, read_samples, save_figure, wins
import probes
import world
from run import preset, run_pipeline
from sft import Parser, run_main

# name; title with the paper's own number; measure(lab) -> {"tables": {table: [flat dict]}, "facts": {name: number}};
# draw(measured, path) from that alone; caption(measured) -> text; minutes it takes of two cores once its bases are there
Figure = namedtuple("Figure", "name title measure draw caption minutes")

SIZES = {"small": 0.5, "medium": 0.75, "default": 1.0}  # share of the preset's width and depth; nothing is larger, for time
QUICK = {"data.pretrain": 4000, "collect.posts": 300, "collect.held_out_posts": 100, "data.test": 100, "ppo.iterations": 8}
FULL = {"data.test": 250, "collect.held_out_posts": 250}


# ---------------------------------------------------------------------------------------------------------------------
# the laboratory: runs that the figures share

def make_lab(out, seeds=(1, 2, 3), quick=False, preset_name="tiny", device="auto"):
    """What a measure() is given. Its three functions return the folder of a run, made when first asked for.

        lab.base(size, **changes)               data, pretrained and SFT model
        lab.labelled(seed, size, **changes)     and comparisons and reward model
        lab.finished(seed, size, **changes)     and PPO and evaluation/samples.jsonl (until="ppo": without)

    size: one of SIZES; changes: settings such as **{"ppo.beta": 0.1}."""
    changes = {} if preset_name == "test" else QUICK if quick else FULL
    lab = SimpleNamespace(out=out, seeds=list(seeds), quick=quick, preset=preset_name, device=device, changes=changes)
    lab.base, lab.labelled, lab.finished = (partial(f, lab) for f in (base, labelled, finished))
    return lab


def lab_settings(lab, size, changes):
    """The lab's preset at this size with these changes, validated."""
    settings, scale = preset(lab.preset), SIZES[size]
    m = settings.model
    shape = {"model.n_layer": max(1, round(scale * m.n_layer)), "model.n_embd": round(scale * m.n_embd)}
    for key, value in (shape | lab.changes | changes).items():
        stage, setting = key.split(".")
        setattr(settings, stage, dataclasses.replace(getattr(settings, stage), **{setting: value}))
    for part in vars(settings).values():
        part.validate()
    return settings


def make(lab, name, until, seed, size, changes, base=None):
    """The run's folder, its stages up to `until` done."""
    name = "-".join([name] + [f"{key}={value}" for key, value in sorted(changes.items())])
    folder = os.path.join(lab.out, "runs", name)
    began = time.time()
    run_pipeline(lab_settings(lab, size, changes), seed, folder, lab.preset, base, device=lab.device, until=until)
    if time.time() - began > 2:
        say(f"    {name} up to {until}: {time.time() - began:.0f} s")
    return folder


def until_stages(changes, *stages):
    return {key: value for key, value in changes.items() if key.split(".")[0] in stages}


def base(lab, size="default", **changes):
    below = base(lab, size) if until_stages(changes, "sft") == changes != {} else None  # another SFT model of the same pretrained one
    return make(lab, size, "sft", lab.seeds[0], size, changes, below)


def labelled(lab, seed, size="default", **changes):
    below = base(lab, size, **until_stages(changes, "model", "data", "pretrain", "sft"))
    return make(lab, f"{size}-seed{seed}", "reward", seed, size, changes, below)


def finished(lab, seed, size="default", until="evaluation", **changes):
    below = labelled(lab, seed, size, **until_stages(changes, "model", "data", "pretrain", "sft", "collect", "reward"))
    return make(lab, f"{size}-seed{seed}-ppo", until, seed, size, changes, below)


# ---------------------------------------------------------------------------------------------------------------------
# statistics over seeds

def mean_ci(values, draws=2000, seed=0):
    """Mean of values [seeds, posts] and its 95 % bootstrap interval; seeds and posts are drawn as wholes, both."""
    values, rng = np.asarray(values, float), np.random.default_rng(seed)
    S, N = values.shape
    means = [values[rng.integers(0, S, S)][:, rng.integers(0, N, N)].mean() for _ in range(draws)]
    return float(values.mean()), [float(x) for x in np.percentile(means, [2.5, 97.5])]


def row_of(name, values):
    """{name, name_low, name_high}: mean_ci as columns of a table."""
    mean, (low, high) = mean_ci(values)
    return {name: mean, name + "_low": low, name + "_high": high}


def percent(row, name):
    return f"{row[name]:.0%} ({row[name + '_low']:.0%} to {row[name + '_high']:.0%})"


def bar(ax, x, row, name, colour, width=.36, label=None):
    """A bar with its interval."""
    y = row[name]
    ax.bar(x, y, width, color=colour, label=label)
    ax.errorbar(x, y, [[max(0, y - row[name + "_low"])], [max(0, row[name + "_high"] - y)]], color="black", capsize=3, lw=1)


# ---------------------------------------------------------------------------------------------------------------------
# Stiennon figure 1: preference over the references, by model size

def read_size(folder):
    """Parameters of a run's models."""
    from safetensors import safe_open
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
            rows.append({"size": size, "parameters": read_size(lab.base(size)), "policy": policy, **row_of("preferred", gold),
                         "equal_length": float(np.mean(controlled)), "equal_length_lowest": min(controlled),
                         "equal_length_highest": max(controlled), "posts": len(runs[0]), "seeds": len(runs)})
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
    raw.legend(frameon=False, loc="upper left")
    save_figure(figure, path)


def caption_preference(measured):
    rows, facts = measured["tables"]["preference"], measured["facts"]
    by = {(r["size"], r["policy"]): r for r in rows}
    largest = list(dict.fromkeys(r["size"] for r in rows))[-1]
    sft, ppo = by[largest, "sft"], by[largest, "ppo"]
    return (f"In the paper human feedback lies above supervised training, and supervised above pretrained, at every size; curves rise with "
            f"size; only human feedback passes 50 % (61 % at 1.3B, about 70 % at 6.7B, some 5 points less at equal length). Ours, largest "
            f"size: SFT {percent(sft, 'preferred')}, PPO {percent(ppo, 'preferred')}; at equal length {sft['equal_length']:.0%} and "
            f"{ppo['equal_length']:.0%}. Gold judge, greedy decoding, ties count one half; {facts['posts']} posts, {facts['seeds']} seeds of "
            "comparisons, reward model and PPO; bars: 95 % bootstrap over posts and seeds on the left, lowest and highest seed on the right. "
            "Different from the paper: ours write less than the authors do, so length control moves them up, not down; and there is one "
            "pretrained and one SFT model per size, so their bars are over posts.")


# ---------------------------------------------------------------------------------------------------------------------
# Stiennon figure 3: the axes of quality

AXES = ("coverage", "accuracy", "coherence", "overall")


def measure_axes(lab):
    runs, rows = [read_samples(lab.finished(seed)) for seed in lab.seeds], []
    for policy in ("reference", "lead3", "pretrained", "sft", "ppo"):
        marks = [[world.axes(row["post"], row["policies"][policy]["text"]) for row in samples] for samples in runs]
        row = {"policy": policy}
        for axis in AXES:
            row |= row_of(axis, [[m[axis] for m in of_run] for of_run in marks])
        top = np.mean([[m["overall"] >= 6.5 for m in of_run] for of_run in marks])
        rows.append(row | {"overall_at_least_6_5": float(top), "posts": len(runs[0]), "seeds": len(runs)})
    return {"tables": {"axes": rows}, "facts": {"posts": rows[0]["posts"], "seeds": rows[0]["seeds"]}}


def draw_axes(measured, path):
    rows = measured["tables"]["axes"]
    figure, ((ax,),) = new_figure(width=8)
    for k, (row, colour) in enumerate(zip(rows, (GREEN, "#CC79A7", GREY, ORANGE, BLUE))):
        for i, axis in enumerate(AXES):
            bar(ax, i + .17 * (k - 2), row, axis, colour, .16, LABELS[row["policy"]].replace("\n", " ") if i == 0 else None)
    ax.set_xticks(range(len(AXES)), AXES)
    ax.set(ylabel="mean mark (1 to 7)", ylim=(1, 7.2))
    ax.legend(frameon=False, ncols=5, loc="lower center", bbox_to_anchor=(.5, 1), columnspacing=1, handlelength=1)
    save_figure(figure, path)


def caption_axes(measured):
    rows, facts = {r["policy"]: r for r in measured["tables"]["axes"]}, measured["facts"]
    gain = {axis: rows["ppo"][axis] - rows["sft"][axis] for axis in AXES}
    return (f"In the paper human feedback is ahead of supervised training on every axis, most of all on coverage. Ours: PPO over SFT by "
            + ", ".join(f"{gain[axis]:+.2f} in {axis}" for axis in AXES)
            + f"; overall marks of 6.5 and more: PPO {rows['ppo']['overall_at_least_6_5']:.0%}, SFT {rows['sft']['overall_at_least_6_5']:.0%}, "
            f"reference {rows['reference']['overall_at_least_6_5']:.0%} (the paper's 7 of 7: 45 %, 20 %, 23 %). The gold judge's marks, "
            f"{facts['posts']} posts, {facts['seeds']} seeds, 95 % bootstrap over posts and seeds. Different from the paper: accuracy and "
            "coherence are near 7 for whoever writes the world's own sentences.")


FIGURES = [
    Figure("preference", "Preference over the references by model size (Stiennon 2020, figure 1)", measure_preference, draw_preference,
           caption_preference, 9),
    Figure("axes", "Quality by axis (Stiennon 2020, figure 3)", measure_axes, draw_axes, caption_axes, 0.2),
    Figure("probes", "Probes of reward models (Stiennon 2020, tables 16 and 17)", probes.measure_probes, probes.draw_probes,
           probes.caption_probes, 1),
    Figure("agreement", "Who agrees with whom (Stiennon 2020, tables 20 and 22)", probes.measure_agreement, probes.draw_agreement,
           probes.caption_agreement, 1),
    Figure("copying", "Novelty, accuracy and where summaries copy from (Ziegler 2019, tables and pictures of copying)", probes.measure_copying,
           probes.draw_copying, probes.caption_copying, 8),
    Figure("critics", "The same labels without PPO, and judges who did not train it (asked by critics; InstructGPT 2022, section 4.1)",
           probes.measure_critics, probes.draw_critics, probes.caption_critics, 3),
    Figure("ladder", "Elo ladder of all policies, and who agrees with whom (Stiennon 2020, appendix C)", probes.measure_ladder,
           probes.draw_ladder, probes.caption_ladder, 1),
]


# ---------------------------------------------------------------------------------------------------------------------
# the command

def say(text):
    """A line for the person who waits; what the stages print goes to the log."""
    with contextlib.redirect_stdout(SCREEN) if SCREEN else contextlib.nullcontext():
        print(text, flush=True)


SCREEN = None  # the standard output while it is redirected


@contextlib.contextmanager
def stages_into(path):
    """What is printed within goes to a file, except by say()."""
    import sys
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
        path = os.path.join(out, f"{name}-{table}.csv")
        with open(path + ".tmp", "w", newline="") as f:
            writer = csv.DictWriter(f, list(dict.fromkeys(key for row in rows for key in row)))
            writer.writeheader()
            writer.writerows(rows)
        os.replace(path + ".tmp", path)


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
            markdown += [f"`{figure.name}-{table}.csv`", "", "| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
            markdown += ["| " + " | ".join(row) + " |" for row in cells] + [""]
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


def minutes(seconds):
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


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


def command(argv):
    parser = Parser(__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which figures (default all): {', '.join(f.name for f in FIGURES)}")
    parser.add_argument("--quick", action="store_true", help="small data and one seed: shows the machinery, not the findings")
    parser.add_argument("--seeds", help="seeds of comparisons, reward model and PPO (default 1,2,3; with --quick 1)")
    parser.add_argument("--out", help="folder of the figures (default out/figures, with --quick out/figures-quick)")
    parser.add_argument("--preset", choices=("tiny", "test"), default="tiny", help="preset of the runs; test is for tests")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default auto)")
    args = parser.parse_args(argv)
    known = {figure.name: figure for figure in FIGURES}
    for name in args.names:
        if name not in known:
            raise DataError(f"there is no figure {name!r}; there are {', '.join(known)}")
    try:
        seeds = [int(seed) for seed in (args.seeds or ("1" if args.quick else "1,2,3")).split(",")]
    except ValueError:
        raise DataError(f"--seeds must be whole numbers with commas between, found {args.seeds!r}") from None
    out = args.out or os.path.join("out", "figures-quick" if args.quick else "figures")
    open_lab_folder(out, {"preset": args.preset, "quick": args.quick, "seeds": seeds})
    draw_all(make_lab(out, seeds, args.quick, args.preset, args.device), [known[name] for name in args.names or known])


def draw_all(lab, figures):
    """Measure what is not measured yet, draw, and write the report of every figure that the folder holds."""
    left = sum(f.minutes for f in figures if load_measured(lab.out, f.name) is None)
    spent, planned = 0.0, 0.0
    for number, figure in enumerate(figures, 1):
        measured = load_measured(lab.out, figure.name)
        if measured is None:
            pace = spent / planned if planned else 60 * (0.2 if lab.quick else 1)
            say(f"[{number}/{len(figures)}] {figure.name}: {figure.title}; about {minutes(left * pace)} for all that is left")
            began = time.time()
            with stages_into(os.path.join(lab.out, "log.txt")):
                measured = figure.measure(lab)
            measured["seconds"] = time.time() - began
            write_atomic(os.path.join(lab.out, figure.name + ".json"), json.dumps(measured, indent=1))
            spent, planned, left = spent + measured["seconds"], planned + figure.minutes, left - figure.minutes
        else:
            say(f"[{number}/{len(figures)}] {figure.name}: measured before, {figure.name}.json")
        save_tables(lab.out, figure.name, measured["tables"])
        figure.draw(measured, os.path.join(lab.out, figure.name + ".png"))
        say("    " + figure.caption(measured))
    report(lab.out, [(f, m) for f in FIGURES for m in [load_measured(lab.out, f.name)] if m])
    say(f"report in {os.path.join(lab.out, 'report.html')}, {minutes(spent)}")


def main(argv):
    run_main(partial(command, argv))


