"""The thread that owns model, pools and scheduler: it takes what is new, plans, runs, and hands over."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from functools import partial

from mllama.engine.answers import Answer
from mllama.engine.counts import Counts
from mllama.engine.following import OutOfStep
from mllama.engine.interface import Overloaded, Piece, State, Unavailable, Usage, WorkFailed
from mllama.engine.jobs import Job, Outbox
from mllama.engine.plan import Plan
from mllama.engine.runner import Launched, Runner
from mllama.engine.sampling import Likelihood
from mllama.engine.scheduler import Event, Scheduler
from mllama.engine.sequence import Sequence
from mllama.wording import quoted

_LOG = logging.getLogger(__name__)
# Steps that fail one after another before nothing more is tried.
_MOST_FAILURES = 3
_NOT_FINITE = "the numbers of the answer are not finite"
_LOST = "the answer cannot be held to its form any longer, or its numbers are not finite"


class Loop:
    """Steps, one after another, as long as there is work.

    Args:
        scheduler, runner: used by nobody else from start() on.
        max_queue: answers that may wait.
        delay: how many steps later than launched the tokens of a step are read; on a GPU one, so that it
            always has work.

    Attributes:
        counts: what has been done.
        lost: why other ranks are, which has ended it.
    """

    def __init__(
        self, scheduler: Scheduler, runner: Runner, max_queue: int, delay: int = 0
    ) -> None:
        self._scheduler, self._runner, self._delay = scheduler, runner, delay
        self._max_queue = max_queue
        self.counts = Counts()
        self.lost: OutOfStep | None = None
        self._state: State = "ready"
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._jobs: dict[str, Job] = {}  # those in the inbox too
        self._num_coming = 0  # answers of these
        self._answers: dict[int, tuple[Job, Answer]] = {}  # by the ids of sequences
        self._in_flight: deque[tuple[Plan, Launched]] = deque()
        self._news: dict[Outbox, list[tuple[str, Piece | Exception]]] = {}
        self._num_failures = 0
        self._is_closing = False
        # Held where an order is checked and queued: nothing is behind the end, and no more than may wait.
        # Reentrant, since the garbage collector may close an engine anywhere.
        self._lock = threading.RLock()
        self._thread = threading.Thread(target=self._work, name="mllama-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def state(self) -> State:
        return self._state

    @property
    def num_waiting(self) -> int:
        """Answers that hold no page."""
        with self._lock:
            return self._num_coming + self._scheduler.num_waiting

    @property
    def num_running(self) -> int:
        """Answers that are read or written."""
        return self._scheduler.num_admitted

    def put(self, job: Job) -> None:
        """Queue a request, whose news go to its outbox.

        Raises: Unavailable; Overloaded; ValueError for the key of another that is not answered yet.
        """
        with self._lock:
            self.require_room()
            if job.key in self._jobs:
                raise ValueError(f"a request with the key {quoted(job.key)} is being answered")
            self._jobs[job.key] = job
            self._num_coming += len(job.answers)
            self._inbox.put(partial(self._add, job))

    def require_room(self, others: int = 0) -> None:
        """Raises: Unavailable where nothing is taken; Overloaded where the queue is full, with so many others
        that will come."""
        if self._state != "ready":
            raise Unavailable(f"the engine takes no request: it is {self._state}")
        if (waiting := self.num_waiting + others) >= self._max_queue:
            raise Overloaded(f"{waiting} requests wait already; at most {self._max_queue} do")

    def cancel(self, key: str) -> None:
        """End a request before the next step; its outbox hears no more of it."""
        self._inbox.put(partial(self._cancel, key))

    def drain(self) -> None:
        """Take no more requests; those that there are go on."""
        with self._lock:
            if self._state == "ready":
                self._state = "draining"

    def close(self) -> None:
        """End everything, and wait for the thread."""
        self.drain()
        self._inbox.put(self._close)
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()

    def _close(self) -> None:
        self._is_closing = True

    def _work(self) -> None:
        try:
            while True:
                self._take_inbox()
                if self._is_closing:
                    break
                if self._scheduler.has_work or self._in_flight:
                    self._step()
                self._hand_over()
        except OutOfStep as error:
            self.lost = error
            _LOG.error("the engine has ended: %s", error)
        except Exception:  # of the scheduler's own; nothing is known to hold any more
            _LOG.exception("the engine has ended")
        finally:
            with self._lock:
                self._state = "dead"
            self._end_all(WorkFailed("the engine has ended"))
            self._runner.close()

    def _take_inbox(self) -> None:
        """All that is there; the first is waited for where there is nothing else to do."""
        is_idle = not self._scheduler.has_work and not self._in_flight
        while True:
            try:
                order = self._inbox.get(is_idle, self._runner.idle_seconds)
            except queue.Empty:
                if is_idle:
                    self._runner.stay()
                return
            order()
            is_idle = False

    def _step(self) -> None:
        """Launch the next step, and take over the results of the one whose turn it is."""
        begin = time.monotonic()
        plan = self._scheduler.plan()
        if not plan.is_empty:
            self._note_started(begin)
            try:
                self._in_flight.append((plan, self._runner.launch(plan)))
            except OutOfStep:
                raise
            except Exception as error:
                # Where one before it has failed as well, it is void already.
                if all(self._accept(*self._in_flight.popleft()) for _ in [*self._in_flight]):
                    self._fail(plan, error)
                return
        elif not self._in_flight:
            raise RuntimeError("there is work, and no step does any of it")
        if plan.is_empty or len(self._in_flight) > self._delay:
            self._accept(*self._in_flight.popleft())
        if not plan.is_empty:
            self.counts.step(plan, time.monotonic() - begin)

    def _note_started(self, now: float) -> None:
        """Of the requests that the plan just made is the first to compute something of."""
        for sequence in self._scheduler.sequences():
            job = self._answers[sequence.id][0]
            if job.started is None and sequence.cached_tokens is not None:
                job.started, job.cached_tokens = now, sequence.cached_tokens

    def _accept(self, plan: Plan, launched: Launched) -> bool:
        """Take over the results of a step. Returns: whether there are any."""
        try:
            results = launched.read()
        except Exception as error:
            self._fail(plan, error)
            return False
        self._num_failures = 0
        events = self._scheduler.accept(plan, results.tokens)
        self._take(events, results.likelihoods, _NOT_FINITE)
        return True

    def _fail(self, plan: Plan, error: Exception) -> None:
        """The requests of a step end, and the others are computed anew."""
        _LOG.error("a step has failed", exc_info=error)
        self._num_failures += 1
        self._in_flight.clear()
        self._take(self._scheduler.fail(plan), {}, "the step that computed the answer has failed")
        for sequence in self._scheduler.sequences():
            self._make_known(sequence)
        if self._num_failures == _MOST_FAILURES:
            raise RuntimeError(f"{_MOST_FAILURES} steps have failed one after another")

    def _add(self, job: Job) -> None:
        with self._lock:
            self._num_coming -= len(job.answers)
            added = self._scheduler.add(job.request)  # which was checked before
        job.sequences = tuple(sequence.id for sequence in added)
        for sequence, answer in zip(added, job.answers, strict=True):
            self._answers[sequence.id] = (job, answer)
        for sequence in added:
            self._make_known(sequence)

    def _make_known(self, sequence: Sequence) -> None:
        """Let the runner know a sequence by its text of now."""
        if sequence.id not in self._answers:
            return  # of a request that ended with another of these
        job, answer = self._answers[sequence.id]
        text, at = sequence.text, sequence.prompt_length
        sampling = job.samplings[answer.index]
        try:
            self._runner.add(sequence.id, job.prompt.pictures, sampling, text[:at], text[at:])
        except Exception:  # as for want of memory
            _LOG.exception("a request could not be begun")
            self._fail_job(job, "the request could not be begun")

    def _cancel(self, key: str) -> None:
        job = self._jobs.get(key)
        if job is not None and job.sequences:  # not one that is in the inbox behind this
            self._forget(job)

    def _take(
        self, events: Iterable[Event], likelihoods: Mapping[int, Likelihood], error: str
    ) -> None:
        """Tell what a step did for its sequences; ``error`` is said of those that it has ended."""
        for event in events:
            if event.sequence not in self._answers:
                continue  # of a request that ended with another of these
            job, answer = self._answers[event.sequence]
            if event.finish_reason == "error":
                held = job.samplings[answer.index].constraint is not None
                self._fail_job(job, _LOST if held and error == _NOT_FINITE else error)
                continue
            try:
                self._advance(job, answer, event, likelihoods.get(event.sequence))
            except Exception:  # of a tokenizer
                _LOG.exception("the tokens of an answer could not be written")
                self._fail_job(job, "the tokens of the answer could not be written")

    def _advance(
        self, job: Job, answer: Answer, event: Event, likelihood: Likelihood | None
    ) -> None:
        """Tell what is new in an answer."""
        text, tokens, reason, usage = "", (), event.finish_reason, None
        if event.token is not None:
            text, tokens = answer.push(event.token, likelihood)
        if answer.is_stopped:
            if reason is None:
                self._scheduler.finish(event.sequence, "stop")
            reason = "stop"
        if reason is not None:
            text += answer.end()
            usage = self._end_answer(job, event.sequence)
        if text or tokens or reason is not None:
            self._tell(job, Piece(answer.index, text, tokens, (), reason, usage))

    def _fail_job(self, job: Job, words: str) -> None:
        self._forget(job)
        self._tell(job, WorkFailed(words))

    def _end_answer(self, job: Job, sequence: int) -> Usage | None:
        """What the request has used, if no other answer to it is open."""
        del self._answers[sequence]
        self._runner.remove(sequence)
        job.num_open -= 1
        if job.num_open:
            return None
        del self._jobs[job.key]
        return Usage(
            len(job.prompt.tokens),
            sum(answer.num_tokens for answer in job.answers),
            job.cached_tokens,
            (job.started or job.arrived) - job.arrived,
        )

    def _forget(self, job: Job) -> None:
        """End what is left of a request; nobody is told of it."""
        open_ = [id_ for id_ in job.sequences if id_ in self._answers]
        self._scheduler.cancel(open_)
        for id_ in open_:
            del self._answers[id_]
            self._runner.remove(id_)
        del self._jobs[job.key]

    def _tell(self, job: Job, new: Piece | Exception) -> None:
        self._news.setdefault(job.outbox, []).append((job.key, new))

    def _hand_over(self) -> None:
        """Give each outbox all that is new for it, at once."""
        news, self._news = self._news, {}
        for outbox, entries in news.items():
            try:
                outbox.post(entries)
            except Exception:  # of a client that has gone, as an event loop that is closed
                _LOG.exception("an answer could not be handed over")
                for key in {key for key, _ in entries}:
                    self._cancel(key)

    def _end_all(self, error: Exception) -> None:
        jobs = list(self._jobs.values())
        self._jobs.clear()
        self._answers.clear()
        for job in jobs:
            self._tell(job, error)
        self._hand_over()
