"""The folder of a run: what was asked, the log, the state while it runs, and at the end the result.

run.json      what was asked, and how many ranks began; a resumed run must ask the same, of any number
log.jsonl     losses
state-STEP/   everything the next steps depend on, until the result is there
adapter_config.json, adapter_model.safetensors    the result, or with --lora-rank 0 a whole checkpoint
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mllama.checkpoints.durable import replace_file
from mllama.checkpoints.safetensors_files import INDEX, SINGLE
from mllama.files import FileRefused, open_regular, read_text
from mllama.strict_json import parse_json
from mllama.wording import quoted, shown

from .adapters import WEIGHTS
from .state_folders import newest, remove_others

_RESULTS = (WEIGHTS, SINGLE, INDEX)
_PIECE = 2**20  # bytes that are read at once
_MAX_RECORD_BYTES = 2**18  # of run.json, which has some thirty short entries
_LISTED = 40  # differences in one message
_RANKS, _MOST_RANKS = "ranks", 2**16  # the entry of run.json that may differ


class RunFolder:
    """The output folder of one run, opened for writing.

    Args:
        path: made if it is not there.
        asked: everything that decides the result, as JSON.
        resume: continue the run that is there, if there is one.
        ranks: how many there are now.
    Attributes:
        ranks: how many there were when the run began: a step has as many examples as those took.
    Raises: FileExistsError when there is a run and it is not to be resumed; ValueError when it was asked
        for something else, or holds links; OSError when the folder cannot be written.
    """

    def __init__(self, path: Path, asked: Mapping[str, Any], resume: bool, ranks: int = 1) -> None:
        self.path, self.ranks = path, ranks
        self.log = path / "log.jsonl"
        record = path / "run.json"
        path.mkdir(parents=True, exist_ok=True)
        _check_members(path)
        for half_written in path.glob("*.partial"):  # what a kill has left
            if half_written.is_file():
                half_written.unlink()
        remove_others(path, newest(path))
        if record.exists():
            if not resume:
                raise FileExistsError(
                    f"{path} holds a run already: resume it (--resume) or choose another folder"
                )
            self.ranks = _compare(record, asked)
        elif any((path / name).exists() for name in _RESULTS):
            raise FileExistsError(f"{path} holds a model or an adapter: choose another folder")
        else:
            text = json.dumps({**asked, _RANKS: ranks}, indent=2) + "\n"
            replace_file(record, lambda new: new.write_text(text, encoding="utf-8"))

    @property
    def state(self) -> Path | None:
        """The last whole state, while the result is not there."""
        return newest(self.path)

    @property
    def is_finished(self) -> bool:
        """Whether the result is there; while a state still is, it may be half written."""
        return self.state is None and any((self.path / n).exists() for n in _RESULTS)


def _check_members(path: Path) -> None:
    """Raises: ValueError for a link or a pipe: it would be written through, to wherever it leads, and a
    folder may have come from somebody else."""
    for parent, folders, files in os.walk(path):
        for name in (*folders, *files):
            mode = os.lstat(member := Path(parent, name)).st_mode
            if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
                kind = "a link" if stat.S_ISLNK(mode) else "no regular file"
                raise ValueError(
                    f"{shown(str(member))} is {kind}: the folder of a run is written to, and holds "
                    "only files"
                )


def fingerprint(path: Path) -> str:
    """SHA-256 of a file's content. Raises: ValueError naming a file that is none."""
    digest = hashlib.sha256()
    try:
        with open_regular(path) as file:
            while piece := file.read(_PIECE):
                digest.update(piece)
    except FileRefused as error:
        raise ValueError(f"{shown(str(path))} cannot be read: {error}") from None
    return digest.hexdigest()


def _compare(record: Path, asked: Mapping[str, Any]) -> int:
    """How many ranks began the run. Raises: ValueError where something else was asked for."""
    try:
        earlier = parse_json(read_text(record, _MAX_RECORD_BYTES), constants=True)
        if not isinstance(earlier, dict):
            raise ValueError("it is no JSON object")
    except ValueError as error:
        raise ValueError(f"{shown(str(record))} is damaged: {error}") from None
    ranks = earlier.pop(_RANKS, None)
    differ = [
        f"{shown(name)} was {quoted(earlier.get(name))}, now {quoted(asked.get(name))}"
        for name in sorted(earlier.keys() | asked.keys())
        if earlier.get(name) != asked.get(name)
    ]
    if differ:
        more = f" and {len(differ) - _LISTED} more" if len(differ) > _LISTED else ""
        listed = "; ".join(differ[:_LISTED]) + more
        raise ValueError(f"{shown(str(record.parent))} was made by another run: {listed}")
    if type(ranks) is not int or not 0 < ranks <= _MOST_RANKS:
        raise ValueError(f"{shown(str(record))} is damaged: it has {quoted(ranks)} ranks")
    return ranks
