"""Configurations: the fields, names and defaults of `transformers`, checked when they are made."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from mllama.semantics import Semantics, SemanticsLike, resolve_semantics

_Config = TypeVar("_Config", bound="_ConfigBase")

_ASPECT_RATIOS = [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]]
_LLAMA3_ROPE_KEYS = (
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass
class _ConfigBase:
    """Conversion to and from `config.json`; entries that are not fields are kept in ``extra``."""

    model_type: ClassVar[str]
    aliases: ClassVar[dict[str, str]] = {}

    @classmethod
    def from_dict(cls: type[_Config], values: Mapping[str, Any]) -> _Config:
        """Build from the entries of a `config.json`, old (transformers 4) or new (5)."""
        values = {cls.aliases.get(key, key): value for key, value in values.items()}
        given = values.pop("model_type", cls.model_type)
        _require(
            given == cls.model_type,
            f'{cls.__name__} needs model_type "{cls.model_type}", got {given!r}',
        )
        names = {f.name for f in dataclasses.fields(cls) if f.init} - {"extra"}
        known = {key: value for key, value in values.items() if key in names}
        return cls(**known, extra={key: value for key, value in values.items() if key not in names})

    def to_dict(self) -> dict[str, Any]:
        """The entries of a `config.json` that this class and `transformers` read."""
        values = {
            f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "extra"
        }
        if "semantics" in values:
            values["semantics"] = resolve_semantics(values["semantics"]).to_json()
        return {**self.extra, "model_type": self.model_type, **values}

    @classmethod
    def from_pretrained(cls: type[_Config], folder: str | Path) -> _Config:
        """Read `config.json` in ``folder``."""
        return cls.from_dict(json.loads((Path(folder) / "config.json").read_text(encoding="utf-8")))


@dataclass
class MllamaVisionConfig(_ConfigBase):
    """The vision tower. Fields and defaults as `transformers.MllamaVisionConfig`, and ``semantics``."""

    model_type: ClassVar[str] = "mllama_vision_model"
    aliases: ClassVar[dict[str, str]] = {"num_attention_heads": "attention_heads"}

    hidden_size: int = 1280
    hidden_act: str = "gelu"
    num_hidden_layers: int = 32
    num_global_layers: int = 8
    attention_heads: int = 16
    num_channels: int = 3
    intermediate_size: int = 5120
    vision_output_dim: int = 7680
    image_size: int = 448
    patch_size: int = 14
    norm_eps: float = 1e-5
    max_num_tiles: int = 4
    intermediate_layers_indices: list[int] = field(default_factory=lambda: [3, 7, 15, 23, 30])
    supported_aspect_ratios: list[list[int]] = field(
        default_factory=lambda: [list(r) for r in _ASPECT_RATIOS]
    )
    initializer_range: float = 0.02
    semantics: SemanticsLike = "auto"
    extra: dict[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        heads, width, taps = (
            self.attention_heads,
            self.hidden_size,
            self.intermediate_layers_indices,
        )
        _require(
            self.hidden_act == "gelu", f'vision hidden_act must be "gelu", got {self.hidden_act!r}'
        )
        _require(
            width % heads == 0,
            f"vision hidden_size {width} is not a multiple of attention_heads {heads}",
        )
        _require(
            isinstance(self.image_size, int) and self.image_size % self.patch_size == 0,
            f"image_size must be one side, a multiple of patch_size {self.patch_size}, got {self.image_size}",
        )
        _require(
            all(0 <= i < self.num_hidden_layers for i in taps),
            f"intermediate_layers_indices must lie within 0..{self.num_hidden_layers - 1}, got {taps}",
        )
        _require(
            self.vision_output_dim == width * (1 + len(taps)),
            f"vision_output_dim must be {width * (1 + len(taps))} "
            f"(hidden_size times one more than the taps), got {self.vision_output_dim}",
        )
        for ratio in self.supported_aspect_ratios:
            _require(
                len(ratio) == 2 and 1 <= ratio[0] * ratio[1] <= self.max_num_tiles,
                f"supported_aspect_ratios must be pairs of at most {self.max_num_tiles} tiles, got {ratio}",
            )
        resolve_semantics(self.semantics)

    @property
    def num_attention_heads(self) -> int:
        return self.attention_heads

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.attention_heads

    @property
    def max_aspect_ratio_id(self) -> int:
        return len(self.supported_aspect_ratios)

    @property
    def num_patches(self) -> int:
        """Tokens per tile, the class token included."""
        return (self.image_size // self.patch_size) ** 2 + 1


@dataclass
class MllamaTextConfig(_ConfigBase):
    """The text tower. Fields and defaults as `transformers.MllamaTextConfig`, and ``semantics``.

    RoPE is kept in ``rope_parameters`` (transformers 5); ``rope_theta`` and ``rope_scaling``
    (transformers 4) are read too and always agree with it afterwards.
    """

    model_type: ClassVar[str] = "mllama_text_model"

    vocab_size: int = 128256
    hidden_size: int = 4096
    hidden_act: str = "silu"
    num_hidden_layers: int = 40
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    intermediate_size: int = 14336
    rope_parameters: dict[str, Any] | None = None
    rope_theta: float = 500000.0
    rope_scaling: dict[str, Any] | None = None
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 131072
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = False
    cross_attention_layers: list[int] = field(
        default_factory=lambda: [3, 8, 13, 18, 23, 28, 33, 38]
    )
    dropout: float = 0.0
    bos_token_id: int | None = 128000
    eos_token_id: int | list[int] | None = 128001
    pad_token_id: int | None = 128004
    semantics: SemanticsLike = "auto"
    extra: dict[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        heads, kv_heads, width = (
            self.num_attention_heads,
            self.num_key_value_heads,
            self.hidden_size,
        )
        cross = self.cross_attention_layers
        _require(
            self.hidden_act == "silu", f'text hidden_act must be "silu", got {self.hidden_act!r}'
        )
        _require(
            width % heads == 0,
            f"hidden_size {width} is not a multiple of num_attention_heads {heads}",
        )
        _require(
            width // heads % 2 == 0,
            f"head_dim {width // heads} (hidden_size / num_attention_heads) must be even",
        )
        _require(
            heads % kv_heads == 0,
            f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}",
        )
        _require(
            all(0 <= i < self.num_hidden_layers for i in cross) and len(set(cross)) == len(cross),
            f"cross_attention_layers must be distinct and within 0..{self.num_hidden_layers - 1}, "
            f"got {cross}",
        )
        _require(
            len(cross) < self.num_hidden_layers,
            "at least one layer must be self-attention; all are cross-attention",
        )
        _require(self.dropout == 0, f"dropout must be 0, got {self.dropout}")
        _require(
            not self.tie_word_embeddings,
            "tie_word_embeddings is not supported: lm_head has fewer rows",
        )
        self._settle_rope()
        resolve_semantics(self.semantics)

    def _settle_rope(self) -> None:
        # An explicit old-style block wins, as in transformers 5.
        rope = dict(self.rope_scaling or self.rope_parameters or {})
        rope.setdefault("rope_type", rope.pop("type", "default"))
        rope.pop("type", None)
        rope.setdefault("rope_theta", self.rope_theta)
        kind = rope["rope_type"]
        _require(
            kind in ("default", "llama3"), f'rope_type must be "default" or "llama3", got {kind!r}'
        )
        if kind == "llama3":
            missing = [key for key in _LLAMA3_ROPE_KEYS if key not in rope]
            _require(not missing, f"llama3 rope parameters lack {missing}")
        self.rope_parameters = rope
        self.rope_theta = rope["rope_theta"]
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        self.rope_scaling = scaling if kind != "default" else None

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def self_attention_layers(self) -> list[int]:
        return [i for i in range(self.num_hidden_layers) if i not in self.cross_attention_layers]


@dataclass
class MllamaConfig(_ConfigBase):
    """Vision tower, text tower, the image token, and the ``semantics`` of both towers.

    Args:
        vision_config, text_config: configurations or their entries; None for the 11B defaults.
        image_token_index: id of ``<|image|>``; ``image_token_id`` reads the same.
        semantics: "auto" (here "meta"), "meta", "transformers", a mapping of single switches, or a
            :class:`Semantics`; it holds for both towers.
    """

    model_type: ClassVar[str] = "mllama"
    aliases: ClassVar[dict[str, str]] = {"image_token_id": "image_token_index"}

    vision_config: MllamaVisionConfig | dict[str, Any] | None = None
    text_config: MllamaTextConfig | dict[str, Any] | None = None
    image_token_index: int = 128256
    semantics: SemanticsLike = "auto"
    extra: dict[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        semantics = resolve_semantics(self.semantics)
        vision, text = self.vision_config or {}, self.text_config or {}
        vision = MllamaVisionConfig.from_dict(vision) if isinstance(vision, Mapping) else vision
        text = MllamaTextConfig.from_dict(text) if isinstance(text, Mapping) else text
        self.vision_config = dataclasses.replace(vision, semantics=semantics)
        self.text_config = dataclasses.replace(text, semantics=semantics)
        rows = self.text_config.vocab_size + 8
        _require(
            0 <= self.image_token_index < rows,
            f"image_token_index {self.image_token_index} is outside the embedding's {rows} rows",
        )

    @property
    def image_token_id(self) -> int:
        return self.image_token_index

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        for part in ("vision_config", "text_config"):
            values[part] = getattr(self, part).to_dict()
            del values[part]["semantics"]
        return values

    def with_semantics(self, semantics: Semantics) -> MllamaConfig:
        """A copy whose switches are ``semantics``."""
        return dataclasses.replace(self, semantics=semantics)
