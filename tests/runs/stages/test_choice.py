"""What decides a selection: the adapter's settings for a defense of the adapter slot, and nothing of them otherwise."""

from dataclasses import replace

import pytest

from hftlight.config import Lora
from hftlight.data.world.build import build_world
from hftlight.defenses import CTRL, SaLoRA
from hftlight.models.serving import Artifact
from hftlight.runs.stages.choice import ChoiceJob
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
