"""The image processor against the PIL processor of `transformers`: every value, bit for bit."""

import json
import math
import random
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from mllama.limits import OWN_FILES
from mllama.processing.image_processor import MllamaImageProcessor
from mllama.processing.tiling import best_tile_grid, size_in_canvas, supported_aspect_ratios

theirs = pytest.importorskip("transformers.models.mllama.image_processing_pil_mllama")

PUBLISHED = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "max_image_tiles": 4,
}
MODES = ("RGB", "L", "LA", "P", "RGBA", "CMYK", "1", "PA", "YCbCr", "RGBa")


def processors(tile, **options):
    options = {**PUBLISHED, "size": {"height": tile, "width": tile}, **options}
    return MllamaImageProcessor(**options), theirs.MllamaImageProcessorPil(**options)


def random_image(rng, width, height, mode="RGB"):
    """Noise in any mode; "P" gets a palette with a transparent entry half of the time."""
    noise = np.random.default_rng(rng.getrandbits(32))
    base = "LA" if mode == "PA" else "RGBA" if mode == "RGBa" else mode
    base = "RGB" if mode in ("P", "1", "YCbCr") else base
    channels = {"RGB": 3, "L": 1, "LA": 2, "RGBA": 4, "CMYK": 4}[base]
    pixels = noise.integers(0, 256, (height, width, channels), dtype=np.uint8)
    image = Image.frombytes(base, (width, height), pixels.tobytes())
    if mode == "P":
        image = image.quantize(16)
        if rng.random() < 0.5:
            image.info["transparency"] = 3
        return image
    return image if mode == base else image.convert(mode)


def assert_equal(got, want):
    assert set(got) == set(want)
    assert got["num_tiles"] == want["num_tiles"]
    for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"):
        a, b = np.asarray(got[name]), np.asarray(want[name])
        assert a.dtype == b.dtype and a.shape == b.shape, name
        assert a.tobytes() == b.tobytes(), f"{name}: {(a != b).sum()} of {a.size} differ"


def random_size(rng, tile):
    """Sizes around and far from the tile, and now and then an extreme ratio."""
    if rng.random() < 0.15:
        size = [rng.randint(1, 3), rng.randint(1, 40 * tile)]
        rng.shuffle(size)
        return tuple(size)
    return tuple(
        rng.choice([rng.randint(1, tile), rng.randint(1, 6 * tile), tile * rng.randint(1, 5)])
        for _ in range(2)
    )


@pytest.mark.parametrize(
    ("images", "tiles"),
    [
        (300, [14, 28, 42, 56, 70]),
        pytest.param(400, [84, 112, 224, 448, 560], marks=pytest.mark.full),
    ],
)
def test_random_sizes_and_modes_are_bit_equal(images, tiles):
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    for count in range(images):
        tile = rng.choice(tiles)
        ours, reference = processors(tile, max_image_tiles=rng.choice([1, 2, 3, 4, 4, 4, 6]))
        size, mode = random_size(rng, tile), MODES[count % len(MODES)]
        image = random_image(rng, *size, mode)
        try:
            assert_equal(ours(image, return_tensors="pt"), reference(image, return_tensors="pt"))
        except AssertionError as error:
            raise AssertionError(f"{mode} {size}, tile {tile}: {error}") from None


@pytest.mark.parametrize("tile", [448, 560])
@pytest.mark.parametrize(
    "size",
    [(1, 1), (100, 100), (561, 561), (1121, 560), (1119, 1121), (1280, 720), (5000, 1), (1, 5000)],
)
def test_published_tile_sizes_are_bit_equal(tile, size):
    ours, reference = processors(tile)
    image = random_image(random.Random(tile), *size)
    assert_equal(ours(image), reference(image))


