"""A random two-layer language model in float64, its batches, and an independent, slow Booster step."""

import copy
from typing import Any

import torch
from lightning.pytorch import LightningModule
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

VOCABULARY = 48


def tiny_lm(
    seed: int = 0,
    lora: bool = False,
    dropout: float = 0.0,
    dtype: torch.dtype = torch.float64,
    vocabulary: int = VOCABULARY,
) -> nn.Module:
    """Return a random Llama. With LoRA, B is random too, so that no gradient is zero at the first step."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        attention_dropout=0.0 if lora else dropout,
        attn_implementation="sdpa",
    )
    model: Any = LlamaForCausalLM(config)
    # Llama's own norm rounds to float32. A difference in the last bit of a float64 can then grow to 1e-8.
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, LlamaRMSNorm):
                setattr(module, name, nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps))
    if lora:
        settings = LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules=["q_proj", "v_proj", "o_proj"])
        model = get_peft_model(model, settings)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
    return model.to(dtype)


class PlainModule(LightningModule):
    """A module as users write it: a causal LM in ``model``, ``loss(batch)`` and SGD."""

    def __init__(self, model: nn.Module, lr: float = 0.1) -> None:
        super().__init__()
        self.model, self.lr = model, lr

    def loss(self, batch: Any) -> Tensor:
        return self.model(**batch).loss

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def token_batch(seed: int, rows: int = 3, tokens: int = 9, prompt: int = 4, ragged: bool = True) -> dict[str, Tensor]:
    """Return a right-padded batch. If ragged, its rows differ in length. Only response tokens have labels."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (rows, tokens), generator=generator)
    mask = torch.ones_like(ids)
    labels = ids.clone()
    labels[:, :prompt] = -100
    for row in range(1, rows if ragged else 1):
        mask[row, tokens - row :] = 0
        labels[row, tokens - row :] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def reference_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return the mean response-token loss from full logits, one row at a time."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    losses = []
    for row, labels in enumerate(batch["labels"]):
        positions = [p for p in range(1, len(labels)) if labels[p] != -100]
        scores = logits[row][[p - 1 for p in positions]]
        losses.append(torch.logsumexp(scores, 1) - scores[range(len(positions)), labels[positions].tolist()])
    return torch.cat(losses).mean()


def slow_booster_training(
    model: nn.Module,
    batches: list[list[dict[str, Tensor]]],
    harmful: list[dict[str, Tensor]],
    lr: float,
    lam: float,
    alpha: float,
) -> nn.Module:
    """Train a copy by SGD with the paper's update, by ``autograd.grad`` on flattened vectors and model copies."""
    model = copy.deepcopy(model)
    for step, micro_batches in enumerate(batches):
        weights = [p for p in model.parameters() if p.requires_grad]

        def flat_gradient(owner: nn.Module, batch: dict[str, Tensor]) -> Tensor:
            own = [p for p in owner.parameters() if p.requires_grad]
            return torch.cat([g.flatten() for g in torch.autograd.grad(reference_loss(owner, batch), own)])

        # The update is g(w) + lam * (h(w) - h(w - alpha * h(w) / |h(w)|)), with the harmful gradient h.
        update = sum(flat_gradient(model, batch) for batch in micro_batches) / len(micro_batches)
        here = flat_gradient(model, harmful[step])
        there = copy.deepcopy(model)
        shift = alpha * here / here.norm()
        offset = 0
        with torch.no_grad():
            for p in (p for p in there.parameters() if p.requires_grad):
                p.copy_(p - shift[offset : offset + p.numel()].view_as(p))
                offset += p.numel()
        update = update + lam * (here - flat_gradient(there, harmful[step]))
        offset = 0
        with torch.no_grad():
            for p in weights:
                p.copy_(p - lr * update[offset : offset + p.numel()].view_as(p))
                offset += p.numel()
    return model
