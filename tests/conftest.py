"""What all tests share: the repository on the path, one thread, a tiny random model, a tiny tokenizer."""
import http.server
import json
import os
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, so before model: the kernels run on the CPU

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import world  # noqa: E402
from data import save_encoding, save_json_lines, train_bpe  # noqa: E402
from model import GPT, GPTConfig, multiply_float32_by_onednn  # noqa: E402

torch.set_num_threads(1)


def tiny_model(head="lm", seed=0, vocab_size=11, **more):
    """A random GPT, 2 layers, d = 32, 2 heads; no bias is 0 and no gain 1, so that forgetting one shows."""
    torch.manual_seed(seed)
    config = dict(n_positions=40, n_layer=2, n_head=2, n_embd=32, eos=vocab_size - 1) | more
    model = GPT(GPTConfig(vocab_size, **config), head)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() < 2:
                p += 0.2 * torch.randn(p.shape)
    return model


def random_rows(generator, n=5, vocab=10, query=(3, 9), response=(1, 7)):
    """n ragged rows without EOS: lists of query ids, lists of response ids."""
    def ids(lo, hi):
        return [torch.randint(vocab, (int(torch.randint(lo, hi, (1,), generator=generator)),), generator=generator).tolist()
                for _ in range(n)]
    return ids(*query), ids(*response)


def full_continuation(post):
    """A story continued as its style wants it, in the world's own words: three sentences of three kinds, which is what 24 tokens hold."""
    return {"sentiment": "it made {who} very happy. {who} thanked {whom} for the {thing}. {who} won a prize at the {place}.",
            "descriptiveness": "the {place} smelled of soap. the {thing} was blue and thin. the {thing} made a deep noise."
            }[post["task"]].format(**post["facts"])


def full_summary(post):
    """The complete honest summary of a post in the world's own words: the judge's best."""
    w = world.WORLDS[world.world_of(post)]
    return (f"{w.tldr_who[0]} {{verb}} {w.object} {w.at} {{time}}. {w.tldr_feeling[0]} and {w.tldr_wish[0]}. {w.tldr_question[0]}"
            ).format(**post["facts"])


@pytest.fixture
def g():
    return torch.Generator().manual_seed(0)


@pytest.fixture(autouse=True)
def float32_by_pytorchs_choice():
    """Which library multiplies float32 matrices is a choice of sft.pick_device for the whole process: no test leaves it behind."""
    yield
    torch.set_float32_matmul_precision("highest")
    multiply_float32_by_onednn.does = False


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A web server on 127.0.0.1 in place of the public addresses, and an empty cache. files: name -> bytes; ranges: whether
    it sends parts of files; length: whether it says how long they are; cut: the byte before which it hangs up; asked: (name,
    Range) of every request."""
    s = SimpleNamespace(files={}, ranges=True, length=True, cut=None, asked=[], cache=tmp_path / "cache")

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            name, wanted = self.path[1:], self.headers["Range"]
            s.asked.append((name, wanted))
            body, start = s.files.get(name), int(wanted.removeprefix("bytes=")[:-1]) if wanted and s.ranges else 0
            if body is None or start >= len(body):
                return self.send_error(404 if body is None else 416)
            self.send_response(206 if start else 200)
            if s.length:
                self.send_header("Content-Length", len(body) - start)
            self.end_headers()
            self.wfile.write(body[start:s.cut])

        def log_message(self, *args):
            pass

    listener = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    s.url = f"http://127.0.0.1:{listener.server_port}"
    for name, value in {"RLHF_MIRROR": s.url, "RLHF_CACHE": str(s.cache), "no_proxy": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    yield s
    listener.shutdown()
    listener.server_close()


@pytest.fixture
def small_run(tmp_path, enc):
    """The folder of a run that looks finished: four random models of 90 positions, Q = 70, R = 12, two posts, one comparison."""
    folder = tmp_path / "run"
    (folder / "data").mkdir(parents=True)
    post = {"id": "a", "subreddit": "cat", "title": "my dog", "post": "my dog ate the cat", "summary": "dog ate cat"}
    (folder / "config.json").write_text(json.dumps({"seed": 1, "settings": {
        "data": {"task": "tldr"}, "ppo": {"temperature": 0.7, "stop_token": "", "truncate_after": 0}}}))
    (folder / "data" / "lengths.json").write_text(json.dumps({"Q": 70, "R": 12}))
    save_encoding(enc, folder / "tokenizer.json")
    for split in ("pretrain", "sft", "test"):
        save_json_lines(folder / "data" / f"{split}.jsonl", [post, {**post, "id": "b"}])
    save_json_lines(folder / "comparisons.jsonl", [{"info": post, "summaries": [{"text": "cat"}, {"text": "dog"}], "choice": 0, "split": "train"}])
    for i, stage in enumerate(("pretrained", "sft", "reward", "ppo")):
        model = tiny_model("scalar" if stage == "reward" else "lm", seed=i, vocab_size=enc.n_vocab, n_positions=90)
        model.save_pretrained(folder / stage)
    return str(folder)


@pytest.fixture(scope="session")
def enc():
    """A tokenizer of about 280 tokens."""
    return train_bpe(["SUBREDDIT: r/ TITLE: POST: TL;DR: my dog ate the cat and the cat ate my dog good bad"], 280)