def test_geometry_equals_transformers_on_a_wide_range():
    rng = random.Random(7)
    for _ in range(2000):
        tile, tiles = rng.choice([14, 448, 560]), rng.choice([1, 2, 3, 4, 5, 9])
        height, width = (max(1, int(tile * 8 ** rng.uniform(-2, 1.5))) for _ in range(2))
        rows, columns = best_tile_grid(height, width, tiles, tile)
        canvas = theirs.get_optimal_tiled_canvas(height, width, tiles, tile)
        assert (rows * tile, columns * tile) == tuple(canvas)
        fit = theirs.get_image_size_fit_to_canvas(height, width, *canvas, tile)
        assert size_in_canvas(height, width, *canvas, tile) == tuple(fit)


@pytest.mark.parametrize(
    ("width", "height", "tile", "aspect_id", "resized"),
    [
        (1, 1, 560, 1, (560, 560)),
        (640, 480, 560, 2, (480, 640)),
        (480, 640, 560, 5, (640, 480)),
        (1280, 720, 560, 6, (630, 1120)),
        (1121, 560, 448, 3, (448, 896)),
        (3000, 100, 560, 4, (74, 2240)),
        (1, 5000, 448, 8, (1792, 1)),
        (1600, 400, 560, 3, (400, 1600)),
    ],
)
def test_geometry_of_known_images(width, height, tile, aspect_id, resized):
    grid = best_tile_grid(height, width, 4, tile)
    assert supported_aspect_ratios(4).index(grid) + 1 == aspect_id
    assert size_in_canvas(height, width, grid[0] * tile, grid[1] * tile, tile) == resized


def test_batches_of_unequal_samples_are_bit_equal():
    rng = random.Random(3)
    ours, reference = processors(28)
    a, b, c = (random_image(rng, *size) for size in ((30, 90), (100, 20), (9, 9)))
    for batch in ([[a], [], [b, c]], [[a, b, c]], [a, b], [[a], [b]], [[], [c]]):
        assert_equal(ours(batch, return_tensors="pt"), reference(batch, return_tensors="pt"))
    mask = ours([[a], [], [b, c]]).aspect_ratio_mask
    assert mask[1].tolist() == [[1, 0, 0, 0], [1, 0, 0, 0]]


def arrays(rng):
    noise = np.random.default_rng(rng)
    whole = noise.integers(0, 256, (33, 50, 3), dtype=np.uint8)
    yield "uint8 channels last", whole
    yield "uint8 channels first", np.ascontiguousarray(whole.transpose(2, 0, 1))
    yield "strided", noise.integers(0, 256, (66, 100, 3), dtype=np.uint8)[::2, ::-2]
    yield "int64", whole.astype(np.int64)
    yield "float whole numbers", whole.astype(np.float32)
    yield "float64 0..1", noise.random((40, 31, 3))
    yield "float32 0..1", noise.random((3, 40, 31), dtype=np.float32)
    yield "float16 0..1", noise.random((40, 31, 3)).astype(np.float16)
    yield "float zeros and ones", noise.integers(0, 2, (20, 20, 3)).astype(np.float32)
    yield "ambiguous", noise.integers(0, 256, (3, 40, 3), dtype=np.uint8)
    yield "batch", noise.integers(0, 256, (4, 20, 30, 3), dtype=np.uint8)


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_arrays_and_tensors_are_bit_equal(kind):
    ours, reference = processors(28)
    for name, array in arrays(11):
        if kind == "torch":
            array = torch.from_numpy(np.ascontiguousarray(array))
        for images in (array, [array], [[array], [array, array]]) if array.ndim == 3 else (array,):
            try:
                assert_equal(ours(images), reference(images))
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from None


def test_input_data_format_is_honoured():
    ours, reference = processors(28)
    array = np.random.default_rng(0).integers(0, 256, (3, 40, 3), dtype=np.uint8)
    last = ours(array, input_data_format="channels_last")
    assert_equal(last, reference(array, input_data_format="channels_last"))
    assert last.pixel_values.tobytes() != ours(array).pixel_values.tobytes()
    with pytest.raises(ValueError, match=r"images\[0\]\[0\]: input_data_format must be .*'hwc'"):
        ours(array, input_data_format="hwc")


