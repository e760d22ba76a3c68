"""
What goes in and out: encodings, downloads, posts and their queries, comparison files.

References: Sennrich et al. 2016 (BPE); Stiennon 2020 appendices A and B and openai/summarize-from-feedback (query
format, truncation, comparison files).

    enc = train_bpe(texts, vocab_size=1024)       # a tiktoken.Encoding, trained in about a second
    posts = load_posts("posts.jsonl")             # dicts: id, subreddit, title, post, summary
    query = encode_query(enc, posts[0], Q=512)    # token ids of "SUBREDDIT: r/... TITLE: ... POST: ... TL;DR:"
"""
import hashlib
import http.client
import json
import os
import urllib.error
import urllib.request
from collections import Counter, defaultdict

import regex
import tiktoken
import torch
from tqdm import tqdm


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
# downloads: once, into a cache folder

HUB, BLOBS = "https://huggingface.co/openai-community", "https://openaipublic.blob.core.windows.net"
GPT2_FILES = {  # revision on the hub, sha256 of its files
    "gpt2": ("607a30d783dfa663caf39e06633721c8d4cfcd7e", {
        "model.safetensors": "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707",
        "config.json": "0daed7749b4f02b8f76240d5444551d7b08712dab4d0adb8239c56ba823bb7b4"}),
    "gpt2-medium": ("6dcaa7a952f72f9298047fd5137cd6e4f05f41da", {
        "model.safetensors": "fc5a354a19255ad494f3d71549390baca1ccf61d1d822b9408971705c687c9cd",
        "config.json": "ef1a44d889ad1a0acc7731c78134f1b87d2d222f110e97dd10fd4117331caf22"}),
    "gpt2-large": ("32b71b12589c2f8d625668d2335a01cac3249519", {
        "model.safetensors": "5f47f3e12f91cd33b662ce7e433b6150ad5512b5884a2cee961b50e9c3bbebce",
        "config.json": "7fccdcfd6622055342a734c663ee0b61ff4fd697f42467595df0bf4448c8c170"}),
    "gpt2-xl": ("15ea56dee5df4983c59b2538573817e1667135e2", {
        "model.safetensors": "0f8b28eb05a8075f48b61b6f35332978c74fc7763fa9fb4051a1c30511736a6a",
        "config.json": "be48115d52314bc27327e160bf10197760db02ea689d10adb24db4102edf7a8a"})}
# Weights: the hashes that several public projects record for these revisions, not yet verified by a download of ours.
# Configs: tests/test_model.py rebuilds the files. Vocabulary: tiktoken pins them. OpenAI's data: none is published, and
# None means that the content is unverified; only the length that the server announces is checked.
FILES = {  # path in the cache: (address, sha256 or None)
    **{f"{size}/{file}": (f"{HUB}/{size}/resolve/{revision}/{file}", sha256)
       for size, (revision, files) in GPT2_FILES.items() for file, sha256 in files.items()},
    "gpt2/encoder.json": (f"{BLOBS}/gpt-2/encodings/main/encoder.json",
                          "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"),
    "gpt2/vocab.bpe": (f"{BLOBS}/gpt-2/encodings/main/vocab.bpe",
                       "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"),
    **{f"{folder}/{split}.jsonl": (f"{BLOBS}/summarize-from-feedback/datasets/{folder}/{split}.jsonl", None)
       for folder in ("tldr_3_filtered", "tldr_3_filtered_queries") for split in ("train", "valid", "test")},
    **{f"comparisons/{name}.json": (f"{BLOBS}/summarize-from-feedback/dataset/comparisons/{name}.json", None)
       for name in [f"batch{i}" for i in (*range(3, 21), 22)] + ["batch0_cnndm", "cnndm0", "cnndm2", "edit_b2_eval_test"]},
    **{f"axis_evals/{name}.json": (f"{BLOBS}/summarize-from-feedback/dataset/axis_evals/{name}.json", None)
       for name in ("cnndm1", "cnndm3", "cnndm4", "tldraxis1", "tldraxis2")},
    **{f"labels/{name}.json": (f"{BLOBS}/lm-human-preferences/labels/{name}.json", None)
       for name in ("sentiment/offline_5k", "descriptiveness/offline_5k", "cnndm/offline_60k", "cnndm/online_45k",
                    "tldr/offline_60k", "tldr/online_45k")},
}


