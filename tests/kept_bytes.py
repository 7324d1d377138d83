"""What a forward pass really keeps for its backward pass, seen by autograd's own hooks."""

from __future__ import annotations

import numpy as np
import torch

from iwm_fast.actions import ActionSpace
from iwm_fast.config import Config
from iwm_fast.models import IWM, Segments


def kept_bytes(config: Config, context: list[int], predicted: list[int]) -> int:
    """Bytes of all memory behind the saved tensors, each storage once, weights and buffers left out."""
    space = ActionSpace(config.actions.groups, config.actions.form)
    model = IWM(config.model, space.dim, activation_checkpointing=config.train.activation_checkpointing)
    weights = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage  # held, so that no address is used twice
        return tensor

    images = torch.zeros(len(context), config.model.image, config.model.image, 3, dtype=torch.uint8)
    rows = [torch.cat([torch.arange(n) for n in counts]) for counts in (context, predicted)]
    segments = [Segments.from_lengths(np.array(counts)) for counts in (context, predicted)]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(images, images, torch.ones(len(context), space.dim), rows[0], segments[0], rows[1], segments[1])
    return sum(storage.nbytes() for storage in kept.values())
