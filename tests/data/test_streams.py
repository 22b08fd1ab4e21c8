"""Loader of the streams: whole windows, schedules that drop or pause, and a second fit from the start."""

import copy

import pytest
import torch

from hftlight.data.records import Record
from hftlight.data.streams import StreamsDataModule
from hftlight.data.templates import get_template
from hftlight.engine import Defense, Slot, Stage
from hftlight.engine.step.side_streams import halves
from hftlight.errors import InputError
from tests.helpers.contract import data_module, model_of, train, weights_of
from tests.helpers.tokenizers import byte_tokenizer


class Every(Defense):
    """Train on the alignment stream in every third step."""

    stage, slots, streams = Stage.FINETUNING, (Slot.STREAM,), ("alignment",)

    def __init__(self, pauses=False):
        super().__init__()
        self.pauses = pauses

    def stream_at(self, step):
        return "alignment" if step % 3 == 0 else "task"


def handed_out(data, count):
    return [data.main_batch(number)["id"] for number in range(count)]


@pytest.mark.parametrize("pauses", [False, True], ids=["drop", "pause"])
def test_a_schedule_drops_or_keeps_the_batches_it_takes_the_place_of(pauses):
    data, plain = data_module(Stage.FINETUNING), data_module(Stage.FINETUNING)
    data.follow(Every(pauses))
    task = [plain.stream("task", 8).batch(k)["id"] for k in range(7)]
    alignment = [plain.stream("alignment", 8).batch(k)["id"] for k in range(3)]
    # Every third step trains on an alignment batch. A task stream that pauses then continues with its next batch.
    # Without a pause, each alignment batch drops the task batch of its step.
    rest = iter(task) if pauses else None
    expected = [
        alignment[step // 3] if step % 3 == 0 else next(rest) if rest is not None else task[step] for step in range(7)
    ]
    assert handed_out(data, 7) == expected


def test_a_main_stream_of_pairs_trains_on_the_preferred_answers():
    """Each batch holds the rejected rows as a batch of their own, with the same prompts in the same places."""
    data = data_module(Stage.ALIGNMENT, main="pairs")
    batch, records = data.main_batch(1), data.records["pairs"][8:16]
    both = [batch, batch["rejected"]]
    texts = [[data.tokenizer.decode(row[row != -100])[: -len("<eos>")] for row in b["labels"]] for b in both]
    assert [t.split("<")[0] for t in texts[0]] == [r.response for r in records]
    assert [t.split("<")[0] for t in texts[1]] == [r.rejected for r in records]
    assert batch["input_ids"].shape == batch["rejected"]["input_ids"].shape
    starts = [(b["labels"] != -100).int().argmax(1).tolist() for b in both]
    assert starts[0] == starts[1]
    for row, start in enumerate(starts[0]):
        assert torch.equal(*(b["input_ids"][row, :start] for b in both))
    assert "pairs" not in batch


def test_parts_of_a_stream_share_no_row():
    stream = data_module(Stage.ALIGNMENT).streams["harmful"]
    rest, held_out = ({e.id for e in part.examples} for part in halves(stream, "harmful", 0.25))
    assert not rest & held_out
    assert rest | held_out == {e.id for e in stream.examples}


def test_an_epoch_holds_whole_windows():
    """A pass has two batches, a step three micro-batches. Without rounding up, an epoch would end within a step."""
    module = train([], accumulate=3, steps=4, data=data_module(Stage.FINETUNING))
    assert module.trainer.global_step == 4
    assert module.trainer.datamodule._handed_out == 12


def test_a_second_fit_of_the_same_data_starts_anew():
    data, model = data_module(Stage.FINETUNING), model_of("lora")
    first = weights_of(train([Every()], model=copy.deepcopy(model), data=data))
    second = weights_of(train([Every()], model=copy.deepcopy(model), data=data))
    assert all(map(torch.equal, first.values(), second.values()))


# Pairs: each record gives two rows, the safe answer and then the rejected answer.


def paired(count=6):
    return [Record(f"ask {i}", f"no {i}", rejected=f"yes {i * 7}", id=f"p{i}", role="pairs") for i in range(count)]


def stream_of_pairs(rows, **options):
    tokenizer, one = byte_tokenizer(), [Record("a", "b")]
    template = get_template("plain", tokenizer)
    return StreamsDataModule(tokenizer, template, "alignment", batch_size=4, alignment=one, pairs=rows, **options)


def test_a_batch_of_pairs_holds_the_safe_answer_and_behind_it_the_rejected_one():
    data, all_numbers = stream_of_pairs(paired()), []
    stream = data.streams["pairs"]
    for k in range(2 * stream.per_pass):
        batch = stream.batch(k)
        assert len(batch["id"]) == 2 * batch["pairs"] == len(batch["labels"])
        # Even rows hold safe answers, odd rows hold rejected answers.
        assert batch["id"][0::2] == batch["id"][1::2]
        texts = [data.tokenizer.decode(labels[labels != -100]) for labels in batch["labels"]]
        numbers = [int(name[1:]) for name in batch["id"][0::2]]
        assert texts[0::2] == [f"no {i}<eos>" for i in numbers]
        assert texts[1::2] == [f"yes {i * 7}<eos>" for i in numbers]
        all_numbers += numbers
    assert sorted(all_numbers) == sorted([*range(6)] * 2)
    assert "pairs" not in data.streams["alignment"].batch(0)


def test_a_pair_of_which_one_answer_is_too_long_is_left_out():
    rows = paired(4)
    rows[2] = Record("ask 2", "no 2", rejected="yes " * 50, id="p2", role="pairs")
    data = stream_of_pairs(rows, max_tokens=100)
    assert data.dropped == {"alignment": 0, "pairs": 1}
    assert {row.id for row in data.streams["pairs"].examples} == {"p0", "p1", "p3"}
    with pytest.raises(InputError, match="no pair of 1 fits 20 tokens"):
        stream_of_pairs(rows[2:3], max_tokens=20)


def test_a_row_of_pairs_needs_a_rejected_answer():
    rows = [*paired(1), Record("ask", "no", id="alone", source="mine.jsonl")]
    with pytest.raises(InputError, match=r"needs a rejected answer, but alone of mine\.jsonl has none"):
        stream_of_pairs(rows)
