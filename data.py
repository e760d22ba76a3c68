"""
What goes in and out: the byte-pair encoding, posts and their queries, comparison files.

References: Sennrich et al. 2016 (BPE); Stiennon 2020 appendices A and B and openai/summarize-from-feedback (query
format, truncation, comparison files).

    enc = train_bpe(texts, vocab_size=1024)       # a tiktoken.Encoding, trained in about a second
    posts = load_posts("posts.jsonl")             # dicts: id, subreddit, title, post, summary
    query = encode_query(enc, posts[0], Q=512)    # token ids of "SUBREDDIT: r/... TITLE: ... POST: ... TL;DR:"
"""
import json
import os
from collections import Counter, defaultdict

import regex
import tiktoken
import torch


class DataError(Exception):
    """Input that cannot be used: one sentence that says what is wrong, where (file and line), and what to do."""


# ---------------------------------------------------------------------------------------------------------------------
# byte-pair encoding

GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
EOS = "<|endoftext|>"


def train_bpe(texts, vocab_size):
    """Byte-level BPE: start from the 256 bytes, merge the most frequent neighbouring pair until vocab_size - 1 tokens
    exist; the last id is <|endoftext|>. Ties go to the pair with the smaller ids. Returns a tiktoken.Encoding."""
    chunks = Counter()
    for text in texts:
        chunks.update(regex.findall(GPT2_PATTERN, text))
    pieces = [list(chunk.encode("utf-8")) for chunk in chunks]
    counts = list(chunks.values())
    tokens = [bytes([b]) for b in range(256)]
    pairs, where = Counter(), defaultdict(set)  # how often a pair occurs, and in which pieces
    for i, piece in enumerate(pieces):
        for pair in zip(piece, piece[1:]):
            pairs[pair] += counts[i]
            where[pair].add(i)
    while len(tokens) < vocab_size - 1 and pairs:
        best = max(pairs, key=lambda pair: (pairs[pair], -pair[0], -pair[1]))
        new = len(tokens)
        tokens.append(tokens[best[0]] + tokens[best[1]])
        for i in list(where[best]):
            piece = pieces[i]
            for pair in zip(piece, piece[1:]):
                pairs[pair] -= counts[i]
                where[pair].discard(i)
                if pairs[pair] <= 0:
                    del pairs[pair]
            merged, j = [], 0
            while j < len(piece):
                if piece[j:j + 2] == list(best):
                    merged.append(new)
                    j += 2
                else:
                    merged.append(piece[j])
                    j += 1
            pieces[i] = merged
            for pair in zip(merged, merged[1:]):
                pairs[pair] += counts[i]
                where[pair].add(i)
    return make_encoding({token: rank for rank, token in enumerate(tokens)})


def make_encoding(ranks, name="trained"):
    return tiktoken.Encoding(name, pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={EOS: len(ranks)})


def save_encoding(enc, path):
    """Write a trained encoding: its pattern and its tokens in order of rank, each as hexadecimal bytes."""
    tokens = [enc.decode_single_token_bytes(i).hex() for i in range(enc.n_vocab - 1)]
    write_atomic(path, json.dumps({"pattern": GPT2_PATTERN, "tokens": tokens}))


def load_encoding(path):
    """Read what save_encoding wrote."""
    try:
        with open(path) as f:
            tokens = json.load(f)["tokens"]
        return make_encoding({bytes.fromhex(token): rank for rank, token in enumerate(tokens)})
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; run.py writes it in its first stage") from None
    except (ValueError, KeyError, TypeError) as e:
        raise DataError(f"{path} is not a tokenizer that this project wrote ({e})") from None


