"""Games of gymnasium: made, drawn and played the same way for a recording and for a planner.

Importing this package registers `iwm_fast/PointMassWalls-v0`, if gymnasium is installed (`iwm-fast[games]`).
"""

from __future__ import annotations

from importlib.util import find_spec

__all__ = ["POINT_MASS", "POINT_MASS_STEPS"]

POINT_MASS = "iwm_fast/PointMassWalls-v0"
POINT_MASS_STEPS = 30  # an episode's limit; the longest way round the wall takes about 15 at full speed

if find_spec("gymnasium") is not None:
    import gymnasium

    if POINT_MASS not in gymnasium.registry:
        gymnasium.register(
            POINT_MASS, entry_point="iwm_fast.games.point_mass:PointMassWalls", max_episode_steps=POINT_MASS_STEPS
        )
