"""Steps whose loss and gradients are not finite."""

from __future__ import annotations

from iwm_fast.engine.step import Trainer


def poison(monkeypatch, steps, factor=float("nan")):
    """Multiply the losses of the given steps, counted from 1, by `factor`: their gradients are not finite either."""
    plain = Trainer._forward

    def poisoned(self, batch):
        output = plain(self, batch)
        if self.step + 1 in steps:
            object.__setattr__(output, "loss", output.loss * factor)
        return output

    monkeypatch.setattr(Trainer, "_forward", poisoned)