def cache_folder():
    """Where downloads go: $RLHF_CACHE, or ~/.cache/rlhf."""
    return os.environ.get("RLHF_CACHE") or os.path.join(os.path.expanduser("~"), ".cache", "rlhf")


def fetch(name):
    """Path of one of FILES in the cache, downloaded the first time. $RLHF_MIRROR, the address of a server that has the
    files under the same names (a cache folder served as it is will do), takes the place of the public addresses."""
    url, sha256 = FILES[name]
    mirror = os.environ.get("RLHF_MIRROR")
    return download(f"{mirror.rstrip('/')}/{name}" if mirror else url, os.path.join(cache_folder(), name), sha256)


def download(url, path, sha256=None, size=None):
    """Fetch url into path, unless path is there. -> path

    Bytes gather in path.part, which becomes path when its sha256 is right, or where none is given its size, as given or as
    the server announced it. A part left by an interruption is continued if the server can and sha256 or size will tell
    whether the pieces fit, else begun anew. Raises DataError."""
    if os.path.exists(path):
        return path
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    part, digest = f"{path}.part", hashlib.sha256()
    # one byte less than is there: of a part that is whole but for its name there is then still something to ask for
    start = max(0, os.path.getsize(part) - 1) if os.path.exists(part) and (sha256 or size) else 0
    try:
        response, start = _open_url(url, start)
        with response, open(part, "a+b") as f:
            f.truncate(start)
            f.seek(0)
            for block in iter(lambda: f.read(2**20), b""):
                digest.update(block)
            length = response.headers["Content-Length"]
            announced = start + int(length) if length else None
            with tqdm(initial=start, total=announced, desc=os.path.basename(path), unit="B", unit_scale=True, delay=1) as bar:
                for block in iter(lambda: response.read(2**20), b""):
                    f.write(block)
                    digest.update(block)
                    bar.update(len(block))
            f.flush()
            os.fsync(f.fileno())
    except (OSError, http.client.HTTPException, ValueError) as e:
        why = f"HTTP {e.code} {e.reason}" if isinstance(e, urllib.error.HTTPError) else getattr(e, "reason", None) or e
        raise DataError(f"{url} cannot be fetched ({why}); fetch it by hand, where there is a network, and put it at {path}"
                        ) from None
    got = os.path.getsize(part)
    if announced is not None and got < announced:
        raise DataError(f"{url} broke off after {got:,} of {announced:,} bytes; the same command again goes on")
    if digest.hexdigest() != sha256 if sha256 else got != (size or announced):
        os.remove(part)
        expected = f"the sha256 {sha256}" if sha256 else f"{size or announced or 'a known number of'} bytes"
        raise DataError(f"{url} gave {got:,} bytes with the sha256 {digest.hexdigest()} instead of {expected}; they are removed: "
                        f"try again, or put the right file at {path}")
    os.replace(part, path)
    return path


def _open_url(url, start):
    """-> response, the byte that it begins with: 0 where the server sends whole files only, or has none so long."""
    headers = {"User-Agent": "rlhf"} | ({"Range": f"bytes={start}-"} if start else {})
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30)
    except urllib.error.HTTPError as e:
        if e.code == 416 and start:
            return _open_url(url, 0)
        raise
    return response, start if response.status == 206 else 0


# ---------------------------------------------------------------------------------------------------------------------
# encodings in the form of OpenAI's GPT-2 release: its own one in, any of ours out for transformers

# in these files a byte is a printable character: itself where it is one, else the next free one from 256 on
PRINTABLE = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
SYMBOLS = {b: chr(b) for b in PRINTABLE} | {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in PRINTABLE)}


def gpt2_encoding(folder=None):
    """GPT-2's encoding of 50,257 tokens from encoder.json (ids) and vocab.bpe (merges, in order) of a folder, else of the
    cache, else downloaded there. Raises DataError where they are missing or do not belong together."""
    encoder, merges = (os.path.join(folder, name) if folder else fetch("gpt2/" + name) for name in ("encoder.json", "vocab.bpe"))
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
