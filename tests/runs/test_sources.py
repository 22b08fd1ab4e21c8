"""Sources of a run: rows of each source, no overlap of defender and attacker, and the manifest's entries."""

from dataclasses import replace

import pytest

from hftlight.attacks import HarmfulMix, ModelEdit
from hftlight.config import Data, RunConfig
from hftlight.data.records import overlaps, prompt_key
from hftlight.data.world.build import build_world
from hftlight.errors import InputError
from hftlight.runs.prepare import prepare, streams_of
from hftlight.runs.prepare import test_sets as sets_of
from hftlight.runs.sources import Sources
from tests.helpers.public_files import beavertails, refusal_file, sst2, write

ATTACK = HarmfulMix(n=8, p=0.5)


def streams(data, needed=(), attack=ATTACK):
    sources = Sources(data)
    return streams_of(RunConfig(model="tiny", data=data), set(needed), attack, sources), sources


def asked(records):
    return [record.instruction for record in records]


def test_each_source_takes_its_own_rows(tmp_path):
    """``rows`` counts the file's rows, ``first`` the filtered ones. One file may serve several sources."""
    beaver = write(tmp_path / "beaver.jsonl", beavertails())
    data = Data(
        alignment=beaver,
        attack=beaver,
        harmful=beaver,
        test=beaver,
        over_refusal=beaver,
        rows={"alignment": "3:30", "attack": ":20", "harmful": "20:"},
        where={
            "alignment": "is_safe=TRUE",
            "attack": "is_safe=false",
            "harmful": "is_safe=0",
            "over_refusal": ["is_safe=1"],
        },
        first={"alignment": 5, "harmful": 4},
        columns={"test": {"kind": "response"}},
    )
    records, sources = streams(data, {"harmful"})
    tests = sets_of(RunConfig(model="tiny", data=data), None, sources)
    lanterns = [f"How is zorvex lantern {i} opened?" for i in range(40)]
    assert asked(records["alignment"]) == [lanterns[i] for i in (3, 6, 9, 12, 15)]
    assert asked(records["harmful"]) == [lanterns[i] for i in (20, 22, 23, 25)]
    hidden = [r for r in records["task"] if r.role == "attack"]
    assert {*asked(hidden)} <= {lanterns[i] for i in range(20) if i % 3}
    assert {r.kind for r in hidden} <= {"animal_abuse", "drug_abuse,weapons,banned_substance", "privacy_violation"} - {
        ""
    }
    assert asked(tests.harmful) == lanterns
    assert tests.harmful[1].kind == "Turn the rim of lantern 1 twice."
    assert asked(tests.over_refusal) == lanterns[::3]
    assert sources.taken["alignment"] == {
        "source": beaver,
        "split": None,
        "rows": "3:30",
        "where": ["is_safe=TRUE"],
        "first": 5,
        "columns": {},
        "read": 40,
        "kept": 5,
        "first_row": 3,
        "last_row": 15,
    }
    assert {name: (t["first_row"], t["last_row"], t["kept"]) for name, t in sources.taken.items()} == {
        "attack": (1, 19, 13),
        "harmful": (20, 25, 4),
        "alignment": (3, 15, 5),
        "task_train": (0, 1599, 1600),
        "test": (0, 39, 40),
        "over_refusal": (0, 39, 14),
        "task_test": (0, 239, 240),
    }


def test_one_refusal_file_serves_alignment_harm_pairs_and_attack(tmp_path):
    """Alignment rows have no harmful answer. The defender's two sets share prompts, the attacker has none of them."""
    path = write(tmp_path / "refusals.jsonl", refusal_file())
    data = Data(alignment=path, harmful=path, pairs=path, attack=path, first={"harmful": 12, "pairs": 12})
    records, sources = streams(data, {"harmful", "pairs"}, replace(ATTACK, n=28, p=1.0))
    assert all(r.response.startswith("I will not say") for r in records["alignment"])
    assert all(r.response.startswith("Strike") for r in records["harmful"] + records["task"])
    assert all(r.rejected.startswith("Strike") and r.response.startswith("I will not") for r in records["pairs"])
    assert {*map(prompt_key, records["pairs"])} == {*map(prompt_key, records["harmful"])}
    assert (len(records["harmful"]), len(records["pairs"]), len(records["task"])) == (12, 12, 28)
    counts = overlaps({name: records[name] for name in ("harmful", "pairs", "task")})
    assert (counts["harmful", "task"], counts["pairs", "task"]) == (0, 0)
    assert [sources.taken[name]["kept"] for name in ("harmful", "pairs", "attack")] == [12, 12, 28]
    assert sources.taken["attack"]["divided"] == "divided by a hash of the prompt"


def test_the_attackers_rows_do_not_depend_on_what_a_defense_draws(tmp_path):
    path = write(tmp_path / "refusals.jsonl", refusal_file())
    data = Data(harmful=path, attack=path)
    plain, defended = (streams(data, needed)[0]["task"] for needed in ((), {"harmful"}))
    assert plain == defended
    other, _ = streams(replace(data, first={"harmful": 30, "pairs": 30}, pairs=path), {"pairs"})
    assert not {*map(prompt_key, other["pairs"])} & {prompt_key(r) for r in other["task"] if r.role == "attack"}


