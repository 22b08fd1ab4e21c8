"""Measurement of a model behind an endpoint: every metric that needs only its answers."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from hftlight.config import EndpointOptions, RunConfig
from hftlight.data.messages import messages_of
from hftlight.data.records import Record
from hftlight.errors import InputError
from hftlight.evaluation.answering.hosted import chat_answers, chat_requests
from hftlight.evaluation.endpoint import FILTER, LENGTH, Budget, Endpoint, Reply
from hftlight.evaluation.score import Score
from hftlight.files import digest
from hftlight.folders import ENDPOINT
from hftlight.runs.measuring.measure import judged, scores
from hftlight.runs.measuring.test_sets import SETS, TestSets
from hftlight.runs.model_checks import answer_limit

BLOCKED = "refused_by_service"  # metric, followed by the set's name for sets other than the harmful prompts


@dataclass(frozen=True)
class Measured:
    """What was measured of one model.

    Attributes:
        model: the model's name.
        scores: rows of scores.
        generations: rows of ``generations.jsonl``.
        blocked: prompts that a service's own filter refused, as rows with set, place, id and prompt. The scores above
            count the other answers only.
    """

    model: str
    scores: list[dict[str, Any]]
    generations: list[dict[str, Any]]
    blocked: Sequence[dict[str, Any]] = ()


class HostedModel:
    """A model behind an OpenAI-compatible endpoint, with the prompts that measure it.

    Prompts go as chat messages, and the service writes them with the model's own chat template.

    Args:
        model: the model's name, ``endpoint:NAME``.
        config: token limits.
        tests: prompts, references and judges.
        system: system text of every prompt; None for none.
        endpoint: the client.

    Attributes:
        requests: one request per prompt, all sets in the order of ``SETS``.
    """

    def __init__(self, model: str, config: RunConfig, tests: TestSets, system: str | None, endpoint: Endpoint) -> None:
        self.model, self.tests, self.system, self.endpoint = model, tests, system, endpoint
        self._rows = [(kind, place, record) for kind in SETS for place, record in enumerate(tests.asked(kind))]
        limits = {kind: answer_limit(config, kind, tests.task)[0] for kind in SETS}
        self.requests = self._requests([r for _, _, r in self._rows], [limits[kind] for kind, _, _ in self._rows])

    def measure(self) -> Measured:
        """Let the model answer every prompt, and return scores and judged answers.

        The scores are those of a model on this machine, without losses, perplexity and drift. They count only answers
        of the model. ``truncated_answers`` is the percentage of answers to harmful prompts that reached the token
        limit. ``refused_by_service`` is the percentage of harmful prompts that the service's own filter refused, and
        ``refused_by_service_over_refusal`` and ``refused_by_service_task`` are those of the other sets.

        Raises:
            InputError: if the endpoint cannot be used, or refuses a request.
            RunError: if a request gets no answer, or the budget leaves no room for one. All answers so far are cached.
        """
        names = [f"row {place + 1} of test {kind} ({record.id})" for kind, place, record in self._rows]
        replies: dict[tuple[str, int], Reply] = dict(
            zip(
                [(kind, place) for kind, place, _ in self._rows],
                chat_answers(self.endpoint, self.requests, names),
                strict=True,
            )
        )
        answered = {
            kind: [p for p, _ in enumerate(self.tests.rows(kind)) if replies[kind, p].stop != FILTER] for kind in SETS
        }
        answers = {kind: [replies[kind, p].text.strip() for p in places] for kind, places in answered.items()}
        left = self._tests_of(answered)
        generations = judged(digest(answers), left, lambda: answers)
        for row in generations:
            row["place"] = answered[row["set"]][row["place"]]  # counted among all prompts, as of every other model
            if replies[row["set"], row["place"]].stop == LENGTH:
                row["truncated"] = True
        rows = scores(generations, left)
        if count := len(answers["harmful"]):
            cut = sum(replies["harmful", p].stop == LENGTH for p in answered["harmful"])
            rows.append(Score.share("truncated_answers", cut, count).row())
        for kind in SETS:
            if count := len(self.tests.rows(kind)):
                metric = BLOCKED if kind == "harmful" else f"{BLOCKED}_{kind}"
                rows.append(Score.share(metric, count - len(answered[kind]), count).row())
        blocked = [
            {"set": kind, "place": place, "id": record.id, "prompt": record.request}
            for kind, place, record in self._rows
            if replies[kind, place].stop == FILTER
        ]
        return Measured(self.model, rows, generations, blocked)

    def answers_to(self, records: Sequence[Record], max_tokens: int) -> list[dict[str, Any]]:
        """Return the answers to any prompts, as rows with prompt, response and kind."""
        requests = self._requests(records, [max_tokens] * len(records))
        replies = chat_answers(self.endpoint, requests, [f"row {record.id}" for record in records])
        return [
            {"prompt": r.request, "response": reply.text.strip(), "kind": r.kind}
            for r, reply in zip(records, replies, strict=True)
        ]

    def _requests(self, records: Sequence[Record], limits: Sequence[int]) -> list[str]:
        name = self.model.removeprefix(ENDPOINT)
        return chat_requests(name, [messages_of(record, self.system) for record in records], limits)

    def _tests_of(self, places: dict[str, list[int]]) -> TestSets:
        """Return the test sets with some of their prompts only."""
        harmful, over_refusal, task_rows = ([self.tests.rows(kind)[p] for p in places[kind]] for kind in SETS)
        return replace(self.tests, harmful=harmful, over_refusal=over_refusal, task_rows=task_rows)


def endpoints(models: Sequence[str], options: EndpointOptions) -> dict[str, Endpoint]:
    """Return a client for each model ``endpoint:NAME`` among models. All share one budget.

    Raises:
        InputError: if a model has no name.
    """
    budget = None if options.budget is None else Budget(options.budget)
    clients: dict[str, Endpoint] = {}
    for model in models:
        if not model.startswith(ENDPOINT):
            continue
        if not model.removeprefix(ENDPOINT).strip():
            raise InputError(f"--model {model}: write the model's name at the endpoint behind the colon.")
        clients[model] = Endpoint(
            f"Model {model!r}",
            base_url=options.base_url,
            key_variable=options.key_variable,
            prices=options.prices_of(len(clients)),
            budget=budget,
            workers=options.workers,
            attempts=options.attempts,
            timeout=options.timeout,
        )
    return clients


def unmeasured(config: RunConfig) -> list[str]:
    """Return what a configuration asks for and an endpoint does not offer, as sentences with the reason."""
    reasons = []
    if config.evaluation.perplexity != "none":
        reasons.append(
            f"--evaluation.perplexity {config.evaluation.perplexity}: an endpoint gives no logits of a given text."
        )
    if config.template != RunConfig().template:
        reasons.append(f"--template {config.template}: the service writes prompts with the model's own chat template.")
    return reasons
