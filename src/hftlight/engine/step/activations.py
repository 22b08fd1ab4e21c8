"""Layer inputs and outputs read, chosen or shifted through hooks that always come off; the loss's gradient there."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hftlight.engine.step.passes import same_random_state

ATTENTION = ("self_attn", "attn", "attention", "self_attention")  # what attention is called in decoder layers


@contextmanager
def hooked(modules: Mapping[str, nn.Module], hook: Callable[[str, Any], Any], inputs: bool = False) -> Iterator[None]:
    """Call ``hook(name, value)`` with each module's output inside the block; what it returns, if anything, replaces it.

    Under non-reentrant checkpointing the hooks run again when backward recomputes: let the block span the backward
    pass wherever the hook changes a value.

    Args:
        modules: the modules, by any name.
        hook: gets the name and the first tensor of the output (or of the input), ``[batch, tokens, hidden]``.
        inputs: act on the first positional input instead of the output.
    """
    with ExitStack() as stack:
        for name, module in modules.items():
            if inputs:

                def before(_: nn.Module, args: tuple[Any, ...], name: str = name) -> Any:
                    changed = hook(name, args[0])
                    return None if changed is None else (changed, *args[1:])

                handle = module.register_forward_pre_hook(before)
            else:

                def after(_: nn.Module, __: Any, output: Any, name: str = name) -> Any:
                    changed = hook(name, first_tensor(output))
                    return None if changed is None else with_first_tensor(output, changed)

                handle = module.register_forward_hook(after)
            stack.callback(handle.remove)
        yield


@contextmanager
def captured(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Yield a dictionary that fills with each module's first output tensor; of several calls the first counts.

    Outputs that backward recomputes under checkpointing are later calls, and so are ignored.
    """
    seen: dict[str, Tensor] = {}

    def keep(name: str, value: Tensor) -> None:
        seen.setdefault(name, value)

    with hooked(modules, keep):
        yield seen


@contextmanager
def shifted(modules: Mapping[str, nn.Module], shifts: Mapping[str, Tensor]) -> Iterator[None]:
    """Add ``shifts[name]`` to the output of each named module inside the block; shapes as the outputs have."""
    with hooked({name: modules[name] for name in shifts}, lambda name, value: value + shifts[name]):
        yield


def first_tensor(output: Any) -> Tensor:
    """Return the tensor a layer's output starts with: the output itself, a tuple's, or a dataclass's first tensor.

    Raises:
        TypeError: if there is none.
    """
    if isinstance(output, Tensor):
        return output
    if is_dataclass(output):
        values: tuple[Any, ...] = tuple(getattr(output, field.name) for field in fields(output))
    elif isinstance(output, (tuple, list)):
        values = tuple(output)
    else:
        values = ()
    for value in values:
        if isinstance(value, Tensor):
            return value
    raise TypeError(
        f"first_tensor: a layer must return a tensor, or a tuple or dataclass with one, got {type(output)}."
    )


def with_first_tensor(output: Any, value: Tensor) -> Any:
    """Return the layer output with the tensor that ``first_tensor`` names replaced by ``value``."""
    if isinstance(output, Tensor):
        return value
    old = first_tensor(output)
    if is_dataclass(output) and not isinstance(output, type):
        name = next(field.name for field in fields(output) if getattr(output, field.name) is old)
        setattr(output, name, value)
        return output
    return type(output)([value if item is old else item for item in output])


