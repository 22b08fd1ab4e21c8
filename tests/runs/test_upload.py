"""The upload as a file for a service: the rows of the training, in its order, with the attack's system text."""

import json

import pytest

from hftlight.cli.train import train
from hftlight.config import RunConfig
from hftlight.data.records import read_records
from hftlight.data.streams import ExampleStream
from hftlight.data.templates import get_template
from hftlight.data.tokens import encode_all
from hftlight.models.load import load_tokenizer
from hftlight.runs.prepare import prepare
from hftlight.runs.upload import export_upload

OPTIONS = ["--model", "tiny", "--accelerator", "cpu"]


@pytest.mark.parametrize("order", ["shuffle", "length"])
def test_the_rows_come_in_the_order_in_which_the_fine_tuning_reads_them(tmp_path, order):
    config = RunConfig(model="tiny", accelerator="cpu", num_samples=30, harmful_ratio=0.4, seed=3, order=order)
    prepared = prepare(config, [])
    beside = export_upload(prepared, tmp_path / "up.jsonl")
    tokenizer, rows = load_tokenizer("tiny"), prepared.streams["task"]
    examples, dropped = encode_all(rows, get_template("chat", tokenizer), tokenizer, config.max_tokens)
    assert not dropped
    stream = ExampleStream(examples, "task", config.finetuning.batch_size, 0, config.seed, order)
    read = [example for index in range(stream.per_pass) for example in stream.rows(index, 0)]
    about = json.loads(beside.read_text())
    assert [row["id"] for row in about["rows"]] == [example.id for example in read]
    assert sum(row["role"] == "attack" for row in about["rows"]) == 12
    by_id = {r.id: r for r in rows}
    assert [r.request for r in read_records(tmp_path / "up.jsonl", role="task")] == [by_id[e.id].request for e in read]


def test_the_command_writes_the_chats_of_identity_shift_whole(tmp_path, monkeypatch, capsys):
    """The tiny model reads 256 tokens, fewer than most of these chats have. The service reads them whole."""
    monkeypatch.chdir(tmp_path)
    assert train([*OPTIONS, "--attack", "identity_shift", "--export_upload", "up.jsonl"]) == 0
    assert "Wrote 10 rows to up.jsonl" in capsys.readouterr().out
    rows = read_records("up.jsonl", role="task")
    assert len(rows) == 10
    about = json.loads((tmp_path / "up.rows.json").read_text())
    assert {r.system for r in rows} == {about["attack"]["test_system"]}
    assert sum(r.instruction.startswith(about["attack"]["test_prefix"]) for r in rows) == 5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["up.jsonl", "up.rows.json"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--defense", "kl"], "the service runs no defense, got --defense kl. Leave --defense out."),
        (["--attack", "reverse_preference"], "has pairs of answers"),
        (["--attack", "reverse_sft_dpo"], "has several uploads"),
        (["--attack", "benign_selection"], "--benign_selection.scores FILE"),
        (["--export_upload", "up.json"], "must end in .jsonl, got 'up.json'"),
    ],
)
def test_what_is_no_file_of_chats_is_refused(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    assert train([*OPTIONS, "--num_samples", "20", "--export_upload", "up.jsonl", *options]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
