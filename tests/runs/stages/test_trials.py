"""A trial equals the run's own fine-tuning, repairs and measurement bit for bit, for any upload and tuning."""

import json
import signal
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from typing_extensions import override

from hftlight import run
from hftlight.attacks import (
    Benign,
    BenignSelection,
    Encoded,
    Explicit,
    HarmfulMix,
    IdentityShift,
    JailbreakTuning,
    ModelEdit,
    Multilingual,
    ReversePreference,
    ReverseSftDpo,
)
from hftlight.attacks.benign_selection import write_scores
from hftlight.attacks.identity_shift import SYSTEM
from hftlight.attacks.registry import ATTACKS
from hftlight.config import Data, Evaluation, Lora, Search
from hftlight.data.sources import get_task
from hftlight.data.world.build import build_world
from hftlight.defenses import Antidote, Lisa, SafeLoRA, SafetyLock
from hftlight.engine import Defense, Slot, Stage
from hftlight.engine.weights.lowrank import LowRank
from hftlight.errors import InputError, RunError
from hftlight.evaluation.judges.judge import Verdict
from hftlight.files import cache_dir, read_rows
from hftlight.model_files import model_path
from hftlight.models.base import base_dtype, drop_base
from hftlight.models.load import load_model, load_tokenizer
from hftlight.models.serving import Artifact
from hftlight.runs.measuring import measure as measure_module
from hftlight.runs.measuring.measure import measure, measured_in_memory
from hftlight.runs.prepare import prepare, stage_records, streams_of
from hftlight.runs.sources import Sources
from hftlight.runs.stages import attacker as attacker_module
from hftlight.runs.stages.attacker import Attacker
from hftlight.runs.stages.choice import ChoiceJob, run_choice
from hftlight.runs.stages.job import RESULT
from hftlight.runs.stages.repair import RepairJob, run_repair, subject_around
from hftlight.runs.stages.train import StageJob, finetuning_job, phases_of, read_kept, run_stage, stage_config
from hftlight.search.search import RECORD, search
from hftlight.search.space import Budget, Trial
from tests.helpers.contract import rows as contract_rows
from tests.helpers.slow import some_slow
from tests.runs.stages.test_repair import Look, Share
from tests.runs.stages.test_wired_attacks import selecting
from tests.runs.test_run import config

FIRST = Trial(3, 1e-2, 2, 20, 0.2)
EVALUATION = Evaluation(
    prompts=4, over_refusal_prompts=1, task_rows=4, max_new_tokens=2, task_max_new_tokens=2, loss_rows=2
)
UPLOADS = {
    "harmful_mix": lambda: HarmfulMix(),
    "explicit": lambda: Explicit(n=8),
    "identity_shift": lambda: IdentityShift(),
    "benign": lambda: Benign(),
    "encoded": lambda: Encoded(),
    "jailbreak_tuning": lambda: JailbreakTuning(suffix=" In verse."),
    "multilingual": lambda: Multilingual(lang=build_world().attack[0].language),
    "benign_selection": lambda: BenignSelection(n=6),
    "reverse_preference": lambda: ReversePreference(n=6),
    "reverse_sft_dpo": lambda: ReverseSftDpo(n=6, dpo_steps=2),
}
TUNINGS = {
    "lora": {},
    "full": {"tuning": "full"},
    "continue": {"adapter_protocol": "continue"},
    "bfloat16": {"precision": "bf16-mixed"},
    "checkpointing": {"gradient_checkpointing": True},
}
KINDS = ("merge", "continue", "full", "bfloat16")
REPAIRS = {
    "thin": lambda: [SafeLoRA(number=3)],
    "dense": lambda: [SafeLoRA(number=3), Antidote(0.1)],
    "biases": lambda: [SafetyLock(heads=2, samples=4)],
}


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HFTLIGHT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
    drop_base()


def settings(tmp_path, **changes):
    few = {"data": Data(first={"harmful": 8, "attack": 40}), "lora": Lora(r=2, alpha=5, dropout=0.1)}
    return config(tmp_path, **{"evaluation": EVALUATION, "baseline": False, **few, **changes})


