"""Job: a stage whose result lies in the cache, under the hash of everything that decides it."""

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from hftlight import cache
from hftlight.files import cache_dir, write_json
from hftlight.model_files import model_hash
from hftlight.models.serving import Artifact

RESULT = "stage.json"  # cost, reports of the defenses, hash of the artifact
ARTIFACT = "artifact"  # folder of the resulting model


class Job(ABC):
    """A stage that is carried out once and then read from the cache."""

    @property
    @abstractmethod
    def kind(self) -> str:
        """Prefix of the folder's name in the cache, before the hash."""

    @property
    @abstractmethod
    def decided_by(self) -> str:
        """The entry of ``cache.INPUTS`` that lists the inputs of the key."""

    @abstractmethod
    def code(self) -> Sequence[Any]:
        """Return the modules of hftlight, by name, and the classes that do the work."""

    @abstractmethod
    def inputs(self) -> dict[str, Any]:
        """Return everything besides code that decides the result."""

    @cached_property
    def _key(self) -> str:
        return cache.key(self.decided_by, self.code(), **self.inputs())

    def key(self) -> str:
        """Return the hash of everything that decides the result, code and versions included."""
        return self._key

    def folder(self) -> Path:
        """Return the folder of the stage's result."""
        return cache_dir() / "stages" / f"{self.kind}-{self.key()}"

    def place(self) -> Path:
        """Return the folder that the resulting model is written to."""
        return self.folder() / ARTIFACT

    def artifact(self) -> Artifact:
        """Return the resulting model. The stage must be done."""
        return Artifact(str(self.place()), self.result()["artifact"])

    def done(self) -> bool:
        """Tell whether the stage has ended and every file of its result is intact."""
        return cache.whole(self.folder())

    def result(self) -> dict[str, Any]:
        """Return the result of a finished stage: cost, reports of the defenses, hash of the artifact."""
        result: dict[str, Any] = json.loads((self.folder() / RESULT).read_text(encoding="utf-8"))
        return result

    def finish(self, result: dict[str, Any], *further: str) -> None:
        """Write the stage's result with its artifact's hash, and seal both with further files of the folder.

        Args:
            result: stage, cost and what the defenses report.
            *further: names of other files that belong to the result.
        """
        write_json(self.folder() / RESULT, {**result, "artifact": model_hash(str(self.place()))})
        cache.seal(self.folder(), RESULT, ARTIFACT, *further)
