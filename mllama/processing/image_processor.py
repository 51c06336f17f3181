"""Images to tiles: the published image processor, value for value.

Convert to RGB, resize in uint8 (Pillow, antialiased), pad to a grid of tiles, rescale and normalise
to float32, cut into tiles. A uint8 pixel has 256 values, so the float arithmetic runs on a table of
256 entries per channel with the published operations and roundings, and the pixels only look up.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image

from mllama.checkpoints.checkpoint import read_json
from mllama.checkpoints.gguf.container import GgufFile, is_gguf
from mllama.checkpoints.gguf.metadata import image_options
from mllama.checkpoints.hub import DOWNLOAD_OPTIONS, resolve_folder
from mllama.checkpoints.meta_params import params_entries
from mllama.limits import OWN_FILES, Limits
from mllama.processing.batch_feature import BatchFeature, check_container, convert_to_tensors
from mllama.processing.bounds import check_array, check_limits, check_samples
from mllama.processing.image_options import checked_options
from mllama.processing.images import convert_to_rgb, load_image, nest_images
from mllama.processing.options import IDLE_OPTIONS, IMAGE_OPTIONS, refuse_foreign
from mllama.processing.paths import AllowPaths, check_allow_paths
from mllama.processing.pixels import eight_bit
from mllama.processing.tiling import best_tile_grid, size_in_canvas, supported_aspect_ratios
from mllama.wording import quoted

_CONFIG_FILE = "preprocessor_config.json"
_NESTED_CONFIG_FILE = "processor_config.json"
_META_PARAMS = "params.json"
_META_STATISTICS = {  # fixed in Meta's code
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
}


class MllamaImageProcessor:
    """Images of any size to float32 tiles, aspect-ratio ids and masks.

    Args:
        do_convert_rgb: PIL images and 4-channel arrays become RGB, transparency laid on white.
        do_resize, do_pad: must be True; the model needs whole tiles.
        size: side of a tile in pixels, as {"height": t, "width": t} or t.
        resample: Pillow's filter, 2 is bilinear.
        do_rescale, rescale_factor: multiply by `rescale_factor`.
        do_normalize, image_mean, image_std: subtract and divide, per channel or one number for all.
        max_image_tiles: tiles an image may fill.
        limits: what is accepted of an image and of a call; not stored with the processor.
    The defaults are those of the published class; published checkpoints come with their own.
    Raises: ValueError naming the option and its value.
    """

    model_input_names: ClassVar[list[str]] = [
        "pixel_values",
        "num_tiles",
        "aspect_ratio_ids",
        "aspect_ratio_mask",
    ]

    def __init__(
        self,
        do_convert_rgb: bool = True,
        do_resize: bool = True,
        size: int | Sequence[int] | Mapping[str, int] | None = None,
        resample: int = Image.Resampling.BILINEAR,
        do_rescale: bool = True,
        rescale_factor: float = 1 / 255,
        do_normalize: bool = True,
        image_mean: float | Sequence[float] = (0.5, 0.5, 0.5),
        image_std: float | Sequence[float] = (0.5, 0.5, 0.5),
        do_pad: bool = True,
        max_image_tiles: int = 4,
        *,
        limits: Limits = OWN_FILES,
    ) -> None:
        check_limits(limits)
        options = checked_options(
            limits,
            do_convert_rgb=do_convert_rgb,
            do_resize=do_resize,
            size=224 if size is None else size,
            resample=resample,
            do_rescale=do_rescale,
            rescale_factor=rescale_factor,
            do_normalize=do_normalize,
            image_mean=image_mean,
            image_std=image_std,
            do_pad=do_pad,
            max_image_tiles=max_image_tiles,
        )
        self.do_convert_rgb: bool = options["do_convert_rgb"]
        self.do_resize: bool = options["do_resize"]
        self.size: dict[str, int] = options["size"]
        self.resample: int = options["resample"]
        self.do_rescale: bool = options["do_rescale"]
        self.rescale_factor: float = options["rescale_factor"]
        self.do_normalize: bool = options["do_normalize"]
        self.image_mean: float | list[float] = options["image_mean"]
        self.image_std: float | list[float] = options["image_std"]
        self.do_pad: bool = options["do_pad"]
        self.max_image_tiles: int = options["max_image_tiles"]
        self.limits = limits

    def __call__(self, images: Any, **kwargs: Any) -> BatchFeature:
        """The same as `preprocess`."""
        return self.preprocess(images, **kwargs)

    def preprocess(
        self,
        images: Any,
        *,
        input_data_format: str | None = None,
        return_tensors: str | None = None,
        device: str | torch.device | None = None,
        limits: Limits | None = None,
        allow_paths: AllowPaths = True,
        **options: Any,
    ) -> BatchFeature:
        """Turn images into the image inputs of the model.

        Args:
            images: one image (one sample), a flat list (one sample with all of them), or a list
                with one list per sample, where [] is a sample without an image. An image is a
                path, the bytes of a file, a binary file object, a PIL image, or a numpy array or
                tensor (H, W, C), (C, H, W) or (H, W): bools, integers 0..255 or within the range of a
                type of 16 or 32 bits (see `mllama.processing.pixels`), or floats 0..1 or 0..255.
                Floats 0..1 are still multiplied by `rescale_factor` unless do_rescale=False.
            input_data_format: "channels_first" or "channels_last" for arrays and tensors; by
                default the axis that has 1 or 3 (else 4) entries, the first if both have 3.
            return_tensors: "pt", "np", or None (numpy arrays as well).
            device: where the tensors of "pt" go.
            limits: bounds of this call instead of those of the class.
            allow_paths: False when nothing may be read from the disk, a folder when only files inside it
                may. Open files and decoded images are the caller's own.
            **options: any option of the class, for this call; others of `transformers` where they change
                nothing.
        Returns, with B samples, N the most images of a sample and T = max_image_tiles:
            pixel_values: (B, N, T, C, t, t) float32; absent tiles and images are zero.
            aspect_ratio_ids: (B, N) int64; 0 where a sample has no such image.
            aspect_ratio_mask: (B, N, T) int64, 1 for real tiles; the first is always 1.
            num_tiles: list of lists of int, real tiles of each image; never a tensor.
        Raises: ImageOpenError, ValueError or TypeError naming the image, the option or the bound, all of
            them before an image is opened but for what is wrong with an image itself.
        """
        others = {k: v for k, v in options.items() if k not in IMAGE_OPTIONS}
        refuse_foreign(others, "image option", IMAGE_OPTIONS)
        limits = self.limits if limits is None else limits
        check_container(return_tensors, device)
        check_limits(limits)
        check_allow_paths(allow_paths)
        samples = nest_images(images)
        if not any(samples):
            raise ValueError("no image given: images is empty, or every sample in it is")
        check_samples(samples, limits, allow_paths)
        now = self.call_options(samples, options, limits)

        def resized(source: Any, name: str) -> _Fitted:
            image = load_image(source, name=name, limits=limits, allow_paths=allow_paths)
            return _resized(image, name, now, input_data_format)

        fitted = [
            [resized(source, f"images[{i}][{j}]") for j, source in enumerate(sample)]
            for i, sample in enumerate(samples)
        ]
        if now["do_rescale"] and any(p.faint for sample in fitted for p in sample):
            warnings.warn(
                "an image of numbers 0..1 is multiplied by rescale_factor once more and becomes nearly "
                "black; pass do_rescale=False for such images",
                stacklevel=3,
            )
        batch = _pack(fitted, now)
        num_tiles = [[p.rows * p.columns for p in sample] for sample in fitted]
        encoded = convert_to_tensors(batch, return_tensors, device)
        encoded["num_tiles"] = num_tiles
        return encoded

    def call_options(
        self, samples: Sequence[Sequence[Any]], options: Mapping[str, Any], limits: Limits
    ) -> dict[str, Any]:
        """All options of a call for some images, with those of the class where `options` say nothing.

        Raises: ValueError naming the option, or the size of what would be made.
        """
        own = {name: getattr(self, name) for name in IMAGE_OPTIONS}
        chosen = {k: v for k, v in options.items() if k in IMAGE_OPTIONS and v is not None}
        now = checked_options(limits, **{**own, **chosen})
        tile, tiles = now["size"]["height"], now["max_image_tiles"]
        channels = 3 if now["do_convert_rgb"] else 4
        shape = (len(samples), max(map(len, samples)), tiles, channels, tile, tile)
        check_array("pixel_values", shape, "max_pixel_values", limits.max_pixel_values)
        return now

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], **options: Any) -> MllamaImageProcessor:
        """Build from the contents of a config file; keys that are not options are ignored."""
        kind = config.get("image_processor_type")
        if kind is not None and not str(kind).startswith("Mllama"):
            raise ValueError(
                f"image_processor_type is {quoted(kind)}, expected MllamaImageProcessor"
            )
        known = {k: config[k] for k in IMAGE_OPTIONS if config.get(k) is not None}
        return cls(**{**known, **options})

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike, **options: Any) -> MllamaImageProcessor:
        """Read a checkpoint folder or hub id, or a GGUF file with a vision tower.

        Reads `image_processor` in processor_config.json, else preprocessor_config.json, else what
        params.json in Meta's folder `original/` says. A GGUF file says how large tiles are, and how many.
        Args:
            **options: of the class, before what the file says; for a hub id token, revision, cache_dir,
                local_files_only, force_download, subfolder; use_fast and trust_remote_code, without effect.
        Raises: FileNotFoundError or ValueError naming the folder or the file.
        """
        download = {k: options.pop(k) for k in DOWNLOAD_OPTIONS if k in options}
        options = {k: v for k, v in options.items() if k not in IDLE_OPTIONS}
        if is_gguf(Path(folder)):
            stored = image_options(GgufFile(Path(folder)))
            return cls.from_dict({**_META_STATISTICS, **stored}, **options)
        folder = resolve_folder(folder, **{k: v for k, v in download.items() if v is not None})
        nested = folder / _NESTED_CONFIG_FILE
        if nested.is_file():
            config = read_json(nested).get("image_processor")
            if config is not None:
                return cls.from_dict(config, **options)
        flat = folder / _CONFIG_FILE
        if flat.is_file():
            return cls.from_dict(read_json(flat), **options)
        for meta in (folder / _META_PARAMS, folder / "original" / _META_PARAMS):
            if meta.is_file():
                return cls.from_dict(_from_params(meta), **options)
        raise FileNotFoundError(
            f"{folder} has no {_CONFIG_FILE} or {_NESTED_CONFIG_FILE}, and no original/{_META_PARAMS}; copy "
            "one from the checkpoint that the weights come from, such as "
            "meta-llama/Llama-3.2-11B-Vision-Instruct, or pass image_processor="
        )

    def to_dict(self) -> dict[str, Any]:
        """All options, as stored in preprocessor_config.json."""
        config = {name: getattr(self, name) for name in IMAGE_OPTIONS}
        return {**config, "image_processor_type": "MllamaImageProcessor"}

    def to_json_string(self) -> str:
        """`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    def save_pretrained(self, folder: str | os.PathLike) -> list[str]:
        """Write preprocessor_config.json into `folder`, made if needed; returns the path."""
        path = Path(folder) / _CONFIG_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.to_json_string(), encoding="utf-8")
        return [str(path)]

    def __repr__(self) -> str:
        return f"MllamaImageProcessor({self.to_dict()})"


class _Fitted:
    """A resized image and the grid of tiles it goes into."""

    def __init__(
        self, pixels: np.ndarray, scaled: bool, faint: bool, rows: int, columns: int
    ) -> None:
        self.pixels = pixels  # (height, width, C) uint8
        self.scaled = scaled  # came as floats 0..1
        self.faint = faint  # came as numbers whose largest is at most 1, and not only as 0
        self.rows = rows
        self.columns = columns


def _resized(
    image: Image.Image | np.ndarray | torch.Tensor,
    name: str,
    options: dict[str, Any],
    data_format: str | None,
) -> _Fitted:
    try:
        image, scaled, faint = _to_pil(image, options["do_convert_rgb"], data_format)
    except (ValueError, TypeError, RuntimeError) as error:  # the last of no values, like meta
        kind = ValueError if isinstance(error, ValueError) else TypeError
        raise kind(f"{name}: {error}") from error
    tile, max_tiles = options["size"]["height"], options["max_image_tiles"]
    width, height = image.size
    rows, columns = best_tile_grid(height, width, max_tiles, tile)
    new_height, new_width = size_in_canvas(height, width, rows * tile, columns * tile, tile)
    resized = image.resize((new_width, new_height), resample=options["resample"])
    pixels = np.asarray(resized)
    return _Fitted(pixels.reshape(new_height, new_width, -1), scaled, faint, rows, columns)


def _from_params(path: Path) -> dict[str, Any]:
    params = params_entries(read_json(path))
    size = params.get("vision_chunk_size")
    if not isinstance(size, int):
        raise ValueError(f"{path} has no vision_chunk_size: not a Llama 3.2 Vision model")
    tiles = params.get("vision_max_num_chunks", 4)
    return {**_META_STATISTICS, "size": size, "max_image_tiles": tiles}


def _to_pil(
    image: Image.Image | np.ndarray | torch.Tensor, do_convert_rgb: bool, data_format: str | None
) -> tuple[Image.Image, bool, bool]:
    """A uint8 PIL image, whether it was scaled up from floats 0..1, and whether its numbers were 0..1."""
    if isinstance(image, Image.Image):
        if do_convert_rgb:
            return convert_to_rgb(image), False, False
        # modes like "P" and "F" become the numbers they store, "1" becomes 0 and 1
        array = np.asarray(image)
        array = array.astype(np.uint8) if array.dtype == bool else array
    else:
        if isinstance(image, torch.Tensor):
            image = image.detach().cpu().resolve_conj().resolve_neg()
            image = (image.float() if image.dtype == torch.bfloat16 else image).numpy()
        array = image
        if array.ndim not in (2, 3) or 0 in array.shape:
            raise ValueError(f"expected an image (H, W, C), (C, H, W) or (H, W), got {image.shape}")
        if array.ndim == 3 and _channels_first(array.shape, data_format):
            array = array.transpose(1, 2, 0)
        if array.ndim == 3 and array.shape[2] not in (1, 3, 4):
            raise ValueError(
                f"an image has 1, 3 or 4 channels, shape {tuple(image.shape)} as {data_format} has "
                f"{array.shape[2]}"
            )
    array = array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array
    values, scaled = eight_bit(array)
    pixels = Image.fromarray(np.ascontiguousarray(values))
    if do_convert_rgb and pixels.mode in ("L", "RGBA"):
        pixels = convert_to_rgb(pixels)
    return pixels, scaled, scaled or values.max() == 1


def _channels_first(shape: tuple[int, ...], data_format: str | None) -> bool:
    if data_format is not None:
        data_format = getattr(data_format, "value", data_format)
        if data_format not in ("channels_first", "channels_last"):
            raise ValueError(
                f"input_data_format must be channels_first or channels_last, got {quoted(data_format)}"
            )
        return data_format == "channels_first"
    ends = {shape[0], shape[2]}
    if 1 in ends and ends <= {1, 3, 4}:
        raise ValueError(
            f"shape {shape} is an image of one row, of one column, or channels first; say which by "
            'input_data_format="channels_last" or "channels_first"'
        )
    for channels in ((1, 3), (4,)):
        if shape[0] in channels:
            return True
        if shape[2] in channels:
            return False
    raise ValueError(f"no axis of shape {shape} has 1, 3 or 4 channels")


@lru_cache(maxsize=32)
def _lookup_table(
    channels: int,
    scaled: bool,
    rescale_factor: float | None,
    mean: float | tuple[float, ...] | None,
    std: float | tuple[float, ...] | None,
) -> np.ndarray:
    """(C, 256) float32: what each uint8 value becomes, with the published order of roundings."""
    value = np.broadcast_to(np.arange(256, dtype=np.uint8), (channels, 256))
    with np.errstate(all="ignore"):  # what overflows is refused below
        for factor in (1 / 255 if scaled else None, rescale_factor):
            if factor is not None:
                value = (value.astype(np.float64) * factor).astype(np.float32)
        value = value.astype(np.float32)
        if mean is not None and std is not None:
            shifted = value - _column(mean, channels, "image_mean")
            value = shifted / _column(std, channels, "image_std")
    if not np.isfinite(value).all():
        raise ValueError(
            f"pixel values are beyond float32 with rescale_factor {quoted(rescale_factor)}, image_mean "
            f"{quoted(mean)} and image_std {quoted(std)}"
        )
    value.flags.writeable = False
    return value


def _column(numbers: float | tuple[float, ...], channels: int, name: str) -> np.ndarray:
    if isinstance(numbers, tuple) and len(numbers) != channels:
        raise ValueError(
            f"an image has {channels} channels, {name} has {len(numbers)} values; pass RGB "
            "images, or statistics that fit"
        )
    column = numbers if isinstance(numbers, tuple) else (numbers,) * channels
    return np.array(column, dtype=np.float32)[:, None]


def _pack(images: list[list[_Fitted]], options: dict[str, Any]) -> dict[str, np.ndarray]:
    """Write every image straight into the one buffer that is returned."""
    tile, max_tiles = options["size"]["height"], options["max_image_tiles"]
    channels = sorted({p.pixels.shape[2] for sample in images for p in sample})
    if len(channels) > 1:
        raise ValueError(f"images of one batch must have the same channels, got {channels}")
    mean, std = (
        tuple(v) if isinstance(v, list) else v
        for v in (options["image_mean"], options["image_std"])
    )
    normalize = options["do_normalize"]
    shape = len(images), max(len(sample) for sample in images)
    ratios = supported_aspect_ratios(max_tiles)
    pixel_values = np.zeros((*shape, max_tiles, channels[0], tile, tile), dtype=np.float32)
    ids = np.zeros(shape, dtype=np.int64)
    mask = np.zeros((*shape, max_tiles), dtype=np.int64)
    mask[:, :, 0] = 1  # absent images too: an encoder with no valid token has no softmax
    for i, sample in enumerate(images):
        for j, image in enumerate(sample):
            table = _lookup_table(
                channels[0],
                image.scaled,
                options["rescale_factor"] if options["do_rescale"] else None,
                mean if normalize else None,
                std if normalize else None,
            )
            _write_tiles(pixel_values[i, j], image, table)
            ids[i, j] = ratios.index((image.rows, image.columns)) + 1
            mask[i, j, : image.rows * image.columns] = 1
    return {"pixel_values": pixel_values, "aspect_ratio_ids": ids, "aspect_ratio_mask": mask}


def _write_tiles(tiles: np.ndarray, image: _Fitted, table: np.ndarray) -> None:
    """Fill (T, C, t, t) from an image; the rest of its canvas gets the value of a black pixel."""
    tile = tiles.shape[-1]
    for index in range(image.rows * image.columns):
        row, column = divmod(index, image.columns)
        part = image.pixels[row * tile : (row + 1) * tile, column * tile : (column + 1) * tile]
        height, width, _ = part.shape
        for channel, values in enumerate(table):
            target = tiles[index, channel]
            target[height:] = values[0]
            target[:height, width:] = values[0]
            # mode="clip" skips the bounds check, which a uint8 index cannot fail
            np.take(values, part[..., channel], out=target[:height, :width], mode="clip")
