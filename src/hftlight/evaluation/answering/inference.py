"""A model put to rest for a measurement, and given back as it was."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Run the block with models in evaluation mode and without gradients; every module's own mode comes back."""
    modes = {module: module.training for model in models for module in model.modules()}
    for model in models:
        model.eval()
    try:
        # Not inference mode: buffers that a rotary embedding renews in here are used in training later.
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
