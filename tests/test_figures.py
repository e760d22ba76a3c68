"""figures.py: its statistics against planted truth, and every figure end to end on the test preset."""
import csv
import dataclasses
import json
import math
import os
import random
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from filelock import Timeout

import evaluation
import figures
import world
from data import DataError, one_at_a_time
from evaluation import crossed_ci
from run import preset
from sft import seed_list


def test_gao_forms_recover_what_was_planted():
    """Catches a wrong sign, d taken for KL, the two forms mixed up: gains computed from the paper's formulas in plain Python."""
    kl = [.3, 1., 2.5, 6., 14., 30.]
    planted = {"ppo": lambda d: d * (1.7 - .6 * math.log(d)), "best_of_n": lambda d: d * (1.7 - .6 * d)}
    for form, gain in planted.items():
        y = [gain(math.sqrt(x)) for x in kl]
        assert figures.fit_gao(kl, y, form) == pytest.approx((1.7, .6, 0), abs=1e-9)
        assert figures.gao_terms(kl, form) @ [1.7, .6] == pytest.approx(y)
        noise = [.1, -.1, .1, -.1, .1, -.1]
        assert 0 < figures.fit_gao(kl, np.add(y, noise), form)[2] <= .1  # root mean square, not the sum


def test_columns_of_a_table_are_over_posts_and_seeds():
    """Catches seeds taken for posts."""
    values = np.random.default_rng(0).normal(size=(3, 40))
    seeds, posts = np.repeat(range(3), 40), np.tile(range(40), 3)
    row = figures.row_of({"x": values, "one": values[:1]})
    assert (row["x"], [row["x_low"], row["x_high"]]) == (pytest.approx(values.mean()), crossed_ci(values.ravel(), posts, seeds))
    assert [row["one_low"], row["one_high"]] == crossed_ci(values[0], range(40), [0] * 40)
    row = figures.row_of({"kl": np.zeros((3, 40))}, choices=False) | figures.row_of({"gold": np.zeros((3, 40))})
    assert (row["kl_low"], row["kl_high"]) == (0, 0) and row["gold_high"] > .05  # a measure that is 0 everywhere; choices that are all alike


def test_points_per_doubling_recover_what_was_planted():
    """Catches slopes per unit, natural logarithms, data and size mixed up, the error of a spread instead of a mean."""
    rows = [{"comparisons": n, "parameters": p, "accuracy": .5 + .011 * math.log2(n) + .018 * math.log2(p)}
            for n in (200, 900, 15000) for p in (2e5, 9e5)]
    assert figures.slopes(rows) == pytest.approx([.011, .018])
    assert figures.mean_se([1., 2., 3.]) == pytest.approx((2, 1 / math.sqrt(3))) and figures.mean_se([4.]) == (4, None)


def test_what_a_curve_is_made_of():
    """Catches preference the wrong way round: labelers by asking many times, prediction and gold by hand."""
    post = world.make_posts(1, 3, "x")[0]
    text = "my {relation} {name} {verb} my {object}.".format(**post["facts"])
    labeler = world.Labeler(noise=2., seed=1)
    asked = np.mean([labeler.compare(post, text, post["summary"])[0] == 0 for _ in range(6000)])
    marks = figures.judged(labeler, [post] * 2, [text, post["summary"]], [1., 3.], [0., 3.])
    assert marks["labelers"] == pytest.approx([asked, .5], abs=.02) and abs(asked - .5) > .05
    assert marks["predicted"] == pytest.approx([1 / (1 + math.exp(-1)), .5]) and marks["score"] == [1., 3.]
    u = [world.utility(post, text), world.utility(post, post["summary"])]
    assert marks["utility"] == u and marks["gold"] == [float(u[0] > u[1]), .5]
    assert figures.powers_of_2(64) == [1, 2, 4, 8, 16, 32, 64]