def write_atomic(path, text):
    """All of the file or nothing: a temporary file, fsync, rename."""
    with open(f"{path}.tmp", "w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(f"{path}.tmp", path)


# ---------------------------------------------------------------------------------------------------------------------
# posts and comparisons: JSON lines in OpenAI's formats

def _json_lines(path):
    """Yield (line number, object) for each line that is not blank."""
    try:
        with open(path, encoding="utf-8") as f:
            for number, line in enumerate(f, 1):
                if line.strip():
                    try:
                        row = json.loads(line)
                    except (ValueError, RecursionError):
                        raise DataError(f"{path}:{number}: this line is not JSON; each line must be one object") from None
                    if not isinstance(row, dict):
                        raise DataError(f"{path}:{number}: expected a JSON object, found {type(row).__name__}")
                    yield number, row
    except FileNotFoundError:
        raise DataError(f"{path} does not exist") from None
    except UnicodeDecodeError:
        raise DataError(f"{path} is not UTF-8 text") from None
    except OSError as e:
        raise DataError(f"{path} cannot be read: {e.strerror}") from None


def _text(row, key, at):
    if key not in row:
        raise DataError(f"{at}: the field '{key}' is missing")
    if not isinstance(row[key], str):
        raise DataError(f"{at}: the field '{key}' must be text, found {type(row[key]).__name__}")
    return row[key].encode("utf-8", "replace").decode("utf-8")  # JSON may smuggle in half a surrogate pair


def load_posts(path):
    """Posts in the format of OpenAI's filtered TL;DR: id, subreddit, title, post, summary on each line.

    Returns (posts, skipped): skipped counts the rows whose post or summary is empty. Other fields are kept. Raises
    DataError with file and line for anything that cannot be used."""
    posts, skipped = [], 0
    for number, row in _json_lines(path):
        at = f"{path}:{number}"
        for key in ("subreddit", "title", "post", "summary"):
            row[key] = _text(row, key, at)
        row.setdefault("id", f"line-{number}")
        if row["post"].strip() and row["summary"].strip():
            posts.append(row)
        else:
            skipped += 1
    if not posts:
        raise DataError(f"{path} has no usable post ({skipped} rows with an empty post or summary)")
    return posts, skipped


def load_comparisons(path):
    """Comparisons in OpenAI's format: info{id, subreddit, title, post}, summaries[2]{text, policy}, choice, and, where
    known, worker, batch, split, extra{confidence}.

    Returns (comparisons, skipped): skipped counts the rows with an empty post or summary. Raises DataError."""
    comparisons, skipped = [], 0
    for number, row in _json_lines(path):
        at = f"{path}:{number}"
        info, summaries = row.get("info"), row.get("summaries")
        if not isinstance(info, dict):
            raise DataError(f"{at}: the field 'info' is missing or not an object")
        for key in ("subreddit", "title", "post"):
            info[key] = _text(info, key, f"{at}: info")
        if not isinstance(summaries, list) or len(summaries) != 2 or not all(isinstance(s, dict) for s in summaries):
            raise DataError(f"{at}: 'summaries' must be a list of two objects")
        for i, s in enumerate(summaries):
            s["text"] = _text(s, "text", f"{at}: summaries[{i}]")
        if type(row.get("choice")) is not int or row["choice"] not in (0, 1):
            raise DataError(f"{at}: 'choice' must be 0 or 1, the index of the preferred summary, found {row.get('choice')!r}")
        extra = row.get("extra") or {}
        confidence = extra.get("confidence") if isinstance(extra, dict) else None
        if confidence is not None and type(confidence) not in (int, float):
            raise DataError(f"{at}: 'extra.confidence' must be a number, found {confidence!r}")
        row["extra"] = {"confidence": confidence}
        if info["post"].strip() and all(s["text"].strip() for s in summaries):
            comparisons.append(row)
        else:
            skipped += 1
    if not comparisons:
        raise DataError(f"{path} has no usable comparison ({skipped} rows with an empty post or summary)")
    return comparisons, skipped


def post_key(info):
    """What makes two comparisons share a post: its id, or its text where there is no id."""
    return str(info.get("id") or info["title"] + "\n" + info["post"])


def save_json_lines(path, rows):
    write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))


# ---------------------------------------------------------------------------------------------------------------------
# from text to token ids (Stiennon appendix B.1)

def query_text(post):
    return f"SUBREDDIT: r/{post['subreddit']}\n\nTITLE: {post['title']}\n\nPOST: {post['post']}\n\nTL;DR:"


def encode_query(enc, post, Q):
    """Token ids of the query, at most Q. While it is too long the post is cut at its last newline, and where there is
    none its last characters are dropped; subreddit and title are never cut. Raises DataError if they alone exceed Q."""
    body = post["post"]
    while True:
        ids = enc.encode_ordinary(query_text({**post, "post": body}))
        if len(ids) <= Q:
            return ids
        if not body:
            raise DataError(f"post {post.get('id')}: its title alone needs more than the {Q} tokens of a query; raise max_query")
        newline = body.rfind("\n")
        # a character is at most 4 bytes, hence 4 tokens: so many can go without cutting deeper than one by one would
        body = body[:newline] if newline >= 0 else body[:-max(1, (len(ids) - Q) // 5)]


def encode_response(enc, summary, R):
    """Token ids of ' summary' cut to R - 1, and EOS: R counts the EOS."""
    return enc.encode_ordinary(" " + summary.strip())[:R - 1] + [enc.n_vocab - 1]


def decode_response(enc, ids):
    """Text of a sampled response, without its EOS and the blank it begins with."""
    return enc.decode([i for i in ids if i != enc.n_vocab - 1]).strip()


def pad_rows(rows, device="cpu"):
    """Lists of ids -> tokens [B, T] right-padded with zeros, lengths [B]."""
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long)
    for i, row in enumerate(rows):
        tokens[i, :len(row)] = torch.tensor(row)
    return tokens.to(device), lengths.to(device)
