"""A study in W&B: table and images, read back from the files of an offline run."""

from hftlight.analysis.analysis import Picture, Row
from hftlight.analysis.log import log_study
from hftlight.analysis.page import write_study
from hftlight.analysis.study import Study
from hftlight.report.figure import canvas
from tests.helpers.wandb_files import read_offline


def test_table_and_figures_reach_wandb(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    rows = [
        Row("odds", 1.5, 1.0, 2.0, layer=3, position="harmful", model="none", stage="finetuning"),
        Row("refused", 40.0, position=0.25, model="none", stage="finetuning"),
    ]
    done = Study(
        {"tone": rows},
        {"tone": [Picture("tone", "Tone", "Caption.", canvas(1, height=2)[0])]},
        {"tone": []},
        {"tone": "About."},
    )
    write_study(done, tmp_path, "Analysis of x")
    log_study(done, tmp_path, "Analysis of x")
    (run,) = read_offline(tmp_path)
    assert (run.group, run.job_type) == ("Analysis of x", "analysis")
    assert run.keys == {"analysis/table", "analysis/tone"}
    table = run.table("analysis/table")
    assert table["columns"][:5] == ["analysis", "metric", "value", "low", "high"]
    assert table["data"] == [
        ["tone", "odds", 1.5, 1.0, 2.0, 3, "harmful", "none", "finetuning"],
        ["tone", "refused", 40.0, None, None, None, "0.25", "none", "finetuning"],
    ]
