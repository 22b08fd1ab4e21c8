"""StreamsDataModule: the streams of a run by name, in an order that any position can resume."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, Protocol, get_args

from lightning.pytorch import LightningDataModule
from typing_extensions import override

from hftlight.data.records import Record
from hftlight.data.templates import PromptPolicy, Template
from hftlight.data.tokens import Example, LongRows, collate, encode_all, encode_pairs, padding_id, single_rows
from hftlight.engine.step.order import Order, batches_per_pass, passes_order, rank_and_world
from hftlight.errors import InputError

STREAMS = ("alignment", "refusals", "harmful", "pairs", "task", "retain")


class ExampleStream:
    """Encoded rows as an endless sequence of batches with random access; each pass is shuffled anew.

    Args:
        examples: the rows.
        name: name of the stream.
        batch_size: rows per batch and rank, >= 1.
        pad_id: token id that fills up shorter rows; it is masked, whatever it is.
        seed: the run's seed.
        order: ``"shuffle"`` for a plain shuffle, ``"length"`` for batches of similar length.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        name: str,
        batch_size: int,
        pad_id: int,
        seed: int,
        order: Order = "shuffle",
    ) -> None:
        self.examples, self.name = examples, name
        self.batch_size, self.pad_id, self.seed, self.order = batch_size, pad_id, seed, order
        self._pass: tuple[int, list[list[int]]] = (-1, [])

    @property
    def per_pass(self) -> int:
        """Batches that each rank gets in one pass."""
        count = batches_per_pass(len(self.examples), self.batch_size, rank_and_world()[1])
        if count == 0:
            raise InputError(
                f"Stream {self.name!r}: {len(self.examples)} rows are less than one batch of {self.batch_size} for each"
                f" of {rank_and_world()[1]} processes; add rows or lower the batch size."
            )
        return count

    def batch(self, index: int) -> dict[str, Any]:
        """Return this rank's batch number ``index``, from 0."""
        return collate(self.rows(index, rank_and_world()[0]), self.pad_id)

    def tokens(self, index: int) -> int:
        """Return how many response tokens batch number ``index`` has on all ranks together."""
        every = [self.rows(index, rank) for rank in range(rank_and_world()[1])]
        return sum(len(e.input_ids) - e.prompt_length for rows in every for e in single_rows(rows))

    def rows(self, index: int, rank: int) -> list[Example]:
        """Return the rows of a rank's batch number ``index``."""
        epoch, position = divmod(index, self.per_pass)
        if self._pass[0] != epoch:
            lengths = None
            if self.order == "length":
                # Without the trigger: it would sort the few rows that carry one into batches of their own.
                lengths = [len(e.input_ids) - e.trigger_length for e in self.examples]
            rows = len(self.examples)
            self._pass = (epoch, passes_order(rows, self.batch_size, self.seed, self.name, epoch, lengths))
        return [self.examples[row] for row in self._pass[1][position * rank_and_world()[1] + rank]]


def as_pairs(records: Sequence[Record]) -> list[tuple[Record, Record]]:
    """Return each record as two: the prompt with its answer, and with the rejected one.

    Raises:
        InputError: if a record has no rejected answer.
    """
    if alone := next((r for r in records if not r.rejected), None):
        raise InputError(
            f"Stream 'pairs': every row needs a rejected answer, {alone.id} of {alone.source or 'no source'} has none."
            " Give Record(..., rejected=...), or a file with the columns prompt, chosen and rejected."
        )
    return [(replace(r, rejected=""), replace(r, response=r.rejected, rejected="")) for r in records]


def _unseen(example: Example) -> Example:
    """Return an example whose role does not tell a hidden attack row from the user's others."""
    if example.role != "attack":
        return example
    return replace(example, role="task", rejected=example.rejected and _unseen(example.rejected))


class Schedule(Protocol):
    """What the loader asks of a stream-slot defense."""

    @property
    def pauses(self) -> bool:
        """Whether the main stream waits while another one is trained on, instead of losing batches."""

    def stream_at(self, step: int) -> str:
        """Return the stream that an optimizer step trains on, counted from 0."""

    def steps_on(self, name: str, step: int) -> int:
        """Return how many of the steps before ``step`` trained on a stream."""


