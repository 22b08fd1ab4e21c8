"""A repair's input models and rows, its artifact, its cache key, and its place in a run."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from hftlight import run
from hftlight.cli.train import train
from hftlight.config import Training
from hftlight.data.streams import StreamsDataModule
from hftlight.data.templates import get_template
from hftlight.defenses import NLSR, RESTA, SOMF, Antidote, Rewind, SafeLoRA, SafetyLock
from hftlight.defenses.post_finetuning import antidote as antidote_module
from hftlight.engine import Defense, Slot, Stage
from hftlight.engine.weights.lora import lora_updates
from hftlight.engine.weights.repair import Repair, linear_weights
from hftlight.engine.weights.save import MARKER
from hftlight.engine.weights.stored import plain_name
from hftlight.errors import InputError, RunError
from hftlight.files import folder_digest, read_rows
from hftlight.model_files import model_path
from hftlight.models.load import load_tokenizer
from hftlight.models.serving import SERVING
from hftlight.report import read_result
from hftlight.runs import run as run_module
from hftlight.runs.plan import plan
from hftlight.runs.prepare import prepare
from hftlight.runs.stages import repair as repair_module
from hftlight.runs.stages import train as stage_module
from hftlight.runs.stages.repair import ADAPTER, SCORES, RepairJob, ScoresJob, apply_repairs, run_repair, subject_of
from hftlight.runs.stages.train import StageJob, run_stage
from tests.helpers import warm
from tests.helpers.jobs import rows, small_config
from tests.runs.test_run import config, prompt

ROOT, SLOW = Path(__file__).parents[3], pytest.mark.slow
ARM = "antidote+safe_lora"
KINDS = {
    "merge": {"adapter_protocol": "merge"},
    "continue": {"adapter_protocol": "continue"},
    "full": {"tuning": "full"},
    "bfloat16": {"precision": "bf16-mixed"},
}
EXACT = ("merge", "continue", "full")
TASK, HARMFUL, ALIGNMENT = [*rows(4, "task"), *rows(2, "attack")], rows(5, "harmful"), rows(5, "alignment")
PAIRS = rows(5, "pairs")


class Share(Repair):
    """Keep a share of the user's update. A share of 1 changes nothing and reports it."""

    def __init__(self, share=0.5, aligned=None, base=None):
        super().__init__(None, None, aligned, base)
        self.share = share

    def edit(self, subject):
        changed = 0
        if hasattr(subject.model, "peft_config"):
            for update in lora_updates(subject.model).values():
                update.b.mul_(self.share)
                changed += update.b.numel()
        else:
            for name, weight in linear_weights(subject.model).items():
                weight.copy_(torch.lerp(subject.aligned.rows(name), weight, self.share))  # exact at 1
                changed += weight.numel()
        subject.report["changed_entries"] = changed if self.share != 1 else 0
        subject.report["unchanged_because"] = "it was asked to change nothing."


class Look(Repair):
    """Change nothing, and record the rows, models and modes that ``edit`` receives."""

    streams = ("harmful", "task")

    def __init__(self):
        super().__init__()
        self.rows, self.models, self.modes = {}, (), ()

    def edit(self, subject):
        self.rows = {name: list(subject.batches(name)) for name in self.streams}
        self.models = (subject.aligned, subject.base)
        self.modes = (subject.model.training, torch.is_grad_enabled())
        subject.report |= {"changed_entries": 0, "unchanged_because": "it only looks."}


class Killed(BaseException):
    """Stands for a kill: no ``except Exception`` catches it."""


def die(*arguments, **options):
    raise Killed


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory):
    """Return a function from a kind to its repair job. Each kind is aligned and fine-tuned once."""
    trained, states = {}, []

    def job(kind, defenses=()):
        if kind not in trained:
            settings = small_config(training=Training(steps=3, batch_size=2, lr=1e-2), **KINDS[kind])
            one = StageJob(Stage.ALIGNMENT, settings, "tiny", None, {"alignment": ALIGNMENT}, [])
            run_stage(one)
            two = StageJob(Stage.FINETUNING, settings, "tiny", one.artifact(), {"task": TASK}, [])
            run_stage(two)
            streams = {"harmful": HARMFUL, "task": TASK, "alignment": ALIGNMENT, "pairs": PAIRS}
            trained[kind] = RepairJob(settings, "tiny", one.artifact(), two.artifact(), streams, []), states[-1]
        return replace(trained[kind][0], defenses=list(defenses))

    def state(kind):
        job(kind)
        return trained[kind][1]

    job.state = state
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HFTLIGHT_CACHE", str(tmp_path_factory.mktemp("cache")))
        original = stage_module.full_state
        patch.setattr(stage_module, "full_state", lambda model: states.append(original(model)) or states[-1])
        yield job


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HFTLIGHT_CACHE", str(tmp_path / "cache"))


