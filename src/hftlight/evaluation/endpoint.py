"""Endpoint: a client of OpenAI-compatible chat endpoints, with retries, a budget, and a cache of replies on disk."""

import hashlib
import http.client
import json
import math
import os
import socket
import threading
import urllib.error
import urllib.parse
import urllib.request
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from typing_extensions import override

from hftlight.errors import InputError, RunError
from hftlight.files import cache_dir, digest, write_json

DEFAULT_URL = "https://api.openai.com/v1"
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds
PASSING = {408, 409, 425, 429, 500, 502, 503, 504, 529}  # temporary HTTP errors, after which a retry may succeed
FILTERED = ("content_filter", "content_policy")  # codes of an endpoint's own filter in the body of a 400 error
THINKING = 4096  # further tokens for a model that counts its thinking, in ``max_completion_tokens``
LOCAL = {"127.0.0.1", "localhost", "::1"}
FILTER, LENGTH = "content_filter", "length"  # reasons why a reply stopped: the endpoint's filter, the token limit
FRAME = 128  # most tokens that a chat template adds to a message, for the highest cost of a request
STORED = ("reply", "model", "day", "stop", "read", "written")  # values of a cached reply that its checksum covers

_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class Reply:
    """One reply of an endpoint.

    Attributes:
        text: the reply, or the words in which the model declined if the endpoint reports them apart.
        model: the model that served it, as the endpoint names it. Empty if the endpoint's filter let no model reply.
        day: day of the reply in UTC, ISO format.
        stop: the endpoint's reason why the reply stopped, such as ``"stop"``, ``LENGTH`` or ``FILTER``. Empty if it is
            unknown.
        read: tokens read by the model, as counted by the endpoint.
        written: tokens written by the model, as counted by the endpoint.
    """

    text: str
    model: str
    day: str
    stop: str = ""
    read: int = 0
    written: int = 0


@dataclass(slots=True)
class Usage:
    """Calls, tokens and cost of an endpoint object so far.

    Attributes:
        calls: replies received from the endpoint, including unreadable ones.
        retries: requests sent again after an error or a reply that could not be used.
        cached: rows whose reply was already in the cache.
        prompt_tokens: tokens read by the model, as counted by the endpoint.
        completion_tokens: tokens written by the model, as counted by the endpoint.
        cost: cost in the currency of the prices. None without prices.
        earlier_cost: cost of the replies from the cache when they were received, at the same prices.
        lost: requests without a reply that the endpoint may charge for, such as after a timeout. ``cost`` omits them.
        unmetered: replies without a count of tokens. ``cost`` omits them.
    """

    calls: int = 0
    retries: int = 0
    cached: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float | None = None
    earlier_cost: float = 0.0
    lost: int = 0
    unmetered: int = 0


class Budget:
    """A limit on the cost of requests. The highest cost of a request is reserved before the request is sent.

    Several endpoints and threads may share one budget.

    Args:
        limit: highest cost of all requests together, in the currency of the prices, > 0.

    Attributes:
        spent: cost so far.
    """

    def __init__(self, limit: float) -> None:
        self.limit, self.spent = limit, 0.0
        self._reserved: list[float] = []
        self._changed = threading.Condition()

    def reserve(self, cost: float, stop: threading.Event) -> bool:
        """Reserve a cost and return True, or return False if the limit leaves no room for it.

        If requests in flight have reserved the room, wait until they cost less than reserved.
        """
        with self._changed:
            while self.spent + math.fsum(self._reserved) + cost > self.limit:
                if not self._reserved or self.spent + cost > self.limit or stop.is_set():
                    return False
                self._changed.wait()
            self._reserved.append(cost)
            return True

    def settle(self, reserved: float, spent: float) -> None:
        """Replace a reservation by the cost of its request."""
        with self._changed:
            self._reserved.remove(reserved)
            self.spent += spent
            self._changed.notify_all()


