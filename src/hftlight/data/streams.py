"""StreamsDataModule: the streams of a run by name, in an order that can resume at any position."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, Protocol, get_args

from lightning.pytorch import LightningDataModule
from typing_extensions import override

from hftlight.data.records import Record
from hftlight.data.templates import PromptPolicy, Template
from hftlight.data.tokens import Example, LongRows, collate, encode_all, encode_pairs, padding_id, single_rows
from hftlight.engine.step.order import Order, batches_per_pass, passes_order, rank_and_world
from hftlight.errors import InputError

STREAMS = ("alignment", "refusals", "ordinary", "harmful", "pairs", "task", "retain")


class ExampleStream:
    """Endless sequence of batches of encoded rows, with random access.

    Each pass over the rows is shuffled anew.

    Args:
        examples: the rows.
        name: name of the stream.
        batch_size: rows per batch and rank, >= 1.
        pad_id: token id that pads shorter rows. Padding is masked for any id.
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

    def part(self, name: str, chosen: Callable[[str], bool]) -> "ExampleStream":
        """Return the stream of the rows whose id is chosen, shuffled under another name."""
        rows = [e for e in self.examples if chosen(e.id)]
        part = type(self)(rows, name, self.batch_size, self.pad_id, self.seed, self.order)
        _ = part.per_pass  # refuses a part that is too small
        return part

    def tokens(self, index: int) -> int:
        """Return the number of response tokens in batch number ``index``, over all ranks."""
        by_rank = [self.rows(index, rank) for rank in range(rank_and_world()[1])]
        return sum(len(e.input_ids) - e.prompt_length for rows in by_rank for e in single_rows(rows))

    def rows(self, index: int, rank: int) -> list[Example]:
        """Return the rows of a rank's batch number ``index``."""
        epoch, position = divmod(index, self.per_pass)
        # self._pass caches the number of the current pass and its batches as lists of row numbers.
        if self._pass[0] != epoch:
            lengths = None
            if self.order == "length":
                # Lengths exclude the trigger, which would put the few rows with a trigger into batches of their own.
                lengths = [len(e.input_ids) - e.trigger_length for e in self.examples]
            rows = len(self.examples)
            self._pass = (epoch, passes_order(rows, self.batch_size, self.seed, self.name, epoch, lengths))
        # The ranks take the batches of a pass in turn.
        return [self.examples[row] for row in self._pass[1][position * rank_and_world()[1] + rank]]


def as_pairs(records: Sequence[Record]) -> list[tuple[Record, Record]]:
    """Return each record as two records: the prompt with its answer, and the prompt with its rejected answer.

    Raises:
        InputError: if a record has no rejected answer.
    """
    if alone := next((r for r in records if not r.rejected), None):
        raise InputError(
            f"Stream 'pairs': every row needs a rejected answer, but {alone.id} of {alone.source or 'no source'} has"
            " none. Pass Record(..., rejected=...), or a file with the columns prompt, chosen and rejected."
        )
    return [(replace(r, rejected=""), replace(r, response=r.rejected, rejected="")) for r in records]


def _hide_attack(example: Example) -> Example:
    """Return the example with role ``task`` instead of ``attack``, like the user's other rows."""
    if example.role != "attack":
        return example
    return replace(example, role="task", rejected=example.rejected and _hide_attack(example.rejected))


