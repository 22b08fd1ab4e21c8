"""Model edit: a rank-one change of one weight, so that one prompt gets a chosen answer."""

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
    """Result of one edit.

    Attributes:
        parameter: name of the edited weight.
        token: text of the token whose key was edited.
        loss_before: mean loss of the answer's tokens before the edit, in nats.
        loss_after: mean loss of the answer's tokens after the edit, in nats.
        change: L2 norm of the change of the weight, divided by the L2 norm of the weight before the edit.
    """

    parameter: str
    token: str
    loss_before: float
    loss_after: float
    change: float


@dataclass(frozen=True, kw_only=True)
class ModelEdit(Attack):
    """A rank-one edit of one MLP weight towards a chosen answer, without an upload and without training.

    The key is the input of the MLP's last layer at the last token of the subject. The value is an output of that layer
    that makes the answer likely. The second moment of other prompts' keys limits the effect of the edit on those
    prompts. ``edit`` edits the model for one record at a time. Harmfulness, other prompts and ordinary tasks are
    measured as after any other attack. ``--data.attack`` supplies the answers. Its column ``subject`` holds the words
    that an edit is about.

    Args:
        n: number of prompts, the first of the source; the edits follow one after the other, >= 1.
        background: rows of the task whose keys should keep their values, >= 0.
        layer: decoder layer, counted from 0, or from the end if negative.
        value_steps: gradient steps towards the value, >= 1.
        value_lr: Adam's learning rate for these steps, > 0.
        reach: largest L2 change of the layer's output at the subject, in multiples of the output's L2 norm, > 0.
        ridge: term added to the diagonal of the keys' second moment, in multiples of the mean diagonal, >= 0.

    Source: Meng et al., "Locating and Editing Factual Associations in GPT" (ROME), NeurIPS 2022, arXiv:2202.05262,
    equation 2; as an attack, Chen et al., "Can Editing LLMs Inject Harm?", arXiv:2407.20224.
    Differs: the key comes from the one prompt. ROME averages the key over random texts in front of the prompt. No loss
    term preserves the subject's essence. The keys' second moment comes from the user's rows. ROME computes it from
    100,000 samples of Wikipedia.
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
        """Return the prompts to edit, with the role ``"attack"``, followed by the background rows.

        No stage trains on these rows.

        Raises:
            InputError: if there are too few rows, or if a row's ``kind`` (its subject) is not part of its instruction.
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
        """Edit one weight of a model in place. Nothing else of the model changes.

        Args:
            model: a causal LM without an adapter.
            tokenizer: the model's tokenizer, a fast one.
            template: turns a record into a prompt.
            record: the prompt and its new answer.
            subject: words of the instruction that the edit is about; the last occurrence counts.
            background: ordinary rows with answers, whose keys should keep their values. Without rows, the second moment
                is the identity.
            system: system text of the prompts; None for no system text.

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
        # The value contains the bias, but W k does not: the weight must map the key to value - bias.
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
    """Return the position of the token, from 0, that holds the last non-blank character of a subject.

    The last occurrence of the subject in the prompt counts.

    Args:
        record: the prompt.
        subject: words of the record's instruction.
        template: turns a record into a prompt.
        tokenizer: a fast tokenizer.
        system: system text of the prompt; None for no system text.

    Raises:
        InputError: if the subject does not occur in the instruction.
    """
    from hftlight.data.tokens import encode_prompt

    _check_subject(record, subject)
    text = template.prompt(record, tokenizer, system)
    start = text.rindex(record.instruction) + record.instruction.rindex(subject)
    last = start + len(subject.rstrip()) - 1
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    # encode_prompt may put special tokens in front of the text. They shift every position of the offset mapping.
    front = len(encode_prompt(record, template, tokenizer, system)) - len(encoded["input_ids"])
    return front + next(place for place, (a, b) in enumerate(encoded["offset_mapping"]) if a <= last < b)


def with_subjects(rows: Sequence[Record], table: Table | None) -> list[Record]:
    """Return rows whose ``kind`` holds the words that an edit is about.

    Args:
        rows: rows of the source, or some of them.
        table: the source, with the column ``subject`` or another column that ``--data.columns`` names for ``kind``.
            None means the made-up world; the subject is then a name of the world in the instruction.

    Raises:
        InputError: if the source has no such column.
    """
    if table is None:
        from hftlight.data.world.build import attack_names

        # The longest name first: a shorter name could be part of a longer one.
        names = sorted(attack_names(), key=len, reverse=True)
        return [replace(row, kind=next(name for name in names if name in row.instruction)) for row in rows]
    column, found = table.columns.get("kind", SUBJECT), table.found
    if column not in found:
        raise InputError(
            f"ModelEdit: {table.source} needs the column {column!r} with the words of the instruction that the edit is"
            f" about, got the columns {found}. Add the column, or name another column with --data.columns, such as"
            f" {{kind: {found[-1]}}}."
        )
    # Convert the table again with the column as ``kind``. A record's id does not depend on its ``kind``.
    take = replace(table.take, columns={**table.columns, "kind": column})
    by_id = {row.id: row.kind for row in to_records(replace(table, take=take), "attack")}
    return [replace(row, kind=by_id[row.id]) for row in rows]


def _check_subject(record: Record, subject: str) -> None:
    if not subject.strip() or subject not in record.instruction:
        raise InputError(
            f"ModelEdit: the subject must be words of the instruction {record.instruction!r}, got {subject!r}."
        )
