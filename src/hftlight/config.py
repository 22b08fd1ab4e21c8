"""RunConfig: every option of a run, with default, unit and range. This module does not import torch."""

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, TypeVar

from hftlight.errors import InputError
from hftlight.take import SOURCES, Take

# Options that are left out of the configuration in a stage's cache key. Another part of the key covers the option, or
# the option does not change the weights.
OF_NO_STAGE = frozenset(
    {"defense", "baseline", "model", "attack", "attacker", "harmful_ratio", "num_samples", "accelerator",
     "checkpoint_every", "logger", "base", "adapter_protocols", "upload_generations", "output", "name", "data",
     "search", "hardening_steps"}
)  # fmt: skip
# Options that are left out of the configuration in the cache key of a finished model's answers.
OF_NO_ANSWER = OF_NO_STAGE | {
    "adapter_protocol", "system", "max_tokens", "long_rows", "order", "seed", "devices", "num_nodes",
    "gradient_checkpointing", "log_every", "alignment", "finetuning", "lora",
    *(f"evaluation.{name}" for name in ("prompts", "over_refusal_prompts", "task_rows", "judge", "refusal_judge",
      "perplexity", "embedding_drift", "loss_rows", "at", "at_prompts", "stop_above", "stop_below")),
}  # fmt: skip
ANSWERING = (
    "prompts",
    "over_refusal_prompts",
    "task_rows",
    "max_new_tokens",
    "task_max_new_tokens",
    "batch_size",
    "judge",
)  # fields of Evaluation that change the answers of a finished model
ALL_LINEAR = "all-linear"  # every linear layer except the output layer; PEFT uses the same name
# Arguments of a defense that only a user's own Trainer needs. A run does not take them.
OWN_TRAINER = {"streams", "output", "aligned", "base"}