OPTIONS = [
    {"do_rescale": False},
    {"do_normalize": False},
    {"do_rescale": False, "do_normalize": False},
    {"rescale_factor": 1 / 127.5},
    {"image_mean": 0.25, "image_std": 0.75},
    {"image_mean": [0.1, 0.9, 0.4], "image_std": [0.3, 0.7, 1.1]},
    *({"resample": r} for r in range(6)),
    {"max_image_tiles": 2},
    {"size": {"height": 42, "width": 42}},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options_at_construction_and_at_the_call(options):
    rng = random.Random(5)
    image = random_image(rng, 90, 51)
    floats = np.random.default_rng(2).random((61, 40, 3))
    ours, reference = processors(28, **options)
    plain, _ = processors(28)
    for images in (image, floats):
        want = reference(images)
        assert_equal(ours(images), want)
        assert_equal(plain(images, **options), want)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "CMYK", "RGB", "1"])
def test_without_conversion_to_rgb(mode):
    ours, reference = processors(28, do_convert_rgb=False, do_normalize=False)
    image = random_image(random.Random(1), 40, 70, mode)
    assert_equal(ours(image), reference(image))


def test_four_channel_array_is_laid_on_white():
    ours, _ = processors(28)
    array = np.random.default_rng(4).integers(0, 256, (30, 41, 4), dtype=np.uint8)
    image = Image.fromarray(array)
    assert ours(array).pixel_values.tobytes() == ours(image).pixel_values.tobytes()
    assert ours(array.transpose(2, 0, 1)).num_tiles == ours(image).num_tiles


def test_bfloat16_tensor_is_read_as_its_float_values():
    ours, _ = processors(28)
    tensor = torch.randint(0, 256, (3, 20, 20)).to(torch.bfloat16)
    assert ours(tensor).pixel_values.tobytes() == ours(tensor.float()).pixel_values.tobytes()


def test_padding_values():
    """Absent tiles are zero after normalisation; padding inside a canvas is a black pixel."""
    ours, _ = processors(28)
    values = ours(Image.new("RGB", (56, 10), (255, 255, 255))).pixel_values[0, 0]
    black = [-m / s for m, s in zip(PUBLISHED["image_mean"], PUBLISHED["image_std"])]
    assert np.allclose(values[:2, :, -1, 0], black, rtol=1e-6)
    assert not values[2:].any()


def test_config_round_trip(tmp_path):
    ours, reference = processors(28, do_normalize=False, resample=3)
    ours.save_pretrained(tmp_path / "ours")
    reference.save_pretrained(tmp_path / "theirs")
    again = MllamaImageProcessor.from_pretrained(tmp_path / "theirs")
    stored = json.loads(reference.to_json_string())
    assert again.to_dict() == ours.to_dict() == stored
    loaded = theirs.MllamaImageProcessorPil.from_pretrained(tmp_path / "ours")
    assert json.loads(loaded.to_json_string()) == stored
    assert MllamaImageProcessor.from_pretrained(tmp_path / "ours", size=42).size["width"] == 42
    defaults = theirs.MllamaImageProcessorPil().to_json_string()
    assert MllamaImageProcessor().to_dict() == json.loads(defaults)


