"""``hftlight reproduce``: its arguments, its check of the files, and a small table from end to end."""

import json
import re
import subprocess
import sys

import pytest

from hftlight.attacks import get_preset
from hftlight.cli.reproduce import reproduce
from hftlight.comparison.reproduction import show
from tests.helpers import warm
from tests.helpers.public_files import beavertails, refusal_file, sst2, write

OPTIONS = {
    "model": "tiny", "accelerator": "cpu", "precision": "32-true", "max_tokens": 400, "num_samples": 20,
    "alignment.steps": 2, "harmful_mix.epochs": 1, "evaluation.prompts": 4, "evaluation.task_rows": 4,
    "evaluation.max_new_tokens": 2, "evaluation.task_max_new_tokens": 2, "evaluation.over_refusal_prompts": 2,
    "evaluation.loss_rows": 2, "evaluation.judge": "keyword", "data.rows.alignment": "40:80",
    "data.rows.harmful": "40:80", "data.rows.attack": "0:40",
}  # fmt: skip
SMALL = [word for option, value in OPTIONS.items() for word in (f"--{option}", str(value))]


@pytest.fixture(autouse=True)
def no_judge_models(monkeypatch):
    """Hide a copy of the paper's judge that this machine may have."""
    monkeypatch.setattr("hftlight.comparison.reproduction.inputs.judge_here", lambda name: name == "keyword")


@pytest.fixture
def asked(monkeypatch):
    """Record the reproductions that the command line asks for, without running one."""
    found = []
    monkeypatch.setattr(show, "reproduce_and_show", lambda of, **how: found.append((of, how)))
    return found


@pytest.fixture
def files(tmp_path):
    """Return the options of made-up files with the public columns."""
    paths = {
        "alignment": write(tmp_path / "refusals.jsonl", refusal_file(80)),
        "test": write(tmp_path / "test.jsonl", beavertails(20)),
        "task_train": write(tmp_path / "train.jsonl", sst2(40)),
        "task_test": write(tmp_path / "validation.jsonl", sst2(10)),
    }
    return [word for name, path in paths.items() for word in (f"--data.{name}", path)]


def told(capsys, stream="err"):
    return " ".join(getattr(capsys.readouterr(), stream).split())


