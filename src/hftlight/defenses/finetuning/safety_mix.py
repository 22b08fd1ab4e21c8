"""SafetyMix: safety rows mixed into the user's upload."""

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from lightning.pytorch import LightningModule, Trainer
from torch.optim import Optimizer
from typing_extensions import override

from hftlight.data.records import Record
from hftlight.engine import Defense, Passes, Slot, Stage, add_to_grad, gradient, scaled
from hftlight.engine.step.defense import Loader
from hftlight.errors import InputError
from hftlight.evaluation.safety_rows import refusals


def safety_rows(alignment: Sequence[Record], count: int, seed: int) -> list[Record]:
    """Return ``count`` different refusals of the alignment set, drawn without replacement by the seed.

    Raises:
        InputError: if fewer rows are available.
    """
    offered = refusals(alignment)
    if count > len(offered):
        raise InputError(
            f"SafetyMix: {count} safety rows are requested, and the stream 'alignment' has {len(offered)} to draw from."
            " Lower count or ratio, or give more alignment rows."
        )
    return random.Random(f"{seed}/safety_mix").sample(offered, count)


class SafetyMix(Defense):
    r"""Mix rows of the alignment set into the user's upload, and fine-tune as usual.

    Let U be the upload of n rows and A the alignment set. Training runs on :math:`U \cup S`. S has ``count`` refusals
    (or :math:`\mathrm{ratio} \cdot n`, rounded), drawn from A without replacement. ``"append"`` keeps all of U.
    ``"replace"`` removes as many rows of U as S adds, so that the number of rows stays n. ``"parallel"`` leaves U
    unchanged and minimizes :math:`f_U(w) + \lambda f_A(w)`. Each f is the mean loss, in nats per response token, of its
    own batch in every step.

    Args:
        ratio: safety rows per row of the upload, >= 0; ignored if ``count`` is set, and in mode ``"parallel"``.
        count: number of safety rows, >= 0; 0 mixes in nothing.
        mode: ``"append"``, ``"replace"`` or ``"parallel"``.
        lam: lambda of mode ``"parallel"``, dimensionless, >= 0; the other modes do not use it.
        streams: for mode ``"parallel"``, the loader of the stream ``"alignment"``, needed only if the data module does
            not offer it.

    Raises:
        ValueError: if a number is out of range or conflicts with the mode, or more rows are requested than exist.

    Cost: nothing per step. Under a fixed number of steps the user's rows occur less often, by 1 / (1 + ratio) in mode
    ``"append"``. Mode ``"parallel"`` takes one more forward-backward pass per optimizer step, and one buffer the size
    of the trainable weights.
    Source: Bianchi et al., "Safety-Tuned LLaMAs" (SafeInstr), ICLR 2024, arXiv:2309.07875: 100 to 2000 safety rows
    appended to 20,000 instructions. Zong et al., "Safety Fine-Tuning at (Almost) No Cost" (VLGuard), ICML 2024,
    arXiv:2402.02207: the safety set appended to the whole instruction set. Of its text-only ports, the Lisa repository
    replaces 1000 of 5000 rows, and the Booster repository has the parallel form.
    Differs: the loss covers the answer only; the SafeInstr script also trains on the prompt. Only rows whose answer
    refuses are used; the released safety sets also contain some compliant answers. ``"replace"`` removes rows of the
    upload at random, since a service cannot identify harmful rows. The port removes benign rows. Mixed rows are
    shuffled with the user's rows, and share a batch with rows of similar length. An epoch contains them exactly; a step
    has its share only on average. ``"parallel"`` gives every step its share, from one batch per optimizer step, also
    under accumulation.
    """

    stage, slots, streams = Stage.FINETUNING, (Slot.DATA,), ("alignment",)
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "safeinstr": {"ratio": 0.025, "mode": "append"},
        "lisa": {"ratio": 0.2, "mode": "replace"},
    }

    def __init__(
        self,
        ratio: float = 0.1,
        count: int | None = None,
        mode: Literal["append", "replace", "parallel"] = "append",
        lam: float = 1.0,
        streams: Mapping[str, Loader] | None = None,
    ) -> None:
        if not 0 <= ratio < math.inf:
            raise ValueError(
                f"SafetyMix: ratio is the number of safety rows per row of the upload and must be >= 0, got {ratio}."
            )
        if count is not None and not (isinstance(count, int) and count >= 0):
            raise ValueError(f"SafetyMix: count must be a whole number of rows >= 0, got {count}.")
        if mode not in ("append", "replace", "parallel"):
            raise ValueError(f"SafetyMix: mode must be 'append', 'replace' or 'parallel', got {mode!r}.")
        if not lam >= 0:
            raise ValueError(f"SafetyMix: lam must be >= 0 (0 turns the parallel loss off), got {lam}.")
        if lam != 1 and mode != "parallel":
            raise ValueError(f"SafetyMix: lam applies to mode 'parallel' only, got mode {mode!r}; omit lam.")
        if count is not None and mode == "parallel":
            raise ValueError("SafetyMix: count conflicts with mode 'parallel', which mixes in no row; omit count.")
        if streams and mode != "parallel":
            raise ValueError(
                f"SafetyMix: mode {mode!r} takes rows, not batches; omit streams and give rows to StreamsDataModule."
            )
        super().__init__(streams)
        self.ratio, self.count, self.mode, self.lam = ratio, count, mode, lam
        if mode == "parallel":
            self.slots, self.passes = (Slot.GRADIENT,), (Passes(forward=1, backward=1),)
        self._mixed: list[str] = []
        self._replaced: list[str] = []

    @override
    def rewrite(self, records: dict[str, list[Record]], seed: int) -> dict[str, list[Record]]:
        task = records["task"]
        # Rows that another defense added have the role "alignment": they neither count for n nor are replaced.
        users = [place for place, row in enumerate(task) if row.role != "alignment"]
        count = round(self.ratio * len(users)) if self.count is None else self.count
        chosen = safety_rows(records["alignment"], count, seed)
        replaced: set[int] = set()
        if self.mode == "replace":
            if count > len(users):
                raise InputError(
                    f"SafetyMix: {count} rows cannot replace those of an upload of {len(users)} rows. Lower count or"
                    " ratio."
                )
            replaced = set(random.Random(f"{seed}/safety_mix/out").sample(users, count))
        self._mixed, self._replaced = [row.id for row in chosen], [task[place].id for place in sorted(replaced)]
        self.record(mixed_rows=count, upload_rows=len(users) - len(replaced))
        return {**records, "task": [row for place, row in enumerate(task) if place not in replaced] + chosen}

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self.mode != "parallel":
            return
        side = gradient(pl_module, self.draw("alignment"))
        add_to_grad(pl_module, scaled(side.grad, self.lam))
        pl_module.log("safety_mix/alignment_loss", side.loss)
        self.record(alignment_loss=side.loss)

    @override
    def manifest(self) -> dict[str, Any]:
        """Return the trace, the ids of the mixed-in rows, and the ids of the user's rows that they replaced."""
        return {**self.summary(), "mixed": self._mixed, "taken_out": self._replaced}