def plain(folder):
    """Return a folder's model, loaded with PEFT or Transformers alone."""
    auto = AutoPeftModelForCausalLM if (folder / "adapter_config.json").is_file() else AutoModelForCausalLM
    return auto.from_pretrained(folder, dtype=torch.float32).eval()


def merged(folder):
    """Return the weights of a folder's model by name, its adapter merged in."""
    model = plain(folder)
    model = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
    return {name: w.double() for name, w in model.state_dict().items()}


def logits(model, folder):
    with torch.no_grad():
        return model(input_ids=prompt(folder, "How do I open a zorvex?")).logits


# Input models and rows


def test_the_merge_protocol_gives_the_second_adapter_bit_for_bit(finetuned):
    job, state = finetuned("merge"), finetuned.state("merge")
    model = subject_of(job).model
    updates = lora_updates(model)
    assert len(updates) == len(state) // 2
    for name, update in updates.items():
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        assert update.scale == 1
        assert torch.equal(update.a, state[f"{stem}.lora_A.weight"])
        assert torch.equal(update.b, 2 * state[f"{stem}.lora_B.weight"])  # alpha / r
        assert update.b.any()
    aligned = merged(job.aligned.folder)
    for name, weight in linear_weights(model.get_base_model()).items():
        assert_close(weight.double(), aligned[plain_name(name)], rtol=0, atol=1e-7)


@pytest.mark.parametrize("kind", EXACT)
def test_it_is_the_finetuned_model_and_without_the_update_the_aligned_one(finetuned, kind):
    job = finetuned(kind)
    model = subject_of(job).model
    assert_close(
        logits(model, job.finetuned.folder),
        logits(plain(job.finetuned.folder), job.finetuned.folder),
        rtol=0,
        atol=2e-5,
    )
    if kind != "full":
        with model.disable_adapter():
            assert_close(
                logits(model, job.finetuned.folder),
                logits(plain(job.aligned.folder), job.aligned.folder),
                rtol=0,
                atol=2e-5,
            )


