"""The sections of a configuration: each key with its type, unit, allowed range and meaning, and nowhere else.

`iwm_fast.config.schema` joins them, with the checks across them.
"""
