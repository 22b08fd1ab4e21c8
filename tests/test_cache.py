"""The cache: every input changes the cache key, and an entry is read exactly as written."""

import ast
import itertools
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path

import pytest

from hftlight import cache
from hftlight.attacks import BenignSelection, HarmfulMix
from hftlight.attacks.model_edit import ModelEdit
from hftlight.config import OF_NO_ANSWER, OF_NO_STAGE, RunConfig
from hftlight.data.records import Record
from hftlight.data.sources import get_task
from hftlight.data.templates import SystemSlot
from hftlight.defenses import Antidote, Booster
from hftlight.engine import Stage
from hftlight.models.serving import Artifact
from hftlight.runs.measuring.measure import answers_key, verdicts_key
from hftlight.runs.measuring.model_metrics import Reference, metric_keys
from hftlight.runs.measuring.test_sets import TestSets
from hftlight.runs.stages.model_edit import EditJob
from hftlight.runs.stages.repair import OF_NO_REPAIR, RepairJob
from hftlight.runs.stages.selection import SelectionJob
from hftlight.runs.stages.train import StageJob
from tests.helpers.jobs import rows, small_config

SOURCE = Path(cache.__file__).parent
NAMES = ("cache", "files", "model_files", "job", "selection", "choice", "endpoint", "llm", "bea", "workers", "serving")
KEEPERS = {f"{name}.py" for name in NAMES}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HFTLIGHT_CACHE", str(tmp_path / "cache"))


# Every cache key: each input in turn.


@pytest.mark.parametrize("kind", cache.INPUTS)
def test_every_input_changes_the_key(kind):
    inputs = dict.fromkeys(cache.INPUTS[kind], 0)
    before = cache.key(kind, ["hftlight.files"], **inputs)
    assert cache.key(kind, ["hftlight.files"], **inputs) == before
    others = [cache.key(kind, ["hftlight.files"], **{**inputs, name: 1}) for name in inputs]
    others.append(cache.key(kind, ["hftlight.models.load"], **inputs))
    assert len({before, *others}) == 1 + len(others)


def test_a_key_takes_what_its_kind_lists_and_nothing_else():
    with pytest.raises(TypeError, match="the inputs of verdicts must be"):
        cache.key("verdicts", [], answers="x")


def test_versions_are_part_of_every_key(monkeypatch):
    inputs = dict.fromkeys(cache.INPUTS["drift"])
    before = cache.key("drift", [], **inputs)
    monkeypatch.setattr(cache, "versions", lambda: {"torch": "0.0"})
    assert cache.key("drift", [], **inputs) != before


def test_one_place_makes_keys_and_few_files_name_the_cache():
    """A module that stores results without ``cache.key`` must call ``cache_dir`` to find the folder."""
    named = {
        path.name for path in SOURCE.rglob("*.py") if "cache_dir" in path.read_text() and path.name != "__init__.py"
    }
    assert named <= KEEPERS
    # The first argument of every call ``cache.key("kind", ...)`` in the source.
    kinds = {
        node.args[0].value
        for path in SOURCE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "key"
        if getattr(node.func.value, "id", "") == "cache" and isinstance(node.args[0], ast.Constant)
    }
    assert kinds | {"training", "edit", "repair", "scores"} == set(cache.INPUTS)  # ``Job`` makes the last four keys


# Inputs of the jobs' keys: every value of the configuration, rows, models, defenses.


def artifact(place, text):
    if not place.exists():
        place.mkdir(parents=True)
        (place / "config.json").write_text('{"model_type": "llama"}')
        (place / "model.safetensors").write_text(text)
    return Artifact.of(place)


def leaves(value, prefix=""):
    """Yield the dotted names of all values of a configuration."""
    for f in fields(value):
        inner, name = getattr(value, f.name), prefix + f.name
        yield from leaves(inner, f"{name}.") if is_dataclass(inner) else [name]


def changed(config, name):
    """Return a copy of the configuration with another value under one dotted name."""
    head, _, rest = name.partition(".")
    old = getattr(config, head)
    if rest:
        return replace(config, **{head: changed(old, rest)})
    others = {bool: lambda: not old, int: lambda: old + 1, float: lambda: old + 0.5, str: lambda: f"{old}x"}
    new = others[type(old)]() if type(old) in others else ["other"]
    return replace(config, **{head: new})


