"""Whether all say the same, before anybody is timed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.serving.load import Contender
from benchmarks.serving.requests import Source

# Of the answers. Where logits are close they may part, and rows before the picture do not attend to it in
# ours, as in the model's own code, and do in `transformers`.
LEAST_EQUAL = 0.9


class Disagreement(RuntimeError):
    """Answers that differ; the message has them."""


def agreement(contenders: Sequence[Contender], source: Source, count: int) -> dict[str, Any]:
    """Ask all the same questions, which have natural answers, and compare those with the first one's.

    Raises: Disagreement where fewer than LEAST_EQUAL are equal.
    """
    requests = source.distinct(count)
    first, *others = (
        [answer.text for answer in contender.answer(requests, 1)] for contender in contenders
    )
    equal = {}
    for contender, texts in zip(contenders[1:], others, strict=True):
        pairs = [(a, b) for a, b in zip(first, texts, strict=True) if a != b]
        equal[contender.name] = count - len(pairs)
        if equal[contender.name] < LEAST_EQUAL * count:
            raise Disagreement(
                f"{contenders[0].name} and {contender.name} give {len(pairs)} of {count} answers "
                f"differently, as {pairs[0][0]!r} and {pairs[0][1]!r}"
            )
    return {"answers": count, "equal": equal}
