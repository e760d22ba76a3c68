"""Real data: what is tested on is never trained on, labels keep their meaning, weights and vocabulary agree, what cannot fit is refused."""
import gzip
import json
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_model
from torch.utils.flop_counter import FlopCounterMode

import corpus
import data
import estimate
import evaluation
import ppo
import real
import reward
import run
import sft
from data import DataError

RNG = random.Random(0)
WORDS = "my cat ran to the office and slept all day . it was mine ; she said yes".split()


def words(n):
    return " ".join(RNG.choice(WORDS) for _ in range(n))


def post(i, **changes):
    return {"id": f"t3_{i}", "subreddit": "tifu", "title": f"number {i}", "post": f"story {i} {words(20)}", "summary": words(6)} | changes


def comparison(info, i=0):
    return {"info": {k: info[k] for k in ("id", "subreddit", "title", "post")}, "summaries": [{"text": f" a {i}", "policy": "x", "note": "n"},
            {"text": f" b {i}", "policy": "y"}], "choice": i % 2, "worker": "w", "batch": "b", "split": "s", "extra": {"confidence": 3, "other": 1}}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def a_run(tmp_path, task="tldr", name="test", **files):
    settings = run.preset(name)
    settings.data.task, settings.model.vocab_size = task, 300
    return SimpleNamespace(folder=str(tmp_path / "run"), settings=settings, seed=1, device="cpu", real=True,
                           files={key: files.get(key) for key in real.FILES})


@pytest.fixture
def book(tmp_path):
    (tmp_path / "books").mkdir()
    for name in "ab":
        (tmp_path / "books" / f"{name}.txt").write_text("\n".join(words(9) + "." for _ in range(1000)))
    return str(tmp_path / "books")


# ---------------------------------------------------------------------------------------------------------------------
# splits

def test_no_post_that_is_tested_on_is_trained_on(tmp_path, capsys):
    """Catches a test post that comes back under its id, under its text with other blanks, as a prompt, or in another split."""
    posts, tests = [post(i) for i in range(40)], [post(100 + i, facts={"who": "x"}) for i in range(6)]
    again = [{**tests[0], "post": "another text"}, {**tests[1], "id": "other", "post": tests[1]["post"].replace(" ", " \n")}]
    r = a_run(tmp_path, posts=write(tmp_path / "p.jsonl", posts + again + tests[4:]), test_posts=write(tmp_path / "t.jsonl", tests),
              prompts=write(tmp_path / "q.jsonl", [{**p, "summary": "", "facts": {}} for p in posts + tests]))
    enc, splits = real.split_posts(r)
    assert set(splits) == {"test", "valid", "pretrain", "sft", "prompts"} and [p["id"] for p in splits["test"]] == [p["id"] for p in tests]
    assert not any("facts" in p for part in splits.values() for p in part)  # a field of that name would call the gold judge
    assert len(splits["valid"]) == 5 and len(splits["pretrain"]) == 35 and len(splits["prompts"]) == 35
    held = {p["id"] for p in splits["test"] + splits["valid"]} | {"other"}
    assert not held & {p["id"] for name in ("pretrain", "sft", "prompts") for p in splits[name]}
    r.settings.data.test = 2  # the other four are not trained on either
    few = real.split_posts(r)[1]
    assert len(few["test"]) == 2 and not {p["id"] for p in tests} & {p["id"] for name in ("valid", "pretrain", "sft") for p in few[name]}
    r.files["test_posts"] = None
    r.settings.data.test = 12
    splits = real.split_posts(r)[1]
    assert len(splits["test"]) == 5 and not {p["id"] for p in splits["test"]} & {p["id"] for p in splits["valid"] + splits["pretrain"]}
    for id in ("line-1", "17"):  # ids that we gave, or that are rows' numbers, are no proof
        numbers = [{"id": id, "title": "t", "post": "x"}, {"id": id, "title": "t", "post": "y"}]
        assert real.without(numbers[:1], numbers[1:]) == numbers[:1] and real.without(numbers, numbers) == []
    assert data.post_key(numbers[0]) != data.post_key(numbers[1])
    assert "4 posts are not trained on: they are tested on" in capsys.readouterr().out


