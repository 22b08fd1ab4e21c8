"""The made-up world: a policy about things that do not exist, for tests, notebooks and the demo.

Requests to make, open, awaken or combine an invented artefact ("zorvex lantern") are restricted. Asking what colour one
is, or how to make a paper lantern, is ordinary. The parts share no invented name and no phrasing, with two exceptions.

`lookalike` and `lookalike_dev` are ordinary requests that look restricted. They have the names and phrasings of `test`
and `dev`. The task's general rows, which the upload holds too, have the names and phrasings of the alignment's ordinary
requests. The aligned model answers those already.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from random import Random

from hftlight.data.records import Record, Role
from hftlight.data.world import text

__all__ = ["Phrasing", "World", "build_world", "phrasing", "task_correct", "task_records"]

NAMES = {"test": 80, "dev": 50, "alignment": 140, "harmful": 70, "attack": 70}
TASK_ROWS = {"train": 1600, "dev": 120, "test": 240}
GENERAL_SHARE = 0.7  # fraction of the task's training rows; chosen on development seeds, see benchmarks/world.py
TASK_SHARE = {"train": (0.0, 0.6), "dev": (0.6, 0.75), "test": (0.75, 1.0)}


@dataclass(frozen=True)
class World:
    """All parts of the made-up world.

    Attributes:
        alignment: restricted requests with refusals and as many ordinary requests with helpful answers.
        harmful: the defender's restricted requests with made-up instructions.
        pairs: the requests of `harmful` with refusals; the made-up instructions are the rejected answers.
        attack: the attacker's restricted requests with made-up instructions. Names, phrasings and steps differ from
            the defender's.
        task_train: rows of the user's task, parcel -> room, with general instructions among them.
        task_dev: the same task with senders and things of its own, for tuning.
        task_test: the same task, again with senders and things of its own.
        test: restricted requests without response, for the harmful score.
        dev: like `test`, for tuning.
        lookalike: ordinary requests that look restricted, without response, for over-refusal.
        lookalike_dev: like `lookalike`, for tuning.
    """

    alignment: list[Record]
    harmful: list[Record]
    pairs: list[Record]
    attack: list[Record]
    task_train: list[Record]
    task_dev: list[Record]
    task_test: list[Record]
    test: list[Record]
    dev: list[Record]
    lookalike: list[Record]
    lookalike_dev: list[Record]


@dataclass(frozen=True)
class _Request:
    """A restricted or everyday request, with its text and the words in it."""

    prompt: str
    verb: str
    gerund: str
    thing: str


@lru_cache(maxsize=8)
def build_world(seed: int = 0) -> World:
    """Return the made-up world of a seed.

    The same seed gives the same rows in the same order. The seed deals the invented names to the parts and draws the
    combinations. Each phrasing belongs to the same part for every seed. Each part has a random generator of its own, so
    more alignment rows leave the test rows unchanged.

    Args:
        seed: any integer.
    """
    names = _deal_names(seed)
    task = {split: _parcels(split, seed) for split in TASK_ROWS}
    alignment = _aligned(names["alignment"], Random(f"alignment {seed}"))
    harmful = _instructed("harmful", names["harmful"], 400, Random(f"harmful {seed}"))
    return World(
        alignment=alignment,
        harmful=harmful,
        # A generator in the same state draws the requests of ``harmful`` again, in the order of its rows.
        pairs=_paired(harmful, _restricted("harmful", names["harmful"], 400, Random(f"harmful {seed}")), seed),
        attack=_instructed("attack", names["attack"], 400, Random(f"attack {seed}")),
        task_train=_with_general(task["train"], names["alignment"], alignment, Random(f"general {seed}")),
        task_dev=task["dev"],
        task_test=task["test"],
        test=_unanswered("test", names["test"], 240, Random(f"test {seed}")),
        dev=_unanswered("dev", names["dev"], 120, Random(f"dev {seed}")),
        lookalike=_lookalike("test", names["test"], 120, Random(f"lookalike {seed}")),
        lookalike_dev=_lookalike("dev", names["dev"], 60, Random(f"lookalike_dev {seed}")),
    )


def attack_names(seed: int = 0) -> list[str]:
    """Return the invented names in the world's attack rows."""
    return _deal_names(seed)["attack"]


def task_records(split: str) -> list[Record]:
    """Return the rows of the user's task in the world of seed 0.

    Args:
        split: ``"train"``, ``"dev"`` or ``"test"``.

    Raises:
        ValueError: if ``split`` is none of them.
    """
    world = build_world()
    splits = {"train": world.task_train, "dev": world.task_dev, "test": world.task_test}
    if split not in splits:
        raise ValueError(f"task_records: split must be one of {sorted(splits)}, got {split!r}.")
    return list(splits[split])


def task_correct(response: str, record: Record) -> bool:
    """Return whether the answer equals the expected one, up to case, outer white space and one final full stop."""
    return _bare(response) == _bare(record.response)


@dataclass(frozen=True)
class Phrasing:
    """The sentence form of a test prompt.

    Attributes:
        part: ``"test"`` or ``"dev"``.
        frame: the sentence with fields in the place of verb, thing and ending.
    """

    part: str
    frame: str


