"""Hostile chat templates: what they can touch, how long they run and how large they get."""

from __future__ import annotations

import json

import pytest
from confinement import confined

# Attributes, formats, imports, generators, frames, extensions and helpers as ways out of the sandbox.
ESCAPES = [
    "{{ ''.__class__.__mro__ }}",
    "{{ ''.__class__ }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ ''|attr('__class__') }}",
    "{{ ''|attr('format')('{0.__class__.__init__}') }}",
    "{{ '{0.__class__}'.format(messages) }}",
    "{{ '{0.__class__.__init__.__globals__}'.format_map({'0': raise_exception}) }}",
    "{{ ''['__class__'] }}",
    "{{ ['{0.__class__}']|map('format', messages)|list }}",
    "{{ messages|map(attribute='__class__')|list }}",
    "{{ messages|groupby('__class__') }}",
    "{{ messages|sort(attribute='__class__') }}",
    "{{ self.__init__.__globals__ }}",
    "{{ self._TemplateReference__context.environment }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ joiner.__init__ }}",
    "{{ namespace.__init__ }}",
    "{{ lipsum.__globals__ }}",
    "{{ dict.__base__ }}",
    "{{ range.__class__ }}",
    "{% import 'os' as x %}",
    "{% include '/etc/passwd' %}",
    "{% extends '/etc/passwd' %}",
    "{% from '/etc/passwd' import x %}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update(a=1) }}",
    "{{ messages[0].pop('role') }}",
    "{{ messages.clear() }}",
    "{{ messages.__setitem__(0, 1) }}",
    "{% set ns = namespace() %}{% set ns.__class__ = 1 %}{{ ns }}",
    "{{ (1).__class__ }}",
    "{{ config }}",
    "{{ loop }}",
    "{{ caller }}",
    "{{ varargs }}",
    "{% macro f() %}{{ caller.__globals__ }}{% endmacro %}{% call f() %}{% endcall %}",
    "{{ f.__globals__ }}{% macro f() %}{% endmacro %}",
    "{{ messages|tojson(default=raise_exception) }}",
    "{{ messages|tojson(cls=dict) }}",
    "{{ messages|xmlattr }}",
    "{{ ''.encode.__self__ }}",
    "{{ messages|pprint }}",
    "{{ messages.copy.__self__.__class__ }}",
    "{{ 'x'.join.__call__.__class__ }}",
    "{{ (messages|batch(1)).gi_frame.f_globals }}",
    "{{ (messages|map('upper')).gi_frame }}",
    "{{ (messages|select).gi_code }}",
    "{{ (messages|map('upper')).__self__ }}",
    "{% for x in messages %}{{ loop.__init__.__globals__ }}{{ loop._recurse }}{% endfor %}",
    "{{ ''.join.__self__.__class__.__mro__ }}",
    "{{ messages|attr('_TemplateReference__context') }}",
    "{{ 'a'|attr('\\x5f\\x5fclass\\x5f\\x5f') }}",
    "{{ strftime_now('%Q' * 10) }}",
    "{{ strftime_now('\\x00') }}",
    "{{ strftime_now(messages) }}",
    "{{ strftime_now('\\ud800') }}",
    "{{ tools|attr('x') }}",
    "{% set messages = 1 %}{{ messages }}",
    "{% generation %}{{ ''.__class__ }}{% endgeneration %}",
    "{% generation %}",
    "{% endgeneration %}",
    "{% debug %}",
    "{{ undefined.x.y }}",
    "{{ 1/0 }}",
    "{{ 'a' * -1 }}",
    "{{ [1][5] }}",
    "{{ {}['a'] }}",
    "{{ None() }}",
    "{{ messages() }}",
    "{{ 1 + 'a' }}",
]
# What a template that got out would show.
TRACES = ("<class", "<function", "globals", "<module", "frame", "root:x", "<bound", "<built-in")

