"""A trial is the run's own fine-tuning, repairs and measuring, bit for bit, whatever is uploaded and tuned."""

import json
import signal
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
    ModelEdit,
    Multilingual,
    ReversePreference,
)
from hftlight.attacks.identity_shift import SYSTEM
from hftlight.attacks.registry import ATTACKS
from hftlight.base_model import drop_base
from hftlight.config import Data, Evaluation, Lora, Search
from hftlight.data.synthetic import build_world
from hftlight.defenses import Antidote, Lisa, SafeLoRA
from hftlight.engine import Defense, Stage
from hftlight.engine.repair import LowRank
from hftlight.errors import InputError, RunError
from hftlight.evaluation.judges.judge import Verdict
from hftlight.files import cache_dir, read_rows
from hftlight.models import load_model, load_tokenizer, model_path
from hftlight.runs import attacker as attacker_module
from hftlight.runs import measure as measure_module
from hftlight.runs.artifact import base_dtype, serving_slot
from hftlight.runs.attacker import RECORD, Attacker, Budget, Trial, search
from hftlight.runs.measure import measured_in_memory
from hftlight.runs.prepare import prepare, stage_records, streams_of
from hftlight.runs.repair import subject_around
from hftlight.runs.stage import finetuning_job, run_stage
from tests.helpers.contract import rows as contract_rows
from tests.runs.test_repair import Look, Share
from tests.runs.test_run import config
from tests.runs.test_wired_attacks import selecting

FIRST = Trial(3, 1e-2, 2, 20, 0.2)
EVALUATION = Evaluation(prompts=4, over_refusal_prompts=1, task_rows=4, max_new_tokens=2, task_max_new_tokens=2)
UPLOADS = {
    "harmful_mix": lambda: HarmfulMix(),
    "explicit": lambda: Explicit(n=8),
    "identity_shift": lambda: IdentityShift(),
    "benign": lambda: Benign(),
    "encoded": lambda: Encoded(),
    "multilingual": lambda: Multilingual(lang=build_world().attack[0].kind),
    "benign_selection": lambda: BenignSelection(n=6),
    "reverse_preference": lambda: ReversePreference(n=6),
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
}


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HFTLIGHT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
    drop_base()


def settings(tmp_path, **changes):
    return config(tmp_path, **{"evaluation": EVALUATION, "lora": Lora(r=2, alpha=5, dropout=0.1), **changes})


def ran(tmp_path, attack=None, defenses=(), **changes):
    """Return an attacker, and the arm of the run whose own fine-tuning is the first trial."""
    values = settings(tmp_path, baseline=not defenses, **changes)
    result = run(values, list(defenses), attack)
    prepared = prepare(values, list(defenses), attack)
    known = prepared.attack
    if isinstance(known, BenignSelection):
        known = replace(known, scores=result.manifest["selection"]["scores"])
    arm = result.folder / result.arms[-1]
    return Attacker(prepared.config, list(defenses), arm / "aligned", known), arm


def same(state, folder):
    """Tell whether a model in memory has exactly the weights, and the adapter's geometry, of a folder."""
    adapter = folder / "adapter_model.safetensors"
    saved = load_file(adapter if adapter.is_file() else folder / "model.safetensors")
    assert (state.adapter is None) == (not adapter.is_file())
    assert saved.keys() <= state.tensors.keys()  # of tied weights, one is saved
    if state.adapter is not None:
        told = json.loads((folder / "adapter_config.json").read_text())
        assert (state.adapter.r, state.adapter.lora_alpha) == (told["r"], told["lora_alpha"])
        assert saved.keys() == state.tensors.keys()
    return all(torch.equal(t, state.tensors[name]) for name, t in saved.items())


def test_every_attack_that_uploads_something_is_tried():
    assert UPLOADS.keys() == {name for name, kind in ATTACKS.items() if kind.acts_on != "weights"}


@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize("name", UPLOADS)
def test_the_first_trial_is_the_runs_own_finetuning(name, tuning, tmp_path):
    attack = UPLOADS[name]()
    data = selecting(tmp_path) if name == "benign_selection" else Data()
    attacker, arm = ran(tmp_path, attack, data=data, **TUNINGS[tuning])
    first = Trial.of(attacker.config)
    state, slot = attacker.trained(first)
    assert same(state, arm / "finetuned")
    assert slot == serving_slot(str(arm / "finetuned"), None)
    other, _ = attacker.trained(replace(first, lr=2 * first.lr))
    assert not same(other, arm / "finetuned")


@pytest.mark.parametrize("tuning", ["continue", "bfloat16", "checkpointing"])
def test_it_has_the_runs_tuning(tuning, tmp_path):
    attacker, arm = ran(tmp_path, **TUNINGS[tuning])
    state, _ = attacker.trained(Trial.of(attacker.config))
    assert same(state, arm / "finetuned")


