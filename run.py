"""
The whole of "learning to summarize from human feedback" in one command, offline, in minutes:

    python run.py                      # pretrain, SFT, comparisons, reward model, PPO, evaluation -> out/tiny-seed1/report
    python run.py --seed 2 --ppo.beta 0.1
    python run.py --posts posts.jsonl --comparisons comparisons.jsonl      # OpenAI's formats

Stages run in order and leave their results in the run's folder. The same command again goes on where it stopped; a folder
made with other settings is refused.
"""
import argparse
import copy
import dataclasses
import json
import os
import platform
import random
import resource
import sys
import time
from dataclasses import dataclass, field

import numpy as np
import torch

import evaluation
import world
from data import (DataError, encode_query, encode_response, load_comparisons, load_encoding, load_posts, post_key, query_text,
                  save_encoding, save_json_lines, train_bpe, write_atomic)
from model import GPT, GPTConfig, choose_precision
from ppo import PPOSettings, train_ppo
from reward import CollectSettings, RewardSettings, collect, group_by_post, train_reward
from sft import SFTSettings, add_settings, check, encode_posts, evaluate_lm, load_model, override, run_main, train_lm


@dataclass
class ModelSettings:
    vocab_size: int = 1024  # tokens of the BPE, at most
    n_layer: int = 4  # transformer blocks
    n_head: int = 4  # attention heads
    n_embd: int = 128  # width d
    max_query: int = 128  # Q: a longer post is cut (Stiennon: 512)
    max_response: int = 48  # R, with EOS; 0 takes the 99th percentile of the summaries

    def validate(self):
        check(self.vocab_size > 257, "model.vocab_size must be above 257, the bytes and the end of text")
        check(min(self.n_layer, self.n_head, self.n_embd) > 0 and self.n_embd % self.n_head == 0, "model.n_embd must be "
              "a multiple of model.n_head")
        check(self.max_query > 0 and (self.max_response == 0 or self.max_response > 1), "model.max_query must be above 0 and "
              "model.max_response above 1")


@dataclass
class PostSettings:
    pretrain: int = 9600  # unfiltered posts for the language model, and the prompts of PPO
    sft: int = 3200  # posts that fine-tuning takes, filtered to TL;DRs of 24 to 48 tokens
    test: int = 500  # held-out posts of the evaluation

    def validate(self):
        check(min(self.pretrain, self.sft, self.test) > 0, "posts.pretrain, posts.sft and posts.test must be above 0")


@dataclass
class EvaluationSettings:
    best_of: int = 16  # samples that best-of-n chooses from

    def validate(self):
        check(self.best_of > 0, "evaluation.best_of must be above 0")


@dataclass
class Settings:
    model: ModelSettings = field(default_factory=ModelSettings)
    data: PostSettings = field(default_factory=PostSettings)
    pretrain: SFTSettings = field(default_factory=lambda: SFTSettings(lr=2e-3, batch=16, warmup=50, query_weight=0.05))
    sft: SFTSettings = field(default_factory=lambda: SFTSettings(lr=5e-4, batch=16))
    collect: CollectSettings = field(default_factory=CollectSettings)
    reward: RewardSettings = field(default_factory=RewardSettings)
    ppo: PPOSettings = field(default_factory=PPOSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)


PRESETS = {  # preset: {stage.setting: value}, everything else as the settings classes say
    "tiny": {},
    "test": {"model.n_layer": 2, "model.n_embd": 32, "model.n_head": 2, "data.pretrain": 64, "data.sft": 40, "data.test": 12,
             "collect.posts": 16, "collect.held_out_posts": 8, "ppo.iterations": 2, "ppo.batch": 8, "evaluation.best_of": 2},
}


def preset(name):
    """A fresh Settings of that preset, validated."""
    settings = Settings()
    for key, value in PRESETS[name].items():
        stage, setting = key.split(".")
        part = getattr(settings, stage)
        if not hasattr(part, setting):
            raise KeyError(key)
        setattr(part, setting, value)
    for part in dataclasses.fields(settings):
        getattr(settings, part.name).validate()
    return settings


# ---------------------------------------------------------------------------------------------------------------------
# stages: each leaves its result in the run's folder and is skipped where that result is

class Run:
    """The folder of a run, its settings, and what the stages share."""

    def __init__(self, out, settings, name, seed, device, posts, comparisons):
        self.out, self.s, self.name, self.seed, self.device = out, settings, name, seed, device
        self.posts_file, self.comparisons_file = posts, comparisons
        self.seconds = {}

    def path(self, *parts):
        return os.path.join(self.out, *parts)

    def generator(self, stage):
        """Every stage draws from a generator of its own, so that a stage repeated alone draws the same."""
        return torch.Generator().manual_seed(self.seed * 1000 + stage)

    def load(self, folder, head="lm"):
        return load_model(self.path(folder), self.device, head)


