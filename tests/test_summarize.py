"""summarize.py: cutting by hand, the recursion with summarizers that would never end, and the command on a small run."""
import gzip
import os
import random
import subprocess
import sys

import pytest
import torch
from conftest import tiny_model

import summarize
from data import DataError, decode_response, encode_query, query_text
from reward import sample_responses
from sft import load_model

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def words(text):
    return len(text.split())


@pytest.mark.parametrize("text, room, parts", [
    ("a b c", 3, ["a b c"]),
    ("a b\n\nc d\n \ne f", 4, ["a b\n\nc d", "e f"]),  # the last paragraph's end that fits
    ("a\n\nb c. d e. f g h.", 5, ["a\n\nb c. d e.", "f g h."]),  # a paragraph's end that would leave more than half empty is passed over
    ("a b c d. e", 4, ["a b c d.", "e"]), ("a. b c d e f", 4, ["a. b c d", "e f"]), ("3.5 a b? c", 3, ["3.5 a b?", "c"])])
def test_cutting_by_hand(text, room, parts):
    assert summarize.split(text, words, room) == parts


def test_parts_fit_and_lose_nothing(enc):
    """Catches parts beyond the room, texts lost between them, and words or characters without end."""
    def tokens(text):
        return len(enc.encode_ordinary(text))
    rng = random.Random(0)
    texts = ["".join(rng.choice(["cat", "dog ", "a", ". ", "\n\n", " ", "😀", "! "]) for _ in range(400)).strip() for _ in range(12)]
    for text in texts + ["x" * 3000, "x" + " " * 9000 + "y", "漢" * 500, "a\n\n" * 300 + "b"]:
        for room in (4, 17, 60):
            parts = summarize.split(text, tokens, room)
            assert all(0 < tokens(part) <= room for part in parts) and "".join("".join(parts).split()) == "".join(text.split())
    with pytest.raises(DataError, match="no room"):
        summarize.split("漢", tokens, 2)


def test_the_tree_by_hand():
    """Catches summaries of other parts, parts in another order, groups that do not fit."""
    tree = summarize.summarize("a b c d e f g h i j", lambda texts: [t.split()[0] + " " + t.split()[-1] for t in texts], words, 4)
    assert tree["text"] == "a h\n\ni j"
    assert [p["text"] for p in tree["parts"]] == ["a d\n\ne h", "i j"] and tree["summary"] == "a j"
    assert [p["text"] for p in tree["parts"][0]["parts"]] == ["a b c d", "e f g h"]
    assert tree["parts"][1]["parts"] == [{"text": "i j", "summary": "i j", "parts": []}]


@pytest.mark.parametrize("shorten, cut", [
    (lambda t: t, True), (lambda t: t + " and more " + t, True), (lambda t: "", False), (lambda t: "x" * 500, False), (lambda t: "a b c " * 9, True),
    (lambda t: "a b c d e f g h" if "w0 " in t else "z", True)])
def test_it_ends_whatever_the_summaries_are(shorten, cut, capsys):
    """Every level has fewer texts than the one below, and no text was too long for a query."""
    def checked(texts):
        assert all(words(t) <= 6 for t in texts) and (not sizes or len(texts) < sizes[-1])
        sizes.append(len(texts))
        return [" ".join(shorten(t).split()) for t in texts]
    sizes = []
    tree = summarize.summarize(" ".join(f"w{i}" for i in range(100)), checked, words, 6)
    assert sizes[0] == 17 and sizes[-1] == 1
    assert tree["summary"] == " ".join(shorten(tree["text"]).split())
    assert ("first 1/" in capsys.readouterr().err) == cut


