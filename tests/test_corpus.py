"""Books, the filter and the token storage: against naive versions of the same, and after files have changed."""
import gzip
import random

import numpy as np
import pytest

import corpus
import data
import sft
import world
from conftest import tiny_model
from data import DataError
from test_data import ARTICLE, POST, write


@pytest.fixture(scope="module")
def enc():
    return data.train_bpe([data.query_text(p) + " " + p["summary"] for p in world.make_posts(300, 0, "x")], 600)


# --------------------------------------------------------------------------- the filter

def test_filter_drops_by_each_rule_once(enc):
    """One row breaks each rule and no earlier one; the rest of a post is what stays."""
    def words(n):  # a text of exactly n tokens
        return enc.decode(enc.encode_ordinary(" my cat ran to the office." * n)[:n])
    summary, new = words(30), iter(range(100))

    def row(**changes):
        return {"id": "t3_x", "subreddit": "tifu", "title": "my cat", "post": f"story {next(new)}", "summary": summary} | changes
    broken = {"duplicate post": row(post="the first"), "not a top-level post": row(title=None), "other subreddit": row(subreddit="Tifu"),
              "title begins with edit or update": row(title="[UPDATE] my cat"), "sensitive topic": row(post="thoughts of suicide"),
              "post over 512 tokens": row(post=words(513)), "summary begins with edit, update or P.S.": row(summary="P.S. " + summary),
              "profane summary": row(summary="whore " + words(25)), "summary under 24 tokens": row(summary=words(23)),
              "summary over 48 tokens": row(summary=words(49))}
    kept = [row(post="the first"), row(title="Editor needed"), row(post=words(512)), row(summary=words(24)), row(summary=words(48)),
            {k: v for k, v in row(content="as Webis has it").items() if k != "post"}, row(summary="TL;DR: " + summary)]
    posts, dropped = corpus.filter_tldr(iter(kept + list(broken.values())), enc)
    assert dropped == dict.fromkeys(broken, 1) and list(dropped) == corpus.RULES and len(posts) == len(kept)
    assert posts[5]["post"] == "as Webis has it" and posts[6]["summary"] == summary.strip() and set(posts[0]) == set(POST)
    posts, dropped = corpus.filter_tldr(kept + list(broken.values()), enc, need_summary=False)
    assert len(posts) == len(kept) + 4 and sum(dropped.values()) == 6
    for n, rule in ((22, "summary under 24 tokens"), (23, None), (45, None), (46, "summary over 48 tokens")):  # 1.05 tokens a word
        dropped = corpus.filter_tldr([row(summary=" ".join(["word"] * n))])[1]
        assert [name for name, count in dropped.items() if count] == [rule] * bool(rule)
    assert len(corpus.SUBREDDITS) == len(set(corpus.SUBREDDITS)) == 29


# --------------------------------------------------------------------------- books

BOOK = ("\ufeffThe Project Gutenberg EBook\r\n\r\n*** START OF THIS PROJECT GUTENBERG EBOOK CATS ***\r\nChapter 1\r\n\r\n"
        + "My cat ran to the office. It was my cat.  Was it?\r\nIt ran on and on, and on.\r\n\r\n" * 200
        + "End of the Project Gutenberg EBook of Cats\r\n\r\n*** END OF THIS PROJECT GUTENBERG EBOOK CATS ***\r\nlicence\r\n")


