"""
Large sets of text: books in rows and excerpts, the paper's choice among raw Reddit posts, and token storage.

References: Stiennon 2020 appendix A (filter); Ziegler 2019 and openai/lm-human-preferences (excerpts).

    rows = store_rows("cache", files, enc, ["books", 512], text_rows("books", enc, 512))     # encoded once, then mapped
    posts = excerpts(rows, enc, 5000, seed=0)                                                 # queries to continue
"""
import array
import hashlib
import itertools
import json
import os
import random
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import regex
from tqdm import tqdm

from data import GPT2_PATTERN, MAX_TEXT, TASKS, DataError, encode_query, encode_response, posts_of, read_lines

# ---------------------------------------------------------------------------------------------------------------------
# the paper's choice among raw Reddit posts (Stiennon appendix A)

SUBREDDITS = """relationships AskReddit relationship_advice tifu dating_advice personalfinance Advice legaladvice offmychest
    loseit jobs self BreakUps askwomenadvice dogs running pettyrevenge needadvice travel Parenting weddingplanning Pets
    Dogtraining cats AskDocs college GetMotivated books Cooking""".split()
# The paper drops sensitive topics and profanity "by heuristics" that it does not print. These are ours, and narrow: in what
# OpenAI released "fuck", "shit", "self harm", "porn" and "rape" still occur.
SENSITIVE = re.compile(r"\b(suicid\w*|incest\w*|orgasm\w*|blow ?jobs?|creampies?|gang ?bang\w*)\b", re.I)
PROFANE = re.compile(r"\b(cunts?|motherfuck\w*|cocksuck\w*|whores?|sluts?|fagg?ots?|nigg(er|a)s?)\b", re.I)
EDIT = re.compile(r"\W*(edit|update)(ed|d|s)?\b", re.I)
RULES = ["duplicate post", "not a top-level post", "other subreddit", "title begins with edit or update", "sensitive topic",
         "post over 512 tokens", "summary begins with edit, update or P.S.", "profane summary", "summary under 24 tokens",
         "summary over 48 tokens"]


def filter_tldr(rows, enc=None, need_summary=True):
    """-> posts, {rule: how many rows it was the first to drop}, rules in the paper's order.

    rows: dicts with id, subreddit, title (a comment has none), post (or Webis' content, or Reddit's selftext), summary, as read_rows reads
    them; they may stream. need_summary=False leaves out the rules on the summary: the paper's set of prompts for PPO. enc: GPT-2's
    encoding, in whose tokens the paper counts; without it tokens are estimated, 1.05 for each piece of GPT2_PATTERN (a word, a mark): of
    what OpenAI released that keeps 95 %."""
    posts, dropped, seen = [], dict.fromkeys(RULES, 0), set()
    for row in rows:
        row = row | {"post": row.get("post") or row.get("content") or row.get("selftext")}
        post = {key: row[key].encode("utf-8", "replace").decode() if isinstance(row.get(key), str) else "" for key in ("id", "subreddit", "title", "post", "summary")}
        post["summary"] = re.sub(r"^\W*tl\W?dr[\s:;,.-]*", "", post["summary"], flags=re.I)
        key = hashlib.sha256(post["post"].encode()).digest()
        rule = "duplicate post" if key in seen else _broken_rule(post, enc, need_summary)
        seen.add(key)
        if rule:
            dropped[rule] += 1
        else:
            posts.append(post)
    return posts, dropped


def _broken_rule(post, enc, need_summary):
    """The first of RULES that a post breaks, or None."""
    body, title, summary = post["post"], post["title"], post["summary"]

    def tokens(text):
        return len(enc.encode_ordinary(text)) if enc else 1.05 * len(regex.findall(GPT2_PATTERN, text))
    if not body.strip() or not title.strip():
        return "not a top-level post"
    if post["subreddit"] not in SUBREDDITS:
        return "other subreddit"
    if EDIT.match(title):
        return "title begins with edit or update"
    if SENSITIVE.search(title) or SENSITIVE.search(body):
        return "sensitive topic"
    if max(len(body), len(title)) > MAX_TEXT or tokens(body) > 512:
        return "post over 512 tokens"
    if not need_summary:
        return None
    if EDIT.match(summary) or re.match(r"\W*p\.? ?s\b", summary, re.I):
        return "summary begins with edit, update or P.S."
    if PROFANE.search(summary):
        return "profane summary"
    n = tokens(summary[:MAX_TEXT])
    return "summary under 24 tokens" if n < 24 else "summary over 48 tokens" if n > 48 else None


# ---------------------------------------------------------------------------------------------------------------------
# books: any text, as rows of tokens and as excerpts to continue (Ziegler 2019; openai/lm-human-preferences)

GUTENBERG_START = re.compile(r"\*+ ?START OF (THE|THIS) PROJECT GUTENBERG|\*+ ?END.{0,3}THE SMALL PRINT", re.I)
GUTENBERG_END = re.compile(r"\*+ ?END OF (THE|THIS) PROJECT GUTENBERG|End of (The |This )?Project Gutenberg", re.I)


