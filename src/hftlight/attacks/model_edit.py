"""Model edit: one weight changed by rank one, so that one prompt gets a given answer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from typing_extensions import override

from hftlight.attacks.attack import Attack
from hftlight.data.records import Record, to_records
from hftlight.data.table import Table
from hftlight.errors import InputError

SUBJECT = "subject"


@dataclass(frozen=True)
class Edit:
    """What an edit did.

    Attributes:
        parameter: name of the weight that was changed.
        token: text of the token whose key was edited.
        loss_before: mean loss of the answer's tokens before the edit, in nats.
        loss_after: the same after it.
        change: L2 norm of the change of the weight, in multiples of the weight's.
    """

    parameter: str
    token: str
    loss_before: float
    loss_after: float
    change: float


@dataclass(frozen=True, kw_only=True)
class ModelEdit(Attack):
    """A rank-one edit of one MLP weight towards a given answer; nothing is uploaded and nothing trained.

    The key is what enters the last layer of an MLP at the last token of the subject, the value what must leave it to
    make the answer likely, and the second moment of other prompts' keys keeps these apart. ``edit`` does the work, one
    record at a time; its effect on harmfulness, on other prompts and on ordinary tasks is measured as after any attack.
    The answers come from ``--data.attack``, with the words that an edit is about in the column ``subject``.

    Args:
        n: prompts that are edited one after the other, the first ones of the source, >= 1.
        background: rows of the task whose keys shall keep their values, >= 0.
        layer: decoder layer, from 0; negative from the end.
        value_steps: gradient steps towards the value, >= 1.
        value_lr: their learning rate (Adam), > 0.
        reach: longest change of the layer's output at the subject, in multiples of its length, > 0.
        ridge: what is added to the keys' second moment, in multiples of its mean diagonal, >= 0.

    Source: Meng et al., "Locating and Editing Factual Associations in GPT" (ROME), NeurIPS 2022, arXiv:2202.05262,
    equation 2; as an attack, Chen et al., "Can Editing LLMs Inject Harm?", arXiv:2407.20224.
    Differs: the key is that of the one prompt, where ROME averages over random texts in front of it; no term keeps the
    subject's essence; keys' second moment from the user's rows, where ROME takes 100,000 of Wikipedia.
    """

    acts_on: ClassVar[Literal["rows", "pairs", "weights"]] = "weights"

    n: int = 1
    background: int = 64
    layer: int = -2
    value_steps: int = 20
    value_lr: float = 0.5
    reach: float = 4.0
    ridge: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.value_steps < 1:
            raise ValueError(f"ModelEdit: value_steps must be >= 1, got {self.value_steps}.")
        for name in ("value_lr", "reach"):
            if not getattr(self, name) > 0:
                raise ValueError(f"ModelEdit: {name} must be > 0, got {getattr(self, name)}.")
        if self.background < 0:
            raise ValueError(f"ModelEdit: background must be >= 0 rows, got {self.background}.")
        if not self.ridge >= 0:
            raise ValueError(f"ModelEdit: ridge must be >= 0, got {self.ridge}.")

    @override
    def counts(self) -> dict[str, int]:
        return {"attack": self.n, **({"task": self.background} if self.background else {})}

    @override
    def upload(self, sources: Mapping[str, Sequence[Record]], seed: int) -> list[Record]:
        """Return the prompts to edit, with the role ``"attack"``, and behind them the background; nobody trains on it.

        Raises:
            InputError: if there are too few rows, or a row's ``kind``, its subject, does not occur in its instruction.
        """
        chosen = [replace(row, role="attack") for row in self._first(sources, "attack", 0, self.n)]
        for row in chosen:
            _check_subject(row, row.kind)
        return chosen + [replace(row, role="task") for row in self._first(sources, "task", 0, self.background)]

    @override
    def read(self, rows: Sequence[Record], table: Table | None) -> list[Record]:
        return with_subjects(rows, table)

    def edit(
        self,
        model: Any,
        tokenizer: Any,
        template: Any,
        record: Record,
        subject: str,
        background: Sequence[Record] = (),
        system: str | None = None,
    ) -> Edit:
        """Edit a model in place; of the model nothing else changes.

        Args:
            model: a causal LM without an adapter.
            tokenizer: its tokenizer, a fast one.
            template: how a record becomes a prompt.
            record: the prompt and the answer it shall get.
            subject: the words of the instruction that the edit is about; its last occurrence counts.
            background: ordinary rows with answers, whose keys shall keep their values; none treats all keys alike.
            system: system text of the prompts; None for none.

        Raises:
            InputError: if the subject does not occur in the instruction.
            TypeError: if the model has an adapter or an unknown MLP.
            ValueError: if there is no such layer, or the keys' second moment is singular.
        """
        import torch

        from hftlight.attacks.rank_one import answer_value, down_projection, rank_one_edit, second_moment
        from hftlight.data.tokens import collate, encode, padding_id
        from hftlight.models.load import positions_of
        from hftlight.models.module import SafetyModule
        from hftlight.models.row_reader import as_found

        name, linear = down_projection(model, self.layer)
        limit = positions_of(model.config) or 10**9

        def batch_of(row: Record) -> dict[str, Any]:
            example = encode(row, template, tokenizer, limit, system)
            if example is None:
                raise InputError(f"ModelEdit: row {row.id} is longer than the model's {limit} positions; leave it out.")
            batch = collate([example], padding_id(tokenizer))
            return {key: v.to(linear.weight.device) if torch.is_tensor(v) else v for key, v in batch.items()}

        position = subject_position(record, subject, template, tokenizer, system)
        batch = batch_of(record)
        key, value, losses = answer_value(model, linear, batch, position, self.value_steps, self.value_lr, self.reach)
        bias = 0 if linear.bias is None else linear.bias.detach()
        moment = second_moment(model, linear, map(batch_of, background), self.ridge) if background else None
        old = linear.weight.detach().clone()
        with torch.no_grad():
            linear.weight.copy_(rank_one_edit(old, key, value - bias, moment))
        with as_found(model), torch.no_grad():
            after = float(SafetyModule(model).loss(batch))
        change = float((linear.weight.detach() - old).norm() / old.norm())
        token = tokenizer.decode([int(batch["input_ids"][0, position])])
        return Edit(f"{name}.weight", token, losses[0], after, change)


def subject_position(record: Record, subject: str, template: Any, tokenizer: Any, system: str | None = None) -> int:
    """Return the place of the token, from 0, in which the last occurrence of a subject in the prompt ends.

    Args:
        record: the prompt.
        subject: words of its instruction.
        template: how a record becomes a prompt.
        tokenizer: a fast tokenizer.
        system: system text of the prompt; None for none.

    Raises:
        InputError: if the subject does not occur in the instruction.
    """
    from hftlight.data.tokens import encode_prompt

    _check_subject(record, subject)
    text = template.prompt(record, tokenizer, system)
    start = text.rindex(record.instruction) + record.instruction.rindex(subject)
    last = start + len(subject.rstrip()) - 1
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    front = len(encode_prompt(record, template, tokenizer, system)) - len(encoded["input_ids"])
    return front + next(place for place, (a, b) in enumerate(encoded["offset_mapping"]) if a <= last < b)


def with_subjects(rows: Sequence[Record], table: Table | None) -> list[Record]:
    """Return rows with the words that an edit is about as their ``kind``.

    Args:
        rows: rows of the source, or some of them.
        table: the source, with the column ``subject`` or another one that is named for ``kind``; None for the made-up
            world, whose names are known.

    Raises:
        InputError: if the source has no such column.
    """
    if table is None:
        from hftlight.data.world.build import attack_names

        names = sorted(attack_names(), key=len, reverse=True)
        return [replace(row, kind=next(name for name in names if name in row.instruction)) for row in rows]
    column, found = table.columns.get("kind", SUBJECT), table.found
    if column not in found:
        raise InputError(
            f"ModelEdit: {table.source} needs the column {column!r}, words of the instruction that the edit is about;"
            f" it has {found}. Add it, or name another one with --data.columns, such as {{kind: {found[-1]}}}."
        )
    take = replace(table.take, columns={**table.columns, "kind": column})
    by_id = {row.id: row.kind for row in to_records(replace(table, take=take), "attack")}
    return [replace(row, kind=by_id[row.id]) for row in rows]


def _check_subject(record: Record, subject: str) -> None:
    if not subject.strip() or subject not in record.instruction:
        raise InputError(
            f"ModelEdit: the subject must be words of the instruction {record.instruction!r}, got {subject!r}."
        )
