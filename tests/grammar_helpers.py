"""Random walks through the tokens that a grammar allows, with the demo model's vocabulary."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np

from mllama.demo import checkpoint_path
from mllama.engine.interface import Constraint
from mllama.grammar.compiling import GrammarCompiler
from mllama.grammar.vocabulary import Vocabulary
from mllama.processing.tokenizer import MllamaTokenizer

SIZE = 450  # rows of the demo model's head; the token of images has the id behind them
ENDS = (439, 446, 447)
FIRST_SPECIAL = 438


def demo_compiler(seconds: float = 20.0) -> GrammarCompiler:
    return GrammarCompiler(
        lambda: Vocabulary(MllamaTokenizer.from_pretrained(checkpoint_path()), SIZE, ENDS), seconds
    )


def allowed(constraint: Constraint) -> list[int]:
    row = np.full(-(-SIZE // 32), -1, np.int32)
    constraint.fill(row)
    return np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")).tolist()


def walk(
    constraint: Constraint, tokenizer: MllamaTokenizer, rng: random.Random, most: int = 3000
) -> Iterator[int]:
    """Random allowed tokens, which end as soon as they may."""
    for _ in range(most):
        choices = allowed(constraint)
        assert choices and max(choices) < SIZE
        ends = set(choices) & set(ENDS)
        special = {token for token in choices if token >= FIRST_SPECIAL}
        assert special == ends, "a special token inside the answer"
        # Braces and quotes far more often than chance has them: a text has to end.
        closing = [t for t in choices if tokenizer.decode([t])[:1] in '"}],']
        token = rng.choice(sorted(ends) or (closing if closing and rng.random() < 0.6 else choices))
        constraint.accept(token)
        if token in ENDS:
            assert constraint.is_complete
            return
        yield token
    raise AssertionError("the answer does not end")
