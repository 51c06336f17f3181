"""Reading Meta's `original/` folder: params.json and consolidated.pth or consolidated.NN.pth.

The `.pth` files are pickles. They are memory-mapped and opened with `weights_only=True`, which builds
tensors and plain containers and refuses everything else.
"""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mllama.checkpoints.checkpoint import CheckpointError, TensorInfo, read_json
from mllama.checkpoints.meta_layout import Recipe, recipes

PARAMS = "params.json"
_CONSOLIDATED = re.compile(r"consolidated(\.(\d\d))?\.pth")
# Made at run time by Meta's code, stored by some of its exports.
_IGNORED = {"text_model.rope.freqs"}
# Fixed in Meta's code, absent from params.json.
_PATCH, _CHANNELS = 14, 3
_VISION_HEADS, _VISION_LAYERS, _GLOBAL_LAYERS, _MLP_RATIO = 16, 32, 8, 4
_TAPS = [3, 7, 15, 23, 30]
_MAX_POSITIONS = 131072
# Stored bytes read before the files are mapped afresh, which bounds the resident pages.
_WINDOW_BYTES = 4 << 30

_Shard = dict[str, Tensor]


def find_meta_folder(folder: Path) -> Path | None:
    """`folder`, or its subfolder `original`, when that holds Meta's layout."""
    for candidate in (folder, folder / "original"):
        if (candidate / PARAMS).is_file() and _shard_files(candidate):
            return candidate
    return None


def _shard_files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if _CONSOLIDATED.fullmatch(p.name))


def _open(path: Path) -> _Shard:
    try:
        shard = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise _BadShard(f"{path.name} is refused, it holds more than weights: {reason}") from None
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise _BadShard(f"{path.name} is truncated or not a torch archive: {reason}") from None
    if not isinstance(shard, dict):
        raise _BadShard(
            f"{path.name} must hold a dictionary of tensors, not {type(shard).__name__}"
        )
    others = [str(key) for key, value in shard.items() if not isinstance(value, Tensor)]
    if others:
        raise _BadShard(f"{path.name} holds entries that are not tensors: {', '.join(others)}")
    return shard


class _BadShard(Exception):
    """A file that cannot be used; the text says why and names it."""


def feed_forward_size(width: int, multiplier: float | None, multiple_of: int) -> int:
    """The feed-forward width that Meta's code computes from params.json."""
    size = int(2 * 4 * width / 3)
    if multiplier is not None:
        size = int(multiplier * size)
    return multiple_of * math.ceil(size / multiple_of)


def cross_attention_layers(self_layers: int, cross_layers: int) -> list[int]:
    """Positions of the cross-attention layers in the merged list of layers (Meta's schedule)."""
    step = math.ceil(self_layers / cross_layers)
    before = list(range(self_layers))[::-1][::step][:cross_layers][::-1]
    return [layer + index for index, layer in enumerate(before)]