ESCAPES += [
    "{{ messages[0].content[0].image }}",
    "{{ messages[0].content[0]|list }}",
    "{{ (messages|first).items.__self__ }}",
    "{{ messages[0].get.__objclass__ }}",
    "{{ '%s' | format(raise_exception.__init__) }}",
    "{{ '{0.f_globals}'.format((messages|map('upper')).gi_frame) }}",
    "{{ ''.format.__class__ }}",
    "{{ ['__class__'] | map('attr') | list }}",
    "{{ messages | map('attr', '__class__') | list }}",
    "{{ dict(__class__=1).__class__.x }}",
    "{{ namespace(a=1).__init__.__globals__.x }}",
    "{{ joiner('a').__call__.__func__.__globals__.x }}",
    "{{ strftime_now.__kwdefaults__.x }}",
    "{{ strftime_now.__closure__.x }}",
    "{{ messages | selectattr('__class__.__name__') | list }}",
    "{{ messages | sum(attribute='__class__') }}",
    "{{ messages | unique(attribute='__class__') | list }}",
    "{% for k in messages recursive %}{{ loop.__call__.__globals__.x }}{% endfor %}",
    "{{ self._context }}{{ self.environment }}{{ self.__dict__.x }}",
    "{{ (namespace | string).__class__.x }}",
    "{{ tojson.__wrapped__.x }}{{ messages.__reduce_ex__(4) }}",
    "{{ 'a'.encode().decode.__self__.__class__.x }}",
    "{% set x = cycler('a') %}{{ x.next.__func__.__code__.x }}",
    "{{ [].sort.__self__.__class__.x }}{{ messages.sort() }}",
    "{% autoescape true %}{{ '<' }}{% endautoescape %}",
    "{% trans %}a{% endtrans %}",
    "{% do messages.append(1) %}",
]
HUGE = "{{ (%s) | length }}"
GROWTH = (
    "{%% set n = namespace(x=%s) %%}{%% for i in range(%d) %%}{%% set n.x = %s %%}{%% endfor %%}"
)
# Each takes all time or all memory where nothing stops it.
BOMBS = {
    "nested ranges": "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
    "power": HUGE % "9 ** (9 ** 8)",
    "power while rendering": "{% set n = messages | length + 8 %}{{ n ** (n ** n) }}",
    "times": HUGE % "'a' * 10 ** 9",
    "list times": HUGE % "[1] * 10 ** 9",
    "format width": HUGE % "'%01000000000d' % 1",
    "format precision": HUGE % "'%.1000000000f' % 1.5",
    "format star": HUGE % "'%*d' % (10 ** 9, 1)",
    "format method": HUGE % "'{:>1000000000}'.format('a')",
    "format nested": HUGE % "'{:{}}'.format('a', 10 ** 9)",
    "format filter": HUGE % "'%1000000000s' | format('a')",
    "center": HUGE % "'a' | center(10 ** 9)",
    "ljust": HUGE % "'a'.ljust(10 ** 9)",
    "zfill": HUGE % "'a'.zfill(10 ** 9)",
    "expandtabs": HUGE % "('\\t' * 1000).expandtabs(10 ** 6)",
    "indent": HUGE % "('a\\n' * 10 ** 4) | indent(10 ** 6)",
    "wordwrap": HUGE % "('a ' * 10 ** 4) | wordwrap(1, wrapstring='b' * 10 ** 6)",
    "batch": HUGE % "[1] | batch(10 ** 9, 'x') | list",
    "slice": HUGE % "[1] | slice(10 ** 9) | list",
    "replace": HUGE % "('a' * 10 ** 5) | replace('a', 'b' * 10 ** 5)",
    "replace method": HUGE % "('a' * 10 ** 5).replace('a', 'b' * 10 ** 5)",
    "join": HUGE % "('b' * 10 ** 5).join(['a'] * 10 ** 5)",
    "tojson indent": HUGE % "messages | tojson(indent=10 ** 9)",
    "tojson growth": HUGE % "([messages[0].content] * 10 ** 8) | tojson",
    "doublings": GROWTH % ("'a'", 40, "n.x ~ n.x"),
    "list doublings": GROWTH % ("[1]", 40, "n.x + n.x"),
    "squares": GROWTH % ("3", 60, "n.x * n.x"),
    "lipsum": HUGE % "lipsum(n=10 ** 7, html=False)",
    "lipsum words": HUGE % "lipsum(n=1, min=10 ** 8, max=10 ** 9, html=False)",
    "strftime": HUGE % "strftime_now('%01000000000d')",
    "strftime length": HUGE % "strftime_now('%c' * 10 ** 8)",
    "macros that double": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}"
    ),
    "chained generators": (
        "{{ range(99999) | map('string') | map('center', 10 ** 5) | map('upper') | join | length }}"
    ),
    "groupby": "{% for a in range(99999) %}{{ range(99999) | groupby('real') | length }}{% endfor %}",
    "output": "{% for a in range(99999) %}{{ 'a' * 10000 }}{% endfor %}",
    "outputs that are dropped": (
        "{% for a in range(99999) %}{% set x %}{{ 'a' * 10 ** 7 }}{% endset %}{% endfor %}"
    ),
    "urlize": HUGE % "('www.a.de ' * 10 ** 7) | urlize",
    "striptags": "{{ ('<' * 10 ** 7) | striptags | length }}{{ ('<!--' * 10 ** 6) | striptags | length }}",
    "sorting": "{% for a in range(99999) %}{{ range(99999) | sort(reverse=a) | length }}{% endfor %}",
    "integers to text": "{% for i in range(99999) %}{{ (10 ** 4200) | string | length }}{% endfor %}"
    * 9,
}
# Each is too deep or too long for the parser or for Python's compiler.
SOURCES = {
    "parentheses": "{{ " + "(" * 100_000 + "1" + ")" * 100_000 + " }}",
    "ifs": "{% if 1 %}" * 40_000 + "{% endif %}" * 40_000,
    "nots": "{{ " + "not " * 50_000 + "1 }}",
    "minuses": "{{ " + "-" * 100_000 + "1 }}",
    "lists": "{{ " + "[" * 50_000 + "]" * 50_000 + " }}",
    "fors": "{% for a in [1] %}" * 90 + "{% endfor %}" * 90,
    "macros": "{% macro f() %}" * 3_000 + "{% endmacro %}" * 3_000,
    "blocks": "{% block a %}" * 3_000 + "{% endblock %}" * 3_000,
    "attributes": "{{ a" + ".b" * 100_000 + " }}",
    "filters": "{{ a" + "|e" * 100_000 + " }}",
    "calls": "{{ a" + "()" * 100_000 + " }}",
    "powers": "{{ 1" + "**1" * 100_000 + " }}",
    "inline ifs": "{{ " + "1 if 1 else " * 50_000 + "1 }}",
    "elifs": "{% if 1 %}" + "{% elif 1 %}" * 50_000 + "{% endif %}",
    "names": "{{ " + " }}{{ ".join(f"x{i}" for i in range(60_000)) + " }}",
    "comment": "{#" * 300_000,
    "raw": "{% raw %}" * 100_000,
    "string": "{{ '" + "\\\\" * 300_000,
    "blanks": "{%-" + " " * 900_000 + "x",
    "digits": "{{ " + "9" * 900_000 + " }}",
    "too long": "a" * (2**20 + 1),
}
# Long, and within limits.
LONG = {
    "tildes": "{{ " + " ~ ".join(["1"] * 20_000) + " }}",
    "words": "word " * 200_000,
    "lines": "{{ messages[0].content }}\n" * 5_000,
}
SCRIPT = """
import dataclasses, json, re, sys, time
import jinja2
from mllama.limits import REQUESTS
from mllama.processing.chat_template import render_chat_template, template_variables
cases = json.load(open(sys.argv[1]))
limits = dataclasses.replace(REQUESTS, max_template_seconds=float(sys.argv[2]))
talk = [{"role": "user", "content": [{"type": "image", "image": object()}, {"type": "text", "text": "hi"}]}]
talk.append({"role": "assistant", "content": "words"})
for name, template in cases:
    for ask in ("variables", "prompt"):
        start = time.monotonic()
        try:
            if ask == "variables":
                template_variables(template, limits)
                continue
            said, kind = render_chat_template(template, talk, limits=limits), "rendered"
        except Exception as error:
            said, kind = str(error), type(error).__name__
            jinja = isinstance(error, jinja2.TemplateError)
            kind = kind if jinja else "NOT OF JINJA2 " + kind
        seconds = time.monotonic() - start
        peak = int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) >> 10
        print(json.dumps([name, ask, kind, said[:1000], len(said), round(seconds, 2), peak]))
        if kind != "rendered":
            break
"""


