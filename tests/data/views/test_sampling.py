"""Sampled transformations: crops like torchvision's, inside the image; jitter and flags as often as configured."""

from __future__ import annotations

import dataclasses
import hashlib
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iwm_fast.actions.space import ActionSpace
from iwm_fast.actions.transforms import CORRUPTIONS, NO_COMPRESSION, NO_SOLARIZE
from iwm_fast.config.schema import ActionsConfig
from iwm_fast.data.randomness import VIEWS, uniforms
from iwm_fast.data.views.sampling import draw_bank, draw_views
from iwm_fast.errors import UserError

GEOMETRIC = ActionsConfig(groups=("photometric", "geometric"))
COMPRESSED = ActionsConfig(groups=("photometric", "geometric", "compression"))
JITTER = ("brightness", "contrast", "saturation", "hue")
COUNT = 20_000

sides = st.one_of(st.integers(1, 5), st.integers(1, 5000))
sizes = st.lists(st.tuples(sides, sides), min_size=1, max_size=6)


def draw(config, count=COUNT, size=(320, 240), seed=0):
    return draw_views(config, seed, np.zeros(count, np.int64), np.arange(count), np.tile(size, (count, 1)))


def assert_share(flags, expected):
    """Check the share of true values, to five std of a binomial mean."""
    assert abs(np.mean(flags) - expected) <= 5 * math.sqrt(max(expected * (1 - expected), 1e-12) / len(flags))


def assert_uniform(values, low, high):
    """Check that values are within [low, high], and their distribution within the Kolmogorov bound of p = 1e-6."""
    assert values.min() >= low - 1e-6 * max(abs(low), 1)
    assert values.max() <= high + 1e-6 * max(abs(high), 1)
    ranks = (np.arange(len(values)) + 0.5) / len(values)
    assert np.abs(np.sort((values - low) / (high - low)) - ranks).max() < 2.7 / math.sqrt(len(values))


def columns(views):
    """Return everything that was sampled, flattened: (B, many) float64."""
    parts = [views.size, *(getattr(views, corruption.column) for corruption in CORRUPTIONS)]
    parts += [getattr(j, name) for j in (views.target, views.source) for name in JITTER]
    parts += [
        getattr(g, n) for g in (views.target_geometry, views.source_geometry) for n in ("crop", "flip", "rotation")
    ]
    return np.concatenate([np.asarray(part, np.float64).reshape(len(views), -1) for part in parts], axis=1)


@given(
    st.integers(0, 2**64 - 1),
    st.lists(st.tuples(st.integers(0, 2**62), st.integers(0, 2**62), sides, sides), min_size=1, max_size=6),
    st.data(),
)
@settings(deadline=None, max_examples=50)
def test_views_do_not_depend_on_the_batch(seed, samples, data):
    epoch, sample, *size = np.array(samples, np.int64).T
    size = np.stack(size, axis=1)
    whole = columns(draw_views(COMPRESSED, seed, epoch, sample, size))
    order = np.array(data.draw(st.permutations(range(len(samples)))))
    np.testing.assert_array_equal(
        columns(draw_views(COMPRESSED, seed, epoch[order], sample[order], size[order])), whole[order]
    )
    np.testing.assert_array_equal(columns(draw_views(COMPRESSED, seed, epoch[-1:], sample[-1:], size[-1:])), whole[-1:])


@pytest.mark.parametrize("config", [ActionsConfig(), GEOMETRIC, COMPRESSED], ids=lambda config: config.groups[-1])
def test_every_source_of_a_sample_is_sampled_by_itself_for_one_target(config):
    """The first as if it were alone, the third independent of a fourth; a sample's rows are neighbours."""
    ids = np.arange(40)
    size = np.tile([120, 90], (40, 1))
    one, three, four = (columns(draw_views(config, 3, ids * 0, ids, size, sources=k)) for k in (1, 3, 4))
    np.testing.assert_array_equal(three[::3], one)
    np.testing.assert_array_equal(four.reshape(40, 4, -1)[:, :3].reshape(120, -1), three)
    views = draw_views(config, 3, ids * 0, ids, size, sources=3)
    assert views.shared_geometry != config.geometric
    for part in (views.target_geometry.crop, views.target_geometry.flip, views.target.hue):
        for k in (1, 2):
            np.testing.assert_array_equal(part[k::3], part[::3])
    hues = views.source.hue.reshape(40, 3)
    assert len({tuple(row) for row in hues.T}) == 3
    assert (hues[:, 1] != hues[:, 2]).sum() > 30
    if config.geometric:
        crops = views.source_geometry.crop.reshape(40, 3, 4)
        assert (crops[:, 0] != crops[:, 1]).any(axis=1).all()


