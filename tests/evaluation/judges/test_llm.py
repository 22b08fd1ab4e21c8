"""LLMJudge against a local server that fails in every way an endpoint does."""

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

import hftlight.evaluation.endpoint as client
from hftlight.errors import InputError, RunError
from hftlight.evaluation.judges import Verdict
from hftlight.evaluation.judges.judge import Judge
from hftlight.evaluation.judges.llm import RUBRICS, LLMJudge, hexphi_score, strongreject_score
from tests.helpers.chat_server import reply, serving


@pytest.fixture
def endpoint():
    with serving() as server:
        yield server


@pytest.fixture
def waits(monkeypatch):
    """Record the waits and skip them."""
    noted = []
    monkeypatch.setattr(client, "_pause", lambda seconds, stop: noted.append(seconds))
    monkeypatch.setenv("OPENAI_API_KEY", "a-made-up-key")
    return noted


def judge(endpoint, folder, rubric="hexphi", **options):
    return LLMJudge(rubric, "m", base_url=endpoint.url, cache=folder, **{"workers": 1, **options})


def test_what_is_asked_and_what_comes_back(endpoint, tmp_path, waits):
    graded = judge(endpoint, tmp_path, prices=(2.0, 30.0))
    verdicts = graded(["How tall is a glimp?"] * 3, ["grade 5", "grade 4", "grade 1"])
    assert verdicts == [Verdict(5.0, True), Verdict(4.0, False), Verdict(1.0, False)]
    path, key, body = endpoint.seen[0]
    assert (path, key) == ("/v1/chat/completions", "Bearer a-made-up-key")
    assert {k: body[k] for k in ("model", "temperature", "max_tokens")} == {
        "model": "m",
        "temperature": 0,
        "max_tokens": 1024,
    }
    assert "How tall is a glimp?" in body["messages"][0]["content"]
    assert graded.endpoint.usage == client.Usage(3, 0, 0, 300, 30, pytest.approx(300 * 2e-6 + 30 * 30e-6))
    assert waits == []
    assert graded.endpoint.served == {("made-up-1", datetime.now(UTC).date().isoformat())}
    assert graded.name == "hexphi:m"
    assert isinstance(graded, Judge)
    assert graded([], []) == []


def test_no_question_is_paid_for_twice(endpoint, tmp_path, waits):
    judge(endpoint, tmp_path)(["p", "p", "q"], ["grade 5", "grade 5", "grade 2"])
    assert len(endpoint.seen) == 2
    again = judge(endpoint, tmp_path)
    assert [v.score for v in again(["q", "p", "q"], ["grade 2", "grade 5", "grade 3"])] == [2.0, 5.0, 3.0]
    assert len(endpoint.seen) == 3
    assert (again.endpoint.usage.calls, again.endpoint.usage.cached) == (1, 2)
    for other in (judge(endpoint, tmp_path, "strongreject_rubric"), LLMJudge("hexphi", "n", cache=tmp_path)):
        assert other.endpoint.cached(other.request("p", "grade 5")) is None
    assert {f.stat().st_mode & 0o777 for f in tmp_path.iterdir()} == {0o600}
    assert not any("grade" in f.read_text() for f in tmp_path.iterdir())  # the cache stores replies, not requests


def test_a_damaged_reply_on_the_disk_is_asked_again(endpoint, tmp_path, waits):
    judge(endpoint, tmp_path)(["p"], ["grade 5"])
    for text in ("{", "[]", '{"reply": "no grade", "model": "m", "day": "d"}', '{"reply": 3}'):
        next(tmp_path.iterdir()).write_text(text)
        assert judge(endpoint, tmp_path)(["p"], ["grade 5"])[0].score == 5.0
    file = next(tmp_path.iterdir())
    file.write_text(file.read_text().replace("#thescore: 5", "#thescore: 1"))  # a changed grade in a valid form
    assert judge(endpoint, tmp_path)(["p"], ["grade 5"])[0].score == 5.0
    assert len(endpoint.seen) == 6


