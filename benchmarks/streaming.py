"""Repairs of 7B matrices by the command: ``python benchmarks/streaming.py [--layers N] [--only NAMES] [--table]``.

Random models with the matrices of a 7B Llama are written once as bfloat16 files. ``hftlight repair`` edits them in a
process of its own. Its peak memory and seconds are recorded, beside the seconds of one matrix in the dense way. Results
go to ``benchmarks/streaming.json``, and ``--table`` prints them.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

import torch

RESULTS = Path(__file__).with_suffix(".json")
HIDDEN, INNER, HEADS, VOCABULARY, RANK = 4096, 11008, 32, 32000, 8
MATRICES = {
    **{f"self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"},
    **{f"mlp.{name}_proj": (INNER, HIDDEN) for name in ("gate", "up")},
    "mlp.down_proj": (HIDDEN, INNER),
}
WHOLE, ADAPTER, HARM = "tuned", "adapter", "harm"  # the last: an adapter that unaligns the aligned model
# Name -> (fine-tuned model, options of the command).
SETTINGS: dict[str, tuple[str, list[str]]] = {
    "safe_lora, adapter": (ADAPTER, ["--defense", "safe_lora", "--aligned", "aligned", "--base", "base"]),
    "safe_lora, full": (WHOLE, ["--defense", "safe_lora", "--aligned", "aligned", "--base", "base"]),
    "resta, adapter": (ADAPTER, ["--defense", "resta", "--aligned", "aligned", "--unaligned", HARM]),
    "resta, full": (WHOLE, ["--defense", "resta", "--aligned", "aligned", "--unaligned", "base"]),
    "antidote, full": (WHOLE, ["--defense", "antidote", "--aligned", "aligned", "--scores", "scores.safetensors"]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8, help="decoder layers of 32; four models take 0.4 GB per layer")
    parser.add_argument("--folder", type=Path, default=Path("runs/repair"), help="folder for the models")
    parser.add_argument("--only", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="settings to measure")
    parser.add_argument("--table", action="store_true", help="print what is measured as a Markdown table, and stop")
    given = parser.parse_args()
    known: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    if given.table:
        print(table(known))
        return
    write_models(given.folder, given.layers)
    for name in given.only:
        known[name] = {"layers": given.layers, **measured(given.folder, *SETTINGS[name])}
        RESULTS.write_text(json.dumps(known, indent=1) + "\n")
        print(name, known[name], flush=True)
    known["one matrix of 4096 x 4096"] = dense_seconds()
    RESULTS.write_text(json.dumps(known, indent=1) + "\n")


def write_models(folder: Path, layers: int) -> None:
    """Write the base, the aligned and the fine-tuned model, an adapter on the aligned model, and Antidote's scores."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        vocab_size=VOCABULARY,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    needed = 3 * layers * 405e6 + 3 * 2 * VOCABULARY * HIDDEN * 2
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(("base", "aligned", WHOLE)):
        place = folder / name
        if (place / "model.safetensors.index.json").is_file():
            continue
        if shutil.disk_usage(folder).free < needed * 1.4:
            sys.exit(f"{folder}: the disk needs {needed * 1.4 / 1e9:.0f} GB; lower --layers.")
        place.mkdir(exist_ok=True)
        config.save_pretrained(place)
        parts: dict[str, str] = {}
        for layer in range(layers + 1):
            file = f"model-{layer + 1:05d}-of-{layers + 1:05d}.safetensors"
            tensors = layer_tensors(layer, number) if layer < layers else outer_tensors()
            save_file(tensors, place / file, metadata={"format": "pt"})
            parts |= dict.fromkeys(tensors, file)
        index = {"metadata": {}, "weight_map": parts}
        (place / "model.safetensors.index.json").write_text(json.dumps(index))
    for seed, name in enumerate((ADAPTER, HARM)):
        write_adapter(folder, name, layers, seed)
    squares = {
        f"model.layers.{layer}.{name}.weight": torch.rand(shape[1]).double()
        for layer in range(layers)
        for name, shape in MATRICES.items()
    }
    save_file({**squares, "samples": torch.tensor(512)}, folder / "scores.safetensors")


