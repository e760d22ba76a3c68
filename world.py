"""
The embedded world: Reddit-style posts made from hidden facts, labelers who are programs, and a gold judge.

Ziegler 2019, Stiennon 2020 and InstructGPT 2022 could never measure what they were after: the preference of people.
Here it is a function. A post hides seven key facts (who, what, where, when, the feeling, the wish, the question)
among sentences about other people; a good summary states the facts and nothing else. So every claim of the papers can
be checked against the truth, on a laptop, with no download.

    posts = make_posts(1000, seed=1)         # dicts: id, subreddit, title, post, summary (the author's own), facts
    utility(posts[0], "my sister anna ...")  # the gold judge: noise-free, what the papers call true preference
    Labeler(noise=1.0).compare(post, a, b)   # a person: sees the same things, makes mistakes, has habits

The judge reads a text with the same sentence patterns that the authors use. A fact counts where a sentence states it;
words that no pattern accounts for cost, so a salad of the right keywords loses. See `utility` for the formula.
"""
import functools
import math
import random
import re
from dataclasses import dataclass
from types import SimpleNamespace

# ---------------------------------------------------------------------------------------------------------------------
# the vocabulary of the world: for each slot the values that a fact can take

SLOTS = {
    "relation": "sister brother boss roommate neighbor coworker cousin uncle girlfriend boyfriend landlord teacher".split(),
    "name": "anna ben carl dana emma frank henry kate nick olga paul rosa".split(),
    "verb": "broke lost sold stole hid burned borrowed ruined".split(),
    "object": "laptop car bike phone guitar camera ring jacket tent couch watch piano".split(),
    "place": "office beach park gym airport hotel library wedding hospital market church bar".split(),
    "time": ["last week", "last night", "on monday", "on friday", "two days ago", "a month ago", "this morning",
             "yesterday", "last summer", "at christmas"],
    "feeling": "angry sad hurt scared lonely guilty jealous confused ashamed worried".split(),
    "wish": ["move out", "get paid back", "stay friends", "hear an apology", "buy a new one", "be left alone",
             "talk it out", "take a break", "get even", "save some money"],
    "question": ["call the police", "tell our parents", "forgive them", "break up", "quit my job", "say sorry",
                 "wait longer", "see a lawyer", "write a letter", "let it go"],
}
WEIGHTS = {"relation": .5, "name": .5, "verb": .5, "object": .5, "place": 1., "time": 1., "feeling": 1., "wish": 1.,
           "question": 1.}  # who and what are two facts of two halves each: seven facts in all
SUBREDDITS = "relationships advice tifu offmychest family legaladvice".split()  # the whitelist of the task
OTHER_SUBREDDITS = "stories diaries neighbors letters".split()  # pretraining text only; people there sum up with care

# ---------------------------------------------------------------------------------------------------------------------
# how people write: {slot} is filled with a fact, {slot2} with a value that belongs to somebody else

PREAMBLES = ["hi reddit.", "ok so this is long.", "sorry for my english.", "throwaway for obvious reasons.",
             "first time poster here."]
TITLES = ["my {relation} {name} {verb} my {object}", "need advice about my {relation} {name}", "i feel {feeling} about {name}",
          "should i {question}?", "trouble at the {place}", "i want to {wish}"]
BODY = {  # each inner list: wordings of one sentence of the story, in the order in which people tell it
    "event": ["my {relation} {name} {verb} my {object}.", "so my {relation} {name} just {verb} my {object}.",
              "the thing is, my {relation} {name} {verb} my {object}."],
    "scene": ["it was at the {place} {time}.", "this was {time} at the {place}.", "it happened {time} at the {place}."],
    "heart": ["i feel {feeling} and want to {wish}.", "i am {feeling} now and i would like to {wish}.",
              "it makes me {feeling} and i just want to {wish}."],
    "question": ["should i {question}?", "would it be right to {question}?", "is it time to {question}?"],
}
ECHOES = ["{name} did not even care.", "i miss my {object}.", "i can not go to the {place} again."]
DISTRACTORS = ["my {relation2} {name2} was at the {place2}.", "my {relation2} feels {feeling2}.",
               "my {relation2} wants to {wish2}.", "my {relation2} would {question2}.",
               "my {relation2} got a new job.", "my {relation2} came by {time2}.",
               "my {relation2} went through the same thing."]