def test_a_summary_is_the_policys_answer_to_the_training_query(small_run, enc, tmp_path, capsys):
    """Catches another format, model or folder, a device line on standard output, and files in another order."""
    files = [tmp_path / "a.txt", tmp_path / "b.txt.gz"]
    files[0].write_bytes("\ufeffmy cat\r\nate".encode())
    files[1].write_bytes(gzip.compress(b"the dog\n"))
    summarize.main([str(f) for f in files] + ["--run", small_run, "--device", "cpu", "--policy", "sft", "--title", "good", "--show-parts"])
    out, err = capsys.readouterr()
    expected = []
    for text in ("my cat\nate", "the dog"):
        query = encode_query(enc, {"subreddit": "cat", "title": "good", "post": text}, 70)
        expected.append(" ".join(decode_response(enc, sample_responses(load_model(small_run + "/sft", "cpu"), [query], 12, 0, torch.Generator())[0]).split()))
    assert out.splitlines() == expected and "device cpu" in err and "my cat ate" in err


def test_best_of_n_is_the_reward_models(small_run, enc, tmp_path, capsys):
    """Catches the worst for the best and scores for another text: the same samples, scored one by one."""
    (tmp_path / "a.txt").write_text("my cat ate")
    summarize.main([str(tmp_path / "a.txt"), "--run", small_run, "--device", "cpu", "--n", "6"])
    query = encode_query(enc, {"subreddit": "cat", "title": "", "post": "my cat ate"}, 70)
    samples = sample_responses(load_model(small_run + "/ppo", "cpu"), [query], 12, 0.7, torch.Generator().manual_seed(1), 6)
    model = load_model(small_run + "/reward", "cpu", "scalar")
    with torch.no_grad():
        scores = [model.scores(torch.tensor([query + s]), torch.tensor([len(query + s)])).item() for s in samples]
    assert capsys.readouterr().out == " ".join(decode_response(enc, samples[scores.index(max(scores))]).split()) + "\n"
    assert max(scores) - min(scores) > .01


def test_a_pipe_gets_the_summary_alone(small_run):
    done = subprocess.run([sys.executable, os.path.join(ROOT, "run.py"), "summarize", "--run", small_run, "--device", "cpu"], text=True,
                          input="my dog ate. " * 40, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and done.stdout.count("\n") == 1 and "device" not in done.stdout, done.stderr


def test_what_cannot_be_is_one_sentence(small_run, enc, tmp_path, monkeypatch):
    """Empty, binary and foreign texts, runs and stages that are not there, models of another run, settings that contradict each other."""
    for name, content in {"empty": b" \r\n ", "binary": b"a\nb\0c", "latin": "é".encode("latin-1"), "utf16": "cat".encode("utf-16"), "good": b"cat",
                          "long": b"cat " * 90}.items():
        (tmp_path / name).write_bytes(content)
    tiny_model(vocab_size=enc.n_vocab + 1).save_pretrained(tmp_path / "foreign")
    os.remove(small_run + "/ppo/model.safetensors")
    os.rename(small_run + "/reward", small_run + "/none")
    title = "dog "
    while len(enc.encode_ordinary(query_text({"subreddit": "cat", "title": title, "post": ""}))) <= 60:  # of 70: less room than R = 12
        title += "d"
    for args, says in [(["empty"], "empty holds no text"), (["binary"], "binary:2: .*zero byte"), (["latin"], "latin:1: .*UTF-8"), (["utf16"], "utf16:1"),
                       (["missing"], "missing does not exist"), (["good"], "no finished ppo model .there are sft and pretrained"),
                       (["good", "--run", "no"], "no is not the folder of a run"), (["good", "--policy", "foreign"], "belongs to another run"),
                       (["good", "--policy", "nowhere"], "nowhere holds no model"), (["good", "--policy", "sft", "--n", "2"], "no finished reward"),
                       (["good", "--n", "0"], "--n"), (["good", "--temperature", "nan"], "--temperature"),
                       (["good", "--temperature", "1e-320"], "0 or from 0.001 on"), (["good", "--temperature=-1"], "--temperature"), (["good", "--n", "2", "--temperature", "0"], "--n"),
                       (["long", "--title", title], "shorter --title")]:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(DataError, match=says):
            summarize.main(["--run", small_run, "--device", "cpu", *(["--policy", "sft"] if args != ["good"] else []), *args])