def test_book_text_is_the_book_alone(tmp_path, enc):
    (tmp_path / "b.txt").write_text(BOOK, encoding="utf-8", newline="")
    whole = "".join(corpus.book_text(str(tmp_path / "b.txt")))
    assert whole.startswith("Chapter 1\n\nMy cat") and whole.endswith("and on.\n\n") and whole.count("Was it?") == 200 and "\r" not in whole
    for size in (3, 50, 333):
        pieces = list(corpus.book_text(str(tmp_path / "b.txt"), size))
        assert "".join(pieces) == whole and max(map(len, pieces)) <= size
    assert len(pieces) > 40 and [i for piece in pieces for i in enc.encode_ordinary(piece)] == enc.encode_ordinary(whole)
    (tmp_path / "c.TXT.gz").write_bytes(gzip.compress(b"no header here.\n"))
    (tmp_path / "notes.md").write_text("not a book")
    rows = list(corpus.text_rows(str(tmp_path), enc, 100))
    plain = enc.encode_ordinary(whole)
    assert [i for row in rows[:-1] for i in row] == plain + [enc.n_vocab - 1] and {len(row) for row in rows[:-2]} == {100}
    assert enc.decode(rows[-1]) == "no header here.\n" + data.EOS
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no .txt file"):
        corpus.text_files(str(tmp_path / "empty"))
    (tmp_path / "d.txt").write_text("")
    with pytest.raises(DataError, match="d.txt holds no text"):
        list(corpus.text_rows(str(tmp_path / "d.txt"), enc, 100))


def test_excerpts_by_the_rule_of_the_paper(enc):
    """Behind the first full stop, 64 tokens, behind the last full stop, 32 at least; the query is just these tokens."""
    rng, (stop,) = random.Random(0), enc.encode_ordinary(".")
    text = " ".join(rng.choice(["my cat ran", "to the office", "yes.", "it was mine.", "why?"]) for _ in range(3000))
    ids = enc.encode_ordinary(text)
    rows = [ids[i:i + 128] for i in range(0, len(ids) - 128, 128)] + [[stop], [5, 6], [7] * 100 + [stop] + [8] * 100]
    rows += [[stop] + [8] * 31 + [stop], [stop] + [8] * 30 + [stop]]  # 32 tokens, 31
    spelled = [stop] + list(b" cat" * 10) + [stop]  # no encoding of a text, so its text would be another query
    expected = []
    for row in rows:
        row = row[row.index(stop) + 1:] if stop in row else []
        row = row[:64]
        while row and row[-1] != stop:
            row = row[:-1]
        if len(row) >= 32:
            expected.append(row)
    posts = corpus.excerpts(rows + [spelled], enc, 10**6, seed=0, task="descriptiveness")
    found = [data.encode_query(enc, post, 64) for post in posts]
    assert sorted(found) == sorted(expected) and found != expected and len(found) > 20
    assert [data.encode_query(enc, post, 64) for post in corpus.excerpts(rows + [spelled], enc, 5, seed=0)] == found[:5]
    assert data.query_text(posts[0]) == posts[0]["post"] and posts[0]["task"] == "descriptiveness"


# --------------------------------------------------------------------------- token storage

def store(tmp_path, file, enc, rows=None, settings=("posts", 60, 20)):
    return corpus.store_rows(str(tmp_path / "cache"), [file], enc, settings, corpus.post_rows(file, enc, 60, 20) if rows is None else rows)


def test_stored_rows_are_the_encoded_rows(tmp_path, enc):
    posts = world.make_posts(50, 0, "x")
    file = write(tmp_path, *posts, POST | {"post": " "}, ARTICLE | {"summary": "so", "task": "cnndm"})
    posts = data.load_posts(file)[0]
    queries, responses = store(tmp_path, file, enc).columns(2)
    assert list(queries) == [data.encode_query(enc, p, 60) for p in posts] and len(queries) == 51 == len(responses)
    assert list(responses) == [data.encode_response(enc, p["summary"], 20, p.get("task", "tldr")) for p in posts]
    assert responses[3:5] == [responses[3], responses[4]] and responses[-1] == responses[50] and type(queries[0]) is list
    assert list(queries.take([7, 2])) == [queries[7], queries[2]]
    with pytest.raises(IndexError):
        queries[51]