# what authors put into a TL;DR: the event with its place and time, then the rest; each may be missing
TLDR_WHO = ["my {relation} {name}", "{name}", "my {relation}"]
TLDR_FEELING = ["i feel {feeling}", "i am {feeling}", "it makes me {feeling}"]
TLDR_WISH = ["want to {wish}", "just want to {wish}", "would like to {wish}"]
TLDR_QUESTION = ["should i {question}?", "is it time to {question}?", "would it be right to {question}?"]
FILLERS = ["long story short,", "to be honest i do not know where to start.", "thanks for reading all of this.",
           "so basically,", "it is a long story and i am on mobile.", "any help is welcome.", "well, where do i begin.",
           "i know how this sounds."]


# everything in which two worlds differ; object, at and me are what TL;DRs are built from
REDDIT = SimpleNamespace(
    slots=SLOTS, subreddits=SUBREDDITS, others=OTHER_SUBREDDITS, preambles=PREAMBLES, titles=TITLES, body=BODY, echoes=ECHOES,
    distractors=DISTRACTORS,
    tldr_who=TLDR_WHO, tldr_feeling=TLDR_FEELING, tldr_wish=TLDR_WISH, tldr_question=TLDR_QUESTION, fillers=FILLERS,
    object="my {object}", at="at the {place}", me="i")
# the second world: other people, other facts, other sentences. It stands to the first as CNN/DM does to TL;DR
NEWS = SimpleNamespace(
    slots={
        "relation": "minister mayor coach actor singer pilot farmer judge doctor banker driver artist".split(),
        "name": "smith jones garcia miller brown davis lopez wilson moore taylor clark lewis".split(),
        "verb": "bought opened closed crashed attacked rescued painted designed".split(),
        "object": "bridge stadium factory ship school museum tower train statue boat theater farm".split(),
        "place": "berlin paris london tokyo madrid cairo oslo lima boston dublin vienna rome".split(),
        "time": ["in january", "in april", "in june", "in august", "in october", "in december", "on tuesday", "on thursday",
                 "last year", "at dawn"],
        "feeling": "proud shocked grateful optimistic nervous relieved furious disappointed surprised tired".split(),
        "wish": ["win the election", "pay the fine", "leave politics", "raise wages", "build a second one", "appeal the verdict",
                 "retire early", "hire more staff", "found a party", "publish a book"],
        "question": ["cut the budget", "reopen the case", "back the plan", "end the strike", "change the law", "lower the taxes",
                     "delay the vote", "join the union", "ban the sale", "fund the repair"]},
    subreddits="world politics business".split(), others="local archive".split(),
    preambles=["breaking news.", "this story has been updated.", "our correspondent reports."],
    titles=["{relation} {name} {verb} {object}", "report on {relation} {name}", "{name} is {feeling}", "will parliament {question}?",
            "incident near {place}", "plans to {wish}"],
    body={"event": ["the {relation} {name} {verb} a {object}.", "according to police the {relation} {name} {verb} a {object}.",
                    "witnesses say that the {relation} {name} {verb} a {object}."],
          "scene": ["the events took place in {place} {time}.", "it was reported from {place} {time}.", "reporters reached {place} {time}."],
          "heart": ["the {relation} said to be {feeling} and plans to {wish}.", "friends call {name} {feeling} with plans to {wish}.",
                    "{name} sounded {feeling} and hopes to {wish}."],
          "question": ["will parliament {question}?", "analysts ask whether to {question}.", "voters wonder: will parliament {question}?"]},
    echoes=["{name} declined to comment.", "the {object} drew large crowds.", "streets in {place} were calm."],
    distractors=["a {relation2} named {name2} was seen in {place2}.", "the {relation2} seemed {feeling2}.", "a {relation2} hopes to {wish2}.",
                 "another {relation2} promised to {question2}.", "the {relation2} gave no interview.", "a {relation2} arrived {time2}."],
    tldr_who=["the {relation} {name}", "{name}", "the {relation}"],
    tldr_feeling=["they are {feeling}", "they feel {feeling}", "they sounded {feeling}"],
    tldr_wish=["plan to {wish}", "hope to {wish}", "want to {wish}"],
    tldr_question=["will parliament {question}?", "it is open whether to {question}.", "is it time to {question}?"],
    fillers=["more to follow,", "sources confirm this.", "read the full report below.", "in other news,", "experts are divided."],
    object="a {object}", at="in {place}", me="they")
WORLDS = {"reddit": REDDIT, "news": NEWS}