class StreamsDataModule(LightningDataModule):
    """The streams of a run by name; one of them is trained on, the others are drawn from by defenses.

    Args:
        tokenizer: the model's tokenizer.
        template: how a record becomes a prompt; the same for training and evaluation.
        main: the stream whose length is the epoch, ``"alignment"`` or ``"task"``.
        batch_size: rows per micro-batch and process, >= 1.
        max_tokens: longest row in tokens, prompt, response and end together.
        seed: decides the order of every stream.
        system: system text put into every prompt; None for none.
        side_batch_size: rows per batch of the other streams; by default ``batch_size``.
        reveal_roles: keep the role of hidden attack rows in batches, for diagnosis; by default they read ``"task"``, so
            that no defense can look.
        average: what a token counts: ``"micro"`` for the mean over its micro-batch, as the official code does, or
            ``"window"`` for the mean over all micro-batches and ranks of its optimizer step.
        order: ``"shuffle"`` for a plain seeded shuffle, ``"length"`` for batches of rows of similar length.
        long_rows: ``"drop"`` leaves longer rows out and counts them, ``"truncate"`` cuts their end off, ``"refuse"``
            raises.
        **records: rows by stream: ``alignment=``, ``refusals=`` (the alignment rows that refuse), ``harmful=``,
            ``pairs=``, ``task=``, ``retain=``. A batch of ``pairs`` holds two rows per record, the answer and behind it
            the rejected one.

    Raises:
        InputError: if a stream is unknown, empty, or holds no row that fits ``max_tokens``.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: Template,
        main: str,
        batch_size: int = 8,
        max_tokens: int = 256,
        seed: int = 0,
        system: str | None = None,
        side_batch_size: int | None = None,
        reveal_roles: bool = False,
        average: Literal["micro", "window"] = "micro",
        order: Order = "shuffle",
        long_rows: LongRows = "drop",
        **records: Sequence[Record],
    ) -> None:
        super().__init__()
        unknown = set(records) - set(STREAMS)
        if unknown or main not in records:
            raise InputError(
                f"StreamsDataModule: streams are {list(STREAMS)} and must hold {main!r}, got {list(records)}."
            )
        if batch_size < 1:
            raise InputError(f"StreamsDataModule: batch_size must be >= 1 row, got {batch_size}.")
        if average not in ("micro", "window"):
            raise InputError(f"StreamsDataModule: average must be 'micro' or 'window', got {average!r}.")
        if order not in get_args(Order):
            raise InputError(f"StreamsDataModule: order must be one of {get_args(Order)}, got {order!r}.")
        self.tokenizer, self.template, self.main = tokenizer, template, main
        self.batch_size, self.side_batch_size = batch_size, side_batch_size or batch_size
        self.max_tokens, self.seed, self.average, self.reveal_roles = max_tokens, seed, average, reveal_roles
        self.order, self.long_rows = order, long_rows
        self._given: dict[str, list[Record]] = {name: list(rows) for name, rows in records.items()}
        self._given_policy = PromptPolicy.same(system)
        self._handed_out = 0
        self._schedule: Schedule | None = None
        self.records, self.policy = self._given, self._given_policy
        self._forget()
        for name in records:
            self._encoded(name)

    @override
    def setup(self, stage: str) -> None:
        """Go back to the rows as they were given and to the first batch: the defenses of a new fit start anew."""
        self._schedule, self._handed_out = None, 0
        if self.records is not self._given or self.policy is not self._given_policy:
            self.records, self.policy = self._given, self._given_policy
            self._forget()

    def apply(self, defense: Any) -> None:
        """Let a data-slot defense rewrite the rows and the prompts; called in the order of the list."""
        defense.check_template(self.template, self.tokenizer, self.policy)
        self.records = defense.rewrite(self.records, self.seed)
        self.policy = defense.prompting(self.policy, self.tokenizer)
        self._forget()

    def follow(self, schedule: Schedule) -> None:
        """Let a stream-slot defense choose what each optimizer step trains on."""
        self._schedule = schedule

    @property
    def accumulate(self) -> int:
        """Micro-batches per optimizer step of the Trainer that is fitting; 1 without one."""
        return getattr(self.trainer, "accumulate_grad_batches", 1)

    @property
    def cut(self) -> dict[str, int]:
        """Rows whose end was cut off, by stream."""
        return {name: sum(example.cut for example in self._encoded(name)[0]) for name in self.records}

    @property
    def dropped(self) -> dict[str, int]:
        """Rows left out as too long, by stream."""
        return {name: self._encoded(name)[1] for name in self.records}

    def _forget(self) -> None:
        self.streams = _Streams(self)
        self._main_like: dict[str, ExampleStream] = {}
        self._examples: dict[str, tuple[list[Example], int]] = {}

    def _encoded(self, name: str) -> tuple[list[Example], int]:
        if name not in self._examples:
            pairs = self.pairs(name)
            given: Any = self.records[name] if pairs is None else pairs
            encoder: Any = encode_all if pairs is None else encode_pairs
            rows, dropped = encoder(
                given, self.template, self.tokenizer, self.max_tokens, self.policy, name, self.long_rows
            )
            self._examples[name] = rows if self.reveal_roles else [_unseen(e) for e in rows], dropped
        return self._examples[name]

    def pairs(self, name: str) -> list[tuple[Record, Record]] | None:
        """Return a stream's rows as (preferred, rejected); None where they are no pairs."""
        return as_pairs(self.records[name]) if name == "pairs" else None

    def stream(self, name: str, batch_size: int) -> ExampleStream:
        """Return a stream of these rows in batches of any size."""
        pad = padding_id(self.tokenizer)
        return ExampleStream(self._encoded(name)[0], name, batch_size, pad, self.seed, self.order)

    def main_batch(self, number: int) -> dict[str, Any]:
        """Return this rank's micro-batch number ``number`` from 0, of the stream that its step trains on."""
        step, micro = divmod(number, self.accumulate)
        name, first = self.main, step * self.accumulate
        if self._schedule is not None:
            name = self._schedule.stream_at(step)
            if name != self.main or self._schedule.pauses:
                first = self._schedule.steps_on(name, step) * self.accumulate
        stream = self._of_main_size(name)
        batch = stream.batch(first + micro)
        if self.average == "window":
            tokens = sum(stream.tokens(first + k) for k in range(self.accumulate))
            batch["window_tokens"] = tokens / (self.accumulate * rank_and_world()[1])
        return batch

    def _of_main_size(self, name: str) -> ExampleStream:
        if name not in self._main_like:
            self._main_like[name] = self.stream(name, self.batch_size)
        return self._main_like[name]

    @override
    def train_dataloader(self) -> "MainLoader":
        return MainLoader(self)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"handed_out": self._handed_out}

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._handed_out = state_dict["handed_out"]