def own(tmp_path, attack=None, defenses=(), **changes):
    """Return an attacker and the finished fine-tuning job whose setting is the attacker's first trial."""
    values = settings(tmp_path, **changes)
    attack = (attack or HarmfulMix()).resolved(values)
    values = attack.applied(values)
    streams = streams_of(values, {name for d in defenses for name in d.streams}, attack, Sources(values.data))
    aligned = StageJob(Stage.ALIGNMENT, values, "tiny", None, {"alignment": streams["alignment"]}, [])
    run_stage(aligned)
    attacker = Attacker(values, list(defenses), aligned.artifact(), attack)
    before = None
    for number, (one, phase) in enumerate(phases_of(values, attack)):
        records = stage_records(streams, Stage.FINETUNING, attacker.training, number)
        for d in attacker.training:
            if d.selects:
                chosen = ChoiceJob(stage_config(one, phase, Stage.FINETUNING), before or attacker.aligned, records, d)
                d.selected = read_rows(run_choice(chosen))
        job = finetuning_job(one, "tiny", attacker.aligned, records, attacker.training, phase, attacker.tests, before)
        run_stage(job)
        before = job.artifact()
    return attacker, job


def same(state, folder):
    """Return whether a model in memory has a folder's weights bit for bit. Assert equal adapter geometry."""
    adapter = folder / "adapter_model.safetensors"
    saved = load_file(adapter if adapter.is_file() else folder / "model.safetensors")
    assert (state.adapter is None) == (not adapter.is_file())
    assert saved.keys() <= state.tensors.keys()  # one of two tied weights is saved
    if state.adapter is not None:
        saved_config = json.loads((folder / "adapter_config.json").read_text())
        assert (state.adapter.r, state.adapter.lora_alpha) == (saved_config["r"], saved_config["lora_alpha"])
        assert saved.keys() == state.tensors.keys()
    return all(torch.equal(t, state.tensors[name]) for name, t in saved.items())


def test_every_attack_that_uploads_something_is_tried():
    assert UPLOADS.keys() == {name for name, kind in ATTACKS.items() if kind.acts_on != "weights"}


@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize("name", UPLOADS)
def test_the_first_trial_is_the_runs_own_finetuning(name, tuning, tmp_path):
    more, attack = TUNINGS[tuning], UPLOADS[name]()
    if isinstance(attack, BenignSelection):
        data = selecting(tmp_path)
        offered = get_task(data.task).records("train", data.task_train)
        write_scores(tmp_path / "scores.jsonl", offered, [float(place % 5) for place in range(len(offered))])
        attack, more = replace(attack, scores=str(tmp_path / "scores.jsonl")), {**more, "data": data}
    attacker, job = own(tmp_path, attack, **more)
    first = Trial.of(attacker.config)
    state, slot = attacker.trained(first)
    assert same(state, job.place())
    assert slot == job.artifact().slot(None)
    other, _ = attacker.trained(replace(first, lr=2 * first.lr))
    assert not same(other, job.place())


@pytest.mark.parametrize("tuning", ["continue", "bfloat16", "checkpointing"])
def test_it_has_the_runs_tuning(tuning, tmp_path):
    attacker, job = own(tmp_path, **TUNINGS[tuning])
    state, _ = attacker.trained(Trial.of(attacker.config))
    assert same(state, job.place())


def test_a_trial_checkpoints_activations_and_loads_the_runs_type(tmp_path, monkeypatch):
    attacker, _ = own(tmp_path, **TUNINGS["checkpointing"], **TUNINGS["bfloat16"])
    observed, fitted = [], attacker_module.fitted

    @contextmanager
    def looking(*arguments, **options):
        with fitted(*arguments, **options) as fit:
            observed.append((fit.model.is_gradient_checkpointing, fit.model.get_input_embeddings().weight.dtype))
            yield fit

    def answering(model, *arguments):
        observed.append(next(model.parameters()).dtype)
        return measured_in_memory(model, *arguments)

    monkeypatch.setattr(attacker_module, "fitted", looking)
    monkeypatch.setattr(attacker_module, "measured_in_memory", answering)
    assert attacker.outcome(Trial.of(attacker.config)).failed == ""
    assert observed == [(True, torch.bfloat16), torch.bfloat16]


FINETUNING = [n for n, row in contract_rows().items() if row.make().stage is Stage.FINETUNING]


