"""The files of a processor, and which of the options of `from_pretrained` is for which part."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mllama.checkpoints.gguf.container import is_gguf
from mllama.checkpoints.gguf.files import open_files
from mllama.checkpoints.hub import DOWNLOAD_OPTIONS, resolve_folder
from mllama.processing.image_processor import MllamaImageProcessor
from mllama.processing.options import IDLE_OPTIONS, IMAGE_OPTIONS
from mllama.processing.templates import Templates, read_templates, write_templates
from mllama.processing.tokenizer import MllamaTokenizer
from mllama.processing.tokenizer_files import TOKENIZER_OPTIONS
from mllama.wording import quoted

if TYPE_CHECKING:
    from mllama.processing.processor import MllamaProcessor

_IMAGES = (*IMAGE_OPTIONS, "limits")


def read_parts(
    name: str | os.PathLike,
    image_processor: MllamaImageProcessor | None,
    tokenizer: MllamaTokenizer | None,
    chat_template: Templates | None,
    projector: str | os.PathLike | None,
    options: Mapping[str, Any],
) -> tuple[MllamaImageProcessor, MllamaTokenizer, Templates | None]:
    """The parts of the processor in a folder, hub id or GGUF file, but for those that are given.

    Args:
        projector: the file that says how large tiles are, where a GGUF file is without the vision tower.
    Raises: FileNotFoundError or ValueError naming the file; TypeError for an option that is unknown, or of a
        part that is given.
    """
    known = (*_IMAGES, *TOKENIZER_OPTIONS, *DOWNLOAD_OPTIONS, *IDLE_OPTIONS)
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise TypeError(
            f"unknown option {quoted(unknown[0])}; there are {', '.join(sorted(known))}"
        )
    for_images = _chosen(options, _IMAGES, "image_processor", image_processor)
    for_text = _chosen(options, TOKENIZER_OPTIONS, "tokenizer", tokenizer)
    download = {n: v for n, v in options.items() if n in DOWNLOAD_OPTIONS and v is not None}
    if is_gguf(Path(name)):
        folder, of_images = Path(name), projector or name
        if tokenizer is None:  # before its entries are missed: files in each other's place
            open_files(folder, None if projector is None else Path(projector))
    elif projector is not None:
        raise ValueError(
            f"projector= goes with a GGUF text file, {quoted(os.fspath(name))} is none"
        )
    else:
        folder = of_images = resolve_folder(name, **download)
    if image_processor is None:
        image_processor = MllamaImageProcessor.from_pretrained(of_images, **for_images)
    if tokenizer is None:
        tokenizer = MllamaTokenizer.from_pretrained(folder, **for_text)
    if chat_template is None and folder.is_dir():
        chat_template = read_templates(folder)
    return image_processor, tokenizer, chat_template


def write_processor(processor: MllamaProcessor, folder: Path) -> list[str]:
    """Write all files of the parts, the templates and processor_config.json; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    templates, legacy = write_templates(folder, processor.chat_template)
    written = [
        *processor.tokenizer.save_pretrained(folder),
        *processor.image_processor.save_pretrained(folder),
        *templates,
    ]
    files = {"processor_config.json": processor.to_dict()}
    if legacy is not None:
        files["chat_template.json"] = {"chat_template": legacy}
    for name, content in files.items():
        text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        (folder / name).write_text(text, encoding="utf-8")
        written.append(str(folder / name))
    return written


def _chosen(
    options: Mapping[str, Any], names: tuple[str, ...], part: str, given: Any
) -> dict[str, Any]:
    chosen = {name: value for name, value in options.items() if name in names and value is not None}
    if chosen and given is not None:
        raise TypeError(
            f"{min(chosen)} is for the {part} of the folder, and {part}= was given instead"
        )
    return chosen