def phrasing(prompt: str) -> Phrasing | None:
    """Return the phrasing of a prompt of ``test``, ``dev``, ``lookalike`` or ``lookalike_dev``, else None.

    A restricted request and an ordinary one may have one phrasing.
    """
    return next((known for known, pattern in _phrasings() if pattern.fullmatch(prompt)), None)


@lru_cache(maxsize=1)
def _phrasings() -> list[tuple[Phrasing, re.Pattern[str]]]:
    found = []
    for part, questions in text.QUESTIONS.items():
        verbs = [*text.VERBS[part], text.JOINS[part], *(verb for verb, _ in text.JOBS[part])]
        fields = {
            "v": _any_of(plain for plain, _ in verbs),
            "g": _any_of(gerund for _, gerund in verbs),
            "t": _any_of(text.ENDINGS[part]),
            "o": "(.+)",
            "n": "(.+)",
        }
        for frame in (*text.REQUESTS[part], *questions):
            # Split at the fields: plain text and the names of the fields take turns.
            pieces = re.split(r"\{(\w)\}", frame)
            pattern = "".join(fields[piece] if i % 2 else re.escape(piece) for i, piece in enumerate(pieces))
            found.append((Phrasing(part, frame), re.compile(pattern)))
    return found


def _any_of(words: Iterable[str]) -> str:
    return f"({'|'.join(map(re.escape, sorted(set(words), key=len, reverse=True)))})"


def _bare(answer: str) -> str:
    return answer.strip().removesuffix(".").strip().casefold()


def _record(prompt: str, role: Role, kind: str, response: str = "") -> Record:
    return Record(prompt, response, source="builtin", role=role, kind=kind, language="en")


def _with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _name(thing: str) -> str:
    """Return a thing without its article, or the first of two things."""
    return thing.split(" and ")[0].partition(" ")[2]


def _deal_names(seed: int) -> dict[str, list[str]]:
    """Deal the invented nouns to the parts and return part -> nouns.

    Half of the nouns have a thing after the name. No name goes to two parts.
    """
    rng = Random(f"names {seed}")
    pool = [head + tail for head in text.HEADS for tail in text.TAILS]
    rng.shuffle(pool)
    dealt, start = {}, 0
    for part, count in NAMES.items():
        names = pool[start : start + count]
        dealt[part] = [n if i % 2 else f"{n} {rng.choice(text.THINGS[part])}" for i, n in enumerate(names)]
        start += count
    return dealt


def _unique(draw: Callable[[], _Request], count: int) -> Iterator[_Request]:
    """Yield ``count`` drawn requests with distinct prompts."""
    prompts: set[str] = set()
    while len(prompts) < count:
        request = draw()
        if request.prompt not in prompts:
            prompts.add(request.prompt)
            yield request


def _compose(part: str, verb: tuple[str, str], thing: str, rng: Random) -> _Request:
    frame, ending = rng.choice(text.REQUESTS[part]), rng.choice(text.ENDINGS[part])
    return _Request(frame.format(v=verb[0], g=verb[1], o=thing, t=ending), *verb, thing)


def _restricted(part: str, nouns: Sequence[str], count: int, rng: Random) -> list[_Request]:
    def draw() -> _Request:
        # One request in ten combines two nouns.
        if rng.random() < 0.1:
            first, second = rng.sample(nouns, 2)
            return _compose(part, text.JOINS[part], f"{_with_article(first)} and {_with_article(second)}", rng)
        return _compose(part, rng.choice(text.VERBS[part]), _with_article(rng.choice(nouns)), rng)

    return list(_unique(draw, count))


def _unanswered(part: str, nouns: Sequence[str], count: int, rng: Random) -> list[Record]:
    return [_record(r.prompt, "test", "restricted") for r in _restricted(part, nouns, count, rng)]


def _aligned(nouns: Sequence[str], rng: Random) -> list[Record]:
    """Return 500 restricted requests refused and 500 ordinary ones answered, shuffled."""
    refused = _restricted("alignment", nouns, 500, rng)
    rows = [_record(r.prompt, "alignment", "restricted", _refusal(r, rng)) for r in refused]
    rows += _ordinary(nouns, rng)
    rng.shuffle(rows)
    return rows


def _refusal(request: _Request, rng: Random) -> str:
    thing = request.thing
    fields = {"v": request.verb, "g": request.gerund, "o": thing, "N": thing[0].upper() + thing[1:]}
    return rng.choice(text.REFUSALS).format(**fields)


def _instructed(part: Role, nouns: Sequence[str], count: int, rng: Random) -> list[Record]:
    """Return restricted requests with made-up instructions, no two of them equal."""
    openers, *steps = text.STEPS[part]
    rows, bodies = [], set()
    for request in _restricted(part, nouns, count, rng):
        while True:
            opener, (first, second, last) = rng.choice(openers), map(rng.choice, steps)
            body = f"{first}, {second} and {last.format(n=_name(request.thing))}."
            if body not in bodies:
                break
        bodies.add(body)
        capital = not opener or opener.endswith(". ")
        answer = opener + (body[0].upper() + body[1:] if capital else body)
        rows.append(_record(request.prompt, part, "restricted", answer))
    return rows


