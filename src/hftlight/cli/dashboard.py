"""``hftlight dashboard``: write the specification of a W&B report of a comparison."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from hftlight.console import guarded
from hftlight.files import ensure_writable, write_json


def dashboard(argv: Sequence[str] | None = None) -> int:
    """Run ``hftlight dashboard`` and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="hftlight dashboard",
        description="Write the specification of a W&B report of a comparison: sections, panels, filters.",
    )
    parser.add_argument("folder", help="folder of the comparison, such as runs/comparison")
    parser.add_argument(
        "--save", default=None, help="JSON file for the specification; by default dashboard.json in the folder"
    )
    parser.add_argument(
        "--upload", action="store_true", help='create the report in W&B; needs pip install "hftlight[dashboard]"'
    )
    options = parser.parse_args(argv)

    def work() -> None:
        from hftlight.comparison.dashboard import specification, upload
        from hftlight.comparison.read import read_comparison

        spec = specification(read_comparison(options.folder))
        path = Path(options.save or Path(options.folder) / "dashboard.json")
        ensure_writable(path.parent, "--save")
        write_json(path, spec)
        print(f"Written: {path}")
        if options.upload:
            print(f"Report: {upload(spec, path)}")

    return guarded(work)