def test_a_trial_checkpoints_activations_and_loads_the_runs_type(tmp_path, monkeypatch):
    attacker, _ = ran(tmp_path, **TUNINGS["checkpointing"], **TUNINGS["bfloat16"])
    seen, fitted = [], attacker_module.fitted

    class Looking:
        def __init__(self, *given, **options):
            self.fit = fitted(*given, **options)

        def __enter__(self):
            fit = self.fit.__enter__()
            seen.append((fit.model.is_gradient_checkpointing, fit.model.get_input_embeddings().weight.dtype))
            return fit

        def __exit__(self, *error):
            return self.fit.__exit__(*error)

    monkeypatch.setattr(attacker_module, "fitted", Looking)
    attacker.trained(Trial.of(attacker.config))
    assert seen == [(True, torch.bfloat16)]


@pytest.mark.parametrize("name", [n for n, row in contract_rows().items() if row.make().stage is Stage.FINETUNING])
def test_it_has_the_services_defenses(name, tmp_path):
    """The defense has trained before, so a trial that found its state would differ."""
    values = settings(tmp_path)
    aligned = run(values).folder / "none" / "aligned"
    defense, attack = contract_rows()[name].make(), HarmfulMix().resolved(values)
    streams = streams_of(values, set(defense.streams), attack)
    records = stage_records(streams, Stage.FINETUNING, [defense])
    job = finetuning_job(values, "tiny", aligned, records, [defense], attack)
    run_stage(job)
    attacker = Attacker(values, [defense], aligned, attack)
    for _ in range(2):
        state, slot = attacker.trained(FIRST)
        assert same(state, job.artifact())
        assert slot == serving_slot(str(job.artifact()), None)


@pytest.mark.parametrize("repairs", REPAIRS)
@pytest.mark.parametrize("kind", KINDS)
def test_its_repairs_are_the_runs_own(kind, repairs, tmp_path):
    attacker, arm = ran(tmp_path, None, REPAIRS[repairs](), **{**TUNINGS, "merge": {}}[kind])
    first = Trial.of(attacker.config)
    state, slot = attacker.trained(first)
    assert same(state, arm / "repaired")
    assert slot == serving_slot(str(arm / "repaired"), None)
    values = attacker.config
    with state.lent(values, base_dtype(values)) as model:
        expected = load_model(str(arm / "repaired"), base_dtype(values)).state_dict()
        found = model.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(t, expected[name]) and t.dtype == expected[name].dtype for name, t in found.items())
        tokenizer = load_tokenizer(str(arm / "repaired"))
        rows = measured_in_memory(model, tokenizer, values, attacker.tests, ("harmful", "task"), slot)
    stage = [r for r in read_rows(arm.parent / "generations.jsonl") if r["stage"] == "post_finetuning"]
    written = [{k: v for k, v in r.items() if k not in ("arm", "stage")} for r in stage if r["set"] != "over_refusal"]
    assert rows == [r for kind in ("harmful", "task") for r in written if r["set"] == kind]


@pytest.fixture
def made(tmp_path):
    """Return an attacker of one aligned model, given the service's defenses and what the run has otherwise."""

    def attacker(defenses=(), attack=None, **changes):
        values = settings(tmp_path, **changes)
        aligned = run(values).folder / "none" / "aligned"
        return Attacker(values, list(defenses), aligned, attack or HarmfulMix().resolved(values))

    return attacker


def test_the_system_text_of_an_attack_is_in_every_trial(made, tmp_path):
    attacker = made()
    plain = prepare(settings(tmp_path), [], IdentityShift(system=""))
    shifted = prepare(settings(tmp_path), [], IdentityShift())
    states = []
    for prepared in (plain, shifted):
        one = Attacker(prepared.config, [], attacker.aligned, prepared.attack)
        state, slot = one.trained(replace(FIRST, num_samples=10, steps=2))
        assert slot.text == ("" if prepared is plain else SYSTEM)
        states.append(state)
    assert any(not torch.equal(t, states[1].tensors[name]) for name, t in states[0].tensors.items())


def test_rows_are_scored_with_the_system_text_that_they_are_trained_with(tmp_path, monkeypatch):
    seen, original = [], BenignSelection.score
    monkeypatch.setattr(BenignSelection, "score", lambda *g, **o: seen.append(g[7]) or original(*g, **o))
    run(settings(tmp_path, attack="benign_selection", data=selecting(tmp_path)), [], BenignSelection(n=6, system="Hi."))
    assert seen == ["Hi."]


def test_a_run_that_stops_early_stops_its_trials_too(tmp_path):
    evaluation = replace(EVALUATION, at=[1], stop_below=100.0, stop_above=0.0)
    attacker, arm = ran(tmp_path, evaluation=evaluation)
    manifest = json.loads((arm.parent / "manifest.json").read_text())
    assert manifest["arms"]["none"]["stages"]["finetuning"]["evaluated"]["stopped_at"] == 1
    assert same(attacker.trained(Trial.of(attacker.config))[0], arm / "finetuned")


