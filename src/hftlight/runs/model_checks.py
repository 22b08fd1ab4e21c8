"""What a model cannot take, refused from its configuration alone: layers, positions, token ids, repairs."""

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
from hftlight.runs.measuring.test_sets import SETS, TestSets


@dataclass(frozen=True)
class Limits:
    """What a model's configuration says about the rows that it can take.

    Attributes:
        positions: tokens of a row, prompt and answer together; None for no limit.
        rows: rows of the input embedding, so that ids are below; None where that is not known.
        tokenizer: names the tokens.
    """

    positions: int | None
    rows: int | None
    tokenizer: Any

    @classmethod
    def of(cls, model: str) -> "Limits":
        """Return the limits of a model; no weight is read."""
        config = load_config(model)
        return cls(positions_of(config), embedding_rows(config), load_tokenizer(model))

    def check_ids(self, name: str, row: str, ids: Sequence[int]) -> None:
        """Refuse a row with a token that the embedding does not have.

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
        """Refuse encoded rows of a stream with a token that the embedding does not have."""
        for example in examples:
            self.check_ids(name, example.id, example.input_ids)

    def check_tests(self, config: RunConfig, tests: TestSets, slot: SystemSlot) -> None:
        """Refuse test prompts that a model could not answer, or be scored on, with what it is served with.

        Raises:
            InputError: naming set, row, tokens and the option to change.
        """
        template = get_template(config.template, self.tokenizer)
        for name in SETS:
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
                f"--evaluation.perplexity of a text needs a window of {SHORTEST_WINDOW} tokens at least, and the model"
                f" has {self.positions} positions; leave it out, or take the perplexity of the task."
            )

    def _check_scored(self, record: Record, prompt: Sequence[int]) -> None:
        answer = self.tokenizer(record.response, add_special_tokens=False)["input_ids"]
        self.check_ids("test task", record.id, answer)
        if self.positions and len(prompt) + len(answer) > self.positions:
            raise InputError(
                f"Row {record.id} of 'test task': --evaluation.perplexity task scores its right answer, which must fit"
                f" in the model's {self.positions} positions with its prompt, got {len(prompt)} and {len(answer)}"
                " tokens. Leave the row, or the perplexity, out."
            )


def answer_limit(config: RunConfig, name: str, task: Task) -> tuple[int, str]:
    """Return the tokens that an answer of a test set may have, and the option that says so."""
    settings = config.evaluation
    if name == "task":
        return settings.task_max_new_tokens or task.max_new_tokens, "--evaluation.task_max_new_tokens"
    return settings.max_new_tokens, "--evaluation.max_new_tokens"


def template_notes(template: Template, tokenizer: Any, system: str | None) -> list[str]:
    """Return what a reader must know about a template's prompts: a system text of its own."""
    text = "" if system else own_text(template, tokenizer)
    return [f"The chat template writes a system text of its own into every prompt: {text!r}."] if text else []


def check_adapter(config: RunConfig, repaired: bool) -> None:
    """Refuse an adapter as --model of which no new artifact could be made.

    Args:
        config: the run's configuration.
        repaired: whether a repair reads the model's weights.

    Raises:
        InputError: with the way out.
    """
    if stands_on(config.model) is None:
        return
    way = f"Write it as a whole model first (`hftlight export {config.model} FOLDER`), and give that folder."
    if config.tuning == "qlora" or (config.tuning == "lora" and config.adapter_protocol == "continue"):
        option = "--tuning qlora" if config.tuning == "qlora" else "--adapter_protocol continue"
        raise InputError(f"--model {config.model} is an adapter, on which {option} would put a second one. {way}")
    if config.tuning == "lora" or repaired:
        check_stackable(config.model, way)


def check_architecture(config: RunConfig, defenses: Sequence[Defense]) -> None:
    """Refuse LoRA targets, and defenses of named layers, that a model does not have; no weight is read.

    Raises:
        InputError: naming the layers that there are.
    """
    bare = skeleton(config.model)
    if bare is None:
        return
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        if config.tuning != "full" and config.alignment.steps:
            check_targets(bare, config.lora_of("alignment").targets)
        model: Any = bare if config.tuning == "full" else attach(bare, config.lora_of("finetuning"), 0)
        module = SafetyModule(model)
        for d in defenses:
            with _refusals(d):
                if d.stage is Stage.FINETUNING and Slot.ADAPTER in d.slots:
                    probe = copy.copy(d)
                    probe.trace = {}
                    probe.build(module)
                    probe.unbuild(module)
                if isinstance(d, Repair) and not d.neutral:
                    d.check_model(model)


@contextmanager
def _refusals(defense: Defense) -> Iterator[None]:
    """Turn a defense's own refusal into an InputError; anything else is a defect."""
    try:
        yield
    except (RuntimeError, TypeError, ValueError) as error:
        if not str(error).startswith(type(defense).__name__):
            raise
        raise InputError(str(error)) from error