@given(
    st.integers(0, 2**64 - 1),
    sizes,
    st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)),
    st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)),
)
@settings(deadline=None)
def test_crops_lie_inside_images_of_every_size(seed, size, scale, aspect):
    config = GEOMETRIC.model_copy(update={"crop_scale": tuple(sorted(scale)), "crop_aspect": tuple(sorted(aspect))})
    size = np.array(size)
    views = draw_views(config, seed, np.zeros(len(size), np.int64), np.arange(len(size)), size)
    for geometry in (views.target_geometry, views.source_geometry):
        assert geometry.crop.dtype == np.int64
        x, y, width, height = geometry.crop.T
        assert (x >= 0).all()
        assert (y >= 0).all()
        assert (width >= 1).all()
        assert (height >= 1).all()
        assert (x + width <= size[:, 0]).all()
        assert (y + height <= size[:, 1]).all()


def torchvision_crop(draws, width, height, scale, ratio):
    """Run `RandomResizedCrop.get_params` step by step on the stream's own numbers."""
    for attempt in range(10):
        area = width * height * (scale[0] + (scale[1] - scale[0]) * draws[attempt])
        low, high = math.log(ratio[0]), math.log(ratio[1])
        aspect = math.exp(low + (high - low) * draws[10 + attempt])
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return math.floor(draws[20] * (width - w + 1)), math.floor(draws[21] * (height - h + 1)), w, h
    w, h = width, height
    if width / height < min(ratio):
        h = round(width / min(ratio))
    elif width / height > max(ratio):
        w = round(height * max(ratio))
    return (width - w) // 2, (height - h) // 2, w, h


@pytest.mark.parametrize("size", [(320, 240), (1, 1), (500, 1), (1, 77), (33, 200), (2, 3), (4000, 3000)])
def test_crop_is_random_resized_crop_with_the_stream_as_its_randomness(size):
    count = 300
    config = ActionsConfig()
    views = draw(config, count, size, seed=9)
    draws = uniforms(9, 0, np.arange(count), VIEWS, 22)
    expected = [torchvision_crop(row, *size, config.crop_scale, config.crop_aspect) for row in draws]
    np.testing.assert_array_equal(views.target_geometry.crop, expected)


def test_crop_areas_aspects_and_places_are_spread_as_configured():
    views = draw(ActionsConfig(crop_scale=(0.2, 0.5)), size=(1000, 1000))
    x, y, width, height = views.target_geometry.crop.T.astype(float)
    # All of these boxes fit (0.5 · 4/3 < 1), so no attempt is rejected.
    assert_uniform(width * height / 1e6, 0.2 - 2e-3, 0.5 + 2e-3)
    assert_uniform(np.log(width / height), math.log(0.75) - 4e-3, math.log(4 / 3) + 4e-3)
    assert_uniform((x + 0.5) / (1000 - width + 1), 0, 1)
    assert_uniform((y + 0.5) / (1000 - height + 1), 0, 1)
    assert_share(views.target_geometry.flip, 0.5)


def test_photometric_views_share_one_geometry():
    views = draw(ActionsConfig(), 100)
    assert views.shared_geometry
    assert views.source_geometry is views.target_geometry
    assert not views.target_geometry.rotation.any()


def test_the_source_of_the_geometric_group_has_its_own_geometry_and_the_same_colours():
    views, plain = draw(GEOMETRIC), draw(ActionsConfig())
    assert not views.shared_geometry
    np.testing.assert_array_equal(views.target_geometry.crop, plain.target_geometry.crop)
    np.testing.assert_array_equal(views.source.hue, plain.source.hue)
    assert (views.source_geometry.crop != views.target_geometry.crop).any(axis=1).mean() > 0.99
    assert not views.target_geometry.rotation.any()
    for turns in (1, 2, 3):
        assert_share(views.source_geometry.rotation == turns, 0.25)
    assert_share(views.source_geometry.flip ^ views.target_geometry.flip, 0.5)
    assert_share(draw(GEOMETRIC.model_copy(update={"rotation_probability": 0.0})).source_geometry.rotation, 0.0)


