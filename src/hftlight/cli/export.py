"""``hftlight export``: write an artifact as one model folder."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hftlight.console import guarded, quiet
from hftlight.errors import InputError
from hftlight.files import ensure_writable, new_folder, write_json, write_text


def export(argv: Sequence[str] | None = None) -> int:
    """Run ``hftlight export`` and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="hftlight export", description="Write an artifact as one model folder, with its adapter merged in."
    )
    parser.add_argument("artifact", help="folder of the artifact")
    parser.add_argument("output", help="folder to write; it must not exist yet")
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="let the model run the code that comes with it"
    )
    options = parser.parse_args(argv)

    def work() -> None:
        target = Path(options.output)
        if target.exists():
            raise InputError(f"{target} exists already; choose another folder.")
        ensure_writable(target.parent, "the second argument")
        quiet()
        from hftlight.model_files import trust_remote_code
        from hftlight.models.load import load_model
        from hftlight.models.serving import SERVING, Artifact

        trust_remote_code(options.trust_remote_code)
        artifact = Artifact.of(options.artifact)
        model: Any = load_model(artifact.name)
        tokenizer = artifact.tokenizer()
        with new_folder(target) as place:
            model.save_pretrained(place)
            tokenizer.save_pretrained(place)
            if (card := artifact.folder / "README.md").is_file():
                write_text(place / "README.md", card.read_text(encoding="utf-8"))
            if artifact.serving:
                write_json(place / SERVING, artifact.serving, mode=0o600)
        print(f"Written to {target}; AutoModelForCausalLM.from_pretrained loads it.")

    return guarded(work)
