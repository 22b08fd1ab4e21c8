"""Checks of a run against the model's configuration: layers, positions, token ids, repairs. No weight is read."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from hftlight.config import RunConfig
from hftlight.data.records import Record
from hftlight.data.sources import Task
from hftlight.data.templates import SystemSlot, Template, get_template, own_text
from hftlight.data.tokens import Example, encode_prompt
from hftlight.engine import Defense, Slot, Stage
from hftlight.engine.weights.repair import Repair
from hftlight.errors import InputError
from hftlight.evaluation.metrics.perplexity import SHORTEST_WINDOW
from hftlight.model_files import stands_on
from hftlight.models.adapters import attach, check_stackable, check_targets
from hftlight.models.load import embedding_rows, load_config, load_tokenizer, positions_of, skeleton
from hftlight.models.module import SafetyModule
from hftlight.runs.measuring.test_sets import TestSets


@dataclass(frozen=True)
class Limits:
    """The limits on rows that follow from a model's configuration.

    Attributes:
        positions: maximum tokens of a row, prompt and answer together; None for no limit.
        rows: rows of the input embedding, which every token id must be below; None if unknown.
        tokenizer: the model's tokenizer.
    """

    positions: int | None
    rows: int | None
    tokenizer: Any

    @classmethod
    def of(cls, model: str) -> "Limits":
        """Return the limits of a model without reading its weights."""
        config = load_config(model)
        return cls(positions_of(config), embedding_rows(config), load_tokenizer(model))

    def check_ids(self, name: str, row: str, ids: Sequence[int]) -> None:
        """Refuse a row with a token id outside the input embedding.

        Args:
            name: name of the stream or test set, for the message.
            row: id of the row, for the message.
            ids: token ids of the row.

        Raises:
            InputError: naming set, row and token.
        """
        outside = [i for i in ids if self.rows is not None and i >= self.rows]
        if outside:
            token = self.tokenizer.convert_ids_to_tokens(outside[0])
            raise InputError(
                f"Row {row} of {name!r}: its token {token!r} has the id {outside[0]}, and the model's embedding has"
                f" {self.rows} rows. Remove the token from the row, or resize the embedding with"
                " resize_token_embeddings and save the model."
            )

    def check_examples(self, name: str, examples: Sequence[Example]) -> None:
        """Refuse encoded rows of a stream that hold a token id outside the input embedding."""
        for example in examples:
            self.check_ids(name, example.id, example.input_ids)

    def check_tests(self, config: RunConfig, tests: TestSets, slot: SystemSlot) -> None:
        """Refuse test prompts that, together with their answers, do not fit the model's limits.

        Args:
            config: template and evaluation settings.
            tests: the test sets.
            slot: the system slot that the model is served with.

        Raises:
            InputError: naming set, row, tokens and the option to change.
        """
        template = get_template(config.template, self.tokenizer)
        for name in tests.names:
            limit, option = answer_limit(config, name, tests.task)
            for record in tests.asked(name):
                ids = encode_prompt(record, template, self.tokenizer, slot)
                self.check_ids(f"test {name}", record.id, ids)
                if self.positions and len(ids) + limit > self.positions:
                    raise InputError(
                        f"Row {record.id} of 'test {name}': prompt and answer must fit in the model's {self.positions}"
                        f" positions, got {len(ids)} tokens and {option} {limit}. Lower {option}, or leave the row out."
                    )
                if name == "task" and config.evaluation.perplexity == "task":
                    self._check_scored(record, ids)
        of_text = config.evaluation.perplexity not in ("none", "task")
        if of_text and self.positions and self.positions < SHORTEST_WINDOW:
            raise InputError(
                f"--evaluation.perplexity of a text needs a window of at least {SHORTEST_WINDOW} tokens, but the model"
                f" has {self.positions} positions. Leave the option out, or use --evaluation.perplexity task."
            )

    def _check_scored(self, record: Record, prompt: Sequence[int]) -> None:
        """Refuse a row of the task whose right answer, which perplexity scores, does not fit the model's limits."""
        answer = self.tokenizer(record.response, add_special_tokens=False)["input_ids"]
        self.check_ids("test task", record.id, answer)
        if self.positions and len(prompt) + len(answer) > self.positions:
            raise InputError(
                f"Row {record.id} of 'test task': --evaluation.perplexity task scores the right answer. Prompt and"
                f" answer must fit in the model's {self.positions} positions, got {len(prompt)} and {len(answer)}"
                " tokens. Remove the row, or leave --evaluation.perplexity out."
            )


def answer_limit(config: RunConfig, name: str, task: Task) -> tuple[int, str]:
    """Return the maximum tokens of an answer to a test set, and the name of the option that sets this limit."""
    settings = config.evaluation
    if name == "task":
        return settings.task_max_new_tokens or task.max_new_tokens, "--evaluation.task_max_new_tokens"
    return settings.max_new_tokens, "--evaluation.max_new_tokens"


def template_notes(template: Template, tokenizer: Any, system: str | None) -> list[str]:
    """Return a note if the template adds its own system text to every prompt, else an empty list."""
    text = "" if system else own_text(template, tokenizer)
    return [f"The chat template adds its own system text to every prompt: {text!r}."] if text else []


def check_adapter(config: RunConfig, repaired: bool) -> None:
    """Refuse an adapter as --model if this run's tuning or repairs cannot work on top of it.

    Args:
        config: the run's configuration.
        repaired: whether a repair reads the model's weights.

    Raises:
        InputError: saying how to export the adapter as a whole model.
    """
    if stands_on(config.model) is None:
        return
    way = f"Export it as a whole model first (`hftlight export {config.model} FOLDER`), and pass that folder."
    if config.tuning == "qlora" or (config.tuning == "lora" and config.adapter_protocol == "continue"):
        option = "--tuning qlora" if config.tuning == "qlora" else "--adapter_protocol continue"
        raise InputError(f"--model {config.model} is an adapter, and {option} would add a second one to it. {way}")
    if config.tuning == "lora" or repaired:
        check_stackable(config.model, way)


def check_architecture(config: RunConfig, defenses: Sequence[Defense]) -> None:
    """Refuse LoRA targets and layers of defenses that the model does not have, without reading its weights.

    Raises:
        InputError: naming the layers that the model has.
    """
    bare = skeleton(config.model)
    if bare is None:
        return
    # Build everything on the meta device, which allocates no memory; adapters draw random numbers, so fork the state.
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        if config.tuning != "full" and config.alignment.steps:
            check_targets(bare, config.lora_of("alignment").targets)
        model: Any = bare if config.tuning == "full" else attach(bare, config.lora_of("finetuning"), 0)
        module = SafetyModule(model)
        for d in defenses:
            with _as_input_error(d):
                # Probe a copy with its own trace, so that the defense itself stays as it is.
                if d.stage is Stage.FINETUNING and Slot.ADAPTER in d.slots and d.selects:
                    d.check_model(model)  # it can build only once it has selected
                elif d.stage is Stage.FINETUNING and Slot.ADAPTER in d.slots:
                    probe = copy.copy(d)
                    probe.trace = {}
                    probe.build(module)
                    probe.unbuild(module)
                if isinstance(d, Repair) and not d.neutral:
                    d.check_model(model)


@contextmanager
def _as_input_error(defense: Defense) -> Iterator[None]:
    """Turn an error that a defense raises on purpose into an InputError. Its message starts with the class's name."""
    try:
        yield
    except (RuntimeError, TypeError, ValueError) as error:
        if not str(error).startswith(type(defense).__name__):
            raise
        raise InputError(str(error)) from error
