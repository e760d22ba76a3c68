"""
The whole of "learning to summarize from human feedback" in one command, offline, in minutes:

    python run.py                      # pretrain, SFT, comparisons, reward model, PPO, evaluation -> out/tiny-seed1/report
    python run.py --seed 2 --ppo.beta 0.1
    python run.py --posts posts.jsonl --comparisons comparisons.jsonl      # OpenAI's formats
    python run.py summarize letter.txt # what has been trained summarizes a text of yours
    python run.py figures              # the papers' figures, with error bars

Stages run in order and leave their results in the run's folder. The same command again goes on where it stopped; a folder
made with other settings is refused.
"""
import dataclasses
import importlib
import json
import os
import platform
import random
import shutil
import sys
import time
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import torch

import estimate
import evaluation
import real
import sentiment
import world
from corpus import stored_text
from data import (EOS, TASKS, DataError, decode_response, encode_query, encode_response, load_comparisons, pad_rows, read_rows, save_encoding,
                  save_json_lines, save_vocabulary, write_atomic)
from model import GPT, GPTConfig, choose_precision
from ppo import PPOSettings, pretraining_rows, prompts, train_ppo
from reward import (CollectSettings, RewardSettings, check_labels, check_sides, collect, group_texts, labeler_agreement, normalising_rows,
                    sample_responses, score_all, split_comparisons, train_reward)
from sft import (Parser, SFTSettings, add_settings, check, encode_posts, epoch_folder, epoch_losses, evaluate_lm, load_model, open_run,
                 override, pick_device, run_main, seed_number, sft_rows, split_rows, stop_rule, stored_posts, train_lm, truncate)


@dataclass
class ModelSettings:
    vocab_size: int = 1024  # tokens of the BPE, at most
    n_layer: int = 4  # transformer blocks
    n_head: int = 4  # attention heads
    n_embd: int = 128  # width d
    max_query: int = 128  # Q: a longer post is cut (Stiennon: 512)
    max_response: int = 48  # R, with EOS; 0 takes the 99th percentile of the summaries
    vocab: str = ""  # folder with GPT-2's encoder.json and vocab.bpe, or gpt2 (downloads them); empty: init's own, else one is trained
    init: str = ""  # weights that take the place of pretraining: a folder, gpt2, gpt2-medium, gpt2-large or gpt2-xl; their shape counts

    def validate(self):
        check(self.vocab_size > 257, "model.vocab_size must be above 257, the bytes and the end of text")
        check(min(self.n_layer, self.n_head, self.n_embd) > 0 and self.n_embd % self.n_head == 0 and self.n_embd % 2 == 0,
              "model.n_embd must be even and a multiple of model.n_head")
        check(self.max_query > 0 and (self.max_response == 0 or self.max_response > 1), "model.max_query must be above 0 and "
              "model.max_response above 1")


@dataclass
class PostSettings:
    pretrain: int = 16000  # unfiltered posts for the language model; PPO takes its prompts from them
    sft: int = 1600  # posts that fine-tuning takes, filtered to TL;DRs of 24 to 48 tokens
    test: int = 500  # held-out posts of the evaluation
    task: str = "tldr"  # tldr, sentiment or descriptiveness (continuations: of stories, or of excerpts of --text); of files also cnndm
    world: str = "reddit"  # what the posts are about: reddit or news, the second world that takes the part of CNN/DM
    news: float = 0.0  # share of news among the pretraining posts, as a language model has read of more than its task
    filter: bool = False  # posts of a file go through the paper's rules for raw Reddit data (Stiennon appendix A)

    def validate(self):
        check(self.task in TASKS, f"data.task must be one of {', '.join(TASKS)}")
        check(min(self.pretrain, self.sft, self.test) > 0, "data.pretrain, data.sft and data.test must be above 0")
        check(self.world in world.WORLDS and 0 <= self.news <= 1, "data.world must be reddit or news, data.news between 0 and 1")


@dataclass
class EvaluationSettings:
    best_of: int = 16  # samples that best-of-n chooses from

    def validate(self):
        check(self.best_of > 0, "evaluation.best_of must be above 0")


@dataclass
class Settings:
    model: ModelSettings = field(default_factory=ModelSettings)
    data: PostSettings = field(default_factory=PostSettings)
    pretrain: SFTSettings = field(default_factory=lambda: SFTSettings(lr=2e-3, batch=16, warmup=50, final_lr=0.05, query_weight=0.05))
    sft: SFTSettings = field(default_factory=lambda: SFTSettings(lr=5e-4, batch=16))
    collect: CollectSettings = field(default_factory=CollectSettings)
    reward: RewardSettings = field(default_factory=RewardSettings)
    ppo: PPOSettings = field(default_factory=PPOSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)


GPT3_1B = {  # what the 1.3B models of Stiennon and InstructGPT share; micro and recompute are ours, and change no gradient
    "model.vocab_size": 50257, "model.n_layer": 24, "model.n_head": 16, "model.n_embd": 2048, "sft.weight_decay": 0.0, "sft.micro": 4,
    "sft.recompute": True, "reward.batch": 16, "reward.weight_decay": 0.0, "reward.micro": 2, "reward.recompute": True, "ppo.batch": 512,
    "ppo.micro": 4, "ppo.recompute": True}
GPT2_TLDR = {  # Stiennon's table for 1.3B; PPO's learning rate and minibatches from Ziegler's code for 124M
    "model.max_query": 512, "model.max_response": 48, "data.pretrain": 10**6, "data.sft": 10**6, "sft.lr": 6.35e-5, "sft.batch": 128,
    "sft.micro": 32, "reward.lr": 1.5e-5, "reward.batch": 16, "ppo.lr": 1e-5, "ppo.batch": 512, "ppo.minibatches": 1,
    "ppo.iterations": 1953, "ppo.micro": 64}
