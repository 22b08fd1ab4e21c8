"""Cost of every training defense against plain fine-tuning, in one run: ``python benchmarks/defenses.py``.

A plain and a defended fit advance in turn, one optimizer step each. Both therefore see the same state of the machine.
After each pair of steps, the passes alone are timed on the plain model. The floor of a defense is the cost of its
passes and nothing else. Memory is counted storage by storage. Finished rows are in ``benchmarks/defenses.json`` and are
not measured again.
"""

import argparse
import json
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))
from hftlight import SafetyModule
from hftlight.config import Lora
from hftlight.console import quiet
from hftlight.data.records import Record
from hftlight.data.streams import StreamsDataModule
from hftlight.data.templates import get_template
from hftlight.defenses import (
    ALRIGHT,
    BEA,
    CTRL,
    EWC,
    KL,
    L2SP,
    LARF,
    LDIFS,
    MAXRIGHT,
    MLLR,
    PTST,
    SAFT,
    SEAL,
    SPPFT,
    TAR,
    Booster,
    ConstrainedSFT,
    Freeze,
    FreezePlus,
    Lisa,
    ModerationFilter,
    Panacea,
    RepNoise,
    RSNTune,
    SafeGrad,
    SafetyMix,
    SaLoRA,
    TVaccine,
    Vaccine,
)
from hftlight.engine import Defense, Stage, count_passes, main_stream
from hftlight.registry import defense_class, defenses
from tests.helpers.buffers import LiveBytes
from tests.helpers.tokenizers import CHATML, byte_tokenizer

SHAPES = {
    "small": {"hidden_size": 256, "intermediate_size": 704, "layers": 8, "heads": 4, "vocab_size": 4096},
    "vocabulary": {"hidden_size": 256, "intermediate_size": 704, "layers": 8, "heads": 4, "vocab_size": 49152},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "layers": 32, "heads": 32, "vocab_size": 32000},
}
ROWS, WARM_UP, MIB = 16, 4, 2**20
# Arguments are set only if the default would not act within the few steps here, or would leave a batch half full.
# A defense has two settings if their costs differ.
SETTINGS: dict[str, tuple[Callable[[], Defense], ...]] = {
    "booster": (Booster,),
    "ctrl": (lambda: selected(CTRL()),),
    "repnoise": (RepNoise,),
    "rsn_tune": (lambda: RSNTune(0.9, 0.5, "wanda", samples=16, safety="harmful", utility="alignment"),),
    "tar": (TAR,),
    "vaccine": (Vaccine,),
    "t_vaccine": (lambda: TVaccine(layers=8), lambda: TVaccine(layers=2)),
    "alright": (lambda: ALRIGHT(lam=1.0),),  # every step is one on preferences
    "bea": (lambda: BEA(rows=ROWS),),
    "constrained_sft": (ConstrainedSFT, lambda: ConstrainedSFT(online=True)),
    "ewc": (lambda: EWC(samples=16),),
    "freeze": (lambda: Freeze(samples=16, safety="alignment"),),
    "freeze_plus": (lambda: FreezePlus(samples=16, safety="alignment", utility="task"),),
    "kl": (KL,),
    "l2_sp": (L2SP,),
    "ldifs": (LDIFS,),
    "larf": (lambda: LARF(remove=0.1, safe="alignment"),),
    "lisa": (lambda: Lisa(2, 2, quiet=0.0, cycles=0),),
    "maxright": (lambda: MAXRIGHT(lam=1.0, task_floor=1.0),),
    "mllr": (MLLR,),
    "moderation_filter": (lambda: ModerationFilter("builtin", allow_same=True),),
    "panacea": (Panacea, lambda: Panacea(lam=0.0)),
    "ptst": (PTST,),
    "sa_lora": (SaLoRA,),
    "safe_grad": (SafeGrad,),
    "safety_mix": (lambda: SafetyMix(count=ROWS), lambda: SafetyMix(mode="parallel")),
    "saft": (lambda: SAFT(rate=0.1),),
    "seal": (lambda: SEAL(batch_size=8), lambda: SEAL(mode="one_step", batch_size=8)),
    "sppft": (lambda: SPPFT(first=3, last=4),),
}
LORA_ONLY = ("sa_lora",)
SHOWN = ("lam", "layers", "online", "mode", "first", "last")


def selected(defense: Defense) -> Defense:
    """Return a defense that has selected no row, so that a fit takes its training steps only."""
    defense.selected = []
    return defense


