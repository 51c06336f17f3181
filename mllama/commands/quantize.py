"""Write a checkpoint with weights of 8, 6 or 4 bits, which loads as it is.

One weight at a time is read and encoded, and files of at most 1 GB are written; the folder is there as a
whole or not at all. int8 and fp8 are written as compressed-tensors, which other libraries read too. q4_k,
q4_0, q6_k and the mix q4_k_m keep what matters more where they are told what that is: by --importance, or by
running the model with --calibrate, which leaves importance.safetensors in the output."""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mllama_kernels
from mllama import MllamaForConditionalGeneration, MllamaProcessor
from mllama.checkpoints.checkpoint import CheckpointError
from mllama.checkpoints.matching import MatchedCheckpoint, match_checkpoint
from mllama.checkpoints.saving import model_texts, write_folder
from mllama.checkpoints.stored_form import Item, chosen_form
from mllama.checkpoints.weights import stored_dtype, stored_generation_config
from mllama.commands.calibration import Inputs, mean_squares, read_inputs
from mllama.commands.common import as_json
from mllama.commands.devices import add_device_argument
from mllama.commands.usage import UsageError
from mllama.memory import return_freed
from mllama.progress import bar
from mllama.quantization.error_table import ErrorTable
from mllama.quantization.importance import read_importance, write_importance
from mllama.quantization.policy import MODEL_ENCODINGS, Assignment, Quantization, assign, kind_of
from mllama.wording import listed, shown
from mllama_kernels.encodings import ENCODINGS
from mllama_kernels.quantize import TAKES_IMPORTANCE

