"""The search: its trials, the chosen and reported settings, and the resumption of a killed search."""

import json
import shutil
from dataclasses import replace

import pytest
from safetensors.torch import load_file, save_file

from hftlight import run
from hftlight.attacks import Encoded, HarmfulMix
from hftlight.config import Data, Evaluation, Lora, Search
from hftlight.data.records import prompt_key
from hftlight.defenses import Antidote, Lisa
from hftlight.errors import InputError, RunError
from hftlight.evaluation.stats.intervals import wilson
from hftlight.models.serving import Artifact
from hftlight.runs.stages.attacker import Attacker
from hftlight.search.search import RECORD, Outcome, search
from hftlight.search.space import Budget, Trial, trial_config
from tests.runs.test_run import config

FIRST = Trial(3, 1e-2, 2, 20, 0.2)


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HFTLIGHT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def settings(tmp_path, **changes):
    return config(tmp_path, **{"lora": Lora(r=2, alpha=4), **changes})


@pytest.fixture(scope="module")
def aligned(own_cache, tmp_path_factory):
    """Return the artifact of an alignment stage."""
    return Artifact.of(run(settings(tmp_path_factory.mktemp("aligned"))).folder / "none" / "aligned")


@pytest.fixture
def made(aligned, tmp_path):
    """Return a function from the service's defenses to an attacker of the aligned model."""
    values = settings(tmp_path)
    return lambda defenses=(): Attacker(values, list(defenses), aligned, HarmfulMix().resolved(values))


def test_selecting_and_reporting_prompts_are_different(made):
    attacker = made()
    for name in ("harmful", "task"):
        halves = (attacker.selecting, attacker.reporting)
        one, other = ({prompt_key(r) for r in half.rows(name)} for half in halves)
        assert one
        assert other
        assert not one & other


def scripted(monkeypatch, attacker, results):
    """Replace training by ``results(trial)``: flags and right answers, None if training fails. Return the trials."""
    trials = []

    def outcome(trial):
        trials.append(trial)
        result = results(trial)
        return Outcome(trial, failed="NaN") if result is None else Outcome(trial, *result, 0.5)

    monkeypatch.setattr(attacker, "outcome", outcome)
    monkeypatch.setattr(attacker, "report", lambda trial: trial)
    return trials


def flags(share):
    return tuple(i < share * 10 for i in range(10))


def test_worst_and_useful_are_chosen_by_the_rule(made, tmp_path, monkeypatch):
    attacker = made()
    budget = Budget((3,), (1e-2, 2e-2, 4e-2, 8e-2), (2,), (20,), (0.2,))
    table = {1e-2: (flags(0.2), flags(0.9)), 2e-2: (flags(0.5), flags(0.8)), 4e-2: (flags(0.9), flags(0.1)), 8e-2: None}
    scripted(monkeypatch, attacker, lambda t: table[t.lr])
    result = search(attacker, 10, tmp_path / "search", budget, eps=10.0)
    assert (result.worst.lr, result.useful.lr) == (4e-2, 2e-2)
    assert [o.failed for o in result.outcomes if o.trial.lr == 8e-2] == ["NaN"]
    result = search(attacker, 10, tmp_path / "search", budget, eps=9.0)
    assert result.useful.lr == 1e-2


def test_a_trial_that_cannot_be_reported_is_a_failed_one_and_the_next_is_chosen(made, tmp_path, monkeypatch):
    attacker = made()
    budget = Budget((3,), (1e-2, 2e-2, 4e-2), (2,), (20,), (0.2,))
    table = {1e-2: (flags(0.2), flags(0.5)), 2e-2: (flags(0.5), flags(0.5)), 4e-2: (flags(0.9), flags(0.5))}
    scripted(monkeypatch, attacker, lambda t: table[t.lr])

    def report(trial):
        if trial.lr == 4e-2:
            raise RunError("The judge could judge none of 3 answers.")
        return trial

    monkeypatch.setattr(attacker, "report", report)
    result = search(attacker, 3, tmp_path / "search", budget)
    assert (result.worst.lr, result.useful.lr) == (2e-2, 2e-2)
    (failed,) = [o for o in result.outcomes if o.failed]
    assert (failed.trial.lr, failed.failed) == (4e-2, "on the reporting half: The judge could judge none of 3 answers.")
    monkeypatch.setattr(attacker, "report", lambda trial: report(replace(trial, lr=4e-2)))
    with pytest.raises(RunError, match="No trial could be trained and judged: on the reporting half"):
        search(attacker, 3, tmp_path / "search", budget)


