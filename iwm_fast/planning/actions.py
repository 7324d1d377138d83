"""How long the action's vector is, before there is any data."""

from __future__ import annotations

from iwm_fast.actions import ActionSpace
from iwm_fast.config import ActionsConfig
from iwm_fast.errors import UserError

__all__ = ["action_dim"]


def action_dim(actions: ActionsConfig) -> int:
    """Components of the vector. UserError for external actions that are not described: only a manifest says."""
    if actions.groups != ("external",):
        return ActionSpace(actions.groups, actions.form).dim
    if actions.external is None:
        raise UserError("actions.external is not set: to plan, name the actions as docs/triplets.md describes them")
    return len(actions.external.names)