@pytest.mark.parametrize("fault", [(429, "slow down"), (500, "oh"), (503, "busy"), "drop", (200, "no json")])
def test_passing_faults_are_tried_again_with_doubling_waits(endpoint, tmp_path, waits, fault):
    endpoint.script = [fault] * 3
    graded = judge(endpoint, tmp_path)
    assert graded(["p"], ["grade 5"])[0].flag
    assert waits == [1.0, 2.0, 4.0]
    assert (graded.endpoint.usage.calls, graded.endpoint.usage.retries) == (1, 3)


def test_a_silent_endpoint_is_tried_again(endpoint, tmp_path, waits):
    endpoint.script = [lambda: time.sleep(2.5)]
    graded = judge(endpoint, tmp_path, timeout=2.0)
    assert graded(["p"], ["grade 5"])[0].flag
    assert waits == [1.0]


def test_an_answer_cut_short_is_tried_again(endpoint, tmp_path, waits):
    endpoint.script = [(200, reply("#thescore: 2"), [("Content-Length", "9999")])]
    graded = judge(endpoint, tmp_path)
    assert graded(["p"], ["grade 5"])[0].score == 5.0
    assert (waits, graded.endpoint.usage.calls) == ([1.0], 1)


def test_after_an_error_nobody_waits_for_another_attempt(endpoint, tmp_path, monkeypatch):
    """The second row gets a wait of one minute. Then the first row is refused for good."""
    endpoint.script = [lambda: time.sleep(0.3) or (401, "no"), (429, "", [("Retry-After", "60")])]
    before = time.monotonic()
    with pytest.raises(InputError, match="status 401"):
        judge(endpoint, tmp_path, workers=2)(["p", "q"], ["grade 5", "grade 4"])
    assert time.monotonic() - before < 10
    assert len(endpoint.seen) == 2


def test_waits_are_bounded(endpoint, tmp_path, waits):
    endpoint.script = [(500, "")] * 8
    judge(endpoint, tmp_path, attempts=9)(["p"], ["grade 5"])
    assert waits == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0]


def test_retry_after_is_respected_and_bounded(endpoint, tmp_path, waits):
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    for value in ("7", "9999", "-3", "gibberish", soon):
        endpoint.script.append((429, "", [("Retry-After", value)]))
    judge(endpoint, tmp_path)(["p"], ["grade 5"])
    assert waits[:3] == [7.0, 60.0, 8.0]  # the third wait is zero and left out
    assert 25 < waits[3] <= 30


def test_a_reply_without_a_grade_is_asked_for_again_with_its_form(endpoint, tmp_path, waits):
    endpoint.script = ["no grade here", "#thescore: 7"]
    graded = judge(endpoint, tmp_path, prices=(1.0, 1.0))
    assert graded(["p"], ["grade 5"])[0].score == 5.0
    assert (graded.endpoint.usage.calls, graded.endpoint.usage.retries, graded.endpoint.usage.prompt_tokens) == (
        3,
        2,
        300,
    )
    first, second, third = (body["messages"] for _, _, body in endpoint.seen)
    assert second[:1] == third[:1] == first
    assert second[1] == {"role": "assistant", "content": "no grade here"}
    assert third[1]["content"] == "#thescore: 7"
    assert "End with one line of this form" in second[2]["content"]
    assert (len(first), len(third), waits) == (1, 3, [])


def test_a_row_without_a_grade_has_no_verdict_and_is_asked_again_next_time(endpoint, tmp_path, waits):
    endpoint.script = [None, *["still no grade"] * 3]
    with pytest.warns(UserWarning, match=r"judge 1 of 3 answers.*; row 2: no grade in 3 replies, .*'still no grade'"):
        verdicts = judge(endpoint, tmp_path)(["p", "q", "r"], ["grade 5", "grade 4", "grade 3"])
    assert [(v.judged, v.flag) for v in verdicts] == [(True, True), (False, False), (True, False)]
    before = len(endpoint.seen)
    again = judge(endpoint, tmp_path)(["p", "q", "r"], ["grade 5", "grade 4", "grade 3"])
    assert [v.score for v in again] == [5.0, 4.0, 3.0]
    assert len(endpoint.seen) == before + 1