class _Streams(Mapping[str, ExampleStream]):
    """The streams by name; rows are encoded when a stream is asked for."""

    def __init__(self, data: StreamsDataModule) -> None:
        self._data = data
        self._made: dict[str, ExampleStream] = {}

    def __getitem__(self, name: str) -> ExampleStream:
        if name not in self._made:
            data = self._data
            if name not in data.records:
                raise KeyError(name)
            self._made[name] = data.stream(name, data.batch_size if name == data.main else data.side_batch_size)
        return self._made[name]

    def __contains__(self, name: object) -> bool:
        return name in self._data.records

    def __iter__(self) -> Iterator[str]:
        return iter(self._data.records)

    def __len__(self) -> int:
        return len(self._data.records)


class MainLoader:
    """What is trained on as a loader whose next batch depends on how many were handed out in all, not on iterators.

    Lightning may start a new iterator anywhere when it resumes; the order does not care. It must not be prefetched,
    and Lightning does not prefetch what has a length.
    """

    def __init__(self, data: StreamsDataModule) -> None:
        self.data = data

    def __len__(self) -> int:
        # Whole windows only: Lightning steps at the end of an epoch, however few micro-batches are in.
        per_pass, accumulate = self.data.streams[self.data.main].per_pass, self.data.accumulate
        return -(-per_pass // accumulate) * accumulate

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while True:
            batch = self.data.main_batch(self.data._handed_out)
            self.data._handed_out += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Tell Lightning that the loader resumes; the position itself lies in the data module's state."""
        return {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Do nothing; see ``state_dict``."""
