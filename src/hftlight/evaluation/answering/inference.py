"""Evaluation mode for the duration of a measurement."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Run the block with models in evaluation mode and without gradients, then restore each module's mode."""
    modes = {module: module.training for model in models for module in model.modules()}
    for model in models:
        model.eval()
    try:
        # Not torch.inference_mode: a rotary embedding may renew its buffers here, and training uses them later.
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
