"""Tasks by name, a user's file as a task, and the task of the made-up world."""

import json

import pytest

from hftlight.data.records import overlaps
from hftlight.data.sources import TASKS, Task, get_task
from hftlight.data.table import read_table
from hftlight.errors import InputError
from hftlight.take import Take


def write(path, count, answer="yes"):
    path.write_text("\n".join(json.dumps({"prompt": f"q{i}", "response": f"{answer} {i}"}) for i in range(count)))
    return path


@pytest.mark.parametrize("name", TASKS)
def test_every_task_states_its_terms(name):
    task = get_task(name)
    assert isinstance(task, Task)
    assert task.name == name
    assert task.licence
    assert task.max_new_tokens >= 1


def test_an_unknown_task_gets_the_nearest():
    with pytest.raises(InputError, match=r"got 'ag_news'. Did you mean 'agnews'"):
        get_task("ag_news")


def test_one_file_is_split_into_disjoint_training_and_test_rows(tmp_path):
    task = get_task(str(write(tmp_path / "mine.jsonl", 50)))
    train, test = task.records("train"), task.records("test")
    assert (len(train), len(test)) == (40, 10)
    assert overlaps({"train": train, "test": test}) == {("train", "test"): 0}
    assert ({r.role for r in train}, {r.role for r in test}) == ({"task"}, {"test"})


def test_a_folder_or_a_path_given_is_read_whole(tmp_path):
    write(tmp_path / "train.jsonl", 7)
    write(tmp_path / "test.jsonl", 3)
    task = get_task(str(tmp_path))
    assert (len(task.records("train")), len(task.records("test"))) == (7, 3)
    more = write(tmp_path / "more.jsonl", 9)
    assert len(task.records("test", more)) == len(get_task(str(more)).records("test", more)) == 9


def test_own_answers_count_when_they_match_exactly(tmp_path):
    task = get_task(str(write(tmp_path / "mine.jsonl", 50)))
    record = next(r for r in task.records("train") if r.instruction == "q3")
    assert task.correct(" yes 3\n", record)
    assert not task.correct("Yes 3", record)
    assert task.correct_lenient("I say Yes 3!", record)
    assert not task.correct_lenient("yes 4", record)


def test_own_columns_and_wrong_splits(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"goal": "q", "target": "a"}')
    task, take = get_task(str(path)), Take(columns={"instruction": "goal", "response": "target"})
    assert task.records("train", path, lambda *what: read_table(*what, take))[0].response == "a"
    with pytest.raises(InputError, match=r"splits are \['train', 'test'\], got 'dev'"):
        task.records("dev")


def test_the_made_up_task_counts_the_hall_and_nothing_else():
    task = get_task("builtin")
    record = task.records("test")[0]
    other = next(r for r in task.records("test") if r.response != record.response)
    assert task.correct(record.response, record)
    assert not task.correct(other.response, record)
    assert not task.correct(f"Surely {record.response}", record)
    assert task.correct_lenient(f"SURELY {record.response.upper()}", record)
    assert overlaps({s: task.records(s) for s in ("train", "test")}) == {("train", "test"): 0}
    with pytest.raises(InputError, match="got 'validation'"):
        task.records("validation")
    with pytest.raises(InputError, match="read from no file"):
        task.records("train", "x.jsonl")
