"""ConstrainedSFT's row."""

import copy

import torch

from hftlight.defenses.finetuning.constrained_sft import ConstrainedSFT
from tests.helpers.contract import Row, Slow

BETA = 0.5


class SlowConstrainedSFT(Slow):
    """The exact objective, one token at a time, differentiated by autograd. The weight floor is never reached here."""

    def begin(self):
        self.aligned = copy.deepcopy(self.model).eval()

    def loss(self, batch):
        terms = []
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        now = torch.log_softmax(self.model(**inputs).logits, -1)
        with torch.no_grad():
            then = torch.log_softmax(self.aligned(**inputs).logits, -1)
        for row, labels in enumerate(batch["labels"].tolist()):
            place = 0
            for position in range(1, len(labels)):
                if labels[position] == -100:
                    continue
                place += 1
                beta = BETA * (5 if place == 1 else 20 if place <= 5 else 1)
                gain = now[row, position - 1, labels[position]] - then[row, position - 1, labels[position]]
                terms.append(2 / beta * torch.log(1 + torch.exp(-beta * gain)))
        return torch.stack(terms).mean()


ROW = Row(
    make=lambda: ConstrainedSFT(BETA, weight_floor=0.0),
    neutral=lambda: ConstrainedSFT(beta=0.0),
    bad=[
        ({"beta": -1.0}, "beta"),
        ({"beta": float("nan")}, "beta"),
        ({"bias_factor": -1.0}, "bias_factor"),
        ({"bias_factor": float("nan")}, "bias_factor"),
        ({"first_token_bias_factor": -1.0}, "first_token_bias_factor"),
        ({"first_token_bias_factor": float("nan")}, "first_token_bias_factor"),
        ({"bias_length": -1}, "bias_length"),
        ({"bias_length": 2.5}, "bias_length"),
        ({"weight_floor": 5}, "weight_floor"),
        ({"weight_floor": -0.1}, "weight_floor"),
        ({"weight_floor": float("nan")}, "weight_floor"),
        ({"offset": -1}, "offset"),
        ({"offset": 0.5}, "offset"),
    ],
    slow=SlowConstrainedSFT,
)