# Ziegler's code: no SFT, best of 4, gain and bias, a shared value head, adaptive KL, '.' from the 17th token on, TensorFlow's Adam
GPT2_STYLE = {
    "model.init": "gpt2", "model.max_query": 64, "model.max_response": 24, "data.pretrain": 10**5, "data.sft": 20000, "sft.epochs": 0,
    "collect.labels": "best_of", "reward.loss": "best_of", "reward.normalise": "gain_bias", "reward.lr": 5e-5, "reward.batch": 32,
    "reward.final_lr": 0.0, "reward.warmup": 0, "reward.weight_decay": 0.0, "collect.posts": 5000, "ppo.lr": 1e-5, "ppo.batch": 512,
    "ppo.minibatches": 1, "ppo.iterations": 1953, "ppo.beta": 0.15, "ppo.kl": "adaptive", "ppo.kl_target": 6.0, "ppo.value": "shared",
    "ppo.whiten_rewards": True, "ppo.stop_token": ".", "ppo.truncate_after": 16, "ppo.adam_beta2": 0.999, "ppo.adam_eps": 1e-5,
    "ppo.tf_adam": True, "ppo.max_grad_norm": 0.0}
PRESETS = {  # preset: {stage.setting: value}, everything else as the settings classes say
    "tiny": {},
    "real": {"model.vocab_size": 2048, "model.max_query": 256, "model.max_response": 0, "pretrain.epochs": 3, "sft.epochs": 1,
             "reward.batch": 4, "reward.lr": 1e-4, "reward.epochs": 3,
             "ppo.iterations": 8, "data.test": 100, "evaluation.best_of": 4},
    # one paper each on the embedded world: its choices, with sizes and learning rates that fit a million parameters and five minutes
    "stiennon": {"sft.weight_decay": 0.0, "reward.weight_decay": 0.0, "collect.rounds": 2},
    "instructgpt": {
        "data.sft": 512, "sft.epochs": 16, "sft.lr": 3e-4, "sft.warmup": 0, "sft.weight_decay": 0.0, "sft.dropout": 0.2, "sft.mix": 0.1,
        "sft.choose": "reward", "collect.labels": "rank", "collect.k": 9, "collect.k_min": 4, "collect.tie": 0.25, "collect.posts": 800,
        "collect.held_out_posts": 300, "reward.loss": "kwise", "reward.weight_decay": 0.0, "ppo.lr": 3e-4, "ppo.value_lr": 5e-4,
        "ppo.schedule": "constant", "ppo.warmup": 2, "ppo.iterations": 14, "ppo.epochs": 1, "ppo.minibatches": 8, "ppo.beta": 0.02,
        "ppo.temperature": 1.0, "ppo.ptx_coef": 0.5, "ppo.ptx_ratio": 4, "ppo.ema": 0.9},
    # the papers' own sizes, batches, learning rates and episodes, for real data; where a paper is silent, Ziegler's code
    "ziegler-774m": {
        **GPT2_STYLE, "data.task": "sentiment", "model.init": "gpt2-large", "reward.lr": 1.77e-5, "reward.batch": 8, "ppo.lr": 1.41e-5,
        "ppo.batch": 1024, "ppo.kl_horizon": 10000, "ppo.micro": 32, "ppo.recompute": True},
    "stiennon-1.3b": {
        **GPT3_1B, "model.max_query": 512, "model.max_response": 48, "data.pretrain": 287790, "data.sft": 116722, "sft.lr": 6.35e-5,
        "sft.batch": 128, "reward.lr": 1.5e-5, "ppo.lr": 1.5e-5, "ppo.iterations": 1953, "ppo.minibatches": 1},
    "instructgpt-1.3b": {
        **GPT3_1B, "pretrain.query_weight": 1.0, "model.max_query": 1024, "model.max_response": 1024, "data.pretrain": 287790,
        "data.sft": 12725, "sft.lr": 9.65e-6,
        "sft.batch": 32, "sft.epochs": 16, "sft.warmup": 0, "sft.dropout": 0.2, "sft.mix": 0.1, "sft.choose": "reward",
        "collect.posts": 33207, "collect.labels": "rank", "collect.k": 9, "collect.k_min": 4, "reward.loss": "kwise", "reward.batch": 64,
        "reward.lr": 9e-6, "reward.warmup": 0, "ppo.lr": 8.05e-6, "ppo.value_lr": 9e-6, "ppo.schedule": "constant", "ppo.warmup": 10,
        "ppo.iterations": 500, "ppo.minibatches": 8, "ppo.epochs": 1, "ppo.beta": 0.02, "ppo.temperature": 1.0, "ppo.ptx_coef": 27.8,
        "ppo.ema": 0.992},
    "ziegler": {"data.task": "sentiment", "data.pretrain": 12000, "data.sft": 500, "model.max_query": 64, "model.max_response": 24,
                "pretrain.query_weight": 1.0, "sft.epochs": 0,
                "collect.posts": 5000, "collect.labels": "best_of", "reward.loss": "best_of", "reward.normalise": "gain_bias",
                "reward.lr": 1e-3, "reward.batch": 16, "ppo.lr": 2e-4, "ppo.iterations": 120, "ppo.batch": 32, "ppo.minibatches": 1,
                "ppo.epochs": 4, "ppo.beta": 0.15, "ppo.kl": "adaptive", "ppo.kl_target": 6.0, "ppo.kl_horizon": 38, "ppo.value": "shared",
                "ppo.whiten_rewards": True, "ppo.stop_token": ".", "ppo.truncate_after": 16,
                "ppo.tf_adam": True, "ppo.adam_eps": 1e-5, "ppo.adam_beta2": 0.999, "ppo.max_grad_norm": 0.0},
    # real data: GPT-2 on the papers' tasks, and a small model from scratch on anybody's posts and text
    "small-real": {"model.vocab_size": 4096, "model.n_embd": 192, "model.n_head": 6, "model.max_query": 320, "model.max_response": 64,
                   "data.test": 300, "pretrain.epochs": 3, "pretrain.choose": "loss", "pretrain.query_weight": 1.0, "pretrain.batch": 12,
                   "pretrain.lr": 2e-3, "sft.epochs": 2, "sft.choose": "loss", "sft.lr": 3e-4,
                   "reward.batch": 4, "reward.lr": 1e-4, "reward.epochs": 3, "ppo.iterations": 10, "ppo.lr": 1e-4, "evaluation.best_of": 4},
    "gpt2-tldr": {"model.init": "gpt2", **GPT2_TLDR},
    "gpt2-large-tldr": {"model.init": "gpt2-large", **GPT2_TLDR, "sft.micro": 8, "sft.recompute": True,
                        "reward.micro": 4, "ppo.batch": 256, "ppo.micro": 16, "ppo.recompute": True},  # for one card of 80 GB
    "gpt2-cnndm": {"model.init": "gpt2", **GPT2_TLDR, "data.task": "cnndm", "model.max_query": 500, "model.max_response": 75,
                   "ppo.temperature": 0.5},  # Ziegler's lengths and temperature: Stiennon's 1919 tokens do not fit into GPT-2
    "gpt2-sentiment": {"data.task": "sentiment", **GPT2_STYLE},
    "gpt2-descriptiveness": {"data.task": "descriptiveness", **GPT2_STYLE},
    "test": {"model.n_layer": 2, "model.n_embd": 32, "model.n_head": 2, "data.pretrain": 64, "data.sft": 40, "data.test": 12,
             "collect.posts": 16, "collect.held_out_posts": 8, "ppo.iterations": 2, "ppo.batch": 8, "evaluation.best_of": 2},
}


