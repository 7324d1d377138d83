"""Choose the checkpoint to resume from, and check that configuration and data are still the run's."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

from iwm_fast.config import Config
from iwm_fast.data.identity import Identity, difference, identity_of, names_digest, read_identity
from iwm_fast.data.image_list import ImageSet
from iwm_fast.data.order import FEISTEL, SHARDED, SORTED, require_order
from iwm_fast.data.sources.s3 import is_address
from iwm_fast.data.triplets import Triplets
from iwm_fast.engine.checkpoint import format as checkpoint
from iwm_fast.engine.checkpoint.format import Checkpoint, FileFault, file_fault
from iwm_fast.engine.checkpoint.paths import Named, named, whole_checkpoint
from iwm_fast.engine.distributed.ranks import Ranks, gather
from iwm_fast.engine.run_directory import RunDirectory
from iwm_fast.errors import UserError

__all__ = [
    "ListIdentity",
    "choose_checkpoint",
    "counted_images",
    "order_change",
    "order_of",
    "require_alike_lists",
    "require_data",
    "same_place",
]


class ListIdentity:
    """The identity of a list of samples, computed in a thread: sizes of a million files take seconds to minutes."""

    def __init__(self, files: ImageSet | Triplets) -> None:
        self._files = files
        self._found: Identity | None = None
        self._failed: UserError | None = None
        # A daemon: the end of the process never waits for a file system.
        self._thread = threading.Thread(target=self._find, name="iwm-fast identity", daemon=True)
        self._thread.start()

    def wait(self) -> Identity:
        """Return the identity. Raises UserError where the data are gone."""
        self._thread.join()
        if self._failed is not None:
            raise self._failed
        assert self._found is not None
        return self._found

    def soon(self, timeout_s: float) -> Identity | None:
        """Return the identity if it is known within the time."""
        self._thread.join(timeout_s)
        return self._found

    def change_since(self, saved: Checkpoint) -> str | None:
        """Return how the list differs from a checkpoint's; None where it does not, or one of them is unknown."""
        before, now = read_identity(saved.index.get("data")), self.soon(1.0)
        return difference(before, now, self._files) if before and now else None

    def _find(self) -> None:
        try:
            self._found = identity_of(self._files)
        except UserError as error:
            self._failed = error


def choose_checkpoint(
    config: Config, directory: RunDirectory, resume: str, fault: FileFault = file_fault
) -> Path | None:
    """Return the checkpoint that ``--resume`` names, None for a new run; writes nothing. fault: what hashes its files.

    Raises UserError where a new run would overwrite one, where every checkpoint is damaged, and where the configuration
    differs from the run's in a key that must not change, or from another run's in one of its training.
    """
    if resume == "never":
        if checkpoint.steps(directory.checkpoints):
            raise UserError(
                f"{directory.path}: has checkpoints already; resume with --resume auto, or choose another --out"
            )
        return None
    if resume == "auto":
        if not checkpoint.steps(directory.checkpoints):
            return None
        wanted = named(directory.path)
    else:
        wanted = named(Path(resume))
        if wanted.checkpoint is None and not (wanted.run / "checkpoints").is_dir():
            raise UserError(
                f"--resume: {resume}: no run and no checkpoint; write auto, never, or the path of a run, of its "
                "checkpoints/latest or of a step_NNNNNN there"
            )
        _require_own(wanted, directory)
    chosen = whole_checkpoint(wanted, say=lambda line: print(line, flush=True), fault=fault)
    if directory.config_file.exists():
        directory.require_same(config)
    elif _of_run(wanted, directory):
        _tell(
            f"{directory.config_file}: is missing, so the given settings are used without comparing them with the run's"
        )
    elif (other := RunDirectory(wanted.run)).config_file.exists():
        other.require_same_training(config)
    return chosen


def _of_run(wanted: Named, directory: RunDirectory) -> bool:
    return wanted.run.resolve() == directory.path.resolve()