@pytest.mark.parametrize("words", [[], ["booster25"], ["antidote25:gsm8k"]])
def test_help_answers_without_torch(words):
    code = (
        f"import sys; sys.argv = ['reproduce.py', *{words}, '--help']\n"
        "from hftlight.cli.reproduce import reproduce\n"
        "try:\n    reproduce()\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "assert 'torch' not in sys.modules and 'lightning' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 120
    shown = ("'Table 1'", "0.15", "[1000]") if words == ["booster25"] else ("--values", "--data.alignment")
    assert all(word in done.stdout for word in shown)


def test_the_paper_is_the_default(asked):
    assert reproduce(["booster25:sst2"]) == 0
    ((of, how),) = asked
    (part,) = of.parts
    assert (part.config.model, part.grid.seeds, part.grid.harmful_ratios) == (
        "meta-llama/Llama-2-7b-hf",
        1,
        (0.0, 0.05, 0.1, 0.15, 0.2),
    )
    protocol = get_preset("booster25").config()
    assert part.grid.attack("harmful_mix").applied(part.config).finetuning == protocol.finetuning
    assert (part.config.alignment, part.config.lora) == (protocol.alignment, protocol.lora)
    assert part.config.data.rows == {**protocol.data.rows, "pairs": "5001:10000"}
    assert {arm: part.config.protocol_of(arm) for arm in part.grid.defenses} == {
        **dict.fromkeys(("none", "lisa", "repnoise", "vaccine"), "merge"),
        "booster": "continue",
    }
    assert (part.grid.arguments["vaccine"]["rho"], part.grid.arguments["lisa"]["proximal"]) == (2.0, 0.01)
    assert of.departures == ()
    assert of.folder.name == "booster25-sst2-Table_1"
    assert how["dry_run"] is False


def test_overrides_are_departures_and_choices_of_cells_are_not(asked):
    argv = ["--arms", "booster", "none", "--values", "0.10", "0", "--seeds", "3", "--booster.lam", "20"]
    assert reproduce(["booster25", *argv, "--model", "tiny", "--data.rows.attack", "0:9", "--accelerator", "cpu"]) == 0
    ((of, _),) = asked
    assert (of.arms, of.values) == (("none", "booster"), (0.0, 0.1))
    assert {d.option: (d.published, d.here) for d in of.departures} == {
        "model": ("meta-llama/Llama-2-7b-hf", "tiny"),
        "data.rows.attack": ("0:5000", "0:9"),
        "booster.lam": (5.0, 20.0),
    }
    assert of.parts[0].config.data.rows["alignment"] == "5001:10000"
    assert set(of.uncompared) == {"harmful_score"}


@pytest.mark.parametrize(
    ("word", "table", "varied"),
    [
        ("antidote25", "learning rates", [(1e-7, 1e-7, 20), (1e-3, 1e-3, 20)]),
        ("antidote25:gsm8k", "epochs", [(1, 1e-4, 1), (40, 1e-4, 40)]),
        ("repnoise24", "1000 rows", [(3e-5, 3e-5, 1), (6e-5, 6e-5, 1)]),
    ],
)
def test_a_value_that_is_no_harmful_ratio_has_a_comparison_of_its_own(asked, word, table, varied):
    values = [str(value) for value, *_ in varied]
    assert reproduce([word, "--table", table, "--arms", "none", "--values", *values]) == 0
    ((of, _),) = asked
    settings = []
    for part in of.parts:
        attack = part.grid.attack(part.grid.attacks[0])
        settings.append((part.values[0], attack.applied(part.config).finetuning.lr, attack.epochs))
    assert settings == varied
    assert len({part.folder for part in of.parts}) == len(of.parts)
    assert of.departures == ()


def test_models_tasks_and_arguments_vary(asked):
    none = ["--arms", "none"]
    assert reproduce(["booster25", "--table", "models", *none, "--values", "google/gemma-2-9b"]) == 0
    assert reproduce(["booster25", "--table", "tasks", *none, "--values", "agnews", "gsm8k"]) == 0
    assert reproduce(["booster25:gsm8k", *none]) == 0
    assert reproduce(["antidote25", "--table", "mask_ratios", "--values", "0.01", "0.25"]) == 0
    models, tasks, gsm8k, masks = (of for of, _ in asked)
    assert [p.config.model for p in models.parts] == ["google/gemma-2-9b"]
    assert [(p.grid.tasks, p.grid.harmful_ratios) for p in tasks.parts] == [(("agnews",), (0.1,)), (("gsm8k",), (0.1,))]
    assert gsm8k.values == ("gsm8k",)
    assert [p.grid.arguments["antidote"]["prune_ratio"] for p in masks.parts] == [0.01, 0.25]
    assert not any(of.departures for of, _ in asked)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], r"name a protocol, such as booster25:sst2\. Protocols are booster25, vaccine24"),
        (["boster25"], r"got 'boster25'\. Did you mean 'booster25'"),
        (["lisa24"], "no table of its paper is known here"),
        (["booster25", "--table", "Table 9"], r"--table: booster25 has 'Table 1'"),
        (["booster25", "--arms", "kl"], r"--arms: the table has none, lisa, .*, got 'kl'"),
        (["booster25", "--values", "0.3"], r"--values: the table has p = 0\.0, .*, got '0\.3'"),
        (["booster25", "--finetuning.steps", "5"], r"no effect here.* Use --harmful_mix\.epochs"),
        (["booster25", "--booster.lamb", "5"], r"no option --booster\.lamb\. Did you mean --booster\.lam"),
        (["booster25", "--evaluation.prompts", "-1"], r"--evaluation\.prompts must be >= 0"),
    ],
)
def test_what_cannot_be_asked_for_is_named(argv, message, capsys):
    assert reproduce(argv) == 2
    assert re.search(message, told(capsys))


def test_a_configuration_may_hold_the_options(asked, tmp_path):
    (tmp_path / "own.yaml").write_text(
        "model: tiny\ndata: {task: sst2, alignment: a.json}\narms: [none]\nattack: encoded\n"
    )
    assert reproduce(["booster25", "--config", str(tmp_path / "own.yaml")]) == 0
    ((of, _),) = asked
    (part,) = of.parts
    assert (of.arms, part.config.data.alignment, part.config.data.attack) == (("none",), "a.json", "a.json")
    assert (part.grid.attacks, part.grid.tasks) == (("harmful_mix",), ("sst2",))