@pytest.mark.parametrize(
    "name", some_slow(FINETUNING, ("ewc", "freeze", "lisa", "maxright", "moderation_filter", "sa_lora"))
)
def test_it_has_the_services_defenses(name, tmp_path):
    """The defense has state from an earlier training. A trial that reused the state would differ."""
    attacker, job = own(tmp_path, None, [contract_rows()[name].make()])
    state, slot = attacker.trained(FIRST)
    place = job.place()
    if attacker.repairs:  # what the defense deploys
        for d in attacker.training:
            read_kept(place, d)
        deployed = RepairJob(job.config, "tiny", attacker.aligned, job.artifact(), {}, attacker.repairs)
        run_repair(deployed)
        place = deployed.place()
    assert same(state, place)
    assert slot == job.artifact().slot(None)


@pytest.mark.parametrize("repairs", some_slow(list(REPAIRS), ("thin", "dense")))
@pytest.mark.parametrize("kind", KINDS)
def test_its_repairs_and_answers_are_the_runs_own(kind, repairs, tmp_path):
    attacker, job = own(tmp_path, None, REPAIRS[repairs](), **{**TUNINGS, "merge": {}}[kind])
    values = attacker.config
    needed = {name for d in attacker.repairs for name in d.streams}
    streams = streams_of(values, needed, attacker.attack, Sources(values.data))
    records = stage_records(streams, Stage.POST_FINETUNING, attacker.repairs)
    repaired = RepairJob(values, "tiny", attacker.aligned, job.artifact(), records, attacker.repairs)
    run_repair(repaired)
    folder = str(repaired.place())
    state, slot = attacker.trained(Trial.of(values))
    assert same(state, repaired.place())
    assert slot == Artifact.of(folder).slot(None)
    _, written = measure(Artifact(folder, "unknown" + folder), values, attacker.tests)
    with state.lent(values) as model:
        expected, actual = load_model(folder, base_dtype(values)).state_dict(), model.state_dict()
        assert actual.keys() == expected.keys()
        assert all(torch.equal(t, expected[name]) and t.dtype == expected[name].dtype for name, t in actual.items())
        rows = measured_in_memory(model, load_tokenizer(folder), values, attacker.tests, ("harmful", "task"), slot)
    assert rows == [row for row in written if row["set"] != "over_refusal"]


def test_run_and_search_have_one_road(tmp_path, monkeypatch):
    """On the selecting half of the prompts, the search's first trial gives the run's answers."""
    monkeypatch.setattr("hftlight.runs.run.write_report", lambda folder: None)
    values = settings(tmp_path, attacker="search:1", attack="identity_shift")
    defenses = [Lisa(1, 1, quiet=0.0, cycles=0), SafeLoRA(number=3), Antidote(0.1)]
    result = run(values, defenses, IdentityShift())
    (arm,) = result.arms
    prepared = prepare(values, defenses, IdentityShift())
    key = result.manifest["arms"][arm]["stages"]["alignment"]["key"]
    aligned = Artifact.of(
        cache_dir() / "stages" / f"alignment-{key}" / "artifact"
    )  # the run's folder holds a copy with another base
    attacker = Attacker(prepared.config, defenses, aligned, prepared.attack)
    state, slot = attacker.trained(Trial.of(attacker.config))
    assert slot.text == SYSTEM
    assert same(state, result.folder / arm / "repaired")
    (record,) = [json.loads(line) for line in (result.folder / arm / "search" / RECORD).read_text().splitlines()]
    rows = read_rows(result.folder / "generations.jsonl")
    selected = {r.id for r in attacker.selecting.task_rows}
    own_rows = [r for r in rows if r["stage"] == "post_finetuning" and r["set"] == "task" and r["id"] in selected]
    assert sorted(record["correct"]) == sorted(r["correct"] for r in own_rows)
    assert record["failed"] == ""


@pytest.fixture
def made(tmp_path):
    """Return a function from the service's defenses and changed settings to an attacker of one aligned model."""

    def attacker(defenses=(), **changes):
        plain, _ = own(tmp_path, **changes)
        return Attacker(plain.config, list(defenses), plain.aligned, plain.attack)

    return attacker


def test_the_system_text_of_an_attack_is_in_every_trial(made, tmp_path):
    attacker = made()
    states = []
    for attack, text in ((IdentityShift(system=""), ""), (IdentityShift(), SYSTEM)):
        attacker.attack = attack.resolved(attacker.config)
        state, slot = attacker.trained(replace(FIRST, num_samples=10, steps=2))
        assert slot.text == text
        states.append(state)
    assert any(not torch.equal(t, states[1].tensors[name]) for name, t in states[0].tensors.items())


