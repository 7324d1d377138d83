"""The section of the frozen encoder: k-NN and probes, beside the untrained network."""

from __future__ import annotations

from iwm_fast.eval.report.dates import Dated
from iwm_fast.eval.report.drawing import Drawing, Figure, Results, interval
from iwm_fast.eval.report.page import Section, Table, percent

__all__ = ["ProbesDrawing"]


_MEASURES = (
    ("k-NN top-1", "knn"),
    ("k-NN top-1, plain votes", "knn_plain"),
    ("linear probe top-1", "linear"),
    ("linear probe top-5", "linear_top5"),
    ("attentive probe top-1", "attentive"),
    ("attentive probe top-5", "attentive_top5"),
)


class ProbesDrawing(Drawing):
    """One table of all probes, and the protocol that they share."""

    def figures(self, results: Results) -> list[Figure]:
        """The first answer of each probe."""
        del results
        return [Figure(key, title=name, form=percent) for name, key in _MEASURES if key in self.names]

    def section(self, results: Results, said: Dated) -> Section | None:
        """Return a section with one row per metric."""
        rows = _rows(results)
        if not rows:
            return None
        protocol = (
            f"Frozen {results['encoder']} encoder, {results['pooling']}, {results['train_images']} training and "
            f"{results['test_images']} test images of {results['classes']} classes. Untrained: the same network as it "
            "was before the first step. Interval by bootstrap over test images."
        )
        notes = [protocol]
        if "knn_k" in results:
            temperature = f"{results['knn_temperature']:g}"
            notes.append(f"k-NN: k = {results['knn_k']}, votes weighted by exp(cosine / {temperature}).")
        if "linear_weight_decay" in results:
            decay = f"{results['linear_weight_decay']:g}"
            notes.append(f"Linear probe: weight decay {decay}, chosen on a tenth of the training images.")
        return Section(
            said.title("The representation"),
            [Table(["", "value", "95 % interval", "untrained", "95 % interval"], rows)],
            [*notes, *said.lines(*self.names)],
        )


def _rows(results: Results) -> list[list[str]]:
    """Return one row per metric: value, interval, then both of the untrained network."""
    rows = []
    for name, key in _MEASURES:
        if results.get(key) is not None:
            cells = [name]
            for column in (key, f"{key}_untrained"):
                value = results.get(column)
                cells += ["" if value is None else percent(value), interval(results, column, percent)]
            rows.append(cells)
    return rows
