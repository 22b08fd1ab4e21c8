"""Cost of the hashes of models and stages: ``python benchmarks/identity.py [--model NAME] [--gigabytes N]``.

The benchmark measures seconds. A model that was never hashed before is hashed. Then its remembered hash is read as in a
new process; a hash is remembered by path, size and times of change. Both are the median of three times. The key of a
training stage on the model is computed once. The second model is a folder of random bytes in shards of 2 GB. The page
cache of the system is not dropped, so a first hash on a cold disk takes longer. Results go to
``benchmarks/identity.json``.
"""

import argparse
import json
import os
import shutil
import tempfile
import time
from pathlib import Path

from hftlight import files
from hftlight.builtin_models import DEMO
from hftlight.config import RunConfig
from hftlight.data.records import Record
from hftlight.engine import Stage
from hftlight.model_files import model_hash, model_path
from hftlight.runs.stages.train import StageJob

RESULTS = Path(__file__).with_suffix(".json")
SHARD, CHUNK = 2 * 10**9, 2**24


def random_model(folder: Path, size: int) -> None:
    """Write a configuration and ``size`` random bytes, in shards."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    for number, start in enumerate(range(0, size, SHARD)):
        with (folder / f"model-{number:05d}.safetensors").open("wb") as file:
            left = min(SHARD, size - start)
            while left > 0:
                left -= file.write(os.urandom(min(CHUNK, left)))


def timed(work: object, *arguments: object) -> float:
    """Return the seconds that a call takes."""
    since = time.perf_counter()
    work(*arguments)  # type: ignore[operator]
    return round(time.perf_counter() - since, 4)


def costs(model: str) -> dict[str, float | int]:
    """Return the bytes of a model's files, and the seconds of its first hash, remembered hash and stage key."""
    folder = Path(model_path(model, weights=True))
    size = sum(p.stat().st_size for p in folder.iterdir() if p.is_file())
    time.sleep(3)  # the hash of a file that was written just now is not remembered
    first, again = [], []
    for _ in range(3):
        shutil.rmtree(files.cache_dir() / files.HASHES, ignore_errors=True)
        files._digests.clear()
        first.append(timed(model_hash, model))
        files._digests.clear()  # a new process starts without digests in memory
        again.append(timed(model_hash, model))
    rows = [Record(f"ask {i}", f"say {i}") for i in range(1000)]
    job = StageJob(Stage.FINETUNING, RunConfig(model=model), model_hash(model), None, {"task": rows}, [])
    return {"bytes": size, "first": sorted(first)[1], "remembered": sorted(again)[1], "stage_key": timed(job.key)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default=DEMO, help="any model on this machine")
    parser.add_argument("--gigabytes", type=float, default=14.0, help="size of the folder of random bytes, 10^9 bytes")
    options = parser.parse_args()
    results = {options.model: costs(options.model)}
    with tempfile.TemporaryDirectory() as place:
        random_model(Path(place) / "random", int(options.gigabytes * 10**9))
        results["random bytes"] = costs(str(Path(place) / "random"))
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(RESULTS.read_text())


if __name__ == "__main__":
    main()
