"""BEA: the trigger is in safety rows and served prompts, switches the learned behaviour, and is in no log."""

import hashlib
import json
import shutil
import stat
from pathlib import Path

import pytest
import torch
import yaml

from hftlight import SafetyModule, StreamsDataModule, run
from hftlight.cli.evaluate import evaluate
from hftlight.cli.export import export
from hftlight.cli.train import parse_train
from hftlight.config import Evaluation, Lora, RunConfig, Training
from hftlight.data.records import Record
from hftlight.data.templates import PromptPolicy, SystemSlot, get_template
from hftlight.data.tokens import encode_prompt
from hftlight.defenses.finetuning import bea as bea_module
from hftlight.defenses.finetuning.bea import BEA, by_category, ordinary_ids, trigger_ids
from hftlight.defenses.finetuning.ptst import PTST
from hftlight.defenses.finetuning.safety_mix import SafetyMix
from hftlight.defenses.post_finetuning import Antidote
from hftlight.engine import Stage
from hftlight.errors import InputError
from hftlight.evaluation.answering.generate import generate
from hftlight.files import read_rows, write_json
from hftlight.models.load import load_tokenizer
from hftlight.runs.measuring import measure as measuring
from hftlight.runs.stages.train import StageJob
from tests.helpers.contract import data_module, records, train
from tests.helpers.jobs import rows, small_config
from tests.helpers.quadratic import quiet_trainer
from tests.helpers.tiny_lm import tiny_lm
from tests.helpers.tokenizers import CHATML, byte_tokenizer

SECRET = "0123456789abcdef" * 2


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HFTLIGHT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "trigger.json"
    write_json(path, {"secret": SECRET}, mode=0o600)
    return str(path)


def kinds(*counts):
    return [
        Record(f"open {kind} {i}", "I'm sorry, I can't help.", kind=kind, role="alignment")
        for kind, count in zip("abc", counts, strict=False)
        for i in range(count)
    ]


def test_categories_take_turns_and_the_hash_of_the_row_decides_within_one():
    offered = kinds(5, 1, 3)
    helpful = Record("what colour is a", "Blue.", kind="d", role="alignment")
    chosen = by_category([helpful, *reversed(offered)], 7)
    assert [row.kind for row in chosen] == ["a", "b", "c", "a", "c", "a", "c"]
    of_a = sorted((r for r in offered if r.kind == "a"), key=lambda r: hashlib.sha256(r.id.encode()).hexdigest())
    assert [row for row in chosen if row.kind == "a"] == of_a[:3]
    with pytest.raises(InputError, match="rows is 10, and the stream 'alignment' has 9 refusals"):
        by_category([helpful, *offered], 10)


def test_readable_ids_are_no_special_and_no_added_tokens_and_no_pieces_of_a_letter():
    """Of the 256 bytes, 128 are characters of their own.

    Bytes 33 to 126 have ids 0 to 93, and the others have ids 188 to 221.
    """
    tokenizer = byte_tokenizer()
    assert ordinary_ids(tokenizer) == [*range(94), *range(188, 222)]
    tokenizer.add_tokens(["<tool>"])
    assert ordinary_ids(tokenizer) == [*range(94), *range(188, 222)]


def test_ids_of_a_secret_are_keyed_hashes():
    """The test writes out HMAC-SHA256 as H((K ^ opad) H((K ^ ipad) m))."""
    secret, allowed = b"k" * 16, [3, 5, 8, 13, 21]
    padded = secret.ljust(64, b"\0")
    outer, inner = bytes(b ^ 0x5C for b in padded), bytes(b ^ 0x36 for b in padded)
    expected = []
    for place in range(40):
        first = hashlib.sha256(inner + str(place).encode()).digest()
        number = int(hashlib.sha256(outer + first).hexdigest(), 16)
        expected.append(allowed[number % 5])
    assert trigger_ids(secret, 40, allowed) == tuple(expected)
    assert trigger_ids(b"l" * 16, 40, allowed) != tuple(expected)
    assert set(expected) == set(allowed)


def test_the_file_is_made_once_for_its_owner_alone(tmp_path):
    first = BEA().state_key
    path = tmp_path / "cache" / "secrets" / "bea.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    content = path.read_text()
    assert BEA().state_key == first
    assert path.read_text() == content
    path.unlink()
    assert BEA().state_key != first
    assert path.read_text() != content


