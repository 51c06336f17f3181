"""The job of the process that templates run in: jinja2 in its sandbox, with the helpers templates expect.

It is run by `mllama.confined`, by its path, and imports only jinja2. Requests hold plain data; see `answer`.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

_LONGEST_MESSAGE = 500
# Of the request that is answered: what surrounds the assistant's words, and the caller's time.
_around = ("", "")
_now = datetime(2000, 1, 1)


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's words for training."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    @staticmethod
    def _marked(caller: Callable[[], str]) -> str:
        begin, end = _around
        return f"{begin}{caller()}{end}"


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return _now.strftime(pattern)


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


_ENVIRONMENT = _environment()


def _warm_up() -> None:
    """Import what Python and jinja2 import late: when templates come, no file can be opened any more."""
    for name in ("unicode_escape", "utf_16", "utf_32", "utf_8_sig"):
        codecs.lookup(name)
    late = ("{'a': 'a\\n'}|pprint", "lipsum(n=1)", "'a b'|wordwrap(1)", "'<a>'|striptags")
    for expression in (*late, "strftime_now('%c')"):
        _ENVIRONMENT.from_string(f"{{{{ {expression} }}}}").render()
    for fault in ("{{ a.b.c }}", "{% if %}"):
        try:
            _ENVIRONMENT.from_string(fault).render()
        except jinja2.TemplateError:
            pass


_warm_up()


@lru_cache(maxsize=32)
def _compiled(template: str) -> jinja2.Template:
    return _ENVIRONMENT.from_string(template)


def _rendered(template: str, variables: dict[str, Any], longest: int) -> str | None:
    """The prompt; None for one that is too long."""
    pieces, length = [], 0
    for piece in _compiled(template).generate(variables):
        pieces.append(piece)
        length += len(piece)
        if length > longest:
            return None
    return "".join(pieces)


def answer(request: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """What became of a template.

    Args:
        request: {"template"} for the names it takes from its caller; for its prompt also "variables",
            "around" (two strings, for `{% generation %}`), "now" (arguments of datetime) and "longest".
    Returns: {"names": [...]}, {"length": n or None where it is too long} with the prompt, or
        {"kinds": names of the error's classes, "message", "line"}.
    """
    global _around, _now
    template = request["template"]
    try:
        if "variables" not in request:
            names = jinja2.meta.find_undeclared_variables(_ENVIRONMENT.parse(template))
            return {"names": sorted(names)}, ""
        _around, _now = tuple(request["around"]), datetime(*request["now"])
        prompt = _rendered(template, request["variables"], request["longest"])
        return {"length": None if prompt is None else len(prompt)}, prompt or ""
    except MemoryError:
        raise
    except Exception as error:
        return _described(error), ""


def _described(error: Exception) -> dict[str, Any]:
    line = getattr(error, "lineno", None)
    trace = error.__traceback__
    while trace is not None:  # jinja2 gives the frames of a template its lines
        if trace.tb_frame.f_code.co_filename == "<template>":
            line = trace.tb_lineno
        trace = trace.tb_next
    message = error.message if isinstance(error, jinja2.TemplateSyntaxError) else error
    return {
        "kinds": [kind.__name__ for kind in type(error).__mro__],
        "message": str(message)[:_LONGEST_MESSAGE],
        "line": line if isinstance(line, int) else None,
    }
