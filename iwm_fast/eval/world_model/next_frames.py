"""MRR on triplets: given the player's action, does the predictor find the next frame among other next frames?

The bank holds `bank` next frames of the set, in a random order that depends on the seed alone, no two with the same
pixels. The queries are as many triplets, the first in that order that differ in source, action or next frame. The
source, with its earlier frames where the model has a history, is encoded without a mask, the predictor predicts all
patches given the action, and the whole bank is ranked by distance to the prediction. Ranks, ties and distances are
those of `mrr`; chance is H_n / n. A set with fewer distinct next frames, or triplets, has a smaller bank, or fewer
queries.

Controls share source, bank and correct frame. ``shuffled`` is given the action of another query (a rotation of the
random order; with few choices some get their own action, which is counted). ``neutral`` is given the zero vector: no
choice, or each component at its neutral value. ``bypass`` uses the representation of the source's last frame as the
prediction, as if it were copied.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from iwm_fast.data.order import sorted_order
from iwm_fast.data.triplet_windows import windows
from iwm_fast.errors import UserError
from iwm_fast.eval.features import EncoderName, device_of, evaluating
from iwm_fast.eval.stats import bootstrap_interval
from iwm_fast.eval.world_model.distances import DISTANCES, between, points, ties
from iwm_fast.eval.world_model.frames import FrameReader
from iwm_fast.eval.world_model.mrr import CONTROLS, MrrResult, bank_points, mean_ranks
from iwm_fast.models.blocks import layer_norm_rows
from iwm_fast.models.iwm import IWM
from iwm_fast.models.window import encode_window

__all__ = ["NextFrames", "draw_next_frames", "rank_next_frames", "summarise_next_frames"]

PROTOCOL = (
    "The bank holds {bank} distinct next frames sampled from the set. For each of {queries} distinct triplets the "
    "source frame is encoded, the predictor predicts all patches given the true action, and the bank is ranked by the "
    "distance of each frame's representation to the prediction. Mean of 1 / rank of the true next frame; interval by "
    "bootstrap over queries; chance is H_n / n. Distance: L2 over all tokens."
)


@dataclass(frozen=True)
class NextFrames:
    """Q queries and a bank of N. rows: int64 (Q,), triplets; source: uint8 (Q, H, S, S, 3), H frames each, the oldest
    first; actions: float32 (Q, A); bank: uint8 (N, S, S, 3); truth: int64 (Q,), index in the bank of each query's next
    frame.
    """

    rows: NDArray[np.int64]
    source: Tensor
    actions: Tensor
    bank: Tensor
    truth: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.rows)


def draw_next_frames(reader: FrameReader, bank: int, *, history: int = 1, seed: int = 0) -> NextFrames:
    """Return at most `bank` distinct next frames and as many distinct queries, in random order.

    history: frames of a source.

    Raise UserError if the set has fewer than two decodable ones of either.
    """
    triplets = reader.triplets
    frames = np.concatenate([windows(triplets, history), triplets.target[:, None]], axis=1)
    order, vectors = sorted_order(seed, 0, len(triplets)), triplets.vectors()
    places: dict[bytes, int] = {}  # index in the bank by a frame's pixels
    asked: dict[tuple[bytes, bytes, int], int] = {}  # rows, by source, action and next frame
    sources: list[Tensor] = []
    targets: list[Tensor] = []
    for first in range(0, len(order), bank):
        part = order[first : first + bank]
        pictures, good = reader.read(frames[part].reshape(-1))
        seen = pictures.unflatten(0, (len(part), history + 1))
        for place in np.flatnonzero(good.reshape(-1, history + 1).all(axis=1)).tolist():
            source, target, row = seen[place, :-1], seen[place, -1], int(part[place])
            pixels = target.numpy().tobytes()
            if pixels not in places:
                if len(places) == bank:
                    continue
                places[pixels] = len(places)
                targets.append(target)
            query = source.numpy().tobytes(), vectors[row].tobytes(), places[pixels]
            if query not in asked and len(asked) < bank:
                asked[query] = row
                sources.append(source)
        if len(places) == len(asked) == bank:
            break
    if min(len(places), len(asked)) < 2:
        why = "".join(f"; {path}: {reason}" for path, reason in list(reader.bad.items())[:3])
        raise UserError(f"{triplets.manifest}: fewer than two distinct next frames to rank{why}")
    rows = np.array(list(asked.values()), np.int64)
    truth = np.array([place for *_, place in asked], np.int64)
    return NextFrames(rows, torch.stack(sources), torch.from_numpy(vectors[rows]), torch.stack(targets), truth)


def shuffled_actions(frames: NextFrames) -> Tensor:
    """Return the action of the next query in the random order."""
    return torch.roll(frames.actions, -1, dims=0)


def rank_next_frames(
    model: IWM,
    frames: NextFrames,
    *,
    normalize: bool,
    bypass: EncoderName = "context",
    chunk: int = 64,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[MrrResult, dict[str, NDArray[np.float64]]]:
    """Return the ranks, (Q, 1) each, and the L2 distances (Q, N) by what was ranked, one row per query.

    normalize, bypass: the configuration's normalize_target, and `bypass_encoder`. The model's mode is unchanged.
    """
    device = device_of(model)
    answers: dict[str, dict[str, list[np.ndarray]]] = {d: {w: [] for w in ("model", *CONTROLS)} for d in DISTANCES}
    with evaluating(model):
        bank = bank_points(model, frames.bank.to(device), chunk)
        told = (frames.actions, shuffled_actions(frames), torch.zeros_like(frames.actions))
        for rows in torch.arange(len(frames)).split(chunk):
            source = frames.source[rows].to(device)
            z = encode_window(model, source)
            found = {
                what: model.predict(z, actions[rows].to(device)).float()
                for what, actions in zip(("model", "shuffled", "neutral"), told, strict=True)
            }
            own = model.encode(source[:, -1], bypass) if bypass != "context" else z.chunk(source.shape[1], dim=1)[-1]
            found["bypass"] = layer_norm_rows(own).float() if normalize else own.float()
            for what, answer in found.items():
                for name, far in between(points(answer), bank).items():
                    answers[name][what].append(far.cpu().numpy())
            if progress is not None:
                progress(int(rows[-1]) + 1, len(frames))
    truth, near = frames.truth, ties(bank)
    distances = {d: {what: np.concatenate(parts) for what, parts in by.items()} for d, by in answers.items()}
    ranks = {
        d: {what: mean_ranks(rows, truth, near[d])[:, None] for what, rows in by.items()} for d, by in distances.items()
    }
    return MrrResult(ranks, len(frames.bank)), distances["l2"]


def summarise_next_frames(frames: NextFrames, found: MrrResult) -> dict[str, Any]:
    """Return names and values like `MrrResult.summary`, with the gain from the true action.

    mrr_gain: the mean over queries of 1 / rank given the true action, minus 1 / rank given the shuffled one, with its
    interval. mrr_shuffled_same: the share of queries whose shuffled action is their own.
    """
    gain = (1 / found.ranks["l2"]["model"] - 1 / found.ranks["l2"]["shuffled"])[:, 0]
    same = (frames.actions == shuffled_actions(frames)).all(dim=1)
    return found.summary() | {
        "mrr_gain": float(gain.mean()),
        "mrr_gain_interval": list(bootstrap_interval(gain)),
        "mrr_shuffled_same": float(same.double().mean()),
        "mrr_protocol": PROTOCOL.format(bank=len(frames.bank), queries=len(frames)),
    }