def test_every_missing_file_is_named_at_once_with_its_origin(capsys):
    assert reproduce(["booster25", "--model", "tiny", "--dry_run"]) == 2
    output = capsys.readouterr()
    shown = " ".join(output.err.split())
    assert "2 inputs are missing or wrong" in shown
    assert all(f"--data.{source} (" in shown for source in ("alignment", "harmful", "pairs", "attack", "test"))
    assert "domenicrosati/representation-noising" in shown
    assert "split 30k_test: PKU-Alignment/BeaverTails, columns prompt, response, category, is_safe" in shown
    plan = " ".join(output.out.split())
    assert "booster lam 5, alpha 0.1 continue 10000 2000" in plan
    assert "Harmful score % is not compared: the paper's judge is moderation, and this run has keyword" in plan


def test_too_few_rows_and_a_missing_column_are_named_with_the_way_out(files, tmp_path, capsys):
    bad = write(tmp_path / "bad.jsonl", [{"text": "no such column"}])
    argv = ["booster25", *files, "--model", "tiny", "--dry_run", "--data.task_test", bad]
    assert reproduce(argv) == 2
    shown = told(capsys)
    for words in (
        "7 inputs are missing or wrong",
        "the protocol takes 4999 rows in the range 5001:10000, and the file has 0 of them (80 rows in all)",
        "--data.rows.alignment 0:80",
        "refusals.jsonl: the protocol takes 200 rows in the range 0:5000, and the file has 80 of them",
        "the protocol takes 1000 rows with is_safe=false, and the file has 13 of them (20 rows in all)",
        "--evaluation.prompts 13",
        "train.jsonl: the protocol takes 1000 rows, and the file has 40 of them",
        "a smaller --num_samples",
        "needs the columns instruction, input and output, or sentence and label; it has ['text']",
    ):
        assert words in shown


def test_a_dry_run_does_not_read_the_hub(files, capsys, monkeypatch):
    monkeypatch.setattr("hftlight.data.table._read_hub", lambda *_: pytest.fail("the hub was read"))
    argv = [*files[:4], *SMALL, "--data.test", "PKU-Alignment/BeaverTails", "--arms", "none", "--values", "0.1"]
    assert reproduce(["booster25", *argv, "--dry_run"]) == 0
    shown = told(capsys, "out")
    assert "On the hub, and not read here: --data.test PKU-Alignment/BeaverTails, --data.task_train" in shown
    assert "1 cell. The time is unknown" in shown


@pytest.mark.slow
def test_a_small_table_from_end_to_end(files, tmp_path, monkeypatch):
    """Made-up files with the public columns. A second command finds every cell finished, and a third only reports."""
    monkeypatch.setenv("HFTLIGHT_CACHE", str(tmp_path / "cache"))
    argv = ["-m", "hftlight", "reproduce", "booster25:sst2", *files, *SMALL, "--output", str(tmp_path)]
    argv += ["--arms", "none", "booster", "--values", "0.2"]
    first = warm.run(argv, timeout=300)
    assert first.returncode == 0, first.stderr[-2000:]
    assert "2 cells, 2 to run" in first.stdout
    folder = tmp_path / "booster25-sst2-Table_1"
    known = json.loads((folder / "reproduction.json").read_text())
    assert known["verdict"].startswith("Not the paper's setting")
    assert known["missing"] == {}
    accuracy = [cell for cell in known["cells"] if cell["metric"] == "finetune_accuracy" and cell["value"] != "average"]
    assert [(c["arm"], c["value"], c["paper"]) for c in accuracy] == [
        ("none", 0.2, 92.89),
        ("booster", 0.2, 93.35),
    ]
    for cell in accuracy:
        assert cell["difference"] == pytest.approx(cell["ours"]["mean"] - cell["paper"])
    assert {cell["ours"] is None for cell in known["cells"] if cell["metric"] == "harmful_score"} == {True}
    manifests = {path.parent.name: json.loads(path.read_text()) for path in folder.glob("cells/*/manifest.json")}
    # int(0.2 * 20) - 1 harmful rows and int(0.8 * 20) task rows.
    assert manifests["booster-sst2-p0.2-s0"]["data"]["trained_on"]["attack_rows"] == 3
    again = warm.run(argv, timeout=300)
    assert "2 cells, 0 to run" in again.stdout
    (folder / "cells" / "none-sst2-p0.2-s0" / "manifest.json").unlink()
    report = warm.run([*argv, "--report_only"], timeout=300)
    assert report.returncode == 0, report.stderr[-2000:]
    known = json.loads((folder / "reproduction.json").read_text())
    assert list(known["missing"]) == ["none-sst2-p0.2-s0"]
    for name in ("reproduction.md", "reproduction.html", "report.html", "leaderboard.md"):
        assert (folder / name).is_file()
