"""What decides a selection: the adapter's settings for a defense of the adapter slot, and nothing of them otherwise."""

from dataclasses import replace

import pytest

from hftlight.config import Lora
from hftlight.data.world.build import build_world
from hftlight.defenses import CTRL, SAFT, SEAL, SaLoRA
from hftlight.models.serving import Artifact
from hftlight.runs.stages.choice import ChoiceJob, run_choice
from tests.runs.test_run import config


@pytest.mark.parametrize(("defense", "depends"), [(SaLoRA, True), (CTRL, False)], ids=["adapter slot", "data slot"])
@pytest.mark.parametrize("change", [{"r": 3}, {"targets": ["q_proj"]}], ids=str)
def test_the_adapter_decides_a_selection_for_the_adapter_slot(defense, depends, change, tmp_path):
    world = build_world()
    records = {"alignment": world.alignment[:4], "task": world.task_train[:4]}
    settings = config(tmp_path)
    keys = [
        ChoiceJob(replace(settings, lora=lora), Artifact("tiny", "hash"), records, defense()).key()
        for lora in (Lora(), replace(Lora(), **change))
    ]
    assert (keys[0] != keys[1]) == depends


@pytest.mark.parametrize(("defense", "rows"), [(SEAL(), 2), (SAFT(rate=0.1), 7)], ids=["gradients", "states"])
def test_a_selection_with_gradients_takes_the_rows_of_a_training_pass(defense, rows, tmp_path, monkeypatch):
    monkeypatch.setenv("HFTLIGHT_CACHE", str(tmp_path))
    settings = config(tmp_path)
    settings = replace(
        settings,
        finetuning=replace(settings.finetuning, batch_size=2),
        evaluation=replace(settings.evaluation, batch_size=7),
    )
    asked: list[int] = []

    def select(model, tokenizer, template, records, system, batch_size, *more):
        asked.append(batch_size)
        return []

    monkeypatch.setattr(type(defense), "select", staticmethod(select))
    run_choice(ChoiceJob(settings, Artifact.of("tiny"), {"task": []}, defense))
    assert asked == [rows]
