"""Encoding of transformations: decode inverts encode, and no change is zero."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iwm_fast.actions.ranges import jitter_range, varying
from iwm_fast.actions.space import ActionSpace
from iwm_fast.actions.transforms import (
    COMPONENTS,
    CORRUPTIONS,
    JITTER,
    NO_COMPRESSION,
    NO_SOLARIZE,
    Geometry,
    Jitter,
    Views,
    colour_matrix,
    component,
)
from iwm_fast.config import ActionsConfig

FORMS = ("difference", "absolute")
GROUPS = (("photometric",), ("photometric", "geometric"), ("photometric", "geometric", "compression"))

factors = st.floats(0.0, 2.5, width=32)
degrees = st.floats(-180.0, 180.0, width=32)
jitters = st.tuples(factors, factors, factors, degrees)
boxes = st.tuples(*[st.integers(0, 400)] * 2, *[st.integers(1, 400)] * 2)
geometries = st.tuples(boxes, st.booleans(), st.integers(0, 3))
rows = st.tuples(
    jitters,
    jitters,
    st.booleans(),
    st.one_of(st.just(0.0), st.floats(2.0**-7, 20.0, width=32)),
    st.integers(0, NO_SOLARIZE),
    st.integers(1, NO_COMPRESSION),
    geometries,
    geometries,
)


def make_jitter(values):
    return Jitter(*np.array(values, np.float32).reshape(-1, 4).T)


def make_geometry(values, *, upright=False):
    crop, flip, rotation = zip(*values, strict=True)
    turns = np.zeros(len(crop), np.int64) if upright else np.array(rotation, np.int64)
    return Geometry(np.array(crop, np.int64), np.array(flip), turns)


def make_views(drawn):
    target, source, grayscale, sigma, threshold, quality, target_geometry, source_geometry = zip(*drawn, strict=True)
    return Views(
        size=np.full((len(drawn), 2), 800),
        target_geometry=make_geometry(target_geometry, upright=True),
        source_geometry=make_geometry(source_geometry),
        target=make_jitter(target),
        source=make_jitter(source),
        grayscale=np.array(grayscale),
        blur_sigma=np.array(sigma, np.float32),
        solarize_threshold=np.array(threshold),
        compression_quality=np.array(quality),
        shared_geometry=False,
    )


def angle_between(a, b):
    return np.abs((np.asarray(a, np.float64) - b + 180.0) % 360.0 - 180.0)


@given(st.lists(rows, min_size=1, max_size=4), st.sampled_from(GROUPS), st.sampled_from(FORMS))
@settings(deadline=None)
def test_decode_inverts_encode(drawn, groups, form):
    views = make_views(drawn)
    space = ActionSpace(groups, form)
    action = space.encode(views)
    assert action.dtype == np.float32
    assert action.shape == (len(drawn), space.dim)
    decoded = space.decode(action)
    assert tuple(decoded) == space.names
    for name in JITTER:
        x, y = getattr(views.source, name).astype(np.float64), getattr(views.target, name).astype(np.float64)
        expected = {name: y - x} if form == "difference" else {f"source_{name}": x, f"target_{name}": y}
        for key, value in expected.items():
            error = angle_between(decoded[key], value) if name == "hue" else np.abs(decoded[key] - value)
            # One rounding to float32 of a value of up to 2.5 (hue: 180 degrees).
            assert error.max() <= (180 if name == "hue" else 2.5) * 2.0**-23
    np.testing.assert_array_equal(decoded["grayscale"], views.grayscale)
    np.testing.assert_array_equal(decoded["blur"], views.blur_sigma > 0)
    np.testing.assert_allclose(decoded["blur_sigma"], views.blur_sigma, rtol=1e-6)
    np.testing.assert_array_equal(decoded["solarize"], views.solarize_threshold < NO_SOLARIZE)
    np.testing.assert_array_equal(decoded["solarize_threshold"], views.solarize_threshold)
    if "compression" in groups:
        np.testing.assert_array_equal(decoded["compression"], views.compression_quality < NO_COMPRESSION)
        np.testing.assert_array_equal(decoded["compression_quality"], views.compression_quality)
    if "geometric" in groups:
        x, y = views.source_geometry.crop, views.target_geometry.crop
        np.testing.assert_allclose(np.exp(decoded["crop_w"]) * y[:, 2], x[:, 2], rtol=1e-5)
        np.testing.assert_allclose(np.exp(decoded["crop_h"]) * y[:, 3], x[:, 3], rtol=1e-5)
        np.testing.assert_array_equal(decoded["flip"], views.source_geometry.flip ^ views.target_geometry.flip)
        turns = sum(k * decoded[f"rotation_{k}"] for k in (1, 2, 3))
        np.testing.assert_array_equal((turns + views.source_geometry.rotation) % 4, 0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("groups", GROUPS, ids=lambda g: g[-1])
def test_neutral_views_are_the_zero_vector(groups, form):
    views = Views.neutral(np.array([[640, 480], [3, 1]]), np.array([[80, 0, 480, 480], [1, 0, 1, 1]]))
    assert not ActionSpace(groups, form).encode(views).any()


@given(st.lists(rows, min_size=1, max_size=3))
@settings(deadline=None)
def test_equal_jitter_and_geometry_leave_only_the_corruptions(drawn):
    drawn = [(y, y, *rest, geometry, geometry) for y, _, *rest, geometry, _ in drawn]
    views = make_views(drawn)
    still = Views(**{**vars(views), "source_geometry": views.target_geometry, "shared_geometry": True})
    space = ActionSpace(GROUPS[2])
    action = space.encode(still)
    kept = [i for i, name in enumerate(space.names) if not name.startswith(("gray", "blur", "solarize", "compression"))]
    assert not action[:, kept].any()


def test_table_and_vector_have_the_documented_order_and_scale():
    names = ["brightness", "contrast", "saturation", "hue", "grayscale", "blur", "blur_sigma", "solarize"]
    names += ["solarize_threshold", "crop_x", "crop_y", "crop_w", "crop_h", "flip"]
    names += ["rotation_1", "rotation_2", "rotation_3", "compression", "compression_quality"]
    assert [component.name for component in COMPONENTS] == names
    space = ActionSpace(GROUPS[2])
    assert space.names == tuple(names)
    assert space.dim == len(names)
    assert [space.names[space.slices[name]] for name in names] == [(name,) for name in names]
    row = (
        (1.4, 1.4, 1.2, 36.0),
        (0.6, 0.6, 0.8, -36.0),
        True,
        2.0,
        0,
        20,
        ((0, 0, 9, 9), False, 0),
        ((0, 0, 9, 9), True, 3),
    )
    expected = [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 0, 0, 1, 0.8]
    np.testing.assert_allclose(space.encode(make_views([row]))[0], expected, atol=1e-6)


def test_absolute_form_encodes_both_views():
    space = ActionSpace(form="absolute")
    assert space.names[:4] == ("source_brightness", "target_brightness", "source_contrast", "target_contrast")
    assert space.dim == 13
    assert space.names[space.slices["hue"]] == ("source_hue", "target_hue")
    source, target = make_jitter((1.4, 1, 1, -36.0)), make_jitter((0.8, 1, 1, 36.0))
    action = space.jitter_action(source, target)[0]
    np.testing.assert_allclose(action[space.slices["brightness"]], [0.5, -0.25], atol=1e-6)
    np.testing.assert_allclose(action[space.slices["hue"]], [-0.5, 0.5], atol=1e-6)


@pytest.mark.parametrize(
    ("source", "target", "difference"),
    [(170, -170, 20), (-170, 170, -20), (-90, 90, 180), (90, -90, 180), (0, 180, 180), (10, -20, -30), (180, -180, 0)],
)
def test_hue_difference_is_wrapped_into_half_open_half_turns(source, target, difference):
    space = ActionSpace()
    action = space.jitter_action(make_jitter((1, 1, 1, source)), make_jitter((1, 1, 1, target)))
    np.testing.assert_allclose(action[0, 3], difference / 72, rtol=1e-6)
    np.testing.assert_allclose(space.decode(action)["hue"], difference, rtol=1e-6)


@given(st.lists(rows, min_size=1, max_size=4), st.sampled_from(FORMS))
@settings(deadline=None)
def test_jitter_action_is_the_action_of_views_with_nothing_else_done(drawn, form):
    jittered = make_views(drawn)
    clean = Views.neutral(jittered.size, np.tile([0, 0, 9, 9], (len(drawn), 1)))
    only = Views(**{**vars(clean), "target": jittered.target, "source": jittered.source})
    space = ActionSpace(GROUPS[2], form)
    np.testing.assert_array_equal(space.jitter_action(only.source, only.target), space.encode(only))


def reference_colour(rgb, brightness, contrast, saturation, hue):
    """Return the jitter applied step by step in YIQ, float64; rgb (P, 3)."""
    y, i, q = (
        rgb @ np.array(weights) for weights in ([0.299, 0.587, 0.114], [0.596, -0.274, -0.321], [0.211, -0.523, 0.311])
    )
    i, q = i * saturation, q * saturation
    angle = hue * np.pi / 180
    i, q = np.cos(angle) * i + np.sin(angle) * q, np.cos(angle) * q - np.sin(angle) * i
    system = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.321], [0.211, -0.523, 0.311]])
    back = np.linalg.solve(system, np.stack([y, i, q])).T
    return (back * contrast + 128 * (1 - contrast)) * brightness


@given(st.lists(jitters, min_size=1, max_size=4), st.integers(0, 2**32 - 1))
@settings(deadline=None)
def test_colour_matrix_is_the_steps_in_yiq_composed(drawn, seed):
    rgb = np.random.default_rng(seed).uniform(0, 255, (5, 3))
    matrix = colour_matrix(make_jitter(drawn))
    assert matrix.shape == (len(drawn), 3, 4)
    for row, values in enumerate(drawn):
        expected = reference_colour(rgb, *np.array(values, np.float32).astype(np.float64))
        np.testing.assert_allclose(rgb @ matrix[row, :, :3].T + matrix[row, :, 3], expected, atol=1e-9)


def test_colour_matrix_of_the_neutral_jitter_is_the_identity():
    expected = np.concatenate([np.eye(3), np.zeros((3, 1))], axis=1)
    np.testing.assert_allclose(colour_matrix(Jitter.neutral(2)), [expected] * 2, atol=1e-14)


def view_of_indices(geometry):
    """Brute force: each pixel of the view holds the number of the image's cell that it shows (crop, flip, turns)."""
    (x, y, w, h), flip, turns = geometry
    index = np.arange(40 * 40).reshape(40, 40)
    crop = index[y : y + h, x : x + w]
    return np.rot90(crop[:, ::-1] if flip else crop, turns)


