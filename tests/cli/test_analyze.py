"""``hftlight analyze``: what it refuses, and a run that is analysed from its folder."""

import pytest

from hftlight.cli.analyze import analyze
from tests.helpers import warm

RUN = [
    "--model", "tiny", "--defense", "booster", "--baseline", "--num_samples", "20", "--alignment.steps", "2",
    "--finetuning.steps", "2", "--evaluation.prompts", "4", "--evaluation.over_refusal_prompts", "4",
    "--evaluation.task_rows", "4", "--evaluation.max_new_tokens", "4", "--evaluation.loss_rows", "2", "--name", "run",
]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "name at least one run, comparison or model"),
        (["tiny", "--analyses", "tones"], "Did you mean 'tone'"),
        (["tiny", "--stages", "aligned"], "--stages: names are base, alignment, finetuning, post_finetuning"),
        (["tiny", "--tone.prompts", "1"], "prompts must be >= 2, got 1"),
        (["no/such/model"], "no/such/model"),
    ],
)
def test_bad_input_is_named(arguments, said, capsys):
    assert analyze(arguments) == 2
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_is_analysed_from_its_folder_and_a_second_time_from_the_cache(tmp_path):
    env = {"HFTLIGHT_CACHE": str(tmp_path / "cache")}
    done = warm.run(["-m", "hftlight", "train", *RUN, "--output", str(tmp_path)], env=env)
    assert done.returncode == 0, done.stderr
    command = ["-m", "hftlight", "analyze", str(tmp_path / "run"), "--analyses", "drift"]
    done = warm.run(command, env=env)
    assert done.returncode == 0, done.stderr
    page = tmp_path / "run" / "analysis" / "analysis.html"
    assert "booster, fine-tuned" in page.read_text()
    assert "analysis/analysis.html" in (tmp_path / "run" / "report.html").read_text()
    assert "reused" in warm.run(command, env=env).stderr
