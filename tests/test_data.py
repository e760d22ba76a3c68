"""Encodings, queries, and files: what is legal is served, what is not ends in one sentence with file and line."""
import gzip
import hashlib
import json
import os
import random
import unicodedata

import pytest
import tiktoken.load

import data
import sft
import world
from conftest import tiny_model
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


# --- downloads

BODY = random.Random(0).randbytes(5000)
SHA = hashlib.sha256(BODY).hexdigest()


def refused(*args, says):
    """download() with these arguments ends in one sentence that has all of `says`."""
    with pytest.raises(DataError) as e:
        data.download(*args)
    assert all(word in str(e.value) for word in says) and "\n" not in str(e.value), e.value


def test_a_file_is_fetched_once(server, tmp_path, monkeypatch):
    """Catches a second request for what is there, and a part left behind."""
    server.files["some/file"] = BODY
    path = tmp_path / "new" / "file"
    for sha256, size in ((SHA, None), (None, 5000), (None, None)):
        assert data.download(server.url + "/some/file", path, sha256, size) == path
        assert path.read_bytes() == BODY and os.listdir(path.parent) == ["file"]
        data.download(server.url + "/some/file", path, sha256, size)
        path.unlink()
    assert server.asked == [("some/file", None)] * 3
    monkeypatch.setitem(data.FILES, "some/file", ("https://127.0.0.1:1/other", SHA))
    assert data.fetch("some/file") == str(server.cache / "some" / "file") and (server.cache / "some" / "file").read_bytes() == BODY


@pytest.mark.parametrize("ranges", [True, False])
def test_an_interrupted_download_goes_on(server, tmp_path, ranges):
    """Catches a cut file taken for the whole, a part joined at the wrong byte, and one joined to a whole file."""
    server.files["f"], server.cut, server.ranges = BODY, 3000, ranges
    path = tmp_path / "f"
    refused(server.url + "/f", path, SHA, says=["broke off after 3,000 of 5,000 bytes"])
    assert not path.exists() and (tmp_path / "f.part").read_bytes() == BODY[:3000]
    server.cut = 4000
    refused(server.url + "/f", path, SHA, says=["broke off after 4,000 of 5,000 bytes"])
    server.cut = None
    data.download(server.url + "/f", path, SHA)
    assert path.read_bytes() == BODY and not (tmp_path / "f.part").exists()
    assert [wanted for _, wanted in server.asked] == [None, "bytes=2999-", "bytes=3999-"]


def test_parts_of_every_kind(server, tmp_path):
    """Catches trust in what lies there: a whole part, a too long one, one of another file, one that nothing can check."""
    server.files["f"] = BODY
    path, part = tmp_path / "f", tmp_path / "f.part"
    for left, asked in ((BODY, ["bytes=4999-"]), (BODY + b"more", ["bytes=5003-", None]), (b"", [None])):
        part.write_bytes(left)
        data.download(server.url + "/f", path, SHA)
        assert path.read_bytes() == BODY and [a for _, a in server.asked] == asked
        path.unlink()
        server.asked.clear()
    part.write_bytes(b"x" * 100)
    refused(server.url + "/f", path, SHA, says=["gave 5,000 bytes", SHA, str(path)])
    assert not part.exists() and not path.exists()
    part.write_bytes(b"x" * 100)
    data.download(server.url + "/f", path)
    assert path.read_bytes() == BODY and server.asked[-1] == ("f", None)


def test_what_is_not_the_file_is_removed(server, tmp_path):
    """Catches a wrong hash or size let through, or left to be continued."""
    server.files["f"] = BODY
    path = tmp_path / "f"
    refused(server.url + "/f", path, "0" * 64, says=[server.url + "/f", SHA, "instead of the sha256 " + "0" * 64])
    refused(server.url + "/f", path, None, 5001, says=["gave 5,000 bytes", "instead of 5001 bytes"])
    refused(server.url + "/f", path, None, 4999, says=["instead of 4999 bytes"])
    server.length = False  # then an end that came too early looks like the end
    refused(server.url + "/f", path, says=["a known number of bytes"])
    assert os.listdir(tmp_path) == []
    assert data.download(server.url + "/f", path, SHA) == path