def world_of(post):
    """The name of the world that a post is about."""
    return "news" if post.get("subreddit") in NEWS.subreddits + NEWS.others else "reddit"


def _pick(rng, values, other_than=None):
    return rng.choice([v for v in values if v != other_than])


def _sentence(rng, patterns, facts, w):
    """Fill one of `patterns`: {slot} from the facts, {slot2} with any value that is not the fact's."""
    pattern = rng.choice(patterns)
    others = {slot + "2": _pick(rng, w.slots[slot], facts[slot]) for slot in w.slots if "{" + slot + "2}" in pattern}
    return pattern.format(**facts, **others)


HABIT = {"relation": .2, "name": -.2, "place": -.2, "time": -.2, "feeling": -.2, "wish": .2, "question": .2}  # what people tell first


def write_tldr(rng, facts, care, slips, chatter, w=REDDIT):
    """An author's TL;DR. A fact is kept with probability care + HABIT, a kept one is wrong with probability `slips`,
    and up to three phrases that say nothing come with probability `chatter` each."""
    said = {slot: (_pick(rng, w.slots[slot], value) if rng.random() < slips else value) for slot, value in facts.items()}
    keep = {slot: rng.random() < care + HABIT.get(slot, 0) for slot in w.slots}
    who = w.tldr_who[0] if keep["name"] and keep["relation"] else w.tldr_who[1] if keep["name"] else w.tldr_who[2]
    event = f"{who} {{verb}} {w.object}"
    if keep["place"]:
        event += " " + w.at
    if keep["time"]:
        event += " {time}"
    rest = [rng.choice(w.tldr_feeling)] * keep["feeling"]
    rest += [("" if keep["feeling"] else w.me + " ") + rng.choice(w.tldr_wish)] * keep["wish"]
    parts = [event + ".", " and ".join(rest) + "."] if rest else [event + "."]
    if keep["question"]:
        parts.append(rng.choice(w.tldr_question))
    fillers = rng.sample(w.fillers, 3)
    if rng.random() < chatter:
        parts.insert(0, fillers[0])
    if rng.random() < chatter:
        parts.insert(rng.randint(1, len(parts)), fillers[1])
    if rng.random() < chatter:
        parts.append(fillers[2])
    return " ".join(parts).format(**said)


def make_post(rng, id, listed=True, w=REDDIT):
    """One post: {id, subreddit, title, post, summary, facts}. `summary` is the author's TL;DR of uneven quality.

    listed: whether it stands in one of the task's subreddits. The papers fine-tune and evaluate on a whitelist of
    subreddits (Stiennon appendix A); a language model has read the others too, and can do what it saw only there."""
    facts = {slot: _pick(rng, values) for slot, values in w.slots.items()}
    story = [_sentence(rng, patterns, facts, w) for patterns in w.body.values()]
    story.insert(rng.randint(1, len(story)), _sentence(rng, w.echoes, facts, w))
    for _ in range(rng.choice([1, 1, 2])):  # other people, anywhere
        story.insert(rng.randint(0, len(story)), _sentence(rng, w.distractors, facts, w))
    if rng.random() < .6:
        story.insert(0, rng.choice(w.preambles))
    middle = len(story) // 2
    body = " ".join(story[:middle]) + "\n" + " ".join(story[middle:])
    if listed:  # authors differ: one degree of care for the whole TL;DR
        care, slips, chatter = rng.choice([.3, .5, .7]), .003, .5
    else:
        care, slips, chatter = .95, .0, .15
    return {"id": id, "subreddit": rng.choice(w.subreddits if listed else w.others),
            "title": _sentence(rng, w.titles, facts, w), "post": body,
            "summary": write_tldr(rng, facts, care, slips, chatter, w), "facts": facts}


def is_filtered(tldr_tokens, lo=24, hi=48):
    """Stiennon's Appendix A: supervised training takes the TL;DRs of 24 to 48 tokens, others are mostly poor."""
    return lo <= tldr_tokens <= hi


def in_task(post, world="reddit"):
    """Whether a post stands in one of the task's subreddits; every real post does."""
    return "facts" not in post or post["subreddit"] in WORLDS[world].subreddits


def make_posts(n, seed, split, listed=1.0, w=REDDIT):
    """n posts, the same ones for the same (seed, split); a share `listed` of them in the task's subreddits."""
    rng = random.Random(f"{seed}-{split}")
    return [make_post(rng, f"{split}-{i}", rng.random() < listed, w) for i in range(n)]


