"""Grid: the cells of a comparison, and the run configuration of each cell."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from hftlight.attacks.attack import Attack
from hftlight.attacks.registry import get_attack
from hftlight.config import RunConfig
from hftlight.engine import Defense, Stage
from hftlight.errors import InputError
from hftlight.folders import file_name
from hftlight.registry import defense_class, made

DEFAULT_ATTACK = "harmful_mix"
UNALIGNED = "unaligned"  # the arm whose upload trains the base model, without an alignment stage
Swept = tuple[tuple[str, Any], ...]  # pairs of an option such as antidote.prune_ratio and its value in one cell


@dataclass(frozen=True, order=True)
class Cell:
    """One run of a comparison.

    Attributes:
        defenses: names of the defenses; empty for the undefended arm.
        harmful_ratio: p, harmful fraction of the upload, 0-1.
        task: the user's task, as in ``--data.task``.
        seed: the run's seed.
        attack: name of the attack, as in ``--attack``.
        unaligned: whether the upload trains the base model, without an alignment stage.
        swept: the swept arguments of its defenses. They are part of the arm.
    """

    defenses: tuple[str, ...]
    harmful_ratio: float
    task: str
    seed: int
    attack: str = DEFAULT_ATTACK
    unaligned: bool = False
    swept: Swept = ()

    @property
    def arm(self) -> str:
        """The defenses, such as ``"lisa+antidote[prune_ratio=0.05]"``; ``"none"`` or ``"unaligned"``."""
        return self._arm("[", ",", "]")

    @property
    def name(self) -> str:
        """Name of the cell's folder. It has no characters that a shell treats specially."""
        where = [Path(self.task).stem, f"p{self.harmful_ratio:g}", f"s{self.seed}"]
        arm = self._arm(".", ".", "")
        arm = file_name(arm) if self.swept else arm
        return "-".join([arm, *([] if self.attack == DEFAULT_ATTACK else [self.attack]), *where])

    def _arm(self, begin: str, between: str, end: str) -> str:
        if self.unaligned:
            return UNALIGNED
        words = []
        for name in self.defenses:
            own = [(option, v) for option, v in self.swept if option.partition(".")[0] == name]
            values = between.join(f"{option.partition('.')[2]}={value_text(v)}" for option, v in own)
            words.append(f"{name}{begin}{values}{end}" if own else name)
        return "+".join(words) or "none"