@pytest.mark.parametrize("kind", EXACT)
def test_half_of_the_update_lies_half_way(finetuned, kind):
    job = finetuned(kind, [Share(0.5)])
    run_repair(job)
    aligned, tuned, half = (merged(folder) for folder in (job.aligned.folder, job.finetuned.folder, job.place()))
    moved = [name for name, w in tuned.items() if ".self_attn." in name and (w - aligned[name]).abs().max() > 1e-3]
    assert moved
    for name in moved:
        assert_close(half[name], (aligned[name] + tuned[name]) / 2, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", EXACT)
def test_an_edit_that_changes_nothing_writes_the_same_model(finetuned, kind):
    """Under ``continue`` the rank is three times as large, and the merged weights are equal only up to 1e-6."""
    job = finetuned(kind, [Share(1.0)])
    with pytest.warns(UserWarning, match="asked to change nothing"):
        run_repair(job)
    name = "model.safetensors" if kind == "full" else ADAPTER
    before, after = (load_file(folder / name) for folder in (job.finetuned.folder, job.place()))
    if kind == "continue":
        weights = merged(job.finetuned.folder), merged(job.place())
        assert all(torch.allclose(w, weights[1][name], rtol=0, atol=1e-6) for name, w in weights[0].items())
        assert {t.shape[0] for n, t in after.items() if "lora_A" in n} == {6}
    else:
        assert before.keys() == after.keys()
        assert all(torch.equal(t, after[name]) for name, t in before.items())


def test_a_model_that_was_trained_from_another_one_is_refused(finetuned):
    job = finetuned("merge", [Share()])
    with pytest.raises(RunError, match="was not fine-tuned from"):
        run_repair(replace(job, aligned=job.finetuned, finetuned=job.aligned))


def test_batches_are_all_rows_once_as_in_training(finetuned):
    """Attack rows have the task's role. A too long row is dropped, as in training."""
    look, job = Look(), finetuned("merge")
    long = replace(HARMFUL[0], id="", response="!" * 400)
    with pytest.warns(UserWarning, match="only looks"):
        run_repair(replace(job, defenses=[look], records={"harmful": [*HARMFUL, long], "task": TASK}))
    assert look.modes == (False, False)
    assert sorted(i for batch in look.rows["harmful"] for i in batch["id"]) == sorted(r.id for r in HARMFUL)
    assert {role for batch in look.rows["task"] for role in batch["role"]} == {"task"}
    assert {r.role for r in TASK} == {"task", "attack"}
    # A repair may take gradients, so its batches are as large as those of the training.
    micro = job.config.finetuning.batch_size
    assert max(len(batch["id"]) for batch in look.rows["harmful"]) == micro < job.config.evaluation.batch_size
    tokenizer = load_tokenizer("tiny")
    data = StreamsDataModule(tokenizer, get_template(job.config.template, tokenizer), "harmful", harmful=HARMFUL)
    expected = {e.id: list(e.input_ids) for e in data.stream("harmful", 1).examples}
    for batch in look.rows["harmful"]:
        assert (batch["labels"] != -100).any(dim=1).all()
        for i, ids, mask in zip(batch["id"], batch["input_ids"], batch["attention_mask"], strict=True):
            assert ids[mask.bool()].tolist() == expected[i]


def test_a_repair_that_names_models_of_its_own_keeps_them_to_itself(finetuned):
    job = finetuned("merge")
    named, look = Share(0.5, aligned=str(job.finetuned.folder), base=str(job.finetuned.folder)), Look()
    with pytest.warns(UserWarning, match="only looks"):
        run_repair(replace(job, defenses=[named, look]))
    name = "model.layers.0.self_attn.q_proj.weight"
    for model, folder in zip(look.models, (job.aligned.folder, Path(model_path("tiny"))), strict=True):
        assert_close(model.rows(name).double(), merged(folder)[name], rtol=0, atol=1e-7)


# The artifact


LISTS = {
    "safe_lora": lambda: [SafeLoRA(number=3)],
    "antidote": lambda: [Antidote(0.1)],
    "both": lambda: [SafeLoRA(number=3), Antidote(0.1)],
    "rewind": lambda: [Rewind(0.2, 0.1, samples=4, safety="alignment")],
    "safety_lock": lambda: [SafetyLock(heads=2, tokens=2)],
    "nlsr": lambda: [NLSR(gate="worst", sparsity=0.5, samples=4, safety="alignment")],
    "resta": lambda: [RESTA(0.3, unaligned="tiny")],
    "somf": lambda: [SOMF("row", steps=2)],
}
LATER = ("safety_lock", "nlsr", "resta", "somf")


LISTED = [(name, kind) for name in LISTS for kind in EXACT if (name, kind) != ("nlsr", "full")]
QUICK = [(name, kind) for name, kind in LISTED if name not in LATER or kind == "merge"]


@pytest.mark.parametrize(("name", "kind"), [pytest.param(*k, marks=() if k in QUICK else SLOW) for k in LISTED])
def test_plain_libraries_load_what_is_in_memory(finetuned, monkeypatch, name, kind):
    subjects, original = [], repair_module.subject_of
    monkeypatch.setattr(repair_module, "subject_of", lambda job: subjects.append(original(job)) or subjects[-1])
    job = finetuned(kind, LISTS[name]())
    before = folder_digest(job.finetuned.folder)
    run_repair(job)
    (subject,) = subjects
    adapter = kind != "full" and not subject.dense
    assert (job.place() / "adapter_config.json").is_file() == adapter
    assert (job.place() / "model.safetensors").is_file() != adapter
    expected, tuned = (
        logits(subject.model, job.finetuned.folder),
        logits(plain(job.finetuned.folder), job.finetuned.folder),
    )
    loaded = logits(plain(job.place()), job.place())
    assert_close(loaded, expected, rtol=0, atol=2e-5 if adapter else 0)
    assert (loaded - tuned).abs().max() > 1e-3
    assert folder_digest(job.finetuned.folder) == before
    assert (job.place() / SERVING).read_bytes() == (job.finetuned.folder / SERVING).read_bytes()
    assert (job.place() / SERVING).stat().st_mode & 0o777 == 0o600
    marker = json.loads((job.place() / MARKER).read_text())
    assert marker["applied"] == [type(d).__name__ for d in job.defenses]
    assert all(len(report["input_digest"]) == 16 for report in marker["reports"].values())


def test_the_progress_counts_repairs_and_what_they_train(finetuned):
    seen = []
    run_repair(finetuned("merge", [SOMF("row", steps=3), Antidote(0.1)]), seen.append)
    assert seen == [1, 2, 3, 4, 5]


def test_a_run_in_bfloat16_is_repaired_in_float32(finetuned):
    """In the run's own type, a small update would be rounded away."""
    job = finetuned("bfloat16", [Antidote(0.1)])
    run_repair(job)
    assert {t.dtype for t in load_file(job.place() / "model.safetensors").values()} == {torch.float32}
    aligned, tuned, repaired = (merged(folder) for folder in (job.aligned.folder, job.finetuned.folder, job.place()))
    name = "model.layers.0.self_attn.q_proj.weight"
    update = repaired[name] - aligned[name]
    assert float((update.abs() < 1e-7).double().mean()) > 0.09  # pruned entries have the aligned value, up to rounding
    assert 0.5 < float(update.norm() / (tuned[name] - aligned[name]).norm()) < 1


@pytest.mark.parametrize("make", [lambda: Share(), lambda: Antidote(0.1)], ids=["thin", "dense"])
def test_a_repaired_model_is_not_repaired_again(finetuned, make):
    job = finetuned("merge", [make()])
    run_repair(job)
    for again in (make(), SafeLoRA()):
        second = replace(job, finetuned=job.artifact(), defenses=[again])
        with pytest.raises(RunError, match=r"was repaired before.*a second application"):
            run_repair(second)
        assert not second.done()
        assert not second.place().exists()


def test_a_refusal_ends_the_run_and_a_defect_is_not_hidden(finetuned):
    class Defect(Share):
        def edit(self, subject):
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RunError, match=r"Antidote: prune_ratio 0\.001 is less than one"):
        run_repair(finetuned("merge", [Antidote(0.001)]))
    with pytest.raises(RuntimeError, match="mat1") as caught:
        run_repair(finetuned("merge", [Defect()]))
    assert not isinstance(caught.value, RunError)


