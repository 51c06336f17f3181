"""Conversations to prompts, with what has to be known of them to make them tokens."""

from __future__ import annotations

import re
import warnings
from bisect import bisect_left
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mllama.limits import OWN_FILES, Limits
from mllama.processing.bounds import check_count, check_texts
from mllama.processing.chat_template import (
    render_chat_template,
    render_with_spans,
    template_variables,
)
from mllama.processing.conversation import normalized
from mllama.processing.plain_text import check_marked, escaped, unused_marks
from mllama.processing.plain_values import PlainCopies
from mllama.wording import quoted

_Spans = list[tuple[int, int]]
# What a template reads under these names is checked and bounded as an argument, and under no other way in.
_ARGUMENTS = ("messages", "template", "conversation", "marks")


@dataclass(frozen=True)
class Prompts:
    """Prompts of some conversations.

    Attributes:
        texts: one per conversation.
        conversations: their messages, normalised.
        batched: whether a list of conversations was given.
        options: the keywords that are not the template's.
        mark: stands inside special tokens that are plain text in `texts`; None if that was not asked for.
        spans: where the assistant's words are, not counting marks; None if that was not asked for.
    """

    texts: list[str]
    conversations: list[list[dict[str, Any]]]
    batched: bool
    options: dict[str, Any]
    mark: str | None
    spans: list[_Spans] | None


def write_prompts(
    template: str,
    conversation: Sequence[Any],
    *,
    special: Collection[str] | None,
    with_spans: bool,
    is_option: Callable[[str], bool],
    tokens: Mapping[str, str],
    variables: Mapping[str, Any],
    limits: Limits | None = None,
    **arguments: Any,
) -> Prompts:
    """Render a conversation or a batch of them.

    Args:
        special: special tokens that are plain text where messages, tools, documents and variables hold them.
        with_spans: find the assistant's words.
        is_option: whether a variable that the template does not read is for the processor.
        tokens: special tokens by the names that templates know, such as bos_token.
        variables: of the template, and options.
        limits: of the template, for each conversation; default `OWN_FILES`.
        **arguments: as `render_chat_template`.
    Raises: TypeError for a variable that is for nobody; otherwise as `render_chat_template`.
    """
    if not conversation:
        raise ValueError("the conversation is empty")
    batched = isinstance(conversation, (list, tuple)) and isinstance(conversation[0], (list, tuple))
    given = conversation if batched else [conversation]
    limits = limits or OWN_FILES
    check_count("the batch", len(given), "conversations", "max_texts", limits.max_texts)
    conversations = [normalized(messages) for messages in given]
    reads = template_variables(template, limits)
    options = {n: v for n, v in variables.items() if n not in reads and is_option(n)}
    ignored = sorted(set(variables) - reads - set(options) - set(tokens))
    if ignored:
        raise TypeError(f"neither the template nor the processor knows {quoted(ignored[0])}")
    if taken := [name for name in _ARGUMENTS if name in variables]:
        raise TypeError(f"{taken[0]} is no variable of a template's caller: the conversation is")
    chosen = {n: v for n, v in variables.items() if n not in options}
    if with_spans:
        if arguments.get("continue_final_message"):
            raise ValueError(
                "continue_final_message and return_assistant_tokens_mask exclude each other"
            )
        if not re.search(r"\{%-?\s*generation\s*-?%\}", template):
            warnings.warn(
                "assistant_masks are all 0: the chat template has no {% generation %}", stacklevel=3
            )
    mark, marks, written = None, [], conversations
    if special is not None or with_spans or batched:
        copies = PlainCopies(limits.max_text)
        chosen = {name: copies.value(value, name) for name, value in chosen.items()}
        arguments = {name: copies.value(value, name) for name, value in arguments.items()}
        copies.count_again(len(given) - 1, "what every conversation of the batch reads")
        written = [copies.messages(messages) for messages in conversations]
    if special is not None or with_spans:
        marks = unused_marks([template, written, chosen, list(arguments.values())], 3)
    if special is not None:
        mark = marks[2]
        written = escaped(written, special, mark)
        for name in ("tools", "documents"):
            arguments[name] = escaped(arguments.get(name), special, mark)
        for name, value in chosen.items():
            # A token by its own name is what the template would have been given.
            if value != tokens.get(name):
                chosen[name] = escaped(value, special, mark)
    reading = {**tokens, **chosen, **arguments, "limits": limits}
    spans = None
    if with_spans:
        pairs = [render_with_spans(template, messages, marks, **reading) for messages in written]
        texts, spans = [text for text, _ in pairs], [found for _, found in pairs]
    else:
        texts = [render_chat_template(template, messages, **reading) for messages in written]
    check_texts(texts, limits)
    for text in texts if mark else ():
        check_marked(text, mark)
    return Prompts(texts, conversations, batched, options, mark, spans)


def assistant_masks(
    offsets: Any, spans: Sequence[_Spans], shifts: Sequence[int]
) -> list[list[int]]:
    """1 for every token that begins inside a span, if a token begins with the span.

    Args:
        offsets: (begin, end) of the tokens of each row.
        spans: (begin, end) of each row, in the order of the text.
        shifts: how much later each row's text stands in what was tokenised.
    Returns: as `offsets` without its last axis.
    """
    masks = []
    for row, found, shift in zip(offsets, spans, shifts):
        pairs = [(int(begin), int(end)) for begin, end in row]
        places = [i for i, (begin, end) in enumerate(pairs) if end > begin]  # padding has no text
        begins = [pairs[i][0] for i in places]
        mask = [0] * len(pairs)
        for begin, end in found:
            first = bisect_left(begins, begin + shift)
            last = bisect_left(begins, end + shift)
            if first < len(begins) and begins[first] == begin + shift:
                for i in places[first:last]:
                    mask[i] = 1
        masks.append(mask)
    return masks
