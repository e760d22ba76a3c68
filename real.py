"""
Real data in place of the embedded world: people's posts, articles or books, their comparisons or labels, GPT-2's vocabulary and weights.

References: Stiennon 2020 appendices A to C (TL;DR, CNN/DM); Ziegler 2019 §3 (continuing excerpts of books).

    python run.py --preset small-real --posts posts.jsonl --comparisons comparisons.jsonl --text books
    python run.py --preset gpt2-sentiment --text books --labels offline_5k.json      # or sst2_train.tsv: see sentiment.py

run.py's first stage calls split_posts() or split_excerpts(), its fourth read_comparisons(); all other stages see what the embedded
world would have left.
A post that is tested on is never trained on: two rows are about the same post where their texts are equal, or their ids, unless
those are row numbers.
"""
import json
import os
import random
import re

from corpus import excerpts, filter_tldr, held_out_text, stored_text, text_to_learn
from data import TASKS, DataError, gpt2_encoding, load_comparisons, load_labels, load_posts, names_of, query_text, read_rows, same_posts, train_bpe
from download import GPT2_FILES, fetch
from model import read_config

FILES = {  # option of run.py: what it is
    "posts": "JSON lines with subreddit, title, post, summary, or articles (CSV or JSON lines), instead of the embedded world",
    "comparisons": "human comparisons in OpenAI's format; goes with --posts",
    "prompts": "more posts, with or without summaries, as prompts of PPO (default: the posts that are trained on)",
    "test_posts": "posts to test on, never trained on (default: an eighth of --posts, at most data.test)",
    "text": "text files or a folder of them (.txt, .txt.gz): pretraining reads them too; a continuation task cuts its queries from them",
    "labels": "4-way labels in Ziegler's format, for a continuation task; or a .tsv of sentences, each with a tab and 0 or 1 (SST-2): "
              "a classifier that is trained on them is the labeler",
}
CONTINUATIONS = ("sentiment", "descriptiveness")


def has_mock(files):
    """Whether a classifier of sentences labels in place of people. (sentiment.py)"""
    return (files["labels"] or "").lower().removesuffix(".gz").endswith(".tsv")


def check_files(files, task):
    """Which files belong together, and that they exist."""
    given = {name for name, value in files.items() if value}
    for name in sorted(given):
        for file in files[name] if name == "text" else [files[name]]:
            if not (os.path.exists if name == "text" else os.path.isfile)(file):
                raise DataError(f"{file} is a folder; --{name.replace('_', '-')} takes a file" if os.path.isdir(file) else
                                f"{file} does not exist")
    if task in CONTINUATIONS:
        if given and given != {"text", "labels"}:
            raise DataError(f"task {task} takes --text and --labels, and no other files: excerpts of the text are its queries")
    elif "labels" in given:
        raise DataError(f"--labels goes with the tasks {' and '.join(CONTINUATIONS)}, not with {task}; try --task sentiment")
    elif {"posts", "comparisons"} - given and given:
        raise DataError("--posts and --comparisons go together, and the other files with them: only the embedded world has labelers of "
                        "its own")


# ---------------------------------------------------------------------------------------------------------------------
# vocabulary and weights that were made elsewhere

def vocabulary(model, texts, books=()):
    """GPT-2's encoding where settings of the model ask for it or for its weights; else one trained on texts and on books."""
    if model.vocab or model.init:
        own = [name for name in (model.vocab, model.init) if os.path.isdir(name) and any(
            os.path.exists(os.path.join(name, file)) for file in ("vocab.json", "encoder.json"))]
        if model.vocab not in ("", "gpt2") and model.vocab not in own:
            raise DataError(f"{model.vocab} holds no vocabulary: encoder.json and vocab.bpe, or vocab.json and merges.txt")
        return gpt2_encoding(own[0] if own and model.vocab != "gpt2" else None)
    return train_bpe(texts + text_to_learn(books), model.vocab_size)


def init_config(init):
    """GPTConfig of a folder, or of one of OpenAI's sizes, whose config.json is fetched where it is not yet there."""
    if not os.path.isdir(init) and init not in GPT2_FILES:
        raise DataError(f"{init} is neither a folder with weights nor one of {', '.join(GPT2_FILES)}")
    path = os.path.join(init, "config.json") if os.path.isdir(init) else fetch(f"{init}/config.json")
    try:
        with open(path) as f:
            return read_config(json.load(f), path)
    except FileNotFoundError:
        raise DataError(f"{init} holds no config.json and so no model in Hugging Face's layout") from None
    except (ValueError, AttributeError) as e:
        raise DataError(f"{path}: {e}" if path not in str(e) else str(e)) from None


