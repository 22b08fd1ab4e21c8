"""Analysis: the weights that matter to safety and not to utility, and what the attack did to them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from typing_extensions import override

from hftlight.analysis.analysis import Analysis, Part, Picture, Row
from hftlight.analysis.drawing import grid_canvas, heat_maps, layer_grid, legend_below, line, looks, of
from hftlight.analysis.updates import is_aligned, matrix_of, update
from hftlight.analysis.view import View
from hftlight.data.tokens import Example, collate
from hftlight.engine.weights.masks import Overlap, chance_overlap, count_of, overlap, pack, unpack
from hftlight.engine.weights.regions import Selection, Target, linear_targets
from hftlight.engine.weights.scores import Loss, calibration, directions, input_moments
from hftlight.errors import InputError
from hftlight.evaluation.answering.generate import answer
from hftlight.evaluation.answering.inference import evaluating
from hftlight.evaluation.metrics.refusals import get_refusal_classifier
from hftlight.models.module import SafetyModule, decoder_layers
from hftlight.report.figure import MUTED, styled

SCORES = ("snip", "wanda")
NAMES = {"snip": "SNIP", "wanda": "Wanda", "actsvd": "ActSVD"}
SETS = ("safety only", "utility only")
MEMORY = 1 << 31  # bytes of statistics that are held at one time; more matrices take another sweep over the rows
ANSWER = 32  # longest refusal, in tokens

Rows = Mapping[str, Sequence[Example]]  # by kind, "safety" and "utility"


@dataclass(frozen=True)
class Sets:
    """Important weights of one matrix.

    Attributes:
        safety: the entries that matter most to safety, packed bits.
        utility: likewise, to utility.
        shape: shape of the matrix.
    """

    safety: Tensor
    utility: Tensor
    shape: tuple[int, int]

    def masks(self) -> dict[str, Tensor]:
        """Return the mask of each of ``SETS``, bool ``[out, in]``."""
        s, u = unpack(self.safety, self.shape), unpack(self.utility, self.shape)
        return dict(zip(SETS, (s & ~u, u & ~s), strict=True))

    def overlap(self) -> Overlap:
        """Return the sizes of the two sets and of their intersection."""
        s, u = unpack(self.safety, self.shape), unpack(self.utility, self.shape)
        return overlap(s, u, Target("", nn.Identity(), s).rows, self.shape[1])


@dataclass(frozen=True)
class Ranks:
    """Output directions of one matrix that matter most.

    Attributes:
        safety: orthonormal directions that matter to safety, ``[out, count]``.
        utility: likewise, to utility.
    """

    safety: Tensor
    utility: Tensor

    def only(self, kind: str) -> Tensor:
        r"""Return :math:`(I - \Pi_u) U_s`, ``[out, count]``, or the reverse for ``"utility only"``."""
        s, u = (self.safety, self.utility) if kind == SETS[0] else (self.utility, self.safety)
        return s - u @ (u.T @ s)


def important_entries(
    model: nn.Module, rows: Rows, score: str, safety_ratio: float, utility_ratio: float
) -> dict[str, Sets]:
    """Return the entries of each linear layer that matter most to safety and to utility, by the weight's plain name.

    Args:
        model: a causal LM, or a LoRA model around one, whose adapted layers then count.
        rows: encoded rows, ``"safety"`` and ``"utility"``. Only response tokens count.
        score: ``"snip"`` or ``"wanda"``; see ``snip_scores`` and ``wanda_scores``.
        safety_ratio: fraction of the entries of each matrix, in (0, 1].
        utility_ratio: likewise.

    Raises:
        InputError: if no linear layer can be scored.

    Cost: SNIP takes a forward and a backward pass per row, Wanda a forward pass. Up to ``MEMORY`` bytes of statistics
    are held, and each further part of the model takes another sweep. The sets take two bits per entry.
    Source: Wei et al., ICML 2024, arXiv:2402.05162, sections 3.1 and 3.2.
    """
    found: dict[str, Sets] = {}
    batches, loss = _batches(rows, next(model.parameters()).device), _loss(model)
    ratios = {"safety": safety_ratio, "utility": utility_ratio}
    with evaluating(model):
        for targets in _groups(_targets(model), lambda t: 4 * t.weight.numel()):
            masks = {}
            for kind, other in (("safety", "utility"), ("utility", "safety")):
                # With a ratio of 0 for the other kind, the region is the whole set.
                rule = Selection("Regions", ratios[kind], 0.0, score, len(rows[kind]), kind, other, end=True)
                region, _ = rule.region(targets, loss, lambda k: batches[k], by_row=False, split=False)
                masks[kind] = {name: pack(mask) for name, mask in region.items()}
            for name, target in targets.items():
                shape = (target.weight.shape[0], target.weight.shape[1])
                found[name] = Sets(masks["safety"][name], masks["utility"][name], shape)
    return found


def important_ranks(model: nn.Module, rows: Rows, ratio: float) -> dict[str, Ranks]:
    """Return the output directions of each linear layer that matter most (ActSVD), by the weight's plain name.

    They are the leading left singular vectors of ``W X^T`` over the layer's inputs X at response tokens.

    Args:
        model: as for ``important_entries``.
        rows: likewise.
        ratio: fraction of the ranks of each matrix, in (0, 1]; at least one.

    Cost: one forward pass per row, and two eigenvalue decompositions per matrix.
    Source: Wei et al., ICML 2024, arXiv:2402.05162, section 3.3.
    """
    found: dict[str, Ranks] = {}
    batches, loss = _batches(rows, next(model.parameters()).device), _loss(model)
    with evaluating(model):
        for targets in _groups(_targets(model), lambda t: 4 * t.weight.shape[1] ** 2):
            layers = {name: t.layer for name, t in targets.items()}
            leading: dict[str, dict[str, Tensor]] = {}
            for kind in ("safety", "utility"):
                data = calibration(batches[kind], len(rows[kind]), split=False)
                moments = input_moments(loss, layers, data, outer=True, split=False)
                leading[kind] = {
                    name: directions(t.values(), moments[name], max(1, count_of(ratio, min(t.weight.shape)))).float()
                    for name, t in targets.items()
                }
            for name in targets:
                found[name] = Ranks(leading["safety"][name].cpu(), leading["utility"][name].cpu())
    return found


def shares(sets: Sets | Ranks, delta: Tensor) -> dict[str, tuple[float, float]]:
    r"""Return the squared part of an update inside each of ``SETS``, and the part expected at random.

    For a set M of entries these are :math:`\sum_{ij \in M} \Delta_{ij}^2` and :math:`\|\Delta\|^2 |M| / n` with n
    entries in all. For output directions they are :math:`\|P \Delta\|^2` and :math:`\|\Delta\|^2 \|P\|^2 / \text{out}`
    with :math:`P = (I - \Pi_u) \Pi_s`, or the reverse.

    Args:
        sets: of one matrix.
        delta: the update, ``[out, in]``.
    """
    squares = delta.double().square()
    total = float(squares.sum())
    if isinstance(sets, Sets):
        masks = sets.masks()
        return {k: (float(squares[m].sum()), total * float(m.double().mean())) for k, m in masks.items()}
    found = {}
    for kind, basis in zip(SETS, (sets.safety, sets.utility), strict=True):
        left = sets.only(kind).double()
        found[kind] = (
            float((left @ (basis.double().T @ delta.double())).square().sum()),
            total * float(left.square().sum()) / len(left),
        )
    return found


def _targets(model: nn.Module) -> dict[str, Target]:
    try:
        return linear_targets(model, decoder_layers, "regions", frozen=True)
    except TypeError as error:
        raise InputError(str(error)) from error


def _loss(model: nn.Module) -> Loss:
    """Return the mean loss of a batch in nats per response token, as a function of the batch."""
    module = SafetyModule(model)
    return lambda batch: module.loss(dict(batch))


def _batches(rows: Rows, device: torch.device) -> dict[str, list[dict[str, Any]]]:
    """Return each row as a batch of its own, because SNIP reads one row at a time."""

    def batch(example: Example) -> dict[str, Any]:
        return {name: t.to(device) if isinstance(t, Tensor) else t for name, t in collate([example], 0).items()}

    return {kind: [batch(example) for example in some] for kind, some in rows.items()}


def _groups(targets: Mapping[str, Target], size: Any) -> Iterator[dict[str, Target]]:
    """Yield the targets in groups whose statistics take at most ``MEMORY`` bytes, at least one target each."""
    group: dict[str, Target] = {}
    held = 0
    for name, target in targets.items():
        if group and held + size(target) > MEMORY:
            yield group
            group, held = {}, 0
        group[name] = target
        held += size(target)
    yield group


@dataclass(frozen=True)
class Regions(Analysis):
    r"""Which weights matter to safety and not to utility, and how much of the attack's update lies in them.

    Each matrix of the aligned model is scored by SNIP and by Wanda on its own refusals of harmful prompts (safety) and
    on answers of the task (utility), at response tokens. The sets S and U are the top fractions of a matrix.

    Rows: ``jaccard``, the overlap of S and U, 0-1, by layer and module (``position``, with the score's name), of the
    aligned model and of models outside runs. ``jaccard_by_chance`` is that of random sets of these sizes. The others
    describe the update, the model less its aligned model, by layer and for the whole model (layer None):
    ``update_share``, the fraction of its squared norm inside :math:`S \setminus U` ("safety only") and
    :math:`U \setminus S` ("utility only"), and ``update_concentration``, that share over the share that random entries
    of each matrix would have; 1 is chance. For the model before alignment, the update is what the alignment changed.
    With ``rank_ratio``, ``rank_overlap`` and ActSVD's shares compare output directions instead of entries.
    There are no intervals: the rows behind the scores are few, and all scores of an arm share them.

    Args:
        rows: refusals and task answers that are scored, each >= 1.
        safety_ratio: top fraction of the entries of each matrix by the safety score, in (0, 1).
        utility_ratio: likewise by the utility score.
        rank_ratio: fraction of the ranks of each matrix that ActSVD compares, in [0, 1); 0 leaves ActSVD out.

    Cost: for each arm once, one forward and backward pass and one forward pass per row, and the aligned model's answers
    to twice as many harmful prompts. Per model, one read of both weights.
    Source: Wei et al., "Assessing the Brittleness of Safety Alignment via Pruning and Low-Rank Modifications", ICML
    2024, arXiv:2402.05162.
    Differs: 8 rows of each kind by default (paper: 128), so the sets are noisy. Wanda ranks the whole matrix, as SNIP
    does (paper: each output row). Utility rows are the task's test rows (paper: Alpaca without safety rows). The paper
    prunes the sets; the share of an update in them is an addition.
    """

    rows: int = 8
    safety_ratio: float = 0.05
    utility_ratio: float = 0.05
    rank_ratio: float = 0.0

    compares: ClassVar[bool] = True
    seconds: ClassVar[float] = 30.0

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise ValueError(f"Regions: rows must be >= 1, got {self.rows}.")
        for name, above in (("safety_ratio", True), ("utility_ratio", True), ("rank_ratio", False)):
            value = getattr(self, name)
            if not (0 < value < 1 or (value == 0 and not above)):
                hint = f" If that is a percentage, write {value / 100:g}." if 1 <= value <= 100 else ""
                raise ValueError(
                    f"Regions: {name} is a fraction and must lie in {'(' if above else '['}0, 1), got {value}.{hint}"
                )

    @override
    def parts(self, known: Mapping[str, Sequence[Row]], view: View) -> Sequence[Part]:
        return [{"score": score} for score in (*SCORES, *(["actsvd"] if self.rank_ratio else []))]

    @override
    def measure(self, part: Part, view: View) -> list[Row]:
        score = part["score"]
        reference = view.subject.reference
        assert reference is not None
        sets: dict[str, Any] = view.shared(
            ("regions", reference.identity, score, self), lambda: self._sets(score, view)
        )
        rows = []
        if is_aligned(view) or not view.subject.stage:
            rows += self._overlaps(score, sets)
        return rows if is_aligned(view) else rows + _updates(score, sets, view)

    def _sets(self, score: str, view: View) -> dict[str, Any]:
        reference = view.subject.reference
        assert reference is not None
        rows = view.shared(("regions", reference.identity, "rows", self.rows), lambda: self._rows(view))
        if score == "actsvd":
            return important_ranks(view.reference, rows, self.rank_ratio)
        return important_entries(view.reference, rows, score, self.safety_ratio, self.utility_ratio)

    def _rows(self, view: View) -> Rows:
        """Return the aligned model's refusals, and the task's answers."""
        records = view.records("harmful", 2 * self.rows)
        prompts = view.encoded(records)
        answers = answer(view.reference, view.tokenizer, prompts, max_new_tokens=ANSWER)
        requests = [record.request for record in view.tests.rows("harmful")[: 2 * self.rows]]
        judged = get_refusal_classifier(view.tests.refusal_judge)(requests, [a.text for a in answers])
        refusals = [
            Example(record.id, record.role, [*prompt, *each.ids], len(prompt))
            for record, prompt, each, refused in zip(records, prompts, answers, judged, strict=True)
            if refused == "full" and each.ids
        ]
        if not refusals:
            raise InputError(
                f"the aligned model refuses none of {len(prompts)} harmful prompts, so nothing shows which weights its"
                " refusals need. Align it longer, or name another --reference."
            )
        tasks = [record for record in view.records("task") if record.response][: self.rows]
        if not tasks:
            raise InputError("the task has no rows with answers, so nothing shows which weights it needs.")
        responses = view.tokenizer([r.response for r in tasks], add_special_tokens=False)["input_ids"]
        utility = [
            Example(record.id, record.role, [*prompt, *response], len(prompt))
            for record, prompt, response in zip(tasks, view.encoded(tasks), responses, strict=True)
        ]
        return {"safety": refusals[: self.rows], "utility": utility}

    def _overlaps(self, score: str, sets: Mapping[str, Any]) -> list[Row]:
        rows = []
        for name, found in sets.items():
            layer, kind = _place(name)
            if isinstance(found, Sets):
                rows.append(Row("jaccard", found.overlap().jaccard, layer=layer, position=f"{score} {kind}"))
                continue
            out, count = found.safety.shape
            value = float((found.safety.T @ found.utility).square().sum()) / count
            rows.append(Row("rank_overlap", value, layer=layer, position=f"{score} {kind}"))
            chance = found.utility.shape[1] / out
            rows.append(Row("rank_overlap_by_chance", chance, layer=layer, position=f"{score} {kind}"))
        if score != "actsvd":
            pooled = sum((found.overlap() for found in sets.values()), Overlap(0, 0, 0, 0))
            rows.append(Row("jaccard", pooled.jaccard, position=score))
            chance = chance_overlap(self.utility_ratio, self.safety_ratio)
            rows.append(Row("jaccard_by_chance", chance, position=score))
        return rows

    @override
    def pictures(self, rows: Sequence[Row]) -> Iterator[Picture]:
        if of(rows, "jaccard"):
            yield Picture(
                "regions_overlap",
                "Do safety and utility need the same weights?",
                "Jaccard overlap of the entries that matter most to safety and to utility, by decoder layer and module."
                " White is the overlap of random sets, blue is more. Where the overlap is small, safety has weights of"
                " its own, which can be removed or protected without the task. No intervals: few rows are scored.",
                overlap_figure(rows),
            )
        if of(rows, "update_concentration"):
            yield Picture(
                "regions_update",
                "Did the attack write into the safety weights?",
                "Squared update inside the entries that matter to one side only, over its value for random entries of"
                " the same matrices, by decoder layer. Above 1 the update sits in these entries. If the left panels are"
                " near 1, safety broke without its own weights moving more than others. The base's update is what the"
                " alignment changed. No intervals: few rows are scored.",
                update_figure(rows),
            )


def _updates(score: str, sets: Mapping[str, Any], view: View) -> list[Row]:
    """Return the rows of a model's update."""
    inside: dict[tuple[int | None, str], list[float]] = {}  # squared update inside, expected, and in all
    for name, found in sets.items():
        moved = update(view, name)
        if moved is None:
            continue
        delta = matrix_of(moved)
        total = float(delta.double().square().sum())
        for kind, (value, expected) in shares(found, delta).items():
            for layer in (_place(name)[0], None):
                sums = inside.setdefault((layer, kind), [0.0, 0.0, 0.0])
                sums[:] = [a + b for a, b in zip(sums, (value, expected, total), strict=True)]
    rows = []
    for (layer, kind), (value, expected, total) in inside.items():
        if total > 0 and expected > 0:
            rows.append(Row("update_share", value / total, layer=layer, position=f"{score} {kind}"))
            rows.append(Row("update_concentration", value / expected, layer=layer, position=f"{score} {kind}"))
    if not rows:
        raise InputError("none of its scored weights differs from the aligned model's, so there is no update.")
    return rows


def _place(name: str) -> tuple[int | None, str]:
    """Return layer and module of a weight by its plain name."""
    parts = name.split(".")
    return next((int(part) for part in parts if part.isdigit()), None), parts[-2]


def overlap_figure(rows: Sequence[Row]) -> Figure:
    """Draw the overlap of the first model that has it, layer by module, one panel per score."""
    own = next(iter(of(rows, "jaccard").values()))
    chance = next(r.value for r in rows if r.metric == "jaccard_by_chance")
    panels: dict[str, list[Row]] = {}
    for row in own:
        if row.layer is not None:
            panels.setdefault(NAMES[str(row.position).split()[0]], []).append(row)
    grids = {score: layer_grid(some, lambda r: str(r.position).split()[1]) for score, some in panels.items()}
    return heat_maps(grids, "", "decoder layer", "Jaccard overlap", center=chance)


@styled
def update_figure(rows: Sequence[Row]) -> Figure:
    """Draw the concentration of the update over the layers, one row per score and one column per set."""
    scores = list(dict.fromkeys(str(r.position).split()[0] for r in rows if r.metric == "update_concentration"))
    figure, grid = grid_canvas(len(scores), len(SETS), height=2.2, sharex=True, sharey="row")
    known = looks(rows)
    for score, panels in zip(scores, grid, strict=True):
        for kind, axes in zip(SETS, panels, strict=True):
            some = [r for r in rows if r.position == f"{score} {kind}" and r.layer is not None]
            for key, own in of(some, "update_concentration").items():
                line(axes, own, known[key], [float(r.layer or 0) for r in own])
            axes.axhline(1, color=MUTED, lw=0.8)
            axes.set_title(f"{NAMES[score]}, {kind}")
        panels[0].set_ylabel("times chance")
    for axes in grid[-1]:
        axes.set_xlabel("decoder layer")
    legend_below(figure, grid.flat[0])
    return figure