def test_where_the_curve_turns():
    """Catches the peak of another curve than gold's, and a turn claimed where gold does not fall or the prediction does not rise."""
    def rows(gold, predicted):
        other = dict.fromkeys(("kl", "labelers", "utility", "score"), .5)
        return [{"iteration": i, **other, "gold": g, "predicted": p} for i, (g, p) in enumerate(zip(gold, predicted))]

    def says(*curves, low=.1):
        facts = figures.turn(rows(*curves)) | dict.fromkeys(("posts", "posts_best_of_n", "seeds", "comparisons", "posts_compared",
                                                             "temperature", "drop", "drop_high"), 1) | {"drop_low": low}
        fits = [{"curve": c, "gain": "utility", "alpha": 1., "beta": 1.} for c in ("ppo", "best_of_n")]
        return re.search(r"the turn (.*?)\. \(The best", figures.caption_overoptimization({"facts": facts, "tables": {"fits": fits}}))[1]
    facts = figures.turn(rows([.3, .6, .4], [.2, .7, .9]))
    assert [facts[k] for k in ("peak_iteration", "peak_gold", "peak_predicted", "last_iteration", "last_gold")] == [1, .6, .7, 2, .4]
    assert says([.3, .6, .4], [.2, .7, .9]) == "shows" and "not yet" in says([.3, .6, .4], [.2, .7, .9], low=-.1)
    assert {says([.3, .6, .4], [.2, .7, .6]), says([.3, .4, .6], [.2, .7, .9]), says([.6, .4, .3], [.2, .7, .9])} == {"does not show here"}


# --- figures 1 to 6 end to end; those of probes.py have their own tests

MINE = ["preference", "axes", "transfer", "overoptimization", "reward_scaling", "best_of_n"]
FIGURES = [figure for figure in figures.FIGURES if figure.name in MINE]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """The figures on the test preset, one seed."""
    out = tmp_path_factory.mktemp("figures") / "out"
    figures.main([*MINE, "--preset", "test", "--seeds", "1", "--out", str(out), "--device", "cpu", "--jobs", "1"])
    return out


def test_every_figure_is_there(lab):
    """Catches a figure that is not drawn, a table without its CSV, a report that needs a network or other files."""
    page, text = (lab / "report.html").read_text(), (lab / "report.md").read_text()
    assert page.count("src='data:image/png;base64,") == len(MINE) == page.count("<h2 id=")
    assert not re.search(r"https?://|<script|<link|src=[\"'](?!data:)", page)
    for figure in FIGURES:
        measured = json.loads((lab / f"{figure.name}.json").read_text())
        assert (lab / f"{figure.name}.png").read_bytes()[:4] == b"\x89PNG" and f"]({figure.name}.png)" in text
        assert re.search(r"figure \d", figure.title) and figure.title in text and figure.caption(measured) in text
        for table, rows in measured["tables"].items():
            with open(lab / f"{figure.name}-{table}.csv", newline="") as f:
                written = list(csv.DictReader(f))
            assert [{k: "" if v is None else str(v) for k, v in row.items()} for row in rows] == written and len(rows) > 1


def numbers(text):
    return [float(x) for x in re.findall(r"\d+(?:\.\d+)?", text)]


@pytest.mark.parametrize("name, table, keys", [
    ("preference", "preference", {"preferred": ".0%", "equal_length": ".0%"}), ("axes", "axes", {"overall_at_least_6_5": ".0%"}),
    ("transfer", "transfer", {"overall": ".2f"}), ("overoptimization", "fits", {"alpha": ".2f"}),
    ("best_of_n", "best_of_n", {"gold": ".0%"})])
def test_captions_say_what_the_tables_say(lab, name, table, keys):
    """Catches a number written into a caption by hand: planted into the table, it must come out of the caption."""
    figure = next(f for f in figures.FIGURES if f.name == name)
    measured = json.loads((lab / f"{name}.json").read_text())
    for what in ("seeds", "posts"):
        assert f"{measured['facts'][what]} {what}" in figure.caption(measured)
    assert not re.search(r"95 % over posts and[a-zA-Z,' ]* seeds", figure.caption(measured))  # there is one
    more = figure.caption({**measured, "facts": {**measured["facts"], "seeds": 3}})
    assert re.search(r"95 % over posts and[a-zA-Z,' ]* seeds", more)
    for key, form in keys.items():
        rng = random.Random(0)
        for row in measured["tables"][table]:
            row[key] = rng.randint(100, 999) / 1000 if form == ".0%" else rng.randint(100, 999) / 100
        shown = sum(format(row[key], form) in figure.caption(measured) for row in measured["tables"][table])
        assert shown >= (2 if name != "axes" else 3), key