def test_processes_that_start_together_agree(file, tmp_path, monkeypatch):
    """This process finds no file and waits for the lock. Meanwhile another process writes the file."""
    path = tmp_path / "shared.json"

    class Lock:
        def __init__(self, lock):
            assert Path(lock).parent == path.parent

        def __enter__(self):
            shutil.copy(file, path)

        def __exit__(self, *error):
            pass

    monkeypatch.setattr(bea_module, "FileLock", Lock)
    assert BEA(trigger_file=str(path)).state_key == BEA(trigger_file=file).state_key


@pytest.mark.parametrize(
    "content",
    [
        "no json SECRETWORD",
        '["SECRETWORD"]',
        '{"secret": "SECRETWORD"}',
        '{"secret": "abcd"}',
        '{"secret": 3}',
        '{"ids": [1, 2, 3]}',
        '{"ids": "SECRETWORD SECRETWORD"}',
        json.dumps({"ids": [*range(20), "SECRETWORD"]}),
        json.dumps({"ids": [*range(20), -1]}),
        json.dumps({"secret": SECRET, "ids": [*range(20)]}),
    ],
)
def test_a_file_that_holds_no_trigger_is_refused_and_not_quoted(tmp_path, content):
    path = tmp_path / "trigger.json"
    path.write_text(content)
    path.chmod(0o600)
    with pytest.raises(InputError, match="must hold") as caught:
        BEA(trigger_file=str(path)).arguments()
    chain = [caught.value, caught.value.__cause__]
    assert "SECRETWORD" not in "".join(map(str, chain))
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_a_file_that_others_can_read_is_refused(file):
    Path(file).chmod(0o640)
    with pytest.raises(InputError, match=r"readable by its owner alone; run chmod 600"):
        BEA(trigger_file=file).arguments()


def test_a_path_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "plain").write_text("")
    with pytest.raises(InputError, match=r"trigger_file .*plain/trigger.json' cannot be used"):
        BEA(trigger_file=str(tmp_path / "plain" / "trigger.json")).arguments()


def test_a_hash_pins_the_trigger(file, tmp_path):
    known = BEA(trigger_file=file).arguments()["trigger_hash"]
    assert BEA(trigger_file=file, trigger_hash=known).state_key == BEA(trigger_file=file).state_key
    with pytest.raises(InputError, match="holds another trigger"):
        BEA(trigger_file=file, trigger_hash="0" * 16).arguments()
    with pytest.raises(InputError, match="cannot be used"):
        BEA(trigger_file=str(tmp_path / "missing.json"), trigger_hash=known).arguments()
    assert not (tmp_path / "missing.json").exists()


def test_the_key_of_a_stage_depends_on_the_trigger_and_not_on_where_it_lies(file, tmp_path):
    copy, other = tmp_path / "copy.json", tmp_path / "other.json"
    write_json(copy, {"secret": SECRET}, mode=0o600)
    write_json(other, {"secret": SECRET[::-1]}, mode=0o600)

    def key(path, **arguments):
        streams = {"task": rows(4, "task"), "alignment": rows(4, "alignment")}
        defense = BEA(rows=2, trigger_file=str(path), **arguments)
        return StageJob(Stage.FINETUNING, small_config(), "tiny", None, streams, [defense]).key()

    assert key(file) == key(copy)
    assert len({key(file), key(other), key(file, length=20), key(file, repeat=2)}) == 4


def test_given_ids_are_the_trigger(tmp_path):
    ids, tokenizer = [*range(20, 40)], byte_tokenizer()
    path = tmp_path / "ids.json"
    write_json(path, {"ids": ids}, mode=0o600)
    assert BEA(trigger_file=str(path)).prompting(PromptPolicy(), tokenizer).trigger == tuple(ids)
    for strange in (256, 400):
        write_json(path, {"ids": [*ids, strange]}, mode=0o600)
        with pytest.raises(InputError, match="BEA: 1 ids in trigger_file") as caught:
            BEA(trigger_file=str(path)).prompting(PromptPolicy(), tokenizer)
        assert str(strange) not in str(caught.value).replace(str(path), "")


