"""Configurations: the fields, names and defaults of `transformers`, checked when they are made."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from mllama.config_base import Config, ConfigBase
from mllama.config_fields import (
    COUNT,
    ENTRIES,
    FLAG,
    NOTHING,
    TEXT,
    TOKEN,
    ConfigError,
    either,
    entry,
    integer,
    kind_problems,
    list_of,
    number,
    value_problem,
)
from mllama.semantics import Semantics, SemanticsLike, resolve_semantics
from mllama.shapes import EXTRA_ROWS, text_parameters, vision_parameters
from mllama.wording import quoted

_ASPECT_RATIOS = [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]]
_TAPS = [3, 7, 15, 23, 30]
_CROSS_LAYERS = [3, 8, 13, 18, 23, 28, 33, 38]
# Far beyond every model there is: what is larger is a mistake or an attack, and would take the machine along.
_MOST_LAYERS, _MOST_TILES, _MOST_PARAMETERS = 10_000, 1024, 10**13
_LAYERS = integer(1, _MOST_LAYERS)
_WIDTH = integer(1, 2**20)
_HEADS = integer(1, 2**16)
_SIDE = integer(1, 2**16)
_ROWS = integer(1, 2**24)
_TILES = integer(1, _MOST_TILES)
_EPSILON = number(0, 1000)
_THETA = number(0, 1e30, above=True)  # float32 holds its powers
_FACTOR = number(0, 1e9, above=True)
_LLAMA3_ROPE = {
    "factor": _FACTOR,
    "low_freq_factor": _FACTOR,
    "high_freq_factor": _FACTOR,
    "original_max_position_embeddings": COUNT,
}
_INDICES = list_of(TOKEN, "a list of integers of at least 0", most=_MOST_LAYERS)
_RATIOS = list_of(
    list_of(_TILES, "a pair", length=2),
    "a list of pairs of integers of at least 1, [height, width]",
    most=4096,
)
_ONE_TOKEN = either(TOKEN, NOTHING)
_TOKENS = either(TOKEN, list_of(TOKEN, "a list of such integers", most=1024), NOTHING)


def _faults(*checks: tuple[bool, str]) -> list[str]:
    """What is said of the checks that do not hold."""
    return [message for holds, message in checks if not holds]


def _excess(parameters: int) -> list[str]:
    return _faults(
        (
            parameters <= _MOST_PARAMETERS,
            f"the sizes make {parameters:.3g} parameters, at most {_MOST_PARAMETERS:.0e} are possible",
        )
    )


def _semantics_problems(semantics: SemanticsLike) -> list[str]:
    try:
        resolve_semantics(semantics)
    except ValueError as error:
        return [str(error)]
    return []


@dataclass
class MllamaVisionConfig(ConfigBase):
    """The vision tower. Fields and defaults as `transformers.MllamaVisionConfig`, and ``semantics``."""

    model_type: ClassVar[str] = "mllama_vision_model"
    aliases: ClassVar[dict[str, str]] = {"num_attention_heads": "attention_heads"}
    part: ClassVar[str | None] = "vision_config"
    settings: ClassVar[dict[str, bool]] = {**ConfigBase.settings, "output_hidden_states": False}

    hidden_size: int = entry(_WIDTH, 1280)
    hidden_act: str = entry(TEXT, "gelu")
    num_hidden_layers: int = entry(_LAYERS, 32)
    num_global_layers: int = entry(integer(0, _MOST_LAYERS), 8)
    attention_heads: int = entry(_HEADS, 16)
    num_channels: int = entry(integer(1, 1024), 3)
    intermediate_size: int = entry(_WIDTH, 5120)
    vision_output_dim: int = entry(integer(1, 2**24), 7680)
    image_size: int = entry(_SIDE, 448)
    patch_size: int = entry(_SIDE, 14)
    norm_eps: float = entry(_EPSILON, 1e-5)
    max_num_tiles: int = entry(_TILES, 4)
    intermediate_layers_indices: list[int] = entry(_INDICES, None)
    supported_aspect_ratios: list[list[int]] = entry(_RATIOS, None)
    initializer_range: float = entry(number(0), 0.02)
    semantics: SemanticsLike = "auto"
    extra: dict[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.intermediate_layers_indices is None:
            self.intermediate_layers_indices = list(_TAPS)
        if self.supported_aspect_ratios is None:
            self.supported_aspect_ratios = [list(ratio) for ratio in _ASPECT_RATIOS]
        problems = kind_problems(self) + _semantics_problems(self.semantics)
        self.check(problems or self._contradictions() or _excess(vision_parameters(self)))

    def _contradictions(self) -> list[str]:
        heads, width, taps = (
            self.attention_heads,
            self.hidden_size,
            self.intermediate_layers_indices,
        )
        ratios = self.supported_aspect_ratios
        odd = [r for r in ratios if r[0] * r[1] > self.max_num_tiles]
        return _faults(
            (
                self.hidden_act == "gelu",
                f'vision hidden_act must be "gelu", got {quoted(self.hidden_act)}',
            ),
            (
                width % heads == 0,
                f"vision hidden_size {width} is not a multiple of attention_heads {heads}",
            ),
            (
                self.image_size % self.patch_size == 0,
                f"image_size must be one side, a multiple of patch_size {self.patch_size}, "
                f"got {self.image_size}",
            ),
            (bool(taps), "intermediate_layers_indices must name a layer at least, got []"),
            (
                all(i < self.num_hidden_layers for i in taps),
                f"intermediate_layers_indices must lie within 0..{self.num_hidden_layers - 1}, "
                f"got {quoted(taps)}",
            ),
            (
                self.vision_output_dim == width * (1 + len(taps)),
                f"vision_output_dim must be {width * (1 + len(taps))} "
                f"(hidden_size times one more than the taps), got {self.vision_output_dim}",
            ),
            (
                not odd,
                f"supported_aspect_ratios must be pairs of at most {self.max_num_tiles} tiles, "
                f"got {odd[0] if odd else None}",
            ),
            (
                len(set(map(tuple, ratios))) == len(ratios) > 0,
                f"supported_aspect_ratios must be distinct, and one at least, got {quoted(ratios)}",
            ),
        )

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
class MllamaTextConfig(ConfigBase):
    """The text tower. Fields and defaults as `transformers.MllamaTextConfig`, and ``semantics``.

    RoPE is kept in ``rope_parameters`` (transformers 5); ``rope_theta`` and ``rope_scaling``
    (transformers 4) are read too and always agree with it afterwards. The default cross-attention
    layers are those that a tower with fewer layers has of the 11B model's.
    """

    model_type: ClassVar[str] = "mllama_text_model"
    part: ClassVar[str | None] = "text_config"
    # Of a model that is split over ranks, set when it is loaded; nothing that is stored.
    tensor_parallel_size: ClassVar[int] = 1

    vocab_size: int = entry(_ROWS, 128256)
    hidden_size: int = entry(_WIDTH, 4096)
    hidden_act: str = entry(TEXT, "silu")
    num_hidden_layers: int = entry(_LAYERS, 40)
    num_attention_heads: int = entry(_HEADS, 32)
    num_key_value_heads: int = entry(_HEADS, 8)
    intermediate_size: int = entry(_WIDTH, 14336)
    rope_parameters: dict[str, Any] | None = entry(either(ENTRIES, NOTHING), None)
    rope_theta: float = entry(_THETA, 500000.0)
    rope_scaling: dict[str, Any] | None = entry(either(ENTRIES, NOTHING), None)
    rms_norm_eps: float = entry(_EPSILON, 1e-5)
    max_position_embeddings: int = entry(COUNT, 131072)
    initializer_range: float = entry(number(0), 0.02)
    use_cache: bool = entry(FLAG, True)
    tie_word_embeddings: bool = entry(FLAG, False)
    cross_attention_layers: list[int] = entry(_INDICES, None)
    dropout: float = entry(number(0), 0.0)
    bos_token_id: int | None = entry(_ONE_TOKEN, 128000)
    eos_token_id: int | list[int] | None = entry(_TOKENS, 128001)
    pad_token_id: int | None = entry(_ONE_TOKEN, 128004)
    output_hidden_states: bool = entry(FLAG, False)
    semantics: SemanticsLike = "auto"
    extra: dict[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.cross_attention_layers is None:
            self.cross_attention_layers = list(_CROSS_LAYERS)
        problems = kind_problems(self) + _semantics_problems(self.semantics)
        if not problems:
            if self.cross_attention_layers == _CROSS_LAYERS:
                layers = self.num_hidden_layers
                self.cross_attention_layers = [i for i in _CROSS_LAYERS if i < layers]
            problems = self._contradictions() + self._settle_rope()
            problems = problems or _excess(text_parameters(self))
        self.check(problems)

    def _contradictions(self) -> list[str]:
        heads, kv_heads, width = (
            self.num_attention_heads,
            self.num_key_value_heads,
            self.hidden_size,
        )
        cross, layers = self.cross_attention_layers, self.num_hidden_layers
        return _faults(
            (
                self.hidden_act == "silu",
                f'text hidden_act must be "silu", got {quoted(self.hidden_act)}',
            ),
            (
                width % heads == 0,
                f"hidden_size {width} is not a multiple of num_attention_heads {heads}",
            ),
            (
                width // heads % 2 == 0,
                f"head_dim {width // heads} (hidden_size / num_attention_heads) must be even",
            ),
            (
                heads % kv_heads == 0,
                f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}",
            ),
            (
                all(i < layers for i in cross) and len(set(cross)) == len(cross),
                f"cross_attention_layers must be distinct and within 0..{layers - 1}, got {quoted(cross)}",
            ),
            (
                len(cross) < layers,
                "at least one layer must be self-attention; all are cross-attention",
            ),
            (self.dropout == 0, f"dropout must be 0, got {self.dropout}"),
            (  # no field here, but `transformers` takes its rotary frequencies from it
                self.extra.get("head_dim") in (None, width // heads),
                f"head_dim must be hidden_size / num_attention_heads, {width // heads}, got "
                f"{quoted(self.extra.get('head_dim'))}",
            ),
            (
                not self.tie_word_embeddings,
                "tie_word_embeddings is not supported: lm_head has fewer rows",
            ),
        )

    @classmethod
    def replaced(cls, stored: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
        """The same, and of the three entries on RoPE no stored one is left that goes before a given one."""
        values = super().replaced(stored, given)
        names = ("rope_parameters", "rope_scaling")
        rope, scaling = (
            dict(old) if isinstance(old := stored.get(n), Mapping) else {} for n in names
        )
        if any(name in given for name in names):
            values |= {name: given.get(name) for name in names}
            if "rope_theta" not in given and "rope_theta" in rope:
                values["rope_theta"] = rope["rope_theta"]
        elif "rope_theta" in given:
            values |= {"rope_parameters": {**(scaling or rope), "rope_theta": given["rope_theta"]}}
            values.pop("rope_scaling", None)
        return values

    def _settle_rope(self) -> list[str]:
        """Bring the three rope entries into agreement; what is wrong with them."""
        # An explicit old-style block wins, as in transformers 5.
        rope = dict(self.rope_scaling or self.rope_parameters or {})
        rope.setdefault("rope_type", rope.pop("type", "default"))
        rope.pop("type", None)
        rope.setdefault("rope_theta", self.rope_theta)
        kind = rope["rope_type"]
        if kind not in ("default", "llama3"):
            return [f'rope_type must be "default" or "llama3", got {quoted(kind)}']
        needed = {"rope_theta": _THETA, **(_LLAMA3_ROPE if kind == "llama3" else {})}
        if missing := [key for key in needed if key not in rope]:
            return [f"llama3 rope parameters lack {missing}"]
        problems = [p for key, kind_ in needed.items() for p in value_problem(key, kind_, rope)]
        if not problems and kind == "llama3":
            low, high = rope["low_freq_factor"], rope["high_freq_factor"]
            problems = _faults(
                (low < high, f"low_freq_factor {low} must be below high_freq_factor {high}")
            )
        self.rope_parameters = rope
        self.rope_theta = rope["rope_theta"]
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        self.rope_scaling = scaling if kind != "default" else None
        return problems

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def local_key_value_heads(self) -> int:
        """Those of one rank."""
        return max(1, self.num_key_value_heads // self.tensor_parallel_size)

    @property
    def self_attention_layers(self) -> list[int]:
        cross = set(self.cross_attention_layers)
        return [i for i in range(self.num_hidden_layers) if i not in cross]


@dataclass
class MllamaConfig(ConfigBase):
    """Vision tower, text tower, the image token, and the ``semantics`` of both towers.

    Args:
        vision_config, text_config: configurations or their entries; None for the 11B defaults.
        image_token_index: id of ``<|image|>``; ``image_token_id`` reads the same.
        output_hidden_states: whether a forward that says nothing returns them; so does the text
            configuration's.
        semantics: "auto" (here "meta"), "meta", "transformers", a mapping of single switches, or a
            :class:`Semantics`; it holds for both towers.
    Raises: ConfigError, a ValueError that lists every fault of the three.
    """

    model_type: ClassVar[str] = "mllama"
    aliases: ClassVar[dict[str, str]] = {"image_token_id": "image_token_index"}

    vision_config: MllamaVisionConfig | dict[str, Any] | None = None
    text_config: MllamaTextConfig | dict[str, Any] | None = None
    image_token_index: int = entry(TOKEN, 128256)
    output_hidden_states: bool = entry(FLAG, False)
    semantics: SemanticsLike = "auto"
    extra: dict[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        problems = kind_problems(self)
        if wrong := _semantics_problems(self.semantics):
            self.check(problems + wrong)  # both towers would repeat it
        semantics = resolve_semantics(self.semantics)
        for part, kind in (
            ("vision_config", MllamaVisionConfig),
            ("text_config", MllamaTextConfig),
        ):
            try:
                setattr(self, part, _tower(kind, getattr(self, part), semantics))
            except ConfigError as error:
                problems += [f"{part}: {problem}" for problem in error.problems]
        if not problems:
            rows = self.text_config.vocab_size + EXTRA_ROWS
            problems = _faults(
                (
                    self.image_token_index < rows,
                    f"image_token_index {self.image_token_index} is outside the embedding's {rows} rows",
                )
            )
        self.check(problems)

    @classmethod
    def replaced(cls, stored: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
        """The same; of a tower that is given as a dictionary the other entries stay."""
        values = super().replaced(stored, given)
        for part, kind in (
            ("vision_config", MllamaVisionConfig),
            ("text_config", MllamaTextConfig),
        ):
            if isinstance(given.get(part), Mapping) and isinstance(stored.get(part), Mapping):
                values[part] = kind.replaced(stored[part], given[part])
        return values

    @property
    def image_token_id(self) -> int:
        return self.image_token_index

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        for part in ("vision_config", "text_config"):
            values[part] = getattr(self, part).to_dict()
            del values[part]["semantics"]
        return values


def _tower(kind: type[Config], given: Any, semantics: Semantics) -> Config:
    """A tower's configuration of what a whole one was given for it."""
    if given is None or isinstance(given, Mapping):
        given = kind.from_dict(given or {})
    if not isinstance(given, kind):
        message = f"must be a {kind.__name__} or a dictionary, got {quoted(given)}"
        raise ConfigError(kind.__name__, [message])
    return dataclasses.replace(given, semantics=semantics)
