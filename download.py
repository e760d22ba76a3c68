"""
Downloads: the public files of GPT-2 and of OpenAI's two projects, fetched once into a cache folder and checked.

    path = fetch("gpt2/encoder.json")             # ~/.cache/rlhf/gpt2/encoder.json, from the network the first time
    python download.py comparisons/batch3.json    # the same from a shell, which prints the path; --help lists all files
"""
import argparse
import hashlib
import http.client
import os
import sys
import urllib.error
import urllib.request

from tqdm import tqdm


class DataError(Exception):
    """Input that cannot be used: one sentence that says what is wrong, where (file and line), and what to do."""


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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog="files: " + ", ".join(FILES))
    parser.add_argument("names", nargs="+", metavar="FILE", help="name of a public file, see below")
    names = parser.parse_args().names
    try:
        for name in names:
            if name not in FILES:
                raise DataError(f"there is no public file {name!r} here; --help lists all")
            print(fetch(name))
    except DataError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
