"""What an action is: transformations of an image, or what somebody else recorded."""

from iwm_fast.actions.space import ActionSpace as ActionSpace
from iwm_fast.actions.transforms import *  # noqa: F403
