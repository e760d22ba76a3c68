"""Encodings, queries, and files: what is legal is served, what is not ends in one sentence with file and line."""
import gzip
import hashlib
import json
import os
import random
import unicodedata

import pytest
import tiktoken.load

import corpus
import data
import download
import world
from data import DataError

POST = {"id": "a", "subreddit": "advice", "title": "my cat", "post": "she ran away.\nthen she came back.\nnow she sleeps.", "summary": "cat ran"}


@pytest.fixture(scope="module")
def enc():
    return data.train_bpe([data.query_text(p) + " " + p["summary"] for p in world.make_posts(300, 0, "x")], 600)


def test_bpe_merges_the_most_frequent_pair_first():
    """'ab' is the most frequent pair, then 'ab'+'c'; ids follow the order of merging."""
    enc = data.train_bpe(["abc abc abc abd xy"], 256 + 2 + 1)
    assert [enc.decode_single_token_bytes(i) for i in (256, 257)] == [b"ab", b" ab"] or \
           [enc.decode_single_token_bytes(i) for i in (256, 257)] == [b"ab", b"abc"]
    assert enc.n_vocab == 259 and enc.decode([258]) == data.EOS


def test_bpe_against_a_naive_trainer():
    """Every merge of the fast trainer is a most frequent pair of a trainer that counts anew each time."""
    text = " ".join(random.Random(0).choice(["banana", "bandana", "ananas", "nab", "cabana"]) for _ in range(200))
    enc = data.train_bpe([text], 280)
    pieces = [[bytes([b]) for b in w.encode()] for w in data.regex.findall(data.GPT2_PATTERN, text)]
    for i in range(256, enc.n_vocab - 1):
        counts = {}
        for piece in pieces:
            for pair in zip(piece, piece[1:]):
                counts[pair] = counts.get(pair, 0) + 1
        token = enc.decode_single_token_bytes(i)
        best = [pair for pair in counts if pair[0] + pair[1] == token]
        assert best and max(counts[pair] for pair in best) == max(counts.values())
        pair = max(best, key=counts.get)
        for piece in pieces:
            j = 0
            while j < len(piece) - 1:
                if (piece[j], piece[j + 1]) == pair:
                    piece[j:j + 2] = [token]
                j += 1


@pytest.mark.parametrize("text", ["hello  world\n\n", "ünïcödé 😀 \t x", "", "<|endoftext|>", "a" * 300])
def test_encoding_round_trip(enc, text, tmp_path):
    data.save_encoding(enc, str(tmp_path / "t.json"))
    again = data.load_encoding(str(tmp_path / "t.json"))
    assert again.decode(again.encode_ordinary(text)) == text
    assert again.encode_ordinary(text) == enc.encode_ordinary(text)
    assert enc.n_vocab - 1 not in enc.encode_ordinary(text)  # EOS is never written by text


def test_query_keeps_title_and_ends_with_tldr(enc):
    text = enc.decode(data.encode_query(enc, POST, 200))
    assert text == "SUBREDDIT: r/advice\n\nTITLE: my cat\n\nPOST: she ran away.\nthen she came back.\nnow she sleeps.\n\nTL;DR:"


def test_query_is_cut_at_the_last_newline_that_fits(enc):
    full = len(data.encode_query(enc, POST, 200))
    text = enc.decode(data.encode_query(enc, POST, full - 1))
    assert "she came back." in text and "now she" not in text and text.endswith("\n\nTL;DR:")
    for Q in range(full, full - 25, -1):
        assert len(data.encode_query(enc, POST, Q)) <= Q


def test_query_without_newline_drops_as_few_characters_as_one_by_one(enc):
    post = {**POST, "post": "xqz jkw vvv " * 40}
    body, Q = post["post"], 120
    while len(enc.encode_ordinary(data.query_text({**post, "post": body}))) > Q:
        body = body[:-1]
    assert data.encode_query(enc, post, Q) == enc.encode_ordinary(data.query_text({**post, "post": body}))


def test_title_longer_than_the_query_is_refused(enc):
    with pytest.raises(DataError, match="title"):
        data.encode_query(enc, {**POST, "title": "word " * 300}, 64)


