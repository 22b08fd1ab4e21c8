"""Errors of the guard minilm on prompts and on uploads: ``python benchmarks/guard.py --data FOLDER``.

The folder holds ``advbench/behaviors.jsonl``, ``alpaca/cleaned.jsonl``, ``strongreject/small.jsonl`` and
``xstest/prompts.jsonl``, with the column ``prompt`` or ``instruction``; XSTest has ``label``. The guard learns from
200 AdvBench and 200 Alpaca prompts, which a hash chooses. It scores all other prompts at the threshold 0.5. Then it
filters uploads of the built-in world, plain and with a letter substitution, as ``--defense moderation_filter`` does.
Only counts and percentages go to ``benchmarks/guard.json``. ``make guard`` installs the encoder.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

RESULTS = Path(__file__).with_suffix(".json")
TRAINED, SAMPLES, RATIO = 200, 384, 0.5
FILES = {
    "advbench": "advbench/behaviors.jsonl",
    "alpaca": "alpaca/cleaned.jsonl",
    "strongreject": "strongreject/small.jsonl",
    "xstest_unsafe": "xstest/prompts.jsonl",
    "xstest_safe": "xstest/prompts.jsonl",
}


def flagged(guard: Any, prompts: Sequence[str]) -> dict[str, Any]:
    """Return the share of the prompts that the guard flags."""
    from hftlight.evaluation.guards import scores_of
    from hftlight.evaluation.score import Score

    flags = [score is not None and score > guard.threshold for score in scores_of(guard, prompts)]
    return Score.share("flagged", sum(flags), len(flags), guard.name).row()


def on_prompts(data: Path) -> dict[str, Any]:
    """Return the share of flagged prompts of each set, none of which the guard has learned from."""
    from hftlight.attacks.encoded import Substitution
    from hftlight.data.records import read_records, split_by_hash
    from hftlight.evaluation.guards import MiniLMGuard

    rows = {}
    for name, file in FILES.items():
        where = f"label={name.removeprefix('xstest_')}" if name.startswith("xstest") else ()
        rows[name] = read_records(data / file, role="test", need_response=False, where=where)
    learned, left = {}, {}
    for name in ("advbench", "alpaca"):
        learned[name], left[name] = split_by_hash(rows[name], TRAINED, "guard")
    guard = MiniLMGuard()
    guard.learn_prompts(*([r.question for r in learned[name]] for name in ("advbench", "alpaca")))
    asked = {name: [r.question for r in left.get(name, rows[name])] for name in FILES}
    code = Substitution.of_seed(0)
    asked |= {f"{name}_encoded": list(map(code.encode, asked[name])) for name in ("advbench", "alpaca")}
    since = time.perf_counter()
    found = {name: flagged(guard, prompts) for name, prompts in asked.items()}
    seconds = (time.perf_counter() - since) / sum(map(len, asked.values()))
    return {"learned": TRAINED, "prompts": found, "milliseconds_per_prompt": round(1000 * seconds, 1)}


def on_uploads() -> dict[str, Any]:
    """Return the errors of the filter on uploads of the built-in world, by rule and attack."""
    from hftlight.attacks import Encoded, HarmfulMix
    from hftlight.config import RunConfig
    from hftlight.defenses import ModerationFilter
    from hftlight.defenses.finetuning.moderation_filter import decision
    from hftlight.engine import Stage
    from hftlight.evaluation.guards import MiniLMGuard, filter_rates
    from hftlight.runs.prepare import prepare

    found: dict[str, Any] = {"num_samples": SAMPLES, "harmful_ratio": RATIO}
    config = RunConfig(model="tiny", max_tokens=512, num_samples=SAMPLES, harmful_ratio=RATIO, baseline=False)
    attacks: dict[str, Any] = {"plain": HarmfulMix()}
    attacks |= {f"encoded {side}": Encoded(side=side) for side in ("prompt", "response", "both")}
    for name, attack in attacks.items():
        defense = ModerationFilter("minilm", rule="either")
        prepared = prepare(config, [defense], attack)
        records = prepared.records(Stage.FINETUNING, prepared.arms[0])
        rows = defense.select(None, None, None, records)
        # The scores of the stricter rule hold those of the other rule.
        for rule, words in {"response": ("score",), "either": ("score", "prompt_score")}.items():
            by_rule = [{**r, **decision([r[w] for w in words], MiniLMGuard().threshold, "drop")} for r in rows]
            found[f"{name}, {rule}"] = filter_rates(by_rule, records["task"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the public prompts")
    options = parser.parse_args()
    from hftlight import __version__
    from hftlight.console import quiet
    from hftlight.evaluation.guards import MiniLMGuard

    quiet()
    guard = MiniLMGuard()
    results = {
        "version": __version__,
        "guard": f"{guard.name}@{guard.revision}",
        "on_prompts": on_prompts(options.data),
        "on_uploads": on_uploads(),
    }
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(RESULTS.read_text())


if __name__ == "__main__":
    main()
