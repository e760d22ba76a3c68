"""The mock labeler: its loss, what it reads, that it always takes the best, and a whole run whose labels are its choices."""
import itertools
import json
import math
import random

import numpy as np
import pytest
import torch
from conftest import tiny_model
from torch.utils.flop_counter import FlopCounterMode

import data
import estimate
import evaluation
import reward
import run
import sentiment
from data import DataError
from sft import load_model, open_run, read_metrics

PLAIN = "the dog and cat ran to my house all day".split()


def sentence(rng, label, n=6):
    words = rng.choices(PLAIN, k=n)
    words[rng.randrange(n)] = "good" if label else "bad"
    return " ".join(words)


@pytest.fixture(scope="module")
def tsv(tmp_path_factory):
    file, rng = tmp_path_factory.mktemp("labels") / "sentences.tsv", random.Random(1)
    file.write_text("".join(f"{sentence(rng, i % 2)}\t{i % 2}\n" for i in range(400)))
    return str(file)


def log_odds(model, ids):
    """Of one row, by the plain forward pass: EOS, then the row."""
    with torch.no_grad():
        return model.scores(torch.tensor([[model.config.eos] + ids]), torch.tensor([len(ids) + 1])).item()


# ---------------------------------------------------------------------------------------------------------------------
# the loss and the classifier

def test_log_odds_loss_by_hand():
    """Catches a sign, a label that counts for the other side, a sum for the mean: minus the log of the probability of just these labels."""
    scores, labels = torch.tensor([2., -1., .5], dtype=torch.float64, requires_grad=True), [1, 0, 0]
    chance = {way: math.prod(math.exp(s * l) / (1 + math.exp(s)) for s, l in zip(scores.tolist(), way))
              for way in itertools.product((0, 1), repeat=3)}
    assert sum(chance.values()) == pytest.approx(1)
    loss = sentiment.log_odds_loss(scores, torch.tensor(labels))
    assert loss.item() == pytest.approx(-math.log(chance[1, 0, 0]) / 3)
    assert loss.item() == pytest.approx((.126928 + .313262 + .974077) / 3, abs=1e-5)
    loss.backward()
    probability = 1 / (1 + np.exp(-scores.detach().numpy()))
    np.testing.assert_allclose(scores.grad.numpy(), (probability - labels) / 3)
    assert sentiment.log_odds_loss(torch.tensor([500., -500.]), torch.tensor([0, 1])).item() == 500  # nothing overflows


def test_rows_are_the_ends_of_texts_as_sst2_writes_them(enc):
    same = [sentiment.encode(enc, text, 50) for text in ("My DOG wasn't good.", "my dog wasn ' t good .", "  my dog\nwasn 't good  .")]
    assert same[0] == same[1] == same[2] and enc.decode(same[0]) == " my dog wasn ' t good .<|endoftext|>"
    assert sentiment.encode(enc, "My DOG wasn't good.", 5) == same[0][-5:]  # the continuation is at the end
    assert sentiment.encode(enc, "", 5)[-1] == enc.n_vocab - 1


def test_sentences_are_tested_on_or_trained_on(enc, tmp_path):
    """Catches a sentence on both sides: one that comes twice, or in other letters."""
    file = tmp_path / "s.tsv"
    lines = "".join(f"my dog ate {'cat ' * i}{'!' * (i % 7)}\t{i % 2}\n" for i in range(40))
    file.write_text(lines * 2 + "My dog ate!\t1\nmy dog ate !\t1\n")
    held_out, train = sentiment.split_sentences(str(file), enc, 80, 1)
    assert len(held_out) == 4 and len(train) == 37 and not {ids for ids, _ in held_out} & {ids for ids, _ in train}
    assert sentiment.split_sentences(str(file), enc, 80, 2)[0] != held_out
    positive = "".join(f"{'b' * i}\t1\n" for i in range(1, 40))
    for text, says in ((positive, "some of them positive"), ("a\t1\nb\t0\n", "2 different")):
        file.write_text(text)
        with pytest.raises(DataError, match=says):
            sentiment.split_sentences(str(file), enc, 80, 1)


