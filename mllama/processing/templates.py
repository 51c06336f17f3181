"""Chat templates of a checkpoint: one, or several by name, and the files they are in.

Names are those of `transformers`: the one called "default" is used where none is chosen.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mllama.checkpoints.checkpoint import read_json
from mllama.files import FileRefused, read_text
from mllama.wording import listed, quoted, shown

Templates = str | dict[str, str]
_FILE, _FOLDER = "chat_template.jinja", "additional_chat_templates"
_LEGACY = "chat_template.json"
_LONGEST_FILE, _MOST = 4 * 2**20, 100
_PUBLISHED = "meta-llama/Llama-3.2-11B-Vision-Instruct"


def chosen_template(templates: Templates | None, chosen: str | None) -> str:
    """The source of the template to use.

    Args:
        templates: of the processor.
        chosen: a name among `templates`, or the source itself; None: theirs, or the one called "default".
    Raises: ValueError when there is none, or the name is not known; TypeError for what is no string.
    """
    named = templates if isinstance(templates, Mapping) else {}
    if chosen is not None:
        if not isinstance(chosen, str):
            raise TypeError(
                f"chat_template must be a template or a name, got {type(chosen).__name__}"
            )
        if chosen in named:
            return named[chosen]
        if any(mark in chosen for mark in ("{{", "{%", "{#")):
            return chosen
        known = f"there are {listed(named)}" if named else "there are none by name"
        raise ValueError(
            f"no chat template is called {quoted(chosen)}, and it is none itself; {known}"
        )
    if isinstance(templates, str):
        return templates
    if "default" in named:
        return named["default"]
    if named:
        raise ValueError(f"choose a chat template by name, none is the default: {listed(named)}")
    raise ValueError(
        "this processor has no chat template; pass chat_template, or put the file chat_template.json of "
        f"{_PUBLISHED} (or of the checkpoint your weights come from) into its folder"
    )


def parsed_templates(value: Any, where: str) -> Templates | None:
    """What a config file stores: a string, a dictionary of names, or a list of {"name", "template"}.

    Raises: ValueError naming the file.
    """
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, (list, tuple)) and all(isinstance(entry, Mapping) for entry in value):
        pairs = [(entry.get("name"), entry.get("template")) for entry in value]
    else:
        pairs = list(value.items()) if isinstance(value, Mapping) else [(None, None)]
    if not all(isinstance(text, str) for pair in pairs for text in pair):
        raise ValueError(f"{where}: chat_template must be a string, or strings by name")
    named = dict(pairs)
    return named["default"] if set(named) == {"default"} else named


def read_templates(folder: Path) -> Templates | None:
    """The templates of a folder, but for those of its tokenizer_config.json.

    The first of: `chat_template` in processor_config.json, chat_template.json, and chat_template.jinja with
    the named ones in additional_chat_templates/.
    Raises: ValueError naming the file.
    """
    for name in ("processor_config.json", _LEGACY):
        path = folder / name
        templates = read_json(path).get("chat_template") if path.is_file() else None
        if templates is not None:
            return parsed_templates(templates, str(path))
    files = {path.stem: path for path in sorted((folder / _FOLDER).glob("*.jinja"))}
    if (folder / _FILE).exists():
        files["default"] = folder / _FILE
    if len(files) > _MOST:
        raise ValueError(f"{folder / _FOLDER} has {len(files)} templates; at most {_MOST} are read")
    named = {}
    for name, path in files.items():
        try:
            named[name] = read_text(path, _LONGEST_FILE)
        except FileRefused as error:
            raise ValueError(f"{shown(str(path))} is no chat template: {error}") from None
    return parsed_templates(named, str(folder)) if named else None


def write_templates(folder: Path, templates: Templates | None) -> tuple[list[str], str | None]:
    """Write the template files, and remove those of an earlier save that would be read instead.

    Returns: the paths, and the template for chat_template.json, which older releases read; None for named
        ones, which that file cannot hold and `transformers` refuses beside it.
    Raises: ValueError for a name that is no plain file name.
    """
    named = {"default": templates} if isinstance(templates, str) else dict(templates or {})
    for name in named:
        if not re.fullmatch(r"\w[\w.\- ]*", name):
            raise ValueError(
                f"a chat template cannot be called {quoted(name)}: it is saved by that name"
            )
    legacy = named["default"] if set(named) == {"default"} else None
    wanted = {folder / _FOLDER / f"{name}.jinja": text for name, text in named.items()}
    if "default" in named:
        wanted[folder / _FILE] = wanted.pop(folder / _FOLDER / "default.jinja")
    for path in (folder / _FILE, *(folder / _FOLDER).glob("*.jinja")):
        if path not in wanted:
            path.unlink(missing_ok=True)
    if legacy is None:
        (folder / _LEGACY).unlink(missing_ok=True)
    for path, text in wanted.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return [str(path) for path in wanted], legacy
