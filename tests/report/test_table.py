"""The closing table as terminal table, text and Markdown."""

from io import StringIO

from rich.console import Console

from hftlight.evaluation.score import Score
from hftlight.folders import WITHOUT_PATTERN
from hftlight.report import closing_markdown, closing_table, closing_text, read_result, verdict, write_report
from hftlight.report.table import HEADERS, caption, closing_rows, headers, seconds, with_interval
from tests.helpers.run_folder import harmful, metric_rows, score, write_run

ARMS = ("none", "booster")
STAGES = (("base", 10.0), ("finetuning", 5.0))


def rows(tmp_path, *args, **kwargs):
    return closing_rows(read_result(write_run(tmp_path, *args, **kwargs)))


def test_rows_are_arm_by_stage_with_every_number(tmp_path):
    table = rows(tmp_path, arms=("booster", "none"))
    assert table[0] == ["undefended", "base", "42/40/12", "40.0 (31.7-48.9)", "12.0", "1.7", "-", "-"]
    assert table[2] == ["undefended", "fine-tuned", "27/62/8", "61.7 (52.7-69.9)", "92.5", "3.3", "1.5 (1.0x)", "1234"]
    assert table[3] == ["booster", "aligned", "67/5/18", "5.0 (2.3-10.5)", "10.0", "9.2", "4.41 (2.9x)", "1544"]
    assert [row[:2] for row in table[3:]] == [["booster", "aligned"], ["booster", "fine-tuned"]]


def test_a_repair_has_a_row_below_the_finetuned_model_and_seconds_once(tmp_path):
    result = read_result(write_run(tmp_path, arms=("none", "booster+antidote")))
    tuned, repaired = closing_rows(result)[-2:]
    assert tuned[:5] == ["booster+antidote", "fine-tuned", "32/55/8", "55.0 (46.1-63.6)", "92.5"]
    assert repaired == ["booster+antidote", "repaired", "63/9/18", "9.2 (5.2-15.7)", "90.0", "5.8", "42.5 s once", "-"]
    assert "'s once': seconds of the whole repair." in caption(result)
    out = StringIO()
    Console(file=out, width=80).print(closing_table(result))
    assert any("repaired" in line and "42.5 s once" in line for line in out.getvalue().splitlines())
    assert max(map(len, out.getvalue().splitlines())) <= 80


def test_the_caption_is_silent_about_repairs_where_there_is_none(tmp_path):
    assert "once" not in caption(read_result(write_run(tmp_path)))


def test_what_is_not_measured_is_a_dash(tmp_path):
    half = [row for row in metric_rows(ARMS) if row["arm"] == "none" and row["stage"] != "finetuning"]
    table = rows(tmp_path, half, [], arms=ARMS)
    assert [row[:2] for row in table[2:]] == [
        ["undefended", "fine-tuned"],
        ["booster", "aligned"],
        ["booster", "fine-tuned"],
    ]
    assert all(row[2:] == ["-"] * 6 for row in table[2:])


def test_a_score_without_interval_stands_alone(tmp_path):
    table = rows(tmp_path, [{**harmful("none", "finetuning", 60), "low": None, "high": None}], [], arms=("none",))
    assert table[0][2:4] == ["-", "60.0"]


def test_the_caption_tells_what_the_three_numbers_are_where_they_stand(tmp_path):
    assert "Refused, complied (flagged), broken" in caption(read_result(write_run(tmp_path / "a")))
    assert "Refused" not in caption(read_result(write_run(tmp_path / "b", [harmful("none", "base", 50)], [])))


def test_other_units_have_three_digits():
    assert with_interval(Score("m", 2.3456, "", 2.1, 2.51, 9, "nats per token")) == "2.35 (2.1-2.51)"


def test_terminal_table_fits_eighty_columns_and_names_the_judge(tmp_path):
    out = StringIO()
    Console(file=out, width=80).print(closing_table(read_result(write_run(tmp_path))))
    lines = out.getvalue().splitlines()
    assert sum("61.7 (52.7-69.9)" in line and "1.5 (1.0x)" in line for line in lines) == 1
    assert out.getvalue().count("undefended") == 1
    assert "…" not in out.getvalue()
    assert "'builtin', n = 120" in out.getvalue()


def test_the_score_without_the_pattern_stands_beside_that_with_it(tmp_path):
    """In text, Markdown and page with its interval, in 80 columns without it and without the memory."""
    plain = [score("none", stage, WITHOUT_PATTERN, value, 120, "builtin") for stage, value in STAGES]
    result = read_result(write_run(tmp_path, [*metric_rows(("none",)), *plain], arms=("none",)))
    assert headers(result)[3:5] == ["Harmful score % (95 %)", "Without the pattern % (95 %)"]
    assert [row[3:5] for row in closing_rows(result)] == [
        ["40.0 (31.7-48.9)", "10.0 (5.8-16.7)"],
        ["4.2 (1.8-9.4)", "-"],
        ["61.7 (52.7-69.9)", "5.0 (2.3-10.5)"],
    ]
    assert {len(row) for row in closing_rows(result)} == {len(headers(result))}
    out = StringIO()
    Console(file=out, width=80).print(closing_table(result))
    lines = out.getvalue().splitlines()
    assert sum("61.7 (52.7-69.9) 5.0 92.5" in " ".join(line.split()) for line in lines) == 1
    assert max(map(len, lines)) <= 80
    assert not any("1234" in line for line in lines)
    assert "Without the pattern: the same prompts" in caption(result)
    assert "attack's pattern" not in caption(read_result(write_run(tmp_path / "plain")))
    assert "Harmful scores at the end: undefended 61.7 % with it and 5.0 % without it." in verdict(result)
    page = write_report(result.folder).read_text()
    assert page.count("Without the pattern % (95 %)") == 1
    assert "Harmful score without the pattern" in page


def test_text_form_is_aligned(tmp_path):
    head, rule, *body = closing_text(read_result(write_run(tmp_path))).split("\n")
    assert head.split("  ")[0] == "Arm"
    assert len(body[0]) == len(rule) == len(head)
    assert [line.split()[0] for line in body[:5]] == ["undefended"] * 3 + ["booster"] * 2


def test_markdown_form_has_a_cell_per_header_and_escapes_bars(tmp_path):
    score = harmful("a|b", "finetuning", 50)
    lines = closing_markdown(read_result(write_run(tmp_path, [score], [], arms=()))).split("\n")
    assert lines[0] == "| " + " | ".join(HEADERS) + " |"
    assert lines[2].startswith("| a\\|b | fine-tuned | - | 50.0 (")
    assert lines[2].replace("\\|", "").count("|") == len(HEADERS) + 1


def test_seconds_never_show_an_exponent():
    assert [seconds(s) for s in (1234.5, 4.4123, 0.0123, 0.000012)] == ["1234", "4.41", "0.0123", "0.000012"]
