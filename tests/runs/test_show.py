"""The output of a finished run and of a finished comparison."""

from rich.console import Console

from hftlight.cli.compare import compare
from hftlight.comparison.claims import claims
from hftlight.comparison.read import read_comparison
from hftlight.report import read_result
from hftlight.runs.show import show_result
from tests.helpers.comparison_folder import write_comparison
from tests.helpers.run_folder import answer_rows, write_run


def test_a_run_with_two_judges_says_how_far_they_agree(tmp_path, capsys):
    """The second judge contradicts the first judge on the first 10 of 100 answers."""
    rows = answer_rows(("none", "booster"))
    harmful = [row for row in rows if row["set"] == "harmful"]
    for row in harmful[:10]:
        row["verdicts"]["keyword"]["flag"] = not row["verdicts"]["builtin"]["flag"]
    show_result(read_result(write_run(tmp_path / "run", answers=rows)), Console(width=300))
    output = capsys.readouterr().out
    assert (
        "Judges 'builtin' and 'keyword' agree on 90.0 % of 100 answers to harmful prompts; Cohen's kappa 0." in output
    )
    for row in harmful:
        del row["verdicts"]["keyword"]
    show_result(read_result(write_run(tmp_path / "one", answers=rows)), Console(width=300))
    assert "agree on" not in capsys.readouterr().out


def test_a_comparison_is_reported_again_without_running_a_cell(tmp_path, capsys):
    folder = write_comparison(tmp_path / "made", ratios=(0.1,), seeds=2)
    assert compare(["--report_only", "--comparison", "made", "--output", str(tmp_path)]) == 0
    output = " ".join(capsys.readouterr().out.split())
    assert claims(read_comparison(folder))[0] in output
    assert "Mean ± standard deviation over seeds" in output
    assert {path.name for path in folder.iterdir()} >= {"leaderboard.csv", "leaderboard.md", "report.html"}
    assert compare(["--report_only", "--comparison", "other", "--output", str(tmp_path)]) == 2
    assert "holds no comparison" in capsys.readouterr().err
