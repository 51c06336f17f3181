"""Conversations to prompts: equal to `transformers`, sandboxed, and refused with a reason."""

import base64
import enum
import io
import json
import random
from collections import UserDict
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import jinja2
import numpy as np
import pytest
from processor_helpers import CONVERSATIONS, assert_same, pair, random_image

from mllama.limits import OWN_FILES
from mllama.processing.chat_template import (
    render_chat_template,
    render_with_spans,
    template_variables,
)
from mllama.processing.template_errors import TemplateLimitError

VARIANTS = [
    {},
    {"add_generation_prompt": True},
    {"date_string": "26 Jul 2024"},
    {"tools": [{"type": "function", "function": {"name": "über<>&", "parameters": {"a": 1}}}]},
    {"tools": [{"name": "f"}], "documents": [{"title": "t", "text": "x"}]},
    {"continue_final_message": True},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_prompts_equal_transformers(variant):
    ours, theirs = pair()
    for conversation in (*CONVERSATIONS, CONVERSATIONS):
        got = ours.apply_chat_template(conversation, **variant)
        assert got == theirs.apply_chat_template(conversation, **variant)
        got = ours.apply_chat_template(conversation, tokenize=True, **variant)
        assert got == theirs.apply_chat_template(conversation, tokenize=True, **variant)


@pytest.mark.parametrize("adds_bos", [True, False])
def test_conversations_with_images_equal_transformers(adds_bos, tmp_path):
    rng = random.Random(6)
    ours, theirs = pair(adds_bos)
    image, path = random_image(rng), tmp_path / "image.png"
    random_image(rng).save(path)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    encoded = base64.b64encode(buffer.getvalue()).decode()
    uri = f"data:image/png;base64,{encoded}"
    conversations = [
        [{"role": "user", "content": [part, {"type": "text", "text": "what is it?"}, *more]}]
        for part, more in (
            ({"type": "image", "image": image}, []),
            ({"type": "image", "path": str(path)}, [{"type": "image", "image": image}]),
            ({"type": "image", "image": str(path)}, []),
            ({"type": "image", "base64": encoded}, []),
            ({"type": "image", "url": uri}, []),
            ({"type": "image_url", "image_url": {"url": uri}}, []),
        )
    ]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    for conversation in conversations:
        before = repr(conversation)
        got = ours.apply_chat_template(conversation, add_generation_prompt=True, **options)
        assert repr(conversation) == before
        want = theirs.apply_chat_template(conversation, add_generation_prompt=True, **options)
        assert_same(got, want)
    padded = {"padding": True, "padding_side": "left"}
    got = ours.apply_chat_template(conversations, **options, processor_kwargs=padded)
    want = theirs.apply_chat_template(conversations, **options, processor_kwargs={**padded})
    assert_same(got, want)
    assert_same(ours.apply_chat_template(conversations, **options, **padded), want)


def test_batch_of_conversations_with_and_without_images():
    ours, _ = pair()
    image = random_image(random.Random(7))
    with_image = [{"role": "user", "content": [{"type": "image", "image": image}]}]
    got = ours.apply_chat_template(
        [with_image, CONVERSATIONS[0]],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        padding=True,
    )
    assert got.pixel_values.shape[:2] == (2, 1) and got.aspect_ratio_ids[1].item() == 0


def test_system_turn_with_an_image_is_refused_by_the_template():
    ours, _ = pair()
    conversation = [
        {"role": "system", "content": "x"},
        {"role": "user", "content": [{"type": "image"}]},
    ]
    with pytest.raises(jinja2.TemplateError, match="incompatible with system messages"):
        ours.apply_chat_template(conversation)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__.json }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ strftime_now.__globals__['datetime'] }}",
        "{% for i in range(10 ** 9) %}x{% endfor %}",
    ],
)
def test_templates_run_in_a_sandbox(template):
    with pytest.raises((jinja2.exceptions.SecurityError, jinja2.UndefinedError, OverflowError)):
        render_chat_template(template, [{"role": "user", "content": "x"}])


@pytest.mark.parametrize("template", ["{% include '/etc/passwd' %}", "{% import 'os' as os %}"])
def test_templates_load_no_files(template):
    with pytest.raises((TypeError, jinja2.TemplateError)):
        render_chat_template(template, [])


def test_template_helpers():
    now = render_chat_template("{{ strftime_now('%Y') }}", [])
    assert now.isdigit() and len(now) == 4
    assert render_chat_template("{{ messages | tojson }}", [{"a": "<ü>"}]) == '[{"a": "<ü>"}]'
    assert template_variables("{{ a }}{% set b = 1 %}{{ b }}") == {"a"}
    with pytest.raises(TypeError, match=r"tools\[0\] must be a dict, got str"):
        render_chat_template("", [], tools=["f"])


