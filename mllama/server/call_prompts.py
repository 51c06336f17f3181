"""Messages with functions and calls, in the form that a checkpoint's template writes whole.

Templates of Llama 3.1 and later write functions into the first message of the user, which has to be a string,
and take one call in a turn. Older ones, and those of small models, write neither functions nor calls. What a
template would leave out or write wrong stands in the messages' texts instead, in the words of Llama 3.1.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from mllama.server.messages import before_first_text

_INSTRUCTION = (
    "Given the following functions, please respond with a JSON for a function call with its proper arguments "
    "that best answers the given prompt.\n\n"
    'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}. '
    "Do not use variables.\n\n"
)

Message = Mapping[str, Any]


def writes_calls(template: str) -> bool:
    """Whether a template writes the calls of past turns; those that do write functions too."""
    return "tool_calls" in template


def with_functions(
    messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], template_writes_calls: bool
) -> tuple[tuple[Message, ...], tuple[Mapping[str, Any], ...]]:
    """The messages, and the functions that are left for the template to write."""
    if template_writes_calls:
        messages = _one_call_each(messages)
        if not any(_has_picture(message) for message in messages):
            return tuple(messages), tuple(tools)
    else:
        messages = [_with_written_calls(message) for message in messages]
    return tuple(_with_text_of(tools, messages) if tools else messages), ()


def _has_picture(message: Message) -> bool:
    content = message["content"]
    return isinstance(content, list) and any(part["type"] == "image" for part in content)


def _one_call_each(messages: Sequence[Message]) -> list[Message]:
    """A turn of several calls as several turns, each before the results of its call."""
    written: list[Message] = []
    waiting = deque(messages)
    while waiting:
        turn = waiting.popleft()
        calls = turn.get("tool_calls") or ()
        if len(calls) < 2:
            written.append(turn)
            continue
        results: list[Message] = []
        while waiting and waiting[0]["role"] == "tool":
            results.append(waiting.popleft())
        for i, call in enumerate(calls):
            written.append({**turn, "content": "" if i else turn["content"], "tool_calls": [call]})
            own = [r for r in results if r.get("tool_call_id") == call["id"] is not None]
            own = own or ([] if call["id"] is not None else results[:1])
            results = [r for r in results if r not in own]
            written += own
        written += results
    return written


def _with_written_calls(message: Message) -> Message:
    """Calls as the text that they were."""
    if not message.get("tool_calls"):
        return message
    functions = [call["function"] for call in message["tool_calls"]]
    calls = [{"name": f["name"], "parameters": f["arguments"]} for f in functions]
    text = "; ".join(json.dumps(call, ensure_ascii=False) for call in calls)
    rest = {key: value for key, value in message.items() if key != "tool_calls"}
    return {**rest, "content": f"{message['content']}{text}"}


def _with_text_of(tools: Sequence[Mapping[str, Any]], messages: Sequence[Message]) -> list[Message]:
    """The functions before the first text of the user."""
    text = _INSTRUCTION + "".join(
        json.dumps(tool, indent=4, ensure_ascii=False) + "\n\n" for tool in tools
    )
    return before_first_text(messages, text.rstrip())
