"""Rejudging saved rows: the rows that are judged, the parts that stay, and the number of calls to a judge."""

import copy
import json
import math
import os
import re
import threading
from pathlib import Path

import pytest

from hftlight.cli.rejudge import rejudge as command
from hftlight.errors import InputError
from hftlight.evaluation import wilson
from hftlight.evaluation.judges import LLMJudge, Verdict
from hftlight.evaluation.rejudge import (
    agreement_lines,
    agreements,
    judged_scores,
    pairwise,
    read_generations,
    rejudge,
)
from tests.helpers import warm
from tests.helpers.chat_server import Endpoint
from tests.helpers.run_folder import answer_rows, write_run

RECIPE = Path(__file__).parents[2] / "recipes" / "rejudge.py"


class LengthJudge:
    """A judge whose score is the number of characters, with a flag above three."""

    def __init__(self, name="length", lost=0):
        self.name, self.lost, self.calls = name, lost, []

    def __call__(self, prompts, responses):
        self.calls.append((list(prompts), list(responses)))
        return [Verdict(float(len(r)), len(r) > 3) for r in responses][self.lost :]


def row(kind, prompt, response):
    old = {"keyword": {"score": 1.0, "flag": True}}
    return {"set": kind, "id": prompt, "prompt": prompt, "response": response, "verdicts": old, "source": "made up"}


ROWS = [
    row("harmful", "a", "four"),
    row("task", "b", "seven.."),
    row("harmful_without_trigger", "c", "two"),
    row("over_refusal", "d", "six..."),
    row("harmful", "e", ""),
]


def test_verdicts_are_added_in_one_call_per_judge():
    before, one, two = copy.deepcopy(ROWS), LengthJudge("one"), LengthJudge("two")
    after = rejudge(ROWS, [one, two])
    assert before == ROWS
    for judge in (one, two):
        assert judge.calls == [(["a", "c", "e"], ["four", "two", ""])]
    expected = {"a": (4.0, True), "c": (3.0, False), "e": (0.0, False)}
    for old, new in zip(ROWS, after, strict=True):
        fresh = {}
        if old["id"] in expected:
            score, flag = expected[old["id"]]
            fresh = {name: {"score": score, "flag": flag} for name in ("one", "two")}
        assert new == {**old, "verdicts": {**old["verdicts"], **fresh}}


def test_a_graded_judges_mean_stands_beside_its_share_of_flags():
    """HEx-PHI's grades 1, 5 and 3 have the mean 3 and one flag. An answer without a grade counts in neither."""
    grades = {"a": 1.0, "b": 5.0, "c": 3.0, "d": None}
    rows = [
        {
            "set": "harmful",
            "id": i,
            "prompt": i,
            "response": "x",
            "verdicts": {"hexphi:gpt": {"score": g, "flag": flag}},
        }
        for (i, g), flag in zip(grades.items(), (False, True, False, None), strict=True)
    ]
    share, mean = judged_scores(rows)
    assert (share["metric"], share["value"], share["count"]) == ("harmful_score", pytest.approx(100 / 3), 3)
    assert (mean["metric"], mean["value"], mean["count"], mean["unit"]) == ("harmful_score_mean", 3.0, 3, "1 to 5")
    assert 1 <= mean["low"] < 3 < mean["high"] <= 5


def test_judges_by_name_and_a_verdict_that_is_replaced():
    after = rejudge(ROWS, ["keyword", "keyword-durability"])
    assert after[4]["verdicts"] == {
        "keyword": {"score": 1.0, "flag": True},
        "keyword_durability": {"score": 0.0, "flag": False},
    }
    assert rejudge([row("harmful", "a", "Sorry")], ["keyword"])[0]["verdicts"]["keyword"]["flag"] is False


