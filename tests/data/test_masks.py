"""Masks: every patch is visible and predicted as often as expected, sets are disjoint, and sampling always ends."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iwm_fast.config.schema import Config, MasksConfig
from iwm_fast.data import masks as module
from iwm_fast.data.masks import MaskSampler


def split(flat, lengths):
    return np.split(flat, np.cumsum(lengths)[:-1])


def one_hot(flat, lengths, patches):
    dense = np.zeros((len(lengths), patches), bool)
    dense[np.repeat(np.arange(len(lengths)), lengths), flat] = True
    return dense


def draw(sampler, count, *, first=0, epoch=0):
    return sampler.draw(np.full(count, epoch), np.arange(first, first + count))


configs = st.builds(
    lambda blocks, scale, aspect, context, least: MasksConfig(
        target_blocks=blocks,
        target_scale=tuple(sorted(scale)),
        target_aspect=tuple(sorted(aspect)),
        context_scale=tuple(sorted(context)),
        min_context=least,
    ),
    st.integers(1, 5),
    st.tuples(st.floats(0.001, 1), st.floats(0.001, 1)),
    st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)),
    st.tuples(st.floats(0.001, 1), st.floats(0.001, 1)),
    st.integers(1, 12),
)


@given(configs, st.integers(4, 9), st.booleans(), st.integers(0, 2**64 - 1))
@settings(deadline=None)
def test_any_configuration_ends_with_sound_sets(config, grid, exclude, seed):
    """Even if no sample leaves enough context: targets that cover the grid, contexts of one patch."""
    sets = draw(MaskSampler(config, grid, seed, exclude=exclude), 6)
    assert len(sets) == 6
    for flat, lengths in ((sets.context, sets.context_lengths), (sets.target, sets.target_lengths)):
        assert flat.dtype == lengths.dtype == np.int64
        assert lengths.sum() == len(flat)
        for own in split(flat, lengths):
            assert (np.diff(own) > 0).all()
            assert own[0] >= 0
            assert own[-1] < grid**2
    assert sets.context_lengths.min() >= config.min_context
    assert sets.target_lengths.min() >= 1
    if exclude:
        for context, target in zip(
            split(sets.context, sets.context_lengths), split(sets.target, sets.target_lengths), strict=True
        ):
            assert not np.intersect1d(context, target).size


@given(
    st.integers(0, 2**63 - 1),
    st.lists(st.tuples(st.integers(0, 2**62), st.integers(0, 2**62)), min_size=1, max_size=8),
    st.data(),
)
@settings(deadline=None, max_examples=50)
def test_masks_do_not_depend_on_the_batch(seed, samples, data):
    """On a 4 × 4 grid most rows need further attempts, which must not depend on their neighbours either."""
    epoch, sample = np.array(samples, np.int64).T
    sampler = MaskSampler(MasksConfig(min_context=8), 4, seed)
    whole = sampler.draw(epoch, sample)
    order = np.array(data.draw(st.permutations(range(len(samples)))))
    parts = sampler.draw(epoch[order], sample[order])
    for mixed, kept in (
        (split(parts.context, parts.context_lengths), split(whole.context, whole.context_lengths)),
        (split(parts.target, parts.target_lengths), split(whole.target, whole.target_lengths)),
    ):
        for place, row in enumerate(order):
            np.testing.assert_array_equal(mixed[place], kept[row])


def test_masks_differ_by_seed_epoch_and_sample():
    def flat(seed, epoch, sample):
        sets = MaskSampler(MasksConfig(), 14, seed).draw(np.array([epoch]), np.array([sample]))
        return tuple(sets.context), tuple(sets.target)

    keys = [(0, 0, 0), (1, 0, 0), (2**63, 0, 0), (0, 1, 0), (0, 0, 1), (0, 2**40, 0), (0, 0, 2**40)]
    assert len({flat(*key) for key in keys}) == len(keys)


def brute_force_cover(config, grid, count, *, steps=60):
    """Probability of each patch to be in one block, and in the context square: sums over sizes, then all placements.

    The uniform scale and aspect are integrated on a fine lattice of midpoints; rows of the grid are counted by loops.
    """

    def placements(side):
        line = np.zeros(grid)
        for first in range(grid - side + 1):
            line[first : first + side] += 1
        return line / (grid - side + 1)

    def cover(scale, aspect):
        chance = np.zeros((grid, grid))
        for i in range(steps):
            for j in range(steps):
                area = grid**2 * (scale[0] + (scale[1] - scale[0]) * (i + 0.5) / steps)
                ratio = aspect[0] + (aspect[1] - aspect[0]) * (j + 0.5) / steps
                height = min(max(round((area * ratio) ** 0.5), 1), grid)
                width = min(max(round((area / ratio) ** 0.5), 1), grid)
                chance += np.outer(placements(height), placements(width))
        return chance.ravel() / steps**2

    block = cover(config.target_scale, config.target_aspect)
    square = cover(config.context_scale, (1.0, 1.0))
    target = 1 - (1 - block) ** count
    return target, square * (1 - target)


@pytest.mark.parametrize(("grid", "count"), [(14, 8_000), (8, 16_000), (7, 16_000)])
def test_every_patch_is_target_and_context_as_often_as_expected(grid, count):
    """Blocks are independent, so P(target) = 1 - (1 - P(block))^K and P(context) = P(square) · (1 - P(target)).

    min_context is 1 here, so that (almost) nothing is resampled and the expectation is exact. I-JEPA's own sampler
    fails this: its last row and column have probability 0.
    """
    config = MasksConfig(min_context=1)
    sets = draw(MaskSampler(config, grid, 11), count)
    expected_target, expected_context = brute_force_cover(config, grid, config.target_blocks)
    for flat, lengths, expected in (
        (sets.target, sets.target_lengths, expected_target),
        (sets.context, sets.context_lengths, expected_context),
    ):
        found = one_hot(flat, lengths, grid**2).mean(axis=0)
        assert found.min() > 0
        # Five std of a binomial mean, and the lattice's own error.
        bound = 5 * np.sqrt(expected * (1 - expected) / count) + 0.003
        np.testing.assert_array_less(np.abs(found - expected), bound)


def test_without_exclusion_the_context_is_the_whole_square():
    config = MasksConfig()
    sets = draw(MaskSampler(config, 14, 0, exclude=False), 4_000)
    sides = np.sqrt(sets.context_lengths)
    np.testing.assert_array_equal(np.unique(sides), [13, 14])
    # round(sqrt(196 s)) is 14 where s ≥ 13.5² / 196 = 0.9298: of U(0.85, 1) that is 0.468.
    assert abs((sides == 14).mean() - 0.468) < 5 * np.sqrt(0.25 / 4_000)
    found = one_hot(sets.context, sets.context_lengths, 196).reshape(-1, 14, 14)
    assert found[:, -1].any()
    assert found[:, :, -1].any()
    target = one_hot(sets.target, sets.target_lengths, 196).reshape(-1, 14, 14)
    assert (found & target).any(axis=(1, 2)).all()


def test_a_single_block_has_the_configured_sizes_in_every_place():
    config = MasksConfig(target_blocks=1)
    sets = draw(MaskSampler(config, 14, 3), 5_000)
    shapes, places = set(), set()
    for target in split(sets.target, sets.target_lengths):
        row, column = np.divmod(target, 14)
        height, width = np.ptp(row) + 1, np.ptp(column) + 1
        assert len(target) == height * width
        shapes.add((int(height), int(width)))
        if (height, width) == (5, 6):
            places.add((int(row[0]), int(column[0])))
    areas = [height * width for height, width in shapes]
    # 29.4 to 39.2 patches, each side rounded.
    assert 24 <= min(areas) <= 30
    assert 36 <= max(areas) <= 42
    assert len(shapes) > 5
    assert places == {(row, column) for row in range(10) for column in range(9)}


def test_images_of_a_batch_have_sizes_of_their_own():
    sets = draw(MaskSampler(MasksConfig(), 14, 0), 64)
    assert len(np.unique(sets.target_lengths)) > 10
    assert len(np.unique(sets.context_lengths)) > 10


@pytest.mark.parametrize("exclude", [True, False])
def test_totals_are_the_lengths_of_what_is_sampled(exclude):
    sampler = MaskSampler(MasksConfig(), 6, 9, exclude=exclude)
    epoch, sample = np.repeat([0, 1], 50), np.arange(100)
    sets = sampler.draw(epoch, sample)
    assert sampler.totals(epoch, sample) == (len(sets.context), len(sets.target))


def test_every_source_of_a_sample_has_masks_of_its_own():
    """The first as if it were alone; a sample's rows are neighbours; resampling one does not change another."""
    config = MasksConfig(min_context=14)
    epoch, sample = np.zeros(300, np.int64), np.arange(300)
    alone = MaskSampler(config, 6, 0).draw(epoch, sample)
    sampler = MaskSampler(config, 6, 0, sources=3)
    sets = sampler.draw(epoch, sample)
    assert len(sets) == 900
    assert sampler.totals(epoch, sample) == (len(sets.context), len(sets.target))
    context = np.split(sets.context, np.cumsum(sets.context_lengths)[:-1])
    expected = np.split(alone.context, np.cumsum(alone.context_lengths)[:-1])
    assert all(np.array_equal(context[3 * row], expected[row]) for row in range(300))
    distinct = {row for row in range(300) if len({tuple(c.tolist()) for c in context[3 * row : 3 * row + 3]}) == 3}
    assert len(distinct) > 280