def preset(name, changes={}):
    """A fresh Settings of that preset, with {stage.setting: value} changed, validated."""
    settings = Settings()
    for key, value in {**PRESETS[name], **changes}.items():
        stage, setting = key.split(".")
        setattr(settings, stage, dataclasses.replace(getattr(settings, stage), **{setting: value}))
    for part in vars(settings).values():
        part.validate()
    check_together(settings)
    return settings


def check_together(s, files=False, mock=False):
    """What the settings of one stage ask of another's. files: posts or text come from files, and comparisons too, unless mock: a classifier
    labels. Comparisons from a file will be checked themselves."""
    people = files and not mock
    check(s.collect.rounds == 1 or not people, "collect.rounds must be 1 with --comparisons: people have labelled")
    check(not s.collect.online or s.collect.rounds <= s.ppo.iterations,
          "with collect.online, collect.rounds must not be above ppo.iterations")
    needed = {"pairwise": s.collect.labels, "best_of": "best_of", "kwise": "rank"}[s.reward.loss]
    check(people or s.collect.labels == needed, f"reward.loss {s.reward.loss} needs collect.labels {needed}")
    check(s.pretrain.mix == 0, "pretrain.mix must be 0: it is for sft.mix")
    check(s.pretrain.epochs > 0, "pretrain.epochs must be above 0")
    check(TASKS[s.data.task].stop == EOS or s.ppo.stop_token,
          f"the stories and excerpts of data.task {s.data.task} have no end of text; ppo.stop_token must say what ends a response, "
          "as in the preset ziegler")
    check(not files or (s.data.world, s.data.news) == ("reddit", 0), "data.world and data.news are for the embedded world, not for files")
    check(s.data.world == "reddit" or s.data.task == "tldr", f"data.world {s.data.world} goes with data.task tldr alone")
    check(not s.data.filter or files and s.data.task not in real.CONTINUATIONS,
          "data.filter must be false without --posts: it filters the posts of a file")
    check(s.pretrain.choose != "reward", "pretrain.choose must be last or loss: the reward model is for sft.choose")


# ---------------------------------------------------------------------------------------------------------------------
# stages: each leaves its result in the run's folder, and is skipped where that result is

def path(run, *parts):
    return os.path.join(run.folder, *parts)


def of_round(run, file, k=None):
    """Path of what every round leaves: reward/..., ppo/... and comparisons.jsonl, all labels so far. These are the last round's; an earlier
    one's lie in reward/round-K/ and ppo/round-K/, its labels beside the reward model that was trained on them."""
    k = k or run.round
    if k == run.settings.collect.rounds:
        return path(run, file)
    folder, *rest = ("reward/" * (file == "comparisons.jsonl") + file).split("/")
    return path(run, folder, f"round-{k}", *rest)


def split_posts(run):
    """The posts of every split from the embedded world."""
    s = run.settings
    if s.data.task not in world.TASK_WEIGHTS:
        raise DataError(f"the embedded world has no {s.data.task}; name files with --posts and --comparisons")
    sizes = {"pretrain": s.data.pretrain, "sft": s.data.sft, "valid": 300, "test": s.data.test,
             "collect": s.collect.posts, "held_out": s.collect.held_out_posts}
    surplus = {"sft", "valid", "test"}  # these will be filtered by length
    posts = {name: world.make_posts(3 * n if name in surplus else n, run.seed, name, 0.4 if name == "pretrain" else 1.0,
                                    world.WORLDS[s.data.world], s.data.task) for name, n in sizes.items()}
    news = world.make_posts(round(s.data.news * sizes["pretrain"]), run.seed, "news", 0.4, world.NEWS)
    # anywhere: what reads the first posts reads both
    places = random.Random(f"{run.seed}-news").sample(range(len(posts["pretrain"])), len(news))
    for place, post in zip(places, news):
        posts["pretrain"][place] = post
    return posts


