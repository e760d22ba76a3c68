"""
What goes in and out: encodings, the tasks with their files and query formats.

References: Sennrich et al. 2016 (BPE); Stiennon 2020 appendix B and openai/summarize-from-feedback (query formats,
truncation, comparison files); Ziegler 2019 and openai/lm-human-preferences (4-way labels).

    enc = train_bpe(texts, vocab_size=1024)       # a tiktoken.Encoding, trained in about a second
    posts = load_posts("posts.jsonl")             # dicts: id, subreddit, title, post, summary
    query = encode_query(enc, posts[0], Q=512)    # token ids of "SUBREDDIT: r/... TITLE: ... POST: ... TL;DR:"
"""
import csv
import gzip
import hashlib
import itertools
import json
import os
import re
import zlib
from collections import Counter, defaultdict, namedtuple

import regex
import tiktoken
import torch
from filelock import FileLock

from download import DataError, fetch


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
    """All of the file or nothing: a temporary file, fsync, rename. text: a str, or an iterable of them."""
    with open(f"{path}.tmp", "w", encoding="utf-8") as f:
        f.writelines([text] if isinstance(text, str) else text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(f"{path}.tmp", path)


def one_at_a_time(path):
    """A lock: of two processes that would make `path` the second waits, and finds it made. A process that ends lets go."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    return FileLock(path + ".lock")


# ---------------------------------------------------------------------------------------------------------------------
# encodings in the form of OpenAI's GPT-2 release: its own one in, any of ours out for transformers

# in these files a byte is a printable character: itself where it is one, else the next free one from 256 on
PRINTABLE = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
SYMBOLS = {b: chr(b) for b in PRINTABLE} | {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in PRINTABLE)}


def gpt2_encoding(folder=None):
    """GPT-2's encoding of 50,257 tokens from encoder.json (ids) and vocab.bpe (merges, in order) of a folder, or what
    save_vocabulary left there; else from the cache, else downloaded there. Raises DataError where they are missing or do not
    belong together."""
    names = ("encoder.json", "vocab.bpe")
    if folder and os.path.exists(os.path.join(folder, "vocab.json")):  # the same two as transformers names them, and save_vocabulary
        names = ("vocab.json", "merges.txt")
    encoder, merges = (os.path.join(folder, name) if folder else fetch("gpt2/" + name) for name in names)
    try:
        with open(encoder, encoding="utf-8") as f:
            ids = json.load(f)
        with open(merges, encoding="utf-8") as f:
            merged = [line.replace(" ", "") for line in f.read().split("\n")[1:] if line]
        tokens = sorted(ids, key=ids.get)
        if ([ids[token] for token in tokens] != list(range(len(tokens))) or set(tokens[:256]) != set(SYMBOLS.values())
                or tokens[256:] != merged + [EOS]):
            raise ValueError("the merges do not make its tokens")
    except OSError as e:
        raise DataError(f"{e.filename} cannot be read ({e.strerror}); GPT-2's vocabulary is encoder.json and vocab.bpe") from None
    except (ValueError, TypeError, AttributeError) as e:
        raise DataError(f"{encoder} and {merges} are not a GPT-2 vocabulary ({e})") from None
    byte = {symbol: b for b, symbol in SYMBOLS.items()}
    return make_encoding({bytes(byte[c] for c in token): rank for rank, token in enumerate(tokens[:-1])}, "gpt2")


def merge_of(ranks, token):
    """The two tokens that a token was merged from: what byte-pair encoding with the ranks below its own makes of it."""
    parts = [bytes([b]) for b in token]
    while len(parts) > 2:
        rank, i = min((ranks.get(parts[i] + parts[i + 1], len(ranks)), i) for i in range(len(parts) - 1))
        if rank >= ranks[token]:
            raise DataError(f"token {ranks[token]} ({token}) cannot have been merged from two tokens before it")
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts


def save_vocabulary(enc, folder):
    """Write vocab.json, merges.txt and tokenizer_config.json, with which transformers' AutoTokenizer makes enc's ids of a
    text. (Of a literal <|endoftext|> it makes EOS, as its users expect; our encode_ordinary never does.)"""
    os.makedirs(folder, exist_ok=True)
    tokens = [enc.decode_single_token_bytes(i) for i in range(enc.n_vocab - 1)]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    symbols = ["".join(SYMBOLS[b] for b in token) for token in tokens]
    vocabulary = {symbol: i for i, symbol in enumerate(symbols + [EOS])}
    merges = [" ".join(symbols[ranks[part]] for part in merge_of(ranks, token)) for token in tokens if len(token) > 1]
    config = {"tokenizer_class": "GPT2Tokenizer", "clean_up_tokenization_spaces": False}
    write_atomic(os.path.join(folder, "vocab.json"), json.dumps(vocabulary))
    write_atomic(os.path.join(folder, "merges.txt"), "#version: 0.2\n" + "".join(merge + "\n" for merge in merges))
    write_atomic(os.path.join(folder, "tokenizer_config.json"), json.dumps(config))


# ---------------------------------------------------------------------------------------------------------------------
# tasks: what a query looks like, and how long it and its response may be

# query: its text, of which only {post} is ever cut; lead: what stands before a reference; Q, R: most tokens of query and
# response; stop: the token that ends a response, from index `earliest` on
Task = namedtuple("Task", "query lead Q R stop earliest")
TASKS = {
    "tldr": Task("SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:", " ", 512, 48, EOS, 0),  # Stiennon
    "cnndm": Task("Article:\n{post}\n\nTL;DR:\n", "", 1919, 128, EOS, 0),  # Stiennon's supervised model
    "cnndm-transfer": Task("{post}\n\nTL;DR:", " ", 512, 48, EOS, 0),  # articles for a model that was trained on tldr
    "sentiment": Task("{post}", " ", 64, 24, ".", 16),  # Ziegler: continue an excerpt of a book, which ends in '.'
    "descriptiveness": Task("{post}", " ", 64, 24, ".", 16),
}
ZERO_SHOT = {  # of a language model that was trained for none of this (Stiennon): behind examples, and one line ends the summary
    "zero-shot tldr": Task("Subreddit: r/{subreddit}\n\nTitle: {title}\n\n{post}\n\nTL;DR:", " ", 1999, 48, "\n", 0),
    "zero-shot cnndm": Task("Article:\n\n{post}\n\nTL;DR:", " ", 1919, 128, "\n", 0),
}
LABEL_PAD = 50259  # what fills the arrays of Ziegler's label files, two beyond GPT-2's vocabulary
MAX_TEXT = 200_000  # characters of one text; tiktoken fails on a million blanks in a row


# ---------------------------------------------------------------------------------------------------------------------
# reading files: lines, JSON lines, CSV; what cannot be used is one sentence with file and line

def read_lines(path):
    """Yield (number, line) of a text file in UTF-8, plain or gzipped, with or without a byte order mark."""
    number = 0
    try:
        with open(path, "rb") as f:
            for number, line in enumerate(gzip.open(f) if f.peek(2)[:2] == b"\x1f\x8b" else f, 1):
                line = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if "\0" in line:
                    raise DataError(f"{path}:{number}: this line holds a zero byte; the file is not text")
                yield number, line
    except FileNotFoundError:
        raise DataError(f"{path} does not exist") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}:{number}: this line is not UTF-8 text; convert the file to UTF-8") from None
    except (gzip.BadGzipFile, EOFError, zlib.error):
        raise DataError(f"{path}:{number + 1}: the gzip file is cut short or damaged from this line on; fetch it again") from None
    except OSError as e:
        raise DataError(f"{path} cannot be read: {e.strerror}") from None


def read_rows(path):
    """Yield ("file:line", dict) for each row of a .csv file with a header, else for each line of JSON that is not blank."""
    if str(path).lower().removesuffix(".gz").endswith(".csv"):
        yield from _csv_rows(path)
        return
    for number, line in read_lines(path):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                raise DataError(f"{path}:{number}: this line is not JSON; each line must be one object") from None
            if not isinstance(row, dict):
                raise DataError(f"{path}:{number}: expected a JSON object, found {type(row).__name__}")
            yield f"{path}:{number}", row


def _csv_rows(path):
    csv.field_size_limit(MAX_TEXT)
    table, header, number = csv.reader((line for _, line in read_lines(path)), strict=True), None, 1
    try:
        for row in table:
            if header is None:
                header = row
            elif row and len(row) != len(header):
                raise DataError(f"{path}:{number}: {len(row)} fields under a header of {len(header)}")
            elif row:
                yield f"{path}:{number}", dict(zip(header, row))
            number = table.line_num + 1
    except csv.Error as e:
        raise DataError(f"{path}:{number}: the row that begins here is not CSV ({e})") from None


def _text(row, key, at):
    if key not in row:
        raise DataError(f"{at}: the field '{key}' is missing")
    if not isinstance(row[key], str):
        raise DataError(f"{at}: the field '{key}' must be text, found {type(row[key]).__name__}")
    if len(row[key]) > MAX_TEXT:
        raise DataError(f"{at}: the field '{key}' has {len(row[key]):,} characters; at most {MAX_TEXT:,} are read")
    return row[key].encode("utf-8", "replace").decode("utf-8")  # JSON may smuggle in half a surrogate pair


def _label(row, key, at):
    """An id, a worker, a batch: text or a whole number, made text; None where there is none."""
    if row.get(key) is None:
        return None
    return str(row[key]) if type(row[key]) is int else _text(row, key, at)


def _usable(path, rows, what):
    """(at, row or None for one that is legal but of no use) -> (rows, how many were of no use); DataError if none is left."""
    rows = [row for _, row in rows]
    kept = [row for row in rows if row is not None]
    if not kept:
        raise DataError(f"{path} has no usable {what} ({len(rows)} rows with an empty text or nothing to choose)")
    return kept, len(rows) - len(kept)


# ---------------------------------------------------------------------------------------------------------------------
# posts, comparisons and evaluations in the formats of OpenAI and of CNN/DailyMail

def _post(row, task, at):
    """Check what a query is made of, in place, and give it the names of a post: an article is one too."""
    if row.get("article") is not None and row.get("post") is None:  # its beginning is cleaned as OpenAI does
        row["post"] = re.sub(r"\A.{0,95}\(CNN\)\s*(--\s*)?", "", _text(row, "article", at))
        del row["article"]
        task = "cnndm-transfer" if task == "tldr" else task  # a model that was trained on posts meets an article
    own = row.get("task")
    if isinstance(own, str) and own in TASKS:
        task = own
    else:
        row.pop("task", None)  # of another kind: a post's own field
    if task != "tldr":
        row["task"] = task
    for key in ("subreddit", "title", "post"):
        row[key] = _text(row, key, at) if f"{{{key}}}" in TASKS[task].query or row.get(key) is not None else ""
    row["subreddit"] = row["subreddit"].removeprefix("r/")  # as in edit_b2_eval_test; the format brings its own


def posts_of(path, task="tldr", need_summary=True):
    """Yield (file:line, post) of each row, see load_posts; None stands for a row of no use."""
    for at, row in read_rows(path):
        _post(row, task, at)
        row["id"] = _label(row, "id", at) or f"line-{at.rpartition(':')[2]}"
        if row.get("highlights") is not None and row.get("summary") is None:  # one a line; OpenAI joins them by blanks
            row["summary"] = " ".join(_text(row, "highlights", at).split())
            del row["highlights"]
        row["summary"] = _text(row, "summary", at) if need_summary or row.get("summary") is not None else ""
        yield at, row if row["post"].strip() and (row["summary"].strip() or not need_summary) else None


def load_posts(path, task="tldr", need_summary=True):
    """Posts in the format of OpenAI's filtered TL;DR: id, subreddit, title, post, summary on each line; or articles, as JSON
    lines or CSV, with id, article, highlights (task "cnndm" or "cnndm-transfer"). need_summary=False: prompts for PPO.

    Returns (posts, skipped): skipped counts the rows whose post or needed summary is empty. An article becomes `post`, its
    highlights `summary`; a post of another task than tldr names it in `task`. Other fields are kept. Raises DataError with
    file and line for anything that cannot be used."""
    return _usable(path, posts_of(path, task, need_summary), "post")


def _judged(row, task, at):
    """Check, in place, what comparisons and evaluations share -> whether their post has a text."""
    info = row.get("info")
    if not isinstance(info, dict):
        raise DataError(f"{at}: the field 'info' is missing or not an object")
    _post(info, "tldr" if info.get("article") is None else task, f"{at}: info")  # Hugging Face's copy has both fields, one null
    info["id"] = _label(info, "id", f"{at}: info")
    for key in ("worker", "batch", "split"):
        row[key] = _label(row, key, at)
    return bool(info["post"].strip())


def comparisons_of(path, task="cnndm-transfer"):
    """Yield (file:line, comparison) of each row, see load_comparisons; None stands for a row of no use."""
    for at, row in read_rows(path):
        usable, summaries = _judged(row, task, at), row.get("summaries")
        if not isinstance(summaries, list) or len(summaries) != 2 or not all(isinstance(s, dict) for s in summaries):
            raise DataError(f"{at}: 'summaries' must be a list of two objects")
        for i, s in enumerate(summaries):
            s["text"], s["policy"] = _text(s, "text", f"{at}: summaries[{i}]"), _label(s, "policy", f"{at}: summaries[{i}]")
        tie = "choice" in row and row["choice"] is None
        if not tie and (type(row.get("choice")) is not int or row["choice"] not in (0, 1)):
            raise DataError(f"{at}: 'choice' must be 0 or 1, the index of the preferred summary, or null for a tie, "
                            f"found {row.get('choice', 'none')!r:.60}")
        extra = row.get("extra") or {}
        confidence = extra.get("confidence") if isinstance(extra, dict) else None
        if confidence is not None and (type(confidence) not in (int, float) or not abs(confidence) < 1000):
            raise DataError(f"{at}: 'extra.confidence' must be a number, found {confidence!r:.60}")
        row["extra"] = {**(extra if isinstance(extra, dict) else {}), "confidence": confidence}
        a, b = (s["text"].strip() for s in summaries)
        yield at, row if usable and not tie and a and b and a != b else None


def load_comparisons(path, task="cnndm-transfer"):
    """Comparisons in OpenAI's format: info{id, subreddit, title, post}, summaries[2]{text, policy}, choice, and, where
    known, worker, batch, split, extra{confidence}. Where info{id, site, title, article} is of CNN/DM, `task` is its format.

    Returns (comparisons, skipped): skipped counts ties (no choice, or twice the same text) and rows with an empty post or
    summary. Raises DataError."""
    return _usable(path, comparisons_of(path, task), "comparison")


def load_axis(path, task="cnndm-transfer"):
    """Likert evaluations in OpenAI's axis_evals format: info as in a comparison, summary{text, policy, axes{overall, accuracy,
    coverage, coherence: 1 to 7; compatible: true or false}}, worker, batch, split; a null is an axis without an answer.

    Returns (evaluations, skipped): skipped counts the rows with an empty post or summary, or without any answer."""
    def rows():
        for at, row in read_rows(path):
            usable, summary = _judged(row, task, at), row.get("summary")
            if not isinstance(summary, dict) or not isinstance(summary.get("axes"), dict):
                raise DataError(f"{at}: 'summary', and in it 'axes', must be objects")
            summary["text"] = _text(summary, "text", f"{at}: summary")
            summary["policy"] = _label(summary, "policy", f"{at}: summary")
            axes = summary["axes"] = {axis: answer for axis, answer in summary["axes"].items() if answer is not None}
            for axis, answer in axes.items():
                if not (type(answer) is bool if axis == "compatible" else type(answer) is int and 1 <= answer <= 7):
                    raise DataError(f"{at}: the axis {axis!r:.60} must be a whole number from 1 to 7, or true or false for "
                                    f"'compatible', found {answer!r:.60}")
            yield at, row if usable and axes and summary["text"].strip() else None
    return _usable(path, rows(), "evaluation")


def load_labels(path, vocab=50257):
    """Ziegler's 4-way labels: a JSON array of {query, sample0..3: token ids filled up with LABEL_PAD, best: 0 to 3}.

    Returns (labels, skipped): dicts query [ids], samples [[ids] * 4], best, all without PAD, which his model neither sees nor
    counts as a position; skipped counts the labels where a query or sample is empty. Raises DataError."""
    text, decode = "".join(line for _, line in read_lines(path)), json.JSONDecoder().raw_decode
    at = text.find("[") + 1
    if text[:at].strip() != "[":
        raise DataError(f"{path}:1: expected a JSON array of labels")

    def rows(at):
        seen, line = 0, 1
        for n in itertools.count():
            at = re.compile(r"[\s,]*").match(text, at).end()
            line, seen = line + text.count("\n", seen, at), at
            where = f"{path}:{line}: label {n}"
            if text[at:at + 1] == "]":
                return
            try:
                row, at = decode(text, at)
                lists, best = [row[key] for key in ("query", "sample0", "sample1", "sample2", "sample3")], row["best"]
            except (ValueError, RecursionError):
                raise DataError(f"{where}: not JSON, or the file is cut short") from None
            except (KeyError, TypeError):
                raise DataError(f"{where}: expected an object with query, sample0 to sample3, and best") from None
            for ids in lists:
                if not isinstance(ids, list) or not all(type(i) is int and (0 <= i < vocab or i == LABEL_PAD) for i in ids):
                    raise DataError(f"{where}: a query or sample must be a list of token ids below {vocab}, or {LABEL_PAD}")
            if type(best) is not int or not 0 <= best < 4:
                raise DataError(f"{where}: 'best' must be 0, 1, 2 or 3, found {best!r:.60}")
            query, *samples = ([i for i in ids if i != LABEL_PAD] for ids in lists)
            yield where, {"query": query, "samples": samples, "best": best} if query and all(samples) else None
    return _usable(path, rows(at), "label")


def load_sst2(path):
    """SST-2: a sentence, a tab, 0 (negative) or 1 on each line; GLUE's header may stand above. -> ([{text, label}], skipped)"""
    def rows():
        for number, line in read_lines(path):
            text, tab, label = line.strip("\r\n").rpartition("\t")
            if (number, text, label) == (1, "sentence", "label") or not line.strip():
                continue
            if not tab or label not in ("0", "1"):
                raise DataError(f"{path}:{number}: expected a sentence, a tab, and 0 or 1")
            if len(text) > MAX_TEXT:
                raise DataError(f"{path}:{number}: the sentence has {len(text):,} characters; at most {MAX_TEXT:,} are read")
            yield number, {"text": text, "label": int(label)} if text.strip() else None
    return _usable(path, rows(), "sentence")


