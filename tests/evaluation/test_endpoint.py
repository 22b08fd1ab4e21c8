"""The budget of an endpoint, and its cache: what may be paid, and what is never paid twice."""

import json
import threading

import pytest

import hftlight.evaluation.endpoint as client
from hftlight.errors import RunError
from hftlight.evaluation.answering.hosted import chat_answers, chat_requests
from hftlight.evaluation.endpoint import FRAME, Budget, Endpoint
from hftlight.files import digest
from tests.helpers.chat_server import reply, serving

PRICES = (2.0, 30.0)  # per million tokens
TOKENS = (60, 5)  # read and written in each reply of the server
COST = (60 * 2.0 + 5 * 30.0) / 1e6
HIGHEST = ((4 + FRAME) * 2.0 + 8 * 30.0) / 1e6  # a prompt of four bytes, at most eight tokens written


@pytest.fixture
def endpoint(monkeypatch):
    monkeypatch.setattr(client, "_pause", lambda seconds, stop: None)
    usage = dict(zip(("prompt_tokens", "completion_tokens"), TOKENS, strict=True))
    with serving(lambda body: reply(body["messages"][-1]["content"].upper(), usage=usage)) as server:
        yield server


def requests(count):
    return chat_requests("m", [[{"role": "user", "content": f"p{i:03}"}] for i in range(count)], [8] * count)


def answered(server, folder, count, limit, **options):
    """Return the answers to ``count`` prompts, and the client."""
    budget = None if limit is None else Budget(limit)
    one = Endpoint("M", base_url=server.url, cache=folder, prices=PRICES, budget=budget, **{"workers": 1, **options})
    try:
        return chat_answers(one, requests(count), [f"row {i}" for i in range(count)]), one
    except RunError as error:
        return error, one


def test_a_budget_for_exactly_three_answers_stops_after_three(endpoint, tmp_path):
    """With the first n replies paid, the next request needs room for n * COST + HIGHEST."""
    limit = 2 * COST + HIGHEST
    error, one = answered(endpoint, tmp_path, 10, limit)
    assert len(endpoint.served) == 3
    assert one.usage.cost == pytest.approx(3 * COST)
    assert "stopped before the budget of 0.0010" in str(error)
    assert "3 of 10 answers are cached" in str(error)
    assert f"{3 * COST + 7 * HIGHEST:.4g} is enough for all" in str(error)
    # The same command counts what was paid before, so it asks for nothing. With enough for all it asks for the rest.
    again, _ = answered(endpoint, tmp_path, 10, limit)
    assert isinstance(again, RunError)
    assert len(endpoint.served) == 3
    replies, one = answered(endpoint, tmp_path, 10, 3 * COST + 7 * HIGHEST)
    assert [r.text for r in replies] == [f"P{i:03}" for i in range(10)]
    assert len(endpoint.served) == 10
    assert (one.usage.cost, one.usage.earlier_cost) == (pytest.approx(7 * COST), pytest.approx(3 * COST))


@pytest.mark.parametrize("share", [0.3, 0.61, 0.9])
def test_many_requests_at_once_stay_within_the_budget(endpoint, tmp_path, share):
    """Requests in flight reserve their highest cost, and those that cost less leave room for others."""
    limit = share * 40 * COST
    error, one = answered(endpoint, tmp_path, 40, limit, workers=8)
    assert isinstance(error, RunError)
    paid = len(endpoint.served) * COST
    assert limit - HIGHEST < paid <= limit
    assert one.usage.cost == pytest.approx(paid)
    assert len(list(tmp_path.iterdir())) == len(endpoint.served)


def test_an_attempt_without_an_answer_may_be_charged(endpoint, tmp_path):
    """A dropped connection counts with its highest cost against the budget, a server error with nothing."""
    endpoint.script = ["drop", (500, "")]
    error, one = answered(endpoint, tmp_path, 3, 2 * HIGHEST + COST / 2)
    assert isinstance(error, RunError)
    assert one.usage.lost == 1
    assert one.budget.spent == pytest.approx(HIGHEST + COST)
    assert one.usage.cost == pytest.approx(COST)
    assert "1 requests without a usable reply may be charged too" in one.line()


def test_replies_without_a_count_of_tokens_cost_what_they_may_cost(endpoint, tmp_path):
    endpoint.answer = lambda body: reply("a", usage=None)
    error, one = answered(endpoint, tmp_path, 4, 2.5 * HIGHEST)
    assert isinstance(error, RunError)
    assert len(endpoint.served) == 2
    assert "2 replies came without a count of tokens" in one.line()


def test_a_request_waits_until_another_one_has_cost_less_than_reserved():
    budget, stop, got = Budget(10.0), threading.Event(), []
    assert budget.reserve(8.0, stop)
    waiting = threading.Thread(target=lambda: got.append(budget.reserve(5.0, stop)))
    waiting.start()
    waiting.join(0.1)
    assert waiting.is_alive()
    budget.settle(8.0, 0.0)
    waiting.join(5)
    assert got == [True]
    budget.settle(5.0, 4.0)
    assert not budget.reserve(6.5, stop)
    assert budget.reserve(6.0, stop)


def test_replies_that_an_earlier_version_cached_are_not_paid_again(endpoint, tmp_path):
    one = Endpoint("M", base_url=endpoint.url, cache=tmp_path)
    (request,) = requests(1)
    values = ["text", "m-1", "2026-01-01"]
    entry = {**dict(zip(("reply", "model", "day"), values, strict=True)), "sha256": digest(values)}
    one._place(request).write_text(json.dumps(entry))
    assert one.cached(request) == client.Reply("text", "m-1", "2026-01-01")


def test_a_budget_needs_prices(tmp_path):
    with pytest.raises(ValueError, match="a budget needs the prices"):
        Endpoint("M", budget=Budget(1.0), cache=tmp_path)