def test_facts_are_what_the_tables_say(lab):
    """Catches a caption's fact that is of another row than it says: the peak, the end, the judge's neighbours."""
    measured = json.loads((lab / "overoptimization.json").read_text())
    rows, f = measured["tables"]["ppo"], measured["facts"]
    assert rows[0]["kl"] == 0 and [r["iteration"] for r in rows] == [0, 1, 2]
    assert f["peak_gold"] == max(r["gold"] for r in rows)
    assert f["last_predicted"] == rows[-1]["predicted"] and f["last_kl"] == rows[-1]["kl"]
    seeds = measured["tables"]["seeds"]
    assert rows[1]["kl"] == pytest.approx(np.mean([s["kl"] for s in seeds if s["iteration"] == 1]))
    measured = json.loads((lab / "reward_scaling.json").read_text())
    rows, f = measured["tables"]["reward"], measured["facts"]
    assert f["per_doubling_of_data"] == pytest.approx(figures.slopes(rows)[0]) and f["largest"] == rows[-1]["accuracy"]
    caption = next(x for x in figures.FIGURES if x.name == "reward_scaling").caption(measured)
    assert f"{100 * f['per_doubling_of_size']:+.2f}" in caption and "no standard error" in caption and f"{f['noise_free_judge']:.1%}" in caption


def test_measured_once_and_drawn_from_what_was_measured(lab, monkeypatch, capsys):
    """Catches a figure measured twice, or drawn from runs: with the runs away pictures come back; only what is missing is measured."""
    before = (lab / "axes.png").read_bytes()
    (lab / "axes.png").unlink()
    os.rename(lab / "runs", lab / "elsewhere")
    try:
        figures.main(["axes", "preference", "--preset", "test", "--seeds", "1", "--out", str(lab), "--device", "cpu"])
    finally:
        os.rename(lab / "elsewhere", lab / "runs")
    assert (lab / "axes.png").read_bytes() == before and "measured before" in capsys.readouterr().out
    (lab / "axes.json").unlink()
    changed = {file: file.stat().st_mtime_ns for file in (lab / "runs").rglob("model.safetensors")}
    figures.main(["axes", "--preset", "test", "--seeds", "1", "--out", str(lab), "--device", "cpu"])  # its runs are there
    assert changed == {file: file.stat().st_mtime_ns for file in (lab / "runs").rglob("model.safetensors")} and (lab / "axes.json").exists()


def test_a_stop_before_the_picture(tmp_path, monkeypatch):
    """Catches a report that trips over a figure measured but not drawn, or drawn in half: what is missing is drawn."""
    def draw(measured, path):
        with open(path, "wb") as f:
            f.write(b"\x89PNG")
            if measured["facts"]["stop"] and not stopped:
                stopped.append(path)
                raise KeyboardInterrupt
            f.write(b" whole")
    stopped = []
    mine = [figures.Figure(name, name, lambda lab, stop=stop: {"tables": {"t": [{"x": 1}]}, "facts": {"stop": stop}}, draw,
                           lambda measured: "caption", 1) for name, stop in (("one", True), ("two", False))]
    monkeypatch.setattr(figures, "FIGURES", mine)
    lab = SimpleNamespace(out=str(tmp_path), quick=True, jobs=1)
    with pytest.raises(KeyboardInterrupt):
        figures.draw_all(lab, mine[:1])
    assert (tmp_path / "one.json").exists() and not (tmp_path / "one.png").exists()
    (tmp_path / "one-t.csv").unlink()
    figures.draw_all(lab, mine[1:])
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes() == b"\x89PNG whole"
    assert (tmp_path / "one-t.csv").exists() and (tmp_path / "report.html").read_text().count("data:image/png") == 2