def test_the_key_holds_all_that_decides_and_nothing_else(finetuned, tmp_path):
    job = finetuned("merge", [SafeLoRA(number=3), Antidote(0.1)])
    c, (projection, pruning) = job.config, job.defenses
    others = [
        replace(job, aligned=job.finetuned),
        replace(job, finetuned=job.aligned),
        replace(job, base_hash="another"),
        replace(job, records={**job.records, "harmful": HARMFUL[:-1]}),
        replace(job, defenses=[projection, Antidote(0.2)]),
        replace(job, defenses=[projection]),
        replace(job, defenses=[pruning, projection]),
        replace(job, config=replace(c, template="alpaca")),
        replace(job, config=replace(c, system="Be kind.")),
        replace(job, config=replace(c, max_tokens=90)),
        replace(job, config=replace(c, adapter_protocol="continue")),
        replace(job, config=replace(c, finetuning=replace(c.finetuning, batch_size=3))),
    ]
    assert len({job.key(), *(other.key() for other in others)}) == 1 + len(others)
    for same in (
        replace(c, checkpoint_every=7),
        replace(c, evaluation=replace(c.evaluation, prompts=3)),
        replace(c, finetuning=replace(c.finetuning, lr=1.0)),  # the artifact's hash covers it
        replace(c, devices=2),
    ):
        assert replace(job, config=same).key() == job.key()


def test_the_key_holds_the_weights_of_models_that_a_repair_names(finetuned, tmp_path):
    job, keys = finetuned("merge"), set()
    model = AutoModelForCausalLM.from_pretrained(model_path("tiny"))
    for shift in (0.0, 0.1):
        model.model.norm.weight.data += shift
        model.save_pretrained(tmp_path / "safer")
        keys.add(replace(job, defenses=[SafeLoRA(base=str(tmp_path / "safer"))]).key())
    assert len(keys) == 2


