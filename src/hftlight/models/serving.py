"""Artifacts: results of stages in save_pretrained format, which plain transformers and PEFT can load."""

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from safetensors.torch import save_file
from torch import Tensor, nn

from hftlight.config import RunConfig
from hftlight.data.templates import SystemSlot
from hftlight.engine.step.vectors import whole
from hftlight.engine.weights.save import write_adapter_config
from hftlight.files import cache_dir, link_tree, write_json
from hftlight.model_files import ADAPTER_CONFIG, MODELS, base_name, model_hash, model_path, reference_to, stands_on
from hftlight.models.adapters import adapted_layers, adapter_seed, add_up, attach
from hftlight.models.base import base_dtype, keeps_base, lent_model, on_device
from hftlight.models.load import load_adapter, load_model, load_tokenizer, save_tokenizer
from hftlight.models.state import ModelState

SERVING = "serving.json"


@dataclass(frozen=True)
class Artifact:
    """A model that the stages of a run pass on, with its name, its identity and how it is served.

    Attributes:
        name: argument of ``model_path``: the folder of a stage's result, a hub id, or a built-in name.
        identity: the model's ``model_hash``.
    """

    name: str
    identity: str

    @classmethod
    def of(cls, model: str | Path) -> Self:
        """Return a model as an artifact, with the hash of its files.

        Raises:
            InputError: as for ``model_path``.
        """
        return cls(str(model), model_hash(str(model)))

    @cached_property
    def folder(self) -> Path:
        """The folder of the model's files."""
        return Path(model_path(self.name))

    @cached_property
    def serving(self) -> dict[str, Any]:
        """Template, system text and trigger, or an empty dictionary for a model that hftlight did not write."""
        return read_serving(self.folder)

    def slot(self, system: str | None) -> SystemSlot:
        """Return the system slot that the model is served with.

        For a model that hftlight did not write, the slot has the system text ``system`` and no trigger.
        """
        served = self.serving
        return SystemSlot(served["system"], tuple(served["trigger"] or ())) if served else SystemSlot(system)

    def tokenizer(self) -> Any:
        """Return the model's tokenizer."""
        return load_tokenizer(self.name)

    @contextmanager
    def model(self, config: RunConfig) -> Iterator[Any]:
        """Yield the model as a run measures it, with the base model from memory if it is there.

        Args:
            config: the run's configuration, which sets the device and the type of the weights.
        """
        with lent_model(self.name, base_dtype(config), keeps_base(config), config.tuning == "qlora") as model:
            yield on_device(model, config)

    def another(self, config: RunConfig) -> Any:
        """Load the model as a second model in memory, and return it.

        Arguments are as for ``model``.
        """
        return on_device(load_model(self.name, base_dtype(config), config.tuning == "qlora"), config)


@contextmanager
def trainable_model(config: RunConfig, parent: Artifact | None, hardening: bool = False) -> Iterator[nn.Module]:
    """Yield the model that a stage trains, in training mode.

    If ``keeps_base`` allows it, the base model stays in memory for later stages and measurements.

    Args:
        config: the run's configuration.
        parent: artifact of the previous stage; None starts from the run's model.
        hardening: whether the defender trains the model, not a user.

    Raises:
        InputError: if the model cannot be loaded or adapted.
    """
    # Under "continue" the parent's adapter is trained further. Otherwise training starts from the parent's whole model.
    continued = parent if config.adapter_protocol == "continue" and config.tuning != "full" else None
    start = parent.name if parent and not continued else config.model
    keep = keeps_base(config)
    with lent_model(start, base_dtype(config), keep, config.tuning == "qlora") as base:
        model: Any = base
        if continued:
            model = load_adapter(model, continued.folder, trainable=True)
        elif config.tuning != "full":
            model = attach(model, config.lora, adapter_seed(config.seed, parent is not None, hardening))
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        yield model.train()
        if keep:
            model.unload()