class Endpoint:
    """A client of one OpenAI-compatible endpoint.

    A request is the JSON text of a body for ``/chat/completions``. Every usable reply is cached on disk. The cache key
    is a hash of the endpoint's URL and the request, so a killed command resumes where it stopped and pays for no reply
    twice. The cache holds replies, not requests.

    Args:
        who: name of the caller in messages, such as ``"Judge 'hexphi:m'"``.
        base_url: URL of the endpoint without ``/chat/completions``. None takes the environment variable
            ``OPENAI_BASE_URL``, or OpenAI's endpoint if the variable is not set.
        key_variable: environment variable that holds the API key; a local endpoint needs no key.
        prices: cost of a million tokens read and of a million written, in any currency; None counts no cost.
        budget: limit on the cost of this and other endpoints, replies from the cache included. None sets no limit.
        workers: number of parallel calls, >= 1.
        attempts: attempts per request, >= 1. The wait doubles from 1 s up to 60 s. A ``Retry-After`` header replaces
            the wait, up to 60 s.
        timeout: time without data from the endpoint after which an attempt fails, seconds, > 0.
        cache: folder of the cached replies; None takes ``replies`` in hftlight's cache.

    Attributes:
        usage: calls, tokens and cost so far.
        served: pairs of the model that the endpoint named and the day of its reply, including cached replies.

    Raises:
        ValueError: if an argument is outside its range.
    """

    def __init__(
        self,
        who: str,
        *,
        base_url: str | None = None,
        key_variable: str = "OPENAI_API_KEY",
        prices: Sequence[float] | None = None,
        budget: Budget | None = None,
        workers: int = 4,
        attempts: int = 6,
        timeout: float = 60.0,
        cache: Path | None = None,
    ) -> None:
        for name, value in (("workers", workers), ("attempts", attempts)):
            if value < 1:
                raise ValueError(f"{who}: {name} must be >= 1, got {value}.")
        if not timeout > 0:
            raise ValueError(f"{who}: timeout is in seconds and must be > 0, got {timeout}.")
        if prices is not None and not (len(prices) == 2 and min(prices) >= 0):
            raise ValueError(f"{who}: prices must be two numbers >= 0 per million tokens, got {prices}.")
        if budget is not None and prices is None:
            raise ValueError(f"{who}: a budget needs the prices of a million tokens read and of a million written.")
        self.who, self.key_variable, self.budget = who, key_variable, budget
        self.base_url = (base_url or os.environ.get("OPENAI_BASE_URL") or DEFAULT_URL).rstrip("/")
        self.workers, self.attempts, self.timeout = workers, attempts, timeout
        self.cache = cache or cache_dir() / "replies"
        self.usage, self.served = Usage(), set[tuple[str, str]]()
        self.set_prices(prices)
        self._lock = threading.Lock()
        self._dialect = _Dialect()
        self._opener = urllib.request.build_opener(_NoRedirect)

    def set_prices(self, prices: Sequence[float] | None) -> None:
        """Set the prices of a million tokens read and written, and the cost so far to 0. None counts no cost."""
        self.prices, self.usage.cost = prices, None if prices is None else 0.0

    def results(
        self,
        requests: Sequence[str],
        read: Callable[[Reply], _Result | None],
        ask: Callable[[str, int, threading.Event], _Result],
    ) -> list[_Result]:
        """Return one result per request. Equal requests are sent once, and requests with a cached reply are not sent.

        Args:
            requests: the requests, one per row.
            read: returns the result of a cached reply, or None if the request has to be sent again.
            ask: sends a request and returns its result. Its further arguments are the number of the request's first row
                from 0, and an event that is set when another request has failed.

        Raises:
            InputError: if the endpoint cannot be used, or refuses a request.
            RunError: if a request gets no reply, or the budget leaves no room for one. All replies so far are cached.
        """
        first_rows: dict[str, int] = {}
        for row, request in enumerate(requests):
            first_rows.setdefault(request, row)
        results: dict[str, _Result] = {}
        for request in first_rows:
            reply = self.cached(request)
            if reply is not None and (result := read(reply)) is not None:
                results[request] = result
                self._count_cached(reply)
        self.usage.cached += sum(request in results for request in requests)
        missing = [request for request in first_rows if request not in results]
        if missing:
            self.cache.mkdir(parents=True, exist_ok=True)
            self._headers()  # refuses a missing key before the first request
            try:
                results |= self._ask_all(missing, lambda request, stop: ask(request, first_rows[request], stop))
            except _BudgetError as error:
                raise self._over_budget(error.cost, missing, len(first_rows)) from None
        return [results[request] for request in requests]

    def _ask_all(self, requests: Sequence[str], ask: Callable[[str, threading.Event], _Result]) -> dict[str, _Result]:
        """Return the result of each request, by request."""
        results, stop = dict[str, _Result](), threading.Event()

        def work(request: str) -> _Result:
            if stop.is_set():
                raise CancelledError
            try:
                return ask(request, stop)
            except BaseException:
                stop.set()  # before this worker takes the next request
                raise

        with ThreadPoolExecutor(self.workers) as pool:
            pending = {pool.submit(work, request): request for request in requests}
            try:
                for future in as_completed(pending):
                    with suppress(CancelledError):  # another request has failed, and its own error follows
                        results[pending[future]] = future.result()
            except BaseException:
                # Requests in flight may finish, and their replies are cached. Queued requests are cancelled, and
                # ``stop`` ends the waits between attempts.
                stop.set()
                pool.shutdown(cancel_futures=True)
                raise
        return results

    def cached(self, request: str) -> Reply | None:
        """Return the cached reply to a request, or None if there is none or its file was damaged."""
        try:
            entry = json.loads(self._place(request).read_text(encoding="utf-8"))
            values = [entry[name] for name in STORED if name in entry]
            # A file whose checksum does not match was damaged and counts as no reply.
            return Reply(*values) if entry["sha256"] == digest(values) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def missing(self, requests: Sequence[str]) -> list[str]:
        """Return the requests without a cached reply, each once."""
        return [request for request in dict.fromkeys(requests) if self.cached(request) is None]

    def store(self, request: str, reply: Reply) -> None:
        """Cache the reply to a request."""
        values = [reply.text, reply.model, reply.day, reply.stop, reply.read, reply.written]
        entry = {**dict(zip(STORED, values, strict=True)), "sha256": digest(values)}
        write_json(self._place(request), entry, mode=0o600)
        with self._lock:
            self._count_served(reply)

    def highest_cost(self, request: str) -> float:
        """Return the highest cost of a request, 0 without prices.

        A token has at least one byte of UTF-8, and a chat template adds at most ``FRAME`` tokens to a message.
        """
        if self.prices is None:
            return 0.0
        body = json.loads(self._dialect.spoken(request))
        read = sum(len(str(turn["content"]).encode()) + FRAME for turn in body["messages"])
        written = body.get("max_completion_tokens") or body["max_tokens"]
        return float(read * self.prices[0] + written * self.prices[1]) / 1e6

    def complete(self, request: str, row: str, stop: threading.Event) -> Reply:
        """Send a request and return the reply. Temporary errors are retried until ``stop`` is set.

        Args:
            request: the request.
            row: name of the row, for messages.
            stop: ends the waits between attempts.

        Raises:
            RunError: if no attempt gets a reply.
            InputError: if the endpoint refuses the request.
            FilteredError: if the endpoint's own filter blocks the request.
        """
        trouble = ""
        for attempt in range(self.attempts):
            if attempt:
                self.count_retry()
            wait = min(FIRST_WAIT * 2**attempt, LONGEST_WAIT)
            highest = self.highest_cost(request)
            if self.budget is not None and not self.budget.reserve(highest, stop):
                raise _BudgetError(highest)
            spent = highest  # of an attempt without a reply: it may be charged in full
            try:
                answer = self._post(request)
                reply, spent = self._reply(answer, json.loads(request)["model"], highest)
                return reply
            except urllib.error.HTTPError as error:
                trouble, spent = f"status {error.code}", 0.0
                if error.code not in PASSING:
                    said = " ".join(error.read(2000).decode("utf-8", errors="replace").split())
                    if error.code == 400 and self._dialect.learn(said, self.who):
                        error.close()
                        continue
                    self._refuse(error, said, row)
                wait = min(_retry_after(error.headers.get("Retry-After"), wait), LONGEST_WAIT)
                error.close()
            except (OSError, http.client.HTTPException) as error:  # timeouts and dropped connections
                trouble = f"{type(error).__name__}: {error}"
                if isinstance(getattr(error, "reason", error), (ConnectionRefusedError, socket.gaierror)):
                    spent = 0.0
                else:
                    self._count_lost()
            except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
                trouble = f"a reply in an unknown format ({type(error).__name__}: {error})"
                self._count_lost()
            finally:
                if self.budget is not None:
                    self.budget.settle(highest, spent)
            if attempt + 1 < self.attempts and wait:
                _pause(wait, stop)
            if stop.is_set():
                break
        raise RunError(
            f"{self.who}: {row} has no reply after {self.attempts} attempts; last: {self.without_key(trouble)}. Replies"
            " to the other rows are cached. Repeat the call to request only the missing ones."
        )

    def without_key(self, text: object) -> str:
        """Return a text for a message, with the API key replaced. An endpoint may send the key back."""
        shown, key = str(text), self._key()
        for secret in (key, urllib.parse.quote(key), *key.split()):
            shown = shown.replace(secret, f"[{self.key_variable}]") if len(secret) >= 4 else shown
        return shown

    def count_retry(self) -> None:
        """Count a request that is sent again."""
        with self._lock:
            self.usage.retries += 1

    def paid(self) -> dict[str, Any]:
        """Return requests, tokens, cost, prices, and the models that served, as plain values for a file."""
        served = [{"model": model, "day": day} for model, day in sorted(self.served)]
        prices = None if self.prices is None else list(self.prices)
        return {"endpoint": self.base_url, **asdict(self.usage), "prices": prices, "served": served}

    def line(self) -> str:
        """Return a sentence on requests, tokens and cost so far, and on the models that served the replies."""
        used = self.usage
        served = ", ".join(f"{model} on {day}" for model, day in sorted(self.served)) or "nobody"
        cost = "" if used.cost is None else f", at a cost of {used.cost:.4g}"
        cost += f" (those from the cache cost {used.earlier_cost:.4g} before)" if used.earlier_cost else ""
        parts = [
            f"{self.who}: {used.calls} requests answered (retries: {used.retries}), {used.cached} answers from the"
            f" cache, {used.prompt_tokens} tokens read and {used.completion_tokens} written{cost}; served by {served}."
        ]
        if used.lost:
            parts.append(f"{used.lost} requests without a usable reply may be charged too.")
        if used.unmetered and used.cost is not None:
            parts.append(f"{used.unmetered} replies came without a count of tokens, so their cost is unknown.")
        return " ".join(parts)

    def _count_cached(self, reply: Reply) -> None:
        """Count a reply from the cache, and its cost against the budget."""
        self._count_served(reply)
        cost = self._cost(reply)
        self.usage.earlier_cost += cost
        if self.budget is not None:
            self.budget.spent += cost

    def _count_served(self, reply: Reply) -> None:
        if reply.model:
            self.served.add((reply.model, reply.day))

    def _place(self, request: str) -> Path:
        asked = f"{self.base_url}\n{request}"
        return self.cache / f"{hashlib.sha256(asked.encode()).hexdigest()}.json"

    def _headers(self) -> dict[str, str]:
        headers = {"Content-Type": "application/json"}
        parts, key = urllib.parse.urlsplit(self.base_url), self._key()
        local = parts.hostname in LOCAL
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError(f"{self.who}: base_url must begin with https://, got {self.base_url!r}.")
        if key and parts.scheme == "http" and not local:
            raise InputError(
                f"{self.who}: {self.base_url} would carry the API key unencrypted. Use https://, or unset"
                f" {self.key_variable}."
            )
        if not key and not local and parts.scheme == "https":
            raise InputError(f"{self.who}: needs an API key; put it in the environment variable {self.key_variable}.")
        if any(not 32 < ord(char) < 127 for char in key):
            raise InputError(
                f"{self.who}: the API key in {self.key_variable} holds a blank, a line break or another character that"
                " no key has. Set the variable to the key alone."
            )
        return headers | ({"Authorization": f"Bearer {key}"} if key else {})

    def _key(self) -> str:
        """Return the API key without blanks around it, or an empty text."""
        return (os.environ.get(self.key_variable) or "").strip()

    def _post(self, request: str) -> Any:
        spoken = self._dialect.spoken(request)
        sent = urllib.request.Request(f"{self.base_url}/chat/completions", spoken.encode(), self._headers())
        with self._opener.open(sent, timeout=self.timeout) as answer:
            return json.loads(answer.read())

    def _reply(self, answer: Any, asked: str, highest: float) -> tuple[Reply, float]:
        """Return a reply and its cost, and count both in the usage.

        Args:
            answer: the endpoint's answer.
            asked: name of the requested model, for an endpoint that does not name the model.
            highest: cost if the endpoint counts no tokens.
        """
        used = answer.get("usage") or {}
        read, written = int(used.get("prompt_tokens") or 0), int(used.get("completion_tokens") or 0)
        choice = answer["choices"][0]
        message = choice["message"]
        text = message.get("content") or message.get("refusal") or ""
        if not isinstance(text, str):
            raise TypeError(f"the content is a {type(text).__name__} and no text")
        stop = str(choice.get("finish_reason") or "")
        reply = Reply(text, str(answer.get("model") or asked), today(), stop, read, written)
        cost = self._cost(reply)
        with self._lock:
            self.usage.calls += 1
            self.usage.prompt_tokens += read
            self.usage.completion_tokens += written
            self.usage.unmetered += not used
            if self.usage.cost is not None:
                self.usage.cost += cost
        return reply, cost if used else highest

    def _cost(self, reply: Reply) -> float:
        if self.prices is None:
            return 0.0
        return (reply.read * self.prices[0] + reply.written * self.prices[1]) / 1e6

    def _count_lost(self) -> None:
        with self._lock:
            self.usage.lost += 1

    def _over_budget(self, cost: float, asked: Sequence[str], rows: int) -> RunError:
        """Return the error of an exhausted budget.

        Args:
            cost: highest cost of the request that was not sent.
            asked: the requests without a reply at the start.
            rows: number of all requests.
        """
        assert self.budget is not None
        missing = self.missing(asked)
        need = self.budget.spent + math.fsum(map(self.highest_cost, missing))
        return RunError(
            f"{self.who}: stopped before the budget of {self.budget.limit:g} is exceeded. {self.budget.spent:.4g} is"
            f" spent, and the next request may cost {cost:.4g}. {rows - len(missing)} of {rows} answers are cached."
            f" Repeat the command with a higher budget; {need:.4g} is enough for all."
        )

    def _refuse(self, error: urllib.error.HTTPError, said: str, row: str) -> NoReturn:
        """Raise the error for a permanent HTTP status, a separate one for the endpoint's own filter."""
        said = self.without_key(said)[:200]
        error.close()
        if error.code == 400 and any(word in said for word in FILTERED):
            raise FilteredError(said) from error
        hints = {
            401: f"Check the key in {self.key_variable}.",
            403: f"Check the key in {self.key_variable} and what it may use.",
            404: "Check the model's name and the endpoint.",
        }
        hint = hints.get(error.code, f"Check the model's name, the endpoint and the key in {self.key_variable}.")
        raise InputError(
            f"{self.who}: {self.base_url} refuses the request of {row} with status {error.code} ({said}). {hint}"
            " Replies so far are cached."
        ) from error


