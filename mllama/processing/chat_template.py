"""Conversations to prompts: jinja2 templates in a sandbox, with the helpers templates expect.

A template comes with a checkpoint and is not trusted: the sandbox gives it no attribute that is not
plain data, no file, no import, and no way to change what it is given.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mllama.processing.plain_text import well_formed

Message = Mapping[str, Any]
Conversation = Sequence[Message]

_CONTINUE = "CONTINUE_FINAL_MESSAGE_TAG "


# Characters to put around the assistant's words, while somebody asks where those are.
_AROUND_WORDS: ContextVar[tuple[str, str]] = ContextVar("around_words", default=("", ""))


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's words for training."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    @staticmethod
    def _marked(caller: Callable[[], str]) -> str:
        begin, end = _AROUND_WORDS.get()
        return f"{begin}{caller()}{end}"


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes <, > and & for HTML, which no model was trained on
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


@lru_cache(maxsize=1)
def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationTag, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


@lru_cache(maxsize=32)
def _compiled(template: str) -> jinja2.Template:
    return _environment().from_string(template)


@lru_cache(maxsize=32)
def template_variables(template: str) -> frozenset[str]:
    """Names that the template takes from its caller."""
    return frozenset(jinja2.meta.find_undeclared_variables(_environment().parse(template)))


def render_chat_template(
    template: str,
    conversation: Conversation,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    continue_final_message: bool | str = False,
    **variables: Any,
) -> str:
    """The prompt of one conversation; lone surrogates in it become U+FFFD.

    Args:
        template: jinja2 source. It may use `raise_exception`, `strftime_now`, the filter `tojson`
            without HTML escapes, loop controls and `{% generation %}`.
        conversation: messages {"role": ..., "content": string or list of parts}.
        tools: JSON schemas of the functions the model may call.
        documents: documents for retrieval, as the template wants them.
        add_generation_prompt: end with the header of the assistant's turn.
        continue_final_message: end inside the last message, for the model to go on; a string: inside
            that entry of it instead of "content".
        **variables: whatever else the template reads, for instance bos_token or date_string.
    Raises: jinja2.TemplateError for a faulty template, for what the template itself refuses, and
        (SecurityError) for what the sandbox refuses; TypeError or ValueError for other input.
    """
    for kind, entries in (("tools", tools), ("documents", documents)):
        for i, entry in enumerate(entries or ()):
            if not isinstance(entry, Mapping):
                raise TypeError(f"{kind}[{i}] must be a dict, got {type(entry).__name__}")
    ending = None
    if continue_final_message:
        if add_generation_prompt:
            raise ValueError("continue_final_message and add_generation_prompt exclude each other")
        key = continue_final_message if isinstance(continue_final_message, str) else "content"
        conversation, ending = _marked(conversation, key)
    prompt = _compiled(template).render(
        messages=conversation,
        tools=tools,
        documents=documents,
        add_generation_prompt=add_generation_prompt,
        **variables,
    )
    return well_formed(prompt if ending is None else _cut_at_mark(prompt, ending))


def render_with_spans(
    template: str, conversation: Conversation, marks: Sequence[str], **options: Any
) -> tuple[str, list[tuple[int, int]]]:
    """The prompt, and (begin, end) of what is inside `{% generation %}` in it.

    Args:
        marks: characters that are neither in the conversation nor in the template; the first two are used
            here, positions count none of them, and only the first two are taken out of the prompt.
        **options: as `render_chat_template`.
    """
    begin, end, *others = marks
    token = _AROUND_WORDS.set((begin, end))
    try:
        marked = render_chat_template(template, conversation, **options)
    finally:
        _AROUND_WORDS.reset(token)
    spans, prompt, position = [], [], 0
    for character in marked:
        if character == begin:
            spans.append((position, position))
        elif character == end:
            spans[-1] = (spans[-1][0], position)
        else:
            prompt.append(character)
            position += character not in others
    return "".join(prompt), spans


def _marked(conversation: Conversation, key: str) -> tuple[Conversation, str]:
    """A copy whose last text is followed by a mark, and that text."""
    last = dict(conversation[-1]) if conversation else {}
    content = last.get(key)
    if isinstance(content, str):
        text, last[key] = content, content + _CONTINUE
    else:
        parts = [dict(part) for part in content or ()]
        texts = [part for part in parts if "text" in part]
        if not texts:
            raise ValueError("continue_final_message: the last message has no text to continue")
        text = texts[-1]["text"]
        texts[-1]["text"] = text + _CONTINUE
        last[key] = parts
    return [*conversation[:-1], last], text


def _cut_at_mark(prompt: str, ending: str) -> str:
    mark = _CONTINUE.strip()
    if ending.strip() not in prompt or mark not in prompt:
        raise ValueError(
            "continue_final_message: the template leaves out the end of the last message"
        )
    position = prompt.rindex(mark)
    kept = prompt[:position]
    # A template that trims its messages has trimmed the mark's blank, and the text's own with it.
    return kept if prompt[position:].startswith(_CONTINUE) else kept.rstrip()
