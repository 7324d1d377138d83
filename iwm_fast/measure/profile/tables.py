"""Rows of the profile: what each operator and module took, did and moved, against what the machine can do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from iwm_fast.measure.operations import Work
from iwm_fast.measure.profile.limits import Limits
from iwm_fast.measure.profile.trace import ModuleTime

__all__ = ["markdown", "module_rows", "operator_rows"]

_SHOWN = 40
_MODULE_DEPTH = 3  # of a path such as encoder.blocks.0


def _shares(seconds: float, work: Work, limits: Limits, peak: float | None) -> dict[str, float | None]:
    return {
        "roofline_share": limits.share(seconds, work),
        "mfu": work.operations / seconds / peak if peak and seconds else None,
    }


def operator_rows(
    times: Mapping[str, tuple[float, float]], whole: Mapping[str, float], work: Mapping[str, Work], limits: Limits,
    peak: float | None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Return one row per operator, the longest first; its own seconds, calls, operations and bytes per step.

    whole: seconds with what it calls, of the calls whose work was counted, which the shares refer to.
    """
    rows = []
    for name, (seconds, calls) in sorted(times.items(), key=lambda item: -item[1][0]):
        mine = work.get(name, Work())
        rows.append(
            {
                "name": name, "seconds": seconds, "calls": calls, "operations": mine.operations, "bytes": mine.bytes,
                "counted_seconds": whole.get(name, 0.0), **_shares(whole.get(name, 0.0), mine, limits, peak),
            }
        )  # fmt: skip
    return rows


def module_rows(
    times: Mapping[str, ModuleTime], work: Mapping[str, Work], limits: Limits, peak: float | None
) -> list[dict[str, Any]]:
    """A module a row, in the model's order, each with its parts: so rows of a path contain those below it."""
    rows = []
    for name, time in times.items():
        if name.count(".") >= _MODULE_DEPTH:
            continue
        mine, seconds = work.get(name, Work()), time.forward + time.backward
        rows.append(
            {
                "name": name, "calls": time.calls, "forward_s": time.forward, "backward_s": time.backward,
                "operations": mine.operations, "bytes": mine.bytes, **_shares(seconds, mine, limits, peak),
            }
        )  # fmt: skip
    return rows


def _sources(document: Mapping[str, Any]) -> str:
    sources = document["sources_per_target"]
    return f" with {sources} sources each" if sources > 1 else ""


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def markdown(document: Mapping[str, Any]) -> str:
    """The profile as a page."""
    step = document["parts_step_s"]
    lines = [
        "# Profile",
        "",
        f"A step of {document['images']} images{_sources(document)}: {document['step_s'] * 1e3:.2f} ms in the median.",
    ]
    lines += [f"In parts, the middle one of as many steps: {step * 1e3:.2f} ms.", ""]
    lines += ["| part | ms | of the step |", "|---|---|---|"]
    lines += [f"| {name} | {s * 1e3:.3f} | {s / step:.1%} |" for name, s in document["parts_s"].items()]
    lines += [f"| all parts | {document['parts_sum_s'] * 1e3:.3f} | {document['parts_sum_s'] / step:.1%} |", ""]
    lines += [
        "Of the roofline: the time at the limits measured in the same run, over the time measured, per call;",
        "– where a call moves and computes nothing, or beats the limits (data in a cache).",
        "",
    ]
    lines += ["| module | calls | forward, ms | backward, ms | GFLOP | MB | of the roofline | MFU |", "|---" * 8 + "|"]
    lines += [
        f"| {r['name']} | {r['calls']:g} | {r['forward_s'] * 1e3:.3f} | {r['backward_s'] * 1e3:.3f} "
        f"| {r['operations'] / 1e9:.3f} | {r['bytes'] / 1e6:.1f} | {_share(r['roofline_share'])} | {_share(r['mfu'])} |"
        for r in document["modules"]
    ]
    lines += ["", "| operator | calls | ms | GFLOP | MB | of the roofline | MFU |", "|---" * 7 + "|"]
    lines += [
        f"| {r['name']} | {r['calls']:g} | {r['seconds'] * 1e3:.3f} | {r['operations'] / 1e9:.3f} "
        f"| {r['bytes'] / 1e6:.1f} | {_share(r['roofline_share'])} | {_share(r['mfu'])} |"
        for r in document["operators"][:_SHOWN]
    ]
    if document["kernels"]:
        lines += ["", "| GPU kernel | calls | ms |", "|---|---|---|"]
        lines += [f"| {r['name']} | {r['calls']:g} | {r['seconds'] * 1e3:.3f} |" for r in document["kernels"][:_SHOWN]]
    return "\n".join(lines) + "\n"