SHARD_BYTES = 10**9
IMPORTANCE = "importance.safetensors"
# What makes a folder one that holds a model, or what is written and read with one.
_OF_A_MODEL = (
    *("*.safetensors", "*.safetensors.index.json", "config.json", "params.json", "*.gguf"),
    *("tokenizer*", "*processor_config.json", "*chat_template*"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        required=True,
        metavar="DIR",
        help="checkpoint folder, or hub id with the extra hub",
    )
    parser.add_argument(
        "--encoding",
        required=True,
        choices=MODEL_ENCODINGS,
        help="of the weights; which of them get more bits is in docs/quantisation.md",
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="folder without a model"
    )
    parser.add_argument(
        "--override",
        action="append",
        default=[],
        type=_override,
        metavar="PATTERN=E",
        help="encoding, or the checkpoint's dtype, of weights whose published name matches a shell pattern; "
        "may be repeated, the first match counts",
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--importance",
        type=Path,
        metavar="FILE",
        help="llama.cpp's imatrix (GGUF), or what --calibrate has written",
    )
    source.add_argument(
        "--calibrate",
        type=Path,
        metavar="PATH",
        help="run the model on conversations (JSONL, as for finetune) or a folder of images and .txt files",
    )
    add_device_argument(parser, "cpu, cuda, cuda:1, gpu, gpu-1 (default: cuda if there is one)")
    parser.add_argument("--json", action="store_true", help="print a JSON object")


def _override(text: str) -> tuple[str, str]:
    pattern, sign, encoding = text.rpartition("=")
    if not sign or not pattern or not encoding:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form PATTERN=ENCODING")
    return pattern, encoding


def run(options: argparse.Namespace) -> int:
    start = time.perf_counter()
    _check_output(options.output)
    overrides = _joined(options.override)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    matched = match_checkpoint(MllamaForConditionalGeneration, options.model, "auto", "auto")
    _check_plain(matched)
    sources = matched.sources.values()
    dtype = stored_dtype(matched.folder, matched.raw, matched.checkpoint, sources)
    assignment = assign(
        matched.config,
        matched.layout,
        matched.shapes,
        options.encoding,
        overrides,
        str(dtype).removeprefix("torch."),
    )
    for line in assignment.fallbacks:
        print(line, file=sys.stderr)
    processor = MllamaProcessor.from_pretrained(options.model)
    importance = _importance(options, matched, assignment, processor, device)
    table = ErrorTable()
    options.output.mkdir(parents=True, exist_ok=True)
    if options.calibrate is not None:
        means = {_published(matched, canonical): mean for canonical, mean in importance.items()}
        write_importance(options.output / IMPORTANCE, means)
    work = _Work(matched, assignment, importance, dtype, device, table)
    quantization = Quantization(options.encoding, overrides)
    work.write(options.output, quantization, processor)
    known = sum(e in TAKES_IMPORTANCE for e in assignment.encodings.values())
    report = {
        "model": str(options.model),
        "output": str(options.output),
        "encoding": options.encoding,
        "overrides": overrides,
        "bytes": sum(p.stat().st_size for p in options.output.glob("model*.safetensors")),
        "fallbacks": assignment.fallbacks,
        "weighted": work.weighted,
        "without_importance": known - work.weighted,
        "errors": table.rows(),
        "seconds": round(time.perf_counter() - start, 3),
    }
    if options.json:
        print(as_json(report))
        return 0
    for line in table.lines():
        print(line)
    if importance:
        print(f"importance was known of {work.weighted} of the {known} weights that take it")
    print(
        f"{report['bytes'] / 1e9:.3f} GB in {report['seconds']:.1f} s, written to {options.output}",
        file=sys.stderr,
    )
    return 0


def _check_output(output: Path) -> None:
    """Raises: ValueError for a folder that holds a model, and for what is no folder."""
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {shown(str(output))} is no folder")
    for pattern in _OF_A_MODEL:
        # What --calibrate has learnt in a run that did not end is there to be read again.
        if found := sorted(path for path in output.glob(pattern) if path.name != IMPORTANCE):
            raise ValueError(
                f"--output {shown(str(output))} holds a model ({shown(found[0].name)}): choose another folder"
            )


def _joined(given: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Raises: UsageError for a pattern with two encodings."""
    overrides: dict[str, str] = {}
    for pattern, encoding in given:
        if overrides.setdefault(pattern, encoding) != encoding:
            raise UsageError(
                f"--override {shown(pattern)} is given twice, as {overrides[pattern]} and {encoding}"
            )
    return overrides


def _check_plain(matched: MatchedCheckpoint) -> None:
    """Raises: CheckpointError for a checkpoint that is quantised already."""
    infos = (matched.checkpoint.tensors[at] for at in matched.sources.values())
    if any(info.encoding is not None or info.is_decoded for info in infos):
        methods = listed(sorted({found.method for found in matched.found}))
        raise CheckpointError(
            matched.folder,
            [f"it is quantised already ({methods}); quantise the original, which has lost nothing"],
        )


def _published(matched: MatchedCheckpoint, canonical: str) -> str:
    return matched.layout.published_name(matched.layout.module_name(canonical))


def _importance(
    options: argparse.Namespace,
    matched: MatchedCheckpoint,
    assignment: Assignment,
    processor: MllamaProcessor,
    device: torch.device,
) -> Mapping[str, Tensor]:
    """Importance by canonical name: of the file, by running the model, or none."""
    if options.importance is None and options.calibrate is None:
        return {}
    if not TAKES_IMPORTANCE & set(assignment.encodings.values()):
        takes = ", ".join(sorted(TAKES_IMPORTANCE))
        raise ValueError(
            f"importance would change nothing: none of the weights becomes {takes}, which alone take it"
        )
    if options.importance is not None:
        canonical = {name: matched.layout.canonical_name(name) for name in matched.shapes}
        widths = {
            canonical[name]: shape[-1]
            for name, shape in matched.shapes.items()
            if kind_of(canonical[name]) is not None
        }
        return read_importance(options.importance, widths)
    longest = matched.config.text_config.max_position_embeddings
    inputs = read_inputs(options.calibrate, processor, longest)
    return _calibrated(options.model, inputs, device)


def _calibrated(folder: str, inputs: list[Inputs], device: torch.device) -> Mapping[str, Tensor]:
    model = MllamaForConditionalGeneration.from_pretrained(folder, device=device)
    return mean_squares(model, inputs)


class _Work:
    """The weights of a checkpoint, quantised one at a time as their files are written."""

    def __init__(
        self,
        matched: MatchedCheckpoint,
        assignment: Assignment,
        importance: Mapping[str, Tensor],
        dtype: torch.dtype,
        device: torch.device,
        table: ErrorTable,
    ) -> None:
        self._matched, self._importance, self._table = matched, importance, table
        self._encodings, self._dtype, self._device = assignment.encodings, dtype, device
        self.weighted = 0  # weights for which importance was known and used

    def write(self, output: Path, quantization: Quantization, processor: MllamaProcessor) -> None:
        """The whole folder, or nothing.

        Raises: CheckpointError for a weight that cannot be encoded, by name.
        """
        matched = self._matched
        published = {name: matched.layout.published_name(name) for name in matched.shapes}
        encodings = {published[name]: e for name, e in self._encodings.items()}
        entry, parts = chosen_form(encodings, published.values(), quantization)
        infos = {name: matched.checkpoint.tensors[at] for name, at in matched.sources.items()}
        # In the order of the files they come from, so that each is read once from begin to end.
        names = sorted(matched.sources, key=lambda name: infos[name].file)
        total = sum(info.nbytes for info in infos.values())
        model = matched.model
        model.generation_config = stored_generation_config(
            matched.folder, matched.config, matched.checkpoint
        )
        with torch.no_grad(), bar("quantising", total, "B", unit_scale=True) as progress:

            def make(name: str) -> list[tuple[str, Tensor]]:
                made = self._made(name)
                return_freed()
                progress.update(infos[name].nbytes)
                if isinstance(made, Tensor):
                    return [(published[name], made)]
                return [(n, part.cpu()) for n, part in parts(published[name], made)]

            items = [Item(self._nbytes(name), functools.partial(make, name)) for name in names]
            write_folder(
                output,
                items,
                model_texts(model, self._dtype, entry),
                SHARD_BYTES,
                write_others=processor.save_pretrained,
            )

    def _nbytes(self, name: str) -> int:
        shape, encoding = self._matched.shapes[name], self._encodings.get(name)
        if encoding is not None:
            return ENCODINGS[encoding].nbytes(*shape)
        return torch.Size(shape).numel() * self._dtype.itemsize

    def _made(self, name: str) -> Any:
        """The weight as it is written: a tensor, or a `QuantizedTensor`."""
        matched = self._matched
        source = matched.sources[name]
        ((_, tensor),) = matched.checkpoint.read([source])
        encoding = self._encodings.get(name)
        if encoding is None:
            return tensor.to(self._dtype)
        canonical = matched.layout.canonical_name(name)
        importance = self._importance.get(canonical) if encoding in TAKES_IMPORTANCE else None
        plain = tensor.to(self._device)
        try:
            weight = mllama_kernels.quantize(plain, encoding, importance)
        except (ValueError, RuntimeError) as error:
            info = matched.checkpoint.tensors[source]
            problem = f"{shown(info.stored_name)} in {shown(info.file)}: {error}"
            raise CheckpointError(matched.folder, [problem]) from None
        kind = kind_of(canonical)
        assert kind is not None
        self._table.add(kind.name, plain, weight, importance)
        self.weighted += importance is not None
        return weight