@dataclass
class Setup:
    """Model, data and machine of a measurement."""

    shape: str
    tuning: str
    rows: int
    letters: int
    device: str
    precision: str

    def model(self) -> nn.Module:
        shape = dict(SHAPES[self.shape])
        layers, heads = shape.pop("layers"), shape.pop("heads")
        config = LlamaConfig(**shape, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads)
        torch.manual_seed(0)
        with torch.device(self.device):
            model: Any = LlamaForCausalLM(config)
        if self.precision == "bf16-true":
            model = model.bfloat16()
        if self.tuning == "lora":
            lora = Lora()
            model = get_peft_model(model, LoraConfig(r=lora.r, lora_alpha=lora.alpha, target_modules=lora.targets))
        return model.train()

    def data(self, stage: Stage, chosen: Sequence[Defense] = ()) -> StreamsDataModule:
        """Return streams whose rows all have one length. The two answers of a pair differ in every letter."""
        tokenizer = byte_tokenizer(chat_template=CHATML)
        rows: Any = {}
        for name in ("alignment", "harmful", "task"):
            texts = [(f"{i:02d}{name}" * self.letters)[: self.letters] for i in range(ROWS)]
            rows[name] = [Record(text, text[::-1], role=name) for text in texts]
        letters = str.maketrans("abcdefghijklmnopqrstuvwxyz0123456789", "bcdefghijklmnopqrstuvwxyza1234567890")
        rows["pairs"] = [replace(r, role="pairs", rejected=r.response.translate(letters)) for r in rows["alignment"]]
        main = main_stream(chosen, "alignment" if stage is Stage.ALIGNMENT else "task")
        template = get_template("chat", tokenizer)
        return StreamsDataModule(tokenizer, template, main, batch_size=self.rows, max_tokens=4096, **rows)

    def select(self, defense: Defense) -> float:
        """Let a defense select, and return its seconds per 1000 rows, or 0 without a selection."""
        if not defense.selects or defense.selected is not None:
            return 0.0
        data, lora = self.data(defense.stage, [defense]), Lora()
        records = {name: data.records[name] for name in {*defense.streams, data.main}}
        defense.adapter = lora
        model: Any = self.model()
        since = time.perf_counter()
        whole = model.unload() if self.tuning == "lora" else model
        defense.select(whole, data.tokenizer, data.template, records, batch_size=self.rows)
        return 1000 * (time.perf_counter() - since) / defense.selecting(records)

    def fit(self, chosen: Sequence[Defense], stage: Stage, steps: int, extra: Callback, model: nn.Module) -> None:
        trainer = Trainer(
            max_steps=steps,
            max_epochs=-1,
            accelerator="cpu" if self.device == "cpu" else "gpu",
            devices=1,
            precision=self.precision,
            gradient_clip_val=1.0,
            callbacks=[*chosen, extra],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
        trainer.fit(SafetyModule(model, lr=1e-4), self.data(stage, chosen))


class Arm(Callback):
    """A fit in a thread of its own that runs one step at each call of ``step``."""

    def __init__(self, setup: Setup, chosen: Sequence[Defense], stage: Stage, steps: int) -> None:
        self.model, self.device = setup.model(), setup.device
        self.tokens, self.batch, self.error = 0, None, None
        # ``_go`` lets the fit start its next step; ``_done`` reports the end of a step.
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._arguments = (setup, chosen, stage, steps)
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def step(self) -> float:
        """Run one step and return its seconds."""
        since = time.perf_counter()
        self._go.release()
        self._done.acquire()
        seconds = time.perf_counter() - since
        if self.error is not None:
            raise self.error
        return seconds

    def _work(self) -> None:
        setup, chosen, stage, steps = self._arguments
        self._go.acquire()
        try:
            setup.fit(chosen, stage, steps + 1, self, self.model)
        except BaseException as error:  # ``step`` raises it again in the thread that waits
            self.error = error
        self._done.release()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, index: int) -> None:
        self.tokens += batch["input_ids"].numel()
        self.batch = batch

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *arguments: Any) -> None:
        _wait(self.device)
        self._done.release()
        self._go.acquire()