def layer_tensors(layer: int, moves: int) -> dict[str, torch.Tensor]:
    """Return one layer's weights after a number of moves, each of 5 % of the start."""
    rng, prefix = torch.Generator().manual_seed(layer), f"model.layers.{layer}."
    tensors = {f"{prefix}{n}.weight": torch.ones(HIDDEN) for n in ("input_layernorm", "post_attention_layernorm")}
    for name, shape in MATRICES.items():
        weight = 0.02 * torch.randn(shape, generator=rng)
        for _ in range(moves):
            weight += 0.001 * torch.randn(shape, generator=rng)
        tensors[f"{prefix}{name}.weight"] = weight
    return {name: tensor.bfloat16() for name, tensor in tensors.items()}


def outer_tensors() -> dict[str, torch.Tensor]:
    """Return embedding, output layer and final norm, which no repair changes."""
    rng = torch.Generator().manual_seed(-1)
    embedding, head = (0.02 * torch.randn(VOCABULARY, HIDDEN, generator=rng) for _ in range(2))
    tensors = {"model.embed_tokens.weight": embedding, "lm_head.weight": head, "model.norm.weight": torch.ones(HIDDEN)}
    return {name: tensor.bfloat16() for name, tensor in tensors.items()}


def write_adapter(folder: Path, name: str, layers: int, seed: int) -> None:
    """Write a random adapter on all linear layers of the aligned model."""
    from peft import LoraConfig
    from safetensors.torch import save_file

    rng, place = torch.Generator().manual_seed(seed), folder / name
    targets = [matrix.rpartition(".")[2] for matrix in MATRICES]
    settings = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets, task_type="CAUSAL_LM")
    settings.base_model_name_or_path = str((folder / "aligned").resolve())
    settings.save_pretrained(str(place))
    tensors = {}
    for layer in range(layers):
        for matrix, (out, inner) in MATRICES.items():
            stem = f"base_model.model.model.layers.{layer}.{matrix}"
            tensors[f"{stem}.lora_A.weight"] = torch.randn(RANK, inner, generator=rng) / inner**0.5
            tensors[f"{stem}.lora_B.weight"] = 0.05 * torch.randn(out, RANK, generator=rng)
    save_file(tensors, place / "adapter_model.safetensors", metadata={"format": "pt"})


def measured(folder: Path, model: str, options: list[str]) -> dict[str, Any]:
    """Run the command in a process of its own, and return its seconds and peak memory."""
    from hftlight import __version__

    output = folder / "repaired"
    shutil.rmtree(output, ignore_errors=True)
    words = [str(folder / w) if (folder / w).exists() else w for w in options]
    command = [sys.executable, "-m", "hftlight", "repair", str(folder / model), str(output), *words]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "src")}
    since = time.perf_counter()
    process, peak = subprocess.Popen(command, env=environment), 0
    while process.poll() is None:  # the resource usage at the end would count this process's memory at the fork, too
        status = Path(f"/proc/{process.pid}/status").read_text()
        peak = max([peak, *(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))])
        time.sleep(0.05)
    seconds = time.perf_counter() - since
    shutil.rmtree(output, ignore_errors=True)
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed.")
    threads = int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads()))
    return {"version": __version__, "seconds": round(seconds), "peak_gib": round(peak / 2**20, 2), "threads": threads}


def dense_seconds() -> dict[str, Any]:
    """Return the seconds of Safe LoRA on one 4096 x 4096 matrix, with C formed and without."""
    v, b = 0.001 * torch.randn(HIDDEN, HIDDEN), torch.randn(HIDDEN, RANK)
    since = time.perf_counter()
    dense = (v @ v.T / v.norm()) @ b
    middle = time.perf_counter()
    thin = v @ (v.T @ b) / v.norm()
    end = time.perf_counter()
    apart = float((dense - thin).norm() / thin.norm())
    return {"dense": round(middle - since, 3), "thin": round(end - middle, 4), "relative_distance": apart}


def table(known: dict[str, Any]) -> str:
    """Return the results as a Markdown table."""
    lines = ["| repair | layers | seconds | peak memory, GiB |", "| --- | --- | --- | --- |"]
    lines += [
        f"| {name} | {row['layers']} | {row['seconds']:.0f} | {row['peak_gib']:.2f} |"
        for name, row in known.items()
        if "layers" in row
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