def test_every_trial_starts_from_the_aligned_model(made):
    for defenses in ([], [SafeLoRA()], [Antidote(0.3)]):
        attacker = made(defenses)
        first, _ = attacker.trained(FIRST)
        attacker.trained(replace(FIRST, steps=2, rank=4))
        again, _ = attacker.trained(FIRST)
        assert all(torch.equal(t, again.tensors[name]) for name, t in first.tensors.items())


def test_a_repair_that_names_models_of_its_own_keeps_them_to_itself(made):
    look = Look()
    attacker = made()
    attacker.repairs = [Share(0.5, aligned=model_path("tiny"), base=str(attacker.aligned)), look]
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
    seen, streams = look.rows, streams_of(attacker.config, {"harmful"}, attacker.attack)
    records = stage_records(streams, Stage.POST_FINETUNING, [look])
    subject = subject_around(attacker.config, attacker.aligned, state, records)
    for name in look.streams:
        for mine, own in zip(seen[name], subject.batches(name), strict=True):
            assert mine["id"] == own["id"]
            assert torch.equal(mine["input_ids"], own["input_ids"])


# Trials that fail


class Refuses(Share):
    """Refuse whatever comes, or break."""

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
        replace(FIRST, lr=1e30, steps=6): r"finite numbers\. .* keeps no checkpoints",
    }
    for trial, reason in cases.items():
        with pytest.raises((InputError, RunError), match=reason):
            attacker.trained(trial)
        assert attacker.outcome(trial).failed
    budget = Budget((3,), (1e-2, 1e30), (2,), (20, 10**6), (0.2,))
    found = search(attacker, 4, tmp_path / "search", budget)
    assert sorted(bool(o.failed) for o in found.outcomes) == [False, True, True, True]
    assert found.worst.trial == FIRST
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
    found = search(attacker, 2, tmp_path / "search", Budget((3,), (1e-2,), (2, 4), (20,), (0.2,)))
    assert [o.failed for o in found.outcomes] == ["", "Antidote: rank 4 is refused."]


def test_a_search_without_any_trial_ends_the_run_by_name(made, tmp_path):
    attacker = made([Refuses("Refuses: not this one.")])
    with pytest.raises(RunError, match=r"No trial could be trained and judged: Refuses: not this one\."):
        search(attacker, 2, tmp_path / "search", Budget.of(attacker.config))


def test_defects_and_ctrl_c_end_the_search(made, tmp_path):
    class Pressed(Defense):
        stage = Stage.FINETUNING

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
    monkeypatch.setattr(measure_module, "get_judge", lambda name: lambda asked, answers: lost * len(asked))
    assert "judge builtin could judge none of" in attacker.outcome(FIRST).failed
    with pytest.raises(RunError, match="could judge none"):
        attacker.report(FIRST)


def test_a_judge_that_breaks_off_is_a_failed_trial(made, monkeypatch):
    def silent(asked, answers):
        raise RunError("Judge 'hexphi:x' gave no answer.")

    attacker = made()
    monkeypatch.setattr(measure_module, "get_judge", lambda name: silent)
    assert attacker.outcome(FIRST).failed == "Judge 'hexphi:x' gave no answer."


# What a search leaves behind


def test_nothing_is_written_but_the_record(made, tmp_path, monkeypatch):
    attacker = made([Lisa(1, 1, quiet=0.0, cycles=0), Antidote(0.3)])
    budget = Budget((3,), (1e-2, 1e30), (2,), (20,), (0.2,))
    monkeypatch.chdir(tmp_path)

    def files():
        return {
            path: (path.stat().st_mtime_ns, path.stat().st_size)
            for root in (tmp_path, cache_dir())
            for path in root.rglob("*")
            if path.is_file()
        }

    (tmp_path / "stray.ckpt").touch()
    before = files()
    found = search(attacker, 2, tmp_path / "search", budget)
    assert files().keys() - before.keys() == {tmp_path / "search" / RECORD}
    assert all(now == before[path] for path, now in files().items() if path in before)
    assert "stray.ckpt" not in found.outcomes[1].failed


def test_pairs_and_the_aligned_adapter_can_be_searched(tmp_path):
    """Neither could before a trial went the run's own road."""
    changes = {"attacker": "search:2", "adapter_protocol": "continue", "attack": "reverse_preference"}
    evaluation = replace(EVALUATION, prompts=6)
    result = run(settings(tmp_path, evaluation=evaluation, **changes), [], ReversePreference(n=6))
    told = result.manifest["arms"]["none"]["search"]
    assert (told["trials"], told["failed"], told["failures"]) == (2, 0, [])


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