def _require_own(wanted: Named, directory: RunDirectory) -> None:
    """Raise UserError where a run's folder with checkpoints would continue from another run's: its own would be pruned
    and replaced.
    """
    if not _of_run(wanted, directory) and checkpoint.steps(directory.checkpoints):
        raise UserError(
            f"--resume: {wanted.run} is another run, and {directory.path} has checkpoints already: resume with "
            "--resume auto, or choose another --out"
        )


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def order_of(saved: Checkpoint | None) -> str:
    """Return the order of the samples where ``data.order`` is sample: a checkpoint's, SORTED where its version recorded
    none; FEISTEL in a new run, and after a checkpoint of a run whose ``data.order`` was shard.
    """
    before = FEISTEL if saved is None else _recorded_order(saved)
    return FEISTEL if before == SHARDED else before


def counted_images(saved: Checkpoint | None, images: int) -> int:
    """Return the number of images that epochs of schedules and of intervals are counted in: a resumed run's first, or
    the learning rate would move with each image that is added.
    """
    if saved is None:
        return images
    return int(saved.index.get("counted_images", saved.index.get("images", images)))


def order_change(saved: Checkpoint, order: str, streams: Mapping[str, object] | None) -> str | None:
    """Return how the order of the samples differs from a checkpoint's, in words; None where it does not.

    order, streams: those of the training's stream. Within a run ``data.order`` and its keys stay
    (`RunDirectory.require_same`); a new run may resume another's checkpoint with others, and shards may change.
    """
    before, facts = _recorded_order(saved), saved.index.get("streams")
    if (before == SHARDED) != (order == SHARDED):
        named = ["shard" if kind == SHARDED else "sample" for kind in (before, order)]
        return f"data.order was {named[0]} and is {named[1]} now"
    if streams is None or not isinstance(facts, Mapping):
        return None
    names = {"streams": "data.streams was", "window": "data.shuffle_window was", "shards": "the number of shards was"}
    for key, words in names.items():
        if facts.get(key) != streams[key]:
            return f"{words} {facts.get(key)} and is {streams[key]} now"
    return None if facts.get("sizes") == streams["sizes"] else "shards hold other numbers of samples now"


def _recorded_order(saved: Checkpoint) -> str:
    return require_order(str(saved.index.get("order", SORTED)), str(saved.path))


def require_data(
    config: Config, directory: RunDirectory, chosen: Path, files: ImageSet | Triplets, identity: ListIdentity
) -> str | None:
    """Return a line where the data moved and are the same. Raises UserError where they differ or cannot be compared.

    The run's own folder may have changed, which `ListIdentity.change_since` reports: somebody fixed a broken image.
    """
    before = directory.recorded()
    if before is None or same_place(before, config):
        return None
    moved = f"data.root was {before.data.root} and is {config.data.root} now"
    recorded = read_identity(Checkpoint(chosen).index.get("data"))
    if recorded is None:
        raise UserError(
            f"{moved}, and {chosen} is of a version that did not record its data: resume with "
            f"data.root={before.data.root}, or start a new --out"
        )
    wrong = difference(recorded, identity.wait(), files)
    if wrong is not None:
        raise UserError(
            f"{moved}, and these are other data ({wrong}): give the same files, or start a new --out "
            f"with --resume {directory.path}"
        )
    return f"{moved}: the same {len(files)} samples"


def require_alike_lists(files: ImageSet | Triplets, ranks: Ranks) -> None:
    """Raise UserError on every rank unless all list the same samples: each reads its share of one order by index."""
    if ranks.world == 1:
        return
    found = gather(names_digest(files), ranks.world, ranks.control)
    for info, other in zip(ranks.infos, found, strict=True):
        if other != found[0]:
            raise UserError(
                f"{info.name} lists {other[0]} samples below data.root, {ranks.infos[0].name} {found[0][0]}"
                f"{' others' if other[0] == found[0][0] else ''}: give every host the same files"
            )


def same_place(before: Config, now: Config) -> bool:
    """Return whether two configurations name one place: trailing slashes, "./" and links make no difference."""
    if before.data.source != now.data.source:
        return False
    one, other = before.data.root or "", now.data.root or ""
    if is_address(one) or is_address(other):
        return one.rstrip("/") == other.rstrip("/")
    if os.path.normpath(one) == os.path.normpath(other):
        return True
    return os.path.exists(one) and os.path.exists(other) and Path(one).samefile(other)  # noqa: PTH110  (two texts)