class FilteredError(Exception):
    """The endpoint's own filter blocks the text."""


class _BudgetError(Exception):
    """The budget leaves no room for a request.

    Args:
        cost: highest cost of the request.
    """

    def __init__(self, cost: float) -> None:
        super().__init__(cost)
        self.cost = cost


class _Dialect:
    """The parameters that an endpoint takes, learned from its refusals."""

    def __init__(self) -> None:
        self.renamed, self.plain, self._lock = False, False, threading.Lock()

    def learn(self, said: str, who: str) -> bool:
        """Return whether a refusal names a parameter that the endpoint takes in another way, and warn once of each."""
        with self._lock:
            if "max_completion_tokens" in said and not self.renamed:
                self.renamed = True
                what = f"max_completion_tokens in place of max_tokens, with {THINKING} more for its thinking"
            elif "temperature" in said and not self.plain:
                self.plain = True
                what = "no temperature of 0, so replies may differ from call to call"
            else:
                # Another thread may have learned it while this request was on its way.
                return ("max_completion_tokens" in said and self.renamed) or ("temperature" in said and self.plain)
        warnings.warn(f"{who}: the endpoint takes {what}.", stacklevel=2)
        return True

    def spoken(self, request: str) -> str:
        """Return a request in the endpoint's parameters."""
        if not (self.renamed or self.plain):
            return request
        body = json.loads(request)
        if self.renamed:
            body["max_completion_tokens"] = body.pop("max_tokens") + THINKING
        if self.plain:
            del body["temperature"]
        return json.dumps(body)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Handler that makes a redirect an error, since the API key is meant for the configured endpoint only."""

    @override
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def request_of(model: str, messages: Sequence[Mapping[str, str]], max_tokens: int) -> str:
    """Return the request for a model's greedy reply to messages, which also is the key of the reply in the cache."""
    return json.dumps({"model": model, "messages": list(messages), "temperature": 0, "max_tokens": max_tokens})


def today() -> str:
    """Return the day in UTC, ISO format."""
    return datetime.now(UTC).date().isoformat()


def _pause(seconds: float, stop: threading.Event) -> None:
    stop.wait(seconds)


def _retry_after(value: str | None, default: float) -> float:
    """Return the wait of a ``Retry-After`` header in seconds, >= 0. Its value is a number of seconds or a date.

    Without a readable value, return the default.
    """
    if not value:
        return default
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        moment = parsedate_to_datetime(value)
    except ValueError:
        return default
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return max(0.0, (moment - datetime.now(UTC)).total_seconds())