# ---------------------------------------------------------------------------------------------------------------------
# the judge's reading: every sentence pattern of the world as one regular expression over words

def words(text):
    """Lower-case words of a text, punctuation dropped: what the judge sees."""
    return re.findall(r"[a-z0-9']+", text.lower())


def _regex(pattern, group, slots):
    """A pattern such as 'i feel {feeling}' as a regular expression; {slot} captures, {slot2} only matches."""
    parts, out = re.split(r"(\{\w+\})", pattern), []
    for i, part in enumerate(parts):
        slot = part[1:-1]
        if not part.startswith("{"):
            out.append(" ".join(words(part)))
        elif part in parts[:i]:  # named twice in one sentence: the same value again
            out.append(f"(?P={slot}_{group})")
        else:
            values = "|".join(sorted(slots[slot.rstrip("2")], key=len, reverse=True))
            out.append(f"(?:{values})" if slot.endswith("2") else f"(?P<{slot}_{group}>{values})")
    return " ".join(x for x in out if x)


def _judge_patterns(w):
    tails = ["", f" {w.at}", " {time}", f" {w.at} {{time}}", f" {{time}} {w.at}"]
    events = [f"{who} {{verb}} {w.object}{tail}" for who in w.tldr_who for tail in tails]
    wishes = [f"{i} {wish}" for i in (w.me, "and", f"and {w.me}") for wish in w.tldr_wish]
    body = [pattern for patterns in w.body.values() for pattern in patterns] + w.echoes
    told = events + w.tldr_feeling + wishes + w.tldr_question + body + w.titles
    silent = w.distractors + w.fillers + w.preambles
    regexes = [_regex(pattern, i, w.slots) for i, pattern in enumerate(told + silent)]
    regexes.sort(key=lambda r: -len(re.sub(r"\(.*?\)", "x", r)))  # longest first: "my sister anna" before "anna"
    return re.compile("|".join(rf"\b{r}\b" for r in regexes))


_PATTERNS = {name: _judge_patterns(w) for name, w in WORLDS.items()}


@functools.lru_cache(maxsize=256)  # labelers look at one text again and again
def read(text, world="reddit"):
    """Read a summary: (claims, unaccounted). claims is a list of (slot, value) in order of mention, unaccounted the
    number of words that no sentence pattern of the world explains."""
    text = " ".join(words(text))
    claims, explained = [], 0
    for match in _PATTERNS[world].finditer(text):
        explained += len(match.group().split())
        claims += [(key.rsplit("_", 1)[0], value) for key, value in match.groupdict().items() if value]
    return claims, len(text.split()) - explained


LENGTH_LIMIT = 36  # words
CONTRADICTION, REPETITION, OVERLENGTH, SALAD = 3., .5, .3, .3  # cost of each wrong fact, repeat, word beyond, odd word


def tally(post, summary):
    """What the utility is made of: {slot: covered}, and counts of contradictions, repetitions, words beyond the limit
    and words that no sentence accounts for."""
    claims, unaccounted = read(summary, world_of(post))
    facts = post["facts"]
    covered = {slot: any(c == (slot, facts[slot]) for c in claims) for slot in facts}
    wrong = [c for c in claims if c[1] != facts[c[0]]]
    said = [slot for slot, _ in claims]
    return {"covered": covered, "contradictions": len(wrong), "repetitions": len(said) - len(set(said)),
            "beyond": max(0, len(words(summary)) - LENGTH_LIMIT), "unaccounted": unaccounted}


def utility(post, summary, weights=WEIGHTS, contradiction=CONTRADICTION):
    """The gold judge, in units of one key fact:

        u = Σ_slots w·covered - 3·contradictions - ½·repetitions - 0.3·words beyond 36 - 0.3·words no pattern explains
    """
    t = tally(post, summary)
    return (sum(weights[slot] for slot, hit in t["covered"].items() if hit) - contradiction * t["contradictions"]
            - REPETITION * t["repetitions"] - OVERLENGTH * t["beyond"] - SALAD * t["unaccounted"])


def full_summary(post):
    """The complete honest summary of a post in the world's own words: the judge's best."""
    w = WORLDS[world_of(post)]
    return (f"{w.tldr_who[0]} {{verb}} {w.object} {w.at} {{time}}. {w.tldr_feeling[0]} and {w.tldr_wish[0]}. {w.tldr_question[0]}"
            ).format(**post["facts"])