def test_without_network_the_sentence_says_what_to_put_where(server, tmp_path, monkeypatch):
    path = tmp_path / "f"
    refused(server.url + "/f", path, says=[server.url + "/f", "HTTP 404", str(path)])
    refused("http://127.0.0.1:1/f", path, says=["http://127.0.0.1:1/f", "refused", "by hand", str(path)])
    refused("no address", path, says=["no address", str(path)])
    assert os.listdir(tmp_path) == []
    monkeypatch.setenv("RLHF_MIRROR", "http://127.0.0.1:1/")
    for use in (data.gpt2_encoding, lambda: data.fetch("gpt2/encoder.json")):
        with pytest.raises(DataError) as e:
            use()
        assert "http://127.0.0.1:1/gpt2/encoder.json" in str(e.value) and str(server.cache / "gpt2" / "encoder.json") in str(e.value)


def test_the_table_of_files():
    for name, (url, sha256) in data.FILES.items():
        assert url.startswith("https://") and url.endswith("/" + name.split("/")[-1])
        assert sha256 is None or len(bytes.fromhex(sha256)) == 32
    assert all(data.FILES[f"gpt2{size}/{file}"][1] for size in ("", "-medium", "-large", "-xl") for file in ("config.json", "model.safetensors"))
    assert len({url for url, _ in data.FILES.values()}) == len(data.FILES)


# --- the encoding in GPT-2's files


