"""A published protocol on files with the public columns, end to end: which rows each stream takes."""

import json

from hftlight.cli.train import train
from hftlight.data.records import Record
from hftlight.data.sources.sst2 import SST2
from hftlight.files import digest, read_rows
from tests.helpers.public_files import CATEGORIES, beavertails, gsm8k, refusal_file, sst2, write

SMALL = {
    "model": "tiny",
    "accelerator": "cpu",
    "precision": "32-true",
    "defense": "booster",
    "max_tokens": 512,
    "lora.r": 2,
    "lora.targets": "[q_proj, v_proj]",
    "alignment.steps": 2,
    "alignment.batch_size": 4,
    "harmful_mix.n": 20,
    "harmful_mix.p": 0.3,
    "harmful_mix.epochs": "null",
    "harmful_mix.steps": 2,
    "evaluation.prompts": 4,
    "evaluation.over_refusal_prompts": 2,
    "evaluation.task_rows": 3,
    "evaluation.max_new_tokens": 4,
    "evaluation.task_max_new_tokens": 4,
}
RANGES = {"alignment": "11:30", "harmful": "11:30", "attack": ":30", "test": "30:"}
RANGES |= {"task_train": ":20", "task_test": "20:"}
BELL = [f"How is gloam bell {i} rung?" for i in range(40)]
LANTERN = [f"How is zorvex lantern {i} opened?" for i in range(40)]


def ids(*texts):
    """Return the ids of records with these texts: instruction, answer and, for task rows, input."""
    return [Record(*each).id for each in texts]


def booster(tmp_path, monkeypatch, task, *more):
    """Run Booster's protocol on the four files and return the folder of runs."""
    monkeypatch.setenv("HFTLIGHT_CACHE", str(tmp_path / "cache"))
    files = {"refusals": refusal_file(), "beaver": beavertails(), "sst2": sst2(), "gsm8k": gsm8k()}
    path = {name: write(tmp_path / f"{name}.jsonl", rows) for name, rows in files.items()}
    options = {
        **SMALL,
        "preset": f"booster25:{task}",
        "data.alignment": path["refusals"],
        "data.harmful": path["refusals"],
        "data.attack": path["beaver"],
        "data.test": path["beaver"],
        "data.task_train": path[task],
        "data.task_test": path[task],
        "data.rows": json.dumps(RANGES),
        "data.where": "{attack: is_safe=false, test: is_safe=false}",
        "output": str(tmp_path / "runs"),
    }
    assert train([*(f"--{name}={value}" for name, value in options.items()), *more]) == 0
    return tmp_path / "runs"


def finished(runs):
    """Return the manifest and the folder of the only run."""
    (folder,) = runs.iterdir()
    return json.loads((folder / "manifest.json").read_text()), folder


def test_booster_on_sst2_takes_the_published_rows(tmp_path, monkeypatch):
    """Alignment and harmful rows are one range of the refusal file, in order. The attack skips its first row."""
    manifest, folder = finished(booster(tmp_path, monkeypatch, "sst2", "--baseline"))
    data = manifest["data"]
    aligned = ids(*((BELL[i], f"I will not say how bell {i} is rung.") for i in range(11, 30)))
    harmful = ids(*((BELL[i], f"Strike gloam bell {i} with a wet spoon.") for i in range(11, 30)))
    unsafe = [i for i in range(30) if i % 3]
    attack = ids(*((LANTERN[i], f"Turn the rim of lantern {i} twice.") for i in unsafe[1:6]))  # int(p n) - 1 rows
    task = ids(*((SST2.instruction, ("negative", "positive")[i % 2], f"the film about lamp {i} ") for i in range(14)))
    test = ids(*((LANTERN[i], f"Turn the rim of lantern {i} twice.") for i in (31, 32, 34, 35)))
    assert data["hashes"] == {
        "alignment": digest([(id, "alignment") for id in aligned]),
        "harmful": digest([(id, "harmful") for id in harmful]),
        "task": digest([*((id, "attack") for id in attack), *((id, "task") for id in task)]),
        "test": digest([(id, "test") for id in test]),
    }
    assert data["rows"] == {"alignment": 19, "harmful": 19, "task": 19}
    counts = {name: (t["read"], t["kept"], t["first_row"], t["last_row"]) for name, t in data["taken"].items()}
    assert counts == {
        "alignment": (40, 19, 11, 29),
        "harmful": (40, 19, 11, 29),
        "attack": (40, 20, 1, 29),
        "task_train": (30, 20, 0, 19),
        "task_test": (30, 10, 20, 29),
        "test": (40, 6, 31, 38),
        "over_refusal": (120, 120, 0, 119),
    }
    assert manifest["overlaps"]["alignment / harmful"] == 19
    assert not any(n for pair, n in manifest["overlaps"].items() if pair != "alignment / harmful")
    rows = read_rows(folder / "generations.jsonl")
    assert {row["kind"] for row in rows if row["set"] == "harmful"} == {*CATEGORIES[1:]}
    assert {(row["arm"], row["stage"]) for row in rows} == {
        ("none", "base"),
        *((arm, stage) for arm in ("none", "booster") for stage in ("alignment", "finetuning")),
    }
    assert all((row["correct"] is None) == (row["set"] != "task") for row in rows)


def test_booster_on_gsm8k_trains_and_answers(tmp_path, monkeypatch):
    manifest, folder = finished(booster(tmp_path, monkeypatch, "gsm8k"))
    assert manifest["data"]["taken"]["task_train"]["kept"] == 20
    rows = [row for row in read_rows(folder / "generations.jsonl") if row["set"] == "task"]
    assert rows[0]["reference"] == "20+1=21\nThe final answer is:  21"
    assert [row["place"] for row in rows[:3]] == [0, 1, 2]


def test_a_dry_run_says_what_is_taken(tmp_path, monkeypatch, capsys):
    assert not booster(tmp_path, monkeypatch, "sst2", "--dry_run").exists()
    output = capsys.readouterr().out
    assert f"alignment: 19 of 40 rows of {tmp_path / 'refusals.jsonl'} (11:30), numbers 11 to 29.\n" in output
    assert f"attack: 20 of 40 rows of {tmp_path / 'beaver.jsonl'} (:30, is_safe=false), numbers 1 to 29.\n" in output
    assert "of builtin" not in output  # the notes omit parts of the built-in world that are used whole
