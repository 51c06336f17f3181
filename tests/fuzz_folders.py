"""Flips bytes of quantised folders, those of others and our own: an error in words, or the weights that the
bytes say.

    python tests/fuzz_folders.py [--seconds N] [--seed N] [--kind KIND --case N]

A byte of one tensor may change what is made of it, and nothing else may: every weight that none of the
flipped bytes belongs to must be the same, or the folder refused. Prints what was tried, and ends with 1 at a
finding.
"""

from __future__ import annotations

import argparse
import json
import random
import struct
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch
from published_folders import FOLDERS, write_folder
from safetensors.torch import load_file, save_file
from torch import Tensor

import mllama_kernels
from mllama.checkpoints.checkpoint import CheckpointError
from mllama.checkpoints.own_format import find_own
from mllama.checkpoints.published import FINDERS
from mllama.checkpoints.safetensors_files import SafetensorsCheckpoint
from mllama.checkpoints.stored_form import own_entry, own_parts
from mllama.checkpoints.stored_weights import StoredWeights
from mllama_kernels.quantized_tensor import QuantizedTensor

# Our own form: of weights that are quantised here, and of those of others.
_OWN = {f"our {encoding}": encoding for encoding in ("q8_0", "q4_0", "q6_k", "q4_k", "int8", "fp8")}
_ANEW = {"our int4": "w4a16 asymmetric", "our nf4": "bnb nf4"}
KINDS = (*FOLDERS, *_OWN, *_ANEW)
_KEPT = ("layers.0.mlp.down_proj", "layers.0.self_attn.k_proj", "layers.0.input_layernorm")


def read(folder: Path) -> dict[str, Tensor]:
    """Every weight, decoded. Raises: CheckpointError as the loader does."""
    read = as_stored(folder).items()
    return {name: t.clone() if isinstance(t, Tensor) else t.dequantize() for name, t in read}


def as_stored(folder: Path) -> dict[str, Tensor | QuantizedTensor]:
    stored = SafetensorsCheckpoint(folder)
    config = json.loads((folder / "config.json").read_text()).get("quantization_config", {})
    finders = (find_own, *FINDERS)
    weights = StoredWeights(stored, [f for find in finders if (f := find(stored, config))])
    if weights.problems:
        raise CheckpointError(folder, weights.problems)
    return dict(weights.read(weights.tensors))


def write(kind: str, folder: Path) -> None:
    """A folder of one kind with few of its tensors."""
    write_folder(folder, FOLDERS[_ANEW.get(kind, "fp8 dynamic" if kind in _OWN else kind)])
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file({n: t for n, t in tensors.items() if any(k in n for k in _KEPT)}, file)
    if kind not in _OWN and kind not in _ANEW:
        return
    made: dict[str, Tensor] = {}
    for name, weight in as_stored(folder).items():
        if kind in _OWN and isinstance(weight, QuantizedTensor):
            # Of k forms only the rows of 256 are whole blocks.
            encoding = _OWN[kind] if weight.shape[1] % 256 == 0 else "q8_0"
            weight = mllama_kernels.quantize(weight.dequantize(), encoding)
        made |= {name: weight} if isinstance(weight, Tensor) else dict(own_parts(name, weight))
    save_file(made, file)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = own_entry(kind.removeprefix("our "), {})
    (folder / "config.json").write_text(json.dumps(config))


@dataclass
class Folder:
    """A small folder of one kind, and what is read from it.

    Attributes:
        data: of its file.
        start: of the tensors in it.
        spans: begin and end of each tensor there, and the start of its name.
    """

    path: Path
    data: bytes
    start: int
    spans: list[tuple[int, int, str]]
    weights: dict[str, Tensor]

    @classmethod
    def of(cls, kind: str, path: Path) -> Folder:
        write(kind, path)
        data = (path / "model.safetensors").read_bytes()
        start = 8 + struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8:start])
        header.pop("__metadata__", None)
        spans = [
            (*entry["data_offsets"], next(k for k in _KEPT if k in n))
            for n, entry in header.items()
        ]
        return cls(path, data, start, spans, read(path))

    def flipped(self, seed: int, case: int) -> tuple[bytes, set[str]]:
        """The file with one to three bytes changed, and which tensors they belong to."""
        rng = random.Random(f"{seed} {case}")
        data, hit = bytearray(self.data), set()
        for _ in range(rng.choice((1, 1, 2, 3))):
            if rng.random() < 0.5:
                place = rng.randrange(self.start)
            else:  # every tensor as often, as the small ones say how to read the others
                begin, end, name = rng.choice(self.spans)
                place = self.start + rng.randrange(begin, end)
                hit.add(name)
            data[place] = rng.choice((data[place] ^ 1 << rng.randrange(8), rng.randrange(256)))
        return bytes(data), hit


def finding(folder: Folder, seed: int, case: int) -> tuple[str, str]:
    """ "refused", "read" or "finding" of one case, and what was found."""
    data, hit = folder.flipped(seed, case)
    (folder.path / "model.safetensors").write_bytes(data)
    try:
        weights = read(folder.path)
    except CheckpointError:
        return "refused", ""
    except Exception:
        return "finding", traceback.format_exc()
    if weights.keys() != folder.weights.keys():
        return "refused", ""  # the loader knows which there must be
    for name, weight in folder.weights.items():
        untouched = not any(part in name for part in hit)
        if weights[name].shape != weight.shape or (untouched and not weights[name].equal(weight)):
            return "finding", f"{name} is another although no byte of it is"
    return "read", ""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kind", choices=KINDS)
    parser.add_argument("--case", type=int)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    kinds = [given.kind] if given.kind else list(KINDS)
    counts = {"refused": 0, "read": 0, "finding": 0}
    for kind in kinds:
        with tempfile.TemporaryDirectory() as path:
            folder = Folder.of(kind, Path(path))
            end, case = time.monotonic() + given.seconds / len(kinds), 0
            while case < 5 or time.monotonic() < end:
                number = case if given.case is None else given.case
                outcome, what = finding(folder, given.seed, number)
                counts[outcome] += 1
                if what:
                    print(
                        f"--kind '{kind}' --seed {given.seed} --case {number}: {what}", flush=True
                    )
                if given.case is not None:
                    break
                case += 1
    print(*(f"{name} {count}" for name, count in counts.items()))
    return int(counts["finding"] > 0)


if __name__ == "__main__":
    raise SystemExit(main())