def stage_data(run):
    """Posts of every split, the tokenizer, Q and R."""
    if os.path.exists(run.path("data", "lengths.json")):
        return
    os.makedirs(run.path("data"), exist_ok=True)
    s = run.s
    if run.posts_file:
        posts, skipped = load_posts(run.posts_file)
        print(f"{run.posts_file}: {len(posts)} posts" + (f", {skipped} skipped because they are empty" if skipped else ""))
        random.Random(run.seed).shuffle(posts)
        held = max(1, min(s.data.test, len(posts) // 8))
        if len(posts) < 8:
            raise DataError(f"{run.posts_file} has {len(posts)} usable posts; at least 8 are needed")
        splits = {"test": posts[:held], "valid": posts[held:2 * held], "pretrain": posts[2 * held:][:s.data.pretrain]}
        splits["sft"] = splits["pretrain"][:s.data.sft]
        corpus = splits["pretrain"]
    else:
        splits = {name: world.make_posts(n, run.seed, name, 0.4 if name == "pretrain" else 1.0) for name, n in
                  {"pretrain": s.data.pretrain, "sft": 2 * s.data.sft, "valid": 400, "test": 2 * s.data.test,
                   "collect": s.collect.posts, "held_out": s.collect.held_out_posts}.items()}
        corpus = splits["pretrain"][:3000]
    enc = train_bpe([query_text(p) + " " + p["summary"] for p in corpus], s.model.vocab_size)
    if not run.posts_file:  # supervised training and evaluation take the filtered TL;DRs, as the papers do
        for name, n in (("sft", s.data.sft), ("valid", 400), ("test", s.data.test)):
            splits[name] = [p for p in splits[name] if 24 <= len(encode_response(enc, p["summary"], 1000)) <= 48][:n]
    R = s.model.max_response or int(np.percentile([len(encode_response(enc, p["summary"], 10**6)) for p in splits["sft"]], 99))
    Q = max(len(encode_query(enc, p, s.model.max_query)) for posts in splits.values() for p in posts)
    save_encoding(enc, run.path("tokenizer.json"))
    for name, posts in splits.items():
        save_json_lines(run.path("data", name + ".jsonl"), posts)
    write_atomic(run.path("data", "lengths.json"), json.dumps({"Q": Q, "R": R}))


def read_data(run):
    """What stage_data left, as attributes of the run."""
    run.enc = load_encoding(run.path("tokenizer.json"))
    with open(run.path("data", "lengths.json")) as f:
        lengths = json.load(f)
    run.Q, run.R = lengths["Q"], lengths["R"]
    run.posts = {name[:-6]: load_posts(run.path("data", name))[0] for name in os.listdir(run.path("data"))
                 if name.endswith(".jsonl")}


def stage_pretrain(run):
    """A language model on unfiltered text: stands for GPT-2."""
    torch.manual_seed(run.seed)
    m = run.s.model
    config = GPTConfig(run.enc.n_vocab, run.Q + max(run.R, 96), m.n_layer, m.n_head, m.n_embd, run.enc.n_vocab - 1)
    model = GPT(config).to(run.device)
    model.amp_dtype = choose_precision(run.device)[0]
    loss = train_lm(model, encode_posts(run.enc, run.posts["pretrain"], run.Q, run.R),
                    encode_posts(run.enc, run.posts["valid"], run.Q, run.R), run.s.pretrain, run.path("pretrained"),
                    run.seed, name="pretrain")
    print(f"held-out loss {loss:.3f} nats per TL;DR token")


def stage_sft(run):
    """Supervised fine-tuning on the filtered summaries."""
    loss = train_lm(run.load("pretrained"), encode_posts(run.enc, run.posts["sft"], run.Q, run.R),
                    encode_posts(run.enc, run.posts["valid"], run.Q, run.R), run.s.sft, run.path("sft"), run.seed)
    print(f"held-out loss {loss:.3f} nats per TL;DR token")


def stage_collect(run):
    """Comparisons: from the labelers of the embedded world, or a file of human ones."""
    s = run.s.collect
    rng = random.Random(f"collect-{run.seed}")
    if run.comparisons_file:
        comparisons, skipped = load_comparisons(run.comparisons_file)
        print(f"{run.comparisons_file}: {len(comparisons)} comparisons" +
              (f", {skipped} skipped because they are empty" if skipped else ""))
        keys = sorted({post_key(c["info"]) for c in comparisons})
        rng.shuffle(keys)
        held = set(keys[:max(1, len(keys) // 5)])
        for c in comparisons:
            c["split"] = "valid" if post_key(c["info"]) in held else "train"
    else:
        labeler = world.Labeler(noise=s.noise, length_bias=s.length_bias, copy_bias=s.copy_bias, flipped=s.flipped,
                                seed=run.seed)
        sft, pretrained = run.load("sft"), run.load("pretrained")
        mixture = [("sft-0.5", sft, 0.5, 1), ("sft-0.7", sft, 0.7, 2), ("pretrained-0.7", pretrained, 0.7, 1)]
        comparisons = [c for split, posts in (("train", "collect"), ("valid", "held_out"))
                       for c in collect(run.enc, run.posts[posts], mixture, labeler, s.pairs, run.Q, run.R, run.generator(3),
                                        rng, split)]
    save_json_lines(run.path("comparisons.jsonl"), comparisons)
    print(f"{len(comparisons)} comparisons in {run.path('comparisons.jsonl')}")


def stage_reward(run):
    """The reward model, from the SFT model's trunk; its accuracy on comparisons of unseen posts."""
    comparisons, _ = load_comparisons(run.path("comparisons.jsonl"))
    train, valid = ([c for c in comparisons if c["split"] == split] for split in ("train", "valid"))
    torch.manual_seed(run.seed)
    model = run.load("sft", head="scalar")
    references = [q + r for q, r in zip(*encode_posts(run.enc, run.posts["sft"][:500], run.Q, run.R))]
    train_reward(model, group_by_post(run.enc, train, run.Q, run.R), references, run.s.reward, run.path("reward"), run.seed)
    rows = evaluation.reward_margins(model, group_by_post(run.enc, valid, run.Q, run.R), valid)
    save_json_lines(run.path("reward", "held_out.jsonl"), rows)
    m = evaluation.measure_reward(rows)
    print({k: m[k] for k in ("accuracy", "accuracy_ci", "labeler_ceiling", "gap_to_ceiling", "gap_to_ceiling_ci", "longer_wins", "n")})


def stage_ppo(run):
    """PPO against the reward model."""
    policy, ref_policy = run.load("sft"), run.load("sft").requires_grad_(False)
    reward_model, value_model = run.load("reward", "scalar").requires_grad_(False), run.load("reward", "scalar")
    posts = run.posts["pretrain"]
    queries = [encode_query(run.enc, p, run.Q) for p in posts]
    gold = (lambda i, text: world.utility(posts[i], text)) if "facts" in posts[0] else None
    train_ppo(policy, ref_policy, reward_model, value_model, queries, run.enc, run.R, run.s.ppo, run.path("ppo"), run.seed, gold)


def stage_evaluation(run):
    models = {name: run.load(name) for name in ("pretrained", "sft", "ppo")}
    rows = evaluation.sample_policies(run.enc, run.posts["test"], models, run.load("reward", "scalar"), run.Q, run.R,
                                      run.s.ppo.temperature, run.s.evaluation.best_of, run.generator(6))
    os.makedirs(run.path("evaluation"), exist_ok=True)
    save_json_lines(run.path("evaluation", "samples.jsonl"), rows)
    for k, v in evaluation.measure_policies(rows).items(): print(k, {a: (round(b, 3) if isinstance(b, float) else b) for a, b in v.items()})


if __name__ == "__main__":
    import sys
    ap = argparse.ArgumentParser()
    ap.add_argument("--out"); ap.add_argument("--seed", type=int, default=1); ap.add_argument("--preset", default="tiny")
    ap.add_argument("--upto", default="evaluation")
    for f in dataclasses.fields(Settings): add_settings(ap, type(getattr(Settings(), f.name)), f.name + ".")
    a = ap.parse_args()
    s = preset(a.preset)
    for f in dataclasses.fields(Settings): setattr(s, f.name, override(getattr(s, f.name), a, f.name + "."))
    run = Run(a.out, s, a.preset, a.seed, "cpu", None, None)
    t = time.time(); stage_data(run); read_data(run); print('data', time.time() - t, run.Q, run.R, {k: len(v) for k, v in run.posts.items()})
    for name, done in (("pretrain", "pretrained/model.safetensors"), ("sft", "sft/model.safetensors"), ("collect", "comparisons.jsonl"), ("reward", "reward/held_out.jsonl"), ("ppo", "ppo/model.safetensors"), ("evaluation", "evaluation/samples.jsonl")):
        t = time.time()
        if not os.path.exists(run.path(done)): globals()["stage_" + name](run); print(name, f"{time.time() - t:.1f}s", flush=True)
        if name == a.upto: break
