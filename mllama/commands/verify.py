"""Check the kernels on this machine: every op of a forward pass, of sampling and of the loss against float64,
then layer by layer, each beside plain PyTorch's own error; with --against transformers also the logits of
`transformers`. The last line is the verdict, with what was not compared; the exit code is 1 if anything
failed or an op did not run as a kernel."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import sys
from typing import Any

import torch

from mllama import MllamaForConditionalGeneration
from mllama.checkpoints.bare_copy import bare_copy
from mllama.checkpoints.expected import expected_shapes
from mllama.checkpoints.hub import resolve_folder
from mllama.checkpoints.key_layout import KeyLayout
from mllama.checkpoints.weights import plan_source
from mllama.commands.common import (
    add_execution_arguments,
    add_max_length_argument,
    add_model_argument,
    chat_inputs,
    checkpoint_of,
    load_processor,
    load_weights,
    user_turn,
)
from mllama.commands.loading import (
    add_loading_arguments,
    add_weight_path_argument,
    bounded_length,
    planned_source,
    source_of,
    weights_of,
)
from mllama.commands.usage import UsageError
from mllama.demo import sample_picture
from mllama.quantization.decoded import decoded_copy, quantization_loss
from mllama.verification import (
    ALLOWED_RATIO,
    Comparison,
    compare_layers,
    compare_ops,
    failure,
    not_compared,
)
from mllama.wording import shown

# Of the largest logit, in float32; wider dtypes than that are not compared with transformers.
_LOGITS_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is compared")
    add_model_argument(group)
    group.add_argument("--image", metavar="FILE", help="an image (default: a rendered one)")
    group.add_argument(
        "--prompt",
        default="What is in the picture?",
        metavar="TEXT",
        help="the question about it",
    )
    group.add_argument(
        "--against", choices=("transformers",), help="also compare the logits with its own"
    )
    group.add_argument(
        "--oracle",
        choices=("auto", "float64", "float32", "none"),
        default="auto",
        help="dtype of the model the layers are measured by; auto: the widest that fits into memory",
    )
    group.add_argument(
        "--original",
        metavar="DIR",
        help="checkpoint that a quantised model was made of: also report what quantising has cost",
    )
    add_max_length_argument(group, "tokens that the prompt may have")
    group.add_argument("--json", action="store_true", help="print one JSON object")
    add_loading_arguments(group := parser.add_argument_group("weights"))
    add_weight_path_argument(group)
    add_execution_arguments(parser)


def run(options: argparse.Namespace) -> int:
    if options.backend == "reference":
        raise ValueError("verify compares the kernels with the reference; leave --backend alone")
    if options.against and importlib.util.find_spec("transformers") is None:
        raise ModuleNotFoundError(
            "--against transformers needs it: pip install 'mllama-kernels[transformers]'"
        )
    if options.tensor_parallel and options.oracle not in ("auto", "none"):
        raise UsageError(
            f"--oracle {options.oracle} compares layer by layer, which goes with one device: over several "
            "there are the ops, --against and --original"
        )
    folder = source_of(options, checkpoint_of(options))
    options.backend = "auto"  # an op that cannot run as a kernel is for the report to name
    is_quantized = planned_source(options, folder).encoding is not None
    if options.original and not is_quantized:
        raise UsageError(
            f"--original goes with a quantised model: {shown(folder)} is plain and no "
            "--quantization-encoding is given"
        )
    if options.original:  # looked at now: the rest takes minutes
        stored = plan_source(MllamaForConditionalGeneration, options.original).stored
        if stored is not None:
            raise UsageError(
                f"--original {shown(options.original)} is quantised itself ({stored}): it is to be the "
                "checkpoint that the quantised one was made of"
            )
    if options.against and is_quantized:
        raise UsageError("--against transformers compares plain models, and this one is quantised")
    processor = load_processor(folder, options)
    image: Any = options.image or sample_picture(0)[0]
    turn = user_turn(options.prompt, [image])
    if options.image is None:
        turn["content"][0] = {"type": "image", "image": image}
    batch = chat_inputs(processor, [turn], torch.device("cpu"))
    length = bounded_length(options, folder)
    count = batch["input_ids"].shape[1]
    if length is not None and count > length:
        raise ValueError(f"the prompt has {count} tokens, --max-length is {length}")
    model = load_weights(folder, options, context=length or count)
    inputs = {name: value.to(model.device) for name, value in batch.items()}
    report: dict[str, Any] = {
        "model": folder,
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "semantics": model.semantics.name,
        "semantics_reason": model.semantics_reason,
    }
    if model.quantization is not None:
        report["quantization"] = model.quantization.encoding
    _say(options, "  ".join(f"{key}: {value}" for key, value in report.items()))
    rows = compare_ops(model, inputs)
    tables, left_out = {"ops": rows}, not_compared(rows)
    no_kernel_ran = model.backend == "reference"
    has_oracle = not (no_kernel_ran or options.tensor_parallel)
    oracle = _oracle_dtype(model, options.oracle) if has_oracle else None
    if oracle is not None:
        tables["layers"] = _layers(oracle, model, inputs)
    else:
        left_out.append("layers")
    passed = True
    for title, rows in tables.items():
        _print_table(options, title, rows)
        report[title] = [row.to_json() for row in rows]
        passed = passed and bool(rows) and all(row.passed for row in rows)
    if options.against:
        report["against"] = _against_transformers(folder, options, model, inputs)
        passed = passed and report["against"]["passed"]
        _say(
            options, "transformers: " + ", ".join(f"{k} {v}" for k, v in report["against"].items())
        )
    if options.original:
        report["quantization_loss"] = _cost(options, model, inputs)
        _say(
            options,
            "against the original: "
            + ", ".join(f"{k} {v:.4g}" for k, v in report["quantization_loss"].items()),
        )
    report |= {"not_compared": left_out, "passed": passed}
    verdict = "the kernels are right" if passed else "FAILED"
    if no_kernel_ran:
        verdict += f", no kernel ran: {next(iter(model.ops.plain_ops(model.device).values()))}"
    _say(options, f"verdict: {verdict}" + f"; not compared: {', '.join(left_out)}" * bool(left_out))
    if options.json:
        print(json.dumps(report, indent=2))
    return 0 if passed else 1


def _cost(options: argparse.Namespace, model: Any, inputs: dict[str, Any]) -> dict[str, float]:
    original = MllamaForConditionalGeneration.from_pretrained(
        options.original,
        dtype=model.dtype,
        device=model.device,
        semantics=model.semantics,
        tensor_parallel=options.tensor_parallel,
    )
    return quantization_loss(model, original, inputs)


def _layers(oracle: torch.dtype, model: Any, inputs: dict[str, torch.Tensor]) -> list[Comparison]:
    try:
        exact = decoded_copy(model, oracle, "reference")
        return compare_layers(model, exact, inputs)
    except Exception as error:  # the ops have been compared: their rows and the verdict are due
        return [failure("layers", error)]


def _say(options: argparse.Namespace, line: str) -> None:
    print(line, file=sys.stderr if options.json else sys.stdout, flush=True)


def _print_table(options: argparse.Namespace, title: str, rows: list[Comparison]) -> None:
    columns = f"{'calls':>6} {'error':>10} {'plain':>10} {'ratio':>7}"
    _say(options, f"\n{title:26} {columns}  (at most {ALLOWED_RATIO})")
    for row in rows:
        errors = (
            f"{row.errors.error.largest:10.2e} {row.errors.plain.largest:10.2e} {row.ratio:7.2f}"
        )
        _say(options, f"{row.name:26} {row.calls:6} {errors}  {row.verdict}")


def _oracle_dtype(model: torch.nn.Module, choice: str) -> torch.dtype | None:
    """The dtype of the exact model: what was asked for, or the widest that fits beside the model."""
    if choice != "auto":
        return {"float64": torch.float64, "float32": torch.float32, "none": None}[choice]
    layout = KeyLayout(type(model).__name__)
    count = sum(map(math.prod, expected_shapes(model.config, layout).values()))
    if model.device.type == "cuda":
        free = torch.cuda.mem_get_info(model.device)[0]
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for dtype in (torch.float64, torch.float32):
        if dtype.itemsize > model.dtype.itemsize and 1.2 * count * dtype.itemsize < free:
            return dtype
    return None


@torch.no_grad()
def _against_transformers(
    folder: str, options: argparse.Namespace, model: Any, inputs: dict[str, torch.Tensor]
) -> dict[str, Any]:
    """Logits beside those of the installed `transformers`, both under its semantics."""
    import transformers

    weights, described = weights_of(options, folder)
    with bare_copy(resolve_folder(weights), model.config) as copy:
        theirs = transformers.MllamaForConditionalGeneration.from_pretrained(
            copy, dtype=model.dtype, use_safetensors=True
        )
    theirs = theirs.to(model.device).eval()
    want = theirs(**inputs).logits.float()
    del theirs
    ours = MllamaForConditionalGeneration.from_pretrained(
        weights,
        **described,
        dtype=model.dtype,
        device=model.device,
        semantics="transformers",
        tensor_parallel=options.tensor_parallel,
    )
    got = ours(**inputs, use_cache=False).logits.float()
    difference = ((got - want).abs().max() / want.abs().max()).item()  # NaN is never small enough
    same = bool((got[:, -1].argmax(-1) == want[:, -1].argmax(-1)).all())
    return {
        "version": transformers.__version__,
        "relative_difference": difference,
        "same_next_token": same,
        "passed": difference <= _LOGITS_TOLERANCE[model.dtype],
    }