# ---------------------------------------------------------------------------------------------------------------------
# labelers: people who see what the judge sees, make mistakes, and have habits

@dataclass
class Labeler:
    """A population of workers. Each prefers a over b with Bradley-Terry probability

        P(a ≻ b) = σ((u_worker(a) - u_worker(b)) / noise)

    where u_worker is the gold utility with the worker's own weight for each fact, plus the habits set here."""
    noise: float = 1.0  # temperature in key facts
    workers: int = 10  # people in the population
    spread: float = 0.3  # how much their weights differ: standard deviation of the log weight
    length_bias: float = 0.0  # key facts that e times the words are worth
    copy_bias: float = 0.0  # key facts that the whole of a summary being copied from the post is worth
    flipped: bool = False  # choose the worse one (Ziegler's sign bug)
    tie: float = 0.0  # key facts: in a ranking, what rounds to the same multiple of this shares a rank; 0 makes no ties
    seed: int = 0

    def __post_init__(self):
        self.rng = random.Random(f"labeler-{self.seed}")
        self.weights = [{slot: w * math.exp(self.rng.gauss(0, self.spread)) for slot, w in WEIGHTS.items()}
                        for _ in range(self.workers)]

    def worth(self, post, summary, worker):
        """What this worker thinks of a summary before any mistake, in key facts."""
        u = utility(post, summary, self.weights[worker])
        if self.length_bias:
            u += self.length_bias * math.log(1 + len(words(summary)))
        if self.copy_bias:
            u += self.copy_bias * copied_share(summary, post["post"])
        return -u if self.flipped else u

    def compare(self, post, a, b):
        """-> (choice: 0 for a or 1 for b, confidence 1 to 9, worker)"""
        worker = self.rng.randrange(self.workers)
        p = self.rng.random()
        mistake = math.log(max(p, 1e-12) / max(1 - p, 1e-12))  # logistic noise makes the choice Bradley-Terry
        seen = (self.worth(post, a, worker) - self.worth(post, b, worker)) / self.noise + mistake
        return int(seen < 0), min(9, 1 + int(2 * abs(seen))), f"worker-{worker}"

    def _seen(self, post, texts):
        """What one worker takes several summaries to be worth, mistakes included. -> [key facts], worker

        With u = worth / noise, Gumbel mistakes make the order Plackett-Luce, P(y_1 ≻ ... ≻ y_K) = Π_i e^u_i / Σ_{j≥i} e^u_j. So the
        best is drawn from softmax(u), and each pair is Bradley-Terry: a ranking is as noisy as compare()."""
        worker = self.rng.randrange(self.workers)
        return [self.worth(post, text, worker) - self.noise * math.log(-math.log(max(self.rng.random(), 1e-300)))
                for text in texts], f"worker-{worker}"

    def rank(self, post, texts):
        """-> (ranks: for each text how many are better, so 0 is the best and ties share a rank; worker)"""
        seen, worker = self._seen(post, texts)
        if self.tie:
            seen = [round(u / self.tie) for u in seen]
        return [sum(other > u for other in seen) for u in seen], worker

    def best_of(self, post, texts):
        """-> (index of the best text, worker)"""
        seen, worker = self._seen(post, texts)
        return seen.index(max(seen)), worker


def copied_share(summary, source):
    """Share of the summary's word trigrams that stand in the source: the habit that made Ziegler's models copy."""
    s, t = words(summary), words(source)
    grams = [tuple(s[i:i + 3]) for i in range(len(s) - 2)]
    found = set(zip(t, t[1:], t[2:]))
    return sum(g in found for g in grams) / max(1, len(grams))


def axes(post, summary):
    """The papers' Likert axes, 1 to 7: coverage, accuracy, coherence, overall (Stiennon appendix C.2)."""
    t = tally(post, summary)
    coverage = 1 + 6 * sum(WEIGHTS[s] for s, hit in t["covered"].items() if hit) / sum(WEIGHTS.values())
    accuracy = max(1., 7 - 2 * t["contradictions"])
    coherence = max(1., 7 - t["repetitions"] - .5 * t["unaccounted"] - .25 * t["beyond"])
    overall = max(1., min(7., 1 + 6 * utility(post, summary) / sum(WEIGHTS.values())))
    return {"coverage": coverage, "accuracy": accuracy, "coherence": coherence, "overall": overall}
