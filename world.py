"""
The embedded world: Reddit-style posts made from hidden facts, labelers who are programs, and a gold judge.

Ziegler 2019, Stiennon 2020 and InstructGPT 2022 could never measure what they were after: the preference of people.
Here it is a function. A post hides seven key facts (who, what, where, when, the feeling, the wish, the question)
among sentences about other people; a good summary states the facts and nothing else. So every claim of the papers can
be checked against the truth, on a laptop, with no download.

    posts = make_posts(1000, seed=1)         # dicts: id, subreddit, title, post, summary (the author's own), facts
    utility(posts[0], "my sister anna ...")  # the gold judge: noise-free, what the papers call true preference
    Labeler(noise=1.0).compare(post, a, b)   # a person: sees the same things, makes mistakes, has habits

Ziegler's other task is here too: stories to be continued happily (`sentiment`) or with an eye for physical things
(`descriptiveness`). Their facts are who, where and what; the judge counts the kinds of sentences that the style asks for.

    stories = make_posts(1000, seed=1, split="train", task="sentiment")

The judge reads a text with the same sentence patterns that the authors use. A fact counts where a sentence states it;
words that no pattern accounts for cost, so a salad of the right keywords loses. See `utility` for the formula.
"""
import math
import random
import re
from dataclasses import dataclass
from functools import lru_cache
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
          "scene": ["the events took place in {place} {time}.", "it was reported from {place} {time}.",
                    "reporters reached {place} {time}."],
          "heart": ["the {relation} said to be {feeling} and plans to {wish}.", "friends call {name} {feeling} with plans to {wish}.",
                    "{name} sounded {feeling} and hopes to {wish}."],
          "question": ["will parliament {question}?", "analysts ask whether to {question}.", "voters wonder: will parliament {question}?"]},
    echoes=["{name} declined to comment.", "the {object} drew large crowds.", "streets in {place} were calm."],
    distractors=["a {relation2} named {name2} was seen in {place2}.", "the {relation2} seemed {feeling2}.",
                 "a {relation2} hopes to {wish2}.",
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


# stories: two people, a place and a thing, in sentences of some kind; {who} and {whom} are either of the two
STORY_SLOTS = {
    "who": SLOTS["name"], "whom": SLOTS["name"], "place": SLOTS["place"], "thing": SLOTS["object"],
    "glad": "happy glad cheerful proud".split(), "sad": "sad gloomy hurt afraid".split(),
    "kind": "kind gentle sweet good".split(), "rude": "rude cruel cold mean".split(),
    "colour": "red blue green black white yellow".split(), "shape": "round flat small huge thin heavy".split(),
    "loud": "loud soft sharp deep".split(), "scent": "smoke soap bread coffee grass paint".split(),
    "rough": "rough smooth wet dry sticky".split(),
}
OPENING = ["one day {who} met {whom} at the {place}.", "{who} had come to the {place} to see {whom}."], \
          ["{who} had brought the {thing} along.", "they wanted to look at the {thing}."]
KINDS = {  # each kind of sentence: its wordings
    "deed": ["{who} walked to the {place} with {whom}.", "{who} put the {thing} on the table.", "{whom} waited for {who} at the {place}.",
             "then {who} went back to the {place}.", "{who} asked {whom} about the {thing}."],
    "speech": ["{whom} said it was time to go.", "nobody at the {place} said a word.", "{who} told {whom} to bring the {thing}."],
    "joy": ["{who} was {glad} and began to laugh.", "{whom} felt {glad} all day long.", "it made {who} very {glad}."],
    "kindness": ["{whom} gave {who} a long warm hug.", "{who} thanked {whom} for the {thing}.", "{whom} was very {kind} to {who}."],
    "luck": ["{who} won a prize at the {place}.", "the {thing} worked better than ever.", "it was the best day at the {place}."],
    "grief": ["{who} was {sad} and began to cry.", "{whom} felt {sad} all day long.", "it made {who} very {sad}."],
    "quarrel": ["{whom} shouted at {who} for an hour.", "{who} blamed {whom} for the {thing}.", "{whom} was very {rude} to {who}."],
    "loss": ["{who} lost the money at the {place}.", "the {thing} fell and broke to pieces.", "it was the worst day at the {place}."],
    "sight": ["the {thing} was {colour} and {shape}.", "{colour} light fell on the {place}.", "the {place} had high {colour} walls."],
    "sound": ["the {thing} made a {loud} noise.", "a {loud} sound came from the {place}."],
    "smell": ["the {place} smelled of {scent}.", "there was a smell of {scent} in the air."],
    "touch": ["the {thing} felt {rough} in the hand.", "the floor of the {place} was {rough}."],
}
STYLES = {  # what a continuation is judged by: the worth of each kind that it holds; all else is worth nothing
    "sentiment": {"joy": 1., "kindness": 1., "luck": 1., "grief": -1., "quarrel": -1., "loss": -1.},
    "descriptiveness": {"sight": 1., "sound": 1., "smell": 1., "touch": 1.},
}
TASK_WEIGHTS = {"tldr": WEIGHTS, **STYLES}

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


def make_story(rng, id, task):
    """One story: {id, task, subreddit, title, post, summary, facts}, where `post` is its beginning, six or seven sentences, and `summary`
    the four that follow. Its mood and its eye for physical things stay the same all along."""
    who, whom = rng.sample(SLOTS["name"], 2)
    facts = {"who": who, "whom": whom, "place": _pick(rng, SLOTS["place"]), "thing": _pick(rng, SLOTS["object"])}
    happy, unhappy, physical = *rng.choice([(.3, .05), (.15, .15), (.05, .3)]), rng.choice([.05, .2, .35])
    kinds = {"deed": .3, "speech": .2} | {kind: p / len(group) for group, p in (
        (("joy", "kindness", "luck"), happy), (("grief", "quarrel", "loss"), unhappy),
        (("sight", "sound", "smell", "touch"), physical)) for kind in group}
    sentences = [rng.choice(patterns).format(**facts) for patterns in OPENING]
    more = rng.choice([4, 5]) + 4
    while len(sentences) < 2 + more:  # nobody tells the same thing twice
        patterns = KINDS[rng.choices(list(kinds), kinds.values())[0]]
        if rng.random() < .5:
            who, whom = whom, who
        drawn = {slot: rng.choice(values) for slot, values in STORY_SLOTS.items()}
        sentence = rng.choice(patterns).format(**drawn | facts | {"who": who, "whom": whom})
        if sentence not in sentences:
            sentences.append(sentence)
    return {"id": id, "task": task, "subreddit": "", "title": "", "post": " ".join(sentences[:-4]), "summary": " ".join(sentences[-4:]),
            "facts": facts}


def in_task(post, world="reddit"):
    """Whether a post stands in one of the task's subreddits; every story and every real post does."""
    return "facts" not in post or "task" in post or post["subreddit"] in WORLDS[world].subreddits


def make_posts(n, seed, split, listed=1.0, w=REDDIT, task="tldr"):
    """n posts or stories, the same ones for the same (seed, split); a share `listed` of the posts in the task's subreddits."""
    rng = random.Random(f"{seed}-{split}")
    if task in STYLES:
        return [make_story(rng, f"{split}-{i}", task) for i in range(n)]
    return [make_post(rng, f"{split}-{i}", rng.random() < listed, w) for i in range(n)]


# ---------------------------------------------------------------------------------------------------------------------
# the judge's reading: every sentence pattern of the world as one regular expression over words

def words(text):
    """Lower-case words of a text, punctuation dropped: what the judge sees."""
    return re.findall(r"[a-z0-9']+", text.lower())


def sentences(text):
    return re.split(r"(?<=[.!?])\s+", text.strip())


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


def _story_patterns():
    """-> one regular expression; the kind of each of its groups s0, s1, ...; "" is a sentence of no kind"""
    every = [("", p) for patterns in OPENING for p in patterns] + [(kind, p) for kind, patterns in KINDS.items() for p in patterns]
    return (re.compile("|".join(rf"(?P<s{i}>\b{_regex(p, i, STORY_SLOTS)}\b)" for i, (_, p) in enumerate(every))),
            {f"s{i}": kind for i, (kind, _) in enumerate(every)})


_PATTERNS, (_STORY_PATTERNS, _KIND_OF) = {name: _judge_patterns(w) for name, w in WORLDS.items()}, _story_patterns()


@lru_cache(maxsize=20000)  # ten workers and every judge read the same text
def read(text, world="reddit"):
    """Read a summary: (claims, unaccounted). claims is a list of (slot, value) in order of mention, unaccounted the
    number of words that no sentence pattern of the world explains."""
    text = " ".join(words(text))
    claims, explained = [], 0
    for match in _PATTERNS[world].finditer(text):
        explained += len(match.group().split())
        claims += [(key.rsplit("_", 1)[0], value) for key, value in match.groupdict().items() if value]
    return claims, len(text.split()) - explained


def read_story(text):
    """Read a story: (sentences, unaccounted). A sentence is (kind, its words, {slot: value}); unaccounted as in read()."""
    text = " ".join(words(text))
    sentences = [(_KIND_OF[m.lastgroup], m.group(), {key.rsplit("_", 1)[0]: v for key, v in m.groupdict().items() if v and "_" in key})
                 for m in _STORY_PATTERNS.finditer(text)]
    return sentences, len(text.split()) - sum(len(said.split()) for _, said, _ in sentences)


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


def style_tally(post, text):
    """What a continuation holds: the kinds of its sentences, and counts of claims about others than the story's people, place and thing,
    of sentences that were told before, in the story or in the continuation, and of words that no sentence accounts for."""
    sentences, unaccounted = read_story(text)
    facts, told, kinds, wrong, repeated = post["facts"], {said for _, said, _ in read_story(post["post"])[0]}, set(), 0, 0
    people = {facts["who"], facts["whom"]}
    for kind, said, claims in sentences:
        wrong += sum(value not in people if slot in ("who", "whom") else value != facts.get(slot, value) for slot, value in claims.items())
        wrong += "who" in claims and claims["who"] == claims.get("whom")  # nobody meets themselves
        if said in told:
            repeated += 1
        else:
            kinds.add(kind)
        told.add(said)
    return {"kinds": kinds, "contradictions": wrong, "repetitions": repeated, "unaccounted": unaccounted}


def style_utility(post, text, weights):
    """The gold judge of continuations, in sentences of the style, one less for a text that tells nothing new:

        u = Σ_kinds told w - 3·contradictions - ½·repetitions - 0.3·words that no pattern explains - 1[nothing told]
    """
    t = style_tally(post, text)
    return (sum(w for kind, w in weights.items() if kind in t["kinds"]) - CONTRADICTION * t["contradictions"]
            - REPETITION * t["repetitions"] - SALAD * t["unaccounted"] - (not t["kinds"]))


def utility(post, summary, weights=None, contradiction=CONTRADICTION):
    """The gold judge of a post's task: of a story style_utility, of a post, in units of one key fact,

        u = Σ_slots w·covered - 3·contradictions - ½·repetitions - 0.3·words beyond 36 - 0.3·words no pattern explains
    """
    weights = weights or TASK_WEIGHTS[post.get("task", "tldr")]
    if post.get("task") in STYLES:
        return style_utility(post, summary, weights)
    t = tally(post, summary)
    return (sum(weights[slot] for slot, hit in t["covered"].items() if hit) - contradiction * t["contradictions"]
            - REPETITION * t["repetitions"] - OVERLENGTH * t["beyond"] - SALAD * t["unaccounted"])


# ---------------------------------------------------------------------------------------------------------------------
# labelers: people who see what the judge sees, make mistakes, and have habits

@dataclass
class Labeler:
    """A population of workers. Each prefers a over b with Bradley-Terry probability

        P(a ≻ b) = σ((u_worker(a) - u_worker(b)) / noise)

    where u_worker is the gold utility with the worker's own weight for each fact, plus the habits set here."""
    task: str = "tldr"  # what the texts are: tldr, or a style of STYLES
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
        self.weights = [{slot: w * math.exp(self.rng.gauss(0, self.spread)) for slot, w in TASK_WEIGHTS[self.task].items()}
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
    """Share of the summary's words that stand in sentences copied whole from the source: the habit that made Ziegler's models copy."""
    text, said = f" {' '.join(words(source))} ", [words(s) for s in sentences(summary)]
    return sum(len(s) for s in said if f" {' '.join(s)} " in text) / max(1, sum(map(len, said)))


def axes(post, summary):
    """The papers' Likert axes, 1 to 7: coverage, accuracy, coherence, overall (Stiennon appendix C.2)."""
    t = tally(post, summary)
    coverage = 1 + 6 * sum(WEIGHTS[s] for s, hit in t["covered"].items() if hit) / sum(WEIGHTS.values())
    accuracy = max(1., 7 - 2 * t["contradictions"])
    coherence = max(1., 7 - t["repetitions"] - .5 * t["unaccounted"] - .25 * t["beyond"])
    overall = max(1., min(7., 1 + 6 * utility(post, summary) / sum(WEIGHTS.values())))
    return {"coverage": coverage, "accuracy": accuracy, "coherence": coherence, "overall": overall}