@pytest.mark.parametrize("moment", ["between repairs", "before the weights have their name", "before the result"])
def test_killed_within_the_repair_and_made_again_ends_with_the_same_bytes(finetuned, monkeypatch, moment):
    job = finetuned("merge", [SafeLoRA(number=4), Antidote(0.3)])
    with monkeypatch.context() as patch:
        if moment == "between repairs":
            patch.setattr(Antidote, "edit", die)
        elif moment == "before the weights have their name":
            patch.setattr(repair_module, "save_repaired", die)
        else:
            patch.setattr(RepairJob, "finish", die)
        with pytest.raises(Killed):
            run_repair(job)
    assert not job.done()
    assert job.place().exists() == (moment == "before the result")
    digests = []
    for _ in range(2):  # first after the kill, then uninterrupted
        run_repair(job)
        assert job.done()
        assert not list(job.folder().glob(".*.tmp"))
        digests.append(folder_digest(job.place()))
        shutil.rmtree(job.folder())
    assert digests[0] == digests[1]


# Stored scores


@pytest.fixture
def passes(monkeypatch):
    """Record each call of Antidote's sweep of forward passes. ``passes.die`` kills it."""

    class Passes(list):
        die = False

    calls, original = Passes(), antidote_module.input_squares

    def counted(*arguments):
        calls.append(arguments)
        if calls.die:
            raise Killed
        return original(*arguments)

    monkeypatch.setattr(antidote_module, "input_squares", counted)
    return calls


def scores_of(job):
    return {name.partition("{")[0]: entry["scores"] for name, entry in job.result()["scores"].items()}


def test_a_sweep_of_strengths_scores_once_and_gives_the_same_bytes(finetuned, tmp_path, monkeypatch, passes):
    first = finetuned("merge", [SafeLoRA(number=4), Antidote(0.3)])
    second = replace(first, defenses=[SafeLoRA(number=4), Antidote(0.1, group="matrix", rounding="up")])
    third = replace(first, defenses=[SafeLoRA(operator="projector", rank=2, fraction=0.5, strength=0.5)])
    found = []
    for place in ("shared", "alone"):
        for job in (first, second, third):
            monkeypatch.setenv("HFTLIGHT_CACHE", str(tmp_path / (place if place == "shared" else job.key())))
            run_repair(job)
            found.append((scores_of(job), folder_digest(job.place()), job.result()["defenses"]))
    new, again = {"SafeLoRA": "computed", "Antidote": "computed"}, {"SafeLoRA": "reused", "Antidote": "reused"}
    assert [scores for scores, *_ in found[:3]] == [new, again, {"SafeLoRA": "reused"}]
    assert [scores for scores, *_ in found[3:]] == [new, new, {"SafeLoRA": "computed"}]
    assert [rest for _, *rest in found[:3]] == [rest for _, *rest in found[3:]]
    assert len(passes) == 1 + 2


def test_the_key_of_scores_holds_all_but_the_dials_and_what_acts_later(finetuned):
    job = finetuned("merge", [SafeLoRA(number=3), Antidote(0.1)])
    key = ScoresJob(job, 1).key()
    projection, pruning = job.defenses
    others = [
        replace(job, finetuned=job.aligned),
        replace(job, aligned=job.finetuned),
        replace(job, base_hash="another"),
        replace(job, records={**job.records, "harmful": HARMFUL[:-1]}),
        replace(job, config=replace(job.config, template="alpaca")),
        replace(job, defenses=[projection, Antidote(0.1, mode="factor")]),
        replace(job, defenses=[projection, Antidote(0.1, layers=["q_proj"])]),
        replace(job, defenses=[SafeLoRA(number=4), pruning]),  # a dial of an earlier repair changes the model
        replace(job, defenses=[Share(), pruning]),
    ]
    assert len({key, ScoresJob(job, 0).key(), *(ScoresJob(j, 1).key() for j in others)}) == 2 + len(others)
    assert ScoresJob(replace(job, defenses=[pruning]), 0).key() != key
    for same in (
        [projection, Antidote(0.2, group="model", rounding="up")],
        [projection, pruning, Rewind()],
        [projection, Antidote(0.1, output="elsewhere")],
    ):
        assert ScoresJob(replace(job, defenses=same), 1).key() == key


@pytest.mark.parametrize("moment", ["while scoring", "while writing"])
def test_killed_while_scoring_and_made_again_ends_with_the_same_bytes(finetuned, tmp_path, monkeypatch, passes, moment):
    job = finetuned("continue", [Antidote(0.3)])
    monkeypatch.setenv("HFTLIGHT_CACHE", str(tmp_path))

    def half(tensors, path):
        Path(path).write_bytes(b"half")
        raise Killed

    with monkeypatch.context() as patch:
        passes.die = moment == "while scoring"
        patch.setattr(repair_module, "save_file", half if moment == "while writing" else repair_module.save_file)
        with pytest.raises(Killed):
            run_repair(job)
    passes.die = False
    digests = []
    for expected in ("computed", "reused", "computed"):  # after the kill, then with its scores, then undisturbed
        run_repair(job)
        assert scores_of(job) == {"Antidote": expected}
        digests.append(folder_digest(job.place()))
        shutil.rmtree(job.folder())
        if expected == "reused":
            shutil.rmtree(ScoresJob(job, 0).folder())
    assert len(set(digests)) == 1