def test_response_starts_with_a_blank_and_keeps_eos(enc):
    eos = enc.n_vocab - 1
    assert data.encode_response(enc, "so", 48) == data.encode_response(enc, " so", 48) == enc.encode_ordinary(" so") + [eos]
    dot = enc.encode_ordinary(".")[0]
    assert data.encode_response(enc, "so it ran.", 48, stop=(dot, 4)) == enc.encode_ordinary(" so it ran.")  # what ends it is in the text
    assert data.encode_response(enc, "so", 48, stop=(eos, 4)) == enc.encode_ordinary(" so") + [eos]
    assert len(data.encode_response(enc, "word " * 100, 10, stop=(dot, 4))) == 10
    cut = data.encode_response(enc, "word " * 100, 10)
    assert len(cut) == 10 and cut[-1] == eos and eos not in cut[:-1]
    assert data.decode_response(enc, data.encode_response(enc, "my cat ran.", 48)) == "my cat ran."


def test_gpt2_encoding_by_the_same_pattern():
    """The pre-tokenizer splits as GPT-2 does: two newlines before a letter are two pieces."""
    assert data.regex.findall(data.GPT2_PATTERN, "foo\n\nbar it's 12 a") == ["foo", "\n", "\n", "bar", " it", "'s", " 12", " a"]


def write(tmp_path, *lines):
    file = tmp_path / "x.jsonl"
    file.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return str(file)


def test_posts_are_read_and_empty_ones_counted(tmp_path):
    posts, skipped = data.load_posts(write(tmp_path, POST, "", {**POST, "post": " "}, {**POST, "summary": ""}, POST))
    assert len(posts) == 2 and skipped == 2 and posts[0]["title"] == "my cat"


@pytest.mark.parametrize("line, says", [
    ("{broken", ":2: this line is not JSON"), ("[1]", ":2: expected a JSON object"), ({"title": "x"}, ":2: the field 'subreddit' is missing"),
    ({**POST, "post": 3}, ":2: the field 'post' must be text, found int"), ({**POST, "title": None}, "must be text, found NoneType")])
def test_bad_posts_name_file_and_line(tmp_path, line, says):
    with pytest.raises(DataError) as e:
        data.load_posts(write(tmp_path, POST, line))
    assert says in str(e.value) and "x.jsonl:2" in str(e.value) and "\n" not in str(e.value)


def test_missing_empty_and_binary_files(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        data.load_posts(str(tmp_path / "none"))
    with pytest.raises(DataError, match="no usable post"):
        data.load_posts(write(tmp_path, ""))
    (tmp_path / "b").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="UTF-8"):
        data.load_posts(str(tmp_path / "b"))
    with pytest.raises(DataError, match="cannot be read"):
        data.load_posts(str(tmp_path))


def comparison(**changes):
    return {"info": {k: POST[k] for k in ("id", "subreddit", "title", "post")}, "choice": 1, "worker": "w", "batch": "b", "split": "train",
            "summaries": [{"text": " one", "policy": "a", "note": None}, {"text": " two", "policy": "b"}], "extra": {"confidence": 3}} | changes


def test_comparisons_are_read_with_their_gaps(tmp_path):
    no_id = comparison(extra=None)
    del no_id["info"]["id"]
    rows, skipped = data.load_comparisons(write(tmp_path, comparison(), no_id, comparison(summaries=[{"text": ""}, {"text": "x"}])))
    assert len(rows) == 2 and skipped == 1 and rows[0]["extra"]["confidence"] == 3 and rows[1]["extra"]["confidence"] is None
    assert data.post_key(rows[0]["info"]) == "a" and data.post_key(rows[1]["info"]) == POST["title"] + "\n" + POST["post"]


@pytest.mark.parametrize("changes, says", [
    ({"choice": 2}, "'choice' must be 0 or 1"), ({"choice": "1"}, "'choice' must be 0 or 1"), ({"choice": True}, "'choice' must be 0 or 1"),
    ({"info": None}, "'info' is missing"), ({"info": {"title": "x"}}, "'subreddit' is missing"), ({"summaries": [{"text": "x"}]}, "two objects"),
    ({"summaries": [{"text": "x"}, {"text": 1}]}, "summaries[1]"), ({"extra": {"confidence": "high"}}, "confidence")])