def text_files(path):
    """The .txt and .txt.gz files of a folder, sorted, or the one file that path is."""
    if not os.path.isdir(path):
        return [path]
    names = sorted(name for name in os.listdir(path) if name.lower().endswith((".txt", ".txt.gz")))
    if not names:
        raise DataError(f"{path} holds no .txt file")
    return [os.path.join(path, name) for name in names]


def book_text(path, size=2**16):
    """Yield a text file in pieces of up to `size` characters: newlines as \\n, Project Gutenberg's header and footer left out.
    Pieces are cut between a word and the blank or newline after it, where no token reaches across, so that the pieces' tokens
    together are those of the whole text."""
    lines = (line.replace("\r\n", "\n").replace("\r", "\n") for _, line in read_lines(path))
    head = list(itertools.islice(lines, 2000))
    start = next((i + 1 for i, line in enumerate(head) if GUTENBERG_START.match(line)), 0)
    parts, length = [], 0
    for line in itertools.takewhile(lambda line: not GUTENBERG_END.match(line), itertools.chain(head[start:], lines)):
        parts.append(line)
        length += len(line)
        if length > size:
            text, at = "".join(parts), 0
            while len(text) - at > size:
                word = re.match(r"(?s).*\S(?=[ \n])", text[at:at + size])
                yield text[at:at + (word.end() if word else size)]
                at += word.end() if word else size
            parts, length = [text[at:]], len(text) - at
    yield "".join(parts)


def text_rows(path, enc, T):
    """Yield the tokens of a text file or a folder of them in rows of T; the last row of each file is shorter and ends in EOS."""
    for file in text_files(path):
        ids, count = [], 0
        for more in parallel(enc.encode_ordinary, book_text(file), 32):
            ids += more
            whole = len(ids) // T * T
            yield from (ids[i:i + T] for i in range(0, whole, T))
            ids, count = ids[whole:], count + len(more)
        if not count:
            raise DataError(f"{file} holds no text")
        yield ids + [enc.n_vocab - 1]


def excerpts(rows, enc, n, seed, task="sentiment", least=32):
    """Up to n queries to continue, as posts, one from each of n rows of text_rows (T = 2Q is a good length), which are tried
    in an order drawn from seed: what follows the row's first '.', cut to Q tokens, then after its last '.'; excerpts under
    `least` tokens are passed over. (The paper: 32 to 64 tokens.) `summary` is what follows in the row, as a response would end."""
    (stop,), posts = enc.encode_ordinary("."), []
    for i in random.Random(seed).sample(range(len(rows)), len(rows)):
        ids = rows[i]
        all_ids = ids[ids.index(stop) + 1:] if stop in ids else []
        ids = all_ids[:TASKS[task].Q]
        ids = ids[:len(ids) - ids[::-1].index(stop)] if stop in ids else []
        after = [i for i in all_ids[len(ids):len(ids) + TASKS[task].R] if i < enc.n_vocab - 1]  # a book may end here
        if stop in after[TASKS[task].earliest:]:
            after = after[:after.index(stop, TASKS[task].earliest) + 1]
        text = enc.decode(ids)
        if len(ids) >= least and enc.encode_ordinary(text) == ids:  # a token cut out of a word may read differently alone
            posts.append({"id": f"row-{i}", "subreddit": "", "title": "", "post": text, "summary": enc.decode(after), "task": task})
        if len(posts) == n:
            break
    return posts