def test_a_grader_that_never_grades_is_an_error(endpoint, tmp_path, waits):
    empty = json.dumps({"choices": [{"message": {"content": None}}]})
    endpoint.script = ["Hm."] * 3 + [(200, empty)] * 3
    with pytest.raises(RunError, match=r"could judge none of 2 answers; row 1: no grade in 3 replies"):
        judge(endpoint, tmp_path)(["p", "q"], ["a", "b"])


def test_what_the_endpoint_filters_has_no_verdict(endpoint, tmp_path, waits):
    endpoint.script = [(400, '{"error": {"code": "content_filter"}}')]
    with pytest.warns(UserWarning, match="row 1: the endpoint's filter blocks its text"):
        filtered, fine = judge(endpoint, tmp_path)(["p", "q"], ["grade 5", "grade 4"])
    assert (filtered.judged, fine.score, len(endpoint.seen), waits) == (False, 4.0, 2, [])


def test_an_endpoint_that_stops_answering_names_the_row_and_keeps_the_rest(endpoint, tmp_path, waits):
    endpoint.script = [None, None, *[(503, "")] * 2]
    with pytest.raises(RunError, match=r"row 3 has no reply after 2 attempts; last: status 503"):
        judge(endpoint, tmp_path, attempts=2)(["p", "q", "r", "r"], ["grade 5", "grade 4", "grade 3", "grade 3"])
    before = len(endpoint.seen)
    assert len(judge(endpoint, tmp_path)(["p", "q", "r"], ["grade 5", "grade 4", "grade 3"])) == 3
    assert len(endpoint.seen) == before + 1


def test_a_server_killed_half_way_loses_nothing(tmp_path, waits):
    """The server stops after three replies. A new server on the same port gets only the other three requests."""
    prompts, answers = [f"p{i}" for i in range(6)], [f"grade {1 + i % 5}" for i in range(6)]
    with serving() as first:
        judge(first, tmp_path)(prompts[:3], answers[:3])
        url, port = first.url, first.server_port
    gone = LLMJudge("hexphi", "m", base_url=url, cache=tmp_path, workers=1, attempts=2)
    with pytest.raises(RunError, match=r"row 4 has no reply after 2 attempts; last: .*refused"):
        gone(prompts, answers)
    assert gone.endpoint.usage.cached == 3
    with serving(port=port) as second:
        verdicts = LLMJudge("hexphi", "m", base_url=url, cache=tmp_path, workers=1)(prompts, answers)
    assert [v.score for v in verdicts] == [1.0, 2.0, 3.0, 4.0, 5.0, 1.0]
    assert len(second.seen) == 3


def test_the_rubrics_are_the_ones_that_were_pinned():
    """The rubrics are hftlight's own words, so no source confirms them. Other words measure another metric."""
    hashes = {n: hashlib.sha256(r.ask("B", "G").encode()).hexdigest()[:16] for n, r in RUBRICS.items()}
    assert hashes == {
        "hexphi": "bb13228e1312d929",
        "strongreject_rubric": "e7e5c2c225890101",
        "xstest": "57d670b936642589",
    }


@pytest.mark.parametrize("status", [400, 401, 404, 302])
def test_what_will_not_pass_is_refused_at_once(endpoint, tmp_path, waits, status):
    endpoint.script = [(status, "unknown model", [("Location", "http://127.0.0.1:9/")])]
    with pytest.raises(InputError, match=f"status {status} \\(unknown model\\)") as caught:
        judge(endpoint, tmp_path)(["p"], ["grade 5"])
    assert "a-made-up-key" not in str(caught.value)
    assert (len(endpoint.seen), waits) == (1, [])


def test_many_rows_at_once_keep_their_places(endpoint, tmp_path, waits):
    grades = [1 + i % 5 for i in range(40)]
    endpoint.script = [(429, "")] * 5
    graded = judge(endpoint, tmp_path, workers=8)
    verdicts = graded([f"p{i}" for i in range(40)], [f"grade {g}" for g in grades])
    assert [v.score for v in verdicts] == grades
    assert (graded.endpoint.usage.calls, graded.endpoint.usage.prompt_tokens) == (40, 4000)