def post_key(info):
    """What makes two comparisons share a post: its id, or its text where there is no id or but a row's number, which says nothing."""
    id = str(info.get("id") or "")
    return id if id and not id.isdecimal() else info.get("title", "") + "\n" + info.get("post", "")


def names_of(post):
    """What tells that two rows are about the same post: the text, blanks apart, and an id, unless we made it up or it is a row's number."""
    text = ("text", hashlib.sha256(" ".join(post["post"].split()).encode()).hexdigest())
    id = post.get("id") or ""
    return {text} if not id or id.isdecimal() or id.startswith(("line-", "label-")) else {text, ("id", id)}


def same_posts(posts):
    """-> for each row the name of its post, the same for all rows that are about it, be it by way of others: a has the id of b, b the text
    of c."""
    parent = {}

    def root(name):
        while parent.setdefault(name, name) != name:
            parent[name] = name = parent[parent[name]]
        return name
    firsts = []
    for names in map(names_of, posts):
        least, *others = sorted(map(root, names))
        firsts.append(least)
        for name in others:
            parent[name] = least
    return [root(name) for name in firsts]


def save_json_lines(path, rows):
    write_atomic(path, (json.dumps(row) + "\n" for row in rows))


# ---------------------------------------------------------------------------------------------------------------------
# from text to token ids (Stiennon appendix B.1)

