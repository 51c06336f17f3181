"""What an error repeats is short, on one line, and moves no cursor."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mllama.wording import listed, quoted, reason, shown


def test_what_is_short_and_plain_is_shown_as_it_is():
    assert shown("photos/étang.jpg") == "photos/étang.jpg"
    for value in (1, -2.5, True, None, "a", [1, "b"], {"a": (1,)}, (), {2}, frozenset({3}), [[[]]]):
        assert quoted(value) == repr(value)


@pytest.mark.parametrize("text", ["\x1b[31m", "a\nb", "\r", "\0", "\ud800", "\u202e", "\u2028"])
def test_control_characters_are_escaped(text):
    assert shown(text).isprintable() and quoted(text).isprintable()
    assert quoted({text: [text]}).isprintable()
    assert listed([text]).isprintable()
    assert reason(ValueError(f"before{text}")).isprintable()


class _Hostile:
    def __repr__(self) -> str:
        raise SystemError("no")


@pytest.mark.parametrize(
    "value",
    [
        "a" * 10**6,
        b"a" * 10**6,
        10**5000,
        -(10**5000),
        [10**5000] * 10**5,
        list(range(10**6)),
        {str(i): "x" * 1000 for i in range(10**5)},
        {"a" * 10**6: {"b" * 10**6}},
        [[[[[["a" * 10**6]]]]]],
        np.zeros(10**6),
        torch.zeros(100, 100),
        _Hostile(),
        [_Hostile()],
        float("nan"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_values_are_short_whatever_their_size(value):
    assert len(quoted(value)) < 200 and quoted(value).isprintable()


def test_lists_are_counted_and_reasons_are_one_line():
    assert listed("abc") == "a, b, c"
    assert listed(map(str, range(100)), 2) == "0, 1 and 98 more"
    assert reason(RuntimeError("first:\n\tsecond")) == "first: second"
    assert reason(KeyError()) == "KeyError"
    assert len(reason(RuntimeError("a" * 10**6))) < 300
