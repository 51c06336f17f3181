"""The engine: many requests at once through one model, without a server."""

from __future__ import annotations

import queue
import uuid
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from mllama.config_fields import FLAG, NOTHING, TEXT, either, integer, value_problem
from mllama.engine.answers import Vocabulary
from mllama.engine.following import Followers
from mllama.engine.forward import store_of
from mllama.engine.interface import (
    Constraint,
    Options,
    Piece,
    Refused,
    Stats,
    WorkFailed,
)
from mllama.engine.jobs import Job, ModelFacts, Outbox
from mllama.engine.loop import Loop
from mllama.engine.pages import PagePool, TilePool
from mllama.engine.prefix import Scope
from mllama.engine.prompts import Prompt, prepare_chat
from mllama.engine.runner import Runner
from mllama.engine.scheduler import Scheduler
from mllama.engine.sizes import EnginePlan, plan_engine
from mllama.memory import free_bytes
from mllama.stores import KeyValueStore
from mllama.wording import quoted

_OPEN = either(NOTHING, integer(1))
_ARGUMENTS = {
    "max_batch_size": integer(1),
    "max_batch_tokens": _OPEN,
    "max_ce_batch_size": integer(1),
    "max_new_pictures": integer(1),
    "max_length": _OPEN,
    "max_images": integer(0),
    "max_queue": _OPEN,
    "num_pages": _OPEN,
    "num_slots": either(NOTHING, integer(0)),
    "image_cache_bytes": either(NOTHING, integer(0)),
    "prefix_reuse": FLAG,
    "adapter": TEXT,
    "force": FLAG,
}