OTHER_STAGE = {f"finetuning.{name}" for name in leaves(RunConfig().finetuning)}
EVALUATION = {f"evaluation.{name}" for name in leaves(RunConfig().evaluation)}


def stage_job(config, tmp_path, **other):
    records = {"alignment": rows(3, "alignment"), "harmful": rows(2, "harmful")}
    # The order of the values is that of ``StageJob``'s parameters. The other jobs below do the same.
    arguments = {"base": "b", "parent": None, "records": records, "defenses": [Booster()], **other}
    return StageJob(Stage.ALIGNMENT, config, *arguments.values())


def repair_job(config, tmp_path, **other):
    models = {name: artifact(tmp_path / name, name) for name in ("aligned", "finetuned")}
    arguments = {"base": "b", **models, "records": {"harmful": rows(2, "harmful")}, "defenses": [Antidote()], **other}
    return RepairJob(config, *arguments.values())


def edit_job(config, tmp_path, **other):
    aligned = artifact(tmp_path / "aligned", "aligned")
    arguments = {"base": "b", "aligned": aligned, "records": rows(2, "attack"), "attack": ModelEdit(), **other}
    return EditJob(config, *arguments.values())


def selection_job(config, tmp_path, **other):
    aligned = artifact(tmp_path / "aligned", "aligned")
    arguments = {"aligned": aligned, "attack": BenignSelection(), "candidates": rows(3, "task"),
             "harmful": rows(2, "attack"), "safe": rows(2, "alignment"), **other}  # fmt: skip
    return SelectionJob(config, *arguments.values())


def prompts(**other):
    rows_of = {name: rows(count, "test") for name, count in (("harmful", 3), ("over_refusal", 2), ("task_rows", 2))}
    arguments = {
        **rows_of,
        "task": get_task("builtin"),
        "judges": ("keyword",),
        "refusal_judge": "xstest_string",
        **other,
    }
    return TestSets(**arguments)


OF_NO_KEY = {
    stage_job: OF_NO_STAGE | OTHER_STAGE | EVALUATION,
    repair_job: (
        OF_NO_STAGE
        | OF_NO_REPAIR
        | OTHER_STAGE
        | {f"alignment.{n}" for n in leaves(RunConfig().alignment)}
        | EVALUATION
    )
    - {"finetuning.batch_size"},
}


def ignored(name, places):
    return name in places or name.partition(".")[0] in places


@pytest.mark.parametrize("make", [stage_job, repair_job])
def test_every_value_of_the_configuration_decides_a_stage_or_is_listed(make, tmp_path):
    """A new option changes the key until ``OF_NO_KEY`` lists the option."""
    config = small_config()
    before = make(config, tmp_path).key()
    for name in leaves(config):
        same = make(changed(config, name), tmp_path).key() == before
        assert same == ignored(name, OF_NO_KEY[make]), name


def test_every_value_of_the_configuration_decides_an_answer_or_is_listed(tmp_path):
    config = small_config()
    before = answers_key("m", config, prompts(), SystemSlot())
    for name in leaves(config):
        same = answers_key("m", changed(config, name), prompts(), SystemSlot()) == before
        assert same == ignored(name, OF_NO_ANSWER), name


def test_the_adapter_protocol_decides_a_selection(tmp_path):
    config = small_config()
    other = replace(config, adapter_protocol="continue")
    assert selection_job(config, tmp_path).key() != selection_job(other, tmp_path).key()


def all_different(jobs):
    keys = [job.key() for job in jobs]
    assert len(set(keys)) == len(keys)