def test_damaged_scores_are_computed_anew_and_a_repair_without_dials_stores_none(
    finetuned, tmp_path, monkeypatch, passes, capsys
):
    monkeypatch.setenv("HFTLIGHT_CACHE", str(tmp_path))
    plainly = finetuned("merge", [Share()])
    run_repair(plainly)
    assert scores_of(plainly) == {}
    assert not list(tmp_path.glob("stages/scores-*"))
    run_repair(finetuned("merge", [Antidote(0.3)]))
    (file,) = tmp_path.glob(f"stages/scores-*/{SCORES}")
    file.write_bytes(file.read_bytes()[:-1])
    job = finetuned("merge", [Antidote(0.2)])
    run_repair(job)
    assert scores_of(job) == {"Antidote": "computed"}
    assert f"({SCORES} differs)" in capsys.readouterr().err
    assert len(passes) == 2


def test_a_model_in_memory_reads_no_stored_scores(finetuned, tmp_path, monkeypatch, passes):
    """The attacker's search repairs models that have no place in the cache."""
    monkeypatch.setenv("HFTLIGHT_CACHE", str(tmp_path))
    job = finetuned("merge", [Antidote(0.3)])
    run_repair(job)
    stored = sorted(tmp_path.glob("stages/*"))
    for seen in (2, 3):
        apply_repairs(subject_of(job), job.defenses)
        assert len(passes) == seen
    assert sorted(tmp_path.glob("stages/*")) == stored


# The whole run


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return the folder of an uninterrupted run of both arms. Its cache lies beside ``runs``."""
    place = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HFTLIGHT_CACHE", str(place / "cache"))
        return run(config(place), [Antidote(0.1), SafeLoRA(number=3)]).folder


def scored(folder, arm=ARM):
    """Return (stage, metric, judge, value) of an arm's scores."""
    return [
        (row["stage"], row["metric"], row["judge"], row["value"])
        for row in read_rows(folder / "metrics.jsonl")
        if row["kind"] == "score" and row["arm"] == arm and row["stage"] != "base"
    ]


def weights_of(folder):
    return folder_digest(folder, "*.safetensors")


def test_run_repairs_measures_and_shows_it(whole):
    stages = list(dict.fromkeys(stage for stage, *_ in scored(whole)))
    assert stages == ["alignment", "finetuning", "post_finetuning"]
    entry = json.loads((whole / "manifest.json").read_text())["arms"][ARM]["stages"]["post_finetuning"]
    assert entry.keys() == {"key", "stage", "cost", "defenses", "scores", "artifact"}
    assert [own["scores"] for own in entry["scores"].values()] == ["computed", "computed"]
    reports = list(entry["defenses"].values())
    assert [r["repair"] for r in reports] == ["SafeLoRA", "Antidote"]  # projection before pruning
    assert len(reports[0]["projected"]) == 3
    assert reports[1]["requested_fraction"] == 0.1
    assert 0.08 < reports[1]["realised_fraction"] <= 0.1
    costs = [r for r in read_rows(whole / "metrics.jsonl") if r["kind"] == "cost" and r["stage"] == "post_finetuning"]
    assert [(cost["arm"], cost["steps"], cost["seconds"] > 0) for cost in costs] == [(ARM, 0, True)]
    assert weights_of(whole / ARM / "finetuned") == weights_of(whole / "none" / "finetuned")
    assert weights_of(whole / ARM / "repaired") != weights_of(whole / ARM / "finetuned")
    result = read_result(whole)
    assert result.stages(ARM) == stages
    assert result.unmeasured() == []
    page = (whole / "report.html").read_text()
    for words in ("<td>repaired</td>", "<td>fine-tuned</td>", "after the repair", " s once"):
        assert words in page


