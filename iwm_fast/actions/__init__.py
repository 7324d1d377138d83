"""Actions: transformations of an image, or recorded ones."""

from iwm_fast.actions.space import ActionSpace as ActionSpace
from iwm_fast.actions.transforms import *  # noqa: F403
