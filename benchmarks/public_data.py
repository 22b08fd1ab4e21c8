"""Defenses compared on public data with SmolLM2-135M, one seed: ``python benchmarks/public_data.py FOLDER``.

The folder holds, as JSON lines with the columns that the sets were published with:

- ``alignment.jsonl``: safe pairs of Safety-Tuned LLaMAs,
- ``harmful.jsonl``: AdvBench behaviors (goals, and one-line affirmative prefixes as their answers); 300 rows are the
  defender's, 113 others the attacker's,
- ``test.jsonl``: StrongREJECT prompts, ``over_refusal.jsonl``: XSTest prompts with their column ``label``,
- ``sst2/train.jsonl``, ``sst2/test.jsonl``, ``agnews/train.jsonl``, ``agnews/test.jsonl``.

Four arms at p = 0.1 on two tasks, every defense with its default arguments. The harmful score is that of the refusal
phrases, which call every other answer harmful. Stopped at any time, the same command goes on; tables and figures are
copied to ``benchmarks/public_data``.
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "src")]

RESULTS = Path(__file__).with_suffix("")
FOLDER = Path("runs") / "public_data"
SETTINGS = {
    "seeds": 1, "max_tokens": 128, "num_samples": 480, "alignment.batch_size": 4, "finetuning.steps": 60,
    "finetuning.lr": 5e-4, "data.first": "{harmful: 300, attack: 113}", "data.where": "{over_refusal: label=safe}",
    "evaluation.prompts": 0, "evaluation.over_refusal_prompts": 50, "evaluation.task_rows": 60,
    "evaluation.task_max_new_tokens": 8,
}  # fmt: skip
FILES = {
    "alignment": "alignment.jsonl", "harmful": "harmful.jsonl", "attack": "harmful.jsonl", "test": "test.jsonl",
    "over_refusal": "over_refusal.jsonl", "task_train": "{task}/train.jsonl", "task_test": "{task}/test.jsonl",
}  # fmt: skip


def main() -> int:
    from benchmarks.comparison import keep
    from hftlight.cli.compare import compare

    if len(sys.argv) < 2 or not Path(sys.argv[1]).is_dir():
        print(f"{__doc__}\nThe first argument must be such a folder.", file=sys.stderr)
        return 2
    data = Path(sys.argv[1])
    given = ["--defenses", "none", "booster", "vaccine", "lisa", "--tasks", "sst2", "agnews", "--harmful_ratios", "0.1"]
    given += [f"--{name}={value}" for name, value in SETTINGS.items()]
    given += [f"--data.{name}={data / file}" for name, file in FILES.items()]
    status = compare([*given, f"--comparison={FOLDER.name}", *sys.argv[2:]])
    if not status:
        keep(FOLDER, RESULTS)
    return status


if __name__ == "__main__":
    sys.exit(main())
