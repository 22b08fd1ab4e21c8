"""Contract row of SafetyLock. It repairs a finished model, so there is no slow training loop to compare with."""

from hftlight.defenses.post_finetuning import SafetyLock
from tests.helpers.contract import Row

NAN, INF = float("nan"), float("inf")

ROW = Row(
    make=lambda: SafetyLock(heads=2, tokens=3),
    neutral=lambda: SafetyLock(heads=2, strength=0.0),
    bad=[
        ({"heads": 0}, "heads counts attention heads"),
        ({"heads": 1.5}, "heads counts attention heads"),
        ({"heads": NAN}, "heads counts attention heads"),
        ({"strength": -1.0}, "toward unsafe answers"),
        ({"strength": NAN}, "strength must be >= 0"),
        ({"strength": INF}, "strength must be >= 0"),
        ({"tokens": 0}, "tokens counts tokens"),
        ({"samples": 1}, "samples counts pairs"),
        ({"samples": INF}, "samples counts pairs"),
        ({"validation": 0.0}, "fraction of the prompts"),
        ({"validation": 1.0}, "fraction of the prompts"),
        ({"validation": NAN}, "fraction of the prompts"),
    ],
)