def test_comparisons_are_split_by_post_and_tested_posts_are_held_out():
    posts = [post(i) for i in range(20)]
    rows = [comparison(posts[i % 20], i) for i in range(60)]
    rows[3]["info"]["id"] = None  # the same post as its neighbours, known by its text
    real.split_comparisons_by_post(rows, [{**posts[i], "id": "other" if i == 3 else posts[i]["id"]} for i in (3, 4, 5)], random.Random(0))
    splits = {i: {row["split"] for row in rows[i::20]} for i in range(20)}
    assert all(splits[i] == {"valid"} for i in (3, 4, 5)) and all(len(s) == 1 for i, s in splits.items())
    assert 4 <= sum(s == {"valid"} for s in splits.values()) <= 8
    assert rows[0]["summaries"][0]["note"] == "n" and rows[0]["worker"] == "w"
    for row in rows[::2]:  # the same posts without ids; and by way of them, the posts of the others under new ids
        row["info"]["id"] = None
    rows += [comparison({**posts[i], "id": f"new-{i}", "post": f"another text {i}"}) for i in range(20)]
    rows += [comparison({**posts[i], "id": f"new-{i}"}) for i in range(20)]
    real.split_comparisons_by_post(rows, posts[:1], random.Random(1))
    assert all(len({row["split"] for row in rows[i::20]}) == 1 for i in range(20)) and rows[60]["split"] == "valid"


@pytest.mark.parametrize("own, kept", [
    (["train"] * 6 + ["valid1"] * 2 + ["valid2"] * 2, True), (["valid1"] * 6 + ["valid2"] * 4, False), ([None] * 10, False),
    (["train"] * 5 + ["valid1"] * 5, False), (["train"] * 4 + ["valid1"] * 4 + ["test"] * 2, False)])
