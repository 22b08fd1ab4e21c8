"""StreamsDataModule: alignment, harmful, task and retain data by name, in an order that any position can resume."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lightning.pytorch import LightningDataModule
from typing_extensions import override

from hftlight.data.records import Record
from hftlight.data.templates import Template
from hftlight.data.tokens import Example, collate, encode_all, padding_id
from hftlight.engine.order import batches_per_pass, passes_order, rank_and_world
from hftlight.errors import InputError

STREAMS = ("alignment", "harmful", "task", "retain")


class ExampleStream:
    """Encoded rows as an endless sequence of batches with random access; each pass is shuffled anew.

    Args:
        examples: the rows.
        name: name of the stream.
        batch_size: rows per batch and rank, >= 1.
        pad_id: token id that fills up shorter rows; it is masked, whatever it is.
        seed: the run's seed.
    """

    def __init__(self, examples: Sequence[Example], name: str, batch_size: int, pad_id: int, seed: int) -> None:
        self.examples, self.name = examples, name
        self.batch_size, self.pad_id, self.seed = batch_size, pad_id, seed
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
        epoch, position = divmod(index, self.per_pass)
        if self._pass[0] != epoch:
            lengths = [len(e.input_ids) for e in self.examples]
            self._pass = (epoch, passes_order(lengths, self.batch_size, self.seed, self.name, epoch))
        rank, world = rank_and_world()
        rows = self._pass[1][position * world + rank]
        return collate([self.examples[row] for row in rows], self.pad_id)


class StreamsDataModule(LightningDataModule):
    """The streams of a run by name; one of them is trained on, the others are drawn from by defenses.

    Args:
        tokenizer: the model's tokenizer.
        template: how a record becomes a prompt; the same for training and evaluation.
        main: the stream whose length is the epoch, ``"alignment"`` or ``"task"``.
        batch_size: rows per micro-batch and process, >= 1.
        max_tokens: longest row in tokens, prompt, response and end together; longer rows are left out and counted.
        seed: decides the order of every stream.
        system: system text put into every prompt; None for none.
        side_batch_size: rows per batch of the other streams; by default ``batch_size``.
        reveal_roles: keep the role of hidden attack rows in batches, for diagnosis; by default they read ``"task"``, so
            that no defense can look.
        **records: rows by stream: ``alignment=``, ``harmful=``, ``task=``, ``retain=``.

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
        self.main = main
        self.streams: dict[str, ExampleStream] = {}
        self.dropped: dict[str, int] = {}
        pad_id = padding_id(tokenizer)
        for name, rows in records.items():
            examples, self.dropped[name] = encode_all(rows, template, tokenizer, max_tokens, system=system, name=name)
            if not reveal_roles:
                examples = [replace(e, role="task") if e.role == "attack" else e for e in examples]
            size = batch_size if name == main else side_batch_size or batch_size
            self.streams[name] = ExampleStream(examples, name, size, pad_id, seed)
        self._handed_out = 0

    @override
    def train_dataloader(self) -> "MainLoader":
        return MainLoader(self)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"handed_out": self._handed_out}

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._handed_out = state_dict["handed_out"]


class MainLoader:
    """The main stream as a loader whose next batch depends on how many were handed out in all, not on iterators.

    Lightning may start a new iterator anywhere when it resumes; the order does not care. It must not be prefetched,
    and Lightning does not prefetch what has a length.
    """

    def __init__(self, data: StreamsDataModule) -> None:
        self.data = data

    def __len__(self) -> int:
        return self.data.streams[self.data.main].per_pass

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while True:
            batch = self.data.streams[self.data.main].batch(self.data._handed_out)
            self.data._handed_out += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Tell Lightning that the loader resumes; the position itself lies in the data module's state."""
        return {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Do nothing; see ``state_dict``."""