def query_text(post):
    return (TASKS | ZERO_SHOT)[post.get("task", "tldr")].query.format_map(post)


def encode_query(enc, post, Q):
    """Token ids of the query, at most Q. While it is too long the post is cut at its last newline, and where there is
    none its last character is dropped; what else the task's format has is never cut. Raises DataError if it alone exceeds Q."""
    body, most = post["post"], None
    while True:
        ids = enc.encode_ordinary(query_text({**post, "post": body}))
        if len(ids) <= Q:
            return ids
        if not body:
            raise DataError(f"post {post.get('id')}: its title alone needs more than the {Q} tokens of a query; raise max_query")
        most = min(_most_characters(enc, post, Q) if most is None else most, len(body) - 1)  # steps that cannot fit are left out
        newline = body.rfind("\n", 0, most + 1)
        # a character is at most 4 bytes, hence 4 tokens: so many can go without cutting deeper than one by one would
        body = body[:newline] if newline >= 0 else body[:min(most, len(body) - (len(ids) - Q) // 5)]


def _most_characters(enc, post, Q):
    """A length beyond which a beginning of the post surely makes a query of more than Q tokens. No token reaches from a word into
    the blank or newline after it, so words add up; the first is not counted, as it depends on what stands before it."""
    body, start = post["post"], 0
    before, _, after = query_text({**post, "post": "\0"}).rpartition("\0")
    tokens = len(enc.encode_ordinary(before.strip())) + len(enc.encode_ordinary(after.strip()))
    for edge in re.finditer(r"(?<=\S)(?=[ \n])", body):
        tokens += len(enc.encode_ordinary(body[start:edge.start()])) if start else 0
        start = edge.start()
        if tokens > Q:
            return start
    return len(body)


def in_context_query(enc, post, examples, Q, most):
    """Zero-shot query of at most Q tokens with as many examples (posts of its task, with their summaries) in front as fit into `most`
    tokens in all. -> token ids, how many examples

    An example that does not fit is passed over; the first one stands next to the post. Stiennon's code fills its context to the last
    token and so begins amid an example; ours are whole."""
    def zero_shot(post):
        return {**post, "task": "zero-shot " + post.get("task", "tldr").removesuffix("-transfer")}
    texts = [enc.decode(encode_query(enc, zero_shot(post), Q))]
    for example in examples:
        more = [query_text(zero_shot(example)) + " " + example["summary"].strip(), *texts]
        if len(enc.encode_ordinary("\n\n=====\n\n".join(more))) <= most:
            texts = more
    return enc.encode_ordinary("\n\n=====\n\n".join(texts)), len(texts) - 1


def encode_response(enc, summary, R, task="tldr", stop=None):
    """Token ids of the summary behind the task's lead (' '), cut to R - 1, and EOS: R counts the EOS.

    stop: (token, after) of another rule; a response that ends with '.' has no EOS, so that a reward model reads what PPO will show it.
    Without a rule the task decides: what continues a text is followed by more text."""
    ids, eos = enc.encode_ordinary(TASKS[task].lead + summary.strip()), enc.n_vocab - 1
    return ids[:R - 1] + [eos] if (TASKS[task].stop == EOS if stop is None else stop[0] == eos) else ids[:R]


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
