"""Biases that a model's family can have and this model lacks: opened at zero, so that transformers loads them."""

import copy
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from hftlight.engine.weights.lora import has_adapter
from hftlight.engine.weights.stored import plain_name

# Settings of transformers' configurations that give linear layers a bias, in the order in which they are tried.
SWITCHES = ("attention_bias", "attention_out_bias", "use_bias", "enable_bias")


def plain_model(model: nn.Module) -> Any:
    """Return the transformers model inside PEFT and ``torch.compile``."""
    inner: Any = model.get_base_model() if has_adapter(model) else model  # type: ignore[operator]
    return getattr(inner, "_orig_mod", inner)


def biases_by(model: nn.Module) -> dict[str, list[str]]:
    """Return which biases each setting of the model's configuration would add, by the setting.

    The model's class is built from a changed copy of its configuration, without memory for weights. A setting that the
    class does not read adds nothing and is left out.

    Args:
        model: a causal LM of transformers, with or without an adapter.
    """
    base = plain_model(model)
    own = {plain_name(name) for name, _ in base.named_parameters()}
    added: dict[str, list[str]] = {}
    for switch in SWITCHES:
        config = copy.deepcopy(base.config)
        setattr(config.get_text_config(), switch, True)
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            twin = type(base)(config)
        if more := [n for n, _ in twin.named_parameters() if n.endswith(".bias") and n not in own]:
            added[switch] = more
    return added


def open_biases(model: nn.Module, wanted: Collection[str], who: str) -> str:
    """Give a model the biases that it lacks, all zero, together with others that the same setting adds.

    The model's function stays the same. Its configuration changes, so that plain transformers loads the biases.

    Args:
        model: a causal LM of transformers, with or without an adapter; changed in place.
        wanted: plain names of the biases that are needed, such as ``model.layers.0.self_attn.o_proj.bias``.
        who: name of the caller, for the error.

    Returns:
        The setting that was switched on.

    Raises:
        TypeError: if no setting of the model's configuration gives it these biases.
    """
    added = biases_by(model)
    switch = next((switch for switch, names in added.items() if set(wanted) <= set(names)), None)
    if switch is None:
        raise TypeError(_no_switch(model, wanted, who))
    base = plain_model(model)
    # Under PEFT, an adapted layer and the layer inside it have one plain name, and the inner one comes later and stays.
    layers = {plain_name(name): module for name, module in base.named_modules()}
    for name in added[switch]:
        layer: Any = layers[name.removesuffix(".bias")]
        out, weight = layer.weight.shape[0], layer.weight
        layer.bias = nn.Parameter(torch.zeros(out, dtype=weight.dtype, device=weight.device), requires_grad=False)
    setattr(base.config.get_text_config(), switch, True)
    return switch


def check_biases(model: nn.Module, wanted: Collection[str], who: str) -> None:
    """Refuse a model whose configuration has no setting for some biases.

    Args:
        model: as for ``open_biases``; it stays unchanged.
        wanted: likewise.
        who: likewise.

    Raises:
        TypeError: as for ``open_biases``.
    """
    if wanted and not any(set(wanted) <= set(names) for names in biases_by(model).values()):
        raise TypeError(_no_switch(model, wanted, who))


def _no_switch(model: nn.Module, wanted: Collection[str], who: str) -> str:
    return (
        f"{who}: {type(plain_model(model)).__name__} has no {min(wanted)}, and no setting of its configuration adds it"
        f" ({', '.join(SWITCHES)}). Plain transformers would ignore the bias when it loads the model. Use a model of"
        " another family, such as Llama, or another defense."
    )
