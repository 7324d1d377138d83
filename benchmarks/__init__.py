"""Benchmarks. In a checkout each module here is a program: ``python -m benchmarks.NAME --help``.

results/ holds the JSON files that they wrote; plots/ the programs that draw these; the other folders the parts that the
programs share.

Installed as ``iwm_fast.benchmarks``. Modules import each other by that name, so that each is loaded once.
"""

from pathlib import Path

# Programs also run by their old names.
__path__.append(str(Path(__file__).with_name("old_names")))