def test_bad_comparisons_name_file_and_line(tmp_path, changes, says):
    with pytest.raises(DataError) as e:
        data.load_comparisons(write(tmp_path, comparison(), comparison(**changes)))
    assert says in str(e.value) and "x.jsonl:2" in str(e.value) and "\n" not in str(e.value)


def test_pad_rows_carries_lengths():
    tokens, lengths = data.pad_rows([[5, 6, 7], [8]])
    assert tokens.tolist() == [[5, 6, 7], [8, 0, 0]] and lengths.tolist() == [3, 1]


def test_write_atomic_leaves_the_old_file_when_it_fails(tmp_path):
    file = tmp_path / "f"
    data.write_atomic(str(file), "old")
    with pytest.raises(UnicodeEncodeError):
        data.write_atomic(str(file), "new \ud800")
    assert file.read_text() == "old"


# --- the encoding in GPT-2's files


@pytest.mark.skipif(not all(os.path.exists(os.path.join(download.cache_folder(), "gpt2", file)) for file in ("encoder.json", "vocab.bpe")),
                    reason="GPT-2's vocabulary is not in the cache; data.gpt2_encoding() downloads it")
def test_gpt2_encoding_gives_the_published_ids(tmp_path):
    """Vectors of GPT-3-Encoder's and llama.cpp's tests."""
    enc = data.gpt2_encoding()
    for text, ids in {"": [], " ": [220], "\t": [197], "\n\n": [628], "\n\n\n": [628, 198], "This is some text": [1212, 318, 617, 2420],
                      "indivisible": [521, 452, 12843], "hello \N{WAVING HAND SIGN} world \N{EARTH GLOBE EUROPE-AFRICA}":
                      [31373, 50169, 233, 995, 12520, 234, 235], "toString constructor hasOwnProperty valueOf":
                      [1462, 10100, 23772, 468, 23858, 21746, 1988, 5189], "ied 4 ½ months": [798, 604, 25208, 1933],
                      "Führer": [37, 9116, 71, 11751]}.items():
        assert enc.encode_ordinary(text) == ids and enc.decode(ids) == text
    assert enc.n_vocab == 50257 and enc.decode([50256]) == data.EOS
    data.save_vocabulary(enc, tmp_path)
    for ours, theirs in (("vocab.json", "encoder.json"), ("merges.txt", "vocab.bpe")):
        theirs = open(os.path.join(download.cache_folder(), "gpt2", theirs), encoding="utf-8").read()
        ours = (tmp_path / ours).read_text(encoding="utf-8")
        assert ours == theirs or json.loads(ours) == json.loads(theirs)


def made_up_vocabulary():
    """encoder.json and vocab.bpe of four merges: texts in GPT-2's format, in which a blank is written Ġ."""
    printable = [chr(b) for b in (*range(33, 127), *range(161, 173), *range(174, 256))]
    bytes_ = printable + [chr(256 + i) for i in range(256 - len(printable))]
    merges = ["h e", "l l", "he ll", "Ġ w"]
    tokens = bytes_ + [m.replace(" ", "") for m in merges] + ["<|endoftext|>"]
    return {"encoder.json": json.dumps({t: i for i, t in enumerate(tokens)}), "vocab.bpe": "#version: 0.2\n" + "\n".join(merges) + "\n"}


def test_gpt2_encoding_from_the_cache_and_from_a_folder(server, tmp_path, monkeypatch):
    """Catches bytes decoded wrongly, ids out of order, EOS in the wrong place; against tiktoken's reader of these files."""
    for name, text in made_up_vocabulary().items():
        server.files["gpt2/" + name] = text.encode()
        monkeypatch.setitem(download.FILES, "gpt2/" + name, ("https://127.0.0.1:1/" + name, hashlib.sha256(text.encode()).hexdigest()))
    downloaded, folder = data.gpt2_encoding(), str(server.cache / "gpt2")
    again, from_folder = data.gpt2_encoding(), data.gpt2_encoding(folder)
    assert [name for name, _ in server.asked] == ["gpt2/encoder.json", "gpt2/vocab.bpe"]
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    ranks = tiktoken.load.data_gym_to_mergeable_bpe_ranks(folder + "/vocab.bpe", folder + "/encoder.json")
    data.save_encoding(downloaded, str(tmp_path / "tokenizer.json"))
    for enc in (downloaded, again, from_folder, data.load_encoding(str(tmp_path / "tokenizer.json"))):
        assert enc.encode_ordinary("hello w<") == [258, 78, 259, 27] and enc.n_vocab == 261
        assert {enc.decode_single_token_bytes(i): i for i in range(260)} == ranks
        assert data.encode_response(enc, "hell", 9)[-1] == 260 and enc.decode([260]) == data.EOS
        assert enc.decode(enc.encode_ordinary("\x00é\n 😀")) == "\x00é\n 😀"