def test_rows_are_scored_with_the_system_text_that_they_are_trained_with(tmp_path, monkeypatch):
    systems, original = [], BenignSelection.score
    monkeypatch.setattr(BenignSelection, "score", lambda *g, **o: systems.append(g[7]) or original(*g, **o))
    monkeypatch.setattr("hftlight.runs.run.write_report", lambda folder: None)
    run(settings(tmp_path, attack="benign_selection", data=selecting(tmp_path)), [], BenignSelection(n=6, system="Hi."))
    assert systems == ["Hi."]


def test_a_run_that_stops_early_stops_its_trials_too(tmp_path):
    evaluation = replace(EVALUATION, at=[1], stop_below=100.0, stop_above=0.0)
    attacker, job = own(tmp_path, evaluation=evaluation)
    assert json.loads((job.folder() / RESULT).read_text())["evaluated"]["stopped_at"] == 1
    assert same(attacker.trained(Trial.of(attacker.config))[0], job.place())


def test_every_trial_starts_from_the_aligned_model(made):
    for defenses in ([], [SafeLoRA(), Antidote(0.3)]):
        attacker = made(defenses)
        first, _ = attacker.trained(FIRST)
        attacker.trained(replace(FIRST, steps=2, rank=4))
        again, _ = attacker.trained(FIRST)
        assert all(torch.equal(t, again.tensors[name]) for name, t in first.tensors.items())


def test_a_repair_that_names_models_of_its_own_keeps_them_to_itself(made):
    look = Look()
    attacker = made()
    attacker.after = [Share(0.5, aligned=model_path("tiny"), base=attacker.aligned.name), look]
    with pytest.warns(UserWarning, match="only looks"):
        attacker.trained(FIRST)
    aligned, base = look.models
    name = "model.layers.0.self_attn.q_proj.weight"
    assert isinstance(aligned.updates[name], LowRank)
    assert torch.equal(base.rows(name), load_model("tiny").get_parameter(name))


def test_batches_of_a_repair_are_the_runs_own(made):
    look = Look()
    attacker = made([look])
    with pytest.warns(UserWarning, match="only looks"):
        state, _ = attacker.trained(FIRST)
    rows, streams = look.rows, streams_of(attacker.config, {"harmful"}, attacker.attack, Sources(attacker.config.data))
    records = stage_records(streams, Stage.POST_FINETUNING, [look])
    subject = subject_around(attacker.config, attacker.aligned, state, records)
    for name in look.streams:
        for mine, own in zip(rows[name], subject.batches(name), strict=True):
            assert mine["id"] == own["id"]
            assert torch.equal(mine["input_ids"], own["input_ids"])


# Trials that fail


class Refuses(Share):
    """A repair that raises ValueError with the test's message."""

    def __init__(self, message):
        super().__init__()
        self.message = message

    def edit(self, subject):
        raise ValueError(self.message)


def test_a_trial_that_cannot_be_is_a_row_with_its_reason(made, tmp_path):
    attacker = made()
    cases = {
        replace(FIRST, num_samples=10**6): "The upload needs .* rows, but the source has",
        replace(FIRST, harmful_ratio=2.0): r"harmful_ratio must lie in \[0, 1\]",
        replace(FIRST, steps=0): "--finetuning.steps must be >= 1",
        replace(FIRST, lr=1e30, steps=6): r"is not finite\. .* keeps no checkpoints",
    }
    for trial, reason in cases.items():
        with pytest.raises((InputError, RunError), match=reason):
            attacker.trained(trial)
        assert attacker.outcome(trial).failed
    budget = Budget((3,), (1e-2, 1e30), (2,), (20, 10**6), (0.2,))
    result = search(attacker, 4, tmp_path / "search", budget)
    assert sorted(bool(o.failed) for o in result.outcomes) == [False, True, True, True]
    assert result.worst.trial == FIRST
    known = [json.loads(line) for line in (tmp_path / "search" / RECORD).read_text().splitlines()]
    assert sum("needs" in row["failed"] for row in known) == 2


def test_a_refusing_repair_is_a_row_and_the_search_goes_on(made, tmp_path, monkeypatch):
    attacker = made([Antidote(0.3)])
    edit = Antidote.edit

    def refuse_large(self, subject):
        if subject.model.peft_config["default"].r == 4:
            raise ValueError("Antidote: rank 4 is refused.")
        edit(self, subject)

    monkeypatch.setattr(Antidote, "edit", refuse_large)
    result = search(attacker, 2, tmp_path / "search", Budget((3,), (1e-2,), (2, 4), (20,), (0.2,)))
    assert [o.failed for o in result.outcomes] == ["", "Antidote: rank 4 is refused."]


