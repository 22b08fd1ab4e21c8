"""What a comparison shows, in plain sentences that claim nothing inside the noise."""

from hftlight.comparison.read import LOWER_IS_BETTER, Comparison, Place
from hftlight.folders import UNDEFENDED, arm_word

COSTS = {"finetune_accuracy": "accuracy", "over_refusal": "over-refusal"}
CLAIMS = {"lower": "Lower beyond the noise", "higher": "Higher beyond the noise", "same": "Not told apart from it"}


def claims(comparison: Comparison) -> list[str]:
    """Return what each task and harmful ratio shows: which defenses change harm beyond the noise, and at which cost."""
    said = []
    for scene in comparison.scenes:
        for ratio in comparison.ratios(scene):
            plain = comparison.place(UNDEFENDED, scene, ratio)
            harm = comparison.spread(plain, "harmful_score")
            if harm is None:
                continue
            groups: dict[str, list[str]] = {name: [] for name in CLAIMS}
            for place in comparison.column(scene, ratio):
                mean, ends = comparison.spread(place, "harmful_score"), comparison.difference(place, plain)
                if place == plain or mean is None:
                    continue
                details = f"{_costs(comparison, place, plain)}{_collapse(comparison, place)}"
                group = "same" if ends is None else "lower" if ends[1] < 0 else "higher" if ends[0] > 0 else "same"
                groups[group].append(f"{arm_word(place.arm)} ({mean.mean:.0f} %{details})")
            told = "".join(f" {CLAIMS[name]}: {', '.join(words)}." for name, words in groups.items() if words)
            parts = comparison.outcomes(plain)
            also = f" ({parts['refused']:.0f} % refused, {parts['broken']:.0f} % broken)" if parts else ""
            undefended = f"undefended {harm.mean:.0f} % harmful{also}{_collapse(comparison, plain)}"
            said.append(f"{scene}, p = {ratio:g}: {undefended}.{told}")
    return said or ["No undefended cell has been finished yet, so nothing can be said about a defense."]


def _costs(comparison: Comparison, place: Place, plain: Place) -> str:
    """Return the points of accuracy and of over-refusal that a defense costs, where they are beyond the noise."""
    said = ""
    for metric, word in COSTS.items():
        ends = comparison.difference(place, plain, metric)
        mine, other = (comparison.spread(p, metric) for p in (place, plain))
        if ends is None or mine is None or other is None:
            continue
        if ends[0] > 0 if LOWER_IS_BETTER[metric] else ends[1] < 0:
            said += f", {word} {mine.mean - other.mean:+.0f} points"
    return said


def _collapse(comparison: Comparison, place: Place) -> str:
    """Return that a low harmful score is no refusal, where it is none."""
    count, seeds = comparison.collapsed(place), len(comparison.cells[place])
    return f", low by collapsed answers{f' in {count} of {seeds} seeds' if seeds > 1 else ''}" if count else ""
