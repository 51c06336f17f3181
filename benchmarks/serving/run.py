"""The parts of a run: their servers, and what is entered of each into the document."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import mllama
from benchmarks import machine
from benchmarks.budget import Budget
from benchmarks.serving import arrivals, inside, servers, tables, wide
from benchmarks.serving.agreement import agreement
from benchmarks.serving.load import Contender, Served, Workload, row, workloads
from benchmarks.serving.requests import LONGEST, Source, our_body, peer_body
from benchmarks.timing import significant
from mllama.engine.engine import Engine

OURS, PEER = "mllama serve", "transformers serve"
PARTS = ("peers", "engine", "arrivals", "wide")
CHUNK = 512  # tokens of a step on a CPU, as the server has it by default
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Attributes:
        rounds: of everything that is interleaved.
        workloads: asked of the servers.
        compared: answers that are compared before anything is timed.
        running_tokens: of the answers that run while others arrive.
        wide: dtypes of the wide layers, and whether they are kept to AVX2.
        wide_rounds, wide_tokens, wide_layers: of those, their answers, and how many there are.
    """

    rounds: int
    workloads: Sequence[Workload]
    compared: int
    running_tokens: int
    wide: Sequence[tuple[str, bool]]
    wide_rounds: int
    wide_tokens: int
    wide_layers: int

    @classmethod
    def of(cls, quick: bool) -> Effort:
        if quick:
            return cls(1, workloads(True), 8, 200, [("bfloat16", False)], 1, 8, 2)
        both = [(dtype, avx2) for avx2 in (False, True) for dtype in ("float32", "bfloat16")]
        return cls(5, workloads(False), 24, 600, both, 3, 16, wide.LAYERS)


class Run:
    """One run.

    Args:
        folder: of the demo model.
        dtype, threads: of the servers, and of the engine.
        seed: of the first picture.

    Attributes:
        document: what was measured, by part, ready for JSON.
    """

    def __init__(
        self, folder: Path, dtype: str, threads: int, seed: int, effort: Effort, budget: Budget
    ) -> None:
        self._folder, self._dtype, self._threads = folder, dtype, threads
        self._effort, self._budget, self._source = effort, budget, Source(seed)
        self.document: dict[str, Any] = {"agreement": {}} | {part: [] for part in PARTS}

    def measure(self, part: str) -> None:
        """One of PARTS. Raises: StartFailed; Disagreement; RuntimeError for what was answered wrongly."""
        {
            "peers": self._peers,
            "engine": self._engine,
            "arrivals": self._arrivals,
            "wide": self._wide,
        }[part]()

    def _peers(self) -> None:
        """Our server and the peer, at every number of streams."""
        with ExitStack() as stack:
            contenders = [self._ours(stack), self._peer(stack)]
            self._compare("peers", contenders)
            for workload in self._effort.workloads:
                for streams in workload.counts:
                    self._add_row("peers", workload, streams, contenders)

    def _engine(self) -> None:
        """Our server and the engine of this process, at as many streams as decode together."""
        streams = max(max(workload.counts) for workload in self._effort.workloads)
        workload = Workload(f"{LONGEST} tokens", long_answers, {streams: 2 * streams})
        with ExitStack() as stack:
            model, processor = self._model()
            engine = stack.enter_context(Engine(model, processor))
            contenders = [self._ours(stack), inside.Inside(engine)]
            self._compare("engine", contenders)
            self._add_row("engine", workload, streams, contenders)

    def _arrivals(self) -> None:
        """Running answers on our server while prompts and pictures arrive."""
        say, streams = self._budget.say, arrivals.STREAMS
        with ExitStack() as stack:
            served = self._ours(stack)
            model, processor = self._model()
            say("a chunk of a prompt, and a picture, alone")
            picture = self._source.large(1)
            chunk = inside.timed_alone(model, processor, CHUNK - streams, picture, rounds=10)
            say(f"{streams} streams while prompts and pictures arrive")
            found = arrivals.disturbed(
                served,
                self._source,
                self._effort.running_tokens,
                lambda text: len(processor.tokenizer.encode(text)),
            )
        bound = found["alone_ms"]["median"] + 1e3 * sum(chunk)
        times = dict(zip(("chunk_ms", "picture_ms"), (significant(1e3 * one) for one in chunk)))
        share = {"p99_of_bound": significant(found["arriving_ms"]["p99"] / bound)}
        self.document["arrivals"].append(found | times | share | {"state": machine.state(_CPU)})

    def _wide(self) -> None:
        """Text layers of 11B width, one stream and several."""
        effort = self._effort
        for dtype, avx2 in effort.wide:
            if self._budget.interrupted:
                return
            self._budget.say(f"text layers of 11B width, {dtype}{', AVX2' if avx2 else ''}")
            found = wide.in_a_process(
                dtype, avx2, effort.wide_tokens, effort.wide_rounds, effort.wide_layers
            )
            self.document["wide"].append(found)

    def _compare(self, part: str, contenders: Sequence[Contender]) -> None:
        self._budget.say(f"{part}: answers are compared")
        found = agreement(contenders, self._source, self._effort.compared)
        self.document["agreement"][part] = found

    def _add_row(
        self, part: str, workload: Workload, streams: int, contenders: Sequence[Contender]
    ) -> None:
        if self._budget.interrupted:
            return
        self._budget.say(f"{part}: {workload.name}, {streams} streams")
        before = machine.state(_CPU)
        found = row(workload, streams, contenders, self._source, self._effort.rounds, self._budget)
        if found is not None:
            found["state"] = {"before": before, "after": machine.state(_CPU)}
            self.document[part].append(found)
            print(tables.line(found), flush=True)

    def _ours(self, stack: ExitStack) -> Served:
        self._budget.say(f"{OURS} starts")
        server = stack.enter_context(servers.ours(self._folder, self._dtype, self._threads))
        return Served(OURS, server, partial(our_body, str(self._folder)))

    def _peer(self, stack: ExitStack) -> Served:
        self._budget.say(f"{PEER} starts")
        server = stack.enter_context(servers.peer(self._folder, self._dtype, self._threads))
        generation = json.loads((self._folder / "generation_config.json").read_text())
        return Served(PEER, server, partial(peer_body, str(self._folder), generation=generation))

    def _model(self) -> tuple[Any, Any]:
        """The model and the processor of this process."""
        torch.set_num_threads(self._threads)
        dtype = getattr(torch, self._dtype)
        model = mllama.MllamaForConditionalGeneration.from_pretrained(self._folder, dtype=dtype)
        return model.eval(), mllama.MllamaProcessor.from_pretrained(self._folder)


def long_answers(source: Source, count: int) -> Any:
    """Of LONGEST tokens, about pictures that are new."""
    return source.distinct(count, LONGEST)