def stretch_of(total):
    """Bytes of a stretch of text; of the stretches 0, 1, 2, ..., every 20th from 1 on is held out: a twentieth of the text."""
    return min(2**14, max(2**12, total // 20))


def held_out_text(rows, enc, n=2**16):
    """-> indices of the rows to train on, and of those to test on. Stretches are counted in bytes, so that rows of every length, and what a
    vocabulary is trained on, agree on what is held out; a row across an edge is in neither."""
    sizes = np.array([len(enc.decode_single_token_bytes(i)) for i in range(enc.n_vocab - 1)] + [0], np.uint16)  # EOS is no text
    lengths = [np.add.reduceat(sizes[rows.tokens[first:rows.stops[i:i + n][-1]]], rows.starts[i:i + n] - first, dtype=np.int64)
               for i in range(0, len(rows), n) for first in (rows.starts[i],)]  # n rows at a time: a large set is read, not held
    stops = np.concatenate(lengths).cumsum()
    starts, stretch = np.append(0, stops[:-1]), stretch_of(int(stops[-1]))
    first, last = starts // stretch, np.maximum(starts, stops - 1) // stretch
    untouched = (last + 19) // 20 == (first + 18) // 20  # as many held-out stretches up to the row's end as before its beginning
    index = np.arange(len(rows))
    return index[untouched], index[(first == last) & (first % 20 == 1)]


def text_to_learn(paths, pieces=30):
    """The first 2 MB or so of every text, to train a vocabulary on, without what held_out_text holds out."""
    kept, at = [], 0
    for file in (file for path in paths for file in text_files(path)):
        for i, piece in enumerate(book_text(file)):
            kept += [(at, piece.encode())] * (i < pieces)
            at += len(piece.encode())
    stretch = stretch_of(at)
    return [b"".join(raw[max(0, k * stretch - at):max(0, (k + 1) * stretch - at)]
                     for k in range(at // stretch, (at + len(raw)) // stretch + 1) if k % 20 != 1).decode(errors="ignore") for at, raw in kept]


# ---------------------------------------------------------------------------------------------------------------------
# token storage: a large set is encoded once and then read where it is needed

class TokenRows:
    """Rows of token ids in a memory-mapped file, for wherever a list of lists of ids serves: rows[i] and rows[a:b] are lists.
    take(indices or slice) and columns(n), which deals the rows out n at a time, are TokenRows again and read nothing yet."""

    def __init__(self, tokens, starts, stops):
        self.tokens, self.starts, self.stops = tokens, starts, stops

    def __len__(self):
        return len(self.starts)

    def __getitem__(self, i):
        return list(self.take(i)) if isinstance(i, slice) else self.tokens[self.starts[i]:self.stops[i]].tolist()

    def take(self, which):
        return TokenRows(self.tokens, self.starts[which], self.stops[which])

    def columns(self, n):
        return [self.take(slice(i, None, n)) for i in range(n)]


def store_rows(folder, paths, enc, settings, rows):
    """TokenRows of what the generator `rows` yields. The first time the ids go to folder/KEY.tokens (uint16) and the end of
    each row to folder/KEY.ends.npy (int64); later `rows` is not even begun. KEY stands for the paths, their sizes and times of
    change, the encoding, TASKS, and `settings`, which must name all else that the rows depend on.

        queries, responses = store_rows(folder, [path], enc, ["tldr", Q, R], post_rows(path, enc, Q, R)).columns(2)"""
    if enc.n_vocab > 2**16:
        raise DataError(f"tokens are stored in 16 bits, an encoding of {enc.n_vocab} tokens is too large")
    try:
        sources = [[os.path.abspath(path), os.stat(path).st_size, os.stat(path).st_mtime_ns] for path in paths]
    except OSError as e:
        raise DataError(f"{e.filename} cannot be read: {e.strerror}") from None
    tokens = [enc.decode_single_token_bytes(i).hex() for i in range(enc.n_vocab - 1)]
    key = hashlib.sha256(json.dumps([sources, tokens, TASKS, settings]).encode()).hexdigest()[:16]
    file, ends_file = os.path.join(folder, f"{key}.tokens"), os.path.join(folder, f"{key}.ends.npy")
    ends = _read_ends(file, ends_file)
    if ends is None:
        os.makedirs(folder, exist_ok=True)
        ends = _write_rows(rows, file, ends_file)
    tokens = np.asarray(np.memmap(file, np.uint16, "r")) if ends[-1] else np.zeros(0, np.uint16)
    return TokenRows(tokens, ends[:-1], ends[1:])


def _read_ends(file, ends_file):
    """The ends of the rows, from 0 on, or None where the two files are not there, or not whole."""
    try:
        ends = np.load(ends_file, allow_pickle=False)
        return ends if os.path.getsize(file) == 2 * ends[-1] else None
    except (OSError, ValueError, EOFError, IndexError):
        return None


def _write_rows(rows, file, ends_file):
    ends, temporary = array.array("q", [0]), f"{file}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb", buffering=2**20) as f:
            for row in tqdm(rows, desc="encoding", unit="row", delay=2):
                f.write(array.array("H", row).tobytes())
                ends.append(ends[-1] + len(row))
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, file)
        with open(temporary, "wb") as f:
            np.save(f, np.array(ends))
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, ends_file)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)
    return np.array(ends)


def stored_text(folder, paths, enc, T):
    """text_rows of files and folders, as TokenRows."""
    files = [file for path in paths for file in text_files(path)]
    return store_rows(folder, files, enc, ["text", T], itertools.chain.from_iterable(text_rows(file, enc, T) for file in files))


def post_rows(path, enc, Q, R, task="tldr", need_summary=True):
    """Yield query, response, query, response, ... of the posts of a file, as load_posts returns them."""
    def encode(row):
        at, post = row
        try:
            return encode_query(enc, post, Q), encode_response(enc, post["summary"], R, post.get("task", "tldr"))
        except DataError as e:
            raise DataError(f"{at}: {e}") from None
    rows = (row for row in posts_of(path, task, need_summary) if row[1])
    return itertools.chain.from_iterable(parallel(encode, rows, 1024))


def parallel(function, items, chunk):
    """map on all cores, in order, with `chunk` items at a time in memory: tiktoken works outside the interpreter's lock."""
    items = iter(items)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        while part := list(itertools.islice(items, chunk)):
            yield from pool.map(function, part)