def filter_splits(run):
    """-> encoding, the posts of every split: supervised training and evaluation take the filtered TL;DRs only, as the papers do."""
    s, splits = run.settings, split_posts(run)
    enc = real.vocabulary(s.model, [real.text_of(p) for p in splits["pretrain"][:5000]])
    for name, n in (("sft", s.data.sft), ("valid", 300), ("test", s.data.test)):
        fits = [p for p in splits[name] if world.is_filtered(len(encode_response(enc, p["summary"], 1000)))] if s.data.task == "tldr" else \
               end_stories(enc, splits[name], s.model.max_response)
        check(fits, f"no {name} post has a summary of the length that is trained on; give data.{name} or model.vocab_size a larger value")
        if len(fits) < n:
            print(f"only {len(fits)} of {n} {name} posts have a summary of the length that is trained on, in this vocabulary")
        splits[name] = fits[:n]
    return enc, splits


def end_stories(enc, stories, R):
    """Stories whose own continuation ends where a response of the task may, cut there: the references. (Ziegler's rule for samples)"""
    task = TASKS[stories[0]["task"]]
    R = R or task.R
    tokens, _ = pad_rows([encode_response(enc, p["summary"], R, p["task"]) for p in stories])
    tokens, lengths, ended = truncate(tokens, torch.zeros(len(stories), dtype=torch.long), R, *stop_rule(enc, task.stop, task.earliest, R))
    return [{**p, "summary": decode_response(enc, row[:n].tolist())} for p, row, n, ok in zip(stories, tokens, lengths, ended) if ok]


def stage_data(run):
    """Posts of every split, the vocabulary, query and response lengths Q and R."""
    s = run.settings
    make = filter_splits if not run.real else real.split_excerpts if s.data.task in real.CONTINUATIONS else real.split_posts
    enc, splits = make(run)
    lengths = [len(encode_response(enc, p["summary"], 10**6, p.get("task", "tldr"))) for p in splits["sft"][:5000]]
    R = s.model.max_response or max(2, int(np.percentile(lengths, 99)))
    stop_rule(enc, s.ppo.stop_token, s.ppo.truncate_after, R)  # what later stages would refuse is refused before any work
    c, mock = model_config(s.model, enc, s.model.max_query, R), real.has_mock(run.files)
    sentences = sentiment.split_sentences(run.files["labels"], enc, c.n_positions - 1, run.seed)[1] if mock else []
    groups, needed = check_comparisons(run, enc, splits) if run.real and not mock else (None, 0)
    run.posts = splits
    check(len(prompts(run)) > 0, "data.pretrain must be larger: no post is left for PPO to write summaries of")
    os.makedirs(path(run, "data"), exist_ok=True)
    for name, posts in splits.items():
        save_json_lines(path(run, "data", name + ".jsonl"), posts)
    rows = {name: split_rows(run.folder, name, enc, s.model.max_query, R) for name in splits}
    # as long as the longest query, at most max_query
    Q = max(needed, *(int((part.stops - part.starts)[::2].max()) for part in rows.values()))
    check_fit(run, enc, Q, R, rows, groups, sum(len(ids) for ids, _ in sentences))
    save_encoding(enc, path(run, "tokenizer.json"))
    write_atomic(path(run, "data", "lengths.json"), json.dumps({"Q": Q, "R": R}))
    print(f"{', '.join(f'{len(posts)} {name}' for name, posts in splits.items())} posts; {enc.n_vocab} tokens; "
          f"queries up to Q = {Q}, responses up to R = {R} tokens")


def read_comparisons(run, enc, posts):
    """People's comparisons, split: for every seed alike, as seeds may share the data and the SFT model."""
    comparisons = real.read_comparisons(run, enc)
    real.split_comparisons_by_post(comparisons, posts["test"] + posts["valid"], random.Random("collect"))
    return comparisons


def check_comparisons(run, enc, splits):
    """What the reward stage would refuse of people's comparisons, hours later. Posts of held-out ones leave what is trained on: the reward
    model has never seen them. -> groups of comparisons, how many tokens their queries must have at least"""
    comparisons = read_comparisons(run, enc, splits)
    check_sides([c["split"] for c in comparisons], run.files["comparisons"] or run.files["labels"])
    for name in ("pretrain", "sft"):
        splits[name] = real.without(splits[name], [c["info"] for c in comparisons if c["split"] == "valid"],
                                    f"held-out comparisons are about them ({name})")
        check(splits[name], f"no post is left for {name} once those of held-out comparisons are taken out; more posts are needed")
    groups = group_texts(comparisons)
    check_labels(groups, run.settings.reward.loss)
    needed = 0
    for group in groups:  # does its title fit? And all of what is to be continued?
        post = group["query"] if run.files["labels"] else {**group["query"], "post": ""}
        try:
            needed = max(needed, len(encode_query(enc, post, run.settings.model.max_query)))
        except DataError as e:
            raise DataError(f"{line_of(run.files['comparisons'], group['query'])}: {e}") from None
    return groups, needed


def line_of(file, info):
    """file:line of the first comparison with this title."""
    return next((at for at, row in read_rows(file) if isinstance(row.get("info"), dict) and row["info"].get("title") == info["title"]), file)


def check_fit(run, enc, Q, R, rows, groups, mock):
    """Say what this run will take, and refuse it where that is more memory than there is. mock: tokens that the labeler is trained on"""
    s, sizes = run.settings, {name: int((rows[name].stops - rows[name].starts).sum()) for name in ("pretrain", "sft")}
    if run.files["text"]:
        text = stored_text(path(run, "tokens"), run.files["text"], enc, Q + R)
        sizes["pretrain"] += int((text.stops - text.starts).sum())
    sizes["query"] = float((rows["sft"].stops - rows["sft"].starts)[::2].mean())
    sizes["groups"] = s.collect.posts if groups is None else len(groups)
    sizes["responses"] = s.collect.posts * (s.collect.k + 1) if groups is None else sum(len(g["responses"]) for g in groups)
    sizes |= {"mock": mock, "sampled": s.collect.posts + s.collect.held_out_posts if groups is None else 0}
    estimate.check_resources(s, model_config(s.model, enc, Q, R), Q, R, sizes, run.device, bool(s.model.init))


