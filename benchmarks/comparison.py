"""Comparison of defenses in the built-in world, three seeds: ``python benchmarks/comparison.py``.

The model is SmolLM2-135M. Seven arms run at p = 0.1, and four of them also at p = 0 and 0.3. Every defense has its
default arguments. The attack's strength was chosen beforehand on a development seed (``benchmarks/world.py``) and is
the same everywhere. If the command is stopped, the same command continues. Tables and figures of the finished cells are
copied to ``benchmarks/comparison``.
"""

import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

RESULTS = Path(__file__).with_suffix("")
COMBINATION = "booster+lisa+antidote"
SETTINGS = ["--finetuning.steps", "48", "--finetuning.lr", "0.0014", "--evaluation.prompts", "150", "--seeds", "3"]
GRIDS = (
    (["none", "booster", "vaccine", "lisa", "safety_mix", "antidote", COMBINATION], ["0.1"]),
    (["none", "booster", "lisa", COMBINATION], ["0", "0.3"]),
)
FOLDER = Path("runs") / "built_in_world"


def keep(comparison: Path, results: Path) -> None:
    """Copy tables and figures of a comparison into the repository.

    Args:
        comparison: folder of the comparison's runs.
        results: folder for the copies.
    """
    from hftlight.comparison.figures import ratio_figure, tradeoff_figure
    from hftlight.comparison.read import read_comparison

    if not (comparison / "leaderboard.csv").is_file():
        return  # nothing ran, as under --dry_run
    results.mkdir(exist_ok=True)
    for suffix in ("csv", "md", "tex"):
        shutil.copy(comparison / f"leaderboard.{suffix}", results)
    content = read_comparison(comparison)
    for scene in content.scenes:
        drawn = {
            "harmful_score": ratio_figure(content, scene, "harmful_score", "harmful score, percent"),
            "finetune_accuracy": ratio_figure(content, scene, "finetune_accuracy", "finetune accuracy, percent"),
            "tradeoff": tradeoff_figure(content, scene, 0.1),
        }
        name = f"{scene.task}_" if len(content.scenes) > 1 else ""
        for what, figure in drawn.items():
            if figure is not None:
                figure.savefig(results / f"{name}{what}.png", dpi=150, bbox_inches="tight")


def main() -> int:
    from hftlight.cli.compare import compare

    for defenses, ratios in GRIDS:
        grid = ["--defenses", *defenses, "--harmful_ratios", *ratios, "--comparison", FOLDER.name]
        if status := compare([*grid, *SETTINGS, *sys.argv[1:]]):
            return status
        keep(FOLDER, RESULTS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
