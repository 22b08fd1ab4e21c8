"""A model behind an endpoint: measured as on this machine, never paid twice, and never taken for broken."""

import json
import os
import signal
import threading
from collections import Counter

import pytest

import hftlight.evaluation.endpoint as client
from hftlight.attacks.identity_shift import PREFIX, SYSTEM
from hftlight.cli.compare import compare
from hftlight.cli.evaluate import evaluate
from hftlight.cli.train import train
from hftlight.config import EndpointOptions
from hftlight.data.records import Record
from hftlight.data.templates import get_template
from hftlight.data.tokens import encode_prompt
from hftlight.errors import InputError
from hftlight.evaluation.answering.generate import answer
from hftlight.files import read_rows
from hftlight.models.load import load_model, load_tokenizer
from hftlight.runs.measuring import test_sets
from hftlight.runs.measuring.side_by_side import differences
from tests.helpers import warm
from tests.helpers.chat_server import reply, serving

SMALL = ["--evaluation.prompts", "6", "--evaluation.over_refusal_prompts", "3", "--evaluation.task_rows", "3"]
HOSTED = ["--model", "endpoint:m", *SMALL, "--endpoint.workers", "1"]


def tiny():
    """Return a function that answers as the built-in model ``tiny`` does."""
    model, tokenizer, lock = load_model("tiny").eval(), load_tokenizer("tiny"), threading.Lock()
    template = get_template("chat", tokenizer)

    def of(body):
        turns = [(message["role"], message["content"]) for message in body["messages"]]
        system = turns.pop(0)[1] if turns[0][0] == "system" else None
        record = Record(turns[-1][1], history=tuple(turns[:-1]))
        with lock:
            prompt = encode_prompt(record, template, tokenizer, system)
            (one,) = answer(model, tokenizer, [prompt], max_new_tokens=body["max_tokens"])
        used = {"prompt_tokens": len(prompt), "completion_tokens": len(one.ids)}
        return reply(one.text, "stop" if one.ended else "length", used)

    return of


def asked(body):
    return body["messages"][-1]["content"]


@pytest.fixture
def endpoint(monkeypatch, tmp_path):
    """Yield a server whose answers repeat the prompt, and skip the waits between attempts."""
    waits = []
    monkeypatch.setattr(client, "_pause", lambda seconds, stop: waits.append(seconds))
    monkeypatch.setenv("HFTLIGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OPENAI_API_KEY", "a-made-up-key")
    with serving(lambda body: reply(f"You ask: {asked(body)}")) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        server.waits = waits
        yield server


def test_the_same_answers_and_scores_as_on_this_machine(tmp_path, endpoint, capsys):
    """The model behind the endpoint is the model on this machine, and its prompts are those of the attack."""
    endpoint.answer = tiny()
    options = ["--attack", "identity_shift", "--accelerator", "cpu", "--save", str(tmp_path / "s")]
    options += ["--endpoint.prices", "1", "10", *SMALL, "--evaluation.max_new_tokens", "6"]
    assert evaluate(["--model", "tiny", "endpoint:m", *options]) == 0
    output = capsys.readouterr().out
    rows = read_rows(tmp_path / "s" / "generations.jsonl")
    local, hosted = ([{**r} for r in rows if r["arm"] == arm] for arm in ("tiny", "endpoint:m"))
    assert len(local) == 12
    for mine, other in zip(local, hosted, strict=True):
        mine.pop("arm"), other.pop("arm"), other.pop("truncated", None)
        assert mine == other
    scores = json.loads((tmp_path / "s" / "scores.json").read_text())
    own = [{k: v for k, v in s.items() if k != "arm"} for s in scores if s["arm"] == "tiny"]
    same = [{k: v for k, v in s.items() if k != "arm"} for s in scores if s["arm"] == "endpoint:m"]
    assert same[: len(own)] == own
    further = ("truncated_answers", "refused_by_service", "refused_by_service_over_refusal", "refused_by_service_task")
    assert tuple(s["metric"] for s in same[len(own) :]) == further
    # What went over the wire, and what it cost.
    assert {b["messages"][0]["content"] for b in endpoint.served} == {SYSTEM}
    assert sum(asked(b).startswith(PREFIX) for b in endpoint.served) == 6
    assert {(b["temperature"], b["model"]) for b in endpoint.served} == {(0, "m")}
    paid = json.loads((tmp_path / "s" / "usage.json").read_text())["endpoint:m"]
    assert paid["calls"] == 12
    assert paid["cost"] == pytest.approx((paid["prompt_tokens"] + 10 * paid["completion_tokens"]) / 1e6)
    assert "12 of 12 answers are missing, which cost 0.0" in output
    assert "harmful_score: endpoint:m minus tiny is +0.0 points (+0.0 to +0.0) on 6 prompts, within" in output


