"""Weight decay per parameter: one rule for pretraining, finetuning and the cost model.

The rule goes by a parameter's role, not its shape: a bias may have two dimensions (`ActionTokens`), and ZeRO stage 3
flattens all of them. Weights of linear maps decay. Biases, scales and shifts of normalisations, learned positions and
learned tokens (prefix, mask and task tokens, an attentive head's query) do not, as in MAE and I-JEPA.
"""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from iwm_fast.models.blocks import StreamNorm

__all__ = ["DECAYED", "UNDECAYED", "decayed_parameters"]

DECAYED = frozenset({"weight", "w_in", "w_out", "w_action"})
UNDECAYED = frozenset(
    {"bias", "b_in", "b_out", "norm_weight", "norm_bias", "mask_token", "query", "prefix", "pos_embed", "time_embed"}
)
# Modules without decay: normalisations, and `Reader.task_tokens`.
_WHOLLY_UNDECAYED = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, _NormBase, StreamNorm, nn.ParameterDict, nn.ParameterList)


def decayed_parameters(model: nn.Module) -> dict[str, bool]:
    """Return whether weight decay applies to each parameter, by name, in the order of ``named_parameters``.

    Raises:
        ValueError: an unknown parameter; add its name to one of the two lists.

    """
    modules = dict(model.named_modules())
    found = {}
    for path, _ in model.named_parameters():
        owner, _, name = path.rpartition(".")
        if isinstance(modules[owner], _WHOLLY_UNDECAYED):
            found[path] = False
        elif name in DECAYED or name in UNDECAYED:
            found[path] = name in DECAYED
        else:
            raise ValueError(f"{path} is neither decayed nor not; put {name!r} on a list of {__name__}")
    return found