@pytest.mark.skipif(not all(os.path.exists(os.path.join(data.cache_folder(), "gpt2", file)) for file in ("encoder.json", "vocab.bpe")),
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
        theirs = open(os.path.join(data.cache_folder(), "gpt2", theirs), encoding="utf-8").read()
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
        monkeypatch.setitem(data.FILES, "gpt2/" + name, ("https://127.0.0.1:1/" + name, hashlib.sha256(text.encode()).hexdigest()))
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
        list(data.post_rows(write(tmp_path, POST, POST | {"title": "word " * 90}), data.train_bpe(["x"], 300), 60, 9))
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
    with pytest.raises(DataError, match="the task must be one of tldr"):
        data.load_posts(write(tmp_path, POST | {"task": "poems"}))


def test_comparisons_of_every_kind(tmp_path):
    """Articles, a subreddit with its r/, no space before a summary, null note, ties; Hugging Face's copy fills gaps with null."""
    rows = [comparison(info=dict(ARTICLE)), comparison(info=ARTICLE | {"post": None, "subreddit": None}), comparison(info=POST | {"article": None}),
            comparison(info=POST | {"subreddit": "r/advice", "id": 5}), comparison(choice=None),
            comparison(summaries=[{"text": "same"}, {"text": " same "}]), comparison(worker=None, batch=3, extra={})]
    kept, skipped = data.load_comparisons(write(tmp_path, *rows))
    assert len(kept) == 5 and skipped == 2
    assert [c["info"].get("task") for c in kept] == ["cnndm-transfer", "cnndm-transfer", None, None, None]
    assert data.query_text(kept[0]["info"]) == data.query_text(kept[1]["info"]) == "A cat ran away.\n\nIt came back, she said.\n\nTL;DR:"
    assert data.query_text(kept[3]["info"]).startswith("SUBREDDIT: r/advice\n") and data.post_key(kept[3]["info"]) == "5"
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
    posts, dropped = data.filter_tldr(iter(kept + list(broken.values())), enc)
    assert dropped == dict.fromkeys(broken, 1) and list(dropped) == data.RULES and len(posts) == len(kept)
    assert posts[5]["post"] == "as Webis has it" and posts[6]["summary"] == summary.strip() and set(posts[0]) == set(POST)
    posts, dropped = data.filter_tldr(kept + list(broken.values()), enc, need_summary=False)
    assert len(posts) == len(kept) + 4 and sum(dropped.values()) == 6
    assert len(data.SUBREDDITS) == len(set(data.SUBREDDITS)) == 29


# --------------------------------------------------------------------------- books

BOOK = ("\ufeffThe Project Gutenberg EBook\r\n\r\n*** START OF THIS PROJECT GUTENBERG EBOOK CATS ***\r\nChapter 1\r\n\r\n"
        + "My cat ran to the office. It was my cat.  Was it?\r\nIt ran on and on, and on.\r\n\r\n" * 200
        + "End of the Project Gutenberg EBook of Cats\r\n\r\n*** END OF THIS PROJECT GUTENBERG EBOOK CATS ***\r\nlicence\r\n")


def test_book_text_is_the_book_alone(tmp_path, enc):
    (tmp_path / "b.txt").write_text(BOOK, encoding="utf-8", newline="")
    whole = "".join(data.book_text(str(tmp_path / "b.txt")))
    assert whole.startswith("Chapter 1\n\nMy cat") and whole.endswith("and on.\n\n") and whole.count("Was it?") == 200 and "\r" not in whole
    for size in (3, 50, 333):
        pieces = list(data.book_text(str(tmp_path / "b.txt"), size))
        assert "".join(pieces) == whole and max(map(len, pieces)) <= size
    assert len(pieces) > 40 and [i for piece in pieces for i in enc.encode_ordinary(piece)] == enc.encode_ordinary(whole)
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"no header here.\n"))
    (tmp_path / "notes.md").write_text("not a book")
    rows = list(data.text_rows(str(tmp_path), enc, 100))
    plain = enc.encode_ordinary(whole)
    assert [i for row in rows[:-1] for i in row] == plain + [enc.n_vocab - 1] and {len(row) for row in rows[:-2]} == {100}
    assert enc.decode(rows[-1]) == "no header here.\n" + data.EOS
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no .txt file"):
        data.text_files(str(tmp_path / "empty"))
    (tmp_path / "d.txt").write_text("")
    with pytest.raises(DataError, match="d.txt holds no text"):
        list(data.text_rows(str(tmp_path / "d.txt"), enc, 100))


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
    posts = data.excerpts(rows + [spelled], enc, 10**6, seed=0, task="descriptiveness")
    found = [data.encode_query(enc, post, 64) for post in posts]
    assert sorted(found) == sorted(expected) and found != expected and len(found) > 20
    assert [data.encode_query(enc, post, 64) for post in data.excerpts(rows + [spelled], enc, 5, seed=0)] == found[:5]
    assert data.query_text(posts[0]) == posts[0]["post"] and posts[0]["task"] == "descriptiveness"


# --------------------------------------------------------------------------- token storage

def store(tmp_path, file, enc, rows=None, settings=("posts", 60, 20)):
    return data.store_rows(str(tmp_path / "cache"), [file], enc, settings, data.post_rows(file, enc, 60, 20) if rows is None else rows)


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
    file = write(tmp_path, comparison(), comparison(choice=None), comparison(info=dict(ARTICLE)))
    rows = data.store_rows(str(tmp_path / "cache"), [file], enc, ["comparisons"], data.comparison_rows(file, enc, 60, 20))
    assert list(rows) == [ids for c in data.load_comparisons(file)[0] for ids in
                          (data.encode_query(enc, c["info"], 60), *(data.encode_response(enc, s["text"], 20) for s in c["summaries"]))]


def test_rows_are_encoded_once_until_something_changes(tmp_path, enc, monkeypatch):
    def never():
        raise AssertionError("encoded again")
        yield
    file = write(tmp_path, POST, POST)
    first = list(store(tmp_path, file, enc))
    assert list(store(tmp_path, file, enc, never())) == first
    for change in (dict(settings=("posts", 61, 20)), dict(enc=data.train_bpe(["other"], 300)), dict(TASKS={})):
        monkeypatch.setattr(data, "TASKS", change.pop("TASKS", data.TASKS))
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
