"""Reading a run folder: typed and in order, as far as the run got. Other folders are refused."""

import json

import pytest

from hftlight.errors import InputError
from hftlight.report import read_result
from tests.helpers.run_folder import answer_rows, harmful, metric_rows, write_run


def test_a_finished_run_comes_back_as_it_was_written(tmp_path):
    result = read_result(write_run(tmp_path, arms=("booster", "none")))
    assert result.arms == ["none", "booster"]
    assert result.stages("none") == ["base", "alignment", "finetuning"]
    assert result.stages("booster") == ["alignment", "finetuning"]
    score = result.score("none", "finetuning", "harmful_score")
    assert (score.value, score.judge, score.count) == (pytest.approx(100 * 74 / 120), "builtin", 120)
    assert (score.low, score.high) == (pytest.approx(52.7, abs=0.1), pytest.approx(69.9, abs=0.1))
    assert result.costs["booster", "alignment"].seconds_per_step == 4.41
    curve = result.curves["booster", "alignment", "booster/harmful_loss"]
    assert [step for step, _ in curve] == list(range(1, 81))
    assert len(result.answers) == len(answer_rows(("booster", "none")))
    assert result.unmeasured() == []
    assert result.notes == ()


def test_a_run_that_has_just_begun_waits_for_everything(tmp_path):
    result = read_result(write_run(tmp_path, rows=[], answers=[], arms=("none", "booster+antidote")))
    assert result.unmeasured() == [
        ("none", "finetuning"),
        ("booster+antidote", "finetuning"),
        ("booster+antidote", "post_finetuning"),
    ]
    assert not result.scores
    assert not result.answers


def test_a_line_cut_off_by_a_kill_is_noted_and_the_rest_is_read(tmp_path):
    folder = write_run(tmp_path, rows=[harmful("none", "base", 40)])
    path = folder / "metrics.jsonl"
    later = json.dumps(harmful("none", "alignment", 4.2))
    path.write_text(path.read_text() + '{"kind": "score", "arm": "no\n' + later + '\n{"kind": "sc')
    result = read_result(folder)
    assert [key[1] for key in result.scores] == ["base", "alignment"]
    assert [note.split(" is ")[0] for note in result.notes] == ["metrics.jsonl line 2", "metrics.jsonl line 4"]


def test_a_stage_measured_again_counts_once_and_the_later_row_wins(tmp_path):
    answer = answer_rows(("none",), prompts=1)[0]
    rows = [harmful("none", "base", 40), harmful("none", "base", 50)]
    result = read_result(write_run(tmp_path, rows, [answer, {**answer, "response": "second"}]))
    assert result.score("none", "base", "harmful_score").value == 50
    assert [a.response for a in result.answers] == ["second"]


def test_a_missing_judge_is_never_replaced_by_another(tmp_path):
    rows = [harmful("none", "finetuning", 60), harmful("booster", "finetuning", 20, judge="keyword")]
    result = read_result(write_run(tmp_path, rows, []))
    assert result.judges() == ["builtin", "keyword"]
    assert result.score("booster", "finetuning", "harmful_score") is None
    assert result.score("booster", "finetuning", "harmful_score", "keyword").value == pytest.approx(20)


def test_nulls_and_nan_count_as_not_measured(tmp_path):
    rows = [{**harmful("none", "base", 40), "value": float("nan")}]
    rows += [{"kind": "cost", "arm": "none", "stage": "finetuning", "seconds_per_step": 1.5, "relative_to_sft": None}]
    rows += [{"kind": "curve", "arm": "none", "stage": "finetuning", "step": 1, "name": "train/loss", "value": None}]
    result = read_result(write_run(tmp_path, rows, []))
    assert not result.scores
    assert not result.curves
    assert result.costs["none", "finetuning"].relative_to_sft is None


def test_answers_keep_line_separators_and_a_zero_id(tmp_path):
    answer = {**answer_rows(("none",), prompts=1)[0], "id": 0, "response": "one\u2028two\x85three"}
    folder = write_run(tmp_path, [], [])
    (folder / "generations.jsonl").write_text(json.dumps(answer, ensure_ascii=False) + "\n", encoding="utf-8")
    (read,) = read_result(folder).answers
    assert (read.response, read.id) == ("one\u2028two\x85three", "0")


def test_an_unknown_kind_of_row_is_noted(tmp_path):
    result = read_result(write_run(tmp_path, [{"kind": "spectrum"}], []))
    assert "'spectrum'" in result.notes[0]


def test_what_is_no_run_is_refused_with_the_way_out(tmp_path):
    with pytest.raises(InputError, match="nothing there"):
        read_result(tmp_path / "absent")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="a file"):
        read_result(tmp_path / "file")
    with pytest.raises(InputError, match=r"config.yaml, manifest.json, metrics.jsonl.*holds file"):
        read_result(tmp_path)
    write_run(tmp_path / "inner", [], [])
    with pytest.raises(InputError, match=r"Did you mean '.*inner'\?"):
        read_result(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"stage": "aligned"}, "line 1 needs one of the stages base"),
        ({"arm": None}, "line 1 needs the text 'arm'"),
        ({"value": "12"}, "line 1 needs a number as 'value', got '12'"),
    ],
)
def test_a_row_no_run_writes_is_refused_by_line(tmp_path, change, said):
    folder = write_run(tmp_path, [{**harmful("none", "base", 40), **change}], [])
    with pytest.raises(InputError, match=said):
        read_result(folder)


def test_a_broken_manifest_is_refused(tmp_path):
    folder = write_run(tmp_path, metric_rows(("none",)), [])
    (folder / "manifest.json").write_text("{broken")
    with pytest.raises(InputError, match="must hold JSON"):
        read_result(folder)


def test_scores_of_single_groups_stand_apart(tmp_path):
    """The groups share one metric and one judge. Of two rows for a group the later one counts, as for every score."""
    row = {**harmful("none", "finetuning", 40), "metric": "harmful_score_by_category"}
    rows = [{**row, "group": "fraud", "value": 1.0}, {**row, "group": "fraud"}, {**row, "group": "theft"}]
    result = read_result(write_run(tmp_path, [harmful("none", "finetuning", 50), *rows], []))
    assert [(s.group, s.value) for s in result.groups] == [("fraud", 40.0), ("theft", 40.0)]
    assert {key[2] for key in result.scores} == {"harmful_score"}