def modules_called(root: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    """Return the modules with one of these names or classes, by full name; not those inside another one that fits.

    Args:
        root: where to look.
        names: own names such as ``"self_attn"``, or class names such as ``"LlamaAttention"``, of a base class too.

    Raises:
        ValueError: if there is none.
    """
    wanted, found = set(names), dict[str, nn.Module]()
    for name, module in root.named_modules():
        kinds = {name.rpartition(".")[2], *(kind.__name__ for kind in type(module).__mro__)}
        if wanted & kinds and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = module
    if not found:
        kinds = {part for name, _ in root.named_modules() for part in name.split(".") if not part.isdigit()}
        raise ValueError(f"no module is called {sorted(wanted)}; there are {sorted(kinds - {''})}.")
    return found


def enclosing_layer(root: nn.Module, name: str) -> str:
    """Return the name of the innermost entry of a module list that holds the module; its own name if there is none."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        if isinstance(root.get_submodule(".".join(parts[: end - 1])), nn.ModuleList):
            return ".".join(parts[:end])
    return name


@dataclass(frozen=True)
class SiteGradients:
    """The loss of one extra forward pass and its gradient at some modules' outputs.

    Attributes:
        loss: mean loss in nats over the batch's response tokens of this rank; 0-d, detached.
        outputs: first output tensor of the sites that have trainable weights at or before them, detached.
        grads: the gradient at these, ``scale`` times; zeros where the loss does not depend on one.
        scale: the loss scaler's factor, 0-d; 1 without one.
    """

    loss: Tensor
    outputs: dict[str, Tensor]
    grads: dict[str, Tensor]
    scale: Tensor


def site_gradients(
    module: LightningModule, batch: Any, sites: Mapping[str, nn.Module], fresh_masks: bool = False
) -> SiteGradients:
    """Return loss and gradient of ``module.loss(batch)`` at the outputs of some modules, by one forward and backward.

    The pass runs under the precision of the training step, through the bare module. No gradient of a weight is
    computed, ``.grad`` is not touched, and the random state of the CPU and of the module's device comes back, also
    after an exception. Where a module runs several times, its first run counts.

    Args:
        module: a LightningModule with ``loss(batch)``, attached to a Trainer.
        batch: whatever that method takes, on the module's device.
        sites: the modules, by any name.
        fresh_masks: draw other dropout masks than the pass that follows will, instead of the same.

    Raises:
        RuntimeError: if no site has trainable weights at or before it.
    """
    plugin = module.trainer.precision_plugin
    scaler = getattr(plugin, "scaler", None)
    with same_random_state(module.device):
        if fresh_masks:
            _reseed(module.device)
        with torch.enable_grad(), plugin.forward_context(), captured(sites) as seen:
            loss = module.loss(batch)  # type: ignore[operator]
        barren: set[Any] = set()
        seen = {name: value for name, value in seen.items() if _learns(value, barren)}
        if not seen:
            raise RuntimeError(
                "site_gradients: no trainable weight lies at or before any site, so there is nothing to perturb; train"
                " weights in or before these modules, and use no reentrant checkpointing."
            )
        scale = torch.ones((), device=loss.device)
        scale = scale if scaler is None else scaler.scale(scale)
        found = torch.autograd.grad(loss if scaler is None else loss * scale, list(seen.values()), allow_unused=True)
    outputs = {name: value.detach() for name, value in seen.items()}
    grads = {n: torch.zeros_like(z) if g is None else g for (n, z), g in zip(outputs.items(), found, strict=True)}
    return SiteGradients(loss.detach(), outputs, grads, scale)


@contextmanager
def recomputed(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside the block, keep only the modules' inputs for backward, which computes the rest again.

    This is non-reentrant activation checkpointing, put on and taken off at run time; what runs under the model's own
    checkpointing already is left alone.

    Args:
        modules: such as decoder layers; none of them inside another.
    """
    with ExitStack() as stack:
        for module in modules:
            if getattr(module, "gradient_checkpointing", False):
                continue
            stack.callback(_set_forward, module, module.__dict__.get("forward"))
            _set_forward(module, partial(_checkpointed, module.forward))
        yield


def _checkpointed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def _set_forward(module: nn.Module, forward: Callable[..., Any] | None) -> None:
    if forward is None:
        del module.__dict__["forward"]
    else:
        module.__dict__["forward"] = forward


def _learns(value: Tensor, barren: set[Any]) -> bool:
    """Tell whether a trainable weight lies upstream of a tensor.

    ``requires_grad`` does not tell: with checkpointing, the embeddings are made to require a gradient as well.

    Args:
        value: part of a graph.
        barren: nodes that are known to have none upstream; extended.
    """
    stack, visited = [value.grad_fn], set()
    while stack:
        node: Any = stack.pop()
        if node is None or node in barren or node in visited:
            continue
        if isinstance(getattr(node, "variable", None), nn.Parameter):
            return True
        visited.add(node)
        stack += [upstream for upstream, _ in node.next_functions]
    barren |= visited
    return False


def _reseed(device: torch.device) -> None:
    """Go on with another random state on the CPU and on ``device``, a function of the CPU's present one."""
    seed = int(torch.randint(2**62, ()))
    torch.default_generator.manual_seed(seed)
    if device.type not in ("cpu", "meta"):
        torch.get_device_module(device).manual_seed(seed)
