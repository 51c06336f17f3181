"""Quantised weights that lie: one error that names file and tensor, before a model is built if it can."""

from __future__ import annotations

from pathlib import Path

import pytest
from hostile_folders import Outcome, outcomes
from hostile_weights import CASES

_BEFORE = f"""
sys.path.insert(0, {str(Path(__file__).parent)!r})
from hostile_weights import CASES
from published_folders import FOLDERS, write_folder
from safetensors.torch import load_file, save_file
KINDS = {{}}
def quantized_case(name):
    one = CASES[name]
    if one.kind not in KINDS:
        folder = pathlib.Path(tempfile.mkdtemp())
        write_folder(folder, FOLDERS[one.kind])
        KINDS[one.kind] = folder, load_file(folder / "model.safetensors")
    folder, tensors = KINDS[one.kind]
    tensors = {{name: tensor.clone() for name, tensor in tensors.items()}}
    one.change(tensors)
    save_file(tensors, FOLDER / "model.safetensors")
    shutil.copy(folder / "config.json", FOLDER)
    case(name, load)
"""


@pytest.fixture(scope="module")
def found() -> dict[str, Outcome]:
    code = f"{_BEFORE}\nfor name in CASES:\n    quantized_case(name)\n"
    return {outcome.name: outcome for outcome in outcomes(code, seconds=300)}


@pytest.mark.parametrize("name", CASES)
def test_it_is_refused_by_name(found, name):
    one, outcome = CASES[name], found[name]
    assert outcome.kind.startswith("CheckpointError"), outcome
    missing = [word for word in (*one.words, "model.safetensors") if word not in outcome.text]
    assert not missing, (missing, outcome.text)
    assert outcome.length < 2000 and outcome.seconds < 2, outcome
    assert one.built or outcome.modules == 0, outcome