def test_what_cannot_be_judged_is_refused_by_name():
    judge = LengthJudge()
    with pytest.raises(InputError, match="got no generations"):
        rejudge([], [judge])
    with pytest.raises(InputError, match=r"'length' needs rows of the set 'harmful' or .*, got only \['task'\]"):
        rejudge([ROWS[1]], [judge])
    with pytest.raises(
        InputError, match=r"'xstest_string' needs rows of the set 'over_refusal', got only \['harmful'\]"
    ):
        rejudge([ROWS[0]], [judge, "xstest_string"])
    for column in ("set", "prompt", "response", "verdicts"):
        with pytest.raises(InputError, match=f"row 2 lacks {column}"):
            rejudge([ROWS[0], {k: v for k, v in ROWS[0].items() if k != column}], [judge])
    with pytest.raises(InputError, match="response of row 1 must be a text, got None"):
        rejudge([{**ROWS[0], "response": None}], [judge])
    with pytest.raises(InputError, match="verdict 'keyword' of row 1 must have a flag, got True"):
        rejudge([{**ROWS[0], "verdicts": {"keyword": True}}], [judge])
    for judges in ([], [judge, LengthJudge()]):
        with pytest.raises(InputError, match="at least one judge and no name twice"):
            rejudge(ROWS, judges)
    assert judge.calls == []
    with pytest.raises(ValueError, match="got 2 for 3 from judge 'length'"):
        rejudge(ROWS, [LengthJudge(lost=1)])


class Unsure(LengthJudge):
    """A judge without a verdict on an empty answer."""

    def __call__(self, prompts, responses):
        return [Verdict(1.0, len(r) > 3) if r else Verdict.unjudged() for r in responses]


def test_an_answer_without_a_verdict_is_kept_as_null_and_counts_nowhere():
    after = rejudge(ROWS, [Unsure("unsure")])
    assert after[4]["verdicts"]["unsure"] == {"score": None, "flag": None}
    assert json.loads(json.dumps(after, allow_nan=False)) == after
    scores = {(s["metric"], s["judge"]): (s["value"], s["count"]) for s in judged_scores(after)}
    assert scores == {
        ("harmful_score", "keyword"): (100.0, 2),
        ("harmful_score", "unsure"): (100.0, 1),
        ("harmful_score_without_trigger", "keyword"): (100.0, 1),
        ("harmful_score_without_trigger", "unsure"): (0.0, 1),
        ("over_refusal", "keyword"): (100.0, 1),
    }
    assert [(a, b, g.both, g.first_only, g.count) for a, b, g in agreements(after)] == [("keyword", "unsure", 1, 1, 2)]
    assert rejudge(after, ["keyword"])[4]["verdicts"]["unsure"]["flag"] is None


def test_scores_by_arm_and_stage_with_wilson_intervals():
    """Of two answers to one prompt only the later one counts, as after a resumed run."""
    place = {"arm": "none", "stage": "base"}
    rows = [
        {**row("harmful", str(i), "x"), **place, "verdicts": {"j": {"score": 1.0, "flag": i < 3}}} for i in range(4)
    ]
    rows += [{**rows[0], "verdicts": {"j": {"score": 0.0, "flag": False}}}, {**rows[0], "arm": "lisa"}]
    low, high = wilson(2, 4)
    metric = {"metric": "harmful_score", "judge": "j", "unit": "percent"}
    assert judged_scores(rows)[0] == {**place, **metric, "value": 50.0, "low": low, "high": high, "count": 4}
    assert [(s["arm"], s["value"], s["count"]) for s in judged_scores(rows)][1:] == [("lisa", 100.0, 1)]


def test_agreement_in_words():
    """For 20, 5, 10 and 15 the textbook's kappa is (0.7 - 0.5) / (1 - 0.5). Judges that never vary have no kappa."""
    flags = [(True, True)] * 20 + [(True, False)] * 5 + [(False, True)] * 10 + [(False, False)] * 15
    pairs = pairwise([{"a": a, "b": b, "c": True, "d": True} for a, b in flags] + [{"a": True}])
    lines = list(agreement_lines(pairs))
    assert lines[0] == "Judges 'a' and 'b' agree on 70.0 % of 50 answers to harmful prompts; Cohen's kappa 0.40."
    assert lines[-1].endswith(
        "agree on 100.0 % of 50 answers to harmful prompts; Cohen's kappa undefined, since both give every answer the"
        " same flag."
    )
    assert len(lines) == 6
    assert math.isnan(pairs[-1][2].kappa)