def model_config(m, enc, Q, R):
    """The shape of the language model: of the weights that are given, else of the settings."""
    if m.init:
        return real.check_init(m.init, enc, Q, R)
    return GPTConfig(enc.n_vocab, Q + max(R, 96), m.n_layer, m.n_head, m.n_embd, enc.n_vocab - 1, "gelu")


def stage_pretrain(run):
    """A language model: trained on unfiltered text, where it stands for GPT-2, or GPT-2 itself."""
    torch.manual_seed(run.seed)
    m, valid = run.settings.model, encode_posts(run.enc, run.posts["valid"], run.Q, run.R)
    save_vocabulary(run.enc, path(run, "pretrained"))
    if m.init:
        model = load_model(m.init, run.device)
        model.save_pretrained(path(run, "pretrained"))
        loss = evaluate_lm(model, *valid)
    else:
        model = GPT(model_config(m, run.enc, run.Q, run.R)).to(run.device)
        model.amp_dtype = choose_precision(run.device)[0]
        loss = train_lm(model, stored_posts(run, "pretrain"), valid, run.settings.pretrain, path(run, "pretrained"), run.seed,
                        name="pretrain")
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters; held-out loss {loss:.3f} nats per summary token")
    if run.real:
        measured = evaluation.held_out_bits(model, run)
        write_atomic(path(run, "pretrained", "held_out.json"), json.dumps(measured))
        print("\n".join(evaluation.bits_text(measured)))


def stage_sft(run):
    """Supervised fine-tuning on the filtered summaries."""
    save_vocabulary(run.enc, path(run, "sft"))
    s = run.settings.sft
    loss = train_lm(load_model(path(run, "pretrained"), run.device), sft_rows(run, s),
                    encode_posts(run.enc, run.posts["valid"], run.Q, run.R), s, path(run, "sft"), run.seed)
    print(f"held-out loss {loss:.3f} nats per summary token")


def label_share(k, s):
    """The share of the posts that is labelled when round k of s.rounds trains its reward model, the last one on all.

    Batched: as many in each round. Online: Ziegler's schedule, l(t) = l_0 + (1 - l_0) (1 - (1 - t)²) at t of the way to the last reward
    model: most labels early. We know no l_0 of theirs and take one round's share."""
    if not s.online or k == 0:
        return k / s.rounds
    first = 1 / s.rounds
    return first + (1 - first) * (1 - (1 - (k - 1) / (s.rounds - 1)) ** 2)


