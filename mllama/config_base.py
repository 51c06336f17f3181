"""What all configurations share: reading and writing `config.json`, and the check of what it says."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from mllama.checkpoints.checkpoint import read_json
from mllama.checkpoints.hub import DOWNLOAD_OPTIONS, resolve_folder
from mllama.config_fields import ConfigError
from mllama.semantics import resolve_semantics
from mllama.wording import quoted

Config = TypeVar("Config", bound="ConfigBase")

_WHOLE = "mllama"  # the model_type whose `config.json` has one for each tower


@dataclass
class ConfigBase:
    """Conversion to and from `config.json`; entries that are not fields are kept in ``extra``."""

    model_type: ClassVar[str]
    aliases: ClassVar[dict[str, str]] = {}
    part: ClassVar[str | None] = None
    # Settings of `transformers` that are read by no field, with the value that they have here.
    settings: ClassVar[dict[str, bool]] = {"output_attentions": False, "return_dict": True}
    # Not part of a configuration: where it was loaded from. `transformers.pipeline` asks for the other.
    name_or_path = ""
    _commit_hash = None

    def check(self, problems: list[str]) -> None:
        """Raises: ConfigError with ``problems`` and those of the settings that have no field."""
        extra: Mapping[str, Any] = vars(self)["extra"]
        for name, value in self.settings.items():
            if extra.get(name) not in (value, None):
                problems.append(f"{name} can only be {value}, got {quoted(extra[name])}")
        if problems:
            raise ConfigError(type(self).__name__, problems)

    @classmethod
    def from_dict(cls: type[Config], values: Mapping[str, Any]) -> Config:
        """Build from the entries of a `config.json`, old (transformers 4) or new (5).

        Raises: ConfigError, a ValueError that lists every fault.
        """
        values = cls._canonical(values)
        given = values.pop("model_type", cls.model_type)
        if given != cls.model_type:
            message = f'{cls.__name__} needs model_type "{cls.model_type}", got {quoted(given)}'
            raise ConfigError(cls.__name__, [message])
        names = cls.field_names()
        known = {key: value for key, value in values.items() if key in names}
        return cls(**known, extra={key: value for key, value in values.items() if key not in names})

    @classmethod
    def field_names(cls) -> set[str]:
        return {f.name for f in dataclasses.fields(cls)} - {"extra"}

    @classmethod
    def option_names(cls) -> set[str]:
        """What may be given for a stored configuration instead of what it says."""
        return cls.field_names() | cls.aliases.keys() | cls.settings.keys()

    @classmethod
    def replaced(cls, stored: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
        """The stored entries with those that are given in their place."""
        return cls._canonical(stored) | cls._canonical(given)

    @classmethod
    def _canonical(cls, entries: Mapping[str, Any]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key, value in entries.items():
            name = cls.aliases.get(key, key)
            if name in values and values[name] != value:
                message = f"{name} is there under two names, as {quoted(values[name])} and {quoted(value)}"
                raise ConfigError(cls.__name__, [message])
            values[name] = value
        return values

    @classmethod
    def entries_of(cls, stored: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """The entries for this class in a `config.json`, which may be a whole model's; None without.

        Raises: ConfigError for a part that is no dictionary.
        """
        kind = stored.get("model_type")
        if cls.part is not None and kind == _WHOLE:
            semantics = {key: stored[key] for key in ("semantics",) if key in stored}
            part = stored.get(cls.part)
            if part is not None and not isinstance(part, Mapping):
                message = f"{cls.part} must be a dictionary, got {quoted(part)}"
                raise ConfigError(cls.__name__, [message])
            return {**(part or {}), **semantics}
        return stored if kind == cls.model_type else None

    def to_dict(self) -> dict[str, Any]:
        """The entries of a `config.json` that this class and `transformers` read."""
        values = {
            f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "extra"
        }
        if "semantics" in values:
            values["semantics"] = resolve_semantics(values["semantics"]).to_json()
        return {**self.extra, "model_type": self.model_type, **values}

    def to_json_string(self) -> str:
        """:meth:`to_dict` as the text of a `config.json`."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_pretrained(
        cls: type[Config],
        pretrained_model_name_or_path: str | os.PathLike[str],
        **options: Any,
    ) -> Config:
        """Read `config.json` of a checkpoint's folder or hub id; of a whole model's the part that this is.

        Args:
            options: values of fields instead of the stored ones, those of a tower as a dictionary; and for
                an id what :func:`mllama.checkpoints.hub.resolve_folder` takes.
        Raises: ConfigError for unusable values; CheckpointError for a file that is no JSON;
            FileNotFoundError; TypeError naming an argument that is neither.
        """
        values = dict(options)
        download = {key: values.pop(key) for key in options if key in DOWNLOAD_OPTIONS}
        if unknown := sorted(values.keys() - cls.option_names()):
            raise TypeError(
                f"{cls.__name__}.from_pretrained() got unknown arguments {quoted(unknown)}; expected "
                f"fields of the configuration or some of {sorted(DOWNLOAD_OPTIONS)}"
            )
        path = resolve_folder(pretrained_model_name_or_path, **download) / "config.json"
        if not path.exists():
            raise FileNotFoundError(f"{path.parent} has no {path.name}")
        stored = read_json(path)
        entries = cls.entries_of(stored)
        config = cls.from_dict(cls.replaced(stored if entries is None else entries, values))
        config.name_or_path = os.fspath(pretrained_model_name_or_path)
        return config

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Write `config.json` into a folder, which is made if needed."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(self.to_json_string(), encoding="utf-8")

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> Any:
        """The configuration of the text tower, or this one where it has none, whatever is asked for."""
        return getattr(self, "text_config", self)
