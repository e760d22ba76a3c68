"""200 broken copies of a file of each format: each loads, or is refused in one sentence that names the file and the line."""
import gzip
import json
import random
import re
import time

import pytest

import corpus
import data
import world

POSTS = world.make_posts(6, 0, "fuzz")
TEXTS = ["My cat – naïve as ever – ran. ", "Was it \"mine\"?\n", "漢字 😀. ", "yes, it ran on and on.\n\n"]


def json_lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def comparison(i, info):
    return {"info": info, "summaries": [{"text": " one " + TEXTS[0], "policy": "a", "note": None}, {"text": "two", "policy": "b"}], "choice": i % 2,
            "worker": "w", "batch": "b", "split": "train", "extra": {"confidence": 3}}


ARTICLES = [{"id": f"{i}", "article": TEXTS[i % 4] * 9, "highlights": "It ran .\nYes ."} for i in range(6)]
INFOS = [{k: p[k] for k in ("id", "subreddit", "title", "post")} for p in POSTS[:3]] + [
    {"id": a["id"], "site": "cnn", "title": "t", "article": a["article"]} for a in ARTICLES[:3]]
AXES = [{"info": info, "summary": {"text": "x", "policy": "p", "note": None, "axes": {"overall": 3, "accuracy": None, "compatible": True}},
         "worker": "w", "batch": "b", "split": "test"} for info in INFOS]
LABELS = [{"query": [5, 13, 50259], **{f"sample{k}": [k, 13, 50259] for k in range(4)}, "best": i % 4} for i in range(6)]
BOOK = ("The Project Gutenberg EBook\r\n*** START OF THIS PROJECT GUTENBERG EBOOK CATS ***\r\n" + "".join(TEXTS).replace("\n", "\r\n") * 40
        + "*** END OF THIS PROJECT GUTENBERG EBOOK CATS ***\r\nlicence\r\n")


def stored(load, rows):
    """A loader as the pipeline uses it: what it returns is written, read again, and encoded."""
    def run(path, enc):
        found = load(path)[0]
        data.save_json_lines(path + ".again", found)
        assert json.dumps(load(path + ".again")[0]) == json.dumps(found)
        assert all(0 < len(ids) <= 150 and max(ids) < enc.n_vocab for ids in rows(path, enc, 150, 30))
        return found
    return run


def books(path, enc):
    rows = list(corpus.text_rows(path, enc, 128))
    return rows + corpus.excerpts(rows, enc, 5, 0)


FORMATS = {  # name of the file: its text, how it is read
    "posts.jsonl": (json_lines(POSTS), stored(data.load_posts, corpus.post_rows)),
    "prompts.jsonl": (json_lines(POSTS), lambda path, enc: data.load_posts(path, need_summary=False)[0]),
    "articles.jsonl": (json_lines(ARTICLES), stored(lambda path: data.load_posts(path, "cnndm"), lambda *a: corpus.post_rows(*a, task="cnndm"))),
    "articles.csv": ("id,article,highlights\n" + "".join('"{}","{}","{}"\n'.format(*(v.replace('"', '""') for v in a.values())) for a in ARTICLES),
                     lambda path, enc: data.load_posts(path, "cnndm")[0] and list(corpus.post_rows(path, enc, 90, 9, "cnndm"))),
    "comparisons.json": (json_lines(comparison(i, info) for i, info in enumerate(INFOS)), stored(data.load_comparisons, lambda path, *a: [[1]])),
    "axis.json": (json_lines(AXES), stored(data.load_axis, lambda path, *a: [[1]])),
    "labels.json": (json.dumps(LABELS, indent=1), lambda path, enc: data.load_labels(path)[0]),
    "sst2.tsv": ("".join(f"{text.strip()}\t{i % 2}\n" for i, text in enumerate(TEXTS * 3)), lambda path, enc: data.load_sst2(path)[0]),
    "raw.jsonl": (json_lines(POSTS), lambda path, enc: list(corpus.filter_tldr((row for _, row in data.read_rows(path)), enc)[1])),
    "book.txt": (BOOK, books),
}
VALUES = ["null", "NaN", "-Infinity", "1e400", "9" * 400, "9" * 5000, "-1", "2", "0.5", "true", '""', '"x"', '" "', "[]", "{}", "[[1]]", '"\\ud800"',
          '"\\u0000"', '"a\\r\\nb"', "[" * 10**5, '{"a":' * 10**5,
          '"' + "y" * 150_000 + '"', '"' + " " * 300_000 + '"', '"' + "漢" * 3000 + '"', "\x00", "'x'", ""]