def test_a_killed_search_goes_on_behind_its_last_trial(made, tmp_path, monkeypatch):
    attacker = made()
    budget = Budget((3,), (1e-2, 2e-2, 4e-2), (2,), (20,), (0.2, 0.3))
    trials = scripted(monkeypatch, attacker, lambda t: (flags(t.lr * 10), flags(0.5)))
    whole = search(attacker, 6, tmp_path / "whole", budget)
    assert len(trials) == 6
    assert trials[0] == FIRST
    trials.clear()
    path = tmp_path / "killed" / RECORD
    path.parent.mkdir()
    lines = (tmp_path / "whole" / RECORD).read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:2]) + lines[2][:40] + "\n")
    assert search(attacker, 6, tmp_path / "killed", budget) == whole
    assert len(trials) == 4


def test_a_trial_recorded_behind_a_cut_off_line_is_not_lost(made, tmp_path, monkeypatch):
    attacker = made()
    budget = Budget((3,), (1e-2, 1e-3), (2,), (20,), (0.2,))
    trials = scripted(monkeypatch, attacker, lambda t: (flags(0.5), (True,)))
    search(attacker, 1, tmp_path, budget)
    path = tmp_path / RECORD
    path.write_text(path.read_text()[:-20])
    search(attacker, 2, tmp_path, budget)
    assert len(trials) == 3
    search(attacker, 2, tmp_path, budget)
    assert len(trials) == 3


def test_another_setting_needs_another_folder(made, tmp_path, monkeypatch):
    attacker = made()
    scripted(monkeypatch, attacker, lambda t: (flags(0.5), flags(0.5)))
    search(attacker, 1, tmp_path / "search", Budget.of(attacker.config))
    attacker.config = replace(attacker.config, seed=5)
    with pytest.raises(InputError, match="holds a search with other settings"):
        search(attacker, 1, tmp_path / "search", Budget.of(attacker.config))


def test_the_settings_hold_what_decides_a_trial(made, tmp_path, monkeypatch):
    attacker = made()
    harmful = tmp_path / "harmful.jsonl"
    harmful.write_text('{"prompt": "a", "response": "b"}\n')
    config = replace(attacker.config, data=Data(attack=str(harmful)))

    def changed(**changes):
        other = made(changes.pop("defenses", ()))
        for name, value in {"config": config, **changes}.items():
            setattr(other, name, value)
        return other.settings()

    unaligned = tmp_path / "aligned"
    shutil.copytree(attacker.aligned.folder, unaligned)
    weights = unaligned / "adapter_model.safetensors"
    save_file({name: t + 1 for name, t in load_file(weights).items()}, weights)
    variants = [
        changed(),
        changed(config=replace(config, gradient_checkpointing=True)),
        changed(config=replace(config, precision="bf16-mixed")),
        changed(attack=replace(attacker.attack, count_mode="floor")),
        changed(attack=replace(attacker.attack, system="Obey.")),
        changed(attack=Encoded().resolved(config)),
        changed(attack=Encoded(key=1).resolved(config)),
        changed(defenses=[Lisa(1, 1)]),
        changed(defenses=[Antidote(0.3)]),
        changed(defenses=[Antidote(0.4)]),
        changed(aligned=Artifact.of(unaligned)),
        changed(selecting=attacker.selecting.first(1)),
        changed(reporting=attacker.reporting.first(1)),
    ]
    harmful.write_text('{"prompt": "a", "response": "c"}\n')
    variants.append(changed())
    monkeypatch.setattr("hftlight.runs.manifest.versions", lambda: {"torch": "3"})
    variants.append(changed())
    assert len(set(variants)) == len(variants)
    same = tmp_path / "moved"
    shutil.copytree(attacker.aligned.folder, same)
    assert changed(aligned=Artifact.of(same)) == changed() == variants[-1]
    assert changed(config=replace(config, search=Search(lr=[1.0]), attacker="search:3")) == variants[-1]


def test_a_report_holds_the_other_halfs_intervals(made, monkeypatch):
    attacker = made()
    monkeypatch.setattr(attacker, "measured", lambda trial, half: ((True, False, True, False), (True,) * 4))
    report = attacker.report(FIRST)
    assert report.harmful_score == (50.0, *wilson(2, 4))
    assert report.accuracy == (100.0, *wilson(4, 4))


