"""Defaults of evaluations that the command line's help names; loads no torch."""

__all__ = ["CACHE_LIMIT_GB", "COMPONENT_IMAGES"]

# Of a folder of cached features. Free space would be no limit: it says nothing of a quota on a shared file system.
CACHE_LIMIT_GB = 8.0
# Single-component banks take 1.3 core seconds per image and component at vit_tiny_p4_32.yaml, which has four.
COMPONENT_IMAGES = 8
