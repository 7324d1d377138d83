from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from worlds import pictures, tiny_config, tiny_model

from iwm_fast.config import ActionsConfig, Config, DataConfig, EvalConfig
from iwm_fast.errors import UserError
from iwm_fast.eval.evaluate import evaluate_model
from iwm_fast.eval.online import join_left_out, join_shares, measure_share
from iwm_fast.eval.splits import open_splits

CPU = Config(**(dict(tiny_config()) | {"data": DataConfig(device="cpu", threads=1)}))
LENIENT = Config(**(dict(CPU) | {"data": DataConfig(device="cpu", threads=1, max_bad_fraction=1.0)}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Write two classes, dark and light, as PNGs of the model's own size."""
    root = tmp_path_factory.mktemp("pictures")
    for part, count, seed in (("train", 31, 0), ("test", 11, 1)):
        for label, name in enumerate(("dark", "light")):
            (root / part / name).mkdir(parents=True)
            for i, image in enumerate(pictures(count, seed + 10 * label)):
                Image.fromarray((image // 2 + 90 * label).numpy()).save(root / part / name / f"{i:02d}.png")
    return root


def measured(folder, world, config=CPU):
    model, space = tiny_model(config)
    return [measure_share(model, config, space, folder, rank=rank, world=world) for rank in range(world)]


def test_the_figures_do_not_depend_on_the_number_of_ranks(folder):
    """Three images are ranked: with five ranks two have none."""
    one = join_shares(measured(folder, 1), CPU.eval.bank)
    assert set(one) == {"mrr", "mrr_shuffled", "mrr_chance", "knn", "knn_chance"}
    assert one["knn"] > 0.9  # light and dark
    for world in (2, 3, 5):
        shares = measured(folder, world)
        assert join_shares(shares, CPU.eval.bank) == one
        assert join_shares(shares[::-1], CPU.eval.bank)["mrr"] == one["mrr"]
        assert [len(share.test[1]) for share in shares] == [len(range(rank, 22, world)) for rank in range(world)]


def test_a_share_is_what_a_whole_evaluation_finds(folder):
    model, space = tiny_model(CPU)
    train, test = open_splits(folder, CPU)
    whole = evaluate_model(model, CPU, space, train=train, test=test, what=("mrr", "knn"), untrained=False)
    joined = join_shares(measured(folder, 2), CPU.eval.bank)
    for key in ("mrr", "mrr_shuffled", "knn"):
        assert joined[key] == pytest.approx(whole[key], rel=1e-12)


def test_files_that_cannot_be_decoded_leave_the_numbers_of_the_others_alone(folder, tmp_path):
    """The bank of an image is sampled by its number; a broken file before it must not shift that."""
    for part in ("train", "test"):
        for path in sorted((folder / part).rglob("*.png")):
            copy = tmp_path / part / path.parent.name / path.name
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    whole = measured(tmp_path, 1, LENIENT)[0]
    chosen = Path(open_splits(tmp_path, CPU)[1].files.name(whole_rows(22)[1]))
    chosen.write_bytes(b"broken")
    left = measured(tmp_path, 1, LENIENT)[0]
    assert (whole.numbers, left.numbers) == ([0, 1, 2], [0, 2])
    np.testing.assert_array_equal(left.ranks["l2"]["model"], whole.ranks["l2"]["model"][[0, 2]])


def whole_rows(count):
    return [(2 * i + 1) * count // 6 for i in range(3)]


def test_without_jitter_or_classes_there_is_less_to_say(folder):
    still = Config(**(dict(CPU) | {"actions": ActionsConfig(strength=0.0)}))
    assert set(join_shares(measured(folder, 2, still), 16)) == {"knn", "knn_chance"}
    assert set(join_shares(measured(folder / "train" / "dark", 2), 16)) == {"mrr", "mrr_shuffled", "mrr_chance"}


def broken_copy(folder, tmp_path, *names):
    root = tmp_path / "copy"
    shutil.copytree(folder, root)
    for name in names:
        (root / name).write_bytes(b"broken")
    return root


SMALL = Config(**(dict(LENIENT) | {"eval": EvalConfig(bank=2, images=8, mrr_images=2)}))


def test_what_the_ranks_left_out_is_counted_together(folder, tmp_path):
    names = [open_splits(folder, SMALL, limit=8)[part].files.name(row) for part, row in ((0, 0), (0, 7), (1, 4))]
    bad = [str(Path(name).relative_to(folder)) for name in names]
    root = broken_copy(folder, tmp_path, *bad)
    for world in (1, 5):
        shares = measured(root, world, SMALL)
        joined = join_shares(shares, 2)
        assert (joined["eval_left_out_train"], joined["eval_left_out_test"]) == (2, 1)
        assert set(join_left_out(shares)["test"].reasons) == {f"{root}/{bad[2]}"}
    assert shares[0].said == (
        f"train on {root}/train, test on {root}/test",
        "knn_k: 8 instead of 20: there are 8 training images",
    )
    for share in shares:  # no rank has more than one bad image
        assert len(share.left_out["train"]) < 2
        share.left_out["train"].max_fraction = 0.2
    with pytest.raises(UserError, match=r"copy/train: 2 of 8 images cannot be used"):
        join_shares(shares, 2)


def test_a_rank_whose_images_are_all_bad_ends_nobody(folder, tmp_path):
    first = open_splits(folder, SMALL, limit=8)[1].files.name(0)
    root = broken_copy(folder, tmp_path, str(Path(first).relative_to(folder)))
    shares = measured(root, 8, SMALL)
    assert len(shares[0].test[1]) == 0
    assert join_shares(shares, 2)["eval_left_out_test"] == 1


def test_classes_that_are_gone_or_differ_are_refused(folder, tmp_path):
    root = broken_copy(folder, tmp_path, *(f"test/dark/{i:02d}.png" for i in range(11)))
    with pytest.raises(UserError, match="none of the 4 images of class dark can be used"):
        join_shares(measured(root, 2, SMALL), 2)
    shutil.rmtree(root / "test" / "dark")
    (root / "test" / "other").mkdir()
    shutil.copy(root / "test" / "light" / "00.png", root / "test" / "other")
    with pytest.raises(UserError, match=r"has no image of 1 of the 2 classes of .*train \(dark\)"):
        measured(root, 1, SMALL)
