"""Downloads from a server of the tests' own: cut short, wrong, missing, resumed."""
import hashlib
import os
import random
import subprocess
import sys

import pytest

import data
import download
from download import DataError

BODY = random.Random(0).randbytes(5000)
SHA = hashlib.sha256(BODY).hexdigest()


def refused(*args, says):
    """download() with these arguments ends in one sentence that has all of `says`."""
    with pytest.raises(DataError) as e:
        download.download(*args)
    assert all(word in str(e.value) for word in says) and "\n" not in str(e.value), e.value


def test_a_file_is_fetched_once(server, tmp_path, monkeypatch):
    """Catches a second request for what is there, and a part left behind."""
    server.files["some/file"] = BODY
    path = tmp_path / "new" / "file"
    for sha256, size in ((SHA, None), (None, 5000), (None, None)):
        assert download.download(server.url + "/some/file", path, sha256, size) == path
        assert path.read_bytes() == BODY and os.listdir(path.parent) == ["file"]
        download.download(server.url + "/some/file", path, sha256, size)
        path.unlink()
    assert server.asked == [("some/file", None)] * 3
    monkeypatch.setitem(download.FILES, "some/file", ("https://127.0.0.1:1/other", SHA))
    assert download.fetch("some/file") == str(server.cache / "some" / "file") and (server.cache / "some" / "file").read_bytes() == BODY


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
    download.download(server.url + "/f", path, SHA)
    assert path.read_bytes() == BODY and not (tmp_path / "f.part").exists()
    assert [wanted for _, wanted in server.asked] == [None, "bytes=2999-", "bytes=3999-"]


def test_parts_of_every_kind(server, tmp_path):
    """Catches trust in what lies there: a whole part, a too long one, one of another file, one that nothing can check."""
    server.files["f"] = BODY
    path, part = tmp_path / "f", tmp_path / "f.part"
    for left, asked in ((BODY, ["bytes=4999-"]), (BODY + b"more", ["bytes=5003-", None]), (b"", [None])):
        part.write_bytes(left)
        download.download(server.url + "/f", path, SHA)
        assert path.read_bytes() == BODY and [a for _, a in server.asked] == asked
        path.unlink()
        server.asked.clear()
    part.write_bytes(b"x" * 100)
    refused(server.url + "/f", path, SHA, says=["gave 5,000 bytes", SHA, str(path)])
    assert not part.exists() and not path.exists()
    part.write_bytes(b"x" * 100)
    download.download(server.url + "/f", path)
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
    assert download.download(server.url + "/f", path, SHA) == path


def test_without_network_the_sentence_says_what_to_put_where(server, tmp_path, monkeypatch):
    path = tmp_path / "f"
    refused(server.url + "/f", path, says=[server.url + "/f", "HTTP 404", str(path)])
    refused("http://127.0.0.1:1/f", path, says=["http://127.0.0.1:1/f", "refused", "by hand", str(path)])
    refused("no address", path, says=["no address", str(path)])
    assert os.listdir(tmp_path) == []
    monkeypatch.setenv("RLHF_MIRROR", "http://127.0.0.1:1/")
    for use in (data.gpt2_encoding, lambda: download.fetch("gpt2/encoder.json")):
        with pytest.raises(DataError) as e:
            use()
        assert "http://127.0.0.1:1/gpt2/encoder.json" in str(e.value) and str(server.cache / "gpt2" / "encoder.json") in str(e.value)


def test_the_table_of_files():
    for name, (url, sha256) in download.FILES.items():
        assert url.startswith("https://") and url.endswith("/" + name.split("/")[-1])
        assert sha256 is None or len(bytes.fromhex(sha256)) == 32
    assert all(download.FILES[f"gpt2{size}/{file}"][1] for size in ("", "-medium", "-large", "-xl") for file in ("config.json", "model.safetensors"))
    assert len({url for url, _ in download.FILES.values()}) == len(download.FILES)


def test_files_are_fetched_from_a_shell(server):
    """Catches a path that is not printed, a file fetched twice, and a wrong name or no network that end in a traceback."""
    server.files["comparisons/batch3.json"] = b"{}\n"

    def command(*names):
        return subprocess.run([sys.executable, download.__file__, *names], capture_output=True, text=True,
                              env={**os.environ, "RLHF_CACHE": str(server.cache), "RLHF_MIRROR": server.url})
    for _ in range(2):
        done = command("comparisons/batch3.json")
        assert (done.returncode, done.stdout) == (0, f"{server.cache / 'comparisons' / 'batch3.json'}\n") and server.asked == [("comparisons/batch3.json", None)]
    for name, says in (("batch3.json", "no public file 'batch3.json'"), ("comparisons/batch4.json", "HTTP 404")):
        done = command(name)
        assert done.returncode == 2 and says in done.stderr and done.stderr.count("\n") == 1 and not done.stdout
    assert "labels/sentiment/offline_5k.json" in command("--help").stdout