def message(content, **others):
    return [{"role": "user", "content": content, **others}]


@pytest.mark.parametrize(
    ("template", "kinds", "text", "line"),
    [
        ("a\n{{ 1 / 0 }}", (jinja2.TemplateRuntimeError, ZeroDivisionError), "division by zero", 2),
        ("{{ [1] + 'a' }}", (jinja2.TemplateRuntimeError, TypeError), "can only concatenate", 1),
        ("a\n\n{{ x.y }}", (jinja2.UndefinedError,), "'x' is undefined", 3),
        ("a\n{% if %}", (jinja2.TemplateSyntaxError,), "Expected an expression", 2),
        ("{% debug %}", (jinja2.TemplateSyntaxError,), "unknown tag 'debug'", 1),
        ("{{ 'x' | nope }}", (jinja2.TemplateAssertionError,), "No filter named 'nope'", 1),
        ("{{ ''.__class__.x }}", (jinja2.exceptions.SecurityError,), "is unsafe", 1),
        ("{{ raise_exception('sorry') }}", (jinja2.TemplateError,), "^sorry", 1),
        ("{{ raise_exception(messages) }}", (jinja2.TemplateError,), "'role': 'user'", 1),
        (
            "{% for a in [1] %}" * 90 + "{% endfor %}" * 90,
            (jinja2.TemplateRuntimeError,),
            "SyntaxError: too many statically nested blocks",
            None,
        ),
    ],
)
def test_errors_arrive_as_what_they_are(template, kinds, text, line):
    with pytest.raises(jinja2.TemplateError, match=text) as caught:
        render_chat_template(template, message("x"))
    assert all(isinstance(caught.value, kind) for kind in kinds)
    assert len(str(caught.value)) <= 600 and "\n" not in str(caught.value)
    if line is not None:
        assert getattr(caught.value, "lineno", line) == line
        assert f"in line {line} of" in "".join(
            getattr(caught.value, "__notes__", [f"in line {line} of"])
        )


def test_a_message_of_a_template_is_cut():
    with pytest.raises(jinja2.TemplateError) as caught:
        render_chat_template("{{ raise_exception('a' * 100000) }}", [])
    assert str(caught.value) == "a" * 500


def test_templates_see_plain_data():
    class Words(str):
        def shout(self):
            return "SHOUTED"

    class Level(enum.IntEnum):
        HIGH = 3

    content = [
        {"type": "image", "image": Path("/etc/passwd"), "extra": "x"},
        {"text": Words("hi"), "type": "text"},
        {"n": np.float64(0.5), "level": Level.HIGH, "all": ((1, True), None), "type": "odd"},
        "words",
    ]
    got = render_chat_template("{{ messages | tojson }}", message(content, last=UserDict(a=1)))
    assert json.loads(got) == [
        {
            "role": "user",
            "content": [
                {"type": "image"},
                {"text": "hi", "type": "text"},
                {"n": 0.5, "level": 3, "all": [[1, True], None], "type": "odd"},
                "words",
            ],
            "last": {"a": 1},
        }
    ]
    assert list(json.loads(got)[0]["content"][1]) == ["text", "type"]
    with pytest.raises(jinja2.UndefinedError, match="has no attribute 'shout'"):
        render_chat_template("{{ messages[0].content.shout() }}", message(Words("hi")))
    odd = "\ud800 \ufdd0 \x00 \u2028 \U0001f600"
    got = render_chat_template("{{ messages[0].content }}{{ n }}", message(odd), n=float("nan"))
    assert got == odd.replace("\ud800", "\ufffd") + "nan"


def nested(depth, value="x"):
    for _ in range(depth):
        value = [value]
    return value


def laughs():
    value = [None] * 10
    for _ in range(12):
        value = [value] * 10
    return value