def config_from_params(params: dict[str, Any], vision_width: int) -> dict[str, Any]:
    """The `config.json` dictionary that Meta's params.json stands for.

    Args:
        params: the content of params.json, or of its entry "model".
        vision_width: width of the vision tower, from the length of its class embedding.
    Raises: KeyError for an entry that params.json lacks.
    """
    vocabulary = params["vocab_size"]
    # Llama 3's 256 special tokens end the vocabulary; the image token is the first row after it.
    special = vocabulary - 256
    self_layers, cross_layers = params["n_layers"], params["vision_num_cross_attention_layers"]
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": params["rope_theta"]}
    if params.get("use_scaled_rope"):
        rope |= {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    tiles = params.get("vision_max_num_chunks", 4)
    sides = range(1, tiles + 1)
    return {
        "architectures": ["MllamaForConditionalGeneration"],
        "model_type": "mllama",
        "image_token_index": vocabulary,
        "text_config": {
            "model_type": "mllama_text_model",
            "vocab_size": vocabulary,
            "hidden_size": params["dim"],
            "intermediate_size": feed_forward_size(
                params["dim"], params.get("ffn_dim_multiplier"), params.get("multiple_of", 256)
            ),
            "num_hidden_layers": self_layers + cross_layers,
            "num_attention_heads": params["n_heads"],
            "num_key_value_heads": params.get("n_kv_heads") or params["n_heads"],
            "cross_attention_layers": cross_attention_layers(self_layers, cross_layers),
            "rope_parameters": rope,
            "rms_norm_eps": params["norm_eps"],
            "max_position_embeddings": _MAX_POSITIONS,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "bos_token_id": special,
            "eos_token_id": [special + 1, special + 8, special + 9],
            "pad_token_id": special + 4,
        },
        "vision_config": {
            "model_type": "mllama_vision_model",
            "hidden_size": vision_width,
            "intermediate_size": _MLP_RATIO * vision_width,
            "num_hidden_layers": _VISION_LAYERS,
            "num_global_layers": _GLOBAL_LAYERS,
            "attention_heads": _VISION_HEADS,
            "num_channels": _CHANNELS,
            "patch_size": _PATCH,
            "image_size": params["vision_chunk_size"],
            "max_num_tiles": tiles,
            "supported_aspect_ratios": [[h, w] for h in sides for w in sides if h * w <= tiles],
            "intermediate_layers_indices": list(_TAPS),
            "vision_output_dim": (len(_TAPS) + 1) * vision_width,
            "hidden_act": "gelu",
            "norm_eps": 1e-5,
        },
    }


class MetaCheckpoint:
    """Meta's layout as a checkpoint; `config` is the configuration derived from params.json.

    Construction maps the files and looks at names, shapes and dtypes only.
    Raises: CheckpointError when params.json or a shard cannot be used at all.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors: dict[str, TensorInfo] = {}
        self.unreadable: set[str] = set()
        self.problems: list[str] = []
        self._files = _shard_files(folder)
        self._check_numbering()
        shards = self._outlines()
        params = read_json(folder / PARAMS)
        params = params.get("model", params)
        class_embedding = shards[0].get("vision_model.vision_encoder.class_embedding")
        if class_embedding is None or class_embedding.dim() != 1:
            reason = "no vision_model.vision_encoder.class_embedding: not a Llama 3.2 Vision model"
            raise CheckpointError(folder, [*self.problems, reason])
        try:
            self.config = config_from_params(params, class_embedding.shape[0])
        except KeyError as error:
            raise CheckpointError(folder, [f"{PARAMS} lacks {error.args[0]!r}"]) from None
        except (TypeError, ZeroDivisionError) as error:
            raise CheckpointError(folder, [f"{PARAMS} has unusable values: {error}"]) from None
        self._recipes = recipes(self.config)
        self._check_names(shards)
        for name, recipe in self._recipes.items():
            self._describe(name, recipe, shards)

    @property
    def generation_config(self) -> dict[str, Any]:
        """The sampling defaults of Meta's own generator and the special tokens."""
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        tokens = {name: self.config["text_config"][name] for name in names}
        return {**tokens, "do_sample": True, "temperature": 0.6, "top_p": 0.9}

    def _check_numbering(self) -> None:
        numbers = [_CONSOLIDATED.fullmatch(path.name)[2] for path in self._files]
        expected = [f"{i:02d}" for i in range(len(numbers))]
        if numbers not in ([None], expected):
            names = ", ".join(path.name for path in self._files)
            raise CheckpointError(
                self.folder, [f"the shards must be numbered from 00 without gaps, found {names}"]
            )

    def _outlines(self) -> list[_Shard]:
        """Every shard's tensors on the meta device: shapes and dtypes, no data, no mapping."""
        outlines, bad = [], []
        for path in self._files:
            try:
                shard = _open(path)
            except _BadShard as error:
                bad.append(str(error))
                continue
            outlines.append({name: torch.empty_like(t, device="meta") for name, t in shard.items()})
        if bad:
            raise CheckpointError(self.folder, bad)
        return outlines

    def _check_names(self, shards: list[_Shard]) -> None:
        wanted = {name for recipe in self._recipes.values() for name, _ in recipe.parts}
        for path, shard in zip(self._files, shards, strict=True):
            self.problems += [f"{path.name} lacks {name}" for name in sorted(wanted - shard.keys())]
            extra = sorted(shard.keys() - wanted - _IGNORED)
            self.problems += [f"{path.name} holds {name}, which is unknown" for name in extra]

    def _describe(self, name: str, recipe: Recipe, shards: list[_Shard]) -> None:
        stored = " + ".join(part for part, _ in recipe.parts)
        if any(part not in shard for part, _ in recipe.parts for shard in shards):
            self.unreadable.add(name)  # reported as lacking by its own name
            return
        dtypes = {shard[part].dtype for part, _ in recipe.parts for shard in shards}
        try:
            made = recipe.outline(shards)
        except (RuntimeError, ValueError) as error:
            shapes = [tuple(shard[part].shape) for part, _ in recipe.parts for shard in shards]
            reason = str(error).splitlines()[0]
            self.problems.append(f"{stored} has unusable shapes {shapes}: {reason}")
            self.unreadable.add(name)
            return
        floating = all(dtype.is_floating_point and dtype.itemsize > 1 for dtype in dtypes)
        self.tensors[name] = TensorInfo(
            stored_name=stored,
            file=", ".join(path.name for path in self._files),
            shape=tuple(made.shape),
            dtype=made.dtype if floating else None,
            dtype_name=", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes)),
        )

    def read(self, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        """Yields (canonical name, tensor), merged and transformed, mapping a window at a time."""
        window: list[str] = []
        used = 0
        for name in names:
            window.append(name)
            used += self.tensors[name].nbytes
            if used >= _WINDOW_BYTES:
                yield from self._read_window(window)
                window, used = [], 0
        yield from self._read_window(window)

    def _read_window(self, names: list[str]) -> Iterator[tuple[str, Tensor]]:
        shards = [_open(path) for path in self._files] if names else []
        for name in names:
            yield name, self._recipes[name].make(shards)
