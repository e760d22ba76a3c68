"""Encodings, queries, and files: what is legal is served, what is not ends in one sentence with file and line."""
import hashlib
import json
import os
import random
import unicodedata

import pytest
import tiktoken.load

import data
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