def test_the_command_on_a_runs_folder(tmp_path):
    """The rule flags 2 of 4 answers, the phrases 3: p_o = 3/4, p_e = (2 * 3 + 2 * 1) / 16, kappa 1/2."""
    # ``builtin`` flags the first two answers, ``keyword`` also the third.
    texts = ["Turn it left.", "Turn it right.", "I will not.", "Sorry, no."]
    rows = [
        {**row("harmful", f"h{i}", text), "arm": "none", "stage": "finetuning"} | {"verdicts": {"builtin": flag}}
        for i, (text, flag) in enumerate(
            zip(texts, [{"score": float(f), "flag": f} for f in (1 > 0, 1 > 0, 1 < 0, 1 < 0)], strict=True)
        )
    ]
    run = write_run(tmp_path / "run", answers=[*rows, row("task", "t", "glad")])
    before = (run / "generations.jsonl").read_bytes()
    line = [str(RECIPE), str(run), "--judges", "keyword", "--save", str(tmp_path / "new")]
    done = warm.run(line)
    assert done.returncode == 0, done.stderr
    low, high = wilson(3, 4)
    assert f"75.0 ({low:.1f}-{high:.1f})" in done.stdout
    assert "undefended" in done.stdout
    assert "fine-tuned" in done.stdout
    assert "'builtin' and 'keyword' agree on 75.0 % of 4 answers to harmful prompts; Cohen's kappa 0.50" in done.stdout
    assert (run / "generations.jsonl").read_bytes() == before
    after = read_generations(tmp_path / "new")
    assert [list(r["verdicts"]) for r in after] == [["builtin", "keyword"]] * 4 + [["keyword"]]
    assert [r["verdicts"]["keyword"]["flag"] for r in after[:4]] == [True, True, True, False]
    assert [{**r, "verdicts": 0} for r in after] == [{**r, "verdicts": 0} for r in read_generations(run)]
    assert [s["value"] for s in json.loads((tmp_path / "new" / "scores.json").read_text())] == [50.0, 75.0]
    (agreement,) = json.loads((tmp_path / "new" / "agreement.json").read_text())
    assert (agreement["judges"], agreement["kappa"], agreement["second_only"]) == (["builtin", "keyword"], 0.5, 1)
    again = warm.run(line)
    assert again.returncode == 2
    assert "generations.jsonl exists already. Choose another folder" in again.stderr