def test_the_classifier_learns_and_resumes_bit_for_bit(enc, tsv, tmp_path, monkeypatch):
    """Positive is above 0 on sentences that were not trained on; two stretches of training are one."""
    held_out, train = sentiment.split_sentences(tsv, enc, 39, 1)
    s = reward.RewardSettings(lr=5e-3, batch=16, epochs=2, warmup=2)
    model = tiny_model("scalar", vocab_size=enc.n_vocab)
    sentiment.train_labeler(model, train, s, str(tmp_path / "whole"), 1)
    assert np.mean([(log_odds(model, list(ids)) > 0) == label for ids, label in held_out]) > .9
    losses = [row["loss"] for row in read_metrics(tmp_path / "whole")]
    assert len(losses) == 2 * (360 // 16) and losses[0] == pytest.approx(math.log(2), abs=.5)
    calls, real = [], sentiment.log_odds_loss

    def stop(*args):
        calls.append(1)
        if len(calls) == 30:
            raise KeyboardInterrupt
        return real(*args)
    with monkeypatch.context() as m:
        m.setattr(sentiment, "log_odds_loss", stop)
        with pytest.raises(KeyboardInterrupt):
            sentiment.train_labeler(tiny_model("scalar", vocab_size=enc.n_vocab), train, s, str(tmp_path / "parts"), 1, save_every=10)
    again = tiny_model("scalar", seed=5, vocab_size=enc.n_vocab)
    sentiment.train_labeler(again, train, s, str(tmp_path / "parts"), 1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    assert [row["loss"] for row in read_metrics(tmp_path / "parts")] == losses


def test_the_labeler_takes_the_best_of_excerpt_and_continuation(enc):
    """Catches the worst for the best, and a labeler that reads the continuation without its excerpt or in another order."""
    labeler, tops, rng = sentiment.MockLabeler(enc, tiny_model("scalar", vocab_size=enc.n_vocab)), set(), random.Random(2)
    for _ in range(12):
        post, texts = {"post": sentence(rng, 0) + "."}, [sentence(rng, k % 2, 2 + k) for k in range(4)]
        r = [log_odds(labeler.model, sentiment.encode(enc, post["post"] + " " + text, 39)) for text in texts]
        assert labeler.scores(post, texts) == pytest.approx(r, abs=1e-4)
        order = sorted(range(4), key=lambda i: -r[i])
        assert labeler.best_of(post, texts)[0] == order[0] and labeler.rank(post, texts)[0] == [order.index(i) for i in range(4)]
        assert [labeler.compare(post, texts[i], texts[j])[0] for i, j in ((order[0], order[1]), (order[3], order[2]))] == [0, 1]
        tops.add(order[0])
    assert len(tops) > 1


def test_what_the_mock_says_of_policies(enc, tmp_path):
    """Catches r_s of another post or policy, and a share of positive texts with its sign turned."""
    tiny_model("scalar", vocab_size=enc.n_vocab).save_pretrained(tmp_path / "mock")
    rng = random.Random(3)
    rows = [{"post": {"id": str(i), "post": sentence(rng, i % 2) + ".", "task": "sentiment", "summary": ""},
             "policies": {name: {"text": sentence(rng, 1), "score": 0., "kl": None, "length": 6, "eos": True}
                          for name in ("reference", "ppo")}} for i in range(5)]
    evaluation.ask_mock(str(tmp_path), enc, rows, "cpu")
    assert "mock" not in rows[0]["policies"]["ppo"]  # before there is a finished labeler
    (tmp_path / "mock" / "held_out.json").write_text("{}")
    evaluation.ask_mock(str(tmp_path), enc, rows, "cpu")
    model = load_model(str(tmp_path / "mock"), "cpu", "scalar")
    r = {name: [log_odds(model, sentiment.encode(enc, row["post"]["post"] + " " + row["policies"][name]["text"], 39)) for row in rows]
         for name in ("reference", "ppo")}
    measured = evaluation.measure_policies(rows)
    for name in r:
        assert [row["policies"][name]["mock"] for row in rows] == pytest.approx(r[name], abs=.05)  # where products are in bfloat16
        scores = [row["policies"][name]["mock"] for row in rows]
        assert measured[name]["mock_score"] == (pytest.approx(sum(scores) / 5), evaluation.bootstrap_ci(scores))
        assert measured[name]["mock_positive"] == pytest.approx(sum(1 / (1 + math.exp(-x)) for x in scores) / 5)
    header, table = evaluation.table_rows(measured)
    assert header[1:4] == ["log-odds of positive", "positive", "RM win rate"]
    assert table[0][2] == f"{measured['reference']['mock_positive']:.1%}"


# ---------------------------------------------------------------------------------------------------------------------
# the pipeline

@pytest.fixture(scope="module")
def finished(tmp_path_factory, tsv):
    """A run with Ziegler's choices, tiny: folder, settings, files."""
    folder, rng = tmp_path_factory.mktemp("mock"), random.Random(4)
    for name in "ab":
        (folder / f"{name}.txt").write_text("\n".join(sentence(rng, rng.randrange(2), 4) + "." for _ in range(2400)))
    settings = run.preset("test", {
        "data.task": "sentiment", "model.vocab_size": 300, "model.max_query": 64, "model.max_response": 24, "sft.epochs": 0,
        "collect.labels": "best_of", "collect.posts": 40, "collect.held_out_posts": 12, "reward.loss": "best_of",
        "reward.normalise": "gain_bias", "reward.lr": 2e-3,
        "ppo.stop_token": ".", "ppo.truncate_after": 4})
    files = {"text": [str(folder / f"{name}.txt") for name in "ab"], "labels": tsv}
    run.run_pipeline(settings, 1, str(folder / "out"), "test", device="cpu", **files)
    return folder / "out", settings, files


def test_a_whole_run_is_labelled_by_the_classifier(finished):
    """Each choice is the text of highest r_s, on samples of the initial policy; excerpts that are tested on were not trained on."""
    out, settings, _ = finished
    r, rows = open_run(str(out)), data.load_comparisons(str(out / "comparisons.jsonl"))[0]
    labeler = sentiment.MockLabeler(r.enc, load_model(str(out / "mock"), "cpu", "scalar"))
    posts = {split: {row["info"]["post"] for row in rows if row["split"] == split} for split in ("train", "valid")}
    assert 25 < len(posts["train"]) <= 40 and 3 < len(posts["valid"]) <= 12 and not posts["train"] & posts["valid"]
    assert posts["train"] <= {p["post"] for p in r.posts["collect"]} and not posts["valid"] & {p["post"] for p in r.posts["pretrain"]}
    for group in reward.group_texts(rows):
        winners = {group["responses"][better] for better, _ in group["pairs"]}
        assert winners == {group["responses"][labeler.best_of(group["query"], group["responses"])[0]]} and 2 <= len(group["responses"]) <= 4
    assert {s["policy"] for row in rows for s in row["summaries"]} == {"initial"} and {row["worker"] for row in rows} == {"mock"}
    m = json.loads((out / "mock" / "held_out.json").read_text())
    held_out, _ = sentiment.split_sentences(finished[2]["labels"], r.enc, labeler.model.config.n_positions - 1, 1)
    right = [(log_odds(labeler.model, list(ids)) > 0) == label for ids, label in held_out]
    assert m["accuracy"] == pytest.approx(np.mean(right), abs=.06) and m["n"] == 40  # where products are in bfloat16
    assert abs(m["accuracy"] - .5) > .15 and m["majority"] == max(np.mean([label == k for _, label in held_out]) for k in (0, 1))
    results = json.loads((out / "report" / "results.json").read_text())
    assert results["reward_model"]["mock"] == m and len(results["policies"]["ppo"]["mock_score"]) == 2
    assert evaluation.mock_text(m) in (out / "report" / "report.md").read_text()
    judged = evaluation.judge_policy(str(out), str(out / "ppo"), "cpu")  # python evaluation.py RUN --policy
    assert all("mock" in row["policies"]["ppo"] for row in judged)


def test_labels_depend_on_what_the_classifier_was_trained_with(finished):
    """Catches a base whose labels another classifier would not have given."""
    out, _, _ = finished
    config = json.loads((out / "config.json").read_text())
    other = json.loads(json.dumps(config))
    other["settings"]["reward"]["lr"] = 1.0
    names = [name for name, _, _ in run.STAGES]
    assert run.same_stages(str(out), config, config) == names and run.same_stages(str(out), config, other) == names[:3]
    human = [{**c, "labels": "labels.json"} for c in (config, other)]  # people label as they do
    assert run.same_stages(str(out), *human) == names[:4]


@pytest.mark.parametrize("option, says", [
    ("noise", "always takes the best"), ("flipped", "always takes the best"), ("posts", None), ("labels", "reward.loss")])
def test_which_settings_of_the_collection_go_with_the_mock(finished, monkeypatch, option, says):
    out, settings, files = finished
    seen, value = [], {"noise": "2", "flipped": "true", "posts": "99", "labels": "rank"}[option]
    argv = ["run.py", "--preset", "ziegler", "--text", *files["text"], "--labels", files["labels"], f"--collect.{option}", value]
    monkeypatch.setattr("sys.argv", argv)
    monkeypatch.setattr(run, "run_pipeline", lambda *args, **more: seen.append((args[0].collect.posts, more["labels"])))
    if says is None:
        run.main()
        assert seen == [(99, files["labels"])]
    else:
        with pytest.raises(DataError, match=says):
            run.main()


def test_a_bad_file_is_refused_before_any_work(finished, tmp_path):
    _, settings, files = finished
    (tmp_path / "bad.tsv").write_text("a fine film\t1\na poor film\t2\n")
    with pytest.raises(DataError, match="bad.tsv:2: expected a sentence, a tab, and 0 or 1"):
        run.run_pipeline(settings, 1, str(tmp_path / "out"), "test", device="cpu", **files | {"labels": str(tmp_path / "bad.tsv")})
    assert not (tmp_path / "out" / "pretrained").exists()


def test_operations_of_the_labeler_are_those_done(enc):
    """Catches its training or its reading left out of the estimate: torch counts the operations."""
    model, s = tiny_model("scalar", n_embd=128, n_layer=4, n_positions=64), run.preset("tiny", {"reward.epochs": 2})
    row = [7] * 47
    with FlopCounterMode(display=False) as counter:
        for _ in range(2):
            reward.score_responses(model, [[10]], [[row] * 8])[0].sum().backward()
        with torch.no_grad():
            reward.score_responses(model, [[10]], [[row] * 4 * 6])  # 4 samples of 6 posts
    sizes = {"pretrain": 10**5, "sft": 10**4, "query": 32, "groups": 6, "responses": 30, "sampled": 6}
    without, with_it = (estimate.stages(s, model.config, 32, 16, {**sizes, **more}, "cpu")["collect"] for more in ({}, {"mock": 8 * 47}))
    assert .85 < counter.get_total_flops() / (with_it[1] - without[1]) < 1.2 and with_it[0] > without[0]
