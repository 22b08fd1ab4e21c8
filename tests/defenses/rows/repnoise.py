"""RepNoise's row."""

import torch
from torch.nn import functional as F

from hftlight.defenses import RepNoise
from hftlight.engine.step.simulation import draws
from tests.helpers.contract import Row, Slow

BETA, ALPHA = 0.7, 0.4


def kernels(distance, width):
    return sum(torch.exp(-distance / (width * 2**i)) for i in range(5))


def slow_discrepancy(x, y):
    """Return the discrepancy pair by pair, with the bandwidth from all ordered pairs of different rows."""
    both = torch.cat([x, y])
    pairs = [[(a - b).square().sum() for b in both] for a in both]
    count = len(both)
    width = sum(float(d) for row in pairs for d in row) / (count**2 - count) / 4
    size, total = len(x), 0.0
    for i in range(size):
        for j in range(size):
            total = total + kernels(pairs[i][j], width) + kernels(pairs[size + i][size + j], width)
            total = total - kernels(pairs[i][size + j], width) - kernels(pairs[size + i][j], width)
    return total / size**2


def masked_loss(logits, labels, mask):
    """Return the mean loss of the tokens in the mask, where position t predicts token t + 1."""
    picked = [(r, t) for r, t in mask.nonzero().tolist()]
    return torch.stack([F.cross_entropy(logits[r, t - 1], labels[r, t]) for r, t in picked]).mean()


class SlowRepNoise(Slow):
    """Full logits of every layer from ``output_hidden_states``, whose last state has passed the norm already."""

    def begin(self):
        self.main, self.taken = "pairs", 0

    def micro_gradient(self, batch):
        safe, harmful = ({k: v[i::2] for k, v in batch.items() if k != "pairs"} for i in (0, 1))
        masks = [(a["labels"] != -100) & (a["labels"] != b["labels"]) for a, b in ((safe, harmful), (harmful, safe))]
        loss = masked_loss(self.run_model(safe).logits, safe["labels"], masks[0])
        outputs, handles = [], []
        layers = [m for m in self.model.modules() if hasattr(m, "self_attn")]
        for layer in layers:
            handles.append(layer.mlp.register_forward_hook(lambda _, __, y: outputs.append(y)))
        result = self.run_model(harmful, output_hidden_states=True)
        for handle in handles:
            handle.remove()
        step, micro = divmod(self.taken, self.accumulate)
        self.taken += 1
        for number, output in enumerate(outputs):
            seed = draws(0, step, f"repnoise/{number}/{micro}").getrandbits(62)
            noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed), dtype=output.dtype)
            x, y = (
                torch.stack([(r * m[:, None]).flatten() for r, m in zip(t, masks[1], strict=True)])
                for t in (output, noise)
            )
            loss = loss + BETA * slow_discrepancy(x, y) / len(outputs)
        head = self.model.get_output_embeddings()
        norm = next(m for n, m in self.model.named_modules() if n.endswith("model.norm"))
        total = masked_loss(result.logits, harmful["labels"], masks[1])
        for hidden in result.hidden_states:
            total = total + masked_loss(head(norm(hidden)), harmful["labels"], masks[1])
        loss = loss - ALPHA * torch.log(1 + total / len(result.hidden_states))
        return self.gradient_of(loss)

    def run_model(self, batch, **options):
        return self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **options)


ROW = Row(
    make=lambda: RepNoise(BETA, ALPHA),
    no_neutral="without noise and ascent the stage still trains on pairs, and on the tokens that differ",
    bad=[
        ({"noise_weight": -1.0}, "noise_weight"),
        ({"noise_weight": float("nan")}, "noise_weight"),
        ({"ascent_weight": float("inf")}, "ascent_weight"),
        ({"ascent": "cubic"}, "ascent"),
        ({"bound": 0.0}, "bound"),
        ({"labels": "float16"}, "labels"),
    ],
    slow=SlowRepNoise,
    per_rank=True,
    per_micro_batch="the discrepancy compares the rows of one micro-batch, and the logarithm is taken per micro-batch",
)