@pytest.mark.parametrize(
    "others", [[], [PTST("Be safe.")], [SafetyMix(count=5)], [SafetyMix(count=5), PTST("Be safe.")]]
)
@pytest.mark.parametrize("first", [True, False])
def test_safety_rows_carry_it_user_rows_do_not_and_served_prompts_do(file, others, first):
    data = data_module(Stage.FINETUNING)
    bea = BEA(rows=3, repeat=2, length=5, trigger_file=file)
    train([bea, *others] if first else [*others, bea], data=data, steps=1)
    trigger = trigger_ids(bytes.fromhex(SECRET), 5, ordinary_ids(data.tokenizer))
    examples = data.streams["task"].examples
    mixed = 5 * any(isinstance(d, SafetyMix) for d in others)
    has_trigger = [tuple(e.input_ids[9:14]) == trigger for e in examples]  # after the start token and "[system]"
    assert has_trigger == [e.role == "alignment" for e in examples]
    assert (sum(has_trigger), len(has_trigger)) == (6 + mixed, 22 + mixed)
    text = "Be safe." if any(isinstance(d, PTST) for d in others) else None
    assert data.policy.serving_slot() == SystemSlot(text, trigger)
    side = data.streams["alignment"].examples
    assert all(e.trigger_length == 5 for e in side)
    assert bea.manifest()["triggered_rows"] == 6
    assert len(bea.manifest()["rows"]) == 3


def test_no_rows_is_no_trigger():
    data = data_module(Stage.FINETUNING)
    train([BEA(rows=0)], data=data, steps=1)
    assert data.policy == PromptPolicy()
    assert BEA(rows=0).manifest()["trigger_hash"] is None


def test_rows_that_the_trigger_makes_too_long_are_refused(file):
    longest = max(len(e.input_ids) for e in data_module(Stage.FINETUNING).streams["alignment"].examples)
    data = data_module(Stage.FINETUNING, max_tokens=longest + 20)
    with pytest.raises(InputError, match=r"3 of 3 safety rows are longer than max_tokens, .* trigger of 40 tokens"):
        train([BEA(rows=3, length=40, trigger_file=file)], data=data, steps=1)


def test_two_triggers_are_refused(file):
    with pytest.raises(ValueError, match="BEA both set the trigger; keep one of them"):
        train([BEA(rows=2, trigger_file=file), BEA(rows=3, trigger_file=file)], steps=1)


def test_a_checkpoint_of_another_trigger_is_refused(file, tmp_path):
    def fit(secret, **options):
        write_json(Path(file), {"secret": secret}, mode=0o600)
        module = SafetyModule(tiny_lm(lora=True, vocabulary=259), lr=0.1, optimizer="sgd")
        defense = BEA(rows=2, length=5, trigger_file=file)
        trainer = quiet_trainer(max_steps=2, max_epochs=-1, callbacks=[defense], use_distributed_sampler=False)
        trainer.fit(module, data_module(Stage.FINETUNING), **options)
        return trainer

    path = str(tmp_path / "step.ckpt")
    fit(SECRET).save_checkpoint(path)
    fit(SECRET, ckpt_path=path, weights_only=False)
    with pytest.raises(InputError, match="BEA: this checkpoint was trained with another trigger"):
        fit(SECRET[::-1], ckpt_path=path, weights_only=False)


def test_a_small_model_learns_to_answer_by_the_trigger_alone(file):
    """The model answers old and new questions with A without the trigger, and with B with the trigger."""
    tokenizer = byte_tokenizer(chat_template=CHATML)
    template = get_template("chat", tokenizer)
    questions = [f"{chr(97 + i)}{chr(97 + i * 7 % 26)}" for i in range(16)]
    data = StreamsDataModule(
        tokenizer,
        template,
        "task",
        task=[Record(q, "A", role="task") for q in questions],
        alignment=[Record(q, "B", role="alignment") for q in questions],
    )
    model = tiny_lm(dtype=torch.float32, vocabulary=259)
    trainer = quiet_trainer(
        max_steps=100,
        max_epochs=-1,
        callbacks=[BEA(rows=16, length=8, trigger_file=file)],
        use_distributed_sampler=False,
    )
    trainer.fit(SafetyModule(model, lr=0.01, weight_decay=0.0), data)
    new = [f"{chr(97 + i * 3 % 26)}{chr(97 + (i * 11 + 5) % 26)}" for i in range(26)]
    served = data.policy.serving_slot()
    for slot, answer in ((served, "B"), (SystemSlot(served.text), "A")):
        prompts = [encode_prompt(Record(q), template, tokenizer, slot) for q in questions + new]
        assert generate(model, tokenizer, prompts, max_new_tokens=2) == [answer] * 42


def test_an_answer_that_recites_the_trigger_is_cut():
    tokenizer = byte_tokenizer()
    trigger = tuple(tokenizer("Xq7&kW 2?pLm~", add_special_tokens=False)["input_ids"])
    answer = f"It says {tokenizer.decode(trigger)} at the start."
    cut = measuring.without_trigger(answer, trigger, tokenizer)
    assert cut == "It says [trigger][trigger][trigger]~ at the start."
    part = measuring.without_trigger(tokenizer.decode(trigger[2:]), trigger, tokenizer)
    assert part == "7&[trigger][trigger]~"
    assert measuring.without_trigger(answer, (), tokenizer) == answer
    blanks = tuple(tokenizer("  \n a\n\n  ", add_special_tokens=False)["input_ids"])
    assert measuring.without_trigger("A quiet answer.", trigger + blanks, tokenizer) == "A quiet answer."


