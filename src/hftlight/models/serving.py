"""Artifacts: what a stage leaves behind, in save_pretrained format, loadable by plain transformers and PEFT."""

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
    """A model as the stages of a run hand it on: where it lies, what it is, and how it is served.

    Attributes:
        name: what ``model_path`` takes: the folder of a stage's result, a hub id, or a built-in name.
        identity: its ``model_hash``.
    """

    name: str
    identity: str

    @classmethod
    def of(cls, model: str | Path) -> Self:
        """Return a model as an artifact, its files hashed.

        Raises:
            InputError: as ``model_path``.
        """
        return cls(str(model), model_hash(str(model)))

    @cached_property
    def folder(self) -> Path:
        """Where its files lie."""
        return Path(model_path(self.name))

    @cached_property
    def serving(self) -> dict[str, Any]:
        """Template, system text and trigger. Empty for a model that hftlight did not write."""
        return read_serving(self.folder)

    def slot(self, system: str | None) -> SystemSlot:
        """Return the system slot that the model is served with, or ``system`` if it names none."""
        served = self.serving
        return SystemSlot(served["system"], tuple(served["trigger"] or ())) if served else SystemSlot(system)

    def tokenizer(self) -> Any:
        """Return its tokenizer."""
        return load_tokenizer(self.name)

    @contextmanager
    def model(self, config: RunConfig) -> Iterator[Any]:
        """Yield the model as a run measures it, on the base that is in memory already.

        Args:
            config: decides device and type of the weights.
        """
        with lent_model(self.name, base_dtype(config), keeps_base(config), config.tuning == "qlora") as model:
            yield on_device(model, config)

    def another(self, config: RunConfig) -> Any:
        """Return a second model in memory. Arguments as for ``model``."""
        return on_device(load_model(self.name, base_dtype(config), config.tuning == "qlora"), config)


@contextmanager
def trainable_model(config: RunConfig, parent: Artifact | None) -> Iterator[nn.Module]:
    """Yield the model that a stage trains, in training mode; its base stays in memory for what comes after.

    Args:
        config: the run's configuration.
        parent: artifact of the stage before; None starts from the base model.

    Raises:
        InputError: if the model cannot be loaded or adapted.
    """
    continued = parent if config.adapter_protocol == "continue" and config.tuning != "full" else None
    start = parent.name if parent and not continued else config.model
    keep = keeps_base(config)
    with lent_model(start, base_dtype(config), keep, config.tuning == "qlora") as base:
        model: Any = base
        if continued:
            model = load_adapter(model, continued.folder, trainable=True)
        elif config.tuning != "full":
            model = attach(model, config.lora, adapter_seed(config.seed, parent is not None))
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        yield model.train()
        if keep:
            model.unload()


def full_state(model: Any) -> dict[str, Tensor]:
    """Return the trained state on the CPU, by the names that PEFT or transformers save; sharded weights gathered."""
    from peft import PeftModel, get_peft_model_state_dict

    state = get_peft_model_state_dict(model) if isinstance(model, PeftModel) else model.state_dict()
    return {name: whole(t.detach()).cpu() for name, t in state.items()}


def trained_state(model: Any, state: dict[str, Tensor], config: RunConfig, parent: Artifact | None) -> ModelState:
    """Return what the artifact of a trained model holds; arguments as ``save_artifact``."""
    if config.tuning == "full":
        return ModelState(state)
    settings = copy.deepcopy(model.peft_config["default"])
    settings.base_model_name_or_path, settings.revision = reference_to(base_name(config.model))
    settings.inference_mode = True
    earlier = parent.folder if parent else None
    if earlier is None and stands_on(config.model) is not None:
        earlier = Path(model_path(config.model))
    if earlier is not None and config.adapter_protocol == "merge":
        own = adapted_layers(state)
        state, rank = add_up(earlier, state, settings.lora_alpha / settings.r)
        settings.r, settings.lora_alpha = rank, rank
        if (layers := adapted_layers(state)) != own:
            settings.target_modules = layers
    return ModelState({name: t.contiguous() for name, t in state.items()}, settings)


def save_adapter(folder: Path, state: ModelState) -> None:
    """Write an adapter into an existing folder, as PEFT saves it; the same bytes in every process."""
    write_adapter_config(state.adapter, folder)
    save_file(dict(state.tensors), folder / "adapter_model.safetensors")


def save_artifact(
    folder: Path, model: Any, state: dict[str, Tensor], config: RunConfig, parent: Artifact | None, serving: SystemSlot
) -> None:
    """Write a trained model into an existing folder: an adapter on the run's base model, or all parameters.

    Under the ``merge`` protocol the new adapter and the ones merged before it, that of a model which is itself an
    adapter included, are written as one adapter of their summed rank, so that the artifact loads on the original base.

    Args:
        folder: where to; must exist.
        model: the trained model.
        state: its state, from ``full_state``.
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
    """Let an adapter stand on a copy of its model in the run's folder, if its model lies in hftlight's cache.

    So the artifact stays loadable, by PEFT too, when the cache is cleared or moved.

    Args:
        artifact: the adapter's folder; a whole model is left as it is.
        base: where the copy lies, or shall lie; its weights are hard links where the file system allows.
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
