"""Rows for the losses: alignment rows of the stream itself, and harmful rows that are in no stream."""

import json
from dataclasses import replace

import pytest

from hftlight.config import Data, Evaluation, RunConfig
from hftlight.data.records import prompt_key, split_by_hash
from hftlight.data.world.build import build_world
from hftlight.defenses import Booster
from hftlight.runs.prepare import prepare

CONFIG = RunConfig(model="tiny", accelerator="cpu", num_samples=50, harmful_ratio=0.2)


def keys(rows):
    return {prompt_key(row) for row in rows}


def test_harmful_validation_rows_are_in_no_stream():
    prepared = prepare(CONFIG, [Booster()])
    held_out = prepared.tests.validation_rows
    assert len(held_out) == len(prepared.tests.alignment_rows) == 50
    assert keys(held_out) < keys(build_world().attack)
    assert not any(keys(held_out) & keys(rows) for rows in prepared.streams.values())
    assert prepared.tests.alignment_rows == split_by_hash(prepared.streams["alignment"], 50)[0]


def test_a_row_that_the_attack_rewrites_counts_as_uploaded():
    """Encoded prompts differ from the originals, but their rows keep their ids."""
    prepared = prepare(replace(CONFIG, attack="encoded"), [])
    uploaded = {r.id for r in prepared.streams["task"]}
    assert uploaded & {r.id for r in build_world().attack}
    assert not uploaded & {r.id for r in prepared.tests.validation_rows}


@pytest.mark.parametrize(("p", "left"), [(0.0, 12), (0.2, 2), (0.24, 0)])
def test_rows_of_the_users_own_file_that_are_left(tmp_path, p, left):
    """Of twelve attack rows, none, ten or all are uploaded. At p = 0 the file is read only for the loss."""
    attack, prompts = tmp_path / "attack.jsonl", tmp_path / "test.jsonl"
    attack.write_text("".join(json.dumps({"prompt": f"a {i}", "response": "b"}) + "\n" for i in range(12)))
    prompts.write_text(json.dumps({"prompt": "c"}) + "\n")
    config = replace(CONFIG, harmful_ratio=p, data=Data(attack=str(attack), test=str(prompts)))
    prepared = prepare(config, [])
    assert len(prepared.tests.validation_rows) == left
    assert prepared.config_hash != prepare(replace(config, evaluation=Evaluation(loss_rows=1)), []).config_hash
    none = prepare(replace(config, evaluation=Evaluation(loss_rows=0)), []).tests
    assert (none.alignment_rows, none.validation_rows) == ([], [])


def test_the_made_up_worlds_rows_say_nothing_of_the_users_model(tmp_path):
    prompts = tmp_path / "test.jsonl"
    prompts.write_text(json.dumps({"prompt": "c"}) + "\n")
    assert prepare(replace(CONFIG, data=Data(test=str(prompts))), []).tests.validation_rows == []
