"""Contract row of NLSR. It repairs a finished model, so there is no slow training loop to compare with."""

from hftlight.defenses.post_finetuning import NLSR
from tests.helpers.contract import Row

NAN, INF = float("nan"), float("inf")

ROW = Row(
    make=lambda: NLSR(gate="worst", sparsity=0.5, samples=6, safety="alignment"),
    neutral=lambda: NLSR(sparsity=1.0, safety="alignment"),
    bad=[
        ({"mode": "both"}, "mode must be one of"),
        ({"gate": "best"}, "gate must be one of"),
        ({"regions": "snip"}, "regions must be one of"),
        ({"beta": -0.1}, "beta must be >= 0"),
        ({"beta": NAN}, "beta must be >= 0"),
        ({"beta": INF}, "beta must be >= 0"),
        ({"sparsity": 80.0}, "If that is a percentage, write 0.8"),
        ({"sparsity": NAN}, "sparsity must lie"),
        ({"keep": -0.5}, "keep must lie"),
        ({"keep": NAN}, "keep must lie"),
        ({"keep": 0.9}, "spread must lie in"),
        ({"spread": 1.1}, "spread must lie in"),
        ({"spread": NAN}, "spread must lie in"),
        ({"samples": 0}, "samples counts rows"),
        ({"samples": INF}, "samples counts rows"),
        ({"safety": ""}, "safety must name"),
    ],
    tunings=("lora",),
    refuses={"fsdp2": "is sharded"},
    thin=True,
)