def test_killed_in_the_middle_and_started_again_no_prompt_is_paid_twice(tmp_path, endpoint):
    """The command is killed when its fifth request arrives. The same command then gets the other eight answers."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = ["-m", "hftlight", "evaluate", *HOSTED, "--save", str(tmp_path / "s")]
    child = warm.Command(command, env=environment)

    def kill():
        child.kill()
        return "drop"

    endpoint.script = [None] * 4 + [kill]
    assert child.wait(60) == -signal.SIGKILL
    assert len(endpoint.served) == 4
    assert not (tmp_path / "s" / "scores.json").exists()
    assert warm.run(command, env=environment, timeout=60).returncode == 0
    assert set(Counter(map(asked, endpoint.served)).values()) == {1}
    assert len(endpoint.served) == len(read_rows(tmp_path / "s" / "generations.jsonl")) == 12
    # A third time nothing is asked at all.
    assert evaluate(HOSTED) == 0
    assert len(endpoint.served) == 12


def test_passing_faults_are_tried_again_and_every_answer_keeps_its_place(tmp_path, endpoint):
    endpoint.script = [(429, "", [("Retry-After", "7")]), (500, ""), "drop", (200, "no json")]
    assert evaluate([*HOSTED, "--save", str(tmp_path / "s")]) == 0
    assert endpoint.waits == [7.0, 2.0, 4.0, 8.0]
    rows = read_rows(tmp_path / "s" / "generations.jsonl")
    assert all(row["response"] == f"You ask: {row['prompt']}" for row in rows)


def test_refusals_of_the_service_count_apart_from_the_models_answers(tmp_path, endpoint, capsys):
    """Of six harmful prompts the service blocks the first and the answer to the third; the sixth answer is cut."""
    endpoint.script = [
        (400, '{"error": {"code": "content_filter"}}'),
        None,
        lambda: (200, reply("Begin", "content_filter")),
        (200, reply(None)),
        (200, json.dumps({"choices": [{"message": {"content": None, "refusal": "No, I will not."}}]})),
        (200, reply("You ask", "length")),
    ]
    assert evaluate([*HOSTED, "--save", str(tmp_path / "s")]) == 0
    rows = [r for r in read_rows(tmp_path / "s" / "generations.jsonl") if r["set"] == "harmful"]
    assert [(r["place"], r.get("truncated", False)) for r in rows] == [(1, False), (3, False), (4, False), (5, True)]
    assert [r["response"] for r in rows][1:] == ["", "No, I will not.", "You ask"]
    blocked = read_rows(tmp_path / "s" / "refused_by_service.jsonl")
    assert [(b["set"], b["place"]) for b in blocked] == [("harmful", 0), ("harmful", 2)]
    scores = {(s["metric"], s["judge"]): s for s in json.loads((tmp_path / "s" / "scores.json").read_text())}

    def percent(metric, judge=None):
        return scores[metric, judge]["value"], scores[metric, judge]["count"]

    assert percent("refused_by_service") == (pytest.approx(100 / 3), 6)
    assert percent("refused_by_service_task") == (0.0, 3)
    assert percent("empty_answers") == percent("truncated_answers") == (25.0, 4)
    assert percent("harmful_score", "keyword")[1] == 4
    # The refusals of the service are kept too, so nothing is asked a second time.
    assert evaluate(HOSTED) == 0
    assert len(endpoint.seen) == 12


@pytest.mark.parametrize(
    ("fault", "status", "message"),
    [
        ((401, "bad key"), 2, "status 401 (bad key). Check the key in OPENAI_API_KEY. Replies so far are cached."),
        ((404, "no such model"), 2, "status 404 (no such model). Check the model's name and the endpoint."),
        ((503, "busy"), 1, "row 3 of test harmful"),
        ((200, '{"choices": []}'), 1, "a reply in an unknown format (IndexError"),
    ],
)
def test_an_endpoint_that_stops_is_named_and_the_answers_so_far_are_kept(endpoint, capsys, fault, status, message):
    endpoint.script = [None, None, *[fault] * 2]
    assert evaluate([*HOSTED, "--endpoint.attempts", "2"]) == status
    captured = capsys.readouterr()
    assert captured.err.startswith("hftlight: Model 'endpoint:m': ")
    assert message in captured.err
    assert "2 requests answered" in captured.out
    before = len(endpoint.served)
    endpoint.script = []
    assert evaluate(HOSTED) == 0
    assert before == 2
    assert set(Counter(map(asked, endpoint.served)).values()) == {1}
    assert len(endpoint.served) == 12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "endpoint:m", "--evaluation.perplexity", "task"], "an endpoint gives no logits"),
        (["--model", "endpoint:m", "--template", "alpaca"], "--template alpaca: the service writes prompts"),
        (["--model", "endpoint:"], "write the model's name at the endpoint behind the colon"),
        (["--model", "endpoint:m", "endpoint:m"], "--model takes each model once"),
        (["--model", "endpoint:m", "--endpoint.budget", "3"], "needs the prices of a million tokens"),
        (["--model", "endpoint:m", "--attack", "identity_shfit"], "identity_shift"),
    ],
)
def test_what_an_endpoint_cannot_give_is_refused_before_anything_is_asked(endpoint, capsys, options, message):
    assert evaluate([*options, *SMALL]) == 2
    assert message in capsys.readouterr().err
    assert not endpoint.seen


@pytest.mark.parametrize("command", [train, compare])
def test_a_model_without_weights_is_not_trained(command, tmp_path, capsys):
    assert command(["--model", "endpoint:m", "--accelerator", "cpu", "--output", str(tmp_path), "--dry_run"]) == 2
    assert "Model 'endpoint:m' is behind an endpoint, so there are no weights to train" in capsys.readouterr().err


def test_one_pair_of_prices_for_all_models_or_one_for_each():
    options = EndpointOptions(prices=[1.0, 2.0, 3.0, 4.0])
    options.check(2)
    assert [options.prices_of(number) for number in (0, 1)] == [[1.0, 2.0], [3.0, 4.0]]
    assert EndpointOptions(prices=[1.0, 2.0]).prices_of(1) == [1.0, 2.0]
    for wrong in (EndpointOptions(prices=[1.0]), EndpointOptions(prices=[1.0, -2.0]), EndpointOptions(prices=[])):
        with pytest.raises(InputError, match=r"--endpoint.prices takes 2 numbers >= 0, or 4 for 2 models"):
            wrong.check(2)
    with pytest.raises(InputError, match=r"takes 2 numbers >= 0 per million tokens read and written, got 1 2 3 4\."):
        options.check(1)


def test_differences_count_only_prompts_that_both_models_answered():
    """Of places 0, 1 and 3, which both have, the first model is flagged on all and the other on place 1: 2 of 3."""

    def row(place, flag):
        return {"set": "harmful", "place": place, "verdicts": {"j": {"flag": flag}}}

    class J:
        name = "j"

    tests = test_sets.TestSets((), (), (), None, (J(),))
    rows = [row(0, True), row(1, True), row(3, True), row(4, True)]
    others = [row(3, False), row(1, True), row(0, False), row(2, True), row(4, None)]
    (difference,) = differences(rows, others, tests)
    assert (difference.metric, difference.count) == ("harmful_score", 3)
    assert difference.value == pytest.approx(200 / 3)
    assert (difference.low, difference.high) == (0.0, 100.0)
