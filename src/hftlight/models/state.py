"""ModelState: the weights of a finished model in memory, as the folder of its artifact would store them."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from hftlight.config import RunConfig
from hftlight.engine.weights.biases import open_biases
from hftlight.model_files import base_name
from hftlight.models.base import base_dtype, keeps_base, lent_model


@dataclass(frozen=True)
class ModelState:
    """Result of a stage in memory, before it is written.

    Attributes:
        tensors: tensors on the CPU. They are the factors of an adapter by the names that PEFT saves, or all parameters
            by the names that transformers saves.
        adapter: PEFT's configuration of the adapter on the run's base model; None if the tensors are a whole model.
    """

    tensors: Mapping[str, Tensor]
    adapter: Any = None

    @property
    def scale(self) -> float:
        """Factor of the adapter's ``B A``, alpha / r."""
        return float(self.adapter.lora_alpha / self.adapter.r)

    def put_into(self, model: nn.Module) -> nn.Module:
        """Return the run's base model with these weights, as ``load_model`` returns the artifact.

        ``model`` is changed in place.

        Args:
            model: the base model, with weights of any type.
        """
        if self.adapter is None:
            if biases := self.tensors.keys() - model.state_dict().keys():  # a repair may have added biases
                open_biases(model, biases, "ModelState")
            model.load_state_dict(self.tensors)
            return model
        adapted: Any = with_adapter(model, self.adapter, self.tensors)
        merged: nn.Module = adapted.merge_and_unload()
        return merged

    @contextmanager
    def lent(self, config: RunConfig) -> Iterator[nn.Module]:
        """Yield the model, as ``lent_model`` yields the artifact.

        Args:
            config: the run's configuration, which names the base model and sets the type of its weights.
        """
        with lent_model(base_name(config.model), base_dtype(config), keeps_base(config)) as base:
            yield self.put_into(base)


def with_adapter(model: Any, settings: Any, factors: Mapping[str, Tensor]) -> nn.Module:
    """Return the model with a frozen adapter that has the given factors.

    Args:
        model: a causal LM.
        settings: PEFT's configuration of the adapter; a copy of it is used.
        factors: factors of the adapter, by the names that PEFT saves.
    """
    from peft import get_peft_model, set_peft_model_state_dict

    adapted: Any = get_peft_model(model, copy.deepcopy(settings))
    set_peft_model_state_dict(adapted, dict(factors))
    frozen: nn.Module = adapted.requires_grad_(False).eval()
    return frozen
