"""How much faster eight streams are than one where weights are read from memory: text layers of 11B width.

    python -m benchmarks.serving.wide --dtype bfloat16

It prints JSON. It is a process of its own, so that it can be kept to fewer instructions by the
environment, see `benchmarks.machine.NARROWING`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from tokenizers import Tokenizer, models

import mllama
from benchmarks import machine
from benchmarks.machine import ROOT
from benchmarks.model import fill
from benchmarks.scenario import SMALL_VOCABULARY, Layers
from benchmarks.serving.inside import NAME
from benchmarks.tables import DTYPES
from benchmarks.timing import Spread, interleave, significant
from mllama.engine.engine import Engine
from mllama.engine.interface import Options
from mllama.engine.prompts import Prompt
from mllama_kernels import _library
from mllama_kernels._product import multiplies

STREAMS, LAYERS, PROMPT = 8, 5, 16
AVX2 = {
    "MLLAMA_KERNELS_CPU_ISA": "avx2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}


def in_a_process(dtype: str, avx2: bool, tokens: int, rounds: int, layers: int) -> dict[str, Any]:
    """The row of a dtype, kept to AVX2 or not. Raises: RuntimeError with what a process that failed wrote."""
    words = ["--dtype", dtype, "--tokens", tokens, "--rounds", rounds, "--layers", layers]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.serving.wide", *map(str, words)],
        cwd=ROOT,
        env=os.environ | (AVX2 if avx2 else {}),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"text layers of 11B width failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout)


@torch.no_grad()
def row(dtype: str, tokens: int, rounds: int, layers: int) -> dict[str, Any]:
    """Tokens per second of one stream and of STREAMS, in interleaved rounds."""
    torch.manual_seed(0)
    model = text_model(getattr(torch, dtype), layers)
    counts = (1, STREAMS)
    with Engine(model, words_tokenizer(), max_batch_size=STREAMS, max_length=1024) as engine:
        for streams in counts:  # warms up
            rate(engine, streams, 4)
        calls = [lambda streams=streams: rate(engine, streams, tokens) for streams in counts]
        one, many = interleave(calls, rounds)
    return {
        "who": NAME,
        "dtype": dtype,
        "layers": layers,
        "vocabulary": SMALL_VOCABULARY,
        "threads": torch.get_num_threads(),
        "instruction_set": _library.instruction_set(),
        "is_kept_to_avx2": os.environ.get("MLLAMA_KERNELS_CPU_ISA") == "avx2",
        "multiplies_bfloat16": multiplies(torch.bfloat16),
        "state": machine.state(torch.device("cpu")),
        "tokens_per_s": {
            str(streams): Spread.of(found).to_json() | {"rounds": [significant(v) for v in found]}
            for streams, found in zip(counts, (one, many))
        },
        "times_one_stream": Spread.of([m / o for o, m in zip(one, many, strict=True)]).to_json(),
    }


def text_model(dtype: torch.dtype, layers: int) -> mllama.MllamaForCausalLM:
    """Random self-attention layers of the 11B's width.

    The vocabulary is small, so that lm_head has about the share of a step that it has in the whole model.
    """
    configs = Layers(text=layers, cross=(), local=1, global_=1, taps=(0,)).configs(SMALL_VOCABULARY)
    with torch.device("meta"):
        config = mllama.MllamaTextConfig(**configs["text_config"])
        model = mllama.MllamaForCausalLM(config, backend="kernels")
    model = model.to(dtype).to_empty(device="cpu").eval()
    fill(model)
    return model


def words_tokenizer() -> Tokenizer:
    """Every token is a word."""
    words = {f"w{token}": token for token in range(SMALL_VOCABULARY)}
    return Tokenizer(models.WordLevel(words, unk_token="w0"))


def rate(engine: Engine, streams: int, tokens: int) -> float:
    """Tokens per second while all streams decode: from the last first token to the first last one."""
    arrivals: list[list[float]] = [[] for _ in range(streams)]

    def ask(number: int) -> None:
        begin = int(torch.randint(SMALL_VOCABULARY, ()))
        prompt = Prompt(tuple((begin + i) % SMALL_VOCABULARY for i in range(PROMPT)))
        options = Options(max_tokens=tokens, temperature=0, ignore_eos=True)
        for _ in engine.submit_prompt(prompt, options):
            arrivals[number].append(time.perf_counter())

    with ThreadPoolExecutor(streams) as threads:
        list(threads.map(ask, range(streams)))
    begin, end = max(own[0] for own in arrivals), min(own[-1] for own in arrivals)
    return sum(begin < moment <= end for own in arrivals for moment in own) / (end - begin)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving.wide", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--tokens", type=int, default=16, help="of an answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=LAYERS)
    options = parser.parse_args()
    print(json.dumps(row(options.dtype, options.tokens, options.rounds, options.layers)))


if __name__ == "__main__":
    main()
