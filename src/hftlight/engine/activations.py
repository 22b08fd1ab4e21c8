"""Layer inputs and outputs read, chosen or shifted through hooks that always come off."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor, nn


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
