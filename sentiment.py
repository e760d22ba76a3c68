"""
The mock labeler: a classifier of sentiment takes the place of people, so that the true reward of the sentiment task is known.

Reference: Ziegler 2019 §3.1 and §3.1.1.

    python run.py --preset ziegler --text books --labels sst2_train.tsv

    r_s(x, y) = w·h(end of x ⧺ y) + b      log-odds that the text is positive: the run's language model and a new linear head
    loss      = -E[l log σ(r_s) + (1 - l) log(1 - σ(r_s))]      over sentences with label l, 1 for positive and 0 for negative

The paper's classifier is a small transformer of its own, trained on a balanced part of Amazon's reviews; its r_s reads the excerpt with the
continuation, as ours does, and its "human" always takes the continuation of highest r_s. Nobody here makes mistakes.
"""
import random
import re

import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import DataError, load_sst2
from reward import score_responses
from sft import MetricsLog, batches, cosine, load_state, make_optimizer, save_state, set_lr


def log_odds_loss(scores, labels):
    """-E[l log σ(r) + (1 - l) log σ(-r)], where σ(-r) = 1 - σ(r). scores r [B], labels l [B] 0 or 1 -> scalar"""
    return -(labels * F.logsigmoid(scores) + (1 - labels) * F.logsigmoid(-scores)).mean()


def encode(enc, text, most):
    """The last ids of a text as SST-2 writes one, in lower case with blanks around punctuation, and EOS: at most `most`."""
    words = " ".join(re.findall(r"\w+|[^\w\s]", text.lower()))
    return enc.encode_ordinary(" " + words)[-(most - 1):] + [enc.n_vocab - 1]


def split_sentences(path, enc, most, seed):
    """-> (ids, label) of a tenth of the different sentences, to test on, and of the others."""
    rows = list({tuple(encode(enc, s["text"], most)): s["label"] for s in load_sst2(path)[0]}.items())
    random.Random(seed).shuffle(rows)
    held_out, train = rows[:len(rows) // 10], rows[len(rows) // 10:]
    if not held_out or len({label for _, label in train}) < 2:
        raise DataError(f"{path} has {len(rows)} different sentences; a labeler needs at least 10, some of them positive and some negative")
    return held_out, train


def train_labeler(model, rows, s, folder, seed, save_every=50):
    """Epochs of the loss over (ids, label), with the reward model's batch and learning rate: s of RewardSettings."""
    model.recompute, eos = s.recompute, model.config.eos
    plan = batches(len(rows), s.batch, s.epochs, seed, [len(ids) for ids, _ in rows])
    optimizer, generator = make_optimizer([model], s.lr, s.weight_decay), torch.Generator().manual_seed(seed)
    start, _ = load_state(folder, [model], optimizer, generator)
    log = MetricsLog(folder, start)
    for step in tqdm(range(start, len(plan)), initial=start, total=len(plan), desc="labeler", unit="step"):
        set_lr(optimizer, s.lr * cosine(step, len(plan), s.warmup, s.final_lr))
        ids, labels = zip(*(rows[i] for i in plan[step]))
        optimizer.zero_grad(set_to_none=True)
        loss = log_odds_loss(score_responses(model, [[eos]], [list(map(list, ids))])[0], torch.tensor(labels, device=model.device))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        log.write(step, loss=loss.item(), grad_norm=norm.item())
        if (step + 1) % save_every == 0 and step + 1 < len(plan):
            save_state(folder, step + 1, [model], optimizer, generator)
    model.save_pretrained(folder)


class MockLabeler:
    """What world.Labeler gives, from r_s and without mistakes."""

    def __init__(self, enc, model):
        self.enc, self.model = enc, model

    @torch.no_grad()
    def scores(self, post, texts):
        """r_s of an excerpt with each of these continuations -> list"""
        rows = [encode(self.enc, post["post"] + " " + text, self.model.config.n_positions - 1) for text in texts]
        return score_responses(self.model, [[self.model.config.eos]], [rows])[0].tolist()

    def compare(self, post, a, b):
        first, second = self.scores(post, [a, b])
        return int(second > first), None, "mock"

    def rank(self, post, texts):
        scores = self.scores(post, texts)
        return [sum(other > score for other in scores) for score in scores], "mock"

    def best_of(self, post, texts):
        """-> (index of the text of highest r_s, "mock"): §3.1.1's "human" always chooses it"""
        scores = self.scores(post, texts)
        return scores.index(max(scores)), "mock"
