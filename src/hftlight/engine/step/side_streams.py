"""Side streams: batches by number.

A position in a stream is one integer, which a checkpoint can store.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from hftlight.engine.step.order import batches_per_pass, passes_order, rank_and_world


@runtime_checkable
class Stream(Protocol):
    """An endless, reshuffled, rank-sharded sequence of batches with random access."""

    def batch(self, index: int) -> Any:
        """Return this rank's batch number ``index``, counted from 0, on the CPU."""

    def part(self, name: str, chosen: Callable[[str], bool]) -> "Stream":
        """Return the stream of some of the rows.

        Args:
            name: name of the new stream, which enters its random order.
            chosen: whether a row belongs to the part, by the row's id.
        """


class LoaderStream:
    """A user's DataLoader, or list of ready batches, as a stream.

    Of a DataLoader, the stream uses the data set, the batch size and the collate function. The order of rows is the
    stream's own, since the order of a DataLoader cannot be resumed. A list is cycled in its own order, and its batches
    go to the ranks in turn.

    Args:
        source: a DataLoader over a map-style data set, or a sequence of batches.
        name: name of the stream; it enters the random order and appears in errors.
        seed: the run's seed.

    Raises:
        TypeError: if the source has no length or no random access.
        ValueError: if the source has less than one batch per rank.
    """

    def __init__(self, source: DataLoader[Any] | Sequence[Any], name: str, seed: int = 0) -> None:
        self.source, self.name, self.seed = source, name, seed
        self.rank, self.world = rank_and_world()
        self._pass: tuple[int, list[list[int]]] = (-1, [])
        if isinstance(source, DataLoader):
            if isinstance(source.dataset, IterableDataset) or source.batch_size is None:
                raise TypeError(
                    f"Stream {name!r}: a DataLoader needs a map-style data set and a batch_size, so that its position"
                    " can be resumed. Pass a list of batches instead."
                )
            self.rows = _length(source.dataset)
            self.per_pass = batches_per_pass(self.rows, source.batch_size, self.world)
        elif isinstance(source, Sequence):
            self.per_pass = len(source) // self.world
        else:
            raise TypeError(
                f"Stream {name!r}: expected a DataLoader or a list of batches, got {type(source).__name__}."
            )
        if self.per_pass == 0:
            raise ValueError(f"Stream {name!r} holds less than one batch for each of {self.world} processes; add rows.")

    def batch(self, index: int) -> Any:
        """Return this rank's batch number ``index``."""
        epoch, position = divmod(index, self.per_pass)
        position = position * self.world + self.rank  # consecutive batches go to consecutive ranks
        if not isinstance(self.source, DataLoader):
            return self.source[position]
        if self._pass[0] != epoch:
            assert self.source.batch_size is not None
            order = passes_order(self.rows, self.source.batch_size, self.seed, self.name, epoch)
            self._pass = (epoch, order)
        return self.source.collate_fn([self.source.dataset[row] for row in self._pass[1][position]])

    def part(self, name: str, chosen: Callable[[str], bool]) -> "LoaderStream":
        """Return the stream of some rows. The id of a row is its number in the data set, or that of its batch."""
        if not isinstance(self.source, DataLoader):
            return LoaderStream([b for i, b in enumerate(self.source) if chosen(str(i))], name, self.seed)
        rows = Subset(self.source.dataset, [i for i in range(self.rows) if chosen(str(i))])
        loader = DataLoader(rows, batch_size=self.source.batch_size, collate_fn=self.source.collate_fn)
        return LoaderStream(loader, name, self.seed)


def halves(stream: Stream, name: str, fraction: float) -> tuple[Stream, Stream]:
    """Return two streams without common rows: most of the rows, and those that are held out.

    A hash of the row's id decides, so that further rows do not move a row to the other part.

    Args:
        stream: all rows.
        name: name of the stream.
        fraction: fraction of the rows that are held out, in (0, 1).

    Raises:
        ValueError: if a part has less than one batch.
    """

    def held_out(row: str) -> bool:
        return int(hashlib.sha256(f"held out/{row}".encode()).hexdigest()[:12], 16) < fraction * 16**12

    return stream.part(name, lambda row: not held_out(row)), stream.part(f"{name}, held out", held_out)


def _length(dataset: Dataset[Any]) -> int:
    return len(dataset)  # type: ignore[arg-type]
