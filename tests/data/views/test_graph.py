from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import reference_views as reference
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from made_images import encode, picture, turned
from PIL import Image

from iwm_fast.actions.transforms import CORRUPTIONS, Geometry, Jitter, Views
from iwm_fast.config.schema import ActionsConfig
from iwm_fast.data.decode.encoded import Encoded, decode_upright, inspect, reencode
from iwm_fast.data.views import graph as graph_module
from iwm_fast.data.views import pipeline as pipeline_module
from iwm_fast.data.views.graph import BadRows, ViewGraph
from iwm_fast.data.views.sampling import draw_views

SIZE = 48
COUNT = 12
NO_LIMIT = 2**31 - 1
# Mean absolute error in levels. The graph rounds where the reference does, so the error is far below a level.
EXACT = 0.02
# The base is resized in float32 by DALI and float64 by the reference; a crop's chroma upsampling sees other neighbours.
BASE = 0.5
FULLSIZE = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "fullsize"


@pytest.fixture(scope="module")
def files():
    return [encode(picture(90 + 11 * n, 120 - 5 * n, n)) for n in range(COUNT)]


@pytest.fixture(scope="module")
def encoded(files):
    return [inspect(raw, NO_LIMIT) for raw in files]


@pytest.fixture(scope="module", params=[False, True], ids=["ours", "dali"])
def graph(request):
    """With the CPU's own operators, and with DALI's only, as on a GPU."""
    return ViewGraph(SIZE, COUNT, "cpu", 1, geometric=False, dali_only=request.param)


@pytest.fixture(scope="module", params=[False, True], ids=["ours", "dali"])
def geometric_graph(request):
    return ViewGraph(SIZE, COUNT, "cpu", 1, geometric=True, dali_only=request.param)


def sizes(encoded):
    return np.array([(one.width, one.height) for one in encoded])


def draw(encoded, **changes):
    config = ActionsConfig(**changes)
    ids = np.arange(len(encoded))
    return draw_views(config, 5, np.zeros_like(ids), ids, sizes(encoded))


NEUTRAL = {
    "jitter_probability": 0.0,
    "grayscale_probability": 0.0,
    "blur_probability": 0.0,
    "solarize_probability": 0.0,
}


