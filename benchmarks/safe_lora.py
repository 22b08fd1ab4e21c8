"""Time and memory of Safe LoRA's thin form against the full matrix: ``python benchmarks/safe_lora.py``.

One weight lies on disk in bfloat16, once aligned and once as base, with a LoRA update on it. Both forms read the two
files in turn, so that both see the same state of the machine. Memory is what a form allocates beside the two stored
weights.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1]))
from hftlight.defenses.post_finetuning.safe_lora import PROBES
from hftlight.engine.weights.shards import Share
from hftlight.engine.weights.spectrum import back_and_forth
from hftlight.engine.weights.stored import Difference, FileWeights, ModelWeights
from tests.helpers.buffers import LiveBytes

NAME = "weight"


def thin(v: Difference, b: torch.Tensor, a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the projected B and the cosine, from Gram matrices.

    Random directions are projected along with B, as in the defense.
    """
    gram, rank = a @ a.T, b.shape[1]
    probes = torch.randint(2, (len(b), PROBES)).to(b) * 2 - 1
    y, t, squares = back_and_forth(v, torch.cat([b, probes], dim=1), Share(0, len(b), len(b)))
    y, t = y[:, :rank], t[:, :rank]
    # The inner product of the projected and the original update, and their squared norms.
    inner, projected, original = (((left @ gram) * left).sum() for left in (t, y, b))
    return y / squares[0].sqrt(), inner / (projected * original).sqrt()


def dense(v: Difference, b: torch.Tensor, a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the same from C = V V^T / ||V||, out x out, and from dense products, as in the official code."""
    difference = v.model.rows(NAME).float() - v.other.rows(NAME).float()
    c = difference @ difference.T / difference.norm()
    image = c @ b
    return image, torch.cosine_similarity((image @ a).flatten(), (b @ a).flatten(), dim=0)


def measure(out: int, inner: int, rank: int, repeats: int) -> float:
    torch.manual_seed(0)
    base, b, a = 0.02 * torch.randn(out, inner), torch.randn(out, rank), torch.randn(rank, inner)
    with tempfile.TemporaryDirectory() as folder:
        models = []
        for kind, weight in (("aligned", base + 1e-3 * torch.randn(out, inner)), ("base", base)):
            (Path(folder) / kind).mkdir()
            save_file({NAME: weight.bfloat16()}, Path(folder) / kind / "model.safetensors")
            models.append(FileWeights(Path(folder) / kind))
        v = Difference(*models, NAME)
        seconds = {thin: [], dense: []}
        for _ in range(repeats):
            for form, times in seconds.items():
                since = time.perf_counter()
                form(v, b, a)
                times.append(time.perf_counter() - since)
        in_memory = Difference(*(ModelWeights({NAME: m.rows(NAME).clone()}) for m in models), NAME)
        peaks = {}
        for form in seconds:
            with LiveBytes() as live:
                result = form(in_memory, b, a)
            peaks[form] = live.peak
            print(
                f"{form.__name__:5} {out} x {inner}, rank {rank}: median {statistics.median(seconds[form]):.3f} s,"
                f" peak {live.peak / 2**20:.1f} MiB, cosine {float(result[1]):.5f}"
            )
    ratio = statistics.median(d / t for d, t in zip(seconds[dense], seconds[thin], strict=True))
    print(f"dense / thin: {ratio:.1f} in time, {peaks[dense] / peaks[thin]:.1f} in memory")
    return ratio


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=int, default=4096)
    parser.add_argument("--inner", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    measure(options.out, options.inner, options.rank, options.repeats)


if __name__ == "__main__":
    main()