def test_the_kl_of_no_update_has_no_width(lab):
    """Catches a measure that is 0 everywhere taken for choices that all went one way."""
    first, *_, last = json.loads((lab / "overoptimization.json").read_text())["tables"]["ppo"]
    assert (first["kl"], first["kl_low"], first["kl_high"]) == (0, 0, 0) and last["kl_low"] < last["kl"] < last["kl_high"]


def test_a_run_is_made_by_one_process(tmp_path, monkeypatch):
    """Catches a run made without its lock: two figures that ask for the same would write into one folder."""
    def pipeline(settings, seed, folder, *args, **more):
        with pytest.raises(Timeout):
            one_at_a_time(folder).acquire(timeout=0)
        made.append(folder)
    made = []
    monkeypatch.setattr(figures, "run_pipeline", pipeline)
    lab = figures.make_lab(str(tmp_path), preset_name="test")
    assert made == [lab.base()]
    one_at_a_time(made[0]).acquire(timeout=0)  # and lets go of it


def test_one_figure_alone_takes_all_threads(monkeypatch):
    """Catches a single figure sent to a process of half the threads."""
    monkeypatch.setattr(figures, "measure", lambda lab, figure: f"{figure} measured here")
    assert list(figures.measure_all(SimpleNamespace(jobs=2), ["one"])) == [("one", "one measured here")]
    assert list(figures.measure_all(SimpleNamespace(jobs=2), [])) == []


def test_what_a_run_stands_on(tmp_path, monkeypatch):
    """Catches labels of PPO's samples taken over from a run whose PPO was another, and a language model or labels made twice."""
    def pipeline(settings, seed, folder, name, base, **more):
        made[os.path.basename(folder)] = os.path.basename(base or "")
    made = {}
    monkeypatch.setattr(figures, "run_pipeline", pipeline)
    lab = figures.make_lab(str(tmp_path), preset_name="test")
    lab.finished(2, **{"sft.lr": 1e-5, "collect.posts": 9, "ppo.beta": 0.1})
    lab.finished(2, **{"collect.rounds": 2, "ppo.beta": 0.1})
    assert made == {"default": "", "default-sft.lr=1e-05": "default", "default-seed2-collect.posts=9-sft.lr=1e-05": "default-sft.lr=1e-05",
                    "default-seed2-ppo-collect.posts=9-ppo.beta=0.1-sft.lr=1e-05": "default-seed2-collect.posts=9-sft.lr=1e-05",
                    "default-seed2-ppo-collect.rounds=2-ppo.beta=0.1": "default"}


def test_two_figures_at_a_time(lab, tmp_path):
    """Catches a run made twice for two figures, and a failure that takes others with it: the transfer figure finds a stranger's folder
    where its base should be."""
    stranger = tmp_path / "runs" / "medium-data.news=0.25"
    shutil.copytree(lab / "runs" / "small", stranger)
    with pytest.raises(DataError, match="medium-data.news=0.25"):
        figures.main(["axes", "curves", "transfer", "--preset", "test", "--seeds", "1", "--out", str(tmp_path), "--base",
                      str(lab / "runs" / "default"), "--device", "cpu", "--jobs", "2"])
    log = (tmp_path / "axes.log").read_text() + (tmp_path / "curves.log").read_text()
    assert log.count("] ppo: PPO") == log.count("] evaluation: Summaries") == 1 and log.count("] ppo: done before") == 1
    assert (tmp_path / "axes.png").exists() and (tmp_path / "curves.png").exists() and not (tmp_path / "transfer.json").exists()
    assert (tmp_path / "report.html").read_text().count("data:image/png") == 2  # of what there is