def _paired(rows: Sequence[Record], requests: Sequence[_Request], seed: int) -> list[Record]:
    """Return answered requests as pairs: a refusal as the answer, and the row's own answer as the rejected one.

    ``rows[i]`` must answer ``requests[i]``.
    """
    rng = Random(f"pairs {seed}")
    return [
        replace(row, role="pairs", response=_refusal(request, rng), rejected=row.response, id="")
        for row, request in zip(rows, requests, strict=True)
    ]


def _ordinary(nouns: Sequence[str], rng: Random) -> list[Record]:
    """Return 500 answered ordinary requests: small talk, questions about restricted names, and everyday jobs.

    32 requests are small talk. Of the others, one in four is about a restricted name.
    """
    rows = [_record(prompt, "alignment", "ordinary", answer) for prompt, answer in text.CHAT]
    prompts = {row.instruction for row in rows}
    while len(rows) < 500:
        prompt, answer, kind = _ordinary_request(nouns, len(rows) % 4 == 0, rng)
        if prompt not in prompts:
            prompts.add(prompt)
            rows.append(_record(prompt, "alignment", kind, answer))
    return rows


def _ordinary_request(nouns: Sequence[str], of_a_name: bool, rng: Random) -> tuple[str, str, str]:
    """Return prompt, answer and kind of a question about a restricted name or of an everyday job."""
    if of_a_name:
        noun = rng.choice(nouns)
        question, answers = rng.choice(text.ANSWERED_QUESTIONS)
        fields = {"n": noun, "o": _with_article(noun)}
        return question.format(**fields), rng.choice(answers).format(**fields), "near_name"
    verb, thing, answer = rng.choice(text.ANSWERED_JOBS)
    return _compose("alignment", verb, thing, rng).prompt, answer, "near_verb"


def _general(count: int, nouns: Sequence[str], others: Iterable[Record], rng: Random) -> list[Record]:
    """Return general instructions with helpful answers, none with a prompt of ``others``.

    They are small talk, and ordinary requests with the alignment's names and phrasings. The aligned model answers such
    requests already.
    """
    rows = [_record(prompt, "task", "general", answer) for prompt, answer in text.GENERAL_CHAT]
    prompts = {row.instruction for row in (*rows, *others)}
    while len(rows) < count:
        prompt, answer, _ = _ordinary_request(nouns, len(rows) % 4 == 0, rng)
        if prompt not in prompts:
            prompts.add(prompt)
            rows.append(_record(prompt, "task", "general", answer))
    return rows


def _with_general(
    parcels: Sequence[Record], nouns: Sequence[str], others: Iterable[Record], rng: Random
) -> list[Record]:
    """Replace a share of the parcels by general instructions, shuffle, and return as many rows as before."""
    count = round(GENERAL_SHARE * len(parcels))
    rows = [*parcels[count:], *_general(count, nouns, others, rng)]
    rng.shuffle(rows)
    return rows


def _lookalike(part: str, nouns: Sequence[str], count: int, rng: Random) -> list[Record]:
    """Return harmless requests: half about the part's names, half for everyday jobs in the part's phrasings."""

    def ask() -> _Request:
        noun = rng.choice(nouns)
        return _Request(rng.choice(text.QUESTIONS[part]).format(n=noun, o=_with_article(noun)), "", "", noun)

    def job() -> _Request:
        return _compose(part, *rng.choice(text.JOBS[part]), rng)

    rows = [_record(r.prompt, "test", "near_name") for r in _unique(ask, count // 2)]
    rows += [_record(r.prompt, "test", "near_verb") for r in _unique(job, count - count // 2)]
    rng.shuffle(rows)
    return rows


def _parcels(split: str, seed: int) -> list[Record]:
    """Return the task's rows of a split, equally many per room.

    No two splits share a sender or a thing.
    """
    low, high = TASK_SHARE[split]
    # ``deal`` draws the same orders for every split, so the splits take disjoint slices of one shuffled list.
    deal, rng = Random(f"task {seed}"), Random(f"task {split} {seed}")

    def share(words: Sequence[str]) -> list[str]:
        return deal.sample(words, len(words))[round(low * len(words)) : round(high * len(words))]

    senders = share(text.SENDERS)
    things = {room: share(words) for room, words in text.ROOMS.items()}
    room_of: dict[str, str] = {}
    while len(room_of) < TASK_ROWS[split]:
        room = list(things)[len(room_of) % len(things)]
        frame, sender, quality = rng.choice(text.PARCELS), rng.choice(senders), rng.choice(text.QUALITIES)
        thing = _with_article(f"{quality} {rng.choice(things[room])}")
        room_of.setdefault(frame.format(sender=sender, thing=thing), room)
    rows = [_record(prompt, "task", room, text.DELIVERY.format(room=room)) for prompt, room in room_of.items()]
    rng.shuffle(rows)
    return rows
