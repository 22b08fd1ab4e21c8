"""Greedy answers of a model behind an OpenAI-compatible endpoint, each kept on disk as soon as it is there."""

import threading
from collections.abc import Sequence

from hftlight.data.messages import Message
from hftlight.evaluation.endpoint import FILTER, Endpoint, FilteredError, Reply, request_of


def chat_requests(model: str, prompts: Sequence[Sequence[Message]], max_tokens: Sequence[int]) -> list[str]:
    """Return the request for the greedy answer to each prompt.

    Args:
        model: the model's name at the endpoint.
        prompts: messages of each prompt.
        max_tokens: longest answer to each prompt, in tokens.
    """
    return [request_of(model, prompt, limit) for prompt, limit in zip(prompts, max_tokens, strict=True)]


def chat_answers(endpoint: Endpoint, requests: Sequence[str], rows: Sequence[str]) -> list[Reply]:
    """Return the answer to each request, in order.

    An answer that stopped at the token limit has the ``stop`` ``LENGTH``. If the service's own filter blocks a prompt
    or its answer, ``stop`` is ``FILTER``. Both are cached like every other answer.

    Args:
        endpoint: the client.
        requests: as ``chat_requests`` returns them.
        rows: name of each request's row, for messages.

    Raises:
        InputError: if the endpoint cannot be used, or refuses a request.
        RunError: if a request gets no answer, or the budget leaves no room for one. All answers so far are cached.
    """

    def ask(request: str, row: int, stop: threading.Event) -> Reply:
        try:
            reply = endpoint.complete(request, rows[row], stop)
        except FilteredError:
            reply = Reply("", "", "", FILTER)
        endpoint.store(request, reply)
        return reply

    return endpoint.results(requests, lambda reply: reply, ask)
