"""The configuration of a model that is loaded: the folder's own, or one that the caller gives instead."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllama.checkpoints.checkpoint import read_json
from mllama.checkpoints.hub import resolve_folder
from mllama.config_base import ConfigBase
from mllama.semantics import Semantics, resolve_semantics, semantics_of_checkpoint


@dataclass(frozen=True)
class ConfigSource:
    """The entries of a `config.json` and where they are from, with the semantics and the reason for them."""

    entries: Mapping[str, Any]
    name: str
    semantics: Semantics
    reason: str


def config_source(
    given: Any,
    stored: Mapping[str, Any],
    *,
    original_layout: bool = False,
    download: Mapping[str, Any] = {},
) -> ConfigSource:
    """What configures a model.

    Args:
        given: None; a configuration of this package or of `transformers`; its entries; or the folder or
            hub id of a checkpoint whose configuration it is.
        stored: the entries of the folder's own, empty where there is none.
        original_layout: whether they are derived from Meta's layout.
        download: how to fetch a hub id; see :func:`mllama.checkpoints.hub.resolve_folder`.

    The weights decide the semantics, so that the folder's configuration does where there is one, unless the
    given configuration has chosen.

    Raises: TypeError for anything else as ``given``.
    """
    semantics, reason = semantics_of_checkpoint(stored, original_layout=original_layout)
    if given is None:
        return ConfigSource(stored, "config.json", semantics, reason)
    if isinstance(given, (str, os.PathLike)):
        path = Path(given)
        if not path.is_file():
            path = resolve_folder(given, **{**download, "subfolder": None}) / "config.json"
        entries = read_json(path)
    elif isinstance(given, Mapping):
        entries = dict(given)
    elif hasattr(given, "to_dict"):
        entries = given.to_dict()
        if isinstance(given, ConfigBase) and given.semantics == "auto":
            del entries["semantics"]  # to_dict() writes what that means without a checkpoint
    else:
        raise TypeError(
            f"config must be a configuration, its entries or a folder, got {type(given).__name__}"
        )
    chosen = given.semantics if isinstance(given, ConfigBase) else "auto"
    if chosen != "auto":
        semantics, reason = resolve_semantics(chosen), "the given configuration has them"
    elif not stored:
        semantics, reason = semantics_of_checkpoint(entries)
    return ConfigSource(entries, "the given configuration", semantics, reason)