def place_in_target(action, rows, columns, height, width):
    """Return where pixel centres of x lie in y's frame, as shares of y's width and height, computed from the action."""
    turns = sum(k * action[f"rotation_{k}"] for k in (1, 2, 3))
    u, v = (columns + 0.5) / width, (rows + 0.5) / height
    for _ in range(int(turns)):  # a counter-clockwise quarter turn moves the right side to the top
        u, v = v, 1.0 - u
    u = 1.0 - u if action["flip"] else u
    u = 0.5 + action["crop_x"] + (u - 0.5) * np.exp(action["crop_w"])
    v = 0.5 + action["crop_y"] + (v - 0.5) * np.exp(action["crop_h"])
    return u, v


small_boxes = st.tuples(st.integers(0, 20), st.integers(0, 20), st.integers(1, 20), st.integers(1, 20))


@given(
    st.tuples(small_boxes, st.booleans(), st.just(0)),
    st.tuples(small_boxes, st.booleans(), st.integers(0, 3)),
)
@settings(deadline=None)
def test_geometric_action_alone_maps_the_grid_of_x_to_the_grid_of_y(target, source):
    """Each pixel of x, moved by the action alone, falls on y's pixel of the same place in the image."""
    clean = ((1, 1, 1, 0),) * 2
    views = make_views([(*clean, False, 0.0, NO_SOLARIZE, NO_COMPRESSION, target, source)])
    space = ActionSpace(GROUPS[2])
    action = {name: value[0] for name, value in space.decode(space.encode(views)).items()}
    x, y = view_of_indices(source), view_of_indices(target)
    rows, columns = np.indices(x.shape)
    u, v = place_in_target(action, rows, columns, *x.shape)
    column, row = u * y.shape[1] - 0.5, v * y.shape[0] - 0.5
    # Places are whole pixels, except for float32 in the action: shares of up to 20 of a box of up to 20 pixels.
    assert np.abs(column - np.rint(column)).max() < 1e-3
    assert np.abs(row - np.rint(row)).max() < 1e-3
    column, row = np.rint(column).astype(int), np.rint(row).astype(int)
    inside = (row >= 0) & (row < y.shape[0]) & (column >= 0) & (column < y.shape[1])
    np.testing.assert_array_equal(y[row[inside], column[inside]], x[inside])
    np.testing.assert_array_equal(inside, np.isin(x, y))


