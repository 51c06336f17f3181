"""What children of hostile tests run first: a copy of the demo's checkpoint, and what became of each case."""

from __future__ import annotations

import json
from dataclasses import dataclass

from confinement import Ended, confined

_PRELUDE = """
import json, os, pathlib, shutil, sys, tempfile, time, warnings
import torch
from mllama import MllamaForConditionalGeneration as Model, MllamaConfig, MllamaTextConfig
from mllama.demo import checkpoint_path
warnings.simplefilter("ignore")
BUILT = []
def _count(module):
    BUILT.append(type(module).__name__)
_init = torch.nn.Module.__init__
def _counting(self, *args, **kwargs):
    _count(self)
    _init(self, *args, **kwargs)
torch.nn.Module.__init__ = _counting
SOURCE = pathlib.Path(checkpoint_path())
FOLDER = pathlib.Path(tempfile.mkdtemp())
for file in SOURCE.iterdir():
    if file.is_file():
        shutil.copy(file, FOLDER)
RAW = json.loads((FOLDER / "config.json").read_text())
def case(name, call):
    BUILT.clear()
    start = time.process_time()
    try:
        call()
        kind, text = "", ""
    except BaseException as error:
        kinds = [k.__name__ for k in type(error).__mro__]
        kind, text = "/".join(kinds), str(error)
    seconds = time.process_time() - start
    print(json.dumps([name, kind, text[:20000], len(text), seconds, len(BUILT)]), flush=True)
def load():
    return Model.from_pretrained(FOLDER, backend="reference", device="cpu")
def config(**changes):
    entries = json.loads(json.dumps(RAW))
    for key, value in changes.items():
        part, _, name = key.partition("__")
        (entries[part + "_config"] if name else entries).__setitem__(name or key, value)
    (FOLDER / "config.json").write_text(json.dumps(entries))
def config_case(name, **changes):
    config(**changes)
    case(name, load)
"""


@dataclass(frozen=True)
class Outcome:
    """What one case came to.

    Attributes:
        kind: names of the exception's classes; empty where there was none.
        text: its message, of `length` characters.
        seconds: of processor time, which a busy machine does not change.
        modules: how many modules were built.
    """

    name: str
    kind: str
    text: str
    length: int
    seconds: float
    modules: int


def outcomes(
    code: str, *, seconds: float = 60, mebibytes: int = 4096, peak: int = 700
) -> list[Outcome]:
    """Run `code` after the prelude in a child; it must end by itself, within `peak` MiB."""
    ended: Ended = confined(_PRELUDE + code, seconds=seconds, mebibytes=mebibytes)
    assert ended.kind == "ok", (ended.kind, ended.out[-1500:], ended.err[-3000:])
    assert ended.peak < peak, ended.peak
    lines = [line for line in ended.out.splitlines() if line.startswith("[")]
    return [Outcome(*json.loads(line)) for line in lines]


def refused(found: list[Outcome], count: int, *, built: bool = False) -> None:
    """Every one of `count` cases is an error in words: a ValueError or TypeError, short and at once."""
    assert len(found) == count, [outcome.name for outcome in found]
    for outcome in found:
        classes = outcome.kind.split("/")
        assert {"ValueError", "TypeError"} & set(classes), outcome
        assert outcome.length < 4000, outcome
        assert outcome.seconds < 2, outcome
        assert built or outcome.modules == 0, outcome
