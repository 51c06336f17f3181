"""Where a checkpoint's files are: a local folder, or a hub id with `huggingface_hub` installed."""

from __future__ import annotations

import os
import re
from pathlib import Path

# Exactly one slash, no path syntax: what the hub accepts as a repository id.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*/[A-Za-z0-9][\w.\-]*", re.ASCII)
# Never pickle files, and not Meta's original/ folder: it would double the download.
_PATTERNS = [
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.json",
    "chat_template.jinja",
    "*.safetensors",
    "model.safetensors.index.json",
]


def resolve_folder(name_or_path: str | os.PathLike[str]) -> Path:
    """The local folder of a checkpoint; a hub id is downloaded (or found in the hub's cache).

    A name is looked up on the hub only if it is no existing path and has the form "owner/name".

    Raises:
        FileNotFoundError: a path that does not exist.
        NotADirectoryError: a path that is a file.
        ModuleNotFoundError: a hub id without `huggingface_hub`.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise NotADirectoryError(f"{path} is a file; expected the folder of a checkpoint")
    name = os.fspath(name_or_path)
    if isinstance(name_or_path, os.PathLike) or not _HUB_ID.fullmatch(name):
        raise FileNotFoundError(
            f"there is no folder {path}, and {name!r} is no hub id (owner/name)"
        )
    try:
        from huggingface_hub import snapshot_download
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"there is no folder {name}; to download it as a hub id, install huggingface_hub: "
            f"pip install 'mllama-kernels[hub]'"
        ) from None
    return Path(snapshot_download(name, allow_patterns=_PATTERNS))