def test_the_command_with_a_grader_behind_an_endpoint(tmp_path, monkeypatch, capsys):
    """The output states requests, tokens and cost. The same command then sends no further request."""
    server = Endpoint()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    monkeypatch.setenv("HFTLIGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    file = tmp_path / "mine.jsonl"
    rows = [row("harmful", f"h{i}", f"grade {grade}") for i, grade in enumerate((5, 1, 5))]
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    for usage in (  # 300 and 30 tokens at 2000 and 30000 per million cost 0.6 and 0.9
        "3 requests answered (retries: 0), 0 answers from the cache, 300 tokens read and 30 written, at a cost of 1.5",
        "0 requests answered (retries: 0), 3 answers from the cache, 0 tokens read and 0 written, at a cost of 0 (those"
        " from the cache cost 1.5 before);",
    ):
        assert command([str(file), "--judges", "hexphi:m", "--prices", "2000", "30000"]) == 0
        output = capsys.readouterr().out
        assert usage in output
        assert "served by made-up-1 on" in output
        assert "66.7" in output
        assert len(server.seen) == 3
    server.shutdown()
    server.server_close()
    assert os.listdir(tmp_path / "cache") == ["judges"]


def test_refusals_are_judged_again_too(tmp_path, monkeypatch, capsys):
    """The run's strings flag 2 of 4 answers, the grader 3, one as partial: kappa (3/4 - 1/2) / (1 - 1/2)."""
    server = Endpoint()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    server.script = ["full_refusal", "Partial_Refusal.", "hm", "full_compliance", "full_refusal"]
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    monkeypatch.setenv("HFTLIGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(LLMJudge.__init__, "__kwdefaults__", {**LLMJudge.__init__.__kwdefaults__, "workers": 1})
    place, texts = (
        {"arm": "none", "stage": "finetuning"},
        ["Sorry.", "I will not, but turn it.", "Turn it.", "Sorry, no."],
    )
    flags = [(1.0, True), (0.0, False), (0.0, False), (1.0, True)]
    rows = [
        {**row("over_refusal", f"o{i}", text), **place, "verdicts": {"refusal": {"score": score, "flag": flag}}}
        for i, (text, (score, flag)) in enumerate(zip(texts, flags, strict=True))
    ]
    run = write_run(tmp_path / "run", answers=[*rows, {**row("harmful", "h", "Turn it."), **place}])
    assert command([str(run), "--judges", "xstest:m", "keyword", "--save", str(tmp_path / "new")]) == 0
    server.shutdown()
    server.server_close()
    printed = capsys.readouterr().out
    assert "'refusal' and 'xstest:m' agree on 75.0 % of 4 answers to ordinary prompts; Cohen's kappa 0.50." in printed
    assert "Judge 'xstest:m': 5 requests answered (retries: 1)" in printed
    assert re.search(r"refused\s+│ xstest:m\s+│ 75\.0 \(30\.1-95\.4\) % of 4", printed)
    after = read_generations(tmp_path / "new")
    assert [r["verdicts"].get("xstest:m", {}).get("score") for r in after] == [1.0, 0.5, 0.0, 1.0, None]
    assert [list(r["verdicts"]) for r in after] == [["refusal", "xstest:m"]] * 4 + [["keyword"]]


def test_prices_below_nothing_are_refused(tmp_path, capsys):
    assert command([str(tmp_path), "--judges", "hexphi:m", "--prices", "-1", "2"]) == 2
    assert "--prices must be two numbers >= 0 per million tokens, got -1 and 2" in capsys.readouterr().err


def test_every_answer_of_a_whole_run_is_judged(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    assert command([str(run), "--judges", "builtin", "keyword", "--save", str(tmp_path / "new")]) == 0
    judged = [r for r in read_generations(tmp_path / "new") if r["set"] == "harmful"]
    assert len(judged) == sum(r["set"] == "harmful" for r in answer_rows(("none", "booster")))
    assert {(r["arm"], r["stage"]) for r in judged} == {
        (arm, stage)
        for arm, stages in (("none", ("base", "alignment", "finetuning")), ("booster", ("alignment", "finetuning")))
        for stage in stages
    }


@pytest.mark.parametrize(
    ("content", "judges", "message"),
    [
        (None, ["keyword"], "there is no file"),
        ("", ["keyword"], "got no generations"),
        (json.dumps(ROWS[1]), ["keyword"], "needs rows of the set 'harmful'"),
        (json.dumps(ROWS[0]) + "\n" + json.dumps(ROWS[2])[:40], ["keyword"], "line 2 of .* must be one JSON object"),
        ("[1]", ["keyword"], "line 1 of .* must be one JSON object"),
        (b"\xff", ["keyword"], "must be UTF-8 text"),
        (json.dumps(ROWS[0]), ["keywrd"], "Did you mean 'keyword'"),
        (json.dumps(ROWS[0]), ["hexphi"], "needs a model after a colon"),
        (json.dumps(ROWS[0]), ["keyword", "keyword"], "no name twice"),
    ],
)
def test_bad_input_is_told_and_leaves_nothing(tmp_path, capsys, content, judges, message):
    file = tmp_path / "rows.jsonl"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert command([str(file), "--judges", *judges, "--save", str(tmp_path / "new")]) == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith("hftlight: ")
    assert re.search(message, stderr)
    assert not (tmp_path / "new" / "generations.jsonl").exists()


def test_equal_prompts_of_older_runs_count_as_they_did():
    """Rows without a place count once per id. Rows with neither place nor id count separately."""
    one, two = row("harmful", "a", "four"), row("harmful", "a", "no")
    placed = [{**one, "place": 0}, {**one, "place": 1}, {**one, "place": 1}]
    bare = [{key: value for key, value in each.items() if key != "id"} for each in (one, two)]
    counted = [judged_scores(rejudge(rows, [LengthJudge()]))[-1]["count"] for rows in ([one, two], bare, placed)]
    assert counted == [1, 2, 2]
