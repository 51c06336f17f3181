"""Conversations to prompts: jinja2 templates in a sandbox, in a process of their own.

A template comes with a checkpoint and is not trusted. It gets a plain copy of what it reads
(`plain_values`): no object of the caller, so no file, no image and no way to change what was given. It is
parsed, compiled and run in a child process (`confined`, `template_job`), where jinja2's sandbox gives it no
attribute that is not plain data and no import, and where the system bounds its memory. Its steps are bounded
by time: the parent's clock ends a process that takes too long, even inside one operation such as 9**9**8.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2

from mllama.confined import ConfinedError, Workers, package_paths
from mllama.limits import OWN_FILES, Limits
from mllama.processing.plain_text import well_formed
from mllama.processing.plain_values import PlainCopies
from mllama.processing.template_errors import TemplateLimitError, is_answer, template_error

Message = Mapping[str, Any]
Conversation = Sequence[Message]

_CONTINUE = "CONTINUE_FINAL_MESSAGE_TAG "
_LONGEST_TEMPLATE = 2**20  # characters; the longest that are published have some ten thousand
_WORKERS = Workers(
    Path(__file__).with_name("template_job.py"), lambda: package_paths("jinja2", "markupsafe")
)


@lru_cache(maxsize=32)
def template_variables(template: str, limits: Limits = OWN_FILES) -> frozenset[str]:
    """Names that the template takes from its caller.

    Raises: as `render_chat_template`.
    """
    answer, _ = _ask({"template": template}, limits)
    return frozenset(answer["names"])


def render_chat_template(
    template: str,
    conversation: Conversation,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    continue_final_message: bool | str = False,
    limits: Limits | None = None,
    **variables: Any,
) -> str:
    """The prompt of one conversation; lone surrogates in it become U+FFFD.

    Args:
        template: jinja2 source. It may use `raise_exception`, `strftime_now`, the filter `tojson`
            without HTML escapes, loop controls and `{% generation %}`.
        conversation: messages {"role": ..., "content": string or list of parts}. The template sees an image
            part as {"type": "image"}, and of all else plain data: dicts, lists, strings, numbers and None.
        tools: JSON schemas of the functions the model may call.
        documents: documents for retrieval, as the template wants them.
        add_generation_prompt: end with the header of the assistant's turn.
        continue_final_message: end inside the last message, for the model to continue; a string: inside
            that entry of it instead of "content".
        limits: max_text bounds what the template reads and writes, in characters each, max_template_seconds
            its time, max_template_bytes the memory of its process; default `OWN_FILES`.
        **variables: whatever else the template reads, for instance bos_token or date_string.
    Raises: jinja2.TemplateError for a faulty template and for what the template itself refuses; among them
        SecurityError for what the sandbox refuses and `TemplateLimitError` for what goes beyond a limit; what
        Python raises inside a template is both, for instance a TemplateRuntimeError and a TypeError.
        TypeError or ValueError for other input, naming what is no plain data or too much; RuntimeError where
        this interpreter cannot start a process.
    """
    return _rendered(
        template,
        conversation,
        ("", ""),
        tools=tools,
        documents=documents,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=continue_final_message,
        limits=limits,
        **variables,
    )


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
    marked = _rendered(template, conversation, (begin, end), **options)
    spans, prompt, position = [], [], 0
    for character in marked:
        if character == begin:
            spans.append((position, position))
        elif character == end:
            if not spans:
                raise jinja2.TemplateRuntimeError(f"the chat template writes {end!a} by itself")
            spans[-1] = (spans[-1][0], position)
        else:
            prompt.append(character)
            position += character not in others
    return "".join(prompt), spans


def _rendered(
    template: str,
    conversation: Conversation,
    around: tuple[str, str],
    *,
    continue_final_message: bool | str = False,
    limits: Limits | None = None,
    **variables: Any,
) -> str:
    limits = limits or OWN_FILES
    variables = {"tools": None, "documents": None, "add_generation_prompt": False, **variables}
    for kind in ("tools", "documents"):
        for i, entry in enumerate(variables[kind] or ()):
            if not isinstance(entry, Mapping):
                raise TypeError(f"{kind}[{i}] must be a dict, got {type(entry).__name__}")
    copies = PlainCopies(limits.max_text)
    messages, ending = copies.messages(conversation), None
    if continue_final_message:
        if variables["add_generation_prompt"]:
            raise ValueError("continue_final_message and add_generation_prompt exclude each other")
        key = continue_final_message if isinstance(continue_final_message, str) else "content"
        messages, ending = _marked(messages, key)
    now = datetime.now()
    request = {
        "template": template,
        "variables": {
            "messages": messages,
            **{str.__str__(name): copies.value(value, name) for name, value in variables.items()},
        },
        "around": list(around),
        "now": [now.year, now.month, now.day, now.hour, now.minute, now.second, now.microsecond],
        "longest": limits.max_text,
    }
    answer, prompt = _ask(request, limits)
    if answer["length"] is None or len(prompt) > limits.max_text:
        raise TemplateLimitError(
            f"the chat template writes more than {limits.max_text} characters (max_text)"
        )
    return well_formed(prompt if ending is None else _cut_at_mark(prompt, ending))


def _ask(request: dict[str, Any], limits: Limits) -> tuple[dict[str, Any], str]:
    """The answer of `template_job`; errors are raised."""
    if not isinstance(request["template"], str):
        kind = type(request["template"]).__name__
        raise TypeError(f"a chat template is a string, got {kind}")
    template = request["template"] = str.__str__(request["template"])
    if len(template) > _LONGEST_TEMPLATE:
        raise TemplateLimitError(
            f"the chat template has {len(template)} characters; at most {_LONGEST_TEMPLATE} are read"
        )
    try:
        answer, text = _WORKERS.call(
            request,
            seconds=limits.max_template_seconds,
            memory=limits.max_template_bytes,
            longest=limits.max_text,
        )
    except ConfinedError as error:
        reason = {
            "seconds": f"takes more than {limits.max_template_seconds:g} s (max_template_seconds)",
            "memory": f"needs more than {limits.max_template_bytes} bytes of memory (max_template_bytes)",
            "answer": f"writes more than {limits.max_text} characters (max_text)",
        }.get(error.limit, f"ended its process: {error} (max_template_bytes may be too few)")
        raise TemplateLimitError(f"the chat template {reason}") from None
    if not is_answer(answer, request):
        raise TemplateLimitError("the process of the chat template gives no answer that is one")
    if "kinds" in answer:
        raise template_error(answer)
    return answer, text


def _marked(conversation: Conversation, key: str) -> tuple[Conversation, str]:
    """A copy whose last text is followed by a mark, and that text."""
    last = dict(conversation[-1]) if conversation and isinstance(conversation[-1], dict) else {}
    content = last.get(key)
    if isinstance(content, str):
        text, last[key] = content, content + _CONTINUE
    else:
        parts = list(content) if isinstance(content, list) else []
        texts = [
            i for i, p in enumerate(parts) if isinstance(p, dict) and isinstance(p.get("text"), str)
        ]
        if not texts:
            raise ValueError("continue_final_message: the last message has no text to continue")
        text = parts[texts[-1]]["text"]
        parts[texts[-1]] = {**parts[texts[-1]], "text": text + _CONTINUE}
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