def test_take_and_concatenate_are_inverse():
    generator = np.random.default_rng(0)
    box = ((1, 2, 3, 4), True, 0)
    drawn = [
        (tuple(generator.uniform(size=4)), tuple(generator.uniform(size=4)), True, 1.0, 9 * row, 20 * row + 1, box, box)
        for row in range(5)
    ]
    views = make_views(drawn)
    space = ActionSpace(GROUPS[2])
    parts = [views.take(np.array([0, 1])), views.take(slice(2, 5))]
    np.testing.assert_array_equal(space.encode(Views.concatenate(parts)), space.encode(views))
    shared = Views.neutral(views.size, views.target_geometry.crop)
    taken = shared.take(np.array([3, 3]))
    assert taken.source_geometry is taken.target_geometry
    joined = Views.concatenate([taken, shared])
    assert joined.source_geometry is joined.target_geometry
    assert len(joined) == 7
    with pytest.raises(ValueError, match="shared_geometry"):
        Views.concatenate([views, shared])
    with pytest.raises(ValueError, match="empty"):
        Views.concatenate([])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ActionSpace(()), "groups"),
        (lambda: ActionSpace(("colour",)), "groups"),
        (lambda: ActionSpace(form="relative"), "form"),
        (lambda: ActionSpace().decode(np.zeros((2, 8))), r"\(B, 9\)"),
        (lambda: ActionSpace().decode(np.zeros(9)), r"\(B, 9\)"),
        (lambda: Jitter(np.ones(2), np.ones(3), np.ones(2), np.ones(2)), "contrast"),
        (lambda: Geometry(np.ones((2, 4)), np.ones(2), np.ones(3)), "rotation"),
        (lambda: Geometry(np.ones((2, 3)), np.ones(2), np.ones(2)), "crop"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_inconsistent_views_are_refused():
    views = Views.neutral(np.array([[4, 4]]), np.array([[0, 0, 4, 4]]))
    other = Geometry(*(getattr(views.target_geometry, name).copy() for name in ("crop", "flip", "rotation")))
    turned = Geometry(other.crop, other.flip, np.ones(1, np.int64))
    with pytest.raises(ValueError, match="same object"):
        Views(**{**vars(views), "source_geometry": other})
    with pytest.raises(ValueError, match="target has 2 rows"):
        Views(**{**vars(views), "target": Jitter.neutral(2)})
    with pytest.raises(ValueError, match="blur_sigma"):
        Views(**{**vars(views), "blur_sigma": np.zeros(2)})
    with pytest.raises(ValueError, match="target view is rotated"):
        ActionSpace(GROUPS[2]).encode(Views(**{**vars(views), "target_geometry": turned, "shared_geometry": False}))


@given(st.lists(rows, min_size=1, max_size=1), st.sampled_from(FORMS))
@settings(deadline=None)
def test_a_vector_of_named_values_is_what_decode_names(drawn, form):
    space = ActionSpace(GROUPS[2], form)
    action = space.encode(make_views(drawn))
    named = {name: float(value[0]) for name, value in space.decode(action).items()}
    np.testing.assert_allclose(space.vector(named), action[0], atol=1e-6)
    assert not space.vector({}).any()


def test_a_named_value_stands_alone_with_its_flag_and_an_unknown_one_is_refused():
    space = ActionSpace()
    brighter = space.vector({"brightness": 0.2})
    assert brighter[0] == pytest.approx(0.2 / 0.8)
    assert np.count_nonzero(brighter) == 1
    assert space.decode(space.vector({"blur_sigma": 1.5})[None])["blur"][0]
    assert space.decode(space.vector({"solarize_threshold": 0})[None])["solarize_threshold"][0] == 0
    assert not space.vector({"solarize_threshold": NO_SOLARIZE}).any()
    compressing = ActionSpace(GROUPS[2])
    told = compressing.decode(compressing.vector({"compression_quality": 100})[None])
    assert told["compression"][0]
    assert told["compression_quality"][0] == 100
    assert not compressing.vector({"compression_quality": NO_COMPRESSION}).any()
    with pytest.raises(ValueError, match="'brightnes' is no component of this action; there are brightness, "):
        space.vector({"brightnes": 0.2})


def columns(views):
    """Return every array of the views, by field: (B, ...)."""
    found = {}
    for name, value in vars(views).items():
        if isinstance(value, Jitter | Geometry):
            found |= {f"{name}.{inner}": column for inner, column in vars(value).items()}
        elif name != "shared_geometry":
            found[name] = value
    return found


def many(seed, count=5, *, shared=False):
    rng = np.random.default_rng(seed)

    def jitter():
        return Jitter(*rng.uniform(0, 2, (4, count)).astype(np.float32))

    def geometry():
        return Geometry(rng.integers(1, 50, (count, 4)), rng.uniform(size=count) < 0.5, rng.integers(0, 4, count))

    target = geometry()
    drawn = {c.column: rng.uniform(1, 50, count).astype(c.dtype) for c in CORRUPTIONS}
    size = rng.integers(50, 99, (count, 2))
    return Views(size, target, target if shared else geometry(), jitter(), jitter(), shared, **drawn)


@pytest.mark.parametrize("shared", [False, True], ids=["own geometries", "one geometry"])
def test_every_column_is_taken_repeated_and_concatenated(shared):
    views, other = many(1, shared=shared), many(2, shared=shared)
    rows = np.array([3, 0, 3, 3])
    before, after = columns(views), columns(views.take(rows))
    assert set(after) == set(before)
    assert len(before) == 1 + 2 * 3 + 2 * len(JITTER) + len(CORRUPTIONS)
    for name, column in before.items():
        np.testing.assert_array_equal(after[name], column[rows])
        assert after[name].dtype == column.dtype
    both = Views.concatenate([views, other])
    for name, column in columns(both).items():
        np.testing.assert_array_equal(column, np.concatenate([before[name], columns(other)[name]]))
    assert (both.source_geometry is both.target_geometry) == shared
    with pytest.raises(ValueError, match="all or none"):
        Views.concatenate([views, many(3, shared=not shared)])


def test_columns_that_are_left_out_say_that_nothing_was_done_to_the_source():
    bare = many(1).uncorrupted()
    assert not ActionSpace().encode(bare)[:, 4:].any()
    for corruption in CORRUPTIONS:
        column = getattr(bare, corruption.column)
        assert column.dtype == corruption.dtype
        assert not corruption.done(column).any()
        assert corruption.done(getattr(bare.corrupted(corruption, 1), corruption.column)).all()


def test_the_tables_name_components_columns_and_keys_that_there_are():
    names = {row.name for row in COMPONENTS}
    assert tuple(row.name for row in COMPONENTS[: len(JITTER)]) == JITTER
    columns = {field.name for field in dataclasses.fields(Views)}
    for corruption in CORRUPTIONS:
        assert corruption.name in names
        assert corruption.column in columns
        assert component(corruption.name).unit == "flag"
        assert {f"{corruption.name}_probability"} <= set(ActionsConfig.model_fields)
        if corruption.strength is not None:
            assert corruption.strength in names
            assert corruption.strength in ActionsConfig.model_fields


def test_the_jitter_is_sampled_within_ranges_that_everybody_reads_alike():
    actions = ActionsConfig(strength=2.0, brightness=0.7, hue=0.4)
    assert jitter_range(actions, "brightness") == (0.0, 2.4)
    assert jitter_range(actions, "contrast") == pytest.approx((0.2, 1.8))
    assert jitter_range(actions, "hue") == (-180.0, 180.0)
    assert varying(ActionsConfig(contrast=0.0)) == ["brightness", "saturation", "hue"]
    assert varying(ActionsConfig(strength=0.0)) == []