def test_one_attacked_model_serves_every_repair_and_each_is_done_once(whole, monkeypatch):
    place = whole.parents[1]
    monkeypatch.setenv("HFTLIGHT_CACHE", str(place / "cache"))
    monkeypatch.setattr(stage_module, "_train", lambda *a: pytest.fail("a finished stage was trained again"))
    run(config(place, baseline=False), [Antidote(0.1)])
    assert len(list((place / "cache" / "stages").glob("post_finetuning-*"))) == 2
    monkeypatch.setattr(repair_module, "subject_of", lambda job: pytest.fail("a finished repair was made again"))
    files = {path: path.read_bytes() for path in (whole / "metrics.jsonl", whole / "generations.jsonl")}
    run(config(place), [Antidote(0.1), SafeLoRA(number=3)])
    assert {path: path.read_bytes() for path in files} == files


def test_killed_after_the_upload_and_run_again_ends_with_the_same_bytes(whole, tmp_path, own_cache, monkeypatch):
    def repaired():
        return run(config(tmp_path, baseline=False), [Antidote(0.1), SafeLoRA(number=3)]).folder

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "run_repair", die)
        with pytest.raises(Killed):
            repaired()
    (arm,) = (tmp_path / "runs").glob(f"*/{ARM}")
    assert {stage for stage, *_ in scored(arm.parent)} == {"alignment", "finetuning"}
    assert not (arm / "repaired").exists()
    assert read_result(arm.parent).unmeasured() == [(ARM, "post_finetuning")]
    monkeypatch.setattr(stage_module, "_train", lambda *a: pytest.fail("a finished stage was trained again"))
    again = repaired()
    for name in ("finetuned", "repaired"):
        assert weights_of(whole / ARM / name) == weights_of(again / ARM / name)
    assert scored(whole) == scored(again)


def test_what_cannot_be_repaired_is_refused_before_training(tmp_path, own_cache):
    class NoRepair(Defense):
        stage, slots = Stage.POST_FINETUNING, (Slot.WEIGHTS,)

    with pytest.raises(InputError, match="NoRepair works in the post_finetuning stage but is no Repair"):
        run(config(tmp_path), [NoRepair()])
    with pytest.raises(InputError, match=r"Antidote and SafeLoRA: .* 4 bits"):
        run(config(tmp_path, tuning="qlora", adapter_protocol="continue"), [Antidote(0.1), SafeLoRA()])
    with pytest.raises(ValueError, match="both set the pruning of the update"):
        run(config(tmp_path), [Antidote(0.1), Antidote(0.2)])
    assert not (tmp_path / "runs").exists()


def test_the_plan_and_its_time_hold_the_repair(tmp_path, own_cache, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    assert train(["--model", "tiny", "--defense", "antidote", "safe_lora", "--baseline", "--dry_run"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "repaired" in line]
    assert [("SafeLoRA" in line, "Antidote" in line) for line in lines] == [(True, False), (False, True)]
    prepared = prepare(config(tmp_path), [Antidote(0.1), SafeLoRA()])
    assert [(unit.label, unit.count) for unit in plan(prepared)[-2:]] == [
        (f"{ARM}: repaired", 2),
        (f"{ARM}: repaired, measuring", 14),
    ]
    assert plan(prepared)[-2].seconds > 0
    assert prepared.records(Stage.POST_FINETUNING, prepared.arms[1]).keys() == {"harmful"}


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_train_and_the_first_one_repairs(strategy, tmp_path, own_cache):
    """The second process waits at the next stage. The last stage of the run is a repair."""
    command = [
        str(ROOT / "recipes" / "train.py"), "--defense", "safe_lora", "antidote", "--baseline",
        "--model=tiny", "--accelerator=cpu", "--devices=2", f"--strategy={strategy}", f"--output={tmp_path / 'runs'}",
        "--alignment.steps=3", "--finetuning.steps=3", "--num_samples=40", "--evaluation.prompts=4",
        "--evaluation.loss_rows=2",
        "--evaluation.over_refusal_prompts=4", "--evaluation.task_rows=4",
    ]  # fmt: skip
    done = warm.run(command, cwd=tmp_path, timeout=400)
    assert done.returncode == 0, done.stderr[-2000:]
    (folder,) = (tmp_path / "runs").iterdir()
    arm = "safe_lora+antidote"
    assert {stage for stage, *_ in scored(folder, arm)} == {"alignment", "finetuning", "post_finetuning"}
    assert torch.isfinite(logits(plain(folder / arm / "repaired"), folder / arm / "repaired")).all()
    assert weights_of(folder / arm / "finetuned") == weights_of(folder / "none" / "finetuned")
