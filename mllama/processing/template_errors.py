"""The errors of templates: those of jinja2, and one for what goes beyond a limit."""

from __future__ import annotations

from typing import Any

import jinja2

_LONGEST_MESSAGE = 500
_MOST_LINES = 2**31


class TemplateLimitError(jinja2.TemplateError):
    """A chat template took more time, memory or text than it may; the message names the limit."""


# What Python raises inside a template is an error of the template too, and stays what it was.
_PYTHON = {
    error.__name__: type(error.__name__, (jinja2.TemplateRuntimeError, error), {})
    for error in (
        TypeError,
        ValueError,
        AttributeError,
        KeyError,
        IndexError,
        ZeroDivisionError,
        OverflowError,
        RecursionError,
    )
}
_ERRORS: dict[str, type[jinja2.TemplateError]] = {
    **_PYTHON,
    **{
        error.__name__: error
        for error in (
            jinja2.TemplateError,
            jinja2.TemplateSyntaxError,
            jinja2.TemplateAssertionError,
            jinja2.TemplateRuntimeError,
            jinja2.UndefinedError,
            jinja2.TemplateNotFound,
            jinja2.exceptions.SecurityError,
            jinja2.exceptions.FilterArgumentError,
        )
    },
}


def is_answer(answer: Any, request: dict[str, Any]) -> bool:
    """Whether this is what `template_job` answers: its process is believed nothing."""
    if not isinstance(answer, dict):
        return False
    if "kinds" in answer:
        line = answer.get("line")
        return (
            _are_strings(answer["kinds"])
            and isinstance(answer.get("message"), str)
            and (line is None or (isinstance(line, int) and 0 < line <= _MOST_LINES))
        )
    if "variables" in request:
        return isinstance(answer.get("length", ""), (int, type(None)))
    return _are_strings(answer.get("names"))


def template_error(answer: dict[str, Any]) -> jinja2.TemplateError:
    """The error that a template's process reports (see `template_job`), of a class that is known here."""
    kinds = [kind for kind in answer["kinds"] if kind in _ERRORS]
    kind = _ERRORS[kinds[0]] if kinds else jinja2.TemplateRuntimeError
    message, line = answer["message"], answer["line"]
    if not kinds and answer["kinds"]:
        message = f"{answer['kinds'][0]}: {message}"
    message = message[:_LONGEST_MESSAGE]
    if issubclass(kind, jinja2.TemplateSyntaxError):
        error = kind(message, line or 1)
        error.translated = True  # its text is the message, without the template's line
    else:
        error = kind(message)
    if line is not None and hasattr(error, "add_note"):
        error.add_note(f"in line {line} of the chat template")
    return error


def _are_strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)
