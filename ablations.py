"""
The papers' ablations: runs that differ in a setting or two from a preset, on the same posts, in one resumable command.

References: Ziegler 2019 §2.2; Stiennon 2020 §4.3 and appendix G.1; InstructGPT 2022 §3.5, §4.2 and appendices C and E.

    python run.py ablations --list
    python run.py ablations                             # all of them, seeds 1, 2, 3 -> out/ablations/table.md and table.csv
    python run.py ablations kl-coefficient --seeds 1    # one of them; what another ablation or seed has done is kept

Every arm is an ordinary run in OUT/PRESET-seedN/CHANGES that takes over what it shares with the run "default" beside it (run.py --base):
one language model, SFT model and reward model per seed serve all arms that change PPO only. What is done is skipped; the same command
goes on where it stopped.
"""
import dataclasses
import json
import os
import re
import time
from typing import NamedTuple

import numpy as np

import world
from data import DataError, write_atomic
from evaluation import bootstrap_ci, greedy_texts, markdown_table, once, print_table, read_samples, reward_margins, save_csv, wins
from reward import split_comparisons
from run import preset, run_pipeline
from sft import Parser, encode_posts, epoch_folder, evaluate_lm, load_model, open_run, pick_device, read_metrics, seed_list


class Ablation(NamedTuple):
    name: str
    source: str  # paper and section
    found: str  # what the paper found
    arms: list  # {stage.setting: value} changes to the preset; the preset itself is every ablation's first arm, "default"
    more: str = ""  # what of MEASURES the table says beside win rate, KL and length
    preset: str = "tiny"


PTX = {"ppo.ptx_coef": 1.0, "ppo.ptx_ratio": 2}
SHORT = {"ppo.batch": 8, "ppo.iterations": 96, "ppo.minibatches": 1, "ppo.lr": 1e-4}  # as many episodes as tiny's, in shorter rollouts
ADAPTIVE = {"ppo.kl": "adaptive", **SHORT, "ppo.kl_horizon": 8}  # a horizon of 1 % of the episodes

ABLATIONS = [
    Ablation("value-network", "Stiennon 2020 G.1", "a value network of its own reaches a clearly higher reward than a shared one",
             [{"ppo.value": "shared"}]),
    Ablation("value-start", "Stiennon 2020 §3.4, G.1", "a network of its own lets the value function begin as the reward model",
             [{"ppo.value": "scratch"}]),
    Ablation("kl-coefficient", "Stiennon 2020 §4.3, InstructGPT 2022 appendix E",
             "light optimisation helps, too much makes summaries worse; 0 and 2 are both bad, 0.01 to 0.02 is best",
             [{"ppo.beta": beta} for beta in (0.0, 0.02, 0.2, 0.4)]),
    Ablation("reward-whitening", "Ziegler 2019, code", "on for the style tasks; a reproduction found shorter summaries and fewer wins",
             [{"ppo.whiten_rewards": True}]),
    Ablation("ptx", "InstructGPT 2022 §4.2, C.4", "the pretraining loss takes back what PPO loses on other text; raising β does not",
             [{**PTX, "ppo.ptx_coef": 0.25}, PTX, {"ppo.beta": 0.2}, {"ppo.beta": 0.4}], "pretraining"),
    Ablation("adaptive-kl", "Ziegler 2019 §2.2", "a proportional controller holds the KL at its target",
             [SHORT, {**ADAPTIVE, "ppo.kl_target": 3.0}], "kl"),
    Ablation("exact-kl", "none: the papers sample the KL", "the exact KL of each state has less noise than that of one sample",
             [{"ppo.kl_reward": "exact"}]),
    Ablation("shuffled-pairs", "InstructGPT 2022 §3.5", "shuffled comparisons overfit in one pass; all of a prompt's in one step do not",
             [{"reward.epochs": 3}, *({"reward.group": False, "reward.epochs": n} for n in (1, 3))], "reward"),
    Ablation("sft-epochs", "InstructGPT 2022 §3.5, C.1", "held-out loss turns up after one epoch; the reward model's score and people's "
             "ratings rise for longer", [{"sft.epochs": 16, "sft.dropout": 0.2, "sft.choose": "reward"}], "sft"),
    Ablation("batched-labels", "Ziegler 2019 §2.3, Stiennon 2020 §3.1", "labels on the latest policy's samples keep the reward model "
             "valid; batched is simpler than online", [{"collect.rounds": 2}, {"collect.rounds": 2, "collect.online": True}]),
]
QUICK = {"ppo.iterations": 2, "ppo.batch": 8, "ppo.ptx_ratio": 1, "reward.epochs": 2, "sft.epochs": 2,
         "collect.rounds": 2}  # at most so much with --quick