def test_too_small_contexts_are_resampled_before_the_fallback(monkeypatch):
    """Resampling changes the failed rows and no others, and the fallback alone would be right as well."""
    sampler = MaskSampler(MasksConfig(min_context=14), 6, 0)
    monkeypatch.setattr(module, "_ATTEMPTS", 1)
    fallen_back = draw(sampler, 2_000)
    monkeypatch.undo()
    redrawn = draw(sampler, 2_000)
    first, blocks = sampler._attempt(np.zeros(2_000, np.int64), np.arange(2_000), 0)
    failed = (first & ~blocks.any(axis=1)).sum(axis=1) < 14
    assert 0.02 < failed.mean() < 0.9
    for sets in (fallen_back, redrawn):
        assert sets.context_lengths.min() == 14
        target = one_hot(sets.target, sets.target_lengths, 36)
        np.testing.assert_array_equal(target[~failed], blocks.any(axis=1)[~failed])
    # The fallback keeps the first sample's targets or drops blocks of them; a second sample has its own targets.
    assert not (one_hot(fallen_back.target, fallen_back.target_lengths, 36) & ~blocks.any(axis=1)).any()
    own = one_hot(redrawn.target, redrawn.target_lengths, 36)[failed]
    assert (own & ~blocks.any(axis=1)[failed]).any(axis=1).mean() > 0.9


