"""Measurements: in a checkout each module here is a program, ``python -m benchmarks.NAME --help``.

results/ has the files that they wrote, plots/ the programs that draw from these; the other folders are what programs
are made of.

Installed as ``iwm_fast.benchmarks``, which is the name that modules import each other by, so that each is loaded once.
"""

from pathlib import Path

# `python -m` runs programs by their old names too.
__path__.append(str(Path(__file__).with_name("old_names")))
