"""Small random models for the engine, requests to it, and what `generate` says to each of them alone."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
import two_ranks
from generation_helpers import END, byte_tokenizer
from model_helpers import RATIOS, Shape, randomise

import mllama
import mllama_kernels
from mllama.engine.answers import Answer
from mllama.engine.engine import Engine
from mllama.engine.interface import Options, Piece
from mllama.engine.jobs import Job
from mllama.engine.prompts import PreparedPicture, Prompt
from mllama.engine.sampling import Counted, choose
from mllama.processing.image_spans import cross_attention_mask

SHAPE = Shape(
    tile_side=28,
    vision_head_dim=32,
    local_layers=2,
    global_layers=1,
    taps=(0, 1),
    head_dim=32,
    intermediate=96,
    layers=4,
    cross=(1, 3),
    vocab=257,
)
IMAGE = SHAPE.vocab
# How far logits may differ with the company of a request: products of other sizes round otherwise.
NEAR = 1e-4


def small_model(semantics: str = "meta", dtype: torch.dtype = torch.float32):
    model = mllama.MllamaForConditionalGeneration(
        mllama.MllamaConfig(**SHAPE.configs()), semantics=semantics
    )
    randomise(model)
    model.generation_config = {"eos_token_id": END, "pad_token_id": 0}
    return model.to(dtype).eval()


def random_picture(rng: random.Random) -> PreparedPicture:
    ratio = rng.randint(1, len(RATIOS))
    count = RATIOS[ratio - 1][0] * RATIOS[ratio - 1][1]
    mask = (torch.arange(4) < count).long()
    pixels = torch.randn(4, 3, SHAPE.tile_side, SHAPE.tile_side) * mask[:, None, None, None]
    return PreparedPicture.of(pixels, ratio, mask)


class Recorder(Answer):
    """An answer that keeps its tokens."""

    def __init__(self, *args):
        super().__init__(*args)
        self.ids: list[int] = []

    def push(self, token, likelihood):
        self.ids.append(token)
        return super().push(token, likelihood)


@dataclass(eq=False)
class Client:
    """An outbox that keeps everything."""

    pieces: list[Piece | Exception] = field(default_factory=list)
    times_given: int = 0

    def post(self, news: Sequence[tuple[str, Piece | Exception]]) -> None:
        self.times_given += 1
        self.pieces += [new for _, new in news]

    def text(self, index: int = 0) -> str:
        return "".join(p.text for p in self.pieces if isinstance(p, Piece) and p.index == index)

    @property
    def usage(self):
        return next((p.usage for p in self.pieces if isinstance(p, Piece) and p.usage), None)

    @property
    def has_ended(self) -> bool:
        return any(isinstance(p, Exception) or p.usage is not None for p in self.pieces)


def alone(
    model, prompt: Prompt, options: Options, seed: int | None = None
) -> tuple[list[int], torch.Tensor]:
    """The tokens that `generate` answers, and the logits it chose from; stop strings are looked for from the
    last of the least tokens on."""
    ids = torch.tensor([prompt.tokens])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if prompt.pictures:
        tiles = [[int(p.tile_mask.sum()) for p in prompt.pictures]]
        inputs |= {
            "pixel_values": torch.stack([p.pixels for p in prompt.pictures])[None],
            "aspect_ratio_ids": torch.tensor([[p.aspect_ratio_id for p in prompt.pictures]]),
            "aspect_ratio_mask": torch.stack([p.tile_mask for p in prompt.pictures])[None],
            "cross_attention_mask": torch.from_numpy(
                cross_attention_mask([prompt.tokens], tiles, IMAGE, 4)
            ),
        }
    chosen = {"do_sample": False}
    if options.temperature:
        names = ("temperature", "top_k", "top_p", "min_p")
        neutral = {"top_k": 0}
        chosen = {n: neutral.get(n) if (v := getattr(options, n)) is None else v for n in names}
        chosen["do_sample"] = True
    out = model.generate(
        **inputs,
        **chosen,
        repetition_penalty=options.repetition_penalty,
        seed=options.seed if seed is None else seed,
        max_new_tokens=options.max_tokens,
        min_new_tokens=options.min_tokens,
        eos_token_id=[] if options.ignore_eos else [END, *options.stop_token_ids],
        stop_strings=None if options.min_tokens else list(options.stop) or None,
        tokenizer=byte_tokenizer(),
        return_dict_in_generate=True,
        output_logits=True,
    )
    answer, logits = out.sequences[0, len(prompt.tokens) :].tolist(), torch.cat(out.logits)
    for end in range(options.min_tokens, len(answer)) if options.min_tokens else ():
        text = byte_tokenizer().decode(answer[options.min_tokens - 1 : end])
        if any(string in text for string in options.stop):
            return answer[:end], logits[:end]
    return answer, logits


def assert_same(
    job: Job, expected: list[int], logits: torch.Tensor, index: int = 0, prefix: bool = False
) -> None:
    """Token for token; a first difference only where logits near these are chosen from as the engine did.

    Args:
        expected, logits: of generate.
        prefix: the answer may have ended before its end.
    """
    answered = list(job.answers[index].ids)
    for place, (ours, theirs) in enumerate(zip(answered, expected)):
        if ours != theirs:
            near = choices_near(job, index, expected[:place], logits[place])
            assert ours in near, (place, answered, expected)
            return
    assert len(answered) == len(expected) or (prefix and len(answered) < len(expected))


def choices_near(job: Job, index: int, before: list[int], logits: torch.Tensor) -> set[int]:
    """What is chosen after some tokens from logits (V,) that differ a little from these."""
    count = 256
    noise = NEAR * (2 * torch.rand(count, len(logits)) - 1)
    row = Counted(job.samplings[index], job.prompt.tokens, before, len(logits), torch.device("cpu"))
    chosen = choose(mllama_kernels, logits + noise, [row] * count, [len(before)] * count)
    return set(chosen.tokens.tolist())


def engine_of(model, processor, **options) -> Engine:
    """An engine; where MLLAMA_TEST_RANKS is 2, of a copy that is split over this process and another."""
    if os.environ.get("MLLAMA_TEST_RANKS", "1") == "2":
        model = two_ranks.shared().split(model)
    return Engine(model, processor, **options)


class Engines:
    """Engines of one model, closed at the end."""

    def __init__(self, model) -> None:
        self.model, self.engines = model, []

    def start(self, **options) -> Engine:
        engine = engine_of(self.model, byte_tokenizer(), **options)
        self.engines.append(engine)
        return engine

    def close(self) -> None:
        for engine in self.engines:
            engine.close()


def put(engine: Engine, prompt: Prompt, options: Options, key: str) -> tuple[Job, Client]:
    client = Client()
    job = engine.job(key, prompt, options, client)
    engine.loop.put(job)
    return job, client


def put_together(
    engine: Engine, asked: Iterable[tuple[Prompt, Options]]
) -> list[tuple[Job, Client]]:
    """As put(), under the keys 0, 1 and so on; no step is planned before all of them are there."""
    with engine.loop._lock:  # which the engine needs to take the first
        return [put(engine, *one, str(i)) for i, one in enumerate(asked)]


def wait(holds, seconds: float = 300.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it does not come to hold"
        time.sleep(0.005)


def check_given_back(engine: Engine) -> None:
    """Every page and slot is free, or kept for others."""
    wait(lambda: not engine.loop._scheduler.has_work and not engine.loop._jobs)
    gauges = engine.stats().gauges
    assert gauges["pages_used"] == gauges["tiles_used"] == 0
    assert not engine.loop._answers and not engine.loop._runner._counted
    engine.loop._scheduler.prefix.clear()
    assert engine.loop._scheduler._pages.num_free == gauges["pages"]


class Held:
    """Holds an engine's next step until go().

    Attributes:
        is_held: set while it does.
    """

    def __init__(self, engine: Engine) -> None:
        self._launch, self._go = engine.loop._runner.launch, threading.Event()
        self.is_held = threading.Event()
        engine.loop._runner.launch = self

    def __call__(self, plan):
        self.is_held.set()
        assert self._go.wait(300)
        return self._launch(plan)

    def go(self) -> None:
        self._go.set()


class OnOrder:
    """Lets an engine go on, after some steps, only when it is told something: what a test does to an answer
    that runs comes before its end, however late the test is."""

    def __init__(self, engine: Engine, steps: int = 100) -> None:
        self._launch, self._orders = engine.loop._runner.launch, engine.loop._inbox
        self._left = steps
        engine.loop._runner.launch = self

    def __call__(self, plan):
        if self._left:
            self._left -= 1
        else:
            wait(lambda: not self._orders.empty())
        return self._launch(plan)


class Failing:
    """Makes a runner fail at its next steps, after some that go well."""

    def __init__(self, engine: Engine, times: int, after: int = 0) -> None:
        self._launch, self.left, self._after = engine.loop._runner.launch, times, after
        self.failed: list[int] = []
        engine.loop._runner.launch = self

    def __call__(self, plan):
        if self._after:
            self._after -= 1
        elif self.left:
            self.left -= 1
            self.failed.append(plan.number)
            raise RuntimeError("no memory")
        return self._launch(plan)