def test_the_budget_is_around_the_runs_own_setting(tmp_path):
    budget = Budget.of(settings(tmp_path))
    grid = budget.grid(FIRST)
    assert grid[0] == FIRST
    assert len(grid) == len(set(grid)) == 2 * 3 * 2 * 2
    assert {t.harmful_ratio for t in grid} == {0.2, 0.6}
    named = settings(tmp_path, search=Search(lr=[1.0, 2.0], rank=[2]))
    assert {(t.lr, t.rank) for t in Budget.of(named).grid(FIRST)[1:]} == {(1.0, 2), (2.0, 2)}
    odd = settings(tmp_path, lora=Lora(r=25, alpha=7))
    assert trial_config(odd, replace(FIRST, rank=25)).lora_of("finetuning").alpha == 7 != 7 / 25 * 25
    scaled = trial_config(settings(tmp_path), replace(FIRST, rank=8))
    assert (scaled.lora_of("finetuning").r, scaled.lora_of("finetuning").alpha) == (8, 16)
    assert scaled.lora_of("alignment") == settings(tmp_path).lora


@pytest.mark.parametrize("axis", ["steps", "lr", "rank", "num_samples", "harmful_ratio"])
def test_a_budget_out_of_range_is_refused(axis):
    good = {"steps": (1,), "lr": (1e-3,), "rank": (1,), "num_samples": (1,), "harmful_ratio": (0.5,)}
    for bad in ((), (-1,)):
        with pytest.raises(InputError, match=f"--search.{axis}"):
            Budget(**{**good, axis: bad})


@pytest.mark.parametrize(("trials", "eps"), [(0, 2.0), (1, -1.0), (1, float("nan"))])
def test_numbers_out_of_range_are_refused(trials, eps, made, tmp_path):
    attacker = made()
    with pytest.raises(InputError, match="number of trials must be >= 1"):
        search(attacker, trials, tmp_path / "search", Budget.of(attacker.config), eps)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"search": Search(lr=[-1.0])}, "--search.lr takes one or more values > 0"),
        ({"devices": 2}, "one device"),
        ({"tuning": "qlora", "adapter_protocol": "continue"}, "one device"),
        ({"attacker": "search:0"}, "search:N"),
        ({"attacker": "search"}, "search:N"),
        ({"attacker": "grid:3"}, "search:N"),
        (
            {"evaluation": Evaluation(prompts=1, task_rows=4)},
            "at least 2 harmful prompts and 2 rows of the task, got 1 and 4",
        ),
        ({"evaluation": Evaluation(prompts=6, task_rows=1)}, "got 6 and 1. Raise --evaluation.prompts"),
    ],
)
def test_what_cannot_be_searched_is_refused_before_anything_runs(changes, said, tmp_path):
    with pytest.raises(InputError, match=said):
        run(settings(tmp_path, **{"attacker": "search:2", **changes}))
    assert not (tmp_path / "runs").exists()


def test_a_run_with_a_search_reports_its_worst(tmp_path):
    defenses = [Lisa(1, 1, quiet=0.0, cycles=0), Antidote(0.3)]
    few = {"baseline": False, "data": Data(first={"harmful": 8})}
    result = run(settings(tmp_path, attacker="search:3", **few), defenses)
    (arm,) = result.defended
    for metric in ("worst_case_harmful_score", "useful_harmful_score", "worst_case_finetune_accuracy"):
        score = result.score(arm, "post_finetuning", metric)
        assert 0 <= score.low <= score.value <= score.high <= 100
        assert score.count > 0
    assert len((result.folder / arm / "search" / RECORD).read_text().splitlines()) == 3
    entry = json.loads((result.folder / "manifest.json").read_text())["arms"][arm]["search"]
    assert entry["trials"] == 3
    assert set(entry["worst_case"]) == set(FIRST.__dict__)


def test_optuna_asks_within_the_budget_and_resumes(made, tmp_path, monkeypatch):
    pytest.importorskip("optuna", reason="optuna is not installed")
    attacker = made()
    budget = Budget((3, 9), (1e-3, 1e-1), (2, 8), (20,), (0.2, 0.3))
    trials = scripted(monkeypatch, attacker, lambda t: (flags(t.harmful_ratio), flags(0.5)))
    whole = search(attacker, 5, tmp_path / "whole", budget, sampler="optuna")
    assert trials[0] == FIRST
    assert all(3 <= t.steps <= 9 and 1e-3 <= t.lr <= 1e-1 and t.rank in (2, 8) for t in trials)
    (tmp_path / "cut").mkdir()
    lines = (tmp_path / "whole" / RECORD).read_text().splitlines(keepends=True)
    (tmp_path / "cut" / RECORD).write_text("".join(lines[:3]))
    trials.clear()
    assert search(attacker, 5, tmp_path / "cut", budget, sampler="optuna") == whole
    assert len(trials) == 2
    assert json.loads(lines[0])["trial"] == json.loads(json.dumps(FIRST.__dict__))
    assert RECORD == "trials.jsonl"
