"""Hooks that read, replace or shift layer inputs and outputs, and the loss gradient at layer outputs.

Every hook is removed when its block ends, also after an exception.
"""

import sys
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

# Arguments of a decoder layer that hold the cache of keys and values, with the value that turns it off.
NO_CACHE = {"past_key_values": None, "past_key_value": None, "layer_past": None, "use_cache": False}
ATTENTION = ("self_attn", "attn", "attention", "self_attention")  # what attention is called in decoder layers


@contextmanager
def hooked(modules: Mapping[str, nn.Module], hook: Callable[[str, Any], Any], inputs: bool = False) -> Iterator[None]:
    """Call ``hook(name, value)`` with each module's output inside the block.

    A value that the hook returns replaces the output; None leaves the output unchanged. Under non-reentrant
    checkpointing, the hooks run again when backward recomputes the forward pass. If a hook changes a value, the block
    must therefore span the backward pass.

    Args:
        modules: the modules, by any name.
        hook: called with the name and the first tensor of the output (or the input), ``[batch, tokens, hidden]``.
        inputs: act on the first positional input instead of the output.
    """
    with ExitStack() as stack:
        _run_eagerly(stack)
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
    """Yield a dictionary that fills with each module's first output tensor.

    If a module runs several times, its first call counts. Outputs that backward recomputes under checkpointing are
    later calls, so they are ignored.
    """
    outputs: dict[str, Tensor] = {}

    def keep(name: str, value: Tensor) -> None:
        outputs.setdefault(name, value)

    with hooked(modules, keep):
        yield outputs


@contextmanager
def shifted(modules: Mapping[str, nn.Module], shifts: Mapping[str, Tensor]) -> Iterator[None]:
    """Add ``shifts[name]`` to the output of each named module inside the block.

    Each shift has the shape of its module's output.
    """
    with hooked({name: modules[name] for name in shifts}, lambda name, value: value + shifts[name]):
        yield


@contextmanager
def branched(modules: Mapping[str, nn.Module], branch: Callable[[str, Tensor], Tensor]) -> Iterator[None]:
    """Add ``branch(name, input)`` to the output of each named module inside the block.

    Args:
        modules: the modules, by any name.
        branch: called with the name and the first positional input; returns a tensor of the output's shape.
    """
    with ExitStack() as stack:
        _run_eagerly(stack)
        for name, module in modules.items():

            def after(_: nn.Module, args: tuple[Any, ...], output: Any, name: str = name) -> Any:
                return with_first_tensor(output, first_tensor(output) + branch(name, args[0]))

            stack.callback(module.register_forward_hook(after).remove)
        yield


