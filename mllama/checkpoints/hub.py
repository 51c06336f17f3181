"""Where a checkpoint's files are: a local folder, or a hub id with `huggingface_hub` installed."""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

from mllama.wording import quoted, shown

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
    "additional_chat_templates/*.jinja",
    "*.safetensors",
    "model.safetensors.index.json",
]


# What `huggingface_hub` takes of a call; each of these at None or False is its default.
_HUB_OPTIONS = ("token", "revision", "cache_dir", "local_files_only", "force_download")
DOWNLOAD_OPTIONS = frozenset((*_HUB_OPTIONS, "subfolder"))


def resolve_folder(
    name_or_path: str | os.PathLike[str], *, subfolder: str | None = None, **options: Any
) -> Path:
    """The local folder of a checkpoint; a hub id is downloaded (or found in the hub's cache).

    A name is looked up on the hub only if it is no existing path and has the form "owner/name".

    Args:
        subfolder: where in the folder or repository the checkpoint is.
        options: for a hub id, as `huggingface_hub` takes them: token, revision, cache_dir,
            local_files_only, force_download.
    Raises:
        FileNotFoundError: a path that does not exist.
        NotADirectoryError: a path that is a file.
        ModuleNotFoundError: a hub id without `huggingface_hub`.
        ValueError: a subfolder that is none.
    """
    if subfolder and ((part := PurePath(subfolder)).is_absolute() or ".." in part.parts):
        raise ValueError(
            f"subfolder must be a path below the checkpoint's, got {quoted(subfolder)}"
        )
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return _below(path, subfolder)
    if path.exists():
        raise NotADirectoryError(
            f"{shown(str(path))} is a file; expected the folder of a checkpoint, or a GGUF file"
        )
    name = os.fspath(name_or_path)
    if isinstance(name_or_path, os.PathLike) or not _HUB_ID.fullmatch(name):
        raise FileNotFoundError(
            f"there is no folder {shown(str(path))}, and {quoted(name)} is no hub id (owner/name)"
        )
    try:
        from huggingface_hub import snapshot_download
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"there is no folder {name}; to download it as a hub id, install huggingface_hub: "
            f"pip install 'mllama-kernels[hub]'"
        ) from None
    given = {key: options[key] for key in _HUB_OPTIONS if options.get(key) not in (None, False)}
    if options.get("token") is False:  # no token, not even the one that is stored
        given["token"] = False
    patterns = [f"{PurePosixPath(subfolder) / p}" if subfolder else p for p in _PATTERNS]
    return _below(Path(snapshot_download(name, allow_patterns=patterns, **given)), subfolder)


def _below(folder: Path, subfolder: str | None) -> Path:
    path = folder / subfolder if subfolder else folder
    if not path.is_dir():
        raise FileNotFoundError(f"{folder} has no folder {subfolder}")
    return path
