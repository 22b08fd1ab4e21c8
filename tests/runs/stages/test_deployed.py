"""What a defense keeps beside a trained model, the repair that deploys it, and models that a run trains for repairs."""

import json
from io import StringIO

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch.testing import assert_close

from hftlight import run
from hftlight.attacks import HarmfulMix
from hftlight.config import Training
from hftlight.defenses import Panacea
from hftlight.engine import Stage
from hftlight.engine.weights.repair import Repair
from hftlight.engine.weights.stored import displacement
from hftlight.files import read_rows
from hftlight.models.serving import Artifact
from hftlight.runs.plan import plan
from hftlight.runs.prepare import prepare
from hftlight.runs.show import show_plan
from hftlight.runs.stages import train as stage_module
from hftlight.runs.stages.attacker import Attacker
from hftlight.runs.stages.repair import RepairJob, run_repair
from hftlight.runs.stages.train import KEPT, StageJob, auxiliary_job, read_kept, run_stage
from hftlight.search.space import Trial
from tests.helpers.jobs import rows, small_config
from tests.helpers.slow import some_slow
from tests.runs.stages.test_repair import EXACT, KINDS, Killed, merged
from tests.runs.test_run import config

TASK, HARMFUL, ALIGNMENT = rows(4, "task"), rows(5, "harmful"), rows(5, "alignment")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HFTLIGHT_CACHE", str(tmp_path / "cache"))


class Unlearn(Repair):
    """Subtract the way to the unaligned model."""

    needs = ("unaligned",)

    def __init__(self, unaligned=None):
        super().__init__(unaligned=unaligned)
        self.moved = {}

    def edit(self, subject):
        from hftlight.engine.weights.lora import lora_updates

        for name, update in lora_updates(subject.model).items():
            way = displacement(subject.unaligned, subject.aligned, name)
            self.moved[name] = float(way.squared_norm())
            update.b.mul_(0.5)
        subject.report["changed_entries"] = 1


@pytest.mark.parametrize("kind", some_slow(EXACT, ["continue"]))
def test_the_deployed_model_is_the_trained_one_plus_the_shift(kind, monkeypatch):
    """The expected update is s ((B + b)(A + a) - B A), with the trained factors B, A and the kept direction."""
    states, original = [], stage_module.full_state
    monkeypatch.setattr(stage_module, "full_state", lambda model: states.append(original(model)) or states[-1])
    settings = small_config(training=Training(steps=3, batch_size=2, lr=1e-2), **KINDS[kind])
    one = StageJob(Stage.ALIGNMENT, settings, "tiny", None, {"alignment": ALIGNMENT}, [])
    run_stage(one)
    records = {"task": TASK, "harmful": HARMFUL}
    two = StageJob(Stage.FINETUNING, settings, "tiny", one.artifact(), records, [Panacea(0.5, 0.0)])
    run_stage(two)
    defense = Panacea(0.5, 0.0)
    read_kept(two.place(), defense)
    repair = RepairJob(settings, "tiny", one.artifact(), two.artifact(), {}, [defense.deployment()])
    run_repair(repair)
    tuned, deployed, state = merged(two.place()), merged(repair.place()), states[-1]
    length = 0.0
    for name, before in tuned.items():
        stem, moved = f"base_model.model.{name.removesuffix('.weight')}", deployed[name] - before
        if kind == "full":
            direction = defense.kept.get(name)
            expected = torch.zeros_like(before) if direction is None else 0.5 * direction.double()
            length += float(expected.square().sum())
        elif f"{name} (A)" in defense.kept:
            a, b = (state[f"{stem}.lora_{k}.weight"].double() for k in "AB")
            da, db = (0.5 * defense.kept[f"{name} ({k})"].double() for k in "AB")
            expected = (2 * b + db) @ (a + da) - 2 * b @ a  # alpha / r is 2, and B is kept times the scale
            length += float(da.square().sum() + (db / 2).square().sum())
        else:
            expected = torch.zeros_like(before)
        assert_close(moved, expected, rtol=0, atol=1e-6)
    assert length**0.5 == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("refresh", some_slow([0, 2], [2]))