def results(cases, tmp_path, seconds=1.0, wait=180):
    path = tmp_path / "cases.json"
    path.write_text(json.dumps(list(cases)))
    ended = confined(SCRIPT, path, seconds, seconds=wait, mebibytes=3000)
    assert ended.kind == "ok", ended
    rows = [json.loads(line) for line in ended.out.splitlines()]
    assert len({row[0] for row in rows}) == len(list(cases))
    assert not [row for row in rows if row[2].startswith("NOT OF JINJA2")]
    assert max(row[6] for row in rows) < 320  # MiB of this process, of which imports take 240
    return rows


def test_no_template_gets_out_of_the_sandbox(tmp_path):
    rows = results([(template, template) for template in ESCAPES], tmp_path, seconds=30.0)
    assert len(rows) == len(ESCAPES) >= 97
    shown = [row for row in rows if row[2] == "rendered" and any(t in row[3] for t in TRACES)]
    assert not shown
    # It is the sandbox that refuses, not a process that ends.
    assert not [row for row in rows if row[2] == "TemplateLimitError"]
    assert sum(row[2] == "SecurityError" for row in rows) >= 10


@pytest.mark.parametrize("part", range(4))
def test_bombs_end_by_a_named_limit(part, tmp_path):
    cases = list(BOMBS.items())[part::4]
    rows = results(cases, tmp_path)
    assert not [row for row in rows if row[2] == "rendered" and row[4] > 100]
    refused = [row for row in rows if row[2] == "TemplateLimitError"]
    assert len(refused) >= len(rows) - 3  # the others end by themselves: OverflowError, ValueError
    names = ("max_template_seconds", "max_template_bytes", "max_text")
    assert all(any(name in row[3] for name in names) for row in refused), refused
    assert max(row[5] for row in rows) < 60


@pytest.mark.parametrize("part", range(2))
def test_sources_that_no_parser_survives_are_errors(part, tmp_path):
    cases = list(SOURCES.items())[part::2]
    rows = results(cases, tmp_path)
    assert {row[0] for row in rows} == {name for name, _ in cases}
    assert max(row[5] for row in rows) < 60
    assert not [row for row in rows if len(row[3]) > 600 and row[2] != "rendered"]


def test_long_templates_are_rendered(tmp_path):
    rows = results(LONG.items(), tmp_path, seconds=300.0)
    assert [row[2] for row in rows] == ["rendered"] * len(LONG)
    assert rows[0][4] == 20_000 and rows[1][4] == 1_000_000
