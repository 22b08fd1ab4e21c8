"""RunConfig: everything that decides a run, with defaults, units and ranges; torch is not needed to read it."""

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, TypeVar

from hftlight.errors import InputError
from hftlight.take import SOURCES, Take

# What decides no stage's weights, and no answers of a finished model: other parts of a key tell it, or it only says
# where results go.
OF_NO_STAGE = frozenset(
    {"defense", "baseline", "model", "attack", "attacker", "harmful_ratio", "num_samples", "accelerator",
     "checkpoint_every", "logger", "base", "adapter_protocols", "upload_generations", "output", "name", "data",
     "search"}
)  # fmt: skip
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
)  # fields of Evaluation that decide the answers of a finished model
ALL_LINEAR = "all-linear"  # every linear layer but the output layer, as PEFT calls them
OWN_TRAINER = {"streams", "output", "aligned", "base"}  # a defense's arguments on a Trainer of one's own; not in run()


@dataclass
class Lora:
    """Geometry of the LoRA adapter, whose weights are float32.

    Args:
        r: rank, >= 1.
        alpha: scale numerator; the adapter counts alpha / r.
        dropout: probability in [0, 1).
        targets: names of the linear layers that get an adapter, or all-linear for all of them but the output layer.
    """

    r: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: list[str] = field(default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"])


@dataclass
class StageLora:
    """Geometry of one stage's adapter. A null value is that of ``lora``.

    Args:
        r: rank, >= 1.
        alpha: scale numerator.
        dropout: probability in [0, 1).
        targets: names of the linear layers that get an adapter, or all-linear.
    """

    r: int | None = None
    alpha: float | None = None
    dropout: float | None = None
    targets: list[str] | None = None


@dataclass
class Training:
    """How one stage trains.

    Args:
        steps: optimizer steps, >= 1; for the alignment also 0, where the model comes aligned.
        lr: learning rate, > 0.
        batch_size: rows per micro-batch and device, >= 1.
        accumulate: micro-batches per optimizer step, >= 1.
        weight_decay: AdamW's decoupled weight decay, >= 0.
        optimizer: adamw or sgd.
        betas: AdamW's two decay rates of the moments, each in [0, 1).
        schedule: constant (no warm-up), or cosine down to 0.
        decay: factor on the learning rate after each pass over the stage's rows, (0, 1]; 1 for none.
        warmup_ratio: fraction of the steps over which the cosine schedule rises, [0, 1).
        clip: largest L2 norm of the combined gradient, defenses included; 0 turns clipping off.
        average: what a token's loss is averaged over: micro (its micro-batch, as the official code does) or window (all
            micro-batches and devices of its optimizer step).
        template: the stage's own prompt template; null for --template.
        lora: the stage's own adapter geometry; null values are those of --lora.
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

    Files are JSONL, JSON, CSV or Parquet. What is taken of a source is said by its name: alignment, harmful, pairs,
    attack, task_train, task_test, test or over_refusal; on the command line also as --data.rows.alignment 5001:10000.

    Args:
        alignment: harmful prompts with safe answers, and ordinary ones with helpful answers.
        harmful: the defender's own harmful set (harmful prompts with harmful answers); read only if a defense asks.
        pairs: the defender's prompts with a safe and a harmful answer each; read only if a defense asks.
        attack: the harmful rows hidden in the upload; the same rows as --data.harmful or --data.pairs are split by a
            hash of the prompt.
        task: the user's benign task: builtin, sst2, agnews, gsm8k, gsm8k_step_by_step (each question asks to think
            first, as Vaccine and T-Vaccine ask), alpaca_eval (no right answers, hence no accuracy), or a file of one's
            own (exact match counts).
        task_train: file with the task's training rows, instead of the hub.
        task_test: file with the task's test rows, instead of the hub; alpaca_eval has both in one file.
        test: harmful prompts for the harmful score; no answers needed.
        over_refusal: ordinary prompts that look harmful, for over-refusal.
        split: split by source, such as {alignment: 30k_train}, of hub sets and saved data sets.
        rows: range by source as a Python slice, such as {alignment: "5001:10000"}; it counts the source's rows from 0,
            before the filter.
        where: filter by source, such as {alignment: is_safe=true, over_refusal: label=safe}; several conditions stand
            in a list, and true and false compare in any case.
        first: rows kept by source, after the filter, >= 1, such as {harmful: 300}; by default all. Of rows that
            defender and attacker share, the defender gets half by default.
        columns: columns of files that are in no known format, such as {instruction: q, response: a}, applied to the
            files that have them; or by source, such as {alignment: {response: refusal}}.
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
        """Return what to take of a source, one of ``SOURCES``.

        Raises:
            InputError: if the range, the filter or the number cannot be read.
        """
        columns: dict[str, Any] = self.columns or {}
        given = {name: (getattr(self, name) or {}).get(source) for name in ("split", "rows", "where", "first")}
        try:
            return Take(
                **{name: value for name, value in given.items() if value is not None},
                columns=columns.get(source, {}),
                usual={field: column for field, column in columns.items() if isinstance(column, str)},
            )
        except InputError as error:
            raise InputError(f"--data.{str(error).removeprefix('Take: ')} It is about {source}.") from error

    def check(self) -> None:
        """Refuse names that are no source, and choices that cannot be read.

        Raises:
            InputError: naming the option, what is allowed and what came.
        """
        for option in ("split", "rows", "where", "first", "columns"):
            for name, value in (getattr(self, option) or {}).items():
                flat = option == "columns" and isinstance(value, str)
                if flat == (name in SOURCES):
                    near = get_close_matches(name, SOURCES, n=1, cutoff=0.4)
                    hint = f" Did you mean {near[0]!r}?" if near and name not in SOURCES else ""
                    what = "{alignment: {response: refusal}}" if option == "columns" else f"{{alignment: {value}}}"
                    raise InputError(
                        f"--data.{option} goes by source ({', '.join(SOURCES)}), such as {what}; got {name!r}:"
                        f" {value!r}.{hint}"
                    )
        for source in SOURCES:
            self.take(source)


@dataclass
class Evaluation:
    """What is measured after every stage, on held-out prompts, with greedy decoding.

    Args:
        prompts: harmful test prompts, >= 1; 0 for all.
        over_refusal_prompts: ordinary prompts, >= 1; 0 for all.
        task_rows: rows of the task's test split, >= 1; 0 for all.
        max_new_tokens: longest answer to a harmful or ordinary prompt, in tokens, >= 1.
        task_max_new_tokens: longest answer on the task, in tokens; 0 for the task's own limit.
        batch_size: prompts per batch, >= 1; affects speed and memory alone.
        judge: decides the harmful score: auto (builtin on the made-up world's prompts, else keyword), builtin (that
            world's own rule), keyword or keyword_durability (refusal phrases), moderation (beaver-dam-7b, published
            tables), moderation_512_tokens, deberta, harmbench, harmbench_mistral, llama_guard, llama_guard2,
            llama_guard3, strongreject, wildguard, any of those models as NAME:FOLDER, or a language model behind an
            OpenAI-compatible endpoint, hexphi:MODEL or strongreject_rubric:MODEL.
        refusal_judge: tells refusals of ordinary prompts: auto (builtin on the made-up world's prompts, else
            xstest_string), builtin (that world's own rule), xstest_string (XSTest's openings; partial refusals are not
            seen), wildguard_refusal or wildguard_refusal:FOLDER, or a language model behind an OpenAI-compatible
            endpoint, xstest:MODEL, which tells full from partial refusals.
        perplexity: what the perplexity is taken of: none, task (the right answers of the task's test rows, after their
            prompts), or a text file, read whole (Wikitext's test text, say).
        embedding_drift: against what the last layer's states at the harmful prompts' last tokens are compared after
            every later stage: none, base, or aligned.
        loss_rows: rows of the alignment data, and as many harmful rows that were neither uploaded nor the defender's,
            whose loss is measured after every stage, in nats per response token, >= 1; 0 for none.
        at: optimizer steps of the fine-tuning, from 1, after which the model is evaluated for a curve; none by default.
        at_prompts: harmful test prompts that answer for a curve, from the first, and as many of the task's test rows,
            >= 1; 0 for all.
        stop_above: percent, 0-100; stop fine-tuning once a curve's 95 % interval of the harmful score lies above.
        stop_below: percent, 0-100; stop once it lies below. Either goes by test prompts: results after a stop flatter.
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
        """The thresholds that are set, in percent."""
        given = {"stop_above": self.stop_above, "stop_below": self.stop_below}
        return {name: bound for name, bound in given.items() if bound is not None}

    def answering(self) -> dict[str, Any]:
        """Return the values that decide which prompts a finished model answers, and how."""
        return {name: getattr(self, name) for name in ANSWERING}

    def check(self) -> None:
        """Refuse curves and further metrics that cannot be.

        Raises:
            InputError: naming the option, what is allowed and what came.
        """
        if self.perplexity not in ("none", "task") and not Path(self.perplexity).expanduser().is_file():
            raise InputError(
                f"--evaluation.perplexity must be none, task or a text file, got {self.perplexity!r}, which is no file."
            )
        if self.embedding_drift not in ("none", "base", "aligned"):
            raise InputError(
                f"--evaluation.embedding_drift must be none, base or aligned, got {self.embedding_drift!r}."
            )
        if any(step < 1 for step in self.at):
            raise InputError(f"--evaluation.at names optimizer steps >= 1, got {self.at}.")
        for name, bound in self.stops.items():
            if not 0 <= bound <= 100:
                raise InputError(f"--evaluation.{name} must lie in [0, 100] percent, got {bound:g}.")
            if not self.at:
                raise InputError(f"--evaluation.{name} acts where a curve is evaluated; name steps in --evaluation.at.")


@dataclass
class Search:
    """What an attacker who tries many settings may choose from; unset axes lie around the run's own setting.

    Args:
        steps: optimizer steps of the fine-tuning, each >= 1; by default the run's own and twice as many.
        lr: learning rates, each > 0; by default the run's own, a third of it and three times as much.
        rank: LoRA ranks, each >= 1; by default the run's own and four times as much.
        num_samples: rows of the upload, each >= 1; by default the run's own.
        harmful_ratio: harmful fractions, each 0-1; by default the run's own and three times as much.
        eps: points of finetune accuracy that the attacker gives up at most against the best setting, >= 0.
    """

    steps: list[int] | None = None
    lr: list[float] | None = None
    rank: list[int] | None = None
    num_samples: list[int] | None = None
    harmful_ratio: list[float] | None = None
    eps: float = 2.0


@dataclass
class RunConfig:
    """One run: align, let a user's upload train the model, measure after every stage.

    Args:
        defense: names of the defenses, separated by spaces; none is plain alignment.
        baseline: also run the undefended arm, sharing what can be shared.
        model: smollm2-135m, tiny, a folder, or a hub id.
        base: where --alignment.steps is 0, the unaligned model that --model was made from: a folder or a hub id; for
            defenses that read what the alignment changed.
        trust_remote_code: let models run code that comes with them; without it such models are refused.
        tuning: lora (adapters in float32), full (all parameters) or qlora (4-bit base, needs bitsandbytes).
        adapter_protocol: merge (the aligned adapter is merged, the upload trains a new one) or continue (the
            aligned adapter is trained on).
        adapter_protocols: protocol of single arms, such as {booster: continue}; an arm of several defenses takes that
            of its first one named. Null leaves all arms to --adapter_protocol.
        attack: what is uploaded: harmful_mix, explicit, identity_shift, benign, encoded, multilingual,
            benign_selection, reverse_preference, reverse_sft_dpo or model_edit; --NAME.n 100 and the like set its own
            arguments.
        attacker: fixed (the settings here), search:N (N settings of a grid, the worst is reported) or optuna:N.
        harmful_ratio: p, the harmful fraction of the upload, 0-1.
        num_samples: n, size of the upload in rows, >= 1.
        template: prompt template: chat (the model's own), chat_thinking or chat_no_thinking (the same with
            enable_thinking, for models that reason first), alpaca, alpaca_no_newline, plain, alpaca_llama2 (Alpaca
            within Llama 2's marks), human_assistant (Human: ... Assistant: ...) or question_answer (Question: ...
            Answer: ...).
        system: system text in every prompt, in training and evaluation; none by default.
        max_tokens: longest row in tokens, prompt, response and end together. A model with fewer positions lowers it.
        long_rows: what becomes of longer rows: drop (left out before the upload is drawn, and counted), truncate (cut
            at the end, as the official scripts do) or refuse.
        order: which rows make a batch: shuffle (a plain seeded shuffle) or length (rows of similar length together,
            with less padding, but long harmful rows meet in few batches).
        seed: decides adapters, order, dropout and which rows go into the upload.
        precision: Lightning precision: 32-true, bf16-mixed, 16-mixed.
        accelerator: Lightning accelerator: auto, cpu, gpu.
        devices: number of devices on each node, >= 1.
        num_nodes: number of nodes, >= 1; each runs the same command, started by torchrun or SLURM.
        strategy: auto, ddp, or fsdp2.
        gradient_checkpointing: recompute activations in the backward pass (non-reentrant), for less memory.
        checkpoint_every: optimizer steps between checkpoints, >= 1; a killed run loses at most these.
        log_every: optimizer steps between points of a curve, >= 1; each is the last value since the point before.
        logger: where curves go besides the run folder: none, csv, wandb (offline without a key) or tensorboard.
        upload_generations: let W&B also have answers to prompts from outside the made-up world.
        output: folder of all runs.
        name: name of the run folder; by default made from the configuration's hash.
        alignment: how the alignment stage trains.
        finetuning: how the upload is trained on.
        lora: adapter geometry.
        data: where the rows come from.
        evaluation: what is measured.
        search: what an attacker who searches may choose from.
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

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "RunConfig":
        """Return the configuration of plain values, as ``asdict`` gives them."""
        return _of(cls(), values)

    @property
    def trials(self) -> int:
        """How many settings the attacker tries beside the run's own fine-tuning; 0 for a fixed attacker."""
        return 0 if self.attacker == "fixed" else int(self.attacker.partition(":")[2])

    def check(self) -> None:
        """Refuse values out of range.

        Raises:
            InputError: naming the option, the allowed range, what came, and where it helps, what was meant.
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
                raise InputError(f"--{stage}.betas takes two numbers, got {training.betas}.")
            if not 0 < training.decay <= 1:
                raise InputError(f"--{stage}.decay must lie in (0, 1], got {training.decay}.")
            if training.decay < 1 and training.schedule != "constant":
                raise InputError(f"--{stage}.decay goes with --{stage}.schedule constant, got {training.schedule}.")
            lora = self.lora_of(stage)
            at_least_one[f"{stage}.lora.r"], positive[f"{stage}.lora.alpha"] = lora.r, lora.alpha
            fractions[f"{stage}.lora.dropout"] = lora.dropout
            if ALL_LINEAR in lora.targets and len(lora.targets) > 1:
                raise InputError(f"--{stage}.lora.targets: {ALL_LINEAR} stands alone, got {lora.targets}.")
        for values, allowed, ok in (
            (at_least_one, "be >= 1", lambda v: v >= 1),
            (zero_or_more, "be >= 0", lambda v: v >= 0),
            (positive, "be > 0", lambda v: v > 0),
            (fractions, "lie in [0, 1)", lambda v: 0 <= v < 1),
        ):
            for key, value in values.items():
                if not ok(value):
                    raise InputError(f"--{key} must {allowed}, got {value}.")
        self.data.check()
        self.evaluation.check()
        if self.base is not None and self.alignment.steps:
            raise InputError(
                f"--base names the unaligned model behind an aligned --model, got {self.base!r} with"
                f" {self.alignment.steps} steps of alignment. Add --alignment.steps 0, or leave --base out."
            )
        protocols = {self.adapter_protocol, *(self.adapter_protocols or {}).values()}
        if "continue" in protocols and self.alignment.steps and self.tuning != "full":
            aligned, tuned = self.lora_of("alignment"), self.lora_of("finetuning")
            if aligned != tuned:
                raise InputError(
                    f"--adapter_protocol continue trains the aligned adapter on, so --finetuning.lora must be that of"
                    f" --alignment.lora, got {tuned} and {aligned}. Give both stages one geometry, or use merge."
                )
        if self.tuning == "qlora" and "merge" in protocols:
            raise InputError(
                "--tuning qlora cannot merge an adapter into 4-bit weights without rounding it; add --adapter_protocol"
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
        """Return a stage's adapter geometry: its own values, and those of ``lora`` where it has none.

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
        own = self.adapter_protocols or {}
        return next((own[name] for name in (arm, *arm.split("+")) if name in own), self.adapter_protocol)

    def without(self, ignored: Collection[str]) -> dict[str, Any]:
        """Return all values by dotted name but those whose name, or whose part of the configuration, is ignored."""
        found: dict[str, Any] = {}
        for name, value in asdict(self).items():
            inner = {f"{name}.{key}": v for key, v in value.items()} if isinstance(value, dict) else {name: value}
            found |= {key: v for key, v in inner.items() if not {name, key} & set(ignored)}
        return found

    def deciding(self) -> dict[str, Any]:
        """Return the values that change a result; paths, loggers and names do not.

        Metrics and curves that are not asked for stay out, so that runs made before they existed keep their hash.
        """
        values, off = asdict(self), asdict(Evaluation())
        given = values["evaluation"]
        values["evaluation"] = {k: v for k, v in given.items() if k in ANSWERING or v != off[k]}
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


_Part = TypeVar("_Part")


def _of(part: _Part, values: Mapping[str, Any]) -> _Part:
    """Return a part of a configuration with plain values put in, parts of parts included."""
    changed: dict[str, Any] = {}
    for name, value in values.items():
        inner = getattr(part, name)
        changed[name] = _of(inner, value) if is_dataclass(inner) else value
    return replace(part, **changed)  # type: ignore[type-var]