@pytest.mark.parametrize("strength", [1.0, 2.0, 3.0])
def test_jitter_is_sampled_as_configured_and_independently_for_each_view(strength):
    config = ActionsConfig(strength=strength)
    views = draw(config)
    applied = {}
    for view in ("target", "source"):
        jitter = getattr(views, view)
        applied[view] = jitter.hue != 0
        assert_share(applied[view], 0.8)
        for name in JITTER[:3]:
            values = getattr(jitter, name)
            assert values.dtype == np.float32
            assert (values[~applied[view]] == 1).all()
            spread = getattr(config, name) * strength
            assert_uniform(values[applied[view]], max(0.0, 1 - spread), 1 + spread)
        turn = 360 * min(0.1 * strength, 0.5)
        assert_uniform(jitter.hue[applied[view]], -turn, turn)
    assert_share(applied["target"] & applied["source"], 0.64)
    both = applied["target"] & applied["source"]
    drawn = np.stack([getattr(j, n)[both] for j in (views.target, views.source) for n in JITTER])
    assert np.abs(np.corrcoef(drawn) - np.eye(8)).max() < 5 / math.sqrt(both.sum())


def test_hue_is_at_most_half_a_turn():
    assert np.abs(draw(ActionsConfig(strength=9.0), 2_000).source.hue).max() <= 180


def test_destructive_transformations_are_sampled_as_configured():
    views = draw(ActionsConfig(solarize_threshold=100))
    assert_share(views.grayscale, 0.2)
    blurred, solarized = views.blur_sigma > 0, views.solarize_threshold < NO_SOLARIZE
    assert_share(blurred, 0.2)
    assert_uniform(views.blur_sigma[blurred], 0.1, 2.0)
    assert_share(solarized, 0.1)
    np.testing.assert_array_equal(np.unique(views.solarize_threshold), [100, NO_SOLARIZE])
    assert views.blur_sigma.dtype == np.float32
    assert views.solarize_threshold.dtype == np.int64
    assert_share(blurred & views.grayscale & solarized, 0.004)


def test_a_probability_moves_no_other_draw():
    """Each quantity has its own place in the stream, so ablations of one otherwise compare the same images."""
    views, without = draw(ActionsConfig(), 500), draw(ActionsConfig(blur_probability=0.0, jitter_probability=1.0), 500)
    assert not without.blur_sigma.any()
    np.testing.assert_array_equal(views.target_geometry.crop, without.target_geometry.crop)
    np.testing.assert_array_equal(views.grayscale, without.grayscale)
    applied = views.target.hue != 0
    np.testing.assert_array_equal(views.target.hue[applied], without.target.hue[applied])


def test_probability_zero_and_one_are_never_and_always():
    names = ("jitter", "grayscale", "blur", "solarize", "flip")
    never = draw(ActionsConfig(**{f"{name}_probability": 0.0 for name in names}), 1_000)
    assert not ActionSpace().encode(never).any()
    assert not never.target_geometry.flip.any()
    always = draw(ActionsConfig(**{f"{name}_probability": 1.0 for name in names}), 1_000)
    assert always.grayscale.all()
    assert (always.blur_sigma > 0).all()
    assert (always.solarize_threshold == 128).all()
    assert always.target_geometry.flip.all()
    assert (always.target.hue != 0).all()


@pytest.mark.parametrize("size", [np.ones(2, np.int64), np.ones((2, 3), np.int64), np.array([[4, 0]])])
def test_wrong_sizes_are_refused(size):
    with pytest.raises(ValueError, match="size"):
        draw_views(ActionsConfig(), 0, np.zeros(1, np.int64), np.zeros(1, np.int64), size)


def test_no_samples_give_no_views():
    empty = np.zeros(0, np.int64)
    assert len(draw_views(GEOMETRIC, 0, empty, empty, np.zeros((0, 2), np.int64))) == 0


def as_rows(jitter):
    return np.stack([getattr(jitter, name) for name in JITTER], axis=1)


def test_bank_is_always_jittered_distinct_and_as_strong_as_configured():
    banks = [as_rows(draw_bank(ActionsConfig(strength=2.0), 0, sample, 256)) for sample in range(40)]
    for bank in banks:
        assert bank.dtype == np.float32
        assert len(np.unique(bank, axis=0)) == 256
        assert (bank != [1, 1, 1, 0]).any(axis=1).all()
    rows = np.concatenate(banks)
    for column, (low, high) in enumerate([(0.2, 1.8), (0.2, 1.8), (0.6, 1.4), (-72, 72)]):
        assert_uniform(rows[:, column], low, high)
    assert len(np.unique(rows, axis=0)) == len(rows)