# ---------------------------------------------------------------------------------------------------------------------
# what the table says of an arm beside win rate, KL and length: (its folder, "sft" or "ppo", device) -> {column: number or list}

def pretraining_loss(folder, policy, device):
    """The alignment tax: -log π per token on unfiltered posts that no model has seen, tokens weighted as in pretraining."""
    def measure():
        run = open_run(folder)
        s = run.config["settings"]
        posts = world.make_posts(s["data"]["test"], run.config["seed"], "pretraining-held-out", 0.4)
        model = load_model(os.path.join(folder, policy), device)
        return evaluate_lm(model, *encode_posts(run.enc, posts, run.Q, run.R), s["pretrain"]["query_weight"])
    return {"pretraining loss": once(os.path.join(folder, policy, "pretraining_loss.json"), measure)}


def steered_kl(folder, policy, device):
    """Mean KL (exact, in nats per response) of the last fifth of PPO's iterations, and what an adaptive β made of its target."""
    if policy != "ppo":
        return {}
    rows, s = read_metrics(os.path.join(folder, "ppo")), open_run(folder).config["settings"]["ppo"]
    kl = float(np.mean([row["kl"] for row in rows[-max(1, len(rows) // 5):]]))
    target = {"KL / target": kl / s["kl_target"]} if s["kl"] == "adaptive" else {}
    return {"KL of the last fifth": kl, "last β": rows[-1]["beta"], **target}


def reward_fit(folder, policy, device):
    """Loss and accuracy of the trained reward model on the comparisons it was trained on, and on held-out ones."""
    def measure():
        run = open_run(folder)
        train, _, comparisons = split_comparisons(run.enc, os.path.join(folder, "comparisons.jsonl"), run.Q, run.R)
        model = load_model(os.path.join(folder, "reward"), device, "scalar")
        return [row["margin"] for row in reward_margins(model, train, comparisons)]
    with open(os.path.join(folder, "reward", "held_out.jsonl")) as f:
        held_out = [json.loads(line)["margin"] for line in f]
    sides = {"train": once(os.path.join(folder, "reward", "train_margins.json"), measure), "held-out": held_out}
    return {f"{side} {what}": value for side, margins in sides.items() for what, value in margin_fit(np.array(margins)).items()}


def margin_fit(margin):
    """Mean of -log σ(margin), and the share of comparisons on the right side."""
    return {"loss": float(np.logaddexp(0, -margin).mean()), "accuracy": float(wins(margin, 0 * margin).mean())}


def sft_epochs(folder, policy, device):
    """By epoch of SFT: held-out loss, the reward model's mean score of samples, and the gold win rate of greedy summaries."""
    if not os.path.exists(os.path.join(folder, "sft", "chosen.json")):
        return {}
    with open(os.path.join(folder, "sft", "chosen.json")) as f:
        chosen = json.load(f)

    def measure():
        run, by_epoch = open_run(folder), []
        posts = run.posts["valid"]
        references = [world.utility(p, p["summary"]) for p in posts]
        for epoch in chosen["losses"]:
            model = load_model(epoch_folder(os.path.join(folder, "sft"), epoch), device)
            mine = [world.utility(p, text) for p, text in zip(posts, greedy_texts(run, model, posts))]
            by_epoch.append(100 * float(wins(mine, references).mean()))
        return by_epoch
    return {"chosen epoch": float(chosen["epoch"]), "held-out loss by epoch": list(chosen["losses"].values()), "score by epoch":
            list(chosen["scores"].values()), "gold win rate by epoch": once(os.path.join(folder, "sft", "gold.json"), measure)}


MEASURES = {"pretraining": pretraining_loss, "kl": steered_kl, "reward": reward_fit, "sft": sft_epochs}


# ---------------------------------------------------------------------------------------------------------------------
# the arms

def label(changes):
    """The changes as the command line would have them; names the arm and its folder."""
    return ",".join(f"{key}={json.dumps(value).strip(chr(34))}" for key, value in changes.items()) or "default"


def arm_settings(ablation, changes, quick=False):
    """-> preset, its settings with the changes; with quick the test preset's, and a few steps of everything."""
    name = "test" if quick else ablation.preset
    return name, preset(name, {key: min(value, QUICK.get(key, value)) if quick else value for key, value in changes.items()})


def finished(folder, settings):
    """Whether a run with these settings has ended here; what was made with others run_pipeline refuses."""
    file = os.path.join(folder, "report", "results.json")
    if not os.path.exists(file):
        return False
    with open(file) as f:
        return json.load(f)["settings"]["settings"] == dataclasses.asdict(settings)


def plan(ablations, seeds, out, quick):
    """Every run that these ablations need, the default of each preset and seed first. -> {folder: (preset, settings, seed, base)}"""
    runs = {}
    for seed in seeds:
        for ablation in ablations:
            for changes in [{}, *ablation.arms]:
                name, settings = arm_settings(ablation, changes, quick)
                home = os.path.join(out, f"{name}-seed{seed}")
                runs[os.path.join(home, label(changes))] = name, settings, seed, os.path.join(home, "default") if changes else None
    return runs


# ---------------------------------------------------------------------------------------------------------------------
# the table

CAPTION = """# Ablations

Gold win rate, in percent: how often the gold judge prefers the policy's greedy summary of a held-out post to the author's (ties count
one half). ± is the standard deviation over seeds. Arms of one seed share the posts and all that their settings leave the same: "minus
default" is the mean difference over posts, paired by post, "from" and "to" its 95 % bootstrap interval over posts. That interval holds
for these very policies; what training again would change shows in "difference by seed". KL: nats per response from SFT. n: posts in
all."""


def measure_arm(folder, policy, more, device):
    """{"wins": 0, ½ or 1 of each post against its reference by the gold judge, column: number or list}"""
    rows = read_samples(folder)
    mine, references = ([world.utility(row["post"], row["policies"][name]["text"]) for row in rows] for name in (policy, "reference"))
    kl, length = (float(np.mean([row["policies"][policy][key] for row in rows])) for key in ("kl", "length"))
    return {"wins": wins(mine, references), "KL": kl, "length": length} | (MEASURES[more](folder, policy, device) if more else {})


def arm_row(arm, default):
    """One row of the table from {seed: measure_arm()} of an arm and of the default; a seed's arms are judged on the same posts.

    Rates and their differences are in percent; "sd" is the standard deviation over seeds. The difference to the default is a mean over
    posts, paired by post, with its 95 % bootstrap interval over posts."""
    def over_seeds(key, values):
        spread = np.std(values, ddof=1).item() if np.ndim(values) == 1 and len(values) > 1 else None
        return {key: np.mean(values, 0).tolist(), key + " sd": spread}
    seeds = sorted(set(arm) & set(default))
    rates = [100 * float(np.mean(arm[s]["wins"])) for s in seeds]
    paired = [100 * np.subtract(arm[s]["wins"], default[s]["wins"]) for s in seeds]
    low, high = bootstrap_ci(np.concatenate(paired), choices=False) or (None, None)
    row = {"seeds": seeds, "n": sum(map(len, paired)), **over_seeds("gold win rate", rates), "by seed": rates,
           "minus default": float(np.mean(np.concatenate(paired))), "from": low, "to": high,
           "difference by seed": [float(np.mean(d)) for d in paired]}
    for key in arm[seeds[0]]:
        row |= over_seeds(key, [arm[s][key] for s in seeds]) if key != "wins" else {}
    return row


def table(out, ablation, quick, device):
    """{arm: arm_row()'s row} of all that is finished under `out`: SFT before PPO, the default, the arms. Empty where no arm is."""
    seeds = {int(found[1]) for name in os.listdir(out) if (found := re.fullmatch(r".+-seed(\d+)", name))}
    measured = {}
    for name, changes, policy in [("SFT", {}, "sft"), ("default", {}, "ppo"), *((label(c), c, "ppo") for c in ablation.arms)]:
        start, settings = arm_settings(ablation, changes, quick)
        folders = {seed: os.path.join(out, f"{start}-seed{seed}", label(changes)) for seed in seeds}
        folders = {seed: folder for seed, folder in folders.items() if finished(folder, settings)}
        measured[name] = {seed: measure_arm(folder, policy, ablation.more, device) for seed, folder in folders.items()}
    rows = {name: arm_row(arm, measured["default"]) for name, arm in measured.items() if set(arm) & set(measured["default"])}
    return rows if len(rows) > 2 else {}


def text(value, form=".3g"):
    if isinstance(value, list):
        return " ".join(text(x, form) for x in value)
    return "–" if value is None else format(value, form) if isinstance(value, float) else str(value)


def write_tables(out, shown, quick, device):
    """table.md and table.csv of everything finished under `out`; prints the ablations named in `shown`."""
    page, lines = [CAPTION], []
    for a in ABLATIONS:
        rows = table(out, a, quick, device)
        if not rows:
            continue
        columns = [key for key in dict.fromkeys(key for row in rows.values() for key in row) if not key.endswith(" sd")]
        body = [[name] + [text(row.get(key)) + (" ± " + text(row[key + " sd"], ".2g") if row.get(key + " sd") is not None else "")
                          for key in columns] for name, row in rows.items()]
        page += ["", f"## {a.name}", "", f"{a.source}: {a.found}.", ""]
        page += markdown_table(["arm"] + columns, body)
        lines += [{"ablation": a.name, "arm": name} | {key: text(row[key], "") for key in row if row[key] is not None}
                  for name, row in rows.items()]
        if a.name in shown:
            print(f"\n{a.name} ({a.source}: {a.found})")
            print_table(["arm"] + columns, body)
    write_atomic(os.path.join(out, "table.md"), "\n".join(page) + "\n")
    save_csv(os.path.join(out, "table.csv"), lines)
    print(f"\ntables in {os.path.join(out, 'table.md')} and {os.path.join(out, 'table.csv')}")


# ---------------------------------------------------------------------------------------------------------------------
# the command

def main(argv):
    parser = Parser(__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="ablations to run (default all)")
    parser.add_argument("--seeds", default="1,2,3", help="seeds, with commas between them (default 1,2,3)")
    parser.add_argument("--out", help="folder of the runs and tables (default out/ablations, with --quick out/ablations-quick)")
    parser.add_argument("--quick", action="store_true", help="the test preset and a few steps: does it run? Its numbers mean nothing")
    parser.add_argument("--list", action="store_true", help="say what there is, and run nothing")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default auto)")
    args = parser.parse_args(argv)
    for name in args.names:
        if name not in (known := [ablation.name for ablation in ABLATIONS]):
            raise DataError(f"there is no ablation {name!r}; there are {', '.join(known)}")
    asked = [ablation for ablation in ABLATIONS if ablation.name in args.names or not args.names]
    if args.list:
        for a in asked:
            print(f"{a.name}  ({a.source}: {a.found})", *(f"    {label(changes)}" for changes in a.arms), sep="\n")
        return
    seeds = seed_list(args.seeds)
    out = args.out or os.path.join("out", "ablations-quick" if args.quick else "ablations")
    runs = plan(asked, seeds, out, args.quick)
    todo = {folder: run for folder, run in runs.items() if not finished(folder, run[1])}
    print(f"{len(runs)} runs, {len(runs) - len(todo)} of them done before")
    began = time.time()
    for done, (folder, (name, settings, seed, base)) in enumerate(todo.items()):
        left = f", about {(time.time() - began) / done * (len(todo) - done) / 60:.0f} minutes left" if done else ""
        print(f"\n=== {done + 1} of {len(todo)}{left}: {folder}", flush=True)
        run_pipeline(settings, seed, folder, name, base, device=args.device)
    write_tables(out, [ablation.name for ablation in asked], args.quick, pick_device(args.device))
