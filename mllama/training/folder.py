"""The folder of a run: what was asked, the log, the state while it runs, and at the end the result.

run.json      what was asked; a resumed run must ask the same
log.jsonl     losses
state.pt      everything the next steps depend on, until the result is there
adapter_config.json, adapter_model.safetensors    the result, or with --lora-rank 0 a whole checkpoint
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mllama.checkpoints.durable import replace_file
from mllama.checkpoints.safetensors_files import INDEX, SINGLE

from .adapters import WEIGHTS

_RESULTS = (WEIGHTS, SINGLE, INDEX)


class RunFolder:
    """The output folder of one run, opened for writing.

    Args:
        path: made if it is not there.
        asked: everything that decides the result, as JSON.
        resume: go on with the run that is there, if there is one.
    Raises: FileExistsError when there is a run and it shall not be resumed; ValueError when it was asked
        for something else; OSError when the folder cannot be written.
    """

    def __init__(self, path: Path, asked: Mapping[str, Any], resume: bool) -> None:
        self.path = path
        self.log, self.state = path / "log.jsonl", path / "state.pt"
        record = path / "run.json"
        path.mkdir(parents=True, exist_ok=True)
        for half_written in path.glob("*.partial"):  # what a kill has left
            half_written.unlink()
        if record.exists():
            if not resume:
                raise FileExistsError(
                    f"{path} holds a run already: resume it (--resume) or choose another folder"
                )
            _compare(record, asked)
        elif any((path / name).exists() for name in _RESULTS):
            raise FileExistsError(f"{path} holds a model or an adapter: choose another folder")
        else:
            text = json.dumps(asked, indent=2) + "\n"
            replace_file(record, lambda new: new.write_text(text, encoding="utf-8"))

    @property
    def is_finished(self) -> bool:
        """Whether the result is there; while the state still is, it may be half written."""
        return not self.state.exists() and any((self.path / n).exists() for n in _RESULTS)


def fingerprint(path: Path) -> str:
    """SHA-256 of a file's content."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _compare(record: Path, asked: Mapping[str, Any]) -> None:
    try:
        earlier = json.loads(record.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{record} is damaged: {error}") from None
    differ = [
        f"{name} was {earlier.get(name)!r}, now {asked.get(name)!r}"
        for name in sorted(earlier.keys() | asked.keys())
        if earlier.get(name) != asked.get(name)
    ]
    if differ:
        raise ValueError(f"{record.parent} was made by another run: " + "; ".join(differ))