def only(component):
    """Return a configuration with strong `component` and nothing else."""
    if component in {"grayscale", "blur", "solarize"}:
        return NEUTRAL | {f"{component}_probability": 1.0}
    if component == "compression":
        done = {"compression_probability": 1.0, "compression_quality": (1, 100)}
        return NEUTRAL | {"groups": ("photometric", "compression")} | done
    strengths = {"brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.5}
    return NEUTRAL | {"jitter_probability": 1.0} | {n: s * (n == component) for n, s in strengths.items()}


PHOTOMETRIC = ("brightness", "contrast", "saturation", "hue", "grayscale", "blur", "solarize", "compression")
ALL = {
    "jitter_probability": 1.0,
    "grayscale_probability": 0.5,
    "blur_probability": 0.5,
    "solarize_probability": 0.5,
}


def assert_recreated(rendered, views, tolerance=EXACT, thresholds=(0,)):
    """Check that both views follow from their bases and the emitted parameters.

    thresholds: what may be added to solarize's, pixel by pixel: a level that rounds a half the other way may cross it.
    """
    for row in range(len(views)):
        target = reference.target(rendered.base[row].numpy(), views, row)
        assert reference.error(target, rendered.target[row].numpy()) <= tolerance
        found, base = rendered.source[row].numpy(), rendered.source_base[row].numpy()
        moved = [replace(views, solarize_threshold=views.solarize_threshold + change) for change in thresholds]
        sources = np.stack([reference.source(base, each, row) for each in moved])
        nearest = np.abs(sources.astype(int) - found).argmin(axis=0)
        source = np.take_along_axis(sources, nearest[None], axis=0)[0]
        assert reference.error(source, found) <= tolerance


@pytest.mark.parametrize("component", PHOTOMETRIC)
def test_emitted_parameters_recreate_the_views_for_each_component_alone(graph, encoded, component):
    views = draw(encoded, **only(component))
    rendered = graph.run(encoded, views)
    changed = [not torch.equal(source, base) for source, base in zip(rendered.source, rendered.base, strict=True)]
    assert sum(changed) >= COUNT - 1  # a sigma of 0.1 may leave a picture unchanged
    assert_recreated(rendered, views)


@pytest.mark.parametrize("strength", [1.0, 3.0])
def test_emitted_parameters_recreate_the_views_all_together(graph, encoded, strength):
    views = draw(encoded, strength=strength, **ALL)
    assert_recreated(graph.run(encoded, views), views)


@pytest.mark.parametrize("quality", [1, 5, 20, 50, 75, 95, 100])
def test_a_compressed_source_is_pillows_to_the_last_bit(graph, encoded, quality):
    """libjpeg-turbo with chroma at half resolution in both directions, for DALI on a CPU as for Pillow."""
    views = draw(encoded, **only("compression") | {"compression_quality": (quality, quality)})
    rendered = graph.run(encoded, views)
    for row in range(COUNT):
        expected = reference.compress(rendered.base[row].numpy(), quality)
        assert np.array_equal(expected, rendered.source[row].numpy())


def assert_compressed_last(graph, encoded, views):
    """Check that the source is, to the last bit, the JPEG of everything before."""
    source = graph.run(encoded, views).source.numpy()
    before = graph.run(encoded, replace(views, compression_quality=None))
    assert_recreated(before, replace(views, compression_quality=None), tolerance=10 * EXACT)
    for row, quality in enumerate(views.compression_quality.tolist()):
        whole = before.source[row].numpy()
        assert np.array_equal(source[row], reference.compress(whole, quality) if quality <= 100 else whole)


def test_compression_comes_last(graph, encoded):
    views = draw(encoded, groups=("photometric", "compression"), **ALL)
    assert 0 < (views.compression_quality <= 100).sum() < COUNT
    assert (views.solarize_threshold < 256).any()
    assert_compressed_last(graph, encoded, views)
    assert_recreated(graph.run(encoded, views), views, tolerance=2.0)


def test_compression_comes_last_of_a_source_with_a_geometry_of_its_own(geometric_graph, encoded):
    changes = ALL | {"compression_probability": 1.0}
    views = draw(encoded, groups=("photometric", "geometric", "compression"), **changes)
    assert_compressed_last(geometric_graph, encoded, views)


@pytest.mark.parametrize("quality", [1, 20, 50, 75, 95, 100])
def test_what_dali_does_on_a_gpu_differs_from_pillow_in_the_interpolation_of_chroma_alone(quality):
    """For a grey picture, which has no chroma, half a level of rounding is left of the difference."""
    grey = np.repeat(picture(57, 48, 3)[..., :1], 3, axis=2)
    made = reference.compress_without_interpolation(grey, quality)
    assert reference.error(made, reference.compress(grey, quality)) <= 0.5


def test_emitted_parameters_recreate_the_views_with_a_geometry_each(geometric_graph, encoded, files):
    views = draw(encoded, groups=("photometric", "geometric"), **ALL)
    assert len(set(views.source_geometry.rotation.tolist())) > 2
    rendered = geometric_graph.run(encoded, views)
    assert_recreated(rendered, views)
    for row, raw in enumerate(files):
        upright = decode_upright(raw, NO_LIMIT)
        target = reference.place(upright, views.target_geometry, row, SIZE)
        source = reference.place(upright, views.source_geometry, row, SIZE)
        assert reference.error(target, rendered.base[row].numpy()) <= BASE
        assert reference.error(source, rendered.source_base[row].numpy()) <= BASE


@pytest.mark.parametrize("flip", [False, True], ids=["straight", "flipped"])
@pytest.mark.parametrize("turns", range(4))
def test_flip_and_quarter_turns_are_the_references(geometric_graph, encoded, flip, turns):
    """The graph makes all eight by reading backwards and transposing."""
    views = draw(encoded, groups=("photometric", "geometric"), **NEUTRAL)
    own = Geometry(views.source_geometry.crop, np.full(COUNT, flip), np.full(COUNT, turns))
    same = Geometry(own.crop, np.zeros(COUNT, bool), np.zeros(COUNT, np.int64))
    rendered = geometric_graph.run(encoded, replace(views, source_geometry=own, target_geometry=same))
    for straight, placed in zip(rendered.base.numpy(), rendered.source_base.numpy(), strict=True):
        expected = np.rot90(straight[:, ::-1] if flip else straight, turns)
        assert np.abs(expected.astype(int) - placed).max() <= 1  # another order of sums


def test_the_base_is_the_crop_of_pillows_upright_image(graph, encoded, files):
    views = draw(encoded)
    rendered = graph.run(encoded, views)
    for row, raw in enumerate(files):
        expected = reference.place(decode_upright(raw, NO_LIMIT), views.target_geometry, row, SIZE)
        assert reference.error(expected, rendered.base[row].numpy()) <= BASE


def parameters(encoded, seed, widest):
    """Parameters beyond any configuration: any box of a pixel or more, any factor up to 3, any angle, threshold."""
    rng = np.random.default_rng(seed)
    count, size = len(encoded), sizes(encoded)

    def jitter():
        factors = [rng.uniform(0, 3, count) for _ in range(3)]
        return Jitter(*(value.astype(np.float32) for value in (*factors, rng.uniform(-180, 180, count))))

    def geometry(turns):
        box = np.maximum(1, (size * rng.uniform(0, widest, (count, 2))).astype(np.int64))
        corner = (rng.uniform(0, 1, (count, 2)) * (size - box + 1)).astype(np.int64)
        flip = rng.uniform(size=count) < 0.5
        return Geometry(np.concatenate([corner, box], axis=1), flip, rng.integers(0, turns, count))

    return Views(
        size=size,
        target_geometry=geometry(1),
        source_geometry=geometry(4),
        target=jitter(),
        source=jitter(),
        grayscale=rng.uniform(size=count) < 0.3,
        blur_sigma=np.where(rng.uniform(size=count) < 0.5, rng.uniform(0.01, 7, count), 0).astype(np.float32),
        solarize_threshold=rng.integers(0, 257, count),
        shared_geometry=False,
    )


@settings(max_examples=12)
@example(seed=344225837, widest=0.05)  # ten pixels of the level beside the threshold
@given(seed=st.integers(0, 2**32 - 1), widest=st.sampled_from([0.05, 0.4, 1.0]))
def test_whatever_the_parameters_they_recreate_the_views(geometric_graph, encoded, files, seed, widest):
    """Each base from Pillow's upright image, each view from its base. In a crop of few pixels many levels are equal,
    and a half rounds the other way in all of them: ten times the error is allowed.
    """
    views = parameters(encoded, seed, widest)
    rendered = geometric_graph.run(encoded, views)
    assert_recreated(rendered, views, 10 * EXACT, thresholds=(0, -1, 1))
    for row, raw in enumerate(files):
        upright = decode_upright(raw, NO_LIMIT)
        for geometry, base in ((views.target_geometry, rendered.base), (views.source_geometry, rendered.source_base)):
            assert reference.error(reference.place(upright, geometry, row, SIZE), base[row].numpy()) <= BASE


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_crops_are_in_coordinates_of_the_upright_image(kind, orientation):
    raw = turned(picture(70, 50, orientation), orientation, kind)
    one = inspect(raw, NO_LIMIT)
    upright = decode_upright(raw, NO_LIMIT)
    assert (
        (one.width, one.height) == (upright.shape[1], upright.shape[0]) == ((50, 70) if orientation > 4 else (70, 50))
    )
    crop = np.array([[3, 5, 30, 40]])
    views = Views.neutral(sizes([one]), crop)
    base = ViewGraph(SIZE, 1, "cpu", 1, geometric=False).run([one], views).base[0].numpy()
    assert reference.error(reference.resize(upright[5:45, 3:33], SIZE), base) <= BASE


def test_all_eight_orientations_are_placed_in_the_stored_image(geometric_graph, graph):
    """Without Pillow: crops, flips and quarter turns of turned JPEGs against its upright RGB."""
    files = [turned(picture(90 + 7 * n, 70 + 5 * n, n), 1 + n % 8) for n in range(COUNT)]
    encoded = [inspect(raw, NO_LIMIT) for raw in files]
    assert [one.orientation for one in encoded] == [1 + n % 8 for n in range(COUNT)]
    assert not any(one.lossless for one in encoded)
    for seed in range(3):
        ids = np.arange(COUNT) + 100 * seed
        config = ActionsConfig(groups=("photometric", "geometric"), **NEUTRAL)
        views = draw_views(config, 5, ids * 0, ids, sizes(encoded))
        rendered = geometric_graph.run(encoded, views)
        plain = graph.run(encoded, replace(views, source_geometry=views.target_geometry, shared_geometry=True))
        for row, raw in enumerate(files):
            upright = decode_upright(raw, NO_LIMIT)
            target = reference.place(upright, views.target_geometry, row, SIZE)
            source = reference.place(upright, views.source_geometry, row, SIZE)
            assert reference.error(target, plain.base[row].numpy()) <= BASE
            assert reference.error(target, rendered.base[row].numpy()) <= BASE
            assert reference.error(source, rendered.source_base[row].numpy()) <= BASE


def test_neutral_samples_are_bit_equal_to_the_base(graph, encoded):
    rendered = graph.run(encoded, draw(encoded, **NEUTRAL))
    assert torch.equal(rendered.target, rendered.base)
    assert torch.equal(rendered.source, rendered.base)


def test_a_neutral_view_stays_bit_equal_beside_jittered_ones(graph, encoded):
    views = draw(encoded)
    rendered = graph.run(encoded, views)
    neutral = np.flatnonzero(views.target.brightness == 1)
    assert 0 < len(neutral) < COUNT
    assert torch.equal(rendered.target[neutral], rendered.base[neutral])


def test_views_do_not_depend_on_the_batch_or_on_threads(graph, encoded):
    views = draw(encoded)
    whole = graph.run(encoded, views)
    assert whole.source.dtype == torch.uint8
    assert whole.source.shape == (COUNT, SIZE, SIZE, 3)
    other = ViewGraph(SIZE, 5, "cpu", 2, geometric=False, dali_only=graph.dali_only)
    for rows in np.array_split(np.arange(COUNT), 3):
        part = other.run([encoded[row] for row in rows], views.take(rows))
        assert torch.equal(part.source, whole.source[rows])
        assert torch.equal(part.target, whole.target[rows])


@pytest.mark.parametrize("geometric", [False, True], ids=["one geometry", "own geometries"])
@pytest.mark.parametrize("dali_only", [False, True], ids=["ours", "dali"])
def test_several_sources_of_one_decoded_image_are_those_made_alone(encoded, geometric, dali_only):
    groups = ("photometric", "geometric") if geometric else ("photometric",)
    ids = np.arange(COUNT)
    views = draw_views(ActionsConfig(groups=groups, **ALL), 5, ids * 0, ids, sizes(encoded), sources=3)
    options = {"geometric": geometric, "dali_only": dali_only}
    together = ViewGraph(SIZE, COUNT, "cpu", 1, sources=3, **options).run(encoded, views)
    assert together.source.shape == (3 * COUNT, SIZE, SIZE, 3)
    alone = ViewGraph(SIZE, COUNT, "cpu", 1, **options)
    for k in range(3):
        own = alone.run(encoded, views.take(np.arange(k, 3 * COUNT, 3)))
        assert torch.equal(own.target, together.target)
        # The decoded region is wider for three crops than for one, so chroma at a crop's edges may differ.
        pairs = [(own.source, together.source[k::3])]
        pairs += [(own.source_base, together.source_base[k::3])] if geometric else []
        for one, other in pairs:
            assert (one.float() - other.float()).abs().mean() <= (BASE if geometric else 0)


@pytest.mark.parametrize("geometric", [False, True], ids=["one geometry", "own geometries"])
@pytest.mark.parametrize("dali_only", [False, True], ids=["ours", "dali"])
def test_without_bases_the_views_are_the_same(encoded, geometric, dali_only):
    views = draw(encoded, groups=("photometric", "geometric") if geometric else ("photometric",), **ALL)
    options = {"geometric": geometric, "dali_only": dali_only}
    whole = ViewGraph(SIZE, COUNT, "cpu", 1, **options).run(encoded, views)
    bare = ViewGraph(SIZE, COUNT, "cpu", 1, bases=False, **options).run(encoded, views)
    assert torch.equal(bare.source, whole.source)
    assert torch.equal(bare.target, whole.target)
    assert bare.base.shape == bare.source_base.shape == (0, SIZE, SIZE, 3)


def test_batches_come_back_in_the_order_submitted(graph, encoded):
    views = draw(encoded)
    expected = graph.run(encoded, views)
    rows = [np.array([0, 1, 2]), np.array([7]), np.array([4, 3])]
    for chosen in rows:
        graph.submit([encoded[row] for row in chosen], views.take(chosen))
    assert len(graph) == 3
    for chosen in rows:
        assert torch.equal(graph.collect().source, expected.source[chosen])


def test_what_was_handed_out_is_not_written_again(graph, encoded):
    views = draw(encoded)
    first = graph.run(encoded, views)
    kept = first.source.clone()
    for _ in range(4):
        graph.run(encoded[::-1], draw(encoded[::-1]))
    assert torch.equal(first.source, kept)


def test_memory_is_written_again_only_when_nobody_holds_a_part_of_it(encoded):
    """One picture that is still referenced is enough."""
    graph = ViewGraph(SIZE, COUNT, "cpu", 1, geometric=False)
    one = graph.run(encoded, draw(encoded)).source[3]
    kept, array = one.clone(), graph.run(encoded[::-1], draw(encoded[::-1])).target[5].numpy()
    copy = array.copy()
    places = set()
    for _ in range(6):
        places.add(graph.run(encoded[::-1], draw(encoded[::-1])).source.data_ptr())
    assert torch.equal(one, kept)
    assert np.array_equal(array, copy)
    assert len(places) < 6


def damaged(raw):
    """Cut in half; passed to the graph directly, although `inspect` would have rejected it."""
    return Encoded(np.frombuffer(raw[: len(raw) // 2], np.uint8), 90, 120)


def test_rows_that_cannot_be_decoded_are_named_and_the_graph_continues(encoded, files):
    graph = ViewGraph(SIZE, COUNT, "cpu", 1, geometric=False)
    views = draw(encoded)
    expected = graph.run(encoded, views)
    broken = list(encoded)
    broken[3], broken[8] = damaged(files[3]), damaged(files[8])
    with pytest.raises(BadRows, match=r"row 3: .*truncated") as caught:
        graph.run(broken, views)
    assert sorted(caught.value.reasons) == [3, 8]
    assert torch.equal(graph.run(encoded, views).source, expected.source)


def test_a_bad_batch_can_be_replaced_while_others_wait_behind_it(encoded, files):
    graph = ViewGraph(SIZE, COUNT, "cpu", 1, geometric=False)
    views = draw(encoded)
    expected = graph.run(encoded, views)
    broken = list(encoded)
    broken[2] = damaged(files[2])
    graph.submit(broken, views)
    graph.submit(encoded[:4], views.take(np.arange(4)))
    with pytest.raises(BadRows):
        graph.collect()
    graph.replace(encoded, views)
    assert torch.equal(graph.collect().source, expected.source)
    assert torch.equal(graph.collect().source, expected.source[:4])


def test_a_file_that_only_dali_refuses_goes_through_pillow(encoded, files, monkeypatch):
    """No file is known that `inspect` accepts and DALI refuses; a damaged one replaces it, with a simulated Pillow."""
    image = picture(90, 120, 77)
    monkeypatch.setattr(graph_module, "reencode", lambda *_: reencode(encode(image, "PNG"), NO_LIMIT))
    mixed = [*encoded[:3], damaged(files[0])]
    crop = np.concatenate([np.zeros((4, 2), int), sizes(mixed)], axis=1)
    rendered = ViewGraph(SIZE, 4, "cpu", 1, geometric=False).run(mixed, Views.neutral(sizes(mixed), crop))
    assert rendered.lossless == (3,)
    assert reference.error(reference.resize(image, SIZE), rendered.base[3].numpy()) <= BASE


def test_batches_of_a_wrong_size_are_refused(graph, encoded):
    views = draw(encoded)
    with pytest.raises(ValueError, match="1 to 12"):
        graph.submit([], views.take(np.arange(0)))
    with pytest.raises(ValueError, match="3 files and 12 views"):
        graph.submit(encoded[:3], views)


@pytest.mark.parametrize("path", ["image_slice", "image"])
@pytest.mark.parametrize("geometric", [False, True], ids=["one geometry", "own geometries"])
def test_the_definition_for_a_gpu_is_one_that_dali_takes(geometric, path):
    """No GPU runs here, but DALI checks every operator's name, device and arguments when it reads the definition."""
    sources, names = ("source0", "source1"), [corruption.name for corruption in CORRUPTIONS]
    definition = pipeline_module._views(
        SIZE, "gpu", geometric, sources, names, 0.5, path, batch_size=4, num_threads=1, device_id=None
    )
    serialized = definition.serialize()
    assert b"hw_decoder_load" in serialized
    assert b"ColorTwist" in serialized
    assert b"JpegCompressionDistortion" in serialized
    assert (b"ImageSlice" in serialized) is (path == "image_slice")
    assert b"PythonFunction" not in serialized


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_the_definition_has_operators_for_what_is_done_to_sources_and_no_others(device):
    definition = pipeline_module._views(
        SIZE, device, False, ("source0",), ["blur"], 0.5, "image_slice", batch_size=4, num_threads=1, device_id=None
    )
    serialized = definition.serialize()
    assert b"GaussianBlur" in serialized
    assert b"ColorSpaceConversion" not in serialized
    assert b"JpegCompressionDistortion" not in serialized


def test_views_that_a_graph_has_no_operator_for_are_refused(encoded):
    graph = ViewGraph(SIZE, COUNT, "cpu", 1, geometric=False, corruptions=["blur"])
    views = draw(encoded, **NEUTRAL | {"blur_probability": 1.0})
    assert len(graph.run(encoded, views).source) == COUNT
    views.grayscale[3] = True
    with pytest.raises(ValueError, match="views with grayscale need"):
        graph.run(encoded, views)


def test_an_unknown_device_is_refused():
    with pytest.raises(ValueError, match="tpu"):
        ViewGraph(SIZE, 1, "tpu", 1, geometric=False)


def photos():
    root = os.environ.get("IWM_TEST_PHOTOS")
    folder = Path(root) if root else FULLSIZE
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in {".jpg", ".jpeg"}) if folder.is_dir() else []


@pytest.mark.skipif(not photos(), reason="no photographs: IWM_TEST_PHOTOS names no folder with JPEGs")
@pytest.mark.parametrize("component", [*PHOTOMETRIC, "all"])
def test_emitted_parameters_recreate_the_views_of_photographs(component):
    """On every photograph at hand: at most 2 / 255 for each component and for all together."""
    changes = ALL if component == "all" else only(component)
    graph = ViewGraph(96, 32, "cpu", 1, geometric=False)
    paths = photos()
    for first in range(0, len(paths), 32):
        encoded = [inspect(path.read_bytes(), NO_LIMIT) for path in paths[first : first + 32]]
        views = draw(encoded, **changes)
        assert_recreated(graph.run(encoded, views), views, tolerance=2.0)


@pytest.mark.skipif(not photos(), reason="no photographs: IWM_TEST_PHOTOS names no folder with JPEGs")
@pytest.mark.parametrize(("quality", "share"), [(20, 0.0), (50, 0.0), (75, 0.05), (95, 0.1)])
def test_a_gpus_compression_of_photographs_is_within_two_levels_of_pillows_but_for_some(quality, share):
    """At 224 pixels, by the formula: docs/reference/views.md has the distribution, which ``pytest -s`` prints."""
    errors = []
    for path in photos()[:60]:
        image = np.asarray(Image.open(path).convert("RGB").resize((224, 224), Image.Resampling.BILINEAR))
        made = reference.compress_without_interpolation(image, quality)
        errors.append(reference.error(made, reference.compress(image, quality)))
    print(quality, np.mean(errors), np.percentile(errors, 95), max(errors), np.mean(np.array(errors) > 2))
    assert np.mean(np.array(errors) > 2) <= share


GEOMETRIC = {
    "crop": {"flip_probability": 0.0, "rotation_probability": 0.0},
    "flip": {"flip_probability": 0.5, "rotation_probability": 0.0, "crop_scale": (1.0, 1.0)},
    "rotation": {"flip_probability": 0.0, "rotation_probability": 1.0, "crop_scale": (1.0, 1.0)},
    "all": ALL,
}


@pytest.mark.skipif(not photos(), reason="no photographs: IWM_TEST_PHOTOS names no folder with JPEGs")
@pytest.mark.parametrize("component", GEOMETRIC)
def test_emitted_geometry_recreates_the_views_of_photographs(component):
    """The same for geometry: from Pillow's upright image to both views, at most 2 / 255."""
    changes = GEOMETRIC[component] if component == "all" else NEUTRAL | GEOMETRIC[component]
    graph = ViewGraph(96, 32, "cpu", 1, geometric=True)
    paths = photos()
    for first in range(0, len(paths), 32):
        encoded = [inspect(path.read_bytes(), NO_LIMIT) for path in paths[first : first + 32]]
        views = draw(encoded, groups=("photometric", "geometric"), **changes)
        rendered = graph.run(encoded, views)
        assert_recreated(rendered, views, tolerance=2.0)
        for row, path in enumerate(paths[first : first + 32]):
            upright = decode_upright(path.read_bytes(), NO_LIMIT)
            target = reference.place(upright, views.target_geometry, row, 96)
            source = reference.place(upright, views.source_geometry, row, 96)
            assert reference.error(target, rendered.base[row].numpy()) <= 2.0
            assert reference.error(source, rendered.source_base[row].numpy()) <= 2.0


def test_jitter_reference_and_views_agree_on_neutral():
    """Checks the reference: neutral parameters change nothing."""
    image = picture(20, 10)
    assert np.array_equal(reference.jittered(image, Jitter.neutral(1), 0), image)