def test_rows_are_encoded_once_until_something_changes(tmp_path, enc, monkeypatch):
    def never():
        raise AssertionError("encoded again")
        yield
    file = write(tmp_path, POST, POST)
    first = list(store(tmp_path, file, enc))
    assert list(store(tmp_path, file, enc, never())) == first
    for change in (dict(settings=("posts", 61, 20)), dict(enc=data.train_bpe(["other"], 300)), dict(TASKS={})):
        monkeypatch.setattr(corpus, "TASKS", change.pop("TASKS", corpus.TASKS))
        with pytest.raises(AssertionError, match="encoded again"):
            store(**{"tmp_path": tmp_path, "file": file, "enc": enc, "rows": never()} | change)
    monkeypatch.undo()
    write(tmp_path, POST, POST, POST)
    assert list(store(tmp_path, file, enc)) == first + first[:2]
    tokens = max((tmp_path / "cache").glob("*.tokens"), key=lambda path: path.stat().st_size)
    tokens.write_bytes(tokens.read_bytes()[:-2])
    with pytest.raises(AssertionError, match="encoded again"):
        store(tmp_path, file, enc, never())
    assert list(store(tmp_path, file, enc)) == first + first[:2]
    with pytest.raises(DataError, match="none cannot be read"):
        store(tmp_path, str(tmp_path / "none"), enc)
    with pytest.raises(DataError, match="16 bits"):
        store(tmp_path, file, data.make_encoding({str(i).encode(): i for i in range(2**16)}))


def test_a_broken_off_encoding_leaves_nothing_behind_that_counts(tmp_path, enc):
    def breaks():
        yield [1, 2, 3]
        raise KeyboardInterrupt
    file = write(tmp_path, POST)
    with pytest.raises(KeyboardInterrupt):
        store(tmp_path, file, enc, breaks())
    assert not list((tmp_path / "cache").iterdir()) and len(store(tmp_path, file, enc)) == 2


def test_training_reads_stored_rows_as_it_reads_lists(tmp_path, enc):
    file = write(tmp_path, *world.make_posts(24, 0, "x"))
    queries, responses = store(tmp_path, file, enc).columns(2)
    losses = []
    for name, rows in [("stored", (queries, responses)), ("lists", (list(queries), list(responses)))]:
        model = tiny_model(vocab_size=enc.n_vocab, n_positions=80)
        losses.append(sft.train_lm(model, rows, rows, sft.SFTSettings(batch=8, warmup=1), str(tmp_path / name), seed=0))
    assert losses[0] == losses[1]


@pytest.mark.parametrize("total", [4000, 50000, 400000])
def test_rows_of_every_length_agree_on_what_is_held_out(total, enc):
    """Catches a held-out stretch counted in rows: text that is tested on in rows of one length would be trained on in rows of another."""
    tokens = np.random.default_rng(0).integers(enc.n_vocab - 1, size=total, dtype=np.uint16)

    def ranges(T):
        starts = np.arange(0, total, T)
        stops = np.minimum(starts + T, total)
        train, test = corpus.held_out_text(corpus.TokenRows(tokens, starts, stops), enc, n=100)
        marks = []
        for part in (train, test):
            mark = np.zeros(total, bool)
            for i in part:
                mark[starts[i]:stops[i]] = True
            marks.append(mark)
        assert len(test) and not (marks[0] & marks[1]).any() and marks[0].mean() > .4
        return marks
    for T in (88, 128, 384):
        for other in (88, 128, 384):
            assert not (ranges(T)[0] & ranges(other)[1]).any()
    if total > 10**5:
        assert .03 < ranges(128)[1].mean() < .07


def test_a_vocabulary_does_not_read_what_is_held_out(tmp_path, enc):
    """Catches bits per byte of text that the vocabulary was made of: every row is read that is trained on, and none that is tested on."""
    rng = random.Random(0)
    for name, n in (*((f"a{i}", 20) for i in range(60)), ("b", 20000), ("c", 5000)):
        (tmp_path / f"{name}.txt").write_text(" ".join(rng.choice(["my", "cät", "ran", "漢字", "office", "\n"]) for _ in range(n)))
    rows = corpus.stored_text(str(tmp_path / "cache"), [str(tmp_path)], enc, 100)
    learned = "".join(corpus.text_to_learn([str(tmp_path)]))
    def text(i):
        return enc.decode([id for id in rows[i] if id < enc.n_vocab - 1]).strip("\ufffd")  # a row may end within a letter
    train, test = corpus.held_out_text(rows, enc)
    assert len(test) > 5 and all(text(i) in learned for i in train) and not any(text(i) in learned for i in test)