def mixture(run):
    """[(name, policy, temperature, samples per post)]: whose samples a round's labels compare; after the first the latest policy and
    SFT."""
    k, sft = run.settings.collect.k, load_model(path(run, "sft"), run.device)
    if run.round == 1 and not run.settings.sft.epochs:  # all from the policy as PPO will sample it (Ziegler §2)
        policies = [("initial", sft, run.settings.ppo.temperature, k)]
    elif run.round == 1:
        part, pretrained = k // 4, load_model(path(run, "pretrained"), run.device)
        policies = [("sft-0.3", sft, 0.3, part), ("sft-0.5", sft, 0.5, k - 2 * part), ("pretrained-0.5", pretrained, 0.5, part)]
    else:
        latest, temperature = load_model(of_round(run, "ppo", run.round - 1), run.device), run.settings.ppo.temperature
        after = 0.5 if run.settings.sft.epochs else temperature  # as in the first round
        policies = [(f"ppo-{run.round - 1}-{temperature}", latest, temperature, k - k // 2), (f"sft-{after}", sft, after, k // 2)]
    return [policy for policy in policies if policy[3]]


def mock_labeler(run):
    """The classifier that labels (sentiment.py), trained first where that was not done in an earlier round."""
    folder = path(run, "mock")
    if not os.path.exists(os.path.join(folder, "held_out.json")):
        torch.manual_seed(run.seed)
        model = load_model(path(run, "pretrained"), run.device, "scalar")
        held_out, train = sentiment.split_sentences(run.files["labels"], run.enc, model.config.n_positions - 1, run.seed)
        save_vocabulary(run.enc, folder)
        sentiment.train_labeler(model, train, run.settings.reward, folder, run.seed)
        labels = np.array([label for _, label in held_out])
        right = (score_all(model, [[model.config.eos]] * len(labels), [list(ids) for ids, _ in held_out])[:, 0].numpy() > 0) == labels
        m = {"accuracy": float(right.mean()), "accuracy_ci": evaluation.bootstrap_ci(right), "n": len(right),
             "majority": float(max(labels.mean(), 1 - labels.mean()))}
        write_atomic(os.path.join(folder, "held_out.json"), json.dumps(m))
        print(evaluation.mock_text(m))
    return sentiment.MockLabeler(run.enc, load_model(folder, run.device, "scalar"))


def stage_collect(run):
    """Comparisons, from the labelers of the embedded world, from a classifier in their place, or from a file of human ones."""
    s, name = run.settings.collect, f"{run.seed}-{run.round}" if run.round > 1 else str(run.seed)
    rng = random.Random(f"collect-{name}")
    if not run.real or real.has_mock(run.files):
        labeler = mock_labeler(run) if run.real else world.Labeler(
            run.settings.data.task, s.noise, length_bias=s.length_bias, copy_bias=s.copy_bias, flipped=s.flipped, tie=s.tie, seed=run.seed)
        comparisons, policies = [], mixture(run)
        if run.round > 1:
            labeler.rng = random.Random(f"labeler-{name}")  # the same people, other mistakes
            comparisons = load_comparisons(of_round(run, "comparisons.jsonl", run.round - 1))[0]
        for split, posts in (("train", run.posts["collect"][:s.posts]), ("valid", run.posts["held_out"][:s.held_out_posts])):
            begin, end = (round(label_share(k, s) * len(posts)) for k in (run.round - 1, run.round))
            comparisons += collect(run.enc, posts[begin:end], policies, labeler, s.pairs, run.Q, run.R,
                                   torch.Generator().manual_seed(run.seed + 10**6 * (run.round - 1)), rng, split, s.labels, run.stop,
                                   s.k_min, f"round-{run.round}")
        agreement = None if run.real else labeler_agreement(labeler, comparisons, policies[len(policies) // 2][0])
        write_atomic(path(run, "labelers.json"), json.dumps(agreement))
        if agreement:
            print(f"on {agreement['pairs']} pairs of one policy's samples labelers agree with the gold judge "
                  f"{agreement['with_judge']:.1%}, with each other {agreement['between_labelers']:.1%}")
    else:
        comparisons = read_comparisons(run, run.enc, run.posts)
    os.makedirs(os.path.dirname(of_round(run, "comparisons.jsonl")), exist_ok=True)
    save_json_lines(of_round(run, "comparisons.jsonl"), comparisons)
    print(f"{len(comparisons)} comparisons in {of_round(run, 'comparisons.jsonl')}")


def stage_reward(run):
    """The reward model, and how often it agrees with labelers on posts it has not seen."""
    torch.manual_seed(run.seed)
    folder = of_round(run, "reward")
    save_vocabulary(run.enc, folder)
    model = load_model(path(run, "sft"), run.device, "scalar")
    train, held_out, comparisons = split_comparisons(run.enc, of_round(run, "comparisons.jsonl"), run.Q, run.R, run.stop)
    train_reward(model, train, normalising_rows(run, run.settings.reward, run.device), run.settings.reward, folder, run.seed)
    rows = evaluation.reward_margins(model, held_out, comparisons)
    save_json_lines(os.path.join(folder, "held_out.jsonl"), rows)
    m = evaluation.measure_reward(rows)
    judge = "" if m["noise_free_judge"] is None else f", the noise-free judge {m['noise_free_judge']:.1%}"
    print(f"agrees with {m['accuracy']:.1%} of {m['n']} held-out labels{judge}, 'longer wins' {m['longer_wins']:.1%}")


def choose_sft(run):
    """The SFT checkpoint whose samples for held-out prompts the reward model likes best becomes sft/. (InstructGPT appendix C.1)

    A reward model starts from an SFT model whose samples were compared. Both are therefore made with the checkpoint of the lowest
    held-out loss, which takes the part of the paper's earlier SFT model, and PPO begins with the one chosen here."""
    scores, queries = {}, [encode_query(run.enc, p, run.Q) for p in run.posts["valid"]]
    reward_model = load_model(of_round(run, "reward"), run.device, "scalar")
    for epoch in range(1, run.settings.sft.epochs + 1):
        policy, generator = load_model(epoch_folder(path(run, "sft"), epoch), run.device), torch.Generator().manual_seed(run.seed)
        responses = sample_responses(policy, queries, run.R, run.settings.ppo.temperature, generator, stop=run.stop)
        scores[epoch] = score_all(reward_model, queries, responses).mean().item()
    chosen = max(scores, key=scores.get)
    load_model(epoch_folder(path(run, "sft"), chosen), run.device).save_pretrained(path(run, "sft"))
    losses = epoch_losses(path(run, "sft"))
    write_atomic(path(run, "sft", "chosen.json"), json.dumps({"epoch": chosen, "scores": scores, "losses": losses}))
    print(f"the reward model chooses the SFT model of epoch {chosen}; scores by epoch {', '.join(f'{x:.2f}' for x in scores.values())}")


def stage_ppo(run):
    """PPO against the reward model."""
    if run.settings.sft.choose == "reward" and not os.path.exists(path(run, "sft", "chosen.json")):
        choose_sft(run)
    s, folder = run.settings, of_round(run, "ppo")
    until = round(s.ppo.iterations * run.round / s.collect.rounds) if s.collect.online else s.ppo.iterations
    if s.collect.online and run.round > 1 and not os.path.exists(os.path.join(folder, "state.pt")):
        os.makedirs(folder, exist_ok=True)
        for name in ("metrics.jsonl", "samples.jsonl", "state.pt"):  # PPO goes on from the last of them
            target = os.path.join(folder, name)
            shutil.copy2(os.path.join(of_round(run, "ppo", run.round - 1), name), target + ".part")
            os.replace(target + ".part", target)
    train_ppo(run.folder, run.enc, prompts(run), run.Q, run.R, s.ppo, folder, run.seed, run.device,
              pretraining=pretraining_rows(run, s.ppo), reward=os.path.relpath(of_round(run, "reward"), run.folder), until=until)


def stage_evaluation(run):
    """Summaries of held-out posts by every policy."""
    if run.config.get("base") is not None and same_but_policy(run.config["base"], run.config):
        rows = evaluation.judge_policy(run.config["base"], path(run, "ppo"), run.device)
    else:
        models = {name: load_model(path(run, name), run.device) for name in ("pretrained", "sft", "ppo")}
        rows = evaluation.sample_policies(run.enc, run.posts["test"], models, load_model(path(run, "reward"), run.device, "scalar"),
                                          run.Q, run.R, run.settings.ppo.temperature, run.settings.evaluation.best_of,
                                          torch.Generator().manual_seed(run.seed), run.stop,
                                          evaluation.pick_examples(run.enc, run.posts["sft"]))
        evaluation.ask_mock(run.folder, run.enc, rows, run.device)
    os.makedirs(path(run, "evaluation"), exist_ok=True)
    save_json_lines(path(run, "evaluation", "samples.jsonl"), rows)


STAGES = [  # what it is, the file it ends with, the function
    ("data", "data/lengths.json", stage_data), ("pretrain", "pretrained/model.safetensors", stage_pretrain),
    ("sft", "sft/model.safetensors", stage_sft), ("collect", "comparisons.jsonl", stage_collect),
    ("reward", "reward/held_out.jsonl", stage_reward), ("ppo", "ppo/model.safetensors", stage_ppo),
    ("evaluation", "evaluation/samples.jsonl", stage_evaluation)]


# ---------------------------------------------------------------------------------------------------------------------
# the command


def open_folder(out, config):
    """Make the run's folder, or check that it belongs to this very configuration."""
    file = os.path.join(out, "config.json")
    if not os.path.exists(file):
        if os.path.isdir(out) and os.listdir(out):
            raise DataError(f"{out} exists, is not empty and is not the folder of a run; name another with --out")
        os.makedirs(out, exist_ok=True)
        versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
        write_atomic(file, json.dumps({**config, "versions": versions}, indent=1))
        return
    try:
        with open(file) as f:
            old = json.load(f)
    except ValueError:
        raise DataError(f"{file} is damaged; remove the folder or name another with --out") from None
    for key, value in config.items():
        if key == "settings":
            for stage, part in value.items():
                for name, v in part.items():
                    if old.get("settings", {}).get(stage, {}).get(name) != v:
                        raise DataError(f"{out} was made with {stage}.{name} = {old.get('settings', {}).get(stage, {}).get(name)}"
                                        f", now it is {v}; name another folder with --out")
        elif old.get(key) != value:
            raise DataError(f"{out} was made with {key} = {old.get(key)}, now it is {value}; name another folder with --out")


SHARED = {  # what each stage leaves behind
    "data": ("data", "tokenizer.json"), "pretrain": ("pretrained",), "sft": ("sft",),
    "collect": ("comparisons.jsonl", "labelers.json", "mock"), "reward": ("reward",), "ppo": ("ppo",), "evaluation": ("evaluation",)}


def depends_on(config):
    """{stage: what its result depends on, beside the stages before it}: of a run's configuration a file, the seed, the settings of a stage
    or one of them."""
    s = config["settings"]
    later = ["reward", "ppo"]  # what made the policy that is sampled
    return {
        "data": ["model", "data", *real.FILES],
        "pretrain": ["pretrain"],
        "sft": ["sft", *(["seed", "collect", *later] if s["sft"]["choose"] == "reward" else [])],  # it is chosen after the reward model
        # a sample ends by PPO's rule; without SFT it is drawn as in PPO; in later rounds PPO made the policy; a mock labeler is trained as
        # the reward model is
        "collect": ["seed", "collect", "ppo.stop_token", "ppo.truncate_after", *(["ppo.temperature"] if s["sft"]["epochs"] == 0 else []),
                    *(later if s["collect"]["rounds"] > 1 else []), *(["reward"] if real.has_mock(config) else [])],
        "reward": ["reward", *(["ppo.temperature"] if s["reward"]["normalise"] == "gain_bias" else [])],
        "ppo": ["ppo"], "evaluation": ["evaluation"]}


def same_stages(base, old, new):
    """Names of the stages that a run of configuration `new` would only repeat from the folder `base` of configuration `old`.

    Stage by stage until something differs that the stage depends on. Another seed shares the data, the language model and the SFT model
    all the same: one base serves many seeds of what comes after it, and fewer comparisons than its own: they are about the first of its
    posts."""
    s = {part: {**values, **old.get("settings", {}).get(part, {})} for part, values in dataclasses.asdict(Settings()).items()}
    old, names = {**old, "settings": s}, []  # a setting that the base did not know yet is what it is by default

    def of(config, key):
        part, _, name = key.partition(".")
        of_part = config["settings"].get(part, config.get(part))
        return of_part[name] if name else of_part

    if any(s["collect"][key] < new["settings"]["collect"][key] for key in ("posts", "held_out_posts")):
        return []
    for name, result, _ in STAGES:
        differ = any(of(old, key) != of(new, key) for key in depends_on(new)[name])
        if differ or not os.path.exists(os.path.join(base, result)):
            break
        names.append(name)
    return names


def same_but_policy(base, config):
    """Whether a run differs from the finished one in `base` in how PPO trains, no more: all other policies' samples are there already."""
    old = open_run(base).config
    as_base = {**config, "settings": {**config["settings"], "ppo": old["settings"]["ppo"]}}
    sampling = [[c["settings"]["ppo"][key] for key in ("temperature", "stop_token", "truncate_after")] for c in (old, config)]
    return (sampling[0] == sampling[1] and "reward" in same_stages(base, old, config)
            and "evaluation" in same_stages(base, old, as_base))


def share_stages(base, folder, config):
    """Copy from an earlier run what would come out the same. -> names of the stages"""
    names = same_stages(base, open_run(base).config, config)
    for part in (part for name in names for part in SHARED[name]):
        source, target = os.path.join(base, part), os.path.join(folder, part)
        if os.path.exists(source) and not os.path.exists(target):
            if os.path.isdir(source):  # a finished stage needs no state; an interrupted copy goes on
                shutil.copytree(source, target + ".part", ignore=shutil.ignore_patterns("state.pt"), dirs_exist_ok=True)
            else:
                shutil.copy2(source, target + ".part")
            os.replace(target + ".part", target)
    print(f"from {base}: {', '.join(names) or 'nothing, the settings of its first stage differ'}")
    return names


def all_stages(run):
    """STAGES, from the collection to PPO once per round -> (name, path of the file it ends with, function, round)"""
    loop, last, out = [s for s in STAGES if s[0] in ("collect", "reward", "ppo")], run.settings.collect.rounds, []
    for name, result, stage in STAGES:
        if name == "collect":
            out += [(f"{n}-{k}", of_round(run, r, k), f, k) for k in range(1, last) for n, r, f in loop]
        out.append((name, path(run, result), stage, last))
    return out


def run_stages(run, until=None):
    """Every stage that has not left its result yet, up to `until` -> seconds of each, whether any worked."""
    seconds_file = path(run, "seconds.json")
    seconds = {}
    if os.path.exists(seconds_file):
        with open(seconds_file) as f:
            seconds = json.load(f)
    worked, stages = False, all_stages(run)
    stages = stages[:[name for name, *_ in stages].index(until or STAGES[-1][0]) + 1]
    for number, (name, result, stage, run.round) in enumerate(stages, 1):
        if name != "data" and not hasattr(run, "enc"):
            run.__dict__.update(open_run(run.folder).__dict__)
        if os.path.exists(result):
            print(f"[{number}/{len(stages)}] {name}: done before, {result}")
            continue
        print(f"[{number}/{len(stages)}] {name}: {stage.__doc__.split('.')[0].strip()}", flush=True)
        began, worked = time.time(), True
        goes_on = os.path.exists(os.path.join(os.path.dirname(result), "state.pt"))
        try:
            stage(run)
        finally:  # an interrupted stage has cost its time too; one that begins anew begins at 0
            seconds[name] = (seconds.get(name, 0.0) if goes_on else 0.0) + time.time() - began
            write_atomic(seconds_file, json.dumps(seconds))
    return seconds, worked


def peak_memory():
    """The most memory this process has held, in MB; None where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def run_pipeline(settings, seed, out, name, base=None, device="auto", until=None, **files):
    """Every stage with these settings in the folder `out`, then the report; or the stages up to `until`, and no report.

    base: a run's folder whose stages may be taken over; files: of real.FILES, in place of the embedded world."""
    files = {key: files.get(key) for key in real.FILES}
    config = {"preset": name, "seed": seed, **files, "base": base, "settings": dataclasses.asdict(settings)}
    if base is not None:
        open_run(base)  # refused before anything is made
    open_folder(out, config)
    if base is not None:
        share_stages(base, out, config)
    run = SimpleNamespace(folder=out, settings=settings, seed=seed, device=pick_device(device), files=files,
                          real=any(files.values()), config=config)
    try:
        seconds, worked = run_stages(run, until)
    except DataError:
        if not os.path.exists(path(run, "data", "lengths.json")):  # nothing was begun: other settings may take the folder
            for file in ("config.json", "seconds.json"):
                if os.path.exists(path(run, file)):
                    os.remove(path(run, file))
            for folder in ("data", "tokens"):
                shutil.rmtree(path(run, folder), ignore_errors=True)
        raise
    if until is None:
        evaluation.write_report(out, seconds, peak_memory() if worked else None)


COMMANDS = {  # python run.py COMMAND: the module whose main(argv) it is, and what it does
    "ablations": "the papers' ablations, in one table", "figures": "the papers' figures, with error bars",
    "summarize": "a trained run summarizes a text of yours"}


def main():
    if sys.argv[1:2] and sys.argv[1] in COMMANDS:
        return importlib.import_module(sys.argv[1]).main(sys.argv[2:])
    parser = Parser(__doc__)
    parser.usage = "run.py [--OPTION VALUE ...]" + "".join(f"\n       run.py {name:9} ...  {what}" for name, what in COMMANDS.items())
    parser.add_argument("--preset", choices=sorted(PRESETS), help="settings to start from (default tiny, real with --posts)")
    parser.add_argument("--out", help="folder of the run (default out/PRESET-seedN)")
    parser.add_argument("--base", help="folder of an earlier run: stages whose settings are the same are copied from it; of "
                        "one with another seed the data, the language model and the SFT model")
    parser.add_argument("--seed", type=seed_number, default=1, help="seed of everything (default 1)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default auto)")
    for file, what in real.FILES.items():
        parser.add_argument("--" + file.replace("_", "-"), nargs="+" if file == "text" else None, metavar="FILE", help=what)
    for setting in ("data.task", "model.vocab", "model.init"):
        parser.add_argument("--" + setting.split(".")[1], dest=setting, metavar="str", help=f"short for --{setting}")
    for stage, part in vars(Settings()).items():
        add_settings(parser, part, stage + ".")
    parser.add_argument("--rounds", type=int, dest="collect.rounds", metavar="int", help="short for --collect.rounds")
    args = parser.parse_args()
    files = {name: getattr(args, name) for name in real.FILES}
    name = args.preset or ("real" if any(files.values()) else "tiny")
    settings = preset(name)
    for stage, part in vars(settings).items():
        setattr(settings, stage, override(part, args, stage + "."))
    real.check_files(files, settings.data.task)
    given = [f.name for f in dataclasses.fields(CollectSettings) if getattr(args, "collect." + f.name) is not None]
    mock, habits = real.has_mock(files), {"noise", "tie", "length_bias", "copy_bias", "flipped"}.intersection(given)
    if any(files.values()) and given and not mock:
        raise DataError("--collect settings go with the labelers of the embedded world; in files people have labelled")
    if mock and habits:
        raise DataError(f"--collect.{min(habits)} is for labelers of the embedded world; the classifier of --labels always takes the best")
    check_together(settings, files=any(files.values()), mock=mock)
    run_pipeline(settings, args.seed, args.out or os.path.join("out", f"{name}-seed{args.seed}"), name, args.base, args.device, **files)


if __name__ == "__main__":
    run_main(main)