def test_targets_that_cover_the_grid_are_dropped_and_trimmed_until_a_context_is_left():
    full = MasksConfig(target_scale=(1.0, 1.0), target_aspect=(1.0, 1.0), min_context=10)
    sets = draw(MaskSampler(full, 4, 0), 3)
    np.testing.assert_array_equal(sets.target, np.tile(np.arange(6), 3))
    np.testing.assert_array_equal(sets.context, np.tile(np.arange(6, 16), 3))
    large = MasksConfig(target_scale=(0.56, 0.57), target_aspect=(1.0, 1.0), context_scale=(0.06, 0.07), min_context=7)
    sets = draw(MaskSampler(large, 4, 0), 50)
    np.testing.assert_array_equal(sets.context_lengths + sets.target_lengths, 16)
    # The 3 × 3 block that was sampled first stays whole; a second one elsewhere would leave fewer than 7 patches.
    assert set(sets.target_lengths.tolist()) == {9}


def test_no_samples_give_no_patches():
    empty = np.zeros(0, np.int64)
    sets = MaskSampler(MasksConfig(), 14, 0).draw(empty, empty)
    assert len(sets) == len(sets.context) == len(sets.target) == 0


def test_min_context_that_leaves_nothing_to_predict_is_refused():
    with pytest.raises(ValueError, match="min_context is 16"):
        MaskSampler(MasksConfig(min_context=16), 4, 0)


@given(st.integers(0, 2**63 - 1))
def test_visible_blocks_are_seen_and_predicted(seed):
    """With a context of the whole grid, what is not visible is exactly what the hidden blocks cover."""
    config = MasksConfig(
        target_blocks=6, visible_blocks=2, target_scale=(0.0625, 0.0625), target_aspect=(1, 1), context_scale=(1, 1)
    )
    sets = draw(MaskSampler(config, 8, seed), 40)
    context = one_hot(sets.context, sets.context_lengths, 64).astype(bool)
    target = one_hot(sets.target, sets.target_lengths, 64).astype(bool)
    assert (context | target).all()
    both = (context & target).sum(axis=1)
    assert both.max() <= 8  # two blocks of 2 × 2
    assert both.mean() > 4
    assert ((~context).sum(axis=1) <= 16).all()


def test_more_visible_blocks_than_blocks_are_refused_and_as_many_but_for_external_actions():
    with pytest.raises(ValueError, match="visible_blocks is 5; it must not be above 4"):
        MasksConfig(visible_blocks=5)
    with pytest.raises(ValueError, match="visible_blocks is 4; it must be below"):
        Config(masks=MasksConfig(visible_blocks=4))