def test_rows_models_and_arguments_decide_the_jobs(tmp_path):
    config = small_config()
    two, kind = rows(2, "harmful"), [Record("ask", "say", kind="fraud"), Record("ask", "say", kind="theft")]
    all_different(
        stage_job(config, tmp_path, **other)
        for other in (
            {},
            {"base": "c"},
            {"parent": artifact(tmp_path / "p1", "1")},
            {"parent": artifact(tmp_path / "p2", "2")},
            {"records": {"alignment": two}},
            {"records": {"alignment": kind[:1]}},
            {"records": {"alignment": kind[1:]}},  # only the category differs
            {"defenses": [Booster(lam=1.0)]},
            {"defenses": []},
        )
    )
    all_different(
        repair_job(config, tmp_path, **other)
        for other in (
            {},
            {"base": "c"},
            {"aligned": artifact(tmp_path / "a2", "3")},
            {"finetuned": artifact(tmp_path / "f2", "4")},
            {"records": {"harmful": rows(3, "harmful")}},
            {"defenses": [Antidote(prune_ratio=0.5)]},
        )
    )
    all_different(
        edit_job(config, tmp_path, **other)
        for other in (
            {},
            {"base": "c"},
            {"aligned": artifact(tmp_path / "a3", "5")},
            {"records": rows(3, "attack")},
            {"attack": ModelEdit(layer=1)},
        )
    )
    all_different(
        selection_job(config, tmp_path, **other)
        for other in (
            {},
            {"aligned": artifact(tmp_path / "a4", "6")},
            {"candidates": rows(4, "task")},
            {"harmful": rows(3, "attack")},
            {"safe": rows(3, "alignment")},
            {"attack": BenignSelection(kind="gradient")},
        )
    )


def test_models_prompts_and_slots_decide_answers():
    config = small_config()
    keys = [
        answers_key("m", config, prompts(), SystemSlot()),
        answers_key("other", config, prompts(), SystemSlot()),
        answers_key("m", config, prompts(harmful=rows(4, "test")), SystemSlot()),
        answers_key("m", config, prompts(over_refusal=rows(4, "test")), SystemSlot()),
        answers_key("m", config, prompts(task_rows=rows(4, "test")), SystemSlot()),
        answers_key("m", config, prompts(), SystemSlot("be kind")),
        answers_key("m", config, prompts(), SystemSlot(None, (1, 2))),
    ]
    assert len(set(keys)) == len(keys)


def test_answers_stay_when_another_judge_is_asked():
    config = small_config()
    one, two = prompts(), prompts(judges=("builtin",), refusal_judge="builtin")
    assert answers_key("m", config, one, SystemSlot()) == answers_key("m", config, two, SystemSlot())
    assert verdicts_key("a", one) != verdicts_key("a", two)


def test_endpoint_model_and_weights_of_a_judge_decide_a_verdict(tmp_path, monkeypatch):
    remote = prompts(judges=("hexphi:gpt",))
    keys = [verdicts_key("a", remote), verdicts_key("a", prompts(judges=("hexphi:other",))), verdicts_key("b", remote)]
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    keys.append(verdicts_key("a", remote))
    judge = artifact(tmp_path / "judge", "one").folder
    local = prompts(judges=(f"harmbench:{judge}",))
    keys.append(verdicts_key("a", local))
    (judge / "model.safetensors").write_text("two")
    keys.append(verdicts_key("a", local))
    (judge / "tokenizer.json").write_text("{}")
    keys.append(verdicts_key("a", local))
    refusals = prompts(refusal_judge=f"wildguard_refusal:{judge}")
    keys.append(verdicts_key("a", refusals))
    (judge / "model.safetensors").write_text("six")
    keys.append(verdicts_key("a", refusals))
    assert len(set(keys)) == len(keys)


def test_how_an_attack_reads_answers_decides_a_verdict():
    from hftlight.attacks import Encoded

    test_sets = [prompts(), *(prompts(attack=Encoded(side=side)) for side in ("both", "response"))]
    assert len({verdicts_key("a", each) for each in test_sets}) == 3
    assert verdicts_key("a", prompts(attack=HarmfulMix(n=3))) == verdicts_key("a", prompts(attack=HarmfulMix(n=4)))


