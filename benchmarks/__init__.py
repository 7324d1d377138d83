"""Measurements: in a checkout each module is a program, ``python -m benchmarks.NAME --help``; results/ has its files.

Installed as ``iwm_fast.benchmarks``, which is the name that modules import each other by, so that each is loaded once.
"""