@dataclass
class Lora:
    """Geometry of the LoRA adapter. The adapter's weights are float32.

    Args:
        r: rank, >= 1.
        alpha: numerator of the scale; the adapter's update is multiplied by alpha / r.
        dropout: dropout probability, in [0, 1).
        targets: names of the linear layers that get an adapter, or all-linear for all except the output layer.
    """

    r: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: list[str] = field(default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"])


@dataclass
class StageLora:
    """Geometry of one stage's adapter. A null value means that the stage uses the value of ``lora``.

    Args:
        r: rank, >= 1.
        alpha: numerator of the scale, > 0.
        dropout: dropout probability, in [0, 1).
        targets: names of the linear layers that get an adapter, or all-linear for all except the output layer.
    """

    r: int | None = None
    alpha: float | None = None
    dropout: float | None = None
    targets: list[str] | None = None


@dataclass
class Training:
    """How one stage trains.

    Args:
        steps: optimizer steps, >= 1. The alignment stage also takes 0 if the model is aligned already.
        lr: learning rate, > 0.
        batch_size: rows per micro-batch and device, >= 1.
        accumulate: micro-batches per optimizer step, >= 1.
        weight_decay: AdamW's decoupled weight decay, >= 0.
        optimizer: adamw or sgd.
        betas: AdamW's two decay rates of the moments, each in [0, 1).
        schedule: schedule of the learning rate: constant (no warm-up), or cosine (decays to 0).
        decay: factor on the learning rate after each pass over the stage's rows, in (0, 1]; 1 means no decay.
        warmup_ratio: fraction of the steps in which the cosine schedule warms up linearly, in [0, 1).
        clip: largest L2 norm of the combined gradient, defenses included; 0 turns clipping off.
        average: tokens over which the loss is averaged: micro (the micro-batch, as in the official code) or window (all
            micro-batches and devices of the optimizer step).
        template: prompt template of this stage; null means --template.
        lora: adapter geometry of this stage; a null value means the value of --lora.
    """

    steps: int = 60
    lr: float = 5e-4
    batch_size: int = 8
    accumulate: int = 1
    weight_decay: float = 0.1
    optimizer: Literal["adamw", "sgd"] = "adamw"
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_ratio: float = 0.0
    decay: float = 1.0
    clip: float = 1.0
    average: Literal["micro", "window"] = "micro"
    template: str | None = None
    lora: StageLora = field(default_factory=StageLora)


@dataclass
class Data:
    """Where the rows come from: ``builtin`` (the made-up world), a file, a saved data set or a hub id.

    Files are JSONL, JSON, CSV or Parquet. The options split, rows, where, first and columns take one value per source.
    The sources are alignment, harmful, pairs, attack, task_train, task_test, test and over_refusal. On the command line
    the source may be part of the option: --data.rows.alignment 5001:10000.

    Args:
        alignment: harmful prompts with safe answers, and ordinary prompts with helpful answers.
        harmful: the defender's harmful prompts with harmful answers. They are read only if a defense needs them.
        pairs: the defender's prompts with a safe and a harmful answer each. They are read only if a defense needs them.
        attack: the harmful rows hidden in the upload. If --data.harmful or --data.pairs takes the same rows, a hash of
            the prompt splits them between defender and attacker.
        task: the user's benign task: builtin, sst2, agnews, gsm8k, gsm8k_step_by_step, alpaca_eval, or your own file.
            gsm8k_step_by_step asks the model to think first, as Vaccine and T-Vaccine do. alpaca_eval has no reference
            answers, so it has no accuracy. Answers to your own file are scored by exact match.
        task_train: file with the task's training rows; by default they come from the hub.
        task_test: file with the task's test rows; by default they come from the hub. For alpaca_eval one file holds
            training and test rows.
        test: harmful prompts for the harmful score; answers are not needed.
        over_refusal: ordinary prompts that look harmful, for the over-refusal rate.
        split: split per source of a hub set or a saved data set, such as {alignment: 30k_train}.
        rows: row range per source as a Python slice, such as {alignment: "5001:10000"}. The range counts the source's
            rows from 0, before --data.where filters them.
        where: filter per source, such as {alignment: is_safe=true, over_refusal: label=safe}. Several conditions form a
            list. The comparison of true and false ignores case.
        first: number of rows per source, counted after the filter, >= 1, such as {harmful: 300}. The default is all
            rows. If defender and attacker share rows, the defender's default is half of them.
        columns: column names of files in an unknown format, such as {instruction: q, response: a}. They apply to every
            file that has these columns. {alignment: {response: refusal}} names the columns of one source.
    """

    alignment: str = "builtin"
    harmful: str = "builtin"
    pairs: str = "builtin"
    attack: str = "builtin"
    task: str = "builtin"
    task_train: str | None = None
    task_test: str | None = None
    test: str = "builtin"
    over_refusal: str = "builtin"
    split: dict[str, str] | None = None
    rows: dict[str, str] | None = None
    where: dict[str, str | list[str]] | None = None
    first: dict[str, int] | None = None
    columns: dict[str, str | dict[str, str]] | None = None

    def take(self, source: str) -> Take:
        """Return the split, rows, filter and columns to read of a source, one of ``SOURCES``.

        Raises:
            InputError: if the range, the filter or the number of rows is invalid.
        """
        columns: dict[str, Any] = self.columns or {}
        choices = {name: (getattr(self, name) or {}).get(source) for name in ("split", "rows", "where", "first")}
        try:
            return Take(
                **{name: value for name, value in choices.items() if value is not None},
                columns=columns.get(source, {}),
                usual={field: column for field, column in columns.items() if isinstance(column, str)},
            )
        except InputError as error:
            raise InputError(f"--data.{str(error).removeprefix('Take: ')} The source is {source}.") from error

    def check(self) -> None:
        """Refuse unknown source names and invalid choices of rows and columns.

        Raises:
            InputError: naming the option, the allowed values and the value.
        """
        for option in ("split", "rows", "where", "first", "columns"):
            for name, value in (getattr(self, option) or {}).items():
                # A column name may also apply to all files; then the key is a field such as response, not a source.
                flat = option == "columns" and isinstance(value, str)
                if flat == (name in SOURCES):
                    near = get_close_matches(name, SOURCES, n=1, cutoff=0.4)
                    hint = f" Did you mean {near[0]!r}?" if near and name not in SOURCES else ""
                    what = "{alignment: {response: refusal}}" if option == "columns" else f"{{alignment: {value}}}"
                    raise InputError(
                        f"--data.{option} takes a value per source ({', '.join(SOURCES)}), such as {what}, got"
                        f" {name!r}: {value!r}.{hint}"
                    )
        for source in SOURCES:
            self.take(source)


@dataclass
class Evaluation:
    """Measurements after every stage: test prompts, token limits, judges, and curves during fine-tuning.

    The prompts are held out from training. Decoding is greedy.

    Args:
        prompts: number of harmful test prompts, >= 1; 0 means all.
        over_refusal_prompts: number of ordinary prompts that look harmful, >= 1; 0 means all.
        task_rows: number of rows of the task's test split, >= 1; 0 means all.
        max_new_tokens: longest answer to a harmful or ordinary prompt, in tokens, >= 1.
        task_max_new_tokens: longest answer to a task prompt, in tokens; 0 means the task's own limit.
        batch_size: prompts per batch, >= 1; affects only speed and memory.
        judge: judge of the harmful score. auto is builtin on the made-up world's prompts, else keyword. builtin is the
            made-up world's own rule. keyword and keyword_durability look for refusal phrases. moderation is
            beaver-dam-7b, the judge of published tables. Other judge models are moderation_512_tokens, deberta,
            harmbench, harmbench_mistral, llama_guard, llama_guard2, llama_guard3, strongreject and wildguard. Write
            NAME:FOLDER to load a judge model from a folder. hexphi:MODEL and strongreject_rubric:MODEL ask a language
            model behind an OpenAI-compatible endpoint.
        refusal_judge: judge of refusals of ordinary prompts. auto is builtin on the made-up world's prompts, else
            xstest_string. builtin is the made-up world's own rule. xstest_string looks for XSTest's openings and misses
            partial refusals. wildguard_refusal is a judge model; write wildguard_refusal:FOLDER to load it from a
            folder. xstest:MODEL asks a language model behind an OpenAI-compatible endpoint. It separates full from
            partial refusals.
        perplexity: text whose perplexity is measured: none, task, or a text file. task means the right answers of the
            task's test rows, each after its prompt. A file is read whole, for example Wikitext's test text.
        embedding_drift: reference model of the embedding drift: none, base, or aligned. After every later stage, the
            last layer's states at the last tokens of the harmful prompts are compared with the reference's states.
        loss_rows: number of alignment rows whose loss is measured after every stage, >= 1; 0 means none. As many
            harmful rows are measured too. They come neither from the upload nor from the defender's data. The loss is
            in nats per response token.
        at: optimizer steps of the fine-tuning, from 1, after which the model is evaluated for a curve; none by default.
        at_prompts: number of harmful test prompts for a curve, >= 1; 0 means all. The curve takes the first prompts and
            as many test rows of the task.
        stop_above: percent, 0-100; stop fine-tuning once a curve's 95 % interval of the harmful score is above it.
        stop_below: percent, 0-100; stop fine-tuning once that interval is below it. Both thresholds are checked on
            test prompts, so scores after an early stop are biased.
    """

    prompts: int = 100
    over_refusal_prompts: int = 50
    task_rows: int = 100
    max_new_tokens: int = 32
    task_max_new_tokens: int = 0
    batch_size: int = 64
    judge: str = "auto"
    refusal_judge: str = "auto"
    perplexity: str = "none"
    embedding_drift: Literal["none", "base", "aligned"] = "none"
    loss_rows: int = 50
    at: list[int] = field(default_factory=list)
    at_prompts: int = 50
    stop_above: float | None = None
    stop_below: float | None = None

    @property
    def stops(self) -> dict[str, float]:
        """Thresholds of early stopping that are set, by name, in percent."""
        bounds = {"stop_above": self.stop_above, "stop_below": self.stop_below}
        return {name: bound for name, bound in bounds.items() if bound is not None}

    def answering(self) -> dict[str, Any]:
        """Return the values that decide which prompts a finished model answers, and how it answers them."""
        return {name: getattr(self, name) for name in ANSWERING}

    def check(self) -> None:
        """Refuse invalid values of the perplexity, the embedding drift, the curve and its thresholds.

        Raises:
            InputError: naming the option, the allowed values and the value.
        """
        if self.perplexity not in ("none", "task") and not Path(self.perplexity).expanduser().is_file():
            raise InputError(
                f"--evaluation.perplexity must be none, task or a text file, got {self.perplexity!r}: no such file."
            )
        if self.embedding_drift not in ("none", "base", "aligned"):
            raise InputError(
                f"--evaluation.embedding_drift must be none, base or aligned, got {self.embedding_drift!r}."
            )
        if any(step < 1 for step in self.at):
            raise InputError(f"--evaluation.at takes optimizer steps >= 1, got {self.at}.")
        for name, bound in self.stops.items():
            if not 0 <= bound <= 100:
                raise InputError(f"--evaluation.{name} must lie in [0, 100] percent, got {bound:g}.")
            if not self.at:
                raise InputError(f"--evaluation.{name} needs a curve. Name its optimizer steps with --evaluation.at.")


@dataclass
class EndpointOptions:
    """How a model behind an OpenAI-compatible endpoint is reached, and what its answers may cost.

    Args:
        base_url: URL of the endpoint without /chat/completions. By default it is the environment variable
            OPENAI_BASE_URL, or OpenAI's endpoint.
        key_variable: environment variable that holds the API key. A local endpoint needs no key.
        prices: price of a million tokens read and of a million written, in any currency. Several models take one pair
            for all, or one pair each.
        budget: highest cost of all answers together, in the currency of the prices, > 0. Answers from the cache count
            with what they cost before. The command stops before the budget is exceeded.
        workers: number of parallel requests, >= 1.
        attempts: attempts per request, >= 1. The wait between attempts doubles from 1 s to 60 s, or is what the
            endpoint asks for.
        timeout: seconds without data from the endpoint after which an attempt fails, > 0.
    """

    base_url: str | None = None
    key_variable: str = "OPENAI_API_KEY"
    prices: list[float] | None = None
    budget: float | None = None
    workers: int = 4
    attempts: int = 6
    timeout: float = 60.0

    def check(self, models: int) -> None:
        """Refuse values out of range.

        Args:
            models: number of models behind the endpoint.

        Raises:
            InputError: naming the option, the allowed range and the value.
        """
        for name in ("workers", "attempts"):
            if getattr(self, name) < 1:
                raise InputError(f"--endpoint.{name} must be >= 1, got {getattr(self, name)}.")
        if not self.timeout > 0:
            raise InputError(f"--endpoint.timeout is in seconds and must be > 0, got {self.timeout:g}.")
        if self.prices is not None and (len(self.prices) not in (2, 2 * models) or min(self.prices) < 0):
            several = f", or {2 * models} for {models} models," if models > 1 else ""
            raise InputError(
                f"--endpoint.prices takes 2 numbers >= 0{several} per million tokens read and written, got"
                f" {' '.join(f'{price:g}' for price in self.prices) or 'none'}."
            )
        if self.budget is not None and not self.budget > 0:
            raise InputError(f"--endpoint.budget must be > 0, got {self.budget:g}.")
        if self.budget is not None and self.prices is None:
            raise InputError(
                f"--endpoint.budget {self.budget:g} needs the prices of a million tokens read and of a million written."
                " Add --endpoint.prices READ WRITTEN."
            )

    def prices_of(self, number: int) -> list[float] | None:
        """Return the prices of a million tokens read and written of model ``number``, from 0."""
        if self.prices is None or len(self.prices) == 2:
            return self.prices
        return self.prices[2 * number : 2 * number + 2]


# The allowed values of each axis of a search.
AXES = {"steps": ">= 1", "lr": "> 0", "rank": ">= 1", "num_samples": ">= 1", "harmful_ratio": "in [0, 1]"}


def check_axis(axis: str, values: Sequence[float]) -> None:
    """Refuse an empty axis of a search, and values out of range.

    Raises:
        InputError: naming the option, the allowed range and the values.
    """
    fits = {">= 1": lambda v: v >= 1, "> 0": lambda v: v > 0, "in [0, 1]": lambda v: 0 <= v <= 1}[AXES[axis]]
    if not values or not all(map(fits, values)):
        raise InputError(f"--search.{axis} takes one or more values {AXES[axis]}, got {list(values)}.")


@dataclass
class Search:
    """Search space of an attacker who tries many settings. An unset axis takes values around the run's own value.

    Args:
        steps: optimizer steps of the fine-tuning, each >= 1; by default the run's value and twice that.
        lr: learning rates, each > 0; by default the run's value, a third of it and three times it.
        rank: LoRA ranks, each >= 1; by default the run's value and four times it.
        num_samples: rows of the upload, each >= 1; by default the run's value.
        harmful_ratio: harmful fractions, each 0-1; by default the run's value and three times it, at most 1.
        eps: largest loss of finetune accuracy against the best setting that the attacker accepts, in points, >= 0.
    """

    steps: list[int] | None = None
    lr: list[float] | None = None
    rank: list[int] | None = None
    num_samples: list[int] | None = None
    harmful_ratio: list[float] | None = None
    eps: float = 2.0

    def check(self) -> None:
        """Refuse an empty axis and values out of range.

        Raises:
            InputError: naming the option, the allowed range and the value.
        """
        for axis in AXES:
            if (values := getattr(self, axis)) is not None:
                check_axis(axis, values)
        if not self.eps >= 0:
            raise InputError(f"--search.eps must be >= 0 points of accuracy, got {self.eps}.")


@dataclass
class RunConfig:
    """One run: align a model, let a user's upload train it, and measure it after every stage.

    Args:
        defense: names of the defenses, separated by spaces; none is plain alignment.
        baseline: also run the undefended arm; both arms share the stages that are equal.
        model: smollm2-135m, tiny, a folder, or a hub id.
        base: unaligned model that --model was made from, a folder or a hub id. It needs --alignment.steps 0. Defenses
            that read the weight change of the alignment use it.
        trust_remote_code: let a model run the code that comes with it. Without this option such a model is refused.
        tuning: what is trained: lora (float32 adapter), full (all parameters) or qlora (4-bit base). qlora needs
            bitsandbytes.
        adapter_protocol: use of the aligned adapter: merge or continue. merge puts it into the weights, and the upload
            trains a new adapter. continue lets the upload train it further.
        adapter_protocols: adapter protocol per arm, such as {booster: continue}. An arm of several defenses takes the
            protocol of its first defense that is listed. Every arm that is not listed takes --adapter_protocol.
        attack: what is uploaded: harmful_mix, explicit, identity_shift, benign, encoded, jailbreak_tuning,
            multilingual, benign_selection, reverse_preference, reverse_sft_dpo or model_edit. Options such as --NAME.n
            100 set the attack's own arguments.
        attacker: fixed (the run's own setting), search:N (N settings of a grid) or optuna:N (N settings that Optuna
            proposes). A search reports the worst case.
        harmful_ratio: p, the harmful fraction of the upload, 0-1.
        num_samples: n, size of the upload in rows, >= 1.
        template: prompt template: chat, chat_thinking, chat_no_thinking, alpaca, alpaca_no_newline, plain,
            alpaca_llama2, human_assistant or question_answer. chat is the model's own template. chat_thinking and
            chat_no_thinking set its enable_thinking, for models that reason first. alpaca_llama2 is Alpaca's prompt
            within Llama 2's marks. human_assistant writes Human: ... Assistant: before the answer. question_answer
            writes Question: ... Answer: and a newline before the answer.
        system: system text in every prompt, in training and evaluation; none by default.
        max_tokens: longest row in tokens: prompt, response and end token together. A model with fewer positions lowers
            the limit.
        long_rows: treatment of longer rows: drop, truncate or refuse. drop leaves them out before the upload is drawn,
            and the run reports their number. truncate cuts them at the end, as the official scripts do.
            refuse stops with an error.
        order: grouping of rows into batches: shuffle or length. shuffle is a plain seeded shuffle. length groups rows
            of similar length. It needs less padding, but long harmful rows then meet in few batches.
        seed: seed of the adapters, the row order, dropout and the choice of rows for the upload.
        precision: Lightning precision: 32-true, bf16-mixed, 16-mixed.
        accelerator: Lightning accelerator: auto, cpu, gpu.
        devices: number of devices on each node, >= 1.
        num_nodes: number of nodes, >= 1. Every node runs the same command, started by torchrun or SLURM.
        strategy: Lightning strategy: auto, ddp, or fsdp2.
        gradient_checkpointing: recompute activations in the backward pass (non-reentrant) to save memory.
        checkpoint_every: optimizer steps between checkpoints, >= 1. A killed run repeats at most this many steps.
        log_every: optimizer steps between points of a curve, >= 1. A point is the last value since the previous point.
        logger: where curves go in addition to the run folder: none, csv, wandb or tensorboard. wandb is offline
            without a key.
        upload_generations: also upload to W&B the answers to prompts from outside the made-up world.
        output: folder of all runs.
        name: name of the run folder; by default it is made from the configuration's hash.
        alignment: training of the alignment stage.
        hardening_steps: optimizer steps of the alignment's second phase, >= 1; by default as many as
            --alignment.steps. Only defenses that start from an aligned model have this phase.
        finetuning: training on the upload.
        lora: adapter geometry.
        data: sources of the rows.
        evaluation: measurements.
        search: search space of an attacker who tries many settings.
    """

    defense: list[str] = field(default_factory=list)
    baseline: bool = False
    model: str = "smollm2-135m"
    base: str | None = None
    trust_remote_code: bool = False
    tuning: Literal["lora", "full", "qlora"] = "lora"
    adapter_protocol: Literal["merge", "continue"] = "merge"
    adapter_protocols: dict[str, Literal["merge", "continue"]] | None = None
    attack: str = "harmful_mix"
    attacker: str = "fixed"
    harmful_ratio: float = 0.1
    num_samples: int = 384
    template: str = "chat"
    system: str | None = None
    max_tokens: int = 256
    long_rows: Literal["drop", "truncate", "refuse"] = "drop"
    order: Literal["shuffle", "length"] = "shuffle"
    seed: int = 0
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    devices: int = 1
    num_nodes: int = 1
    strategy: str = "auto"
    gradient_checkpointing: bool = False
    checkpoint_every: int = 20
    log_every: int = 1
    logger: Literal["none", "csv", "wandb", "tensorboard"] = "none"
    upload_generations: bool = False
    output: str = "runs"
    name: str | None = None
    alignment: Training = field(default_factory=lambda: Training(steps=80, lr=2e-3))
    finetuning: Training = field(default_factory=lambda: Training(steps=96, lr=7e-4))
    lora: Lora = field(default_factory=Lora)
    data: Data = field(default_factory=Data)
    evaluation: Evaluation = field(default_factory=Evaluation)
    search: Search = field(default_factory=Search)
    hardening_steps: int | None = None

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "RunConfig":
        """Return the configuration that plain values describe, in the form that ``asdict`` returns."""
        return _of(cls(), values)

    @property
    def trials(self) -> int:
        """Number of settings that the attacker tries besides the run's own. A fixed attacker tries 0."""
        return 0 if self.attacker == "fixed" else int(self.attacker.partition(":")[2])

    def check(self) -> None:
        """Refuse values out of range.

        Raises:
            InputError: naming the option, the allowed range, the value, and the likely correction if there is one.
        """
        p = self.harmful_ratio
        if not 0 <= p <= 1:
            hint = f" If that is a percentage, write {p / 100:g}." if 1 < p <= 100 else ""
            raise InputError(f"--harmful_ratio must lie in [0, 1], got {p:g}.{hint}")
        at_least_one: dict[str, Any] = {
            "num_samples": self.num_samples,
            "max_tokens": self.max_tokens,
            "devices": self.devices,
            "num_nodes": self.num_nodes,
            "checkpoint_every": self.checkpoint_every,
            "log_every": self.log_every,
            "hardening_steps": 1 if self.hardening_steps is None else self.hardening_steps,
            "lora.r": self.lora.r,
            "evaluation.max_new_tokens": self.evaluation.max_new_tokens,
            "evaluation.batch_size": self.evaluation.batch_size,
        }
        zero_or_more: dict[str, Any] = {
            "evaluation.prompts": self.evaluation.prompts,
            "evaluation.over_refusal_prompts": self.evaluation.over_refusal_prompts,
            "evaluation.task_rows": self.evaluation.task_rows,
            "evaluation.task_max_new_tokens": self.evaluation.task_max_new_tokens,
            "evaluation.at_prompts": self.evaluation.at_prompts,
            "evaluation.loss_rows": self.evaluation.loss_rows,
        }
        fractions: dict[str, Any] = {"lora.dropout": self.lora.dropout}
        positive: dict[str, Any] = {"lora.alpha": self.lora.alpha}
        for stage in ("alignment", "finetuning"):
            training: Training = getattr(self, stage)
            at_least_one |= {f"{stage}.{key}": getattr(training, key) for key in ("batch_size", "accumulate")}
            (zero_or_more if stage == "alignment" else at_least_one)[f"{stage}.steps"] = training.steps
            zero_or_more |= {f"{stage}.{key}": getattr(training, key) for key in ("weight_decay", "clip")}
            positive[f"{stage}.lr"] = training.lr
            fractions[f"{stage}.warmup_ratio"] = training.warmup_ratio
            fractions |= {f"{stage}.betas, number {i + 1}": beta for i, beta in enumerate(training.betas)}
            if len(training.betas) != 2:
                raise InputError(f"--{stage}.betas takes two numbers in [0, 1), got {training.betas}.")
            if not 0 < training.decay <= 1:
                raise InputError(f"--{stage}.decay must lie in (0, 1], got {training.decay}.")
            if training.decay < 1 and training.schedule != "constant":
                raise InputError(f"--{stage}.decay below 1 needs --{stage}.schedule constant, got {training.schedule}.")
            # Checked as the stage uses them: values that it does not set come from --lora.
            lora = self.lora_of(stage)
            at_least_one[f"{stage}.lora.r"], positive[f"{stage}.lora.alpha"] = lora.r, lora.alpha
            fractions[f"{stage}.lora.dropout"] = lora.dropout
            if ALL_LINEAR in lora.targets and len(lora.targets) > 1:
                raise InputError(f"--{stage}.lora.targets: {ALL_LINEAR} must be the only entry, got {lora.targets}.")
        for values, allowed, ok in (
            (at_least_one, "be >= 1", lambda v: v >= 1),
            (zero_or_more, "be >= 0", lambda v: v >= 0),
            (positive, "be > 0", lambda v: v > 0),
            (fractions, "lie in [0, 1)", lambda v: 0 <= v < 1),
        ):
            for key, value in values.items():
                if not ok(value):
                    raise InputError(f"--{key} must {allowed}, got {value}.")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"--seed must lie in [0, 2^32), got {self.seed}.")
        if self.name is not None:
            inside(self.output, self.name, "--name")
        self.data.check()
        self.evaluation.check()
        self.search.check()
        if self.base is not None and self.alignment.steps:
            raise InputError(
                f"--base is the unaligned model that an aligned --model was made from, got {self.base!r} with"
                f" --alignment.steps {self.alignment.steps}. Add --alignment.steps 0, or leave --base out."
            )
        protocols = {self.adapter_protocol, *(self.adapter_protocols or {}).values()}
        if "continue" in protocols and self.alignment.steps and self.tuning != "full":
            aligned, tuned = self.lora_of("alignment"), self.lora_of("finetuning")
            if aligned != tuned:
                raise InputError(
                    f"--adapter_protocol continue trains the aligned adapter further, so --finetuning.lora must equal"
                    f" --alignment.lora, got {tuned} and {aligned}. Give both stages the same geometry, or use merge."
                )
        if self.tuning == "qlora" and "merge" in protocols:
            raise InputError(
                "--tuning qlora cannot merge an adapter, because 4-bit weights would round it. Add --adapter_protocol"
                " continue, or use --tuning lora."
            )
        kind, colon, number = self.attacker.partition(":")
        searching = kind in ("search", "optuna") and number.isdigit() and int(number) >= 1
        if not searching and (colon or kind != "fixed"):
            raise InputError(
                f"--attacker must be fixed, search:N or optuna:N with N >= 1 trials, got {self.attacker!r}."
            )
        if self.strategy not in ("auto", "ddp", "fsdp2"):
            raise InputError(f"--strategy must be auto, ddp or fsdp2, got {self.strategy!r}.")

    def lora_of(self, stage: str) -> Lora:
        """Return a stage's adapter geometry: its own values, else those of ``lora``.

        Args:
            stage: ``"alignment"`` or ``"finetuning"``.
        """
        own = asdict(getattr(self, stage).lora)
        return replace(self.lora, **{name: value for name, value in own.items() if value is not None})

    def protocol_of(self, arm: str) -> Literal["merge", "continue"]:
        """Return the adapter protocol of an arm.

        Args:
            arm: its defenses' names joined by ``+``, or ``"none"``.
        """
        # The whole arm's entry comes first, then the entries of its defenses in their order.
        own = self.adapter_protocols or {}
        return next((own[name] for name in (arm, *arm.split("+")) if name in own), self.adapter_protocol)

    def without(self, ignored: Collection[str]) -> dict[str, Any]:
        """Return all values by dotted name, except the ignored ones.

        Args:
            ignored: dotted names such as ``evaluation.judge``, or whole parts such as ``evaluation``.
        """
        values: dict[str, Any] = {}
        for name, value in asdict(self).items():
            inner = {f"{name}.{key}": v for key, v in value.items()} if isinstance(value, dict) else {name: value}
            values |= {key: v for key, v in inner.items() if not {name, key} & set(ignored)}
        return values

    def deciding(self) -> dict[str, Any]:
        """Return the values that change a result. Paths, loggers and names do not change one.

        Metrics and curves that are off are left out, so that runs from before these options existed keep their hash.
        """
        values, off = asdict(self), asdict(Evaluation())
        evaluation = values["evaluation"]
        values["evaluation"] = {k: v for k, v in evaluation.items() if k in ANSWERING or v != off[k]}
        for key in (
            "output",
            "name",
            "logger",
            "log_every",
            "checkpoint_every",
            "upload_generations",
            "trust_remote_code",
        ):
            values.pop(key)
        return values


def inside(output: str, name: str, option: str) -> Path:
    """Return the folder of a run or a comparison, which must lie in ``--output``.

    Args:
        output: value of ``--output``.
        name: name of the folder.
        option: the option that names it, for the error.

    Raises:
        InputError: if the name leads out of the output folder, or is empty.
    """
    root = Path(output).expanduser()
    folder = root / name
    # Names are compared without looking at the disk, where a part may be a link.
    parts = os.path.normpath(folder.absolute()), os.path.normpath(root.absolute())
    if not parts[0].startswith(parts[1].rstrip(os.sep) + os.sep) or not name.strip() or "\0" in name:
        raise InputError(
            f"{option} names a folder in --output {output}, got {name!r}. Choose a name without '..', and change"
            " --output for another place."
        )
    return folder


_Part = TypeVar("_Part")


def _of(part: _Part, values: Mapping[str, Any]) -> _Part:
    """Return a part of a configuration with some values replaced. Nested dictionaries change nested parts."""
    changed: dict[str, Any] = {}
    for name, value in values.items():
        inner = getattr(part, name)
        changed[name] = _of(inner, value) if is_dataclass(inner) else value
    return replace(part, **changed)  # type: ignore[type-var]
