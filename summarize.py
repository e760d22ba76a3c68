"""
Any trained run summarizes a text of yours.

Reference: Wu et al. 2021, "Recursively summarizing books with human feedback" (their parts also see the summaries before them).

    python run.py summarize letter.txt                        # by the PPO policy of out/tiny-seed1
    cat book.txt | python run.py summarize --run out/real-seed1 --policy sft --n 16 --show-parts > summary.txt

A text longer than a query is cut into parts that fit, each part is summarized, then the parts' summaries together, until one part
is left. Summaries go to standard output, one line for each file; everything else goes to standard error.
"""
import bisect
import contextlib
import os
import re
import sys
from collections import Counter

import torch
from tqdm import tqdm

from corpus import book_text
from data import TASKS, DataError, decode_response, encode_query, query_text
from reward import sample_responses, score_all
from sft import Parser, load_fitting, open_run, pick_device, run_main, seed_number

MARKS = (r"\n\s*\n", r"(?<=[.!?])\s+", r"\s+", r"")  # what ends a paragraph, a sentence, a word, a character
STAGES = ("ppo", "sft", "pretrained")


def read_text(path):
    """The text of a file, plain or gzipped, or of standard input for "-": UTF-8, newlines as \\n, Project Gutenberg's frame left out."""
    name = "standard input" if path == "-" else path
    try:
        text = "".join(book_text(0 if path == "-" else path)).strip()
    except DataError as e:
        raise DataError(name + str(e).removeprefix("0") if path == "-" else str(e)) from None
    if not text:
        raise DataError(f"{name} holds no text")
    return text


def split(text, tokens, room):
    """Cut a text into parts of at most `room` tokens by tokens(text): each ends with the last paragraph that fits, or where that would
    leave half of the room empty with the last sentence, else word, else character. -> list of texts"""
    parts, at = [], 0
    with tqdm(total=len(text), desc="cutting", unit="character", unit_scale=True, leave=False, delay=2) as bar:
        while at < len(text):
            window = text[at:at + 20 * room]
            for mark in MARKS:
                ends = [m.start() for m in re.finditer(mark, window) if m.start()] + [len(window)] * (at + len(window) == len(text))
                k = bisect.bisect_left(ends, True, key=lambda end: tokens(window[:end]) > room)
                if k and (2 * tokens(window[:ends[k - 1]]) >= room or at + ends[k - 1] == len(text) or not mark):
                    break
            else:
                raise DataError(f"{room} tokens are no room for one character {window[:1]!r}; give a shorter title")
            parts.append(window[:ends[k - 1]].strip())
            end = re.compile(r"\s*").match(text, at + ends[k - 1]).end()
            bar.update(end - at)
            at = end
    return parts


def pack(texts, tokens, room):
    """Consecutive texts in groups whose paragraphs have at most `room` tokens, a longer text alone. -> lists of indices"""
    groups = [[]]
    for i in tqdm(range(len(texts)), desc="packing", unit="summary", leave=False, delay=2):
        if groups[-1] and tokens(paragraphs(texts, [*groups[-1], i])) > room:
            groups.append([])
        groups[-1].append(i)
    return groups


def paragraphs(texts, indices):
    return "\n\n".join(texts[i] for i in indices if texts[i])