def first_tensor(output: Any) -> Tensor:
    """Return the first tensor of a layer's output.

    The output is a tensor itself, or a tuple, list or dataclass that contains a tensor.

    Raises:
        TypeError: if the output contains no tensor.
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
    """Return the layer output with the tensor that ``first_tensor`` returns replaced by ``value``.

    A dataclass is changed in place; a tuple or list is copied.
    """
    if isinstance(output, Tensor):
        return value
    old = first_tensor(output)
    if is_dataclass(output) and not isinstance(output, type):
        name = next(field.name for field in fields(output) if getattr(output, field.name) is old)
        setattr(output, name, value)
        return output
    return type(output)([value if item is old else item for item in output])


def modules_called(root: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    """Return the modules with one of these names or classes, by full name.

    A module inside another matching module is left out.

    Args:
        root: module to search.
        names: module names such as ``"self_attn"``, or class names such as ``"LlamaAttention"``. The name of a base
            class matches too.

    Raises:
        ValueError: if no module matches.
    """
    wanted, matches = set(names), dict[str, nn.Module]()
    for name, module in root.named_modules():
        kinds = {name.rpartition(".")[2], *(kind.__name__ for kind in type(module).__mro__)}
        # named_modules yields a module before its children, so an outer match is in the dictionary already.
        if wanted & kinds and not any(name.startswith(f"{outer}.") for outer in matches):
            matches[name] = module
    if not matches:
        kinds = {part for name, _ in root.named_modules() for part in name.split(".") if not part.isdigit()}
        raise ValueError(f"no module is called {sorted(wanted)}; there are {sorted(kinds - {''})}.")
    return matches


def enclosing_layer(root: nn.Module, name: str) -> str:
    """Return the name of the innermost module-list entry that is or contains the module.

    If no module list contains the module, its own name is returned.
    """
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        if isinstance(root.get_submodule(".".join(parts[: end - 1])), nn.ModuleList):
            return ".".join(parts[:end])
    return name


@dataclass(frozen=True)
class SiteGradients:
    """The loss of one extra forward pass and its gradient at the outputs of chosen modules.

    Attributes:
        loss: mean loss in nats over the batch's response tokens of this rank; 0-d, detached.
        outputs: first output tensor of each site that has trainable weights at or before it, detached.
        grads: gradient at these outputs, multiplied by ``scale``; zeros if the loss does not depend on the output.
        scale: factor of the loss scaler, 0-d; 1 without a loss scaler.
    """

    loss: Tensor
    outputs: dict[str, Tensor]
    grads: dict[str, Tensor]
    scale: Tensor


def site_gradients(
    module: LightningModule, batch: Any, sites: Mapping[str, nn.Module], fresh_masks: bool = False
) -> SiteGradients:
    """Return the loss ``module.loss(batch)`` and its gradient at the outputs of ``sites``.

    One forward and one backward pass run under the precision of the training step. They run on the module itself, not
    on a strategy's wrapper. No weight gradient is computed, and ``.grad`` is not touched. The random state of the CPU
    and of the module's device is restored, also after an exception. If a module runs several times, its first run
    counts.

    Args:
        module: a LightningModule with ``loss(batch)``, attached to a Trainer.
        batch: argument of that method, on the module's device.
        sites: the modules, by any name.
        fresh_masks: draw other dropout masks than the pass that follows; by default both passes draw the same masks.

    Raises:
        RuntimeError: if no site has trainable weights at or before it.
    """
    plugin = module.trainer.precision_plugin
    scaler = getattr(plugin, "scaler", None)
    with same_random_state(module.device):
        if fresh_masks:
            _reseed(module.device)
        with torch.enable_grad(), plugin.forward_context(), captured(sites) as graph_outputs:
            loss = module.loss(batch)  # type: ignore[operator]
        frozen_nodes: set[Any] = set()
        graph_outputs = {name: value for name, value in graph_outputs.items() if _learns(value, frozen_nodes)}
        if not graph_outputs:
            raise RuntimeError(
                "site_gradients: no trainable weight lies at or before any site, so no site has a gradient. Train"
                " weights in or before these modules, and do not use reentrant checkpointing."
            )
        scale = torch.ones((), device=loss.device)
        scale = scale if scaler is None else scaler.scale(scale)
        raw = torch.autograd.grad(
            loss if scaler is None else loss * scale, list(graph_outputs.values()), allow_unused=True
        )
    outputs = {name: value.detach() for name, value in graph_outputs.items()}
    # autograd returns None for an output that the loss does not depend on.
    grads = {n: torch.zeros_like(z) if g is None else g for (n, z), g in zip(outputs.items(), raw, strict=True)}
    return SiteGradients(loss.detach(), outputs, grads, scale)


@contextmanager
def recomputed(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Apply non-reentrant activation checkpointing to the modules inside the block.

    Forward stores only the modules' inputs for backward, and backward recomputes the rest. A module that runs under the
    model's own checkpointing is left unchanged.

    Args:
        modules: such as decoder layers; no module may lie inside another.
    """
    with ExitStack() as stack:
        _run_eagerly(stack)
        for module in modules:
            if getattr(module, "gradient_checkpointing", False):
                continue
            # An instance's own ``forward`` hides the class's; None means that it had none before.
            stack.callback(_set_forward, module, module.__dict__.get("forward"))
            _set_forward(module, partial(_checkpointed, module.forward))
        yield


def _checkpointed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    # Backward runs the layer a second time, and a cache of keys and values would grow with every run.
    without_cache = {name: value for name, value in NO_CACHE.items() if name in kwargs}
    return checkpoint(forward, *args, use_reentrant=False, **{**kwargs, **without_cache})


def _run_eagerly(stack: ExitStack) -> None:
    """Let ``torch.compile``d modules run uncompiled until the stack closes.

    Compiled code leaves out the hooks that are set after its compilation.
    """
    if "torch._dynamo" in sys.modules:  # without it nothing is compiled
        stack.enter_context(torch.compiler.set_stance("force_eager"))


def _set_forward(module: nn.Module, forward: Callable[..., Any] | None) -> None:
    if forward is None:
        del module.__dict__["forward"]
    else:
        module.__dict__["forward"] = forward


def _learns(value: Tensor, frozen_nodes: set[Any]) -> bool:
    """Tell whether a trainable weight lies upstream of a tensor.

    ``requires_grad`` does not answer this: checkpointing makes the embeddings require a gradient as well.

    Args:
        value: tensor in an autograd graph.
        frozen_nodes: autograd nodes known to have no trainable weight upstream; extended in place.
    """
    stack, visited = [value.grad_fn], set()
    while stack:
        node: Any = stack.pop()
        if node is None or node in frozen_nodes or node in visited:
            continue
        if isinstance(getattr(node, "variable", None), nn.Parameter):
            return True  # a leaf node (AccumulateGrad) refers to its parameter as ``variable``
        visited.add(node)
        stack += [upstream for upstream, _ in node.next_functions]
    frozen_nodes |= visited
    return False


def _reseed(device: torch.device) -> None:
    """Replace the random state of the CPU and of ``device`` by one derived from the CPU's present state."""
    seed = int(torch.randint(2**62, ()))
    torch.default_generator.manual_seed(seed)
    if device.type not in ("cpu", "meta"):
        torch.get_device_module(device).manual_seed(seed)