def check_init(init, enc, Q, R):
    """Whether these weights fit this vocabulary and rows of Q + R tokens. -> their GPTConfig"""
    c, file = init_config(init), os.path.join(init, "vocab.json")
    if c.vocab_size != enc.n_vocab or c.eos != enc.n_vocab - 1:
        raise DataError(f"the weights in {init} have {c.vocab_size} tokens and end texts with {c.eos}, the vocabulary has {enc.n_vocab} "
                        f"and ends them with {enc.n_vocab - 1}: name the vocabulary that they were trained with by --vocab")
    if os.path.exists(file) and gpt2_encoding(init)._mergeable_ranks != enc._mergeable_ranks:
        raise DataError(f"the vocabulary is not the one of {file}: its ids would mean other texts to the weights in {init}")
    if Q + R > c.n_positions:
        raise DataError(f"queries of {Q} and responses of {R} tokens need {Q + R} positions, the weights in {init} have {c.n_positions}: "
                        "lower model.max_query or model.max_response")
    return c


# ---------------------------------------------------------------------------------------------------------------------
# posts

def without(posts, others, what=""):
    """The posts that none of the others is about; where `what` says what these are, how many are left out is told."""
    names = set().union(*map(names_of, others))
    left = [post for post in posts if not names & names_of(post)]
    if what and len(left) < len(posts):
        print(f"{len(posts) - len(left)} posts are not trained on: {what}")
    return left


def read_posts(run, option, need_summary=True):
    """Every post of --posts, --test-posts or --prompts, filtered where that is asked for: raw rows then need not have all fields."""
    file, m = run.files[option], run.settings.model
    if run.settings.data.filter:
        enc = vocabulary(m, []) if m.vocab or m.init else None
        enc = enc if enc and enc.n_vocab == 50257 else None
        posts, dropped = filter_tldr((row for _, row in read_rows(file)), enc, need_summary)
        print(f"{file}: the paper's filter keeps {len(posts)} posts, counting {'GPT-2 tokens' if enc else '1.05 tokens a word or mark'}; "
              f"dropped: {', '.join(f'{n} {rule}' for rule, n in dropped.items() if n)}")
        return posts
    posts, skipped = load_posts(file, run.settings.data.task, need_summary)
    print(f"{file}: {len(posts)} posts, {skipped} more skipped because post or summary is empty")
    for post in posts:
        post.pop("facts", None)  # the gold judge speaks of its own world only
    return posts


