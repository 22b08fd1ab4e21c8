"""RSNTune's row."""

import torch

from hftlight.defenses import RSNTune
from tests.helpers.contract import Row, Slow

SAFETY, UTILITY, SAMPLES = 0.5, 0.25, 4


class SlowRSNTune(Slow):
    """Each neuron is set to zero in turn, and the change of the reading layer's output is measured row by row."""

    def begin(self):
        safe, useful = (self.important(name, ratio) for name, ratio in (("harmful", SAFETY), ("retain", UTILITY)))
        self.chosen = {key: safe[key] & ~useful[key] for key in safe}
        self.start = {name: p.detach().clone() for name, p in self.weights}

    def blocks(self):
        """Yield the number of a layer, the reader of its neurons, and the neuron of each of the reader's inputs."""
        layers = [m for m in self.model.modules() if hasattr(m, "self_attn")]
        for number, layer in enumerate(layers):
            yield (number, "o_proj"), layer.self_attn.o_proj, torch.arange(16) % 8  # two query heads, one value head
            if not hasattr(layer.mlp.down_proj, "lora_A") and layer.mlp.down_proj.weight.requires_grad:
                yield (number, "down_proj"), layer.mlp.down_proj, torch.arange(32)

    def important(self, stream, ratio):
        examples = [self._cut(stream, k, 1) for k in range(SAMPLES)]
        result = {}
        for key, reader, owner in self.blocks():
            count = int(owner.max()) + 1
            sets = []
            for row in examples:
                inputs = []
                handle = reader.register_forward_pre_hook(lambda _, args, into=inputs: into.append(args[0].detach()))
                self.model.eval()
                with torch.no_grad():
                    self.model(input_ids=row["input_ids"], attention_mask=row["attention_mask"])
                    handle.remove()
                    whole = reader(inputs[0])
                    changes = []
                    for neuron in range(count):
                        without = inputs[0] * (owner != neuron)
                        alone = [
                            (whole - reader(inputs[0] * (torch.arange(len(owner)) != i))).square().sum()
                            for i in (owner == neuron).nonzero().flatten().tolist()
                        ]
                        assert count < len(owner) or torch.allclose(alone[0], (whole - reader(without)).square().sum())
                        changes.append(torch.stack(alone).sum())
                self.model.train()
                best = torch.stack(changes).topk(max(1, round(ratio * count))).indices.tolist()
                sets.append({n for n in range(count) if n in best})
            members = set.intersection(*sets)
            result[key] = torch.tensor([n in members for n in range(count)])
        return result

    def keeps(self, name, p):
        """Return the mask of the entries of a parameter that keep their values."""
        number = int(name.split("layers.")[1].split(".")[0]) if "layers." in name else -1
        adapted = "lora_" in name
        if "o_proj" in name and not name.endswith("lora_B.default.weight"):
            return (~self.chosen[number, "o_proj"])[torch.arange(16) % 8][None].expand(p.shape)
        if "v_proj" in name and not name.endswith("lora_A.default.weight"):
            return (~self.chosen[number, "o_proj"])[:, None].expand(p.shape)
        if not adapted and "down_proj" in name:
            return (~self.chosen[number, "down_proj"])[None].expand(p.shape)
        if not adapted and ("gate_proj" in name or "up_proj" in name):
            return (~self.chosen[number, "down_proj"])[:, None].expand(p.shape)
        return torch.ones_like(p, dtype=torch.bool)

    def edit(self, step, grads):
        return [g.masked_fill(self.keeps(name, p), 0) for (name, p), g in zip(self.weights, grads, strict=True)]


ROW = Row(
    make=lambda: RSNTune(SAFETY, UTILITY, samples=SAMPLES, safety="harmful", utility="retain"),
    no_neutral="norms, embeddings, queries and keys never train",
    bad=[
        ({"safety_ratio": 0.0}, "safety_ratio"),
        ({"safety_ratio": 20}, "write 0.2"),
        ({"utility_ratio": 1.0}, "utility_ratio"),
        ({"score": "magnitude"}, "score"),
        ({"shared": 0.0}, "shared"),
        ({"samples": 0}, "samples"),
        ({"safety": "retain", "utility": "retain"}, "two different streams"),
    ],
    slow=SlowRSNTune,
    refuses={
        "StochasticWeightAveraging": "averages weights after they moved",
        "EMAWeightAveraging": "averages weights after they moved",
    },
)
