"""``python -m iwm_fast``: the same as the command ``iwm-fast``, for launchers such as torchrun."""

from __future__ import annotations

from iwm_fast.cli.main import main

__all__: list[str] = []

if __name__ == "__main__":
    raise SystemExit(main())
