"""From the text of a grammar to the tokens that an answer may take next."""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mllama.confined import ConfinedError, Workers, package_paths
from mllama.grammar.forms import GrammarError, at_fault
from mllama.wording import shown

if TYPE_CHECKING:
    from mllama.grammar.vocabulary import Vocabulary

_SECONDS = 3.0
_MEMORY = 512 * 2**20
_KEPT = 32  # compiled grammars
_LONGEST_REASON = 200
# What follows it: lines of the grammar, or a word in their place.
_CONTEXT = re.compile(r"\n *\d+ \| |<non-verbose/>")
_PREFIX = "failed to compile JSON schema: "
_WORKERS = Workers(Path(__file__).with_name("compile_job.py"), lambda: package_paths("llguidance"))


class Constraint:
    """The state of one answer. Of one thread at a time."""

    def __init__(self, matcher: Any, words: int) -> None:
        self._matcher = matcher
        self._words = words

    @property
    def is_complete(self) -> bool:
        """Whether nothing but the end may follow."""
        return self._matcher.is_stopped()

    def fill(self, row: np.ndarray) -> None:
        """Write the tokens that may come next: bit i % 32 of word i // 32 for token i.

        Args:
            row: int32 of (ceil(rows of the output head / 32),), contiguous.
        Raises: RuntimeError where the grammar takes more steps than it may; the answer cannot go on.
        """
        if row.dtype != np.int32 or row.shape != (self._words,) or not row.flags["C_CONTIGUOUS"]:
            raise ValueError(
                f"the mask must be {self._words} contiguous int32, got {row.dtype} of {row.shape}"
            )
        self._matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
        self._check()

    def accept(self, token: int) -> None:
        """Go on behind a token that the mask allowed. Raises: RuntimeError for another."""
        self._matcher.consume_token(token)
        self._check()

    def fork(self) -> Constraint:
        """Another answer that begins where this one is."""
        return Constraint(self._matcher.deep_copy(), self._words)

    def _check(self) -> None:
        if self._matcher.is_error():
            raise RuntimeError("the answer cannot be held to its grammar any longer")


class GrammarCompiler:
    """Compiles grammars for one vocabulary. Threads may call at the same time.

    Args:
        vocabulary: makes it, at the first grammar.
        seconds: of compiling a grammar.
    """

    def __init__(self, vocabulary: Callable[[], Vocabulary], seconds: float = _SECONDS) -> None:
        self._vocabulary = vocabulary
        self._seconds = seconds
        self._lock, self._making = threading.Lock(), threading.Lock()
        self._tokenizer: tuple[Any, int] | None = None
        self._kept: OrderedDict[str, Constraint] = OrderedDict()

    def prepare(self) -> None:
        """Make the vocabulary now, which takes seconds for a hundred thousand tokens: of one call while the
        server answers others, everybody would feel them.

        Raises: GrammarError for a vocabulary that no grammar can be matched against; ImportError.
        """
        _library()
        self._tokens()

    def compile(self, grammar: str) -> Constraint:
        """The constraint of an answer at its beginning.

        Takes time, of which the first compilation of a grammar is in a process of its own, within limits.

        Raises: GrammarError; ImportError without llguidance.
        """
        with self._lock:
            found = self._kept.get(grammar)
            if found is not None:
                self._kept.move_to_end(grammar)
        if found is None:
            found = self._compiled(grammar)
            with self._lock:
                self._kept[grammar] = found
                if len(self._kept) > _KEPT:
                    self._kept.popitem(last=False)
        return found.fork()

    def _compiled(self, grammar: str) -> Constraint:
        library = _library()
        self._try(grammar)
        tokenizer, size = self._tokens()
        limits = library.LLParserLimits(verbose_errors=False)
        matcher = library.LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
        if matcher.is_error():
            raise _refused(grammar, matcher.get_error())
        return Constraint(matcher, -(-size // 32))

    def _try(self, grammar: str) -> None:
        """Raises: GrammarError for one that cannot be compiled, or not within the limits."""
        try:
            answer, _ = _WORKERS.call(
                {"grammar": grammar}, seconds=self._seconds, memory=_MEMORY, longest=0
            )
        except ConfinedError as error:
            words = {
                "seconds": f"compiling it takes more than {self._seconds:g} s",
                "memory": f"compiling it takes more than {_MEMORY >> 20} MiB of memory",
            }.get(error.limit, "it is too complex")
            raise _refused(grammar, words) from None
        if not isinstance(answer, dict) or answer.get("ok") is not True:
            reason = answer.get("error") if isinstance(answer, dict) else None
            raise _refused(grammar, reason if isinstance(reason, str) else "it cannot be compiled")

    def _tokens(self) -> tuple[Any, int]:
        with self._making:
            if self._tokenizer is None:
                try:
                    vocabulary = self._vocabulary()
                except ValueError as error:
                    raise GrammarError(f"this model's answers have no form: {error}") from None
                made = _library().LLTokenizer(vocabulary, eos_token=vocabulary.end_ids)
                self._tokenizer = made, vocabulary.size
            return self._tokenizer


def _library() -> Any:
    try:
        import llguidance
    except ImportError:
        raise ImportError(
            "response_format and enforced calls need llguidance: pip install 'mllama-kernels[server]'"
        ) from None
    return llguidance


def _refused(grammar: str, reason: str) -> GrammarError:
    """In the words of the library, without the place in a grammar that nobody has seen."""
    place = re.match(r"at (\d+)\(\d+\): ", reason)
    words = reason[place.end() :] if place else reason
    words = " ".join(_CONTEXT.split(words.removeprefix(_PREFIX))[0].split())
    if len(words) > _LONGEST_REASON:
        words = f"{words[:_LONGEST_REASON]}..."
    function = at_fault(grammar, int(place[1])) if place else None
    return GrammarError(f"no answer can be held to the schema: {shown(words)}", function)
