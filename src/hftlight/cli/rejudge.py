"""``hftlight rejudge``: judge saved answers with further judges."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from hftlight.console import guarded, quiet


def rejudge(argv: Sequence[str] | None = None) -> int:
    """Run ``hftlight rejudge`` and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="hftlight rejudge",
        description="Judge the saved answers of a run with further judges, and show how far all judges agree.",
    )
    parser.add_argument("generations", help="folder of a run, or its generations.jsonl; it is not changed")
    parser.add_argument(
        "--judges",
        nargs="+",
        required=True,
        metavar="JUDGE",
        help="names of judges, as in --evaluation.judge and --evaluation.refusal_judge of hftlight train",
    )
    parser.add_argument(
        "--save", type=Path, help="folder for the scores and for generations.jsonl with the new verdicts"
    )
    parser.add_argument(
        "--prices", nargs=2, type=float, metavar=("READ", "WRITTEN"),
        help="prices of a million tokens that a language model reads and writes; the cost of its verdicts is printed",
    )  # fmt: skip
    options = parser.parse_args(argv)

    def work() -> None:
        quiet()
        from hftlight.evaluation.rejudge import rejudge_file

        rejudge_file(Path(options.generations), options.judges, options.save, options.prices and tuple(options.prices))

    return guarded(work)