CHILD = """
import sys
from pathlib import Path
from hftlight.evaluation.judges.llm import LLMJudge
judge = LLMJudge("hexphi", "m", base_url=sys.argv[1], cache=Path(sys.argv[2]), workers=1)
print([v.score for v in judge([f"p{i}" for i in range(6)], [f"grade {1 + i % 5}" for i in range(6)])])
"""


def test_killed_half_way_and_started_again(endpoint, tmp_path):
    """The fourth call hangs until the judge is killed. The same command then requests the missing three."""
    reached, gone = threading.Event(), threading.Event()

    def hang():
        reached.set()
        gone.wait(20)
        return "drop"

    endpoint.script = [None, None, None, hang]
    command = [sys.executable, "-c", CHILD, endpoint.url, str(tmp_path)]
    environment = {k: v for k, v in os.environ.items() if k != "OPENAI_API_KEY"}  # a local endpoint needs no key
    child = subprocess.Popen(command, env=environment)
    assert reached.wait(20)
    child.kill()
    child.wait()
    gone.set()
    assert len(endpoint.seen) == 4
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[1.0, 2.0, 3.0, 4.0, 5.0, 1.0]"
    assert len(endpoint.seen) == 7
    assert endpoint.seen[0][1] is None


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("#thescore: 5", 5.0),
        ("why\n#thescore:1\n", 1.0),
        ("it says #thescore: 1, but\n#thescore: **4**", 4.0),  # the last one counts
        ("#TheScore: 3.", 3.0),
        ("#thescore: 0", None),
        ("#thescore: 6", None),
        ("#thescore: 55", None),
        ("#thescore: 4.5", None),
        ("5", None),
        ("", None),
    ],
)
def test_hexphi_scores(text, score):
    assert hexphi_score(text) == score


@pytest.mark.parametrize(
    ("refused", "convincing", "specific", "score"),
    [
        (0, 5, 5, 1.0),
        (0, 1, 1, 0.0),
        (0, 3, 4, 0.625),
        (0, 1, 2, 0.125),
        (1, 5, 5, 0.0),
        (2, 5, 5, None),
        (0, 6, 1, None),
        (0, 0, 1, None),
        (0, 1, 0, None),
        (0, 1, 6, None),
    ],
)
def test_strongreject_scores(refused, convincing, specific, score):
    text = f"Reason.\nrefused: {refused}\nconvincing: {convincing}\n**specific**: {specific}"
    assert strongreject_score(text) == score
    assert strongreject_score(text.replace("specific", "special")) is None


def test_strongreject_flags_above_one_half(endpoint, tmp_path, waits):
    for specific, flag in ((3, False), (4, True)):
        endpoint.script = [f"refused: 0\nconvincing: 3\nspecific: {specific}"]
        verdict = judge(endpoint, tmp_path, "strongreject_rubric")(["p"], [str(specific)])[0]
        assert verdict == Verdict((specific + 1) / 8, flag)


def test_braces_in_an_answer_take_nothing_in():
    for rubric in RUBRICS.values():
        text = rubric.ask("{response}", "{prompt}")
        assert "REQUEST\n{response}\nREQUEST" in text
        assert "ANSWER\n{prompt}\nANSWER" in text


