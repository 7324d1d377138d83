"""What an action is: transformations of an image, or what somebody else recorded."""

from iwm_fast.actions.transforms import *  # noqa: F403
from iwm_fast.actions.transforms import __all__ as __all__
