"""Images that an evaluation leaves out of a split because they are unusable: counted, named with reasons, limited."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from iwm_fast.errors import UserError
from iwm_fast.file_names import printable

__all__ = ["LeftOut", "left_out_lines"]

_NAMED = 10


class LeftOut:
    """Unusable images of the split at ``place``, by file.

    ``total``: images of the split; ``max_fraction``: data.max_bad_fraction, the share of them that may be left out;
    ``unlabelled``: images beside them without a label, which are not in the split.
    """

    def __init__(self, place: str, total: int, max_fraction: float, *, unlabelled: int = 0) -> None:
        self.place, self.total, self.max_fraction, self.unlabelled = place, total, max_fraction, unlabelled
        self.reasons: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self.reasons)

    def check(self) -> None:
        """Raise UserError if more than the allowed share of the split is left out, naming the first ten."""
        if len(self) > self.max_fraction * self.total:
            raise UserError(
                f"{printable(self.place)}: {len(self)} of {self.total} images cannot be used, more than "
                f"data.max_bad_fraction ({self.max_fraction:g}) allows: {_first(self.reasons)}. Mend or remove them, "
                "or raise the limit"
            )

    def require_classes(self, labels: NDArray[Any] | None, left: NDArray[Any], classes: tuple[str, ...]) -> None:
        """Raise UserError if a class of ``labels`` is missing in ``left``, the labels of usable images."""
        if labels is None or labels.ndim != 1:
            return
        gone = np.setdiff1d(labels, left)
        if len(gone):
            count = int((labels == gone[0]).sum())
            more = f", and so it is with {len(gone) - 1} more classes" if len(gone) > 1 else ""
            raise UserError(
                f"{printable(self.place)}: none of the {count} images of class {printable(classes[gone[0]])} can be "
                f"used{more}: {_first(self.reasons)}. Mend them, or remove the class from both splits"
            )

    def merge(self, other: LeftOut) -> None:
        """Add what was left out of another part of the same split."""
        self.reasons |= other.reasons

    def record(self) -> dict[str, Any]:
        """Return a record for JSON: {count, of, files: [{file, reason}], unlabelled}, the files sorted."""
        files = [{"file": file, "reason": reason} for file, reason in sorted(self.reasons.items())]
        return {"count": len(files), "of": self.total, "files": files, "unlabelled": self.unlabelled}


def left_out_lines(left_out: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return lines for each split with left-out images, from the `LeftOut.record` under its name."""
    lines = []
    for name, found in left_out.items():
        if found["count"]:
            files = {one["file"]: one["reason"] for one in found["files"]}
            lines.append(f"{printable(name)}: {found['count']} of {found['of']} images left out: {_first(files)}")
        if found.get("unlabelled"):
            lines.append(f"{printable(name)}: {found['unlabelled']} images without a label left out")
    return lines


def _first(reasons: Mapping[str, str]) -> str:
    named = "; ".join(printable(f"{file} ({reason})") for file, reason in list(reasons.items())[:_NAMED])
    return named + (f"; and {len(reasons) - _NAMED} more" if len(reasons) > _NAMED else "")