def summarize(text, shorten, tokens, room):
    """Summarize the parts of a text, then groups of summaries, until there is one. -> its tree {"text", "summary", "parts": [trees]}

    shorten: list of texts -> list of summaries. It ends whatever they are: where a level would not have fewer texts than the one below, or
    one that is too long, what goes up of each summary is its first half, or its first quarter, and so on."""
    level = [{"text": part, "parts": []} for part in split(text, tokens, room)]
    while True:
        for node, summary in zip(level, shorten([node["text"] for node in level])):
            node["summary"] = summary
        if len(level) == 1:
            return level[0]
        texts, share = [node["summary"] for node in level], 1
        while len(groups := pack(texts, tokens, room)) >= len(level) or any(tokens(paragraphs(texts, g)) > room for g in groups):
            texts, share = [t[:len(t) // 2].rpartition(" ")[0] or t[:len(t) // 2] for t in texts], 2 * share
        if share > 1:
            print(f"of {len(level)} summaries, too long to be summarized together, the first 1/{share} of each goes on", file=sys.stderr)
        level = [{"text": paragraphs(texts, group), "parts": [level[i] for i in group]} for group in groups]


def print_tree(node, tokens, depth=0):
    """A part, its summary, and below, further to the right, what it was made from; on standard error."""
    beginning, indent = " ".join(node["text"][:70].split()), "    " * depth
    print(f"{indent}[{tokens(node['text'])} tokens] {beginning} ...\n{indent} -> {node['summary']}", file=sys.stderr)
    for part in node["parts"]:
        print_tree(part, tokens, depth + 1)


def policy_folder(run, policy):
    """The folder of a stage's model; any other name is a folder already."""
    done = [stage for stage in STAGES if os.path.exists(os.path.join(run, stage, "model.safetensors"))]
    if policy in STAGES and policy not in done:
        there = f"there are {' and '.join(done)}, for --policy" if done else "nothing is trained there yet"
        raise DataError(f"{run} has no finished {policy} model ({there}); `python run.py` with its settings goes on")
    return os.path.join(run, policy) if policy in STAGES else policy


def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("files", nargs="*", metavar="FILE", help="text in UTF-8, or gzipped; - or none is standard input")
    parser.add_argument("--run", default=os.path.join("out", "tiny-seed1"), help="folder of a run (default out/tiny-seed1)")
    parser.add_argument("--policy", default="ppo", help="ppo, sft, pretrained or the folder of a model (default ppo)")
    parser.add_argument("--temperature", type=float, help="0 takes the likeliest token (default 0; with --n the run's own)")
    parser.add_argument("--n", type=int, default=1, help="summaries of each part, of which the reward model chooses one (default 1)")
    parser.add_argument("--title", default="", help="title of the text (default none)")
    parser.add_argument("--subreddit", help="subreddit to write for (default the most frequent of the run)")
    parser.add_argument("--show-parts", action="store_true", help="also show every part with its summary")
    parser.add_argument("--seed", type=seed_number, default=1, help="seed of the samples (default 1)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default auto)")
    args = parser.parse_args(argv)
    out = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        run, folder = open_run(args.run), policy_folder(args.run, args.policy)
        temperature = args.temperature
        if temperature is None:
            temperature = run.config["settings"]["ppo"]["temperature"] if args.n > 1 else 0.0
        if args.n < 1 or temperature != 0 and not 1e-3 <= temperature < float("inf") or args.n > 1 and temperature == 0:
            raise DataError("--n must be above 0 and --temperature 0 or from 0.001 on, not 0 where --n asks for more than one sample")
        if args.n > 1 and not os.path.exists(os.path.join(args.run, "reward", "model.safetensors")):
            raise DataError(f"{args.run} has no finished reward model to choose among {args.n} summaries; leave out --n")
        task = run.posts["test"][0].get("task", "tldr")
        if "TL;DR" not in TASKS[task].query:
            raise DataError(f"{args.run} was trained for the task {task}, which continues texts: it summarizes none")
        subreddit = Counter(p["subreddit"] for p in run.posts["test"]).most_common(1)[0][0] if args.subreddit is None else args.subreddit
        frame = {"id": "given", "subreddit": subreddit.removeprefix("r/"), "title": args.title, "task": task}
        texts = [read_text(path) for path in args.files or ["-"]]  # what cannot be read is refused before any work
        device = pick_device(args.device)
        policy = load_fitting(folder, run, device)
        reward_model = load_fitting(os.path.join(args.run, "reward"), run, device, "scalar") if args.n > 1 else None
        generator, empty = torch.Generator().manual_seed(args.seed), len(run.enc.encode_ordinary(query_text({**frame, "post": ""})))

        def tokens(text):
            return len(run.enc.encode_ordinary(query_text({**frame, "post": text}))) - empty

        def shorten(texts):
            queries = [encode_query(run.enc, {**frame, "post": text}, run.Q) for text in texts]
            many = sample_responses(policy, queries, run.R, temperature, generator, args.n, stop=run.stop)
            best = score_all(reward_model, queries, many, args.n).argmax(1).tolist() if args.n > 1 else [0] * len(queries)
            return [" ".join(decode_response(run.enc, many[i * args.n + b]).split()) for i, b in enumerate(best)]

        room = run.Q - empty
        for text in texts:
            if room < run.R and tokens(text) > room:
                raise DataError(f"title and subreddit leave {room} of the {run.Q} tokens of a query to the text, which is longer, and a "
                                f"summary may have {run.R}: summing up would not end; give a shorter --title")
            tree = summarize(text, shorten, tokens, room)
            if args.show_parts:
                print_tree(tree, tokens)
            print(tree["summary"], file=out, flush=True)


if __name__ == "__main__":
    run_main(main)
