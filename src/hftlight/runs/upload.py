"""Export of a run's upload as the file that a fine-tuning service takes."""

from collections.abc import Sequence
from pathlib import Path

from hftlight.data.messages import write_upload
from hftlight.data.records import Record
from hftlight.data.templates import get_template
from hftlight.data.tokens import encode
from hftlight.engine import Stage
from hftlight.engine.step.order import passes_order
from hftlight.errors import InputError
from hftlight.files import ensure_writable, write_json
from hftlight.models.load import load_tokenizer
from hftlight.runs.prepare import Prepared
from hftlight.runs.stages.train import stage_config

SIDE = ".rows.json"  # end of the name of the file beside the upload that says what its rows are


def export_upload(prepared: Prepared, path: Path) -> Path:
    """Write the rows of the attack's upload in chat format, and beside them a file that says what they are.

    The rows are those that the fine-tuning of the run trains on, in the order of its first pass, with the attack's
    system text. Rows that ``--max_tokens`` cuts off are written whole. The file beside holds the attack's values, the
    seed, and each row's id and role in the same order. It is not for the service.

    Args:
        prepared: the run.
        path: the file for the service, such as ``upload.jsonl``.

    Returns:
        The path of the file beside it.

    Raises:
        InputError: if the run has a defense, or its upload cannot be written as chats: pairs of answers, a weight edit,
            several uploads, or rows that the aligned model chooses. Also if a row has an empty question or answer.
    """
    attack, config = prepared.attack, prepared.config
    if named := [arm.name for arm in prepared.arms if arm.defenses]:
        raise InputError(
            f"--export_upload writes what a user uploads, and the service runs no defense, got --defense"
            f" {' '.join(named)}. Leave --defense out."
        )
    if len(prepared.phases) > 1 or attack.acts_on != "rows":
        reason = {"pairs": "pairs of answers", "weights": "no rows, but edits the weights"}
        what = "several uploads" if len(prepared.phases) > 1 else reason[attack.acts_on]
        raise InputError(
            f"--export_upload: the attack {attack.name} has {what}, and a service takes one file of chats. Choose"
            " another attack."
        )
    if prepared.choosing is not None:
        raise InputError(
            f"--export_upload: the aligned model chooses the rows of {attack.name}. Run the attack once, and pass the"
            f" scores that it writes with --{attack.name}.scores FILE."
        )
    if path.suffix != ".jsonl":
        raise InputError(f"--export_upload writes JSONL, so the file must end in .jsonl, got {str(path)!r}.")
    ensure_writable(path.parent, "--export_upload")
    rows = _in_order(prepared)
    write_upload(path, rows, stage_config(config, attack, Stage.FINETUNING).system)
    beside = path.with_name(path.stem + SIDE)
    about = [{"id": r.id, "role": r.role, "kind": r.kind, "source": r.source} for r in rows]
    write_json(beside, {"attack": attack.describe(), "seed": config.seed, "rows": about})
    return beside


def _in_order(prepared: Prepared) -> Sequence[Record]:
    """Return the rows that the fine-tuning trains on, in the order of its first pass."""
    own = stage_config(prepared.config, prepared.attack, Stage.FINETUNING)
    tokenizer = load_tokenizer(own.model)
    template = get_template(own.template, tokenizer)
    encoded = [
        (record, example)
        for record in prepared.streams["task"]
        if (example := encode(record, template, tokenizer, own.max_tokens, own.system, own.long_rows)) is not None
    ]
    lengths = [len(example.input_ids) for _, example in encoded] if own.order == "length" else None
    batches = passes_order(len(encoded), own.finetuning.batch_size, own.seed, "task", 0, lengths)
    return [encoded[row][0] for batch in batches for row in batch]
