"""What each encoding costs in quality, and how large it is: writes one JSON file.

    python -m benchmarks.quality [demo | wide | stack | speed ...] [--wide DIR] [--narrower] [--output FILE]

The shipped demo model, and the wide one that `python -m tools.demo_model.widen` made, answer questions about
images that they have not seen, and their weights are compared with themselves decoded. Logits of a random
stack of eight layers of the 11B's shape (--narrower: of a quarter of its width) are compared with those of
the plain weights in float32, with and without an image. Decoding and prompts of a few layers are timed beside
bfloat16. A part that is run replaces that of the file.
`python -m benchmarks.quality_tables` makes the tables of docs/quantisation.md from it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mllama
from benchmarks import machine, model, quality_speed
from benchmarks.scenario import SMALL_VOCABULARY, Layers, Scenario
from benchmarks.shapes import VOCAB
from mllama.checkpoints.key_layout import KeyLayout
from mllama.demo import checkpoint_path
from mllama.quantization.error_table import ErrorTable
from mllama.quantization.plan import BY_SIZE
from mllama.quantization.policy import kind_of
from mllama.quantized_modules import Quantized
from tools.demo_model.evaluate import Report, examine
from tools.demo_model.train import HELD_OUT_SEED

PARTS = ("demo", "wide", "stack", "speed")
OUTPUT = machine.ROOT / "benchmarks" / "quality.json"
PLAIN = "bfloat16"
ENCODINGS = BY_SIZE  # PLAIN first
DEPTH = Layers(text=8, cross=(3,), local=1, global_=1, taps=(0,))
_TILE = 112
_NARROWER_TEXT = {"hidden_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 2}
_NARROWER_TEXT |= {"intermediate_size": 3584}


def load(folder: Path, encoding: str, device: torch.device, dtype: str = PLAIN) -> Any:
    """The model of a folder in an encoding, or in a dtype where that is the name of one."""
    if encoding == PLAIN:
        return mllama.MllamaForConditionalGeneration.from_pretrained(
            folder, dtype=PLAIN, device=device, backend="kernels"
        )
    return mllama.MllamaForConditionalGeneration.from_pretrained(
        folder, dtype=dtype, device=device, backend="kernels", quantization=encoding
    )


def quantized_weights(loaded: Any) -> Iterator[tuple[str, Any]]:
    """The quantised weights of a model by their state-dict names."""
    for name, module in loaded.named_modules():
        if isinstance(module, Quantized):
            yield f"{name}.weight", module.weight


def stored(loaded: Any) -> dict[str, Any]:
    """Bytes of all weights, and how many have which encoding."""
    weights = [weight for _, weight in quantized_weights(loaded)]
    plain = sum(parameter.nbytes for parameter in loaded.parameters())
    return {
        "bytes": plain + sum(weight.nbytes for weight in weights),
        "encodings": dict(sorted(Counter(weight.encoding for weight in weights).items())),
    }


def errors(loaded: Any, plain: Any) -> list[dict[str, Any]]:
    """The relative error of each kind of quantised weight."""
    layout, table = KeyLayout("MllamaForConditionalGeneration"), ErrorTable()
    for name, weight in quantized_weights(loaded):
        kind = kind_of(layout.canonical_name(name))
        table.add(kind.name, plain.get_parameter(name).detach(), weight, None)
    return table.rows()


def agreement(one: Report, other: Report) -> float:
    """Share of the questions to which two models gave the same answer, word by word."""
    pairs = zip(one.answers, other.answers, strict=True)
    same = [a.said == b.said for a, b in pairs]
    return sum(same) / len(same)


def examined(
    folder: Path, encodings: Iterable[str], seeds: range, device: torch.device
) -> dict[str, Any]:
    """A demo model in every encoding: accuracy, agreement with bfloat16, bytes, errors of its weights."""
    processor = mllama.MllamaProcessor.from_pretrained(folder)
    plain = load(folder, PLAIN, device)
    expected = examine(plain, processor, seeds)
    rows: dict[str, Any] = {PLAIN: {"accuracy": expected.accuracy(), **stored(plain)}}
    for encoding in encodings:
        if encoding == PLAIN:
            continue
        loaded = load(folder, encoding, device)
        report = examine(loaded, processor, seeds)
        rows[encoding] = {
            "accuracy": report.accuracy(),
            "agreement": agreement(report, expected),
            **stored(loaded),
            "errors": errors(loaded, plain),
        }
        print(f"  {encoding:9} accuracy {report.accuracy():.4f}", flush=True)
    return {
        "width": plain.config.text_config.hidden_size,
        "images": len(seeds),
        "questions": len(expected.answers),
        "encodings": rows,
    }


def stack(narrower: bool) -> tuple[mllama.MllamaConfig, int]:
    """The configuration of the random stack, and its vocabulary."""
    vocabulary = SMALL_VOCABULARY if narrower else VOCAB
    configs = DEPTH.configs(vocabulary, _TILE)
    if narrower:
        configs["text_config"] |= _NARROWER_TEXT
    return mllama.MllamaConfig(**configs), vocabulary


def divergence(actual: Tensor, expected: Tensor) -> dict[str, float]:
    """Of logits (..., V): the mean Kullback-Leibler divergence from the expected distribution in nats, and
    how often the most likely token is the same."""
    a, e = (t.flatten(0, -2).double().log_softmax(-1) for t in (actual, expected))
    same = (a.argmax(-1) == e.argmax(-1)).double()
    return {"kl": (e.exp() * (e - a)).sum(-1).mean().item(), "top1": same.mean().item()}


@torch.no_grad()
def compared(
    encodings: Iterable[str], narrower: bool, seed: int, device: torch.device, tokens: int
) -> dict[str, Any]:
    """The random stack in every encoding, with activations in float32 so that only the weights differ; the
    row of bfloat16 has the same weights and activations of 16 bits."""
    torch.manual_seed(seed)
    config, vocabulary = stack(narrower)
    scenario = Scenario(batch=4, prompt=tokens // 4, new=0, tile=_TILE)
    with_image = model.inputs_of(scenario, torch.float32, device, vocabulary)
    ids = with_image["input_ids"].clone()
    ids[:, 0] = 1000
    without = {"input_ids": ids, "attention_mask": with_image["attention_mask"]}
    cases = {"image": with_image, "text": without}
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        made = mllama.MllamaForConditionalGeneration(config, backend="kernels")
        made = made.to(device=device, dtype=torch.bfloat16).eval()
        model.fill(made)
        made.save_pretrained(folder)
        sizes = stored(made)
        made = made.float()
        expected = {name: made(**inputs).logits for name, inputs in cases.items()}
        del made
        for encoding in encodings:
            loaded = load(Path(folder), encoding, device, "float32")
            row = {
                name: divergence(loaded(**inputs).logits, expected[name])
                for name, inputs in cases.items()
            }
            rows[encoding] = {**row, **(sizes if encoding == PLAIN else stored(loaded))}
            print(f"  {encoding:9} KL {row['image']['kl']:.6f} {row['text']['kl']:.6f}", flush=True)
    text = config.text_config
    return {
        "narrower": narrower,
        "width": text.hidden_size,
        "intermediate": text.intermediate_size,
        "layers": text.num_hidden_layers,
        "vocabulary": vocabulary,
        "tokens": tokens,
        "encodings": rows,
    }


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality", description=__doc__.splitlines()[0]
    )
    parser.add_argument("parts", nargs="*", metavar="|".join(PARTS), help="default: all")
    parser.add_argument("--wide", type=Path, metavar="DIR", help="the wide demo model's folder")
    parser.add_argument(
        "--narrower", action="store_true", help="a random stack of a quarter of the 11B's width"
    )
    parser.add_argument("--images", type=int, default=200, help="default: %(default)s")
    parser.add_argument("--tokens", type=int, default=512, help="of the random stack's prompts")
    parser.add_argument("--seed", type=int, default=0, help="of the random stack and its prompts")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="default: %(default)s")
    options = parser.parse_args(arguments)
    options.parts = options.parts or list(PARTS)
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if "wide" in options.parts and options.wide is None:
        parser.error("the part wide needs --wide DIR")
    return options


def measured(part: str, options: argparse.Namespace) -> dict[str, Any]:
    device = torch.device(options.device)
    if part == "speed":
        quantising = [encoding for encoding in ENCODINGS if encoding != PLAIN]
        return quality_speed.compared(quantising, options.seed, device)
    if part == "stack":
        return compared(ENCODINGS, options.narrower, options.seed, device, options.tokens)
    folder = checkpoint_path() if part == "demo" else options.wide
    seeds = range(HELD_OUT_SEED, HELD_OUT_SEED + options.images)
    return examined(folder, ENCODINGS, seeds, device)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    document = json.loads(options.output.read_text()) if options.output.exists() else {}
    commit = (
        machine.commit()
    )  # once: the file is one that git knows, and is written after every part
    for part in options.parts:
        print(part, flush=True)
        start = time.perf_counter()
        document[part] = {
            "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            **commit,
            "machine": machine.describe(torch.device(options.device)),
            "versions": machine.versions(),
            **measured(part, options),
            "seconds": round(time.perf_counter() - start),
        }
        options.output.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
