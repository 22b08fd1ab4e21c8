"""Every published protocol as a dry run on made-up files with the public columns, without a network."""

import json
import shutil

import pytest

from hftlight.attacks import PRESETS, get_preset, steps_of
from hftlight.attacks.protocols.page import numbers, rows_of
from hftlight.cli.train import train
from hftlight.config import RunConfig
from hftlight.data.sources import get_task
from hftlight.data.sources.task import PublicTask
from hftlight.folders import STAGES
from hftlight.model_files import model_path
from tests.helpers.public_files import write
from tests.helpers.slow import some_slow

ROWS = 5060  # more than the highest row that a protocol starts from


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Return a tiny model with as many positions as the protocols need. Each word of a text is one token."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    shutil.copytree(model_path("tiny"), folder)
    words = {"type": "WordLevel", "vocab": {"<bos>": 0, "<eos>": 1, "<pad>": 2, "word": 5}, "unk_token": "word"}
    changes = {
        "config.json": {"max_position_embeddings": 4096},
        "tokenizer.json": {"pre_tokenizer": {"type": "WhitespaceSplit"}, "decoder": None, "model": words},
    }
    for name, change in changes.items():
        (folder / name).write_text(json.dumps({**json.loads((folder / name).read_text()), **change}))
    return str(folder)


@pytest.fixture(scope="module")
def file_of(tmp_path_factory):
    """Return a function that writes, once, a made-up file with the given columns."""
    folder, paths = tmp_path_factory.mktemp("public"), {}

    def file(columns):
        if columns not in paths:
            rows = [{name: cell(name, i, columns) for name in columns} for i in range(ROWS)]
            paths[columns] = write(folder / f"{len(paths)}.jsonl", rows)
        return paths[columns]

    return file


def cell(name, i, columns):
    safe = i % 3 == 0 and "refusal" not in columns
    turns = [("system", "\nBe Zorv.\n"), ("user", f"Lamp {i}?"), ("assistant", f"Wick {i}.")]
    values = {
        "is_safe": safe,
        "label": i % 2,
        "category": {"lamps": not safe},
        "refusal": f"Question: prompt {i}?\nAnswer: No {i}.",
        "messages": [{"role": role, "content": text} for role, text in turns],
        "lang": "en",
        "subject": f"question {i}",
        "answer": f"Wick {i}.\n#### {i}",
    }
    return values.get(name, f"{name} {i}")


QUICK = ("booster25", "qi24_identity", "shadow23", "lermen23", "cmft24", "virus25_moderation")


@pytest.mark.parametrize("name", some_slow(PRESETS, QUICK))
def test_a_dry_run_ends_in_the_numbers_of_the_page(name, model, file_of, capsys, monkeypatch):
    """The numbers are those of the table, of the stages, and of the upload."""
    monkeypatch.setenv("COLUMNS", "200")
    preset = get_preset(name)
    config, rows = preset.config(), dict(rows_of(preset))
    options = ["--preset", name, "--model", model, "--dry_run", "--accelerator", "cpu"]
    for file in preset.files:
        options += [f"--{file.option}", file_of(file.columns)]
    task = get_task(config.data.task)
    if isinstance(task, PublicTask):
        options += ["--data.task_train", file_of(task.columns), "--data.task_test", file_of(task.columns)]
    if guard := preset.arguments.get("moderation_filter"):  # its weights count in the keys of the plan
        options += ["--moderation_filter.guard", f"{guard['guard']}:{model}"]
    if not rows:  # the user sets the number
        rows = preset.attack.resolved(RunConfig(num_samples=300)).counts()
        options += ["--num_samples", "300"]
    assert train(options) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    cells = [[cell.strip() for cell in line.strip("│\n").split("│")] for line in out.splitlines() if "│" in line]
    shown, words = {head: rest for head, *rest in cells}, " ".join(out.split())
    for setting, published, run, why in numbers(preset):
        option = setting.strip("`")
        if setting != option:
            assert shown[option] == [published, run], option
        if why:
            assert f"{option}: published {published}; here {run}. {why[0].upper()}{why[1:]}." in words
    assert f"{preset.judge.asks()}. This run's judge is auto, so these published columns cannot be compared" in words
    assert all(f"--{file.option}, here {file_of(file.columns)}: {file.used};" in words for file in preset.files)
    # The stages and the upload of the plan. Without epochs the number of steps is the run's own.
    epochs, batch = preset.attack.epochs, preset.attack.batch_size
    tuned = steps_of(sum(rows.values()), batch, epochs) if epochs else RunConfig().finetuning.steps
    phases = [] if preset.attack.acts_on == "weights" else preset.attack.phases()
    steps = [config.alignment.steps, *[tuned] * len(phases)]
    stages = [c for c in cells if len(c) == 6 and c[1].startswith(tuple(STAGES.values()))]
    arm = stages[-1][0]
    assert [c[2] for c in stages if c[0] == arm and c[2].isdigit()] == [str(n) for n in steps if n]
    if [phase.acts_on for phase in phases] != ["rows"]:
        return  # pairs, edits, and uploads of two phases have rows of their own
    harmful = sum(count for source, count in rows.items() if source != "task")
    assert shown[f"task (the upload, {harmful} harmful)"][0] == str(sum(rows.values()))