@dataclass(frozen=True)
class Grid:
    """Axes of a comparison: defenses, attacks, harmful ratios, tasks and seeds.

    Args:
        defenses: combinations such as ``"none"``, ``"booster"``, ``"booster+lisa+antidote"``; ``"unaligned"`` is the
            undefended arm without an alignment stage.
        harmful_ratios: p, each 0-1.
        tasks: tasks, each as in ``--data.task``.
        seeds: number of seeds, counted from ``first_seed``, >= 1; or the seeds themselves, each in [0, 2^32).
        first_seed: the first seed.
        arguments: arguments of defenses and attacks by name, the same in every cell.
        attacks: names of attacks. An attack whose harmful fraction is fixed has one cell, not one per harmful ratio.
        sweeps: values of single arguments of defenses, by option such as ``"antidote.prune_ratio"``. A combination with
            the defense has one cell per value, or per combination of values of several options.

    Raises:
        InputError: if a list is empty or has a duplicate, a value is out of range, or a name is unknown. A defense or
            an attack that refuses its arguments raises it too.
    """

    defenses: tuple[str, ...] = ("none",)
    harmful_ratios: tuple[float, ...] = (0.1,)
    tasks: tuple[str, ...] = ("builtin",)
    seeds: int | tuple[int, ...] = 1
    first_seed: int = 0
    arguments: Mapping[str, Mapping[str, Any]] | None = None
    attacks: tuple[str, ...] = (DEFAULT_ATTACK,)
    sweeps: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for option, values in (
            ("--defenses", [(word == UNALIGNED, parts(word)) for word in self.defenses]),
            ("--harmful_ratios", self.harmful_ratios),
            ("--tasks", self.tasks),
            ("--attacks", self.attacks),
            *((f"--{option}", values) for option, values in self.sweeps.items()),
        ):
            if not values:
                raise InputError(f"{option}: name at least one.")
            if twice := [v for i, v in enumerate(values) if v in values[:i]]:
                shown = "+".join(twice[0][1]) if isinstance(twice[0], tuple) else twice[0]
                raise InputError(f"{option}: {shown!r} is listed twice.")
        for p in self.harmful_ratios:
            if not 0 <= p <= 1:
                hint = f" If that is a percentage, write {p / 100:g}." if 1 < p <= 100 else ""
                raise InputError(f"--harmful_ratios must lie in [0, 1], got {p:g}.{hint}")
        if isinstance(self.seeds, int) and self.seeds < 1:
            raise InputError(f"--seeds must be >= 1, got {self.seeds}.")
        if len(set(self.every_seed)) < len(self.every_seed):
            raise InputError(f"--seeds: {self.seeds} lists a seed twice. List each seed once.")
        compared = {name for word in self.defenses for name in parts(word)}
        for option in self.sweeps:
            if option.partition(".")[0] not in compared:
                raise InputError(f"--{option}: no combination of --defenses has {option.partition('.')[0]!r}.")
        for word in self.defenses:
            for swept in self.variants(parts(word)):
                try:
                    self.made(parts(word), swept)
                except (ValueError, TypeError) as error:
                    raise InputError(refusal(error, dict(swept))) from error
        try:
            for name in self.attacks:
                self.ratios(name)
        except (ValueError, TypeError) as error:
            raise InputError(str(error)) from error
        # Tasks in different folders may have the same file name, which names the cell's folder.
        places: dict[str, Cell] = {}
        for cell in self.cells():
            if (other := places.setdefault(cell.name, cell)) != cell:
                if other.harmful_ratio != cell.harmful_ratio:
                    raise InputError(
                        f"--harmful_ratios: {other.harmful_ratio!r} and {cell.harmful_ratio!r} both print as"
                        f" {cell.harmful_ratio:g}, so their cells would share a folder. Choose values that differ in"
                        " their first six digits."
                    )
                if other.swept != cell.swept:
                    raise InputError(
                        f"{_options(dict(cell.swept))}: the values of {other.arm} and {cell.arm} give the same folder"
                        f" name, {cell.name}. Choose values that differ in more than punctuation."
                    )
                raise InputError(
                    f"--tasks: {other.task} and {cell.task} have the same name, so their cells would share a"
                    " folder. Rename one of them."
                )

    def made(self, names: Sequence[str], swept: Swept = ()) -> list[Defense]:
        """Return new instances of the defenses of a combination, with these values of swept arguments."""
        arguments = self.arguments_with(swept)
        return [made(name, **arguments.get(name, {})) for name in names]

    def arguments_with(self, swept: Swept) -> dict[str, dict[str, Any]]:
        """Return the arguments of defenses and attacks by name, with these values of swept arguments."""
        arguments = {name: dict(own) for name, own in (self.arguments or {}).items()}
        for option, value in swept:
            name, _, argument = option.partition(".")
            arguments.setdefault(name, {})[argument] = value
        return arguments

    def variants(self, names: Sequence[str]) -> list[Swept]:
        """Return the swept values of each arm of a combination: one arm without values if nothing is swept."""
        # In one order, so that the same options in another order name the same cells.
        own = {option: self.sweeps[option] for option in sorted(self.sweeps) if option.partition(".")[0] in names}
        return [tuple(zip(own, values, strict=True)) for values in product(*own.values())]

    def attack(self, name: str) -> Attack:
        """Return a new instance of an attack, with its arguments."""
        return get_attack(name)(**(self.arguments or {}).get(name, {}))

    def ratios(self, attack: str) -> tuple[float, ...]:
        """Return the harmful ratios at which an attack runs. A fixed harmful fraction is the only one."""
        instance = self.attack(attack)
        own, fields = getattr(instance, "p", 0.0), instance.__dataclass_fields__
        # An attack takes the grid's ratios only if its argument p has the default None.
        if "p" not in fields or fields["p"].default is not None:
            return (own,)
        if own is not None:
            raise InputError(
                f"--{attack}.p: a comparison does not take it, because --harmful_ratios decides p. Got {own}."
            )
        return self.harmful_ratios

    @property
    def every_seed(self) -> Sequence[int]:
        """The seeds of the comparison."""
        if isinstance(self.seeds, int):
            return range(self.first_seed, self.first_seed + self.seeds)
        return self.seeds

    def cells(self) -> list[Cell]:
        """Return all cells. For each aligned model, the first cell that needs it comes before all other cells."""
        every = [
            Cell(parts(word), p, task, seed, attack, word == UNALIGNED, swept)
            for seed in self.every_seed
            for task in self.tasks
            for attack in self.attacks
            for p in self.ratios(attack)
            for word in self.defenses
            for swept in self.variants(parts(word))
        ]
        first: dict[Any, Cell] = {}
        for cell in every:
            first.setdefault(self.aligned(cell), cell)
        return [*first.values(), *(cell for cell in every if first[self.aligned(cell)] != cell)]

    def aligned(self, cell: Cell) -> tuple[Any, ...]:
        """Return the values that decide a cell's aligned model. Two cells with equal values share the model."""
        names = tuple(n for n in cell.defenses if defense_class(n).stage is Stage.ALIGNMENT)
        return (
            cell.seed,
            cell.unaligned,
            names,
            tuple(pair for pair in cell.swept if pair[0].partition(".")[0] in names),
        )


def parts(word: str) -> tuple[str, ...]:
    """Return the names in a combination such as ``"booster+lisa"``. ``"none"`` and ``"unaligned"`` have no names."""
    names = tuple(name.replace("-", "_") for name in word.split("+"))
    return () if names in (("none",), (UNALIGNED,)) else names


def value_text(value: Any) -> str:
    """Return the value of a swept argument as an arm shows it. Different values give different texts."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    short = f"{value:g}" if isinstance(value, float) else str(value)
    return short if not isinstance(value, float) or float(short) == value else repr(value)


def refusal(error: Exception, options: Iterable[str]) -> str:
    """Return a defense's refusal of its arguments, with its swept options in front."""
    own = [o for o in options if str(error).startswith(f"{defense_class(o.partition('.')[0]).__name__}:")]
    return f"{_options(own)}: {error}" if own else str(error)


def _options(names: Iterable[str]) -> str:
    return " and ".join(f"--{name}" for name in names)


def cell_config(config: RunConfig, cell: Cell) -> RunConfig:
    """Return a cell's configuration. The name of its task replaces ``{task}`` in the paths of the task's files."""
    data = replace(config.data, task=cell.task)
    for name in ("task_train", "task_test"):
        if path := getattr(data, name):
            data = replace(data, **{name: path.replace("{task}", Path(cell.task).stem)})
    if cell.unaligned:
        config = replace(config, alignment=replace(config.alignment, steps=0))
    return replace(
        config,
        defense=list(cell.defenses),
        baseline=False,
        attack=cell.attack,
        harmful_ratio=cell.harmful_ratio,
        seed=cell.seed,
        data=data,
    )