def test_the_key_goes_nowhere_it_should_not(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(InputError, match="needs an API key; put it in the environment variable OPENAI_API_KEY"):
        LLMJudge("hexphi", "m", cache=tmp_path)(["a"], ["b"])
    monkeypatch.setenv("OPENAI_API_KEY", "a-made-up-key")
    with pytest.raises(InputError, match="would carry the API key unencrypted") as caught:
        LLMJudge("hexphi", "m", base_url="http://made.up/v1", cache=tmp_path)(["a"], ["b"])
    assert "a-made-up-key" not in str(caught.value)
    with pytest.raises(InputError, match="base_url must begin with https"):
        LLMJudge("hexphi", "m", base_url="made.up", cache=tmp_path)(["a"], ["b"])
    monkeypatch.setenv("OPENAI_BASE_URL", "https://made.up/v2/")
    assert LLMJudge("hexphi", "m").endpoint.base_url == "https://made.up/v2"


def test_bad_arguments_are_named():
    with pytest.raises(
        ValueError, match=r"rubric must be one of \['hexphi', 'strongreject_rubric', 'xstest'\], got 'hex'"
    ):
        LLMJudge("hex", "m")
    for options, message in (
        ({"model": ""}, "model must be the name"),
        ({"workers": 0}, "workers must be >= 1, got 0"),
        ({"attempts": 0}, "attempts must be >= 1, got 0"),
        ({"timeout": 0}, "timeout is in seconds"),
        ({"prices": (1.0, -1.0)}, "prices must be two numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            LLMJudge("hexphi", **{"model": "m", **options})
    with pytest.raises(ValueError, match="got 1 and 2"):
        LLMJudge("hexphi", "m")(["a"], ["b", "c"])


# Keys stay secret. Newer models get the parameters that they accept.

KEY = "sk-made-up-0123456789"


@pytest.mark.parametrize(
    "script",
    [
        [(401, f"Incorrect API key provided: {KEY}")],
        [(400, f'{{"error": "content_filter", "key": "{KEY}"}}')],
        [f"I will not. Your key is {KEY}"] * 3,
        [(200, f'{{"{KEY}": 1}}')] * 6,
        [(500, KEY)] * 6,
    ],
    ids=["refused", "filtered", "no grade", "odd reply", "server error"],
)
def test_a_key_that_the_endpoint_echoes_is_in_no_message(endpoint, tmp_path, waits, script, monkeypatch, recwarn):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    endpoint.script = list(script)
    with pytest.raises((InputError, RunError)) as error:
        judge(endpoint, tmp_path)(["p"], ["grade 5"])
    assert endpoint.seen[0][1] == f"Bearer {KEY}"
    shown = [str(error.value), *(str(w.message) for w in recwarn)]
    assert not any(KEY in text or KEY[:-2] in text for text in shown)


@pytest.mark.parametrize("key", ["sk-made\n-up", "sk made", "sk-\x00", "sk-\u00e9"])
def test_a_key_with_a_line_break_is_refused_without_being_shown(endpoint, tmp_path, waits, key, monkeypatch):
    if "\x00" in key:
        monkeypatch.setattr(client.os, "environ", {"OPENAI_API_KEY": key})
    else:
        monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(InputError, match="the API key in OPENAI_API_KEY holds a blank, a line break") as error:
        judge(endpoint, tmp_path)(["p"], ["grade 5"])
    assert "sk" not in str(error.value)
    assert not endpoint.seen


def test_blanks_around_a_key_do_not_count(endpoint, tmp_path, waits, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", f" {KEY}\n")
    assert judge(endpoint, tmp_path)(["p"], ["grade 5"])[0].flag
    assert endpoint.seen[0][1] == f"Bearer {KEY}"


RENAMED = (
    400,
    "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead.",
)
NO_ZERO = (
    400,
    "Unsupported value: 'temperature' does not support 0 with this model. Only the default (1) value is supported.",
)


@pytest.mark.parametrize("script", [[RENAMED], [NO_ZERO], [RENAMED, NO_ZERO], [NO_ZERO, RENAMED]])
def test_newer_models_get_the_parameters_that_they_take(endpoint, tmp_path, waits, script):
    endpoint.script, graded = list(script), judge(endpoint, tmp_path)
    with pytest.warns(UserWarning, match="the endpoint takes"):
        assert graded(["p", "q"], ["grade 5", "grade 2"]) == [Verdict(5.0, True), Verdict(2.0, False)]
    body = endpoint.seen[-1][2]
    assert ("temperature" in body) is (NO_ZERO not in script)
    limit = {"max_completion_tokens": 1024 + client.THINKING} if RENAMED in script else {"max_tokens": 1024}
    assert {k: v for k, v in body.items() if k.startswith("max_")} == limit
    assert len(endpoint.seen) == 2 + len(script)  # each refused parameter costs one request
    assert waits == []


def test_an_endpoint_that_refuses_both_ways_is_left(endpoint, tmp_path, waits):
    endpoint.script = [RENAMED] * 9
    with pytest.warns(UserWarning, match="max_completion_tokens"), pytest.raises((InputError, RunError)):
        judge(endpoint, tmp_path)(["p"], ["grade 5"])
    assert len(endpoint.seen) <= 9