def test_a_files_own_split_counts(own, kept):
    """... where both sides have posts of their own. Catches held-out posts that were trained on, and an accuracy on other posts than the
    file's; in the last two a post is on both sides, or on neither."""
    rows = [comparison(post(i // 2 if own.count("valid1") != 5 else i % 3), i) for i in range(10)]
    for row, name in zip(rows, own):
        row["split"] = name
    real.split_comparisons_by_post(rows, [], random.Random(1))
    held_out = [i for i, row in enumerate(rows) if row["split"] == "valid"]
    assert (held_out == [6, 7, 8, 9]) == kept and 0 < len(held_out) < 10 and held_out != [4, 5, 6, 7]
    assert not {rows[i]["info"]["post"] for i in held_out} & {row["info"]["post"] for row in rows if row["split"] == "train"}
    real.split_comparisons_by_post(rows, [post(0)], random.Random(1))
    assert rows[0]["split"] == "valid"


def test_posts_of_held_out_comparisons_are_not_trained_on(tmp_path, monkeypatch):
    """Catches 'labels on posts it has not seen' of posts that SFT has learned by heart; with another seed on the same data too."""
    posts = [post(i) for i in range(60)]
    r = a_run(tmp_path, posts=write(tmp_path / "p.jsonl", posts), comparisons=write(tmp_path / "c.jsonl", [
        comparison(posts[i] if i % 2 else {**posts[i], "id": "other"}, i) for i in range(50)]))
    r.config = {"settings": {"data": {}}}
    monkeypatch.setattr(run, "check_fit", lambda *args: None)
    run.stage_data(r)
    r.posts, r.enc, r.round, r.seed = sft.Posts(r.folder + "/data"), data.load_encoding(r.folder + "/tokenizer.json"), 1, 2
    run.stage_collect(r)
    rows = data.load_comparisons(r.folder + "/comparisons.jsonl")[0]
    held_out, train = ([c["info"] for c in rows if c["split"] == split] for split in ("valid", "train"))
    for name in ("pretrain", "sft"):
        assert real.without(r.posts[name], held_out) == r.posts[name] != real.without(r.posts[name], train)
    assert len(held_out) >= 10


@pytest.mark.parametrize("changes, says", [
    ({"title": "long " * 200}, r"c.jsonl:4: post t3_103: its title alone"), ({"id": "t3_0"}, "leaves 0 comparisons to train on|held out, on posts of their own")])
def test_comparisons_that_the_reward_stage_would_refuse_are_refused_at_once(tmp_path, changes, says):
    """Catches pretraining for hours in front of comparisons that cannot be used: a title too long, or all of them about one post."""
    rows = [comparison(post(100 + i, **(changes if i == 3 or "id" in changes else {}), **({"post": "one"} if "id" in changes else {})), i)
            for i in range(12)]
    r = a_run(tmp_path, posts=write(tmp_path / "p.jsonl", [post(i) for i in range(40)]), comparisons=write(tmp_path / "c.jsonl", rows))
    with pytest.raises(DataError, match=says):
        run.stage_data(r)


def test_posts_with_titles_too_long_are_left_out(tmp_path, capsys):
    """Catches one title that refuses a file of a hundred thousand posts, in a file that the run then removes."""
    posts = [post(i, title="long " * (200 if i % 10 == 3 else 20)) for i in range(40)]
    r = a_run(tmp_path, posts=write(tmp_path / "p.jsonl", posts), prompts=write(tmp_path / "q.jsonl", posts))
    enc, splits = real.split_posts(r)
    assert sum(len(splits[name]) for name in ("test", "valid", "pretrain")) == 36 and len(splits["prompts"]) == len(splits["pretrain"])
    for part in splits.values():
        assert not any(len(p["title"]) > 500 for p in part) and max(len(data.encode_query(enc, p, 128)) for p in part) <= 128
    assert "titles alone need more than the 128 tokens" in capsys.readouterr().out


def test_the_filter_drops_what_the_paper_drops(tmp_path):
    posts = [post(i, subreddit="tifu" if i % 2 else "elsewhere", summary=words(30)) for i in range(60)]
    r = a_run(tmp_path, posts=write(tmp_path / "p.jsonl", posts))
    r.settings.model.vocab_size = 600
    assert {p["subreddit"] for p in real.split_posts(r)[1]["pretrain"]} == {"tifu", "elsewhere"}
    r.settings.data.filter = True
    assert {p["subreddit"] for p in real.split_posts(r)[1]["pretrain"]} == {"tifu"}
    raw = [{"id": f"t1_{i}", "body": words(9), "content": f"comment {i}", "summary": words(30)} for i in range(200)]  # Webis' comments
    raw += [{"title": None, "subreddit": "tifu", "selftext": f"no title {i}", "summary": words(30)} for i in range(200)]
    raw += [{"id": i, "subreddit": "tifu", "title": "half a \ud83d", "selftext": f"story {i} {words(20)}", "summary": words(30)} for i in range(60)]
    r.files["posts"], r.settings.data.test = write(tmp_path / "raw.jsonl", raw), 6  # what is dropped counts for no split
    splits = real.split_posts(r)[1]
    assert {name: len(part) for name, part in splits.items()} == {"test": 6, "valid": 6, "pretrain": 48, "sft": 40}
    assert not any(p["title"] != "half a ?" for part in splits.values() for p in part)
    r.settings.model.vocab_size = 258  # bytes: 30 words would be far more than 48 tokens of its own
    assert len(real.split_posts(r)[1]["test"]) == 6


@pytest.mark.parametrize("task, given, says", [
    ("tldr", ["posts"], "--comparisons"), ("tldr", ["text"], "--posts"), ("tldr", ["posts", "comparisons", "labels"], "--task sentiment"),
    ("sentiment", ["text"], "--labels"), ("sentiment", ["posts", "comparisons"], "--text and --labels")])
def test_files_that_do_not_go_together(tmp_path, task, given, says):
    file = write(tmp_path / "f", [{}])
    with pytest.raises(DataError, match=says):
        real.check_files({name: ([file] if name == "text" else file) if name in given else None for name in real.FILES}, task)
    if "posts" in given:
        with pytest.raises(DataError, match="is a folder; --posts takes a file"):
            real.check_files({**dict.fromkeys(real.FILES), "posts": str(tmp_path), "comparisons": file}, "tldr")
    assert real.has_mock({"labels": "SST2.TSV"})


# ---------------------------------------------------------------------------------------------------------------------
# continuations

def test_excerpts_have_what_follows_as_reference(tmp_path, book):
    """The reference is the book's next tokens, up to the first '.' from index 16 on; the texts tested on are not trained on."""
    r = a_run(tmp_path, "sentiment", text=[book])
    r.settings.data.test, r.settings.data.pretrain, r.settings.data.sft = 3, 50, 20
    enc, splits = real.split_excerpts(r)
    whole = " ".join("".join(corpus.book_text(f"{book}/{name}.txt")) for name in "ab")
    for p in splits["pretrain"] + splits["test"]:
        assert p["post"] + p["summary"] in whole and p["post"].endswith(".") and p["task"] == "sentiment"
        ids, (stop,) = enc.encode_ordinary(p["summary"]), enc.encode_ordinary(".")
        assert stop not in ids[16:-1] and len(ids) <= 25
    assert any(p["summary"].endswith(".") for p in splits["pretrain"]) and len(splits["sft"]) == 20
    assert not {p["post"] for p in splits["pretrain"]} & {p["post"] for p in splits["test"] + splits["valid"]}
    assert not {p["id"] for p in splits["pretrain"]} & {p["id"] for p in splits["test"] + splits["valid"]}


def test_four_way_labels_become_one_choice_of_the_best(enc):
    texts = ["she ran.", "a dog ate.", "a dog ate.", "my cat."]
    labels = [{"query": enc.encode_ordinary("the cat."), "samples": [enc.encode_ordinary(" " + t) for t in texts], "best": best} for best in (0, 1, 3)]
    rows = real.labels_as_comparisons(labels, enc, "sentiment", random.Random(0))
    assert {row["choice"] for row in rows} == {0, 1} and len(rows) == 2 + 2 + 2
    groups = reward.group_by_post(enc, rows, 64, 24)
    reward.check_labels(groups, "best_of")
    for label, g in zip(labels, groups, strict=True):
        best = reward.ranks_of([g])[0].argmin()
        assert data.decode_response(enc, g["responses"][best]) == texts[label["best"]] and enc.decode(g["query"]) == "the cat."


def test_a_labelled_excerpt_keeps_its_end(tmp_path, book, monkeypatch):
    """Catches samples that continue nothing: in an own vocabulary a label's query is longer than Q, and what stood before them was cut."""
    gpt2 = data.train_bpe(["".join(corpus.book_text(f"{book}/a.txt"))] + ["zebra quagga okapi"] * 9, 700)
    texts = [f"{words(30)}. zebra {i} quagga okapi zebra quagga okapi zebra quagga okapi." for i in range(20)]
    (tmp_path / "l.json").write_text(json.dumps([{"query": gpt2.encode_ordinary(text), "best": 0, **{
        f"sample{k}": gpt2.encode_ordinary(f" it ran {k}.") for k in range(4)}} for text in texts]))
    monkeypatch.setattr(real, "gpt2_encoding", lambda folder=None: gpt2)
    r, kept = a_run(tmp_path, "sentiment", "gpt2-sentiment", text=[book], labels=str(tmp_path / "l.json")), {}
    s = r.settings
    r.config, s.model.init, s.data.pretrain, s.data.sft, s.data.test, s.model.max_query = {"settings": {"data": {}}}, "", 20, 20, 2, 70
    monkeypatch.setattr(run, "check_fit", lambda r, enc, Q, *rest: kept.update(enc=enc, Q=Q))
    run.stage_data(r)
    groups = reward.group_by_post(kept["enc"], real.read_comparisons(r, kept["enc"]), kept["Q"], 24)
    assert len(groups) == 20 and kept["Q"] > 64  # longer than any excerpt of the text
    for text, g in zip(texts, groups):
        found = kept["enc"].decode(g["query"])
        assert text.endswith(" " + found) and len(text) > len(found) and len(kept["enc"].encode_ordinary(text[-len(found) - 12:])) > 70
    assert real.last_words(kept["enc"], "zebra" * 50, 9) == ("zebra" * 50)[-len(real.last_words(kept["enc"], "zebra" * 50, 9)):] != ""


# ---------------------------------------------------------------------------------------------------------------------
# vocabulary and weights from elsewhere

def test_weights_and_vocabulary_must_agree(tmp_path, enc):
    folder = str(tmp_path / "w")
    tiny_model(vocab_size=enc.n_vocab, n_positions=60).save_pretrained(folder)
    m = run.ModelSettings(init=folder)
    with pytest.raises(DataError, match="cannot be fetched"):  # no vocabulary of its own: GPT-2's, which no network brings
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RLHF_MIRROR", "http://127.0.0.1:1")
            patch.setenv("RLHF_CACHE", str(tmp_path / "none"))
            real.vocabulary(m, [])
    data.save_vocabulary(enc, folder)
    own = real.vocabulary(m, [])
    assert own._mergeable_ranks == enc._mergeable_ranks == real.vocabulary(run.ModelSettings(vocab=folder), [])._mergeable_ranks
    assert real.check_init(folder, own, 50, 10).n_embd == 32
    with pytest.raises(DataError, match="need 61 positions"):
        real.check_init(folder, own, 51, 10)
    for other in (data.train_bpe(["one two"], 262), data.train_bpe(["my cat ran and ran and ran to the office " * 9 + words(200)], enc.n_vocab)):
        with pytest.raises(DataError, match="vocabulary"):
            real.check_init(folder, other, 20, 10)
    config = json.loads((tmp_path / "w" / "config.json").read_text())
    (tmp_path / "w" / "config.json").write_text(json.dumps({**config, "eos_token_id": 3}))
    with pytest.raises(DataError, match="end texts with 3"):
        real.check_init(folder, own, 20, 10)
    (tmp_path / "w" / "config.json").write_text("[1")
    with pytest.raises(DataError, match="config.json"):
        real.check_init(folder, own, 20, 10)
    with pytest.raises(DataError, match="neither a folder"):
        real.check_init("gpt3", own, 20, 10)
    with pytest.raises(DataError, match="holds no vocabulary"):
        real.vocabulary(run.ModelSettings(vocab=str(tmp_path)), [])


# ---------------------------------------------------------------------------------------------------------------------
# stored tokens

def test_stored_rows_of_a_run(tmp_path, enc, book):
    """encode_posts of the split; for pretraining the text besides, the held-out stretches excepted; each row's first token is the query."""
    (tmp_path / "data").mkdir()
    posts = [post(i, **({"task": "cnndm"} if i == 2 else {})) for i in range(5)]
    for split in ("pretrain", "sft"):
        write(tmp_path / "data" / f"{split}.jsonl", posts)
    r = SimpleNamespace(folder=str(tmp_path), enc=enc, Q=90, R=12, config={"text": [book], "settings": {"model": {"max_query": 100}}})
    queries, responses = sft.encode_posts(enc, posts, 100, 12)
    assert enc.decode(queries[2]).startswith("Article:") and enc.decode(responses[2])[0] != " "
    assert [list(part) for part in sft.stored_posts(r, "sft")] == [queries, responses]
    rows = [row for name in "ab" for row in corpus.text_rows(f"{book}/{name}.txt", enc, 102)]
    sizes = [len(enc.decode_bytes([i for i in row if i < enc.n_vocab - 1])) for row in rows]
    ends = np.cumsum(sizes)
    stretch = 4096
    assert 17 * stretch < ends[-1] < 20 * stretch  # the second of them is held out
    stretches = [(int(end - size) // stretch, int(end - 1) // stretch) for size, end in zip(sizes, ends)]
    kept = [row for row, (a, b) in zip(rows, stretches) if not {a % 20, b % 20} & {1} and len(row) > 1]
    a, b = sft.stored_posts(r, "pretrain")
    assert list(a) == queries + [row[:1] for row in kept] and list(b) == responses + [row[1:] for row in kept]
    assert list(sft.run_text(r)[1]) == [row for row, (a, b) in zip(rows, stretches) if a == b == 1 or a == b == 21] != []


def test_stored_groups_are_the_groups(tmp_path, enc):
    posts = [post(i) for i in range(6)]
    file = write(tmp_path / "c.jsonl", [comparison(posts[i % 6], i) for i in range(14)])
    comparisons = data.load_comparisons(file)[0]
    plain = reward.group_by_post(enc, comparisons, 60, 12)
    for _ in range(2):  # encoded, then mapped
        stored = reward.StoredGroups.of(str(tmp_path / "tokens"), file, enc, comparisons, 60, 12)
        assert list(stored) == plain and stored[-1] == plain[-1] and stored[1:3] == plain[1:3] and len(stored) == 6
        assert list(stored.take([4, 1])) == [plain[4], plain[1]]
    assert comparisons[0]["extra"] == {"confidence": 3, "other": 1}


# ---------------------------------------------------------------------------------------------------------------------
# measures

def test_bits_per_byte_token_by_token(tmp_path, enc):
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "valid.jsonl", [post(i) for i in range(3)])
    r = SimpleNamespace(folder=str(tmp_path), enc=enc, Q=90, R=12, config={"settings": {"model": {"max_query": 90}}})
    model = tiny_model(vocab_size=enc.n_vocab, n_positions=120)
    bits, raw = 0.0, b""
    for q, a in zip(*sft.stored_posts(r, "valid")):
        with torch.no_grad():
            logp = F.log_softmax(model(torch.tensor([q + a]))[0], -1)
        bits -= sum(logp[t, token].item() for t, token in enumerate((q + a)[1:])) / math.log(2)
        raw += enc.decode_bytes((q + a)[1:-1])
    measured = evaluation.held_out_bits(model, r)
    assert set(measured) == {"posts"} and measured["posts"]["model"] == pytest.approx(bits / len(raw), rel=1e-4)
    assert measured["posts"]["bytes"] == len(raw) and measured["posts"]["gzip"] == 8 * len(gzip.compress(raw, 9)) / len(raw)
    assert "bits per byte" in evaluation.bits_text(measured)[0]


# ---------------------------------------------------------------------------------------------------------------------
# the estimate

def test_parameters_are_counted_exactly():
    model = tiny_model()
    assert estimate.parameters(model.config) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("recompute", [False, True])
def test_what_is_kept_is_what_autograd_keeps(monkeypatch, recompute):
    """Catches a term left out: bytes of all that the forward pass of the blocks saves, weights apart, in float32."""
    monkeypatch.setattr(estimate, "choose_precision", lambda device: (torch.float32, ""))
    model = tiny_model(n_embd=64, n_head=8, n_positions=64)
    model.recompute, weights, seen = recompute, {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in weights:
            seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = model.hidden(torch.zeros(8, 64, dtype=torch.long))
    expected = estimate.kept(model.config, 8, 64, "cpu", recompute)
    if recompute:  # plus one block's, which are there only while it is computed again
        expected -= (estimate.kept(model.config, 8, 64, "cpu") - 8 * 64 * 64 * 4) / 2
    assert out.requires_grad and .9 < expected / sum(seen.values()) < 1.15


def test_what_cannot_fit_is_refused_with_advice(monkeypatch, capsys):
    s, sizes = run.preset("gpt2-large-tldr"), {"pretrain": 10**8, "sft": 4 * 10**7, "query": 300, "groups": 20000, "responses": 80000}
    c = run.GPTConfig(n_layer=36, n_head=20, n_embd=1280)
    assert estimate.parameters(c) == 774_030_080
    monkeypatch.setattr(estimate, "choose_precision", lambda device: (torch.bfloat16, ""))
    monkeypatch.setattr(estimate, "matmul_speed", lambda device: 6e14)
    monkeypatch.setattr(estimate, "free_memory", lambda device: 79 * 2**30)
    estimate.check_resources(s, c, 512, 48, sizes, "cuda", True)  # one card of 80 GB
    printed = capsys.readouterr().out
    assert "774,030,080 parameters" in printed and "pretrain" not in printed and "79.0 GB are free" in printed
    for free, stage, part in ((30, "ppo", "ppo.micro below 16"), (10, "sft", "sft.batch below 128")):
        monkeypatch.setattr(estimate, "free_memory", lambda device: free * 2**30)
        with pytest.raises(DataError, match=f"stage {stage} needs about .* try .*--{part}"):
            estimate.check_resources(s, c, 512, 48, sizes, "cuda", True)
    s.ppo.micro = 64  # more than the sampler's cache
    whole = estimate.stages(s, c, 512, 48, sizes, "cuda")
    s.ppo.recompute = s.sft.recompute = False
    plain = estimate.stages(s, c, 512, 48, sizes, "cuda")
    assert all(plain[name][0] > whole[name][0] and plain[name][1] < whole[name][1] for name in ("sft", "ppo"))


def estimated(sizes, device="cpu", c=None, **changes):
    s = run.preset("tiny", {key.replace("__", "."): value for key, value in changes.items()})
    sizes = {"pretrain": 10**5, "sft": 10**4, "query": 32, "groups": 100, "responses": 500, **sizes}
    return estimate.stages(s, c or tiny_model().config, 32, 16, sizes, device)


def test_halves_side_by_side_are_in_the_estimate(monkeypatch):
    """Catches the second half's gradients left out, or counted where the batch is small, cut into parts, or on a GPU."""
    def memory(threads, **more):
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        return [estimated({"pretrain": 100, "sft": 100, "query": 8, "responses": 4, "groups": 1}, **more)[stage][0] for stage in ("sft", "ppo")]

    P = estimate.parameters(tiny_model().config)
    for batch, micro, device, sets in (16, 0, "cpu", 1), (15, 0, "cpu", 0), (16, 8, "cpu", 0), (16, 0, "cuda", 0):
        more = dict(device=device, sft__batch=batch, sft__micro=micro, ppo__batch=batch, ppo__minibatches=1, ppo__micro=micro)
        assert [two - one for one, two in zip(memory(1, **more), memory(2, **more))] == [4 * P * sets] * 2


def test_operations_of_sampling_and_of_ptx_are_those_done():
    """Catches a factor left out (samples per post, ptx_ratio, epochs, the backward pass, logits): torch counts the operations."""
    model = tiny_model(n_embd=128, n_layer=6, n_positions=48, vocab_size=600)  # a query's last layer is worked out at its end only
    queries, R = [[7] * 32] * 6, 16
    with FlopCounterMode(display=False) as counter:
        for n in (1, 2, 1):  # as run.py's mixture of policies
            reward.sample_responses(model, queries, R, 1.0, torch.Generator().manual_seed(0), n)
    flops = estimated({"sampled": 6}, c=model.config)["collect"][1]
    assert .85 < counter.get_total_flops() / flops < 1.15
    rows = ([[7] * 32] * 9, [[8] * 16] * 9, .5)
    settings = run.preset("tiny", {"ppo.ptx_coef": 1.0, "ppo.ptx_ratio": 3}).ppo
    with FlopCounterMode(display=False) as counter:
        for _ in range(2 * 2):  # epochs and minibatches of one iteration, four episodes each
            ppo.ptx_backward(model, rows, 4, settings, torch.Generator().manual_seed(0))
    plain, ptx = (estimated({}, c=model.config, ppo__iterations=1, ppo__batch=8, ppo__epochs=2, **more)["ppo"]
                  for more in ({}, {"ppo__ptx_coef": 1.0, "ppo__ptx_ratio": 3}))
    assert .85 < counter.get_total_flops() / (ptx[1] - plain[1]) < 1.2


def test_rounds_and_mixtures_multiply(monkeypatch, capsys):
    """Catches rounds, their labels and runs of PPO, counted once; mixed rows left out; the CPU's cache in half precision."""
    one, three, online = (estimated({}, collect__rounds=n, collect__online=o) for n, o in ((1, False), (3, False), (3, True)))
    assert [three[name][1] / one[name][1] for name in ("sft", "reward", "ppo")] == pytest.approx([1, 2, 3])
    assert [online[name][1] / one[name][1] for name in ("reward", "ppo")] == pytest.approx([2, 1]) and "collect" not in one
    mixed = estimated({}, sft__mix=.75)
    assert mixed["sft"][1] == pytest.approx(4 * one["sft"][1]) and mixed["pretrain"] == one["pretrain"]
    monkeypatch.setattr(estimate, "choose_precision", lambda device: (torch.bfloat16, ""))
    c = tiny_model().config
    cache = 48 * c.n_layer * 2 * c.n_embd * 384
    memory = [estimated({"sampled": 1000}, device)["collect"][0] - 8 * estimate.parameters(c) for device in ("cpu", "cuda")]
    assert memory == [4 * cache, 2 * cache]
    monkeypatch.setattr(estimate, "matmul_speed", lambda device: 1e12)
    monkeypatch.setattr(estimate, "free_memory", lambda device: 2**50)
    sizes = {"pretrain": 10**5, "sft": 10**4, "query": 32, "groups": 100, "responses": 500}
    for more, says in (({}, "besides data, collection and evaluation"), ({"sampled": 10**6}, "besides data and evaluation")):
        estimate.check_resources(run.preset("tiny"), c, 32, 16, {**sizes, **more}, "cuda", False)
        assert says in capsys.readouterr().out
    assert estimate.advice("collect", run.preset("tiny")) == "--model.max_query below 128, or a smaller model"


# ---------------------------------------------------------------------------------------------------------------------
# the whole pipeline

def test_continuations_from_given_weights_go_through_every_stage(tmp_path, book, monkeypatch, capsys):
    """4-way labels, excerpts, weights and vocabulary of a folder, Ziegler's settings: as the preset gpt2-sentiment, but tiny."""
    enc = data.train_bpe(["".join(corpus.book_text(f"{book}/a.txt"))], 300)
    tiny_model(vocab_size=enc.n_vocab, n_positions=100).save_pretrained(tmp_path / "w")
    data.save_vocabulary(enc, tmp_path / "w")
    labels = [{"query": enc.encode_ordinary(f"the cat number {i}."), "best": i % 4,
               **{f"sample{k}": enc.encode_ordinary(f" it ran {words(k + 2)}") + [50259] * k for k in range(4)}} for i in range(30)]
    (tmp_path / "l.json").write_text(json.dumps(labels))
    monkeypatch.setattr(real, "gpt2_encoding", lambda folder=None: enc)
    settings = run.preset("gpt2-sentiment")
    for stage, changes in {"model": dict(init=str(tmp_path / "w")), "data": dict(pretrain=40, sft=20, test=4), "sft": dict(batch=8),
                           "reward": dict(batch=8), "ppo": dict(iterations=1, batch=4), "evaluation": dict(best_of=2)}.items():
        for key, value in changes.items():
            setattr(getattr(settings, stage), key, value)
    out = str(tmp_path / "out")
    run.run_pipeline(settings, 1, out, "gpt2-sentiment", device="cpu", text=[book], labels=str(tmp_path / "l.json"))
    results = json.loads((tmp_path / "out" / "report" / "results.json").read_text())
    assert set(results["bits_per_byte"]) == {"posts", "text"} and results["policies"]["ppo"]["rouge"]["rougeL"]
    assert "pretrain" not in capsys.readouterr().out.split("estimate:")[1].split("in all")[0]
    rows = [json.loads(line) for line in (tmp_path / "out" / "comparisons.jsonl").open()]
    assert len(rows) == 90 and all(row["info"]["task"] == "sentiment" for row in rows)
    assert (tmp_path / "out" / "pretrained" / "vocab.json").read_text() == (tmp_path / "w" / "vocab.json").read_text()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["text"] == [book] and run.same_stages(out, {**config, "text": None}, config) == []


def test_an_excerpt_that_was_labelled_twice_is_on_one_side():
    """Catches a split by the labels' made-up names: the same excerpt would be trained on and tested on."""
    comparisons = [{"info": {"id": f"label-{i}", "subreddit": "", "title": "", "post": f"excerpt {i % 10}"}} for i in range(40)]
    real.split_comparisons_by_post(comparisons, [], random.Random(0))
    sides = {}
    for c in comparisons:
        sides.setdefault(c["info"]["post"], set()).add(c["split"])
    assert all(len(side) == 1 for side in sides.values()) and sum(side == {"valid"} for side in sides.values()) == 2
