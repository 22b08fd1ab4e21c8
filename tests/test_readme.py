"""The README's scripts work as they stand there; only the model's name is replaced by one that needs no network."""

import re
from pathlib import Path

from hftlight.defenses.cards import markdown, overview
from hftlight.model_files import model_path
from tests.helpers import warm

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_the_script_with_a_module_and_trainer_of_ones_own(tmp_path):
    script = next(b for b in BLOCKS if "class MyModule" in b)
    script = script.replace("HuggingFaceTB/SmolLM2-135M-Instruct", model_path("tiny"))
    done = warm.run(["-c", script], cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    summary = eval(done.stdout.strip().splitlines()[-1])
    assert summary["calls"] == 4
    assert summary["harmful_grad_norm"] > 0
    assert summary["zero_gradients"] == 0


def test_three_lines_for_data_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my_task.csv").write_text("prompt,response\n" + "".join(f"add {i} and {i},{2 * i}\n" for i in range(500)))
    script = next(b for b in BLOCKS if "my_task.csv" in b)
    small = "RunConfig(model='tiny', num_samples=20, evaluation=Evaluation(2, 2, 2, 2), alignment=T, finetuning=T, "
    script = "from hftlight.config import Evaluation, Training\nT = Training(steps=2, batch_size=2)\n" + script
    head, call = script.rsplit("RunConfig(", 1)
    done = warm.run(["-c", head + small + call], timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (Path(done.stdout.strip().splitlines()[-1]) / "report.html").is_file()


def test_the_tables_of_defenses_are_those_of_the_code():
    """``python -m hftlight.defenses.cards`` prints both."""
    assert overview() in README
    assert markdown() in README
