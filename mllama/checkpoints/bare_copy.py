"""A folder of what a checkpoint's model is made of and nothing else, to be given to another library.

`transformers` follows more than this package does: an `attn_implementation` in config.json names code on the
hub that it fetches and runs, an adapter_config.json another model that it loads instead.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mllama.checkpoints.safetensors_files import INDEX
from mllama.config import MllamaConfig
from mllama.config_base import ConfigBase


@contextmanager
def bare_copy(folder: Path, config: MllamaConfig) -> Iterator[Path]:
    """A folder with links to the weights of one that has been loaded, and the fields of its configuration."""
    with TemporaryDirectory() as place:
        copy = Path(place)
        for path in [*folder.glob("*.safetensors"), folder / INDEX]:
            if path.is_file():
                (copy / path.name).symlink_to(path.resolve())
        (copy / "config.json").write_text(json.dumps(_fields(config)), encoding="utf-8")
        yield copy


def _fields(config: ConfigBase) -> dict[str, Any]:
    """The entries that are read here, in the configurations of the towers too."""
    entries = {n: getattr(config, n) for n in config.field_names() if n != "semantics"}
    parts = {n: _fields(value) for n, value in entries.items() if isinstance(value, ConfigBase)}
    return {**entries, **parts, "model_type": config.model_type}