def test_one_base_and_seeds_above_it(lab):
    """Catches a seed that makes its own language model, or shares comparisons that it should collect itself."""
    files = {path.parent.parent.name: path.read_bytes() for path in (lab / "runs").glob("default*/sft/model.safetensors")}
    assert len(files) == 5 and len(set(files.values())) == 1
    weak, strong = ((lab / "runs" / name / "comparisons.jsonl").read_text().splitlines() for name in
                    ("default-seed1-collect.posts=8", "default-seed1"))
    posts = [{json.loads(line)["info"]["id"] for line in lines if json.loads(line)["split"] == "train"} for lines in (weak, strong)]
    assert posts[0] < posts[1] and len(posts[0]) == 8
    few = {path.name for path in (lab / "runs").glob("*-comparisons-of-*")}  # of all posts the default size's is the seed's own reward model
    assert {f"default-seed1-comparisons-of-{n}-posts" for n in (4, 16)} & few == {"default-seed1-comparisons-of-4-posts"}
    assert "small-seed1-comparisons-of-16-posts" in few


def test_bad_options_are_one_sentence(lab, tmp_path):
    for argv, says in ((["nothing"], "no figure 'nothing'"), (["--seeds", "a"], "whole numbers"), (["--seeds", "-1"], "whole numbers"), (["--jobs", "0"], "1 or more"),
                       (["--out", str(lab), "--preset", "test", "--seeds", "2"], "was made with seeds")):
        with pytest.raises(DataError, match=says):
            figures.main(argv + ([] if "--out" in argv else ["--out", str(tmp_path / "x")]))
    assert not (tmp_path / "x").exists()
    assert seed_list("2,1,2") == [2, 1]  # one seed twice would be two that agree
    (tmp_path / "axes.json").write_text("{")
    with pytest.raises(DataError, match="axes.json is damaged"):
        figures.load_measured(str(tmp_path), "axes")


def test_a_base_of_another_seed_is_refused(lab, tmp_path):
    """Catches sizes that do not share posts and tokenizer: with a base of another seed the default size alone would have its."""
    def command(seeds):
        figures.main(["axes", "--preset", "test", "--seeds", seeds, "--out", str(tmp_path / "x"), "--base", str(lab / "runs" / "default")])
    with pytest.raises(DataError, match=r"is a run of seed 1 and the first of --seeds is 2.*this seed first"):
        command("2,1")
    assert not (tmp_path / "x").exists()
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "axes.json").write_text((lab / "axes.json").read_text())  # nothing is left to be measured
    command("1,2")


def test_a_base_with_nothing_to_take_over_is_refused(lab, tmp_path):
    """Catches a base whose posts are others, or fewer than are labelled: everything would silently be trained again."""
    shutil.copytree(lab / "runs" / "default", tmp_path / "base")
    file = tmp_path / "base" / "config.json"
    config = json.loads(file.read_text())
    for part, key, value, says in (("data", "test", 99, "--data.test 12` makes one"), ("collect", "posts", 15, "run.py --collect.posts 16`"),
                                   ("sft", "lr", .5, r"run.py --sft.lr \S+` makes one"), ("collect", "posts", 17, None)):
        file.write_text(json.dumps(config | {"settings": config["settings"] | {part: config["settings"][part] | {key: value}}}))
        if says:
            with pytest.raises(DataError, match=says):
                figures.main(["axes", "--preset", "test", "--seeds", "1", "--out", str(tmp_path / "x"), "--base", str(tmp_path / "base")])
        else:
            figures.check_base(figures.make_lab(str(tmp_path / "x"), [1], preset_name="test", given=str(tmp_path / "base")))
    file.write_text(json.dumps(config | {"posts": "posts.jsonl"}))  # of a file, with the same settings
    with pytest.raises(DataError, match="`python run.py` makes one"):
        figures.check_base(figures.make_lab(str(tmp_path / "x"), [1], preset_name="test", given=str(tmp_path / "base")))
    assert not (tmp_path / "x").exists()