class Passes:
    """Times of single passes of the plain arm's model on the arm's own batch."""

    def __init__(self, arm: Arm) -> None:
        self.arm, self.module = arm, SafetyModule(arm.model, lr=1e-4)
        self.forward: list[float] = []
        self.backward: list[float] = []
        self.inputs: list[float] = []  # backward passes without the gradient of any weight
        self.heads: list[float] = []  # projections onto the vocabulary with their loss, forward and back

    def measure(self) -> None:
        model, device = self.arm.model, self.arm.device
        weights = [p for p in model.parameters() if p.requires_grad]
        grads = [p.grad for p in weights]
        self._loss_and(self.forward, self.backward, lambda loss: torch.autograd.grad(loss, weights, allow_unused=True))
        # The hook makes the embeddings a leaf of the graph, so that a backward pass needs no weight's gradient.
        leaves: list[Any] = []
        embeddings = model.get_input_embeddings()
        handle = embeddings.register_forward_hook(lambda *a: leaves.append(a[2].detach().requires_grad_()) or leaves[0])
        for p in weights:
            p.requires_grad_(False)
        self._loss_and(None, self.inputs, lambda loss: torch.autograd.grad(loss, leaves))
        handle.remove()
        for p, grad in zip(weights, grads, strict=True):
            p.requires_grad_(True)
            p.grad = grad
        _wait(device)
        self._project()

    def _project(self) -> None:
        """Time one projection of the batch's response tokens onto the vocabulary, with its loss, forward and back."""
        head, batch = self.arm.model.get_output_embeddings(), self.arm.batch
        targets = batch["labels"][batch["labels"] != -100]
        hidden = torch.randn(len(targets), head.in_features, device=targets.device, dtype=head.weight.dtype)
        since = time.perf_counter()
        logits = head(hidden.requires_grad_()).float()
        torch.autograd.grad(nn.functional.cross_entropy(logits, targets), hidden)
        _wait(self.arm.device)
        self.heads.append(time.perf_counter() - since)

    def _loss_and(self, forward: list[float] | None, backward: list[float], work: Callable[[Any], Any]) -> None:
        device = self.arm.device
        since = time.perf_counter()
        loss = self.module.loss(self.arm.batch)
        _wait(device)
        middle = time.perf_counter()
        work(loss)
        _wait(device)
        if forward is not None:
            forward.append(middle - since)
        backward.append(time.perf_counter() - middle)


class Held(Callback):
    """Callback that records the bytes that are alive after a step."""

    def __init__(self, live: LiveBytes) -> None:
        self.live, self.bytes = live, 0

    def on_train_batch_end(self, *arguments: Any) -> None:
        self.bytes = self.live.now


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def memory(setup: Setup, chosen: Sequence[Defense], stage: Stage) -> tuple[int, int]:
    """Return the peak and the final bytes that a fit of four steps allocates beside its model.

    On a GPU the final bytes are not measured and are 0.
    """
    model = setup.model()
    if setup.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        setup.fit(chosen, stage, 4, Callback(), model)
        return torch.cuda.max_memory_allocated() - before, 0
    with LiveBytes() as live:
        held_at_the_end = Held(live)
        setup.fit(chosen, stage, 4, held_at_the_end, model)
    return live.peak, held_at_the_end.bytes


def floor(defense: Defense, sft: float, passes: Passes) -> float:
    """Return the seconds per step with a defense's passes and nothing else, relative to plain fine-tuning.

    RepNoise also projects the hidden states of all layers onto the vocabulary.
    """
    forward, backward = (count - 1 for count in count_passes([defense]))
    probe = passes.inputs if isinstance(defense, Vaccine) else passes.backward
    extra = forward * statistics.median(passes.forward) + backward * statistics.median(probe)
    if isinstance(defense, RepNoise):
        extra += (passes.arm.model.config.num_hidden_layers + 1) * statistics.median(passes.heads)
    return 1 + extra / sft