def split_posts(run):
    """-> encoding, {split: posts}. Posts that are tested on are in no other split, and the vocabulary is not trained on them."""
    s, files, posts = run.settings.data, run.files, read_posts(run, "posts")
    if len(posts) < 8:
        raise DataError(f"{files['posts']} has {len(posts)} usable posts; at least 8 are needed")
    random.Random(run.seed).shuffle(posts)
    held = max(1, min(s.test, len(posts) // 8))
    tests = read_posts(run, "test_posts") if files["test_posts"] else posts[:held]
    posts = without(posts[0 if files["test_posts"] else held:], tests, "they are tested on")  # even those that data.test is too small for
    parts = {"test": tests[:s.test], "valid": posts[:held], "train": without(posts[held:], posts[:held], "they are held out")}
    enc = vocabulary(run.settings.model, [text_of(p) for p in parts["train"][:5000]], files["text"] or ())
    parts = {name: with_fitting_titles(part, enc, run.settings.model.max_query) for name, part in parts.items()}
    splits = {"test": parts["test"], "valid": parts["valid"], "pretrain": parts["train"][:s.pretrain], "sft": parts["train"][:s.sft]}
    if files["prompts"]:
        prompts = read_posts(run, "prompts", need_summary=False)
        prompts = with_fitting_titles(prompts, enc, run.settings.model.max_query)
        splits["prompts"] = without(prompts, tests + splits["valid"], "prompts that are tested on or held out")
    for name, part in splits.items():
        if not part:
            raise DataError(f"no post is left for {name} once those that are tested on are taken out; more posts are needed")
    return enc, splits


def with_fitting_titles(posts, enc, Q):
    """The posts whose queries are at most Q tokens once the post itself is cut; how many are not is told."""
    def fits(post):
        text = query_text({**post, "post": ""})
        return len(text.encode()) <= Q or len(enc.encode_ordinary(text)) <= Q  # a token has a byte or more
    left = [post for post in posts if fits(post)]
    if len(left) < len(posts):
        print(f"{len(posts) - len(left)} posts are left out: their titles alone need more than the {Q} tokens of model.max_query")
    return left


def text_of(post):
    return query_text(post) + " " + post["summary"]


def split_excerpts(run):
    """-> encoding, {split: posts}: excerpts of the texts to continue, what follows in the book as the reference. Held-out text is tested
    on."""
    s, files, task = run.settings.data, run.files, TASKS[run.settings.data.task]
    enc = vocabulary(run.settings.model, [], files["text"])
    rows, splits = stored_text(os.path.join(run.folder, "tokens"), files["text"], enc, 2 * task.Q), {}
    c, (trained, tested) = run.settings.collect, held_out_text(rows, enc)
    parts = [(("test", "valid"), tested, 2 * s.test), (("pretrain",), trained, max(s.pretrain, s.sft))]
    parts += [(("collect",), trained, c.posts), (("held_out",), tested, c.held_out_posts)] if has_mock(files) else []
    for names, part, n in parts:
        posts = [p for p in excerpts(rows.take(part), enc, n, run.seed, s.task) if p["summary"].strip()]
        if len(posts) < 2:
            raise DataError(f"the texts hold {len(posts)} excerpts for {' and '.join(names)}; more text is needed")
        splits |= {name: [{**p, "id": f"{name}-{p['id']}"} for p in posts[i::len(names)]] for i, name in enumerate(names)}
    return enc, splits | {"pretrain": splits["pretrain"][:s.pretrain], "sft": splits["pretrain"][:s.sft]}


# ---------------------------------------------------------------------------------------------------------------------
# comparisons

def labels_as_comparisons(labels, enc, task, rng):
    """Ziegler's 4-way labels as texts in OpenAI's comparison format: the best against each other sample, in random order. As texts they
    serve any vocabulary; group_by_post makes one choice of the best of them again."""
    rows = []
    for i, label in enumerate(labels):
        info = {"id": f"label-{i}", "subreddit": "", "title": "", "post": enc.decode(label["query"]), "task": task}
        texts = [enc.decode(ids).strip() for ids in label["samples"]]
        best = texts[label["best"]]
        for other in dict.fromkeys(text for text in texts if text != best and text and best):
            choice = rng.randrange(2)
            rows.append({"info": info, "summaries": [{"text": " " + t, "policy": "label"} for t in ((best, other), (other, best))[choice]],
                         "choice": choice, "worker": None, "batch": "labels", "extra": {"confidence": None}})
    return rows


def read_comparisons(run, enc):
    """The comparisons of --comparisons or --labels."""
    files, task = run.files, run.settings.data.task
    if files["comparisons"]:
        comparisons, skipped = load_comparisons(files["comparisons"], "cnndm-transfer" if task == "tldr" else task)
        print(f"{files['comparisons']}: {len(comparisons)} comparisons, {skipped} more skipped because a text is empty or nothing was chosen")
        return comparisons
    labels, skipped = load_labels(files["labels"])  # in GPT-2's ids, whatever the run's own vocabulary is
    print(f"{files['labels']}: {len(labels)} labels, {skipped} more skipped because a text is empty")
    gpt2 = enc if enc.n_vocab == 50257 else gpt2_encoding()
    rows = labels_as_comparisons(labels, gpt2, task, random.Random(run.seed))
    for row in rows:
        row["info"]["post"] = last_words(enc, row["info"]["post"], run.settings.model.max_query)
    return rows


def last_words(enc, text, Q):
    """The end of a text, at most Q tokens from a word on: what a continuation continues. (An own vocabulary needs more tokens than
    GPT-2's, and encode_query keeps the beginning.)"""
    while len(enc.encode_ordinary(text)) > Q:
        text = re.sub(r"(?s)\A\s*\S+\s+(?=\S)|\A.", "", text)  # without its first word; of the last word, without a letter
    return text


def split_comparisons_by_post(comparisons, tested, rng):
    """Give each comparison its split, in place. Several share a post: held out are the posts that the file holds out (OpenAI's splits
    valid1 and valid2), or a fifth of the posts where its splits do not have two sides with posts of their own; and every one of `tested`."""
    names = same_posts([c["info"] for c in comparisons] + tested)
    names, tested = names[:len(comparisons)], set(names[len(comparisons):])
    train, held_out = ({name for c, name in zip(comparisons, names) if str(c.get("split")).startswith(side)} for side in ("train", "valid"))
    posts = sorted(set(names))
    if not train or not held_out or train & held_out or len(train) + len(held_out) < len(posts):
        rng.shuffle(posts)
        held_out = set(posts[:max(1, len(posts) // 5)])
    for c, name in zip(comparisons, names):
        c["split"] = "valid" if name in held_out or name in tested else "train"
        c["info"].pop("facts", None)
