"""Write the generated pages: ``python -m tools.documentation``."""

from __future__ import annotations

from tools.documentation.pages import write

for path in write():
    print(path)