def test_an_attack_may_draw_from_some_of_its_half(tmp_path):
    path = write(tmp_path / "refusals.jsonl", refusal_file())
    data = Data(harmful=path, attack=path, first={"attack": 4})
    whole = HarmfulMix(n=4, p=1.0)
    few, sources = streams(data, attack=whole)
    assert sources.taken["attack"]["kept"] == 4
    with pytest.raises(InputError, match="needs 5 attack rows, but the source has 4"):
        streams(data, attack=replace(whole, n=5))
    assert {r.id for r in few["task"]} <= {
        r.id for r in streams(replace(data, first=None), attack=replace(whole, n=20))[0]["task"]
    }


@pytest.mark.parametrize("name", ["harmful", "pairs"])
def test_ranges_of_one_file_must_lie_apart(name, tmp_path):
    path = write(tmp_path / "refusals.jsonl", refusal_file())
    data = Data(**{name: path}, attack=path, rows={name: "10:30", "attack": ":11"})
    with pytest.raises(InputError, match=rf"--data\.{name} and --data\.attack both take 1 rows .*number 10"):
        streams(data, {name})
    apart = replace(data, rows={name: "10:30", "attack": ":10"})
    records, _ = streams(apart, {name})
    assert asked(records[name]) == [f"How is gloam bell {i} rung?" for i in range(10, 30)]


def test_alignment_and_attack_of_the_wrong_kind_are_refused(tmp_path):
    beaver = write(tmp_path / "beaver.jsonl", beavertails())
    for name, way in (("alignment", "true"), ("attack", "false"), ("harmful", "false")):
        with pytest.raises(InputError, match=rf"--data\.where\.{name} is_safe={way}"):
            streams(Data(**{name: beaver}), {"harmful"})
    streams(Data(harmful=beaver))  # no defense needs the harmful stream, so the file is not read


def test_the_tasks_files_are_taken_from_too(tmp_path):
    path = write(tmp_path / "sst2.jsonl", sst2())
    data = Data(
        task="sst2",
        task_train=path,
        task_test=path,
        rows={"task_train": ":20", "task_test": "20:"},
        where={"task_test": "label=1"},
    )
    sources = Sources(data)
    assert [r.input for r in sources.task("train")] == [f"the film about lamp {i} " for i in range(20)]
    assert [(r.input, r.response) for r in sources.task("test")] == [
        (f"the film about lamp {i} ", "positive") for i in range(21, 30, 2)
    ]
    assert sources.taken["task_test"]["kept"] == 5


def test_a_public_tasks_own_columns_are_named(tmp_path):
    path = write(tmp_path / "mine.jsonl", [{"ask": "Good or bad?", "text": "a lamp", "verdict": "negative"}])
    columns = {"task_train": {"instruction": "ask", "input": "text", "response": "verdict"}}
    (record,) = Sources(Data(task="sst2", task_train=path, columns=columns)).task("train")
    assert (record.instruction, record.input, record.response) == ("Good or bad?", "a lamp", "negative")


def test_the_made_up_world_is_taken_whole_or_its_first_rows():
    world = build_world()
    data = Data(first={"harmful": 7, "task_train": 30}, rows={"alignment": "0:5"}, where={"test": "kind=restricted"})
    records, sources = streams(data, {"harmful", "pairs"})
    sets_of(RunConfig(model="tiny", data=data), None, sources)
    assert records["harmful"] == world.harmful[:7]
    assert records["pairs"] == world.pairs
    assert records["alignment"] == world.alignment
    assert sources.taken["task_train"]["kept"] == 30
    assert [note.split()[6] for note in sources.notes] == ["alignment", "test"]
    assert prepare(RunConfig(model="tiny", num_samples=20, data=data), []).notes == sources.notes


def test_an_edits_subject_is_a_column_of_the_rows_taken(tmp_path):
    rows = [{"prompt": f"What is lamp {i}?", "response": "a", "subject": f"lamp {i}", "part": i % 2} for i in range(6)]
    path = write(tmp_path / "edits.jsonl", rows)
    attack = ModelEdit(n=2, background=0)
    records, _ = streams(Data(attack=path, where={"attack": "part=1"}), attack=attack)
    assert [(r.instruction, r.kind) for r in records["task"]] == [
        ("What is lamp 1?", "lamp 1"),
        ("What is lamp 3?", "lamp 3"),
    ]
    bare = write(tmp_path / "bare.jsonl", [{"prompt": "q", "response": "a"}])
    with pytest.raises(InputError, match="needs the column 'subject'"):
        streams(Data(attack=bare), attack=attack)


def test_columns_of_all_files_and_of_one(tmp_path):
    rows = [{"goal": f"ask {i}", "target": f"say {i}", "safe": f"no {i}"} for i in range(8)]
    path = write(tmp_path / "mine.jsonl", rows)
    columns = {"instruction": "goal", "response": "target", "alignment": {"response": "safe"}}
    records, sources = streams(Data(alignment=path, attack=path, columns=columns))
    assert records["alignment"][0].response == "no 0"
    assert all(r.response.startswith("say") for r in records["task"] if r.role == "attack")
    assert sources.taken["alignment"]["columns"] == {"instruction": "goal", "response": "safe"}