def full_state(model: Any) -> dict[str, Tensor]:
    """Return the trained state on the CPU, by the names that PEFT or transformers save.

    Sharded weights are gathered.
    """
    from peft import PeftModel, get_peft_model_state_dict

    state = get_peft_model_state_dict(model) if isinstance(model, PeftModel) else model.state_dict()
    return {name: whole(t.detach()).cpu() for name, t in state.items()}


def trained_state(model: Any, state: dict[str, Tensor], config: RunConfig, parent: Artifact | None) -> ModelState:
    """Return the state that the artifact of a trained model holds.

    Arguments are as for ``save_artifact``.
    """
    if config.tuning == "full":
        return ModelState(state)
    settings = copy.deepcopy(model.peft_config["default"])
    settings.base_model_name_or_path, settings.revision = reference_to(base_name(config.model))
    settings.inference_mode = True
    # A run's model that is itself an adapter is the parent of the first stage.
    earlier = parent.folder if parent else None
    if earlier is None and stands_on(config.model) is not None:
        earlier = Path(model_path(config.model))
    if earlier is not None and config.adapter_protocol == "merge":
        own = adapted_layers(state)
        state, rank = add_up(earlier, state, settings.lora_alpha / settings.r)
        # The sum has scale 1, so alpha equals the rank. It may adapt more layers than the new adapter alone.
        settings.r, settings.lora_alpha = rank, rank
        if (layers := adapted_layers(state)) != own:
            settings.target_modules = layers
    return ModelState({name: t.contiguous() for name, t in state.items()}, settings)


def save_adapter(folder: Path, state: ModelState) -> None:
    """Write an adapter into an existing folder as PEFT saves it, with the same bytes in every process."""
    write_adapter_config(state.adapter, folder)
    save_file(dict(state.tensors), folder / "adapter_model.safetensors")


def save_artifact(
    folder: Path, model: Any, state: dict[str, Tensor], config: RunConfig, parent: Artifact | None, serving: SystemSlot
) -> None:
    """Write a trained model into an existing folder: an adapter on the run's base model, or all parameters.

    Under the ``merge`` protocol the new adapter and the adapters merged before it are written as one adapter of their
    summed rank. If the run's model is itself an adapter, it is included. The artifact then loads on the original base.

    Args:
        folder: folder to write into; must exist.
        model: the trained model.
        state: the model's state, from ``full_state``.
        config: the run's configuration.
        parent: artifact that the stage started from.
        serving: the system slot that the model is served with.
    """
    if config.tuning == "full":
        model.save_pretrained(folder, state_dict=state)
    else:
        save_adapter(folder, trained_state(model, state, config, parent))
    save_tokenizer(config.model, folder)
    served = {"template": config.template, "system": serving.text, "trigger": list(serving.trigger) or None}
    write_json(folder / SERVING, served, mode=0o600)


def stand_alone(artifact: Path, base: Path) -> None:
    """Point an adapter to a copy of its base model in the run's folder, if that model is in hftlight's cache.

    The artifact then stays loadable, also by PEFT, when the cache is cleared or moved.

    Args:
        artifact: the adapter's folder; a whole model is left unchanged.
        base: folder of the copy, which is written if it lacks this model. Its weights are hard links if the file system
            allows them.
    """
    path = artifact / ADAPTER_CONFIG
    if not path.is_file():
        return
    settings = json.loads(path.read_text(encoding="utf-8"))
    model = Path(settings["base_model_name_or_path"])
    if model.parent != cache_dir() / MODELS:
        return
    if model_hash(str(model)) != (model_hash(str(base)) if (base / "config.json").is_file() else None):
        link_tree(model, base)
    write_json(path, {**settings, "base_model_name_or_path": str(base.resolve())})


def read_serving(folder: Path) -> dict[str, Any]:
    """Return how a model is served, or an empty dictionary for a model that hftlight did not write."""
    path = folder / SERVING
    return json.loads(path.read_text()) if path.is_file() else {}
