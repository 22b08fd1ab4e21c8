"""Comparison of defenses on public data, one seed: ``python benchmarks/public_data.py FOLDER``.

The folder holds these files as JSON lines, with the columns of the published sets:

- ``alignment.jsonl``: safe pairs of Safety-Tuned LLaMAs,
- ``harmful.jsonl``: AdvBench behaviors (goals, with one-line affirmative prefixes as answers). The defender has 300
  rows, and the attacker has 113 others,
- ``test.jsonl``: StrongREJECT prompts, ``over_refusal.jsonl``: XSTest prompts with their column ``label``,
- ``sst2/train.jsonl``, ``sst2/test.jsonl``, ``agnews/train.jsonl``, ``agnews/test.jsonl``.

The model is SmolLM2-135M. Four arms run at p = 0.1 on two tasks. Every defense has its default arguments. The judge of
the harmful score looks for refusal phrases and calls every other answer harmful. If the command is stopped, the same
command continues. Tables and figures are copied to ``benchmarks/public_data``.
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
        print(f"{__doc__}\nThe first argument must be the folder that is described above.", file=sys.stderr)
        return 2
    data = Path(sys.argv[1])
    argv = ["--defenses", "none", "booster", "vaccine", "lisa", "--tasks", "sst2", "agnews", "--harmful_ratios", "0.1"]
    argv += [f"--{name}={value}" for name, value in SETTINGS.items()]
    argv += [f"--data.{name}={data / file}" for name, file in FILES.items()]
    status = compare([*argv, f"--comparison={FOLDER.name}", *sys.argv[2:]])
    if not status:
        keep(FOLDER, RESULTS)
    return status


if __name__ == "__main__":
    sys.exit(main())