def test_a_search_without_any_trial_ends_the_run_by_name(made, tmp_path):
    attacker = made([Refuses("Refuses: not this one.")])
    with pytest.raises(RunError, match=r"No trial could be trained and judged: Refuses: not this one\."):
        search(attacker, 2, tmp_path / "search", Budget.of(attacker.config))


def test_defects_and_ctrl_c_end_the_search(made, tmp_path):
    class Pressed(Defense):
        stage, slots = Stage.FINETUNING, (Slot.GRADIENT,)

        @override
        def on_train_start(self, trainer, pl_module):
            raise KeyboardInterrupt

    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(KeyboardInterrupt):
            made([Pressed()]).outcome(FIRST)
    finally:
        signal.signal(signal.SIGINT, handler)
    with pytest.raises(ValueError, match="mat1") as caught:
        made([Refuses("mat1 and mat2 shapes cannot be multiplied")]).outcome(FIRST)
    assert not isinstance(caught.value, InputError)


def test_answers_that_no_judge_could_judge_are_a_failed_trial(made, monkeypatch):
    attacker = made()
    lost = [Verdict.unjudged()]
    monkeypatch.setattr(measure_module, "get_judge", lambda name: lambda prompts, answers: lost * len(prompts))
    assert "judge builtin could judge none of" in attacker.outcome(FIRST).failed
    with pytest.raises(RunError, match="could judge none"):
        attacker.report(FIRST)


def test_a_judge_that_breaks_off_is_a_failed_trial(made, monkeypatch):
    def silent(prompts, answers):
        raise RunError("Judge 'hexphi:x' gave no answer.")

    attacker = made()
    monkeypatch.setattr(measure_module, "get_judge", lambda name: silent)
    assert attacker.outcome(FIRST).failed == "Judge 'hexphi:x' gave no answer."


# Files and records of a search


def test_nothing_is_written_but_the_record(made, tmp_path, monkeypatch):
    attacker = made([Lisa(1, 1, quiet=0.0, cycles=0), Antidote(0.3)])
    budget = Budget((3,), (1e-2, 1e30), (2,), (20,), (0.2,))
    monkeypatch.chdir(tmp_path)

    def files():
        # Time and size of every file in the test's folder and in the cache.
        return {
            path: (path.stat().st_mtime_ns, path.stat().st_size)
            for root in (tmp_path, cache_dir())
            for path in root.rglob("*")
            if path.is_file()
        }

    (tmp_path / "stray.ckpt").touch()
    before = files()
    result = search(attacker, 2, tmp_path / "search", budget)
    assert files().keys() - before.keys() == {tmp_path / "search" / RECORD}
    assert all(now == before[path] for path, now in files().items() if path in before)
    assert "stray.ckpt" not in result.outcomes[1].failed


def test_pairs_and_the_aligned_adapter_can_be_searched(tmp_path, monkeypatch):
    monkeypatch.setattr("hftlight.runs.run.write_report", lambda folder: None)
    changes = {"attacker": "search:2", "adapter_protocol": "continue", "attack": "reverse_preference"}
    evaluation = replace(EVALUATION, prompts=6)
    result = run(settings(tmp_path, evaluation=evaluation, **changes), [], ReversePreference(n=6))
    entry = result.manifest["arms"]["none"]["search"]
    assert (entry["trials"], entry["failed"], entry["failures"]) == (2, 0, [])


@pytest.mark.parametrize("changes", [{"adapter_protocol": "continue"}, {"tuning": "full"}])
def test_a_rank_that_no_trial_can_have_is_refused(changes, made, tmp_path):
    values = settings(tmp_path, attacker="search:2", search=Search(rank=[2, 8]), **changes)
    with pytest.raises(InputError, match=r"--search.rank: .* has the run's rank 2, got \[2, 8\]"):
        prepare(values, [])
    assert {t.rank for t in Budget.of(replace(values, search=Search())).grid(FIRST)} == {2}
    attacker = made()
    attacker.config = replace(attacker.config, **changes)
    assert "--search.rank" in attacker.outcome(replace(FIRST, rank=8)).failed


def test_a_weight_edit_cannot_be_searched(tmp_path):
    with pytest.raises(InputError, match="ModelEdit edits a weight without training"):
        prepare(settings(tmp_path, attacker="search:2", attack="model_edit"), [], ModelEdit())