def test_models_texts_and_references_decide_the_further_metrics(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("once")
    evaluation = replace(small_config().evaluation, perplexity=str(text))
    config = small_config(evaluation=evaluation)
    cases = [
        ("m", config, Reference("base", Artifact("tiny", "r"))),
        ("n", config, Reference("base", Artifact("tiny", "r"))),
    ]
    cases.append(("m", config, Reference("base", Artifact("tiny", "other"))))
    key_sets = [metric_keys(model, config, prompts(), SystemSlot(), reference) for model, config, reference in cases]
    text.write_text("twice")
    key_sets.append(metric_keys("m", config, prompts(), SystemSlot(), cases[0][2]))
    perplexities, drifts = ([keys[kind] for keys in key_sets] for kind in ("perplexity", "drift"))
    assert len(set(perplexities)) == 3  # the reference is no input
    assert len(set(drifts)) == 3  # the text is no input


# An entry is read exactly as written, or not at all.


def entry(tmp_path):
    place = tmp_path / "stages" / "one"
    (place / "artifact").mkdir(parents=True)
    (place / "artifact" / "weights.safetensors").write_bytes(bytes(range(256)) * 8)
    (place / "rows.jsonl").write_text('{"a": 1}\n{"a": 2}\n')
    (place / "lock").touch()
    cache.seal(place, "artifact", "rows.jsonl")
    return place


def emptied(path):
    path.write_bytes(b"")


def cut_at_a_line(path):
    path.write_bytes(path.read_bytes().split(b"\n")[0] + b"\n")


def half_written(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def other_bytes(path):
    import os

    before, data = path.stat(), bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # the size is unchanged, the times are restored


DAMAGES = (emptied, cut_at_a_line, half_written, other_bytes, Path.unlink)
FILES = ("artifact/weights.safetensors", "rows.jsonl", "seal.json")


@pytest.mark.parametrize(("damage", "name"), itertools.product(DAMAGES, FILES))
def test_a_damaged_entry_is_named_and_not_used(damage, name, tmp_path, capsys):
    place = entry(tmp_path)
    assert cache.whole(place)
    damage(place / name)
    assert not cache.whole(place)
    warning = capsys.readouterr().err
    if (damage, name) != (Path.unlink, "seal.json"):  # an entry without a seal is unfinished, which needs no warning
        assert "stages/one in the cache has changed since it was written (" in warning
        assert f"({name} differs)" in warning
    assert not cache.whole(place)


def test_a_large_file_whose_times_were_put_back_is_read_again(tmp_path):
    place = tmp_path / "stages" / "large"
    place.mkdir(parents=True)
    (place / "weights.bin").write_bytes(b"x" * 2**20)
    cache.seal(place)
    assert cache.whole(place)
    other_bytes(place / "weights.bin")
    assert not cache.whole(place)


def test_a_file_beside_the_artifacts_own_is_noticed_and_one_outside_is_not(tmp_path):
    place = entry(tmp_path)
    (place / "checkpoint").write_text("x")
    assert cache.whole(place)
    (place / "artifact" / "chat_template.jinja").write_text("other")
    assert not cache.whole(place)


def test_an_entry_is_made_once_and_anew_after_damage(tmp_path):
    places = []

    def make(place):
        places.append(place)
        (place / "rows.jsonl").write_text("{}\n")

    path = cache.kept("evaluations", "one", make)
    assert cache.kept("evaluations", "one", make) == path
    assert len(places) == 1
    emptied(path / "rows.jsonl")
    assert (cache.kept("evaluations", "one", make) / "rows.jsonl").read_text() == "{}\n"
    assert len(places) == 2


def test_nothing_is_kept_of_an_entry_that_failed():
    def fail(place):
        (place / "rows.jsonl").write_text("half")
        raise RuntimeError("judge")

    with pytest.raises(RuntimeError, match="judge"):
        cache.kept("evaluations", "failed", fail)
    assert not list(cache.cache_dir().glob("evaluations/*"))


def test_asdict_of_a_record_names_all_that_a_defense_may_read():
    assert set(asdict(Record("ask"))) == {
        "instruction",
        "response",
        "input",
        "source",
        "role",
        "kind",
        "id",
        "rejected",
        "language",
        "system",
        "history",
    }


def test_only_what_was_built_counts_as_work(tmp_path, monkeypatch):
    """A run calls a step reused only if no part of the step was computed."""
    monkeypatch.setenv("HFTLIGHT_CACHE", str(tmp_path))
    before = cache.built()
    for _ in range(2):
        cache.kept("evaluations", "one", lambda place: (place / "rows.jsonl").write_text("x"))
    assert cache.built() == before + 1