def broken(text, rng):
    """A copy of text with one to three faults, as bytes."""
    raw = text.encode()
    for _ in range(rng.randrange(1, 4)):
        i, j = sorted(rng.randrange(len(raw) + 1) for _ in range(2))
        kind = rng.randrange(12)
        if kind == 0:  # cut
            raw = raw[:i]
        elif kind == 1:  # a piece is lost, or doubled
            raw = raw[:i] + raw[i:j] * rng.choice([0, 2]) + raw[j:]
        elif kind == 2:  # binary in it
            raw = raw[:i] + rng.randbytes(rng.randrange(1, 20)) + raw[i:]
        elif kind == 3:  # one bit
            raw = raw[:i] + bytes(b ^ 1 << rng.randrange(8) for b in raw[i:i + 1]) + raw[i + 1:]
        elif kind == 4:  # another encoding
            raw = raw.decode("utf-8", "replace").encode(rng.choice(["utf-16", "utf-32-le", "latin-1", "utf-8-sig", "cp1252"]), "replace")
        elif kind == 5:  # gzipped, perhaps not wholly
            raw = gzip.compress(raw)
            raw = raw[:rng.choice([len(raw), rng.randrange(2, len(raw))])]
        elif kind == 6:  # other line ends
            raw = raw.replace(b"\r\n", b"\n").replace(b"\n", rng.choice([b"\r\n", b"\r", b"\n\n", b" "]))
        elif kind == 7:  # a mark of the format where none belongs, or none where one does
            mark = rng.choice([b'"', b"\\", b"{", b"}", b"[", b"]", b",", b":", b"\t", b"\n", b"'", b"*** START OF THE PROJECT GUTENBERG\n"])
            raw = raw[:i] + mark + raw[i:] if rng.random() < .6 else raw.replace(mark, b"", 1)
        elif kind == 8:  # one key twice, or another one
            keys = re.findall(rb'"(\w+)":', raw) or [b"cat"]
            raw = raw.replace(b'"%s"' % rng.choice(keys), b'"%s"' % rng.choice(keys), rng.choice([1, -1]))
        elif values := [m.span(1) for m in re.finditer(rb'(?:": |[\[,\t]\s*)("[^"]*"|[\w.]+)', raw)]:  # a value of another type or size
            a, b = rng.choice(values)
            raw = raw[:a] + rng.choice(VALUES).encode() + raw[b:]
    return raw


@pytest.mark.parametrize("name", FORMATS)
def test_broken_files_load_or_are_refused_in_one_sentence(name, tmp_path, enc):
    text, read = FORMATS[name]
    path, rng, seen = str(tmp_path / name), random.Random(name), {"refused": 0, "loaded": 0}
    for copy in range(201):
        with open(path, "wb") as f:
            f.write(broken(text, rng) if copy else text.encode())
        start = time.perf_counter()
        try:
            assert read(path, enc)
            seen["loaded"] += 1
        except data.DataError as e:
            seen["refused"] += 1
            assert re.fullmatch(rf"{re.escape(path)}(:\d+: | has no usable | holds no text).*|{re.escape(path)} holds no text", str(e)), str(e)
            assert len(str(e)) < 300 + len(path) and copy, str(e)
        assert time.perf_counter() - start < 5
    assert min(seen.values()) > 15