class Engine:
    """Answers requests together: they share batches, the pages of what they begin alike with, and the keys
    and values of each picture. An answer does not depend on who else is answered.

    A thread of its own runs the model, which nobody else is to use or change meanwhile. It is closed by
    close(), or as a context manager:

        with Engine(model, processor) as engine:
            parts = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
            for text in engine.submit([{"role": "user", "content": parts}], [picture]):
                print(text, end="", flush=True)

    submit() comes back at once: requests that are submitted before the first is read are answered together.

    Args:
        model: with a language head.
        processor: of the model.
        max_batch_size: answers that are computed at once.
        max_batch_tokens: tokens of a step; by default 512 on a CPU, 2048 on a GPU.
        max_ce_batch_size: prompts that are read at once.
        max_new_pictures: pictures that pass the vision tower in a step.
        max_length: tokens of prompt and answer; by default the model's context, or what there is memory for.
        max_images: of a prompt, for whose tiles there is room at least.
        max_queue: answers that may wait; by default 4 times those computed at once.
        num_pages: of ``PAGE_SIZE`` tokens; by default for all answers at their longest, or for what half of
            the memory holds that the workspace leaves.
        num_slots: for image tiles; by default for the pictures of all answers, or for what a quarter holds.
        image_cache_bytes: what pictures may take that nobody uses any more; None: all that is free.
        prefix_reuse: whether prompts begin with what others have computed.
        adapter: the identity of the adapter that the model has, empty for none.
        force: go on also where there seems to be too little memory.

    Of a model that is split over ranks (``tensor_parallel``) the first has the engine, and the others call
    :func:`mllama.follow`.

    Raises: ValueError for an argument that cannot be, on another rank than the first, and with the numbers
        where memory does not suffice.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        max_batch_size: int = 32,
        max_batch_tokens: int | None = None,
        max_ce_batch_size: int = 32,
        max_new_pictures: int = 1,
        max_length: int | None = None,
        max_images: int = 4,
        max_queue: int | None = None,
        num_pages: int | None = None,
        num_slots: int | None = None,
        image_cache_bytes: int | None = None,
        prefix_reuse: bool = True,
        adapter: str = "",
        force: bool = False,
    ) -> None:
        given = {
            "max_batch_size": max_batch_size,
            "max_batch_tokens": max_batch_tokens,
            "max_ce_batch_size": max_ce_batch_size,
            "max_new_pictures": max_new_pictures,
            "max_length": max_length,
            "max_images": max_images,
            "max_queue": max_queue,
            "num_pages": num_pages,
            "num_slots": num_slots,
            "image_cache_bytes": image_cache_bytes,
            "prefix_reuse": prefix_reuse,
            "adapter": adapter,
            "force": force,
        }
        followers = Followers.of(model)
        try:
            if problems := [
                p for name in given for p in value_problem(name, _ARGUMENTS[name], given)
            ]:
                raise ValueError("; ".join(problems))
            plan = _planned(
                model,
                followers,
                force,
                max_batch_size=max_batch_size,
                max_batch_tokens=max_batch_tokens,
                max_prefills=max_ce_batch_size,
                max_new_pictures=max_new_pictures,
                max_length=max_length,
                max_images=max_images,
                num_pages=num_pages,
                num_slots=num_slots,
            )
            sizes = plan.sizes
            self._pages = PagePool(sizes.num_pages + 1)
            self._tiles = TilePool(sizes.num_slots, sizes.slot_bytes, image_cache_bytes)
            self._scheduler = Scheduler(
                sizes.limits,
                self._pages,
                self._tiles,
                Scope(str(model.dtype), adapter, model.semantics),
                prefix_reuse=prefix_reuse,
            )
            self.processor = processor
            self._vocabulary = Vocabulary.of(processor)
            self._facts = ModelFacts.of(model, sizes.limits.max_length)
            with nullcontext() if followers is None else followers.preparing(sizes, max_batch_size):
                runner = Runner(model, store_of(model, sizes), followers)
                runner.forward.prepare(max_batch_size)
        except Exception as error:
            if followers is not None:
                followers.end(str(error))
            raise
        delay = 1 if model.device.type == "cuda" else 0
        self.loop = Loop(
            self._scheduler, runner, 4 * max_batch_size if max_queue is None else max_queue, delay
        )
        self.loop.start()
        weakref.finalize(self, self.loop.close)  # waits: the interpreter may not end under a step

    def submit(
        self,
        messages: Sequence[Mapping[str, Any]],
        images: Sequence[Any] = (),
        options: Options | None = None,
    ) -> Texts:
        """Answer a conversation.

        Args:
            messages: as :meth:`mllama.MllamaProcessor.apply_chat_template` takes them; their words are plain
                text.
            images: for image parts without one, in their order.
            options: how the answer is made; of several (``n``) this gives the first.
        Returns: the text in pieces, as it becomes certain. Closing it ends the request.
        Raises: Refused or what the processor raises, before anything is queued; Overloaded; Unavailable; the
            pieces raise WorkFailed.
        """
        self.loop.require_room()  # before the work of preparing it
        return self.submit_prompt(prepare_chat(self.processor, messages, images), options)

    def submit_prompt(self, prompt: Prompt, options: Options | None = None) -> Texts:
        """As submit(), for a prompt that is prepared."""
        if not isinstance(options, (Options, type(None))):
            raise TypeError(f"options must be mllama.Options, got {quoted(options)}")
        box = Box()
        job = self.job(uuid.uuid4().hex, prompt, options or Options(), box)
        self.loop.put(job)
        return Texts(job.key, box, self)

    def job(
        self,
        key: str,
        prompt: Prompt,
        options: Options,
        outbox: Outbox,
        constraint: Constraint | None = None,
    ) -> Job:
        """A request, checked, to be put into the loop. Raises: Refused."""
        job = self._facts.job(key, prompt, options, self._vocabulary, outbox, constraint)
        try:
            self._scheduler.check(job.request)
        except ValueError as error:
            raise Refused(str(error)) from None
        return job

    def stats(self) -> Stats:
        """What is in use, and what has been done."""
        counts, tiles, prefix = self.loop.counts, self._tiles, self._scheduler.prefix
        pages_used = self._pages.num_pages - prefix.num_available
        tiles_used = tiles.num_slots - tiles.num_free - tiles.num_unused
        fullness = (
            pages_used / self._pages.num_pages,
            tiles_used / max(1, tiles.num_slots),
        )
        return Stats(
            gauges={
                "answers_running": self.loop.num_running,
                "answers_waiting": self.loop.num_waiting,
                "cache_usage_ratio": max(fullness),
                "pages_used": pages_used,
                "pages_kept": prefix.num_available - self._pages.num_free,
                "pages": self._pages.num_pages,
                "tiles_used": tiles_used,
                "tiles_kept": tiles.num_unused,
                "tiles": tiles.num_slots,
            },
            counters={
                "steps": counts.steps,
                "step_tokens": counts.step_tokens,
                "encoded_pictures": counts.encoded_pictures,
                "preemptions": self._scheduler.num_preemptions,
                "prefix_hits": self._scheduler.num_prefix_hits,
                "picture_hits": self._scheduler.num_picture_hits,
            },
            distributions={
                "step_seconds": counts.step_seconds.distribution(),
                "batch_size": counts.batch_size.distribution(),
            },
        )

    def close(self) -> None:
        """End what is being answered, and the thread."""
        self.loop.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _planned(model: Any, followers: Followers | None, force: bool, **arguments: Any) -> EnginePlan:
    """As plan_engine(), by the memory of the rank that has least. Raises: ValueError."""
    free = free_bytes(model.device) if followers is None else followers.free
    store = KeyValueStore(model.config.get_text_config(), dtype=model.dtype, device=model.device)
    plan = plan_engine(
        model.config,
        store,
        free,
        model.device.type,
        quantized=model.quantization is not None,
        **arguments,
    )
    if not force:
        plan.require_fit(free, str(model.device), "force=True goes on all the same")
    return plan


class Box:
    """The outbox of one request, emptied by another thread."""

    def __init__(self) -> None:
        self._news: queue.SimpleQueue[Piece | Exception | None] = queue.SimpleQueue()

    def post(self, news: Sequence[tuple[str, Piece | Exception]]) -> None:
        for _, new in news:
            self._news.put(new)

    def shut(self) -> None:
        """Nothing more comes, which one who waits is told."""
        self._news.put(None)

    def take(self) -> Piece | Exception | None:
        """The next, once it is there; None after shut()."""
        return self._news.get()


class Texts:
    """The text of one answer in pieces, for one thread to read. Closed, also by another one, or forgotten
    before its end, it ends the request.

    Attributes:
        pieces: all that came so far.
    """

    def __init__(self, key: str, box: Box, engine: Engine) -> None:
        self.pieces: list[Piece] = []
        self._key, self._box = key, box
        self._engine = engine  # which is not to end as long as somebody reads
        self._has_ended = False

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        while not self._has_ended:
            new = self._box.take()
            if new is None:
                break
            if isinstance(new, Exception):
                self._has_ended = True
                raise WorkFailed(str(new)) from new
            self.pieces.append(new)
            self._has_ended = new.usage is not None
            if new.index == 0 and new.text:
                return new.text
        raise StopIteration

    def close(self) -> None:
        """End the request, if it has not ended."""
        if not self._has_ended:
            self._has_ended = True
            self._engine.loop.cancel(self._key)
            self._box.shut()  # another thread may be waiting

    def __del__(self) -> None:
        self.close()
