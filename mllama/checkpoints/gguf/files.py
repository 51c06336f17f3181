"""The one or two files of a GGUF model, and whether they belong together."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mllama.checkpoints.checkpoint import CheckpointError
from mllama.checkpoints.gguf.container import BadGguf, GgufFile
from mllama.checkpoints.gguf.names import Dialect, dialect_of, is_vision
from mllama.wording import quoted

ARCHITECTURE = "mllama"


@dataclass(frozen=True)
class GgufFiles:
    """Attributes:
    text: the file with the text model.
    vision: that with the vision tower, which may be the same; None without a projector file.
    """

    text: GgufFile
    vision: GgufFile | None

    @property
    def all(self) -> list[GgufFile]:
        return [self.text] if self.vision in (None, self.text) else [self.text, self.vision]

    @property
    def dialect(self) -> Dialect:
        return dialect_of(self.vision.tensors if self.vision else ())


def open_files(path: Path, projector: Path | None) -> GgufFiles:
    """Open a model, and read nothing but headers.

    Raises: CheckpointError for a file that cannot be read, one of another architecture, and halves that are
        given in each other's place.
    """
    try:
        text = GgufFile(path)
        other = None if projector is None else GgufFile(projector)
    except BadGguf as error:
        raise CheckpointError(path, [str(error)]) from None
    problems = [_foreign(file) for file in (text, other) if file is not None]
    has_text, has_vision = _halves(text)
    if other is not None and not has_text and _halves(other) == (True, False):
        problems.append(
            f"the two files are swapped: {text.name} is the projector file, and {other.name} the text file, "
            "which goes in the place of the model"
        )
        other = None
    elif not has_text:
        problems.append(
            f"{text.name} is a projector file, without a text model: give the text file as the model and "
            "this one as projector="
        )
    elif has_vision and other is not None:
        problems.append(f"{text.name} is a whole model, which takes no projector file")
    if other is not None and not is_projector(other):
        problems.append(
            f"{other.name} is no projector file: it must hold tensors of the vision tower only"
        )
    if problems := [problem for problem in problems if problem]:
        raise CheckpointError(path, problems)
    return GgufFiles(text, text if has_vision else other)


def is_projector(file: GgufFile) -> bool:
    """Whether a file has the vision tower and no text model."""
    return _halves(file) == (False, True)


def without_vision(text: GgufFile) -> str:
    """What is said of a text file where the vision tower is needed."""
    return (
        f"{text.name} is a text file, without the vision tower: give the projector file that belongs to it "
        "as projector= (--projector)"
    )


def _halves(file: GgufFile) -> tuple[bool, bool]:
    """Whether a file has tensors of the text model and of the vision tower."""
    has_vision = any(map(is_vision, file.tensors))
    return not all(map(is_vision, file.tensors)), has_vision


def _foreign(file: GgufFile) -> str | None:
    found = file.metadata.get("general.architecture")
    if found == ARCHITECTURE:
        return None
    return f"{file.name} has the architecture {quoted(found)}, expected {ARCHITECTURE!r}"