def test_the_band_of_healthy_curves(tmp_path, monkeypatch):
    """Catches a band that is not the lowest and highest seed's, a run drawn without it or without its legend, and a run of other settings
    or on files drawn with it."""
    logs = {seed: [{"step": i, **{key: seed + i * .5 for key, _ in evaluation.PPO_CURVES}} for i in range(3)] for seed in (1, 2, 6)}
    s = preset("tiny")
    s.collect.held_out_posts, s.evaluation.best_of = 250, 1  # as the laboratory has them: nothing is trained on these
    config = {"preset": "tiny", "seed": 1, "base": None, "posts": None,
              "settings": {k: dataclasses.asdict(v) for k, v in vars(s).items()}}
    monkeypatch.setattr(figures, "read_metrics", lambda folder: logs[int(folder.split("/")[0])])
    monkeypatch.setattr(figures, "open_run", lambda folder: SimpleNamespace(config=config))
    measured = figures.measure_curves(SimpleNamespace(seeds=[1, 2, 6], finished=str))
    rows = measured["tables"]["curves"]
    assert len(rows) == 3 * len(evaluation.PPO_CURVES)
    assert rows[1] == {"curve": "score", "step": 1, "mean": 3.5, "low": 1.5, "high": 6.5, "seeds": 3}
    assert "reward model's score 3.00 to 4.00" in figures.caption_curves(measured)
    monkeypatch.setattr(evaluation, "HEALTHY", str(tmp_path / "docs.json"))
    default = {**config, "seed": 7, "settings": {k: dataclasses.asdict(v) for k, v in vars(preset("tiny")).items()}}
    assert evaluation.healthy_band(default) == []
    (tmp_path / "docs.json").write_text(json.dumps(measured))
    assert evaluation.healthy_band(default) == rows
    for stage, key, value in (("ppo", "beta", .5), ("ppo", "iterations", 13), ("model", "n_embd", 64), ("pretrain", "lr", 1e-3),
                              ("collect", "noise", 1.), ("reward", "epochs", 2)):
        other = {**default["settings"], stage: {**default["settings"][stage], key: value}}
        assert evaluation.healthy_band({**default, "settings": other}) == [], (stage, key)
    assert evaluation.healthy_band({**default, "posts": "posts.jsonl"}) == []
    drawn = []
    monkeypatch.setattr(evaluation, "save_figure", lambda figure, path: drawn.append(figure.axes[0]))
    for run, band in ((logs[1], rows), (logs[1], []), ([], rows)):
        evaluation.draw_curves(run, band, "a.png")
    grey = ["3 seeds, lowest to highest", "their mean"]
    assert [ax.get_legend() and [x.get_text() for x in ax.get_legend().get_texts()] for ax in drawn] == [grey + ["this run"], None, grey]


def test_the_report_explains_the_band(lab, monkeypatch, tmp_path):
    """Catches a grey band that nobody explains, and an explanation without one."""
    folder = str(shutil.copytree(lab / "runs" / "default-seed1-ppo", tmp_path / "run"))
    monkeypatch.setattr(evaluation, "HEALTHY", str(tmp_path / "docs.json"))
    texts = []
    for name in ("win_rates", "reward", "training", "curves"):
        monkeypatch.setattr(evaluation, "draw_" + name, lambda *args: None)
    for _ in range(2):
        evaluation.write_report(folder)
        texts.append((tmp_path / "run" / "report" / "report.md").read_text())
        facts = {"trained_by": evaluation.trained_by(evaluation.open_run(folder).config)}
        band = [{"curve": "kl", "step": i, "mean": 1., "low": 0., "high": 2., "seeds": 5} for i in range(2)]
        (tmp_path / "docs.json").write_text(json.dumps({"tables": {"curves": band}, "facts": facts}))
    assert ["Grey in the last picture: what the same settings gave with 5 seeds" in text for text in texts] == [False, True]


def test_the_kept_band_is_of_the_default_preset():
    """Catches a band in docs/ that no default run would be drawn over, since a setting has changed: measure it again."""
    settings = {k: dataclasses.asdict(v) for k, v in vars(preset("tiny")).items()}
    assert bool(evaluation.healthy_band({"settings": settings})) == os.path.exists(evaluation.HEALTHY)