HOLDS_ITSELF = {"a": []}
HOLDS_ITSELF["a"].append(HOLDS_ITSELF)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"x": Path("/a")}, TypeError, r"^x is a PosixPath; templates read dicts, lists"),
        ({"x": [{"y": (len,)}]}, TypeError, r"^x\[0\]\['y'\]\[0\] is a builtin_function_or_method"),
        ({"x": b"a"}, TypeError, "x is a bytes"),
        ({"x": {1, 2}}, TypeError, "x is a set"),
        ({"x": (i for i in range(3))}, TypeError, "x is a generator"),
        ({"x": np.int64(3)}, TypeError, "x is a int64"),
        ({"x": np.zeros(3)}, TypeError, "x is a ndarray"),
        ({"x": datetime.now()}, TypeError, "x is a datetime"),
        ({"x": jinja2.Undefined()}, TypeError, "x is a Undefined"),
        ({"x": {1: 2}}, TypeError, "x has a key that is a int"),
        ({"tools": [{"f": print}]}, TypeError, r"tools\[0\]\['f'\] is a builtin_function"),
        ({"documents": [{"text": b"x"}]}, TypeError, r"documents\[0\]\['text'\] is a bytes"),
        ({"x": HOLDS_ITSELF}, ValueError, "nested more than 100 deep, or holds itself"),
        ({"x": nested(200)}, ValueError, "nested more than 100 deep"),
        ({"x": nested(100_000)}, ValueError, "nested more than 100 deep"),
        ({"x": laughs()}, ValueError, "more than 4096 values"),
        ({"x": "a" * 1001}, ValueError, r"more than 1000 characters \(max_text\)"),
        ({"x": {"a" * 600: 1, "b" * 600: 1}}, ValueError, r"characters \(max_text\)"),
        ({"x": 10**4000}, ValueError, r"characters \(max_text\)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_plain_is_refused_with_its_place(options, error, text):
    limits = replace(OWN_FILES, max_text=1000)
    with pytest.raises(error, match=text) as caught:
        render_chat_template("hello", message("x"), limits=limits, **options)
    assert len(str(caught.value)) < 500


def test_messages_are_refused_with_their_place():
    part = {"type": "text", "text": "x", "image": Path("/a")}
    for content, place in (
        ([part], r"messages\[0\]\['content'\]\[0\]\['image'\] is a PosixPath"),
        (HOLDS_ITSELF, r"messages\[0\]\['content'\]\['a'\]"),
    ):
        with pytest.raises((TypeError, ValueError), match=place):
            render_chat_template("", message(content))
        sooner = "|message 0 has content that is a dict"
        with pytest.raises((TypeError, ValueError), match=place + sooner):
            pair()[0].apply_chat_template(
                message(content), tokenize=True, escape_special_tokens=True
            )
    with pytest.raises(TypeError, match=r"messages\[0\]\['time'\] is a datetime"):
        render_chat_template("", message("x", time=datetime.now()))


def test_limits_are_named():
    patient = {"max_template_seconds": 300.0, "max_template_bytes": 2**26, "max_text": 10_000}
    limits = replace(OWN_FILES, **patient)
    for template, name in (
        ("{{ ('a' * 10 ** 8) | length }}", "max_template_bytes"),
        ("{{ 'a' * 10001 }}", "max_text"),
        ("{% for i in range(101) %}{{ 'a' * 100 }}{% endfor %}", "max_text"),
        ("{# " + "a" * 2**20 + " #}", "1048576"),
    ):
        with pytest.raises(TemplateLimitError, match=name):
            render_chat_template(template, [], limits=limits)
    brief = replace(limits, max_template_seconds=0.5)
    loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(TemplateLimitError, match="max_template_seconds"):
        render_chat_template(loops, [], limits=brief)
    for ask in (template_variables, lambda t, limits: render_chat_template(t, [], limits=limits)):
        with pytest.raises(
            TemplateLimitError, match="max_template_seconds"
        ):  # jinja2 folds constants
            ask("{{ 9 ** (9 ** 9) }}{{ a }}", brief)
    assert render_chat_template("{{ 'a' * 10000 }}", [], limits=limits) == "a" * 10_000


def test_marks_of_nothing_are_refused():
    with pytest.raises(jinja2.TemplateError, match="by itself"):
        render_with_spans("{{ '\\ufdd1' }}", [], ["\ufdd0", "\ufdd1"])


@pytest.mark.parametrize(
    ("conversation", "error", "message"),
    [
        ([], ValueError, "the conversation is empty"),
        (["hi"], TypeError, "message 0 must be a dict, got str"),
        ([{"content": "x"}], ValueError, r"message 0 has no role; it has \['content'\]"),
        ([{"role": "user", "content": [{"text": "x"}]}], ValueError, "part without a type"),
        ([{"role": "user", "content": [{"type": "image"}]}], ValueError, "no image was given"),
        (
            [{"role": "user", "content": [{"type": "image", "base64": "?"}]}],
            ValueError,
            "base64 image of a message cannot be decoded",
        ),
    ],
)
def test_conversations_that_cannot_work(conversation, error, message):
    ours, _ = pair()
    with pytest.raises(error, match=message):
        ours.apply_chat_template(conversation, tokenize=True)


def test_template_variables_that_nothing_reads_are_refused():
    ours, _ = pair()
    with pytest.raises(
        TypeError, match="neither the template nor the processor knows 'datestring'"
    ):
        ours.apply_chat_template(CONVERSATIONS[0], datestring="26 Jul 2024")
