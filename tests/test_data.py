"""Encodings, queries, and files: what is legal is served, what is not ends in one sentence with file and line."""
import json
import random

import pytest

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
