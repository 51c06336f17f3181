"""A model on some ranks, each a process that does what it is asked: what `benchmarks.scale` times."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import mllama
from benchmarks.ceilings import Reader
from benchmarks.measure import in_words
from benchmarks.model import Stopwatch, bytes_per_step, fill
from benchmarks.scenario import Layers, Scenario
from benchmarks.shapes import TILE_TOKENS, TILES
from mllama.parallel.ranks import Ranks
from mllama.parallel.split import Share, Split

BURSTS, BURST = 30, 10
PATIENCE = timedelta(minutes=10)  # of a rank that waits for another


@dataclass(frozen=True)
class Task:
    """What is generated: text, of a prompt of text, and where there are cross-attention layers of a picture.

    Attributes:
        model: in words.
        sizes: entries of the text configuration that are not the 11B's.
    """

    model: str
    layers: Layers
    vocabulary: int
    dtype: torch.dtype
    scenario: Scenario
    sizes: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0

    def config(self) -> mllama.MllamaTextConfig:
        entries = self.layers.configs(self.vocabulary)["text_config"] | dict(self.sizes)
        return mllama.MllamaTextConfig(**entries)


@dataclass(frozen=True)
class Ways:
    """On what a model runs.

    Attributes:
        threads: of each rank, on a CPU.
    """

    ranks: int
    threads: int
    device: str = "cpu"

    @property
    def name(self) -> str:
        if self.device != "cpu":
            return f"{self.ranks} GPU" + "s" * (self.ranks > 1)
        return " of ".join(
            f"{n} {what}" + "s" * (n > 1)
            for n, what in ((self.ranks, "rank"), (self.threads, "thread"))
        )


@dataclass(frozen=True, eq=False)
class TimedRanks(Ranks):
    """Ranks that note how long each exchange takes, waiting for the others included.

    Attributes:
        seconds: of each exchange.
    """

    seconds: list[float] = field(default_factory=list)

    def _timed(self, exchange: Callable[[], Tensor]) -> Tensor:
        begin = time.perf_counter()
        y = exchange()
        self.seconds.append(time.perf_counter() - begin)
        return y

    def summed(self, x: Tensor) -> Tensor:
        return self._timed(partial(super().summed, x))

    def side_by_side(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        return self._timed(partial(super().side_by_side, x, sizes))


class _Steps(Stopwatch):
    """From the first token on also the processor time, and the exchanges."""

    def __init__(self, exchanges: list[float]) -> None:
        super().__init__()
        self._exchanges, self._cpu = exchanges, time.process_time()

    def put(self, tokens: Tensor) -> None:
        super().put(tokens)
        if len(self._times) == 3:  # begin, prompt and the first token
            self._exchanges.clear()
            self._cpu = time.process_time()

    def figures(self) -> dict[str, float]:
        steps = len(self._times) - 3
        return {
            "first_token": self.first_token,
            "token": self.token,
            "cpu": (time.process_time() - self._cpu) / steps,
            "exchanges": len(self._exchanges) / steps,
            "exchanging": sum(self._exchanges) / steps,
        }


class _Rank:
    """One of the processes of a crew, and what it can be asked for."""

    def __init__(self, ways: Ways, task: Task, rank: int, meeting: str) -> None:
        torch.set_num_threads(ways.threads)
        index = {} if ways.device == "cpu" else {"index": rank}
        self._device = torch.device(ways.device, **index)
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        self._task, self._ranks = task, None
        if ways.ranks > 1:
            dist.init_process_group(
                "nccl" if self._device.type == "cuda" else "gloo",
                init_method=meeting,
                rank=rank,
                world_size=ways.ranks,
                timeout=PATIENCE,
            )
            # Within a CUDA graph no clock of Python's runs.
            kind = TimedRanks if self._device.type == "cpu" else Ranks
            ranks = kind(dist.group.WORLD, rank, ways.ranks)
            self._ranks = ranks.on_device(self._device)
        torch.manual_seed(task.seed)
        self._model = self._build()
        self._inputs = self._make_inputs()
        self._reader: Reader | None = None

    def _build(self) -> Any:
        with torch.device("meta"):
            model = mllama.MllamaForCausalLM(self._task.config(), semantics="transformers")
        wholes = {}
        if self._ranks is not None:
            share = Share(self._ranks, Split(model, self._ranks.size, {}))
            parameters = dict(model.named_parameters())
            wholes = {name: (parameters[name], cut) for name, cut in share.cuts.items()}
            share.take(model)
        model = model.to(self._task.dtype).to_empty(device=self._device).eval()
        fill(model, wholes)
        return model

    def _make_inputs(self) -> dict[str, Tensor]:
        task, scenario = self._task, self._task.scenario
        ids = torch.randint(0, task.vocabulary, (scenario.batch, scenario.prompt))
        inputs = {"input_ids": ids.to(self._device)}
        if task.layers.cross:
            states = torch.randn(
                TILES * scenario.batch, TILE_TOKENS, self._model.config.hidden_size
            )
            inputs["cross_attention_states"] = states.to(self._device, task.dtype)
        return inputs

    @torch.no_grad()
    def logits(self) -> Tensor:
        """After the prompt."""
        output = self._model(**self._inputs, logits_to_keep=1, use_cache=False)
        return output.logits[:, -1].float().cpu()

    def exchange(self) -> str | None:
        """What it goes through."""
        if self._ranks is None:
            return None
        return "shared memory" if self._ranks.memory else dist.get_backend(self._ranks.group)

    def bytes_per_step(self) -> int:
        return bytes_per_step(self._model, self._task.scenario)

    def generate(self) -> dict[str, float]:
        """Seconds of an answer, see :class:`_Steps`."""
        watch = _Steps(getattr(self._ranks, "seconds", []))
        self._model.generate(
            **self._inputs,
            max_new_tokens=self._task.scenario.new,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            streamer=watch,
        )
        return watch.figures()

    def read(self) -> float:
        """GB/s of reading memory, while the other ranks do."""
        self._reader = self._reader or Reader(self._device)
        return self._reader.round()

    @torch.no_grad()
    def latency(self) -> dict[str, list[float]]:
        """Seconds of an exchange by itself, in bursts of them: of rows of the stream, and of logits."""
        if self._ranks is None:
            return {}
        options = {"dtype": self._task.dtype, "device": self._device}
        batch = self._task.scenario.batch
        x = torch.zeros(batch, self._model.config.hidden_size, **options)
        part = torch.zeros(batch, 1, self._model.lm_head.out_features, **options)
        calls = {
            "all_reduce": partial(self._ranks.summed, x),
            "all_gather": partial(self._model.head.collective, part),
        }
        return {name: self._bursts(call) for name, call in calls.items()}

    def _bursts(self, call: Callable[[], Tensor]) -> list[float]:
        def burst() -> float:
            begin = time.perf_counter()
            for _ in range(BURST):
                call()
            if self._device.type == "cuda":
                torch.cuda.synchronize()
            return (time.perf_counter() - begin) / BURST

        return [burst() for _ in range(BURSTS + 3)][3:]  # the first warm up


class CrewFailed(RuntimeError):
    """A rank that could not do what it was asked for."""


def _serve(ways: Ways, task: Task, rank: int, meeting: str, asked: Connection) -> None:
    """A process: makes its part of the model, then answers with what is asked for or the error in words."""
    try:
        own = _Rank(ways, task, rank, meeting)
        asked.send(None)
        while (what := asked.recv()) is not None:
            asked.send(getattr(own, what)())
    except EOFError:  # the benchmark itself is gone
        pass
    except Exception as error:
        asked.send(CrewFailed(in_words(error)))
    os._exit(0)  # the others may be waiting in an exchange, whose threads would be waited for


class Crew:
    """The processes of one model; a context manager."""

    def __init__(self, ways: Ways, task: Task) -> None:
        self.ways = ways
        self._folder = tempfile.TemporaryDirectory()
        meeting = f"file://{Path(self._folder.name, 'meeting')}"
        spawn = multiprocessing.get_context("spawn")
        self._pipes, self._processes = [], []
        before = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = str(ways.threads)  # read when a library is loaded
        try:
            for rank in range(ways.ranks):
                here, there = spawn.Pipe()
                arguments = (ways, task, rank, meeting, there)
                process = spawn.Process(target=_serve, args=arguments, daemon=True)
                process.start()
                there.close()
                self._pipes.append(here)
                self._processes.append(process)
        finally:
            del os.environ["OMP_NUM_THREADS"]
            if before is not None:
                os.environ["OMP_NUM_THREADS"] = before

    def __enter__(self) -> Crew:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        for pipe in self._pipes:
            with suppress(OSError):
                pipe.send(None)
        for process in self._processes:
            process.join(5)
            process.kill()
        self._folder.cleanup()

    def ready(self) -> None:
        """Wait until all have made their part. Raises: CrewFailed."""
        self._answers()

    def ask(self, what: str) -> list[Any]:
        """The answers of all ranks, a method of which is called. Raises: CrewFailed."""
        for pipe in self._pipes:
            with suppress(OSError):
                pipe.send(what)
        return self._answers()

    def _answers(self) -> list[Any]:
        answers = []
        for rank, pipe in enumerate(self._pipes):
            try:
                answer = pipe.recv()
            except (EOFError, OSError):
                raise CrewFailed(f"rank {rank} of {self.ways.name} has ended") from None
            if isinstance(answer, CrewFailed):
                raise CrewFailed(f"rank {rank} of {self.ways.name}: {answer}")
            answers.append(answer)
        return answers