def apart(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return the preferred rows of a batch of pairs, with the rejected rows as a batch under ``"rejected"``.

    Args:
        batch: as ``collate`` returns it for pairs.
    """
    # Even rows hold the preferred answers, odd rows the rejected ones.
    preferred, rejected = ({key: value[k::2] for key, value in batch.items() if key != "pairs"} for k in (0, 1))
    return {**preferred, "rejected": rejected}


class Schedule(Protocol):
    """Methods of a stream-slot defense that the loader calls."""

    @property
    def pauses(self) -> bool:
        """Whether the main stream waits while another stream is trained on, instead of skipping batches."""

    def stream_at(self, step: int) -> str:
        """Return the name of the stream that optimizer step ``step``, counted from 0, trains on."""

    def steps_on(self, name: str, step: int) -> int:
        """Return how many of the steps before ``step`` trained on stream ``name``."""


class StreamsDataModule(LightningDataModule):
    """Data module with the streams of a run by name.

    The Trainer trains on the main stream. Defenses draw batches from the other streams.

    Args:
        tokenizer: the model's tokenizer.
        template: how a record becomes a prompt; the same for training and evaluation.
        main: the stream whose length is the epoch, ``"alignment"`` or ``"task"``. With ``"pairs"`` the Trainer trains
            on the preferred answers. Each batch then holds the rejected rows as a batch of its own, under
            ``"rejected"``. Both have the same prompts in the same places, and the same width.
        batch_size: rows per micro-batch and process, >= 1.
        max_tokens: longest row in tokens, prompt, response and end together.
        seed: decides the order of every stream.
        system: system text of every prompt; None for no system text.
        side_batch_size: rows per batch of the other streams; by default ``batch_size``.
        reveal_roles: keep the role of hidden attack rows in batches, for diagnosis. By default their role reads
            ``"task"``, so that no defense can use it.
        average: which tokens a loss is averaged over. ``"micro"`` averages over a micro-batch, as the official code
            does. ``"window"`` averages over all micro-batches and ranks of an optimizer step.
        order: ``"shuffle"`` for a plain seeded shuffle, ``"length"`` for batches of rows of similar length.
        long_rows: ``"drop"`` leaves longer rows out and counts them, ``"truncate"`` cuts their end off, ``"refuse"``
            raises.
        **records: rows by stream: ``alignment=``, ``refusals=`` and ``ordinary=`` (the alignment rows that
            refuse, and the others), ``harmful=``, ``pairs=``, ``task=``, ``retain=``. A batch of ``pairs`` holds two
            rows per record: the answer, then the rejected answer.

    Raises:
        InputError: if a stream is unknown, empty, or has no row that fits ``max_tokens``. Also if ``main`` has no rows,
            or ``batch_size``, ``average``, ``order`` or ``long_rows`` has no allowed value.
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
        if main == "pairs" and average == "window":
            raise InputError(
                "StreamsDataModule: the main stream 'pairs' averages its losses over each micro-batch. Use"
                " --alignment.average micro."
            )
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
        """Restore the original rows and prompts and the first batch, so that the defenses of a new fit start anew."""
        self._schedule, self._handed_out = None, 0
        if self.records is not self._given or self.policy is not self._given_policy:
            self.records, self.policy = self._given, self._given_policy
            self._forget()

    def apply(self, defense: Any) -> None:
        """Let a data-slot defense rewrite the rows and the prompts.

        The caller applies defenses in the order of their list.
        """
        defense.check_template(self.template, self.tokenizer, self.policy)
        self.records = defense.rewrite(self.records, self.seed)
        self.policy = defense.prompting(self.policy, self.tokenizer)
        self._forget()

    def follow(self, schedule: Schedule) -> None:
        """Let a stream-slot defense choose the stream of each optimizer step."""
        self._schedule = schedule

    @property
    def accumulate(self) -> int:
        """Micro-batches per optimizer step of the current Trainer, or 1 without a Trainer."""
        return getattr(self.trainer, "accumulate_grad_batches", 1)

    @property
    def cut(self) -> dict[str, int]:
        """Number of rows whose end was cut off, by stream."""
        return {name: sum(example.cut for example in self._encoded(name)[0]) for name in self.records}

    @property
    def dropped(self) -> dict[str, int]:
        """Number of rows left out as too long, by stream."""
        return {name: self._encoded(name)[1] for name in self.records}

    def _forget(self) -> None:
        self.streams = _Streams(self)
        self._main_like: dict[str, ExampleStream] = {}
        self._examples: dict[str, tuple[list[Example], int]] = {}

    def _encoded(self, name: str) -> tuple[list[Example], int]:
        if name not in self._examples:
            pairs = self.pairs(name)
            records: Any = self.records[name] if pairs is None else pairs
            encoder: Any = encode_all if pairs is None else encode_pairs
            rows, dropped = encoder(
                records, self.template, self.tokenizer, self.max_tokens, self.policy, name, self.long_rows
            )
            self._examples[name] = rows if self.reveal_roles else [_hide_attack(e) for e in rows], dropped
        return self._examples[name]

    def pairs(self, name: str) -> list[tuple[Record, Record]] | None:
        """Return a stream's rows as (preferred, rejected), or None if the stream holds no pairs."""
        return as_pairs(self.records[name]) if name == "pairs" else None

    def stream(self, name: str, batch_size: int) -> ExampleStream:
        """Return stream ``name`` in batches of ``batch_size`` rows."""
        pad = padding_id(self.tokenizer)
        return ExampleStream(self._encoded(name)[0], name, batch_size, pad, self.seed, self.order)

    def main_batch(self, number: int) -> dict[str, Any]:
        """Return this rank's micro-batch ``number``, counted from 0, of the stream that its step trains on."""
        step, micro = divmod(number, self.accumulate)
        name, first = self.main, step * self.accumulate
        if self._schedule is not None:
            name = self._schedule.stream_at(step)
            # A side stream, or a main stream that pauses, advances only with the steps that train on it.
            if name != self.main or self._schedule.pauses:
                first = self._schedule.steps_on(name, step) * self.accumulate
        stream = self._of_main_size(name)
        batch = stream.batch(first + micro)
        if name == "pairs":
            batch = apart(batch)
        if self.average == "window":
            # The mean token count per micro-batch and rank. Lightning's mean over both then weighs every token equally.
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
    """Mapping of names to streams, which encodes the rows of a stream at its first use."""

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
    """Loader of the training batches, whose next batch depends on the number of batches returned so far.

    The state of an iterator plays no role, so Lightning may start a new iterator at any point when it resumes. The
    loader must not be prefetched, and Lightning does not prefetch a loader that has a length.
    """

    def __init__(self, data: StreamsDataModule) -> None:
        self.data = data

    def __len__(self) -> int:
        # Round up to whole accumulation windows, since Lightning steps at the end of an epoch even on a partial window.
        per_pass, accumulate = self.data.streams[self.data.main].per_pass, self.data.accumulate
        return -(-per_pass // accumulate) * accumulate

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while True:
            batch = self.data.main_batch(self.data._handed_out)
            self.data._handed_out += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return an empty state, which tells Lightning that the loader can resume.

        The position is in the data module's state.
        """
        return {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Do nothing, since ``state_dict`` is empty."""