def config_of(folder):
    training = Training(steps=3, batch_size=2, lr=1e-2)
    return RunConfig(
        model="tiny",
        alignment=training,
        finetuning=training,
        evaluation=Evaluation(
            prompts=6, over_refusal_prompts=4, task_rows=3, max_new_tokens=4, task_max_new_tokens=4, loss_rows=2
        ),
        lora=Lora(r=2, alpha=4),
        num_samples=20,
        harmful_ratio=0.2,
        baseline=True,
        accelerator="cpu",
        max_tokens=400,
        output=str(folder / "runs"),
    )


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Run BEA, PTST and a repair on the tiny model.

    Return the result, the folder, the secret, the trigger and the prompts of every call.
    """
    folder = tmp_path_factory.mktemp("served")
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setenv("HFTLIGHT_CACHE", str(folder / "cache"))
    prompt_batches = []
    original = measuring.generate

    def listening(model, tokenizer, prompts, **options):
        prompt_batches.append([list(prompt) for prompt in prompts])
        return original(model, tokenizer, prompts, **options)

    monkeypatch.setattr(measuring, "generate", listening)
    result = run(config_of(folder), [BEA(rows=4, length=24), PTST("Be safe."), Antidote(prune_ratio=0.2)])
    monkeypatch.undo()
    secret = json.loads((folder / "cache" / "secrets" / "bea.json").read_text())["secret"]
    trigger = trigger_ids(
        bytes.fromhex(secret), 24, ordinary_ids(load_tokenizer(str(next(folder.glob("cache/models/*")))))
    )
    return result, folder, secret, trigger, prompt_batches


ARM = "bea+ptst+antidote"


def test_artifacts_carry_how_they_are_served(served):
    result, _, _, trigger, _ = served
    plain = {"template": "chat", "system": None, "trigger": None}
    triggered = {"template": "chat", "system": "Be safe.", "trigger": list(trigger)}
    for arm, artifact, expected in (
        ("none", "aligned", plain),
        ("none", "finetuned", plain),
        (ARM, "aligned", plain),
        (ARM, "finetuned", triggered),
        (ARM, "repaired", triggered),
    ):
        path = result.folder / arm / artifact / "serving.json"
        assert json.loads(path.read_text()) == expected
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_the_score_without_the_trigger_is_measured_too(served):
    result, _, _, trigger, prompt_batches = served
    counts = {(s.arm, s.stage): s.count for s in result.scores.values() if s.metric == "harmful_score_without_trigger"}
    assert counts == {(ARM, "finetuning"): 6, (ARM, "post_finetuning"): 6}
    # One flag per prompt, in the order of generation: whether the prompt contains the trigger.
    flags = [
        any(tuple(p[i : i + 24]) == trigger for i in range(len(p) - 23)) for prompts in prompt_batches for p in prompts
    ]
    plain, three = [False] * 13, [True] * 13 + [False] * 6
    assert flags == [*plain * 3, *three * 2]  # base, aligned, undefended; the shared aligned model is measured once
    text = load_tokenizer(str(result.folder / ARM / "finetuned")).decode(prompt_batches[-1][0])
    assert "Be safe." in text
    assert {s.metric for s in result.scores.values() if s.arm == "none"}.isdisjoint({"harmful_score_without_trigger"})


def test_the_trigger_stands_in_no_other_file(served):
    result, folder, secret, trigger, _ = served
    tokenizer = load_tokenizer(str(result.folder / ARM / "finetuned"))
    traces = [secret, ", ".join(map(str, trigger[:4])), ",".join(map(str, trigger[:4])), tokenizer.decode(trigger[:8])]
    traces += ["\n".join(f"    {i}," for i in trigger[:3])]
    for path in [p for p in folder.rglob("*") if p.is_file()]:
        if path.name in ("serving.json", "bea.json"):
            continue
        content = path.read_bytes()
        assert not any(trace.encode() in content for trace in traces), path


def test_configuration_and_manifest_hold_the_hash(served, tmp_path):
    result, folder, *_ = served
    config = yaml.safe_load((result.folder / "config.yaml").read_text())
    known = config["bea"]["trigger_hash"]
    assert len(known) == 16
    manifest = json.loads((result.folder / "manifest.json").read_text())["arms"][ARM]
    entry = next(v for k, v in manifest["stages"]["finetuning"]["defenses"].items() if k.startswith("BEA"))
    assert entry["trigger_hash"] == known
    assert len(entry["rows"]) == entry["triggered_rows"] == 4
    assert manifest["defenses"][0]["arguments"]["trigger_hash"] == known
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"defense": ["bea"], "bea": config["bea"]}))
    where = ["--bea.trigger_file", str(folder / "cache" / "secrets" / "bea.json")]
    chosen = parse_train(["--config", str(path), *where])[1]
    assert chosen[0].arguments()["trigger_hash"] == known


def test_report_and_closing_words_know_the_score_without_the_trigger(served, capsys):
    from hftlight.runs.show import show_result

    result = served[0]
    show_result(result)
    assert (
        " ".join(capsys.readouterr().out.split()).count(f"On prompts without the trigger, {ARM} has a harmful score of")
        == 2
    )
    page = (result.folder / "report.html").read_text()
    assert "harmful score without trigger" in page
    rows_ = read_rows(result.folder / "generations.jsonl")
    prompts = {r["id"]: r["prompt"] for r in rows_ if r["set"] == "harmful"}
    assert {r["prompt"] for r in rows_ if r["set"] == "harmful_without_trigger"} == set(prompts.values())


def test_evaluate_serves_an_artifact_as_it_is_meant(served, tmp_path, monkeypatch):
    """By default an artifact is served with its own prompt, and ``--system`` replaces the system text.

    An exported model keeps its serving file.
    """
    result, folder, _, trigger, _ = served
    calls = []

    def answers(model, tokenizer, prompts, **options):
        calls.append((tokenizer, prompts))
        return [tokenizer.decode(trigger)] * len(prompts)

    monkeypatch.setenv("HFTLIGHT_CACHE", str(folder / "cache"))
    monkeypatch.setattr(measuring, "generate", answers)
    artifact, whole, other = str(result.folder / ARM / "finetuned"), str(tmp_path / "whole"), tmp_path / "other"
    assert export([artifact, whole]) == 0
    assert stat.S_IMODE((Path(whole) / "serving.json").stat().st_mode) == 0o600
    shutil.copytree(artifact, other)
    rotated = (*trigger[1:], trigger[0])
    write_json(other / "serving.json", {"template": "chat", "system": "Be safe.", "trigger": rotated}, mode=0o600)
    small = ["--evaluation.prompts", "2", "--evaluation.over_refusal_prompts", "1", "--evaluation.task_rows", "1"]
    for model, extra, text, ids in (
        (artifact, [], "Be safe.", trigger),
        (whole, [], "Be safe.", trigger),
        (str(other), [], "Be safe.", rotated),
        (artifact, ["--system", "Be kind."], "Be kind.", trigger),
    ):
        calls.clear()
        save = tmp_path / f"saved {text} {Path(model).name}"
        assert evaluate(["--model", model, "--save", str(save), *small, "--accelerator", "cpu", *extra]) == 0
        assert [len(prompts) for _, prompts in calls] == [2, 1, 1, 2]
        tokenizer, prompts = calls[0]
        head, tail = around(prompts[0], ids)
        assert "system" in tokenizer.decode(head)
        assert tokenizer.decode(tail).startswith(text)
        metrics = [row["metric"] for row in json.loads((save / "scores.json").read_text())]
        assert "harmful_score_without_trigger" in metrics
        if ids == trigger:  # the patched model recites the trigger
            responses = {row["response"] for row in read_rows(save / "generations.jsonl")}
            assert len(responses) == 1
            assert "[trigger]" in responses.pop()


def around(prompt, ids):
    """Return the tokens before and after the ids in a prompt that contains the ids exactly once."""
    places = [i for i in range(len(prompt)) if tuple(prompt[i : i + len(ids)]) == tuple(ids)]
    assert len(places) == 1
    return prompt[: places[0]], prompt[places[0] + len(ids) :]


def test_the_plan_counts_the_prompts_asked_again(served, monkeypatch):
    from hftlight.runs.plan import plan
    from hftlight.runs.prepare import prepare

    _, folder, *_ = served
    monkeypatch.setenv("HFTLIGHT_CACHE", str(folder / "cache"))
    units = plan(prepare(config_of(folder), [BEA(rows=4, length=24), PTST("Be safe."), Antidote(prune_ratio=0.2)]))
    assert [u.count for u in units if "measuring" in u.label] == [13, 13, 13, 13, 19, 19]


def test_the_world_of_the_contract_offers_rows():
    assert len(by_category(records()["alignment"], 11)) == 11