def test_a_training_that_is_killed_after_its_last_step_keeps_the_same(monkeypatch, tmp_path, refresh):
    records = {"task": TASK, "harmful": HARMFUL}

    def kept(steps):
        settings = small_config(training=Training(steps=3, batch_size=2, lr=1e-2))
        job = StageJob(Stage.FINETUNING, settings, "tiny", None, records, [Panacea(0.5, 0.1, refresh=refresh)])
        for step in steps:

            def die(done, loss, step=step):
                if done == step:
                    raise Killed

            with pytest.raises(Killed):
                run_stage(job, on_step=die)
        if not steps:
            run_stage(job)
        return job

    whole = kept([])
    before = load_file(whole.place() / KEPT / "panacea.safetensors")
    monkeypatch.setenv("HFTLIGHT_CACHE", str(tmp_path / "other"))
    job = kept([2])
    monkeypatch.setattr(stage_module, "save_artifact", lambda *a, **k: (_ for _ in ()).throw(Killed()))
    with pytest.raises(Killed):
        run_stage(job)  # trains to the end and dies before the artifact
    monkeypatch.undo()
    monkeypatch.setenv("HFTLIGHT_CACHE", str(tmp_path / "other"))
    run_stage(job)
    after = load_file(job.place() / KEPT / "panacea.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.slow
def test_a_run_measures_the_trained_model_and_the_deployed_one(tmp_path):
    result = run(config(tmp_path, baseline=False), [Panacea(0.5, 0.1)])
    stages = {row["stage"] for row in read_rows(result.folder / "metrics.jsonl") if row["kind"] == "score"}
    assert {"finetuning", "post_finetuning"} <= stages
    assert (result.folder / "panacea" / "finetuned" / KEPT / "panacea.safetensors").is_file()
    stage = json.loads((result.folder / "manifest.json").read_text())["arms"]["panacea"]["stages"]["post_finetuning"]
    (report,) = stage["defenses"].values()
    assert report["repair"] == "Shift"
    assert report["length"] == 0.5
    # Another length takes the trained model from the cache, and has a folder of its own.
    other = run(config(tmp_path, baseline=False), [Panacea(0.5, 0.1, deployed=0.25)])
    assert other.folder != result.folder
    keys = [
        json.loads((folder / "manifest.json").read_text())["arms"]["panacea"]["stages"]
        for folder in (result.folder, other.folder)
    ]
    assert keys[0]["finetuning"]["key"] == keys[1]["finetuning"]["key"]
    assert keys[0]["post_finetuning"]["key"] != keys[1]["post_finetuning"]["key"]


def test_a_run_trains_the_unaligned_model_that_a_repair_needs(tmp_path):
    values = config(tmp_path, baseline=False)
    labels = [step.label for step in plan(prepare(values, [Unlearn()]))]
    assert sum("unaligned model for the repair" in label for label in labels) == 1
    assert labels.index(next(s for s in labels if "unaligned model" in s)) < next(
        i for i, s in enumerate(labels) if s.endswith("repaired")
    )
    console = Console(file=StringIO(), width=120)
    show_plan(prepare(values, [Unlearn()]), in_full=True, console=console)
    assert "unaligned model" in console.file.getvalue()
    repair = Unlearn()
    run(values, [repair])
    assert repair.moved
    assert all(value > 0 for value in repair.moved.values())
    folders = [p for p in (tmp_path / "cache" / "stages").iterdir() if p.name.startswith("finetuning")]
    assert len(folders) == 2
    # A named folder replaces the training.
    (aligned,) = (p for p in (tmp_path / "cache" / "stages").iterdir() if p.name.startswith("alignment"))
    named = [step.label for step in plan(prepare(values, [Unlearn(str(aligned / "artifact"))]))]
    assert not any("unaligned model" in label for label in named)


@pytest.mark.slow
def test_trials_deploy_their_own_shift_and_compare_with_one_unaligned_model(tmp_path):
    values = config(tmp_path)
    aligned = Artifact.of(run(values).folder / "none" / "aligned")
    trial = Trial(3, 1e-2, 2, 20, 0.2)

    def trained(defenses):
        attacker = Attacker(values, defenses, aligned, HarmfulMix().resolved(values))
        before = attacker.settings()
        tensors = attacker.trained(trial)[0].tensors
        assert attacker.settings() == before
        return tensors

    plain, shifted = trained([Panacea(0.5, 0.0, deployed=0.0)]), trained([Panacea(0.5, 0.0)])
    assert any(not torch.equal(plain[name], shifted[name]) for name in plain)
    repair = Unlearn()
    trained([repair])
    assert repair.moved


def test_a_model_that_came_aligned_is_the_base_of_the_unaligned_one():
    """With a parent, the new adapter would be stacked on an adapter that the base does not have."""
    artifact = Artifact("tiny", "hash")
    aligned, came = (small_config(alignment=Training(steps=steps)) for steps in (3, 0))
    assert auxiliary_job(aligned, "tiny", artifact, HARMFUL).parent is artifact
    assert auxiliary_job(came, "tiny", artifact, HARMFUL).parent is None