def measure(setup: Setup, make: Callable[[], Defense], pairs: int) -> dict[str, Any]:
    defense = make()
    selecting = setup.select(defense)
    again = make()
    again.selected = defense.selected
    stage, steps = defense.stage, WARM_UP + pairs
    plain, defended = Arm(setup, [], stage, steps), Arm(setup, [defense], stage, steps)
    first = plain.step(), defended.step()
    for _ in range(WARM_UP - 1):
        plain.step()
        defended.step()
    before = plain.tokens, defended.tokens
    passes, seconds = Passes(plain), []
    for _ in range(pairs):
        seconds.append((plain.step(), defended.step()))
        passes.measure()
    sft = statistics.median(a for a, _ in seconds)
    ratios = sorted(b / a for a, b in seconds)
    tokens = (defended.tokens - before[1]) / (plain.tokens - before[0])
    trained = sum(p.numel() * p.element_size() for p in plain.model.parameters() if p.requires_grad)
    row = {
        "sft_seconds": sft,
        "ratio": statistics.median(ratios),
        "low": ratios[len(ratios) // 4],
        "high": ratios[-1 - len(ratios) // 4],
        "pairs": pairs,
        "passes": count_passes([defense]),
        "floor": floor(defense, sft, passes),
        "forward": statistics.median(passes.forward) / sft,
        "backward": statistics.median(passes.backward) / sft,
        "backward_to_inputs": statistics.median(passes.inputs) / sft,
        "tokens": tokens,
        "selecting_seconds_per_1000_rows": selecting,
        "once_in_steps": max(0.0, first[1] - first[0]) / sft,
    }
    del plain, defended, passes
    (peak, final), (own_peak, own_final) = memory(setup, [], stage), memory(setup, [again], stage)
    return row | {
        "trained_mib": trained / MIB,
        "peak": own_peak / peak,
        "extra_mib": (own_peak - peak) / MIB,
        "buffers": (own_final - final) / trained,
    }


def label(name: str, defense: Defense) -> str:
    """Return the class name and the arguments that differ from the default."""
    default = defense_class(name)().arguments()
    shown = {k: v for k, v in defense.arguments().items() if k in SHOWN and v != default[k]}
    return type(defense).__name__ + (f"({', '.join(f'{k}={v!r}' for k, v in shown.items())})" if shown else "")


def table(known: dict[str, dict[str, Any]]) -> str:
    """Return measured rows as a Markdown table, with columns of speed and memory for each kind of tuning."""
    kinds = list(known)
    head = ["defense", "passes", *(f"s/step, {k} (quartiles; floor)" for k in kinds), "once", "selection"]
    lines = [head + [f"peak memory, {k}" for k in kinds] + [f"held, {k}" for k in kinds]]
    lines.append(["---"] * len(lines[0]))
    every = [label(name, make()) for name, makes in SETTINGS.items() for make in makes]
    for name in (n for n in every if n in known[kinds[0]]):
        rows = [known[kind].get(name) for kind in kinds]
        first = rows[0]
        speed = [
            r and f"{r['ratio']:.2f} ({r['low']:.2f}-{r['high']:.2f}; {r['floor'] * r['tokens']:.2f})" for r in rows
        ]
        memory = [r and f"{r['peak']:.2f}" for r in rows]
        buffers = [r and (f"{r['buffers']:+.1f}" if abs(r["buffers"]) >= 0.05 else "0.0") for r in rows]
        passes = " + ".join(f"{count:.4g}" for count in first["passes"])
        selection = f"{s:.0f} s" if (s := first.get("selecting_seconds_per_1000_rows", 0)) else None
        cells = [f"`{name}`", passes, *speed, f"{first['once_in_steps']:.1f}", selection, *memory, *buffers]
        lines.append([cell or "-" for cell in cells])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small", help="random weights of this shape")
    parser.add_argument("--tuning", nargs="+", choices=("lora", "full"), default=["lora", "full"])
    parser.add_argument("--defense", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--pairs", type=int, default=15, help="number of measured steps of each arm")
    parser.add_argument("--rows", type=int, default=8, help="rows per micro-batch")
    parser.add_argument(
        "--letters", type=int, default=48, help="letters of each prompt and each response; a letter is a token"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--results", default=str(Path(__file__).with_suffix(".json")))
    options = parser.parse_args()
    missing = [n for n in defenses() if defense_class(n).stage is not Stage.POST_FINETUNING and n not in SETTINGS]
    if missing:
        parser.error(f"SETTINGS lacks {missing}; add a line for each.")
    quiet()
    torch.set_num_threads(1)
    results = Path(options.results)
    place = f"{options.shape}, {options.rows} rows x {options.letters} letters, {options.device}, {options.precision}"
    for tuning in options.tuning:
        setup = Setup(options.shape, tuning, options.rows, options.letters, options.device, options.precision)
        for name in options.defense:
            for make in SETTINGS[name] if tuning == "lora" or name not in LORA_ONLY else ():
                known = json.loads(results.read_text()) if results.is_file() else {}
                here = label(name, make())
                if here in known.get(place, {}).get(tuning, {}):
                    continue
                row = measure(setup, make, options.pairs)
                known.setdefault(place, {}).setdefault(tuning, {})[here] = row
                results.write_text(json.dumps(known, indent=1) + "\n")
                print(table({tuning: {here: row}}).splitlines()[-1], flush=True)
    print(f"\n{place}\n\n{table(json.loads(results.read_text())[place])}\n")


if __name__ == "__main__":
    main()