def test_bank_depends_on_seed_and_sample_alone():
    config = ActionsConfig(jitter_probability=0.0)
    bank = as_rows(draw_bank(config, 3, 5, 32))
    np.testing.assert_array_equal(as_rows(draw_bank(ActionsConfig(), 3, 5, 32)), bank)
    assert (as_rows(draw_bank(config, 4, 5, 32)) != bank).all()
    assert (as_rows(draw_bank(config, 3, 6, 32)) != bank).all()


def test_bank_of_one_component_stays_distinct_where_float32_leaves_few_values():
    """Brightness of 1 ± 2e-5 has about 500 values in float32: duplicates are resampled."""
    config = ActionsConfig(brightness=2e-5, contrast=0.0, saturation=0.0, hue=0.0)
    rows = as_rows(draw_bank(config, 0, 0, 256))
    assert len(np.unique(rows[:, 0])) == 256
    assert (rows[:, 1:] == [1, 1, 0]).all()


def test_bank_without_any_strength_is_an_error_that_says_what_to_raise():
    with pytest.raises(UserError, match=r"raise actions\.strength"):
        draw_bank(ActionsConfig(strength=0.0), 0, 0, 256)


def test_draws_are_the_bits_that_earlier_runs_had():
    """Only additions and multiplications, so every machine has these bits; a crop also has logarithms and roots."""
    config = ActionsConfig(groups=("photometric", "geometric"), strength=2.7, blur_sigma=(0.3, 1.1))
    ids = np.arange(50)
    views = draw_views(config, 5, ids * 0 + 2, ids, np.tile([90, 120], (50, 1)), sources=3)
    parts = [getattr(jitter, name) for jitter in (views.target, views.source) for name in JITTER]
    parts += [views.grayscale, views.blur_sigma, views.solarize_threshold]
    parts += [views.target_geometry.flip, views.source_geometry.flip, views.source_geometry.rotation]
    parts += [getattr(draw_bank(config, 3, 4, 9), name) for name in JITTER]
    digest = hashlib.sha256(b"".join(np.ascontiguousarray(part).tobytes() for part in parts)).hexdigest()
    assert digest[:16] == "16ebbae2b423dfeb"


def test_qualities_are_spread_over_the_configured_ones_as_often_as_configured():
    views = draw(COMPRESSED.model_copy(update={"compression_probability": 0.3, "compression_quality": (30, 39)}))
    done = views.compression_quality < NO_COMPRESSION
    assert_share(done, 0.3)
    for quality in range(30, 40):
        assert_share(views.compression_quality[done] == quality, 0.1)
    assert set(views.compression_quality.tolist()) == {*range(30, 40), NO_COMPRESSION}
    assert abs(np.corrcoef(done, views.grayscale)[0, 1]) < 0.04


def test_compression_moves_no_other_draw():
    whole, plain = draw(COMPRESSED, 200), draw(GEOMETRIC, 200)
    assert not (plain.compression_quality < NO_COMPRESSION).any()
    assert (whole.compression_quality < NO_COMPRESSION).any()
    np.testing.assert_array_equal(columns(dataclasses.replace(whole, compression_quality=None)), columns(plain))


@pytest.mark.parametrize("groups", [("photometric",), ("photometric", "geometric"), ("photometric", "compression")])
@pytest.mark.parametrize("sources", [1, 3])
def test_nothing_is_computed_from_memory_that_was_not_written(groups, sources, monkeypatch):
    plain = np.empty

    def written_over(*shape, **options):
        made = plain(*shape, **options)
        made.fill((np.iinfo if made.dtype.kind in "iu" else np.finfo)(made.dtype).max)
        return made

    size, ids = np.tile((320, 240), (50, 1)), np.arange(50)
    found = draw_views(ActionsConfig(groups=groups), 3, ids * 0, ids, size, sources=sources)
    monkeypatch.setattr(np, "empty", written_over)
    with np.errstate(all="raise"):
        again = draw_views(ActionsConfig(groups=groups), 3, ids * 0, ids, size, sources=sources)
    for ours, theirs in zip(dataclasses.astuple(found), dataclasses.astuple(again), strict=True):
        np.testing.assert_equal(ours, theirs)