@pytest.mark.parametrize("file, change", [
    ("encoder.json", lambda t: t[:-9]), ("encoder.json", lambda t: "[1]"), ("encoder.json", lambda t: t.replace('"he": 256', '"he": 300')),
    ("encoder.json", lambda t: t.replace('"he": 256', '"he": "x"')), ("vocab.bpe", lambda t: t.replace("l l\nhe ll", "he ll\nl l")),
    ("vocab.bpe", lambda t: t[:-5]), ("encoder.json", lambda t: t.replace('"<|endoftext|>"', '"end"')), ("vocab.bpe", None),
    ("encoder.json", lambda t: t.replace('|>": 260', '|>": 300')), ("encoder.json", lambda t: t.replace('"ll": 257', '"ll": 256')),
    ("encoder.json", lambda t: t.replace('"!"', '"x!"')), ("encoder.json", None)])
def test_a_damaged_vocabulary_is_one_sentence(tmp_path, file, change):
    texts = made_up_vocabulary()
    for name, text in texts.items():
        text = text if name != file else change and change(text)
        assert text != texts[name] or name != file
        if text is not None:
            (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(DataError) as e:
        data.gpt2_encoding(str(tmp_path))
    assert str(tmp_path / file) in str(e.value) and "\n" not in str(e.value)


def random_texts(n, seed=0):
    """Texts of letters that merge often, blanks, digits, signs, other scripts; all of Unicode 3.2, on which libraries agree."""
    rng, any_char = random.Random(seed), [chr(i) for i in range(0xd800) if unicodedata.ucd_3_2_0.category(chr(i)) != "Cn"]
    pool = ["a", "b", "ab", "the", " the", "aa", " ", "  ", "\n", "\t", "'s", "12", "#", "##", "é", "你好", "😀", "\x00", "\u00a0", "\ufffd"]
    return ["".join(rng.choice(pool) if rng.random() < .9 else rng.choice(any_char) for _ in range(rng.randrange(30))) for _ in range(n)]


@pytest.mark.parametrize("kind", ["world", "random", "bytes only", "made up"])
def test_transformers_load_the_vocabulary_and_give_the_same_ids(tmp_path, kind, enc):
    """Catches a merge derived with tokens that came later, ids shifted, another pattern, an EOS of its own."""
    hf = pytest.importorskip("transformers")
    if kind == "made up":
        for name, text in made_up_vocabulary().items():
            (tmp_path / name).write_text(text, encoding="utf-8")
    enc = {"world": lambda: enc, "random": lambda: data.train_bpe(random_texts(3000), 1500), "bytes only": lambda: data.train_bpe([], 257),
           "made up": lambda: data.gpt2_encoding(str(tmp_path))}[kind]()
    data.save_vocabulary(enc, str(tmp_path / "saved"))
    texts = random_texts(2000, 1) + [data.query_text(p) + " " + p["summary"] for p in world.make_posts(300, 7, "x")]
    merged = {i for text in texts for i in enc.encode_ordinary(text) if i > 255}
    assert len(merged) > {"world": 200, "random": 1000, "bytes only": -1, "made up": 0}[kind]
    for cls in (hf.AutoTokenizer, hf.GPT2TokenizerFast):
        theirs = cls.from_pretrained(tmp_path / "saved")
        assert theirs(texts)["input_ids"] == enc.encode_ordinary_batch(texts, num_threads=1)
        assert len(theirs) == enc.n_vocab and theirs.eos_token_id == enc.n_vocab - 1
        assert [theirs.decode(ids) for ids in enc.encode_ordinary_batch(texts[:300], num_threads=1)] == texts[:300]


def test_a_token_that_no_merge_makes_is_refused(tmp_path):
    """Catches merges written for a table that was never merged: transformers would cut texts otherwise."""
    ranks = {bytes([b]): b for b in range(256)} | {b"abc": 256}
    with pytest.raises(DataError, match="256"):
        data.save_vocabulary(data.make_encoding(ranks), str(tmp_path))


# --------------------------------------------------------------------------- tasks

ARTICLE = {"id": "b", "site": "cnn", "title": "Cat found", "article": "(CNN) -- A cat ran away.\n\nIt came back, she said."}


def test_the_query_of_each_task(enc):
    """The formats as openai/summarize-from-feedback and lm-human-preferences print them; a reference stands behind ' ' or not."""
    post = {"post": "A cat ran.", "summary": "It ran."}
    for task, query, response in [("cnndm", "Article:\nA cat ran.\n\nTL;DR:\n", "It ran."), ("cnndm-transfer", "A cat ran.\n\nTL;DR:", " It ran."),
                                  ("sentiment", "A cat ran.", " It ran.")]:
        assert enc.decode(data.encode_query(enc, post | {"task": task}, 64)) == query
        end = "" if task == "sentiment" else data.EOS  # what continues a text is followed by more text
        assert enc.decode(data.encode_response(enc, "It ran.", 24, task)) == response + end
    assert len(data.encode_response(enc, "It ran. " * 9, 24, "sentiment")) == 24
    lengths = {name: (task.Q, task.R, task.stop, task.earliest) for name, task in data.TASKS.items()}
    assert lengths == {"tldr": (512, 48, data.EOS, 0), "cnndm": (1919, 128, data.EOS, 0), "cnndm-transfer": (512, 48, data.EOS, 0),
                       "sentiment": (64, 24, ".", 16), "descriptiveness": (64, 24, ".", 16)}


def test_truncation_is_the_paper_s_step_by_step_one(enc):
    """Whatever the post is made of, the query is the one that cutting at one newline or one character at a time ends with."""
    def step_by_step(post, Q):
        while len(ids := enc.encode_ordinary(data.query_text(post))) > Q:
            i = post["post"].rfind("\n")
            post = post | {"post": post["post"][:i]}  # -1 where there is none: the last character
        return ids
    rng = random.Random(0)
    pieces = ["my", "cat", " ", " ", " ", "\n", "\n\n", "sister", "!!", "\u00a0", "\u2003", "\x1c", "漢字", "it's", "1234", "\t", "x" * 30, "\r\n"]
    for n in range(600):
        body = "".join(rng.choices(pieces if n % 2 else [p for p in pieces if "\n" not in p], k=rng.randrange(40, 120)))
        post = {"subreddit": "x", "title": "a title", "post": body, "task": rng.choice(["tldr", "cnndm", "cnndm-transfer", "sentiment"])}
        Q = rng.randrange(25, 120)
        assert data.encode_query(enc, post, Q) == step_by_step(post, Q)
    enc = data.train_bpe([" a ab abc abcd abcde abcdef abcdefg abcdefgh"], 265)
    assert [len(enc.encode_ordinary(w)) for w in (" abcdefgh", "abcdefgh")] == [1, 8]  # so a first word alone says nothing
    post = {"subreddit": "x", "title": "a title", "post": "abcdefgh" + " abcdefgh ijk" * 30}
    assert all(data.encode_query(enc, post, Q) == step_by_step(post, Q) for Q in range(60, 190))


def test_gzip_byte_order_mark_and_prompts_without_summary(tmp_path):
    rows = [POST, {k: POST[k] for k in POST if k != "summary"}, POST | {"summary": None}, POST | {"summary": ""}, POST | {"id": 7}]
    text = "\ufeff" + "\r\n".join(map(json.dumps, rows))
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    posts, skipped = data.load_posts(str(tmp_path / "x.jsonl.gz"), need_summary=False)
    assert [p["summary"] for p in posts] == ["cat ran", "", "", "", "cat ran"] and skipped == 0 and posts[4]["id"] == "7"
    odd = data.load_posts(write(tmp_path, POST | {"summary": "half a \ud800 pair"}))[0][0]["summary"]
    assert odd.encode() == b"half a ? pair"
    with pytest.raises(DataError, match="x.jsonl:1: the field 'post' has 1,000,001 characters; at most 200,000"):
        data.load_posts(write(tmp_path, POST | {"post": " " * 10**6 + "x"}))  # tiktoken would panic
    with pytest.raises(DataError, match="x.jsonl:2: post a: its title alone needs more than the 60 tokens"):
        list(corpus.post_rows(write(tmp_path, POST, POST | {"title": "word " * 90}), data.train_bpe(["x"], 300), 60, 9))
    with pytest.raises(DataError, match="x.jsonl.gz:2: the field 'summary' is missing"):
        data.load_posts(str(tmp_path / "x.jsonl.gz"))
    (tmp_path / "y.gz").write_bytes(gzip.compress(text.encode())[:-30])
    with pytest.raises(DataError, match=r"y.gz:\d+: the gzip file is cut short"):
        data.load_posts(str(tmp_path / "y.gz"), need_summary=False)


def test_cnndm_as_csv_and_as_json_lines(tmp_path):
    table = 'article,highlights,id\r\n"(CNN)A ""cat"" ran away.","It ran .\nIt came back .",b\r\nDogs sleep.,They do .,c\r\n'
    (tmp_path / "x.csv").write_text(table, newline="")
    posts, skipped = data.load_posts(str(tmp_path / "x.csv"), "cnndm")
    assert skipped == 0 and posts[0] == {"id": "b", "subreddit": "", "title": "", "post": 'A "cat" ran away.', "summary": "It ran . It came back .",
                                         "task": "cnndm"}
    as_json = write(tmp_path, {"article": '(CNN)A "cat" ran away.', "highlights": "It ran .\nIt came back .", "id": "b"})
    assert data.load_posts(as_json, "cnndm")[0] == posts[:1]
    data.save_json_lines(tmp_path / "again", posts)
    assert data.load_posts(str(tmp_path / "again"))[0] == posts  # a run's own files say what task they are of
    for bad, says in [(table + 'x,"y', ":5: the row that begins here is not CSV"), (table + "one,two\n", ":5: 2 fields under a header of 3"),
                      (table.replace("article", "text"), ":2: the field 'post' is missing")]:
        (tmp_path / "x.csv").write_text(bad, newline="")
        with pytest.raises(DataError, match=says):
            data.load_posts(str(tmp_path / "x.csv"), "cnndm")
    (tmp_path / "X.CSV").write_text(table, newline="")
    assert data.load_posts(str(tmp_path / "X.CSV"), "cnndm")[0] == posts
    for own in ("summarization", ["x"], 3):  # a post's own field says nothing of ours
        assert data.load_posts(write(tmp_path, POST | {"task": own}))[0] == [POST]
        assert data.load_posts(write(tmp_path, POST | {"task": own}), "cnndm")[0] == [POST | {"task": "cnndm"}]


def test_comparisons_of_every_kind(tmp_path):
    """Articles, a subreddit with its r/, no space before a summary, null note, ties; Hugging Face's copy fills gaps with null."""
    rows = [comparison(info=dict(ARTICLE)), comparison(info=ARTICLE | {"post": None, "subreddit": None}), comparison(info=POST | {"article": None}),
            comparison(info=POST | {"subreddit": "r/advice", "id": 5}), comparison(choice=None),
            comparison(summaries=[{"text": "same"}, {"text": " same "}]), comparison(worker=None, batch=3, extra={})]
    kept, skipped = data.load_comparisons(write(tmp_path, *rows))
    assert len(kept) == 5 and skipped == 2
    assert [c["info"].get("task") for c in kept] == ["cnndm-transfer", "cnndm-transfer", None, None, None]
    assert data.query_text(kept[0]["info"]) == data.query_text(kept[1]["info"]) == "A cat ran away.\n\nIt came back, she said.\n\nTL;DR:"
    assert data.query_text(kept[3]["info"]).startswith("SUBREDDIT: r/advice\n") and kept[3]["info"]["id"] == "5"
    assert (kept[4]["worker"], kept[4]["batch"], kept[4]["extra"]) == (None, "3", {"confidence": None})
    data.save_json_lines(tmp_path / "again", kept)
    assert data.load_comparisons(str(tmp_path / "again"))[0] == kept
    assert data.load_comparisons(write(tmp_path, *rows), "cnndm")[0][0]["info"]["task"] == "cnndm"
    for changes, says in [({"extra": {"confidence": float("nan")}}, "confidence"), ({"worker": [1]}, "'worker' must be text"),
                          ({"summaries": [{"text": "x", "policy": {}}, {"text": "y"}]}, r"summaries\[0\]: the field 'policy'")]:
        with pytest.raises(DataError, match="x.jsonl:1: .*" + says):
            data.load_comparisons(write(tmp_path, comparison(**changes)))
    row = comparison()
    del row["choice"]
    with pytest.raises(DataError, match="'choice' must be 0 or 1.*found 'none'"):
        data.load_comparisons(write(tmp_path, row))


def evaluation(axes, text=" A cat."):
    return {"info": dict(ARTICLE), "split": "test", "worker": "w", "batch": "cnndm1",
            "summary": {"text": text, "policy": "ref", "note": None, "axes": axes}}


def test_axis_evaluations(tmp_path):
    axes = {"overall": 3, "accuracy": 7, "coverage": None, "coherence": 1, "compatible": False}
    rows, skipped = data.load_axis(write(tmp_path, evaluation(axes), evaluation({"overall": None}), evaluation(axes, " ")))
    assert len(rows) == 1 and skipped == 2
    assert rows[0]["summary"]["axes"] == {"overall": 3, "accuracy": 7, "coherence": 1, "compatible": False}
    assert rows[0]["info"]["post"].startswith("A cat") and rows[0]["info"]["task"] == "cnndm-transfer"
    for bad in [{"overall": 8}, {"overall": 0}, {"overall": True}, {"overall": 2.5}, {"compatible": 1}, [], None]:
        with pytest.raises(DataError, match="x.jsonl:2: "):
            data.load_axis(write(tmp_path, evaluation(axes), evaluation(bad)))


LABEL = {"query": [5, 13, 50259, 50259], "sample0": [1, 13], "sample1": [2, 50259], "sample2": [0, 50256], "sample3": [4, 4], "best": 3}


def test_four_way_labels_lose_their_padding(tmp_path):
    file = tmp_path / "x.json"
    file.write_text(json.dumps([LABEL, LABEL | {"sample1": [50259, 50259]}, LABEL | {"best": 0}]))
    labels, skipped = data.load_labels(str(file))
    assert skipped == 1 and [label["best"] for label in labels] == [3, 0]
    assert labels[0]["query"] == [5, 13] and labels[0]["samples"] == [[1, 13], [2], [0, 50256], [4, 4]]
    for bad, says in [({"best": 4}, "'best' must be"), ({"best": True}, "'best' must be"), ({"query": [50257]}, "token ids"),
                      ({"query": [-1]}, "token ids"), ({"query": [50260]}, "token ids"), ({"sample2": [1.0]}, "token ids"),
                      ({"sample3": None}, "token ids")]:
        file.write_text("[" + json.dumps(LABEL) + ",\n\n" + json.dumps(LABEL | bad) + "]")
        with pytest.raises(DataError, match="x.json:3: label 1: .*" + says):
            data.load_labels(str(file))
    for text, says in [("{}", ":1: expected a JSON array"), ("[{}]", ":1: label 0: expected an object with query"), ("[3]", ":1: label 0: expected an object"),
                       ("[", ":1: label 0: not JSON")]:
        file.write_text(text)
        with pytest.raises(DataError, match=says):
            data.load_labels(str(file))


def test_sst2(tmp_path):
    (tmp_path / "x.tsv").write_text("sentence\tlabel\na fine film \t1\n\t0\nfine\ttabs\t0\r\n")
    assert data.load_sst2(str(tmp_path / "x.tsv")) == ([{"text": "a fine film ", "label": 1}, {"text": "fine\ttabs", "label": 0}], 1)
    (tmp_path / "x.tsv").write_text("good\t1\nbad 0\n")
    with pytest.raises(DataError, match="x.tsv:2: expected a sentence, a tab"):
        data.load_sst2(str(tmp_path / "x.tsv"))