def test_results_are_independent_and_deterministic():
    ours, _ = processors(28)
    image = random_image(random.Random(8), 60, 60)
    first, second = ours(image).pixel_values, ours(image).pixel_values
    assert first.tobytes() == second.tobytes()
    first[:] = 0
    assert second.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"do_resize": False}, "do_resize=False is not supported"),
        ({"do_pad": False}, "do_pad=False is not supported"),
        ({"size": {"height": 28, "width": 56}}, "square and positive, got height 28, width 56"),
        ({"size": {"shortest_edge": 28}}, "size must be an int or have keys height and width"),
        ({"max_image_tiles": 0}, "max_image_tiles must be a positive integer, got 0"),
        ({"resample": 17}, "17 is not a valid Resampling"),
        ({"max_image_tiles": True}, "max_image_tiles must be a positive integer, got True"),
        ({"image_std": 0}, "image_std must be a number, not 0, or one per channel, got 0"),
        ({"image_std": (0.5, 0.0, 0.5)}, "image_std must be a number, not 0, or one per channel"),
        ({"image_std": "0.5"}, "image_std must be a number, not 0, or one per channel, got '0.5'"),
        ({"image_mean": [0.5, math.nan, 0.5]}, "image_mean must be a number, or one per channel"),
        ({"image_mean": [0.5, None, 0.5]}, "image_mean must be a number, or one per channel"),
        ({"rescale_factor": "1/255"}, "rescale_factor must be a number, got '1/255'"),
    ],
)
def test_options_that_cannot_work(options, message):
    with pytest.raises(ValueError, match=message):
        MllamaImageProcessor(**options)
    with pytest.raises(ValueError, match=message):
        MllamaImageProcessor()(Image.new("RGB", (5, 5)), **options)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        ([], ValueError, "no image given"),
        ([[], []], ValueError, "no image given"),
        (3, TypeError, "images must be images .* got int"),
        ([[Image.new("L", (2, 2)), 4]], TypeError, r"images\[0\]\[1\] is not an image, got int"),
        ([Image.new("L", (2, 2)), [3]], TypeError, r"images\[1\] is not an image, got list"),
        (np.zeros(4), ValueError, r"1 dimensions, shape \(4,\)"),
        (np.zeros((5, 4, 6)), ValueError, r"no axis of shape \(5, 4, 6\)"),
        (np.full((4, 4, 3), 300), ValueError, "values are 300 to 300; expected whole numbers"),
        (np.full((4, 4, 3), -0.5), ValueError, "values are -0.5 to -0.5; expected floats"),
        (np.full((4, 4, 3), np.nan), ValueError, "values are nan"),
        (np.zeros((1, 9, 3), np.uint8), ValueError, r"shape \(1, 9, 3\) is an image of one row"),
    ],
    ids=lambda v: str(v)[:30] if not isinstance(v, np.ndarray) else str(v.shape),
)
def test_images_that_cannot_work(images, error, message):
    with pytest.raises(error, match=message):
        MllamaImageProcessor()(images)


def test_unknown_option_is_named():
    with pytest.raises(TypeError, match="unknown image option 'do_centre_crop'"):
        MllamaImageProcessor()(Image.new("RGB", (5, 5)), do_centre_crop=True)


def test_pil_image_over_the_pixel_cap_is_refused():
    processor = MllamaImageProcessor(limits=replace(OWN_FILES, max_pixels=100))
    with pytest.raises(ValueError, match=r"images\[0\]\[0\] is 11 x 10 = 110 pixels; at most 100"):
        processor(Image.new("RGB", (11, 10)))
    assert MllamaImageProcessor().limits is OWN_FILES


def test_config_of_another_processor_is_refused():
    with pytest.raises(ValueError, match="image_processor_type is 'CLIPImageProcessor'"):
        MllamaImageProcessor.from_dict({"image_processor_type": "CLIPImageProcessor"})


def test_faster_than_transformers():
    """The ratio is printed; the bound is far below what is measured, for noisy machines."""
    both, image = processors(560), random_image(random.Random(9), 1920, 1080)
    runs: list[list[float]] = []
    for _ in range(5):  # by turns, the first of which does not count
        runs.append([])
        for processor in both:
            start = time.process_time()
            processor(image, return_tensors="pt")
            runs[-1].append(time.process_time() - start)
    seconds = [min(own) for own in zip(*runs[1:])]
    print(f"1920x1080 to 4 tiles of 560: {seconds[0] * 1e3:.1f} ms, ", end="")
    print(f"transformers {seconds[1] * 1e3:.1f} ms, ratio {seconds[1] / seconds[0]:.1f}")
    assert seconds[0] < seconds[1]
