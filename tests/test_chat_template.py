"""Conversations to prompts: equal to `transformers`, sandboxed, and refused with a reason."""

import base64
import io
import random

import jinja2
import pytest
from processor_helpers import CONVERSATIONS, assert_same, pair, picture

from mllama.processing.chat_template import render_chat_template, template_variables

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
def test_conversations_with_pictures_equal_transformers(adds_bos, tmp_path):
    rng = random.Random(6)
    ours, theirs = pair(adds_bos)
    image, path = picture(rng), tmp_path / "picture.png"
    picture(rng).save(path)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    encoded = base64.b64encode(buffer.getvalue()).decode()
    uri = f"data:image/png;base64,{encoded}"
    conversations = [
        [{"role": "user", "content": [part, {"type": "text", "text": "what is it?"}, *more]}]
        for part, more in (
            ({"type": "image", "image": image}, []),
            ({"type": "image", "path": str(path)}, [{"type": "image", "image": image}]),
            ({"type": "image", "url": str(path)}, []),
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


def test_batch_of_conversations_with_and_without_pictures():
    ours, _ = pair()
    image = picture(random.Random(7))
    with_image = [{"role": "user", "content": [{"type": "image", "image": image}]}]
    got = ours.apply_chat_template(
        [with_image, CONVERSATIONS[0]],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        padding=True,
    )
    assert got.pixel_values.shape[:2] == (2, 1) and got.aspect_ratio_ids[1].item() == 0


def test_system_turn_with_a_picture_is_refused_by_the_template():
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


@pytest.mark.parametrize(
    ("conversation", "error", "message"),
    [
        ([], ValueError, "the conversation is empty"),
        (["hi"], TypeError, "message 0 must be a dict, got str"),
        ([{"content": "x"}], ValueError, r"message 0 has no role; it has \['content'\]"),
        ([{"role": "user", "content": [{"text": "x"}]}], ValueError, "part without a type"),
        ([{"role": "user", "content": [{"type": "image"}]}], ValueError, "no picture was given"),
        (
            [{"role": "user", "content": [{"type": "image", "base64": "?"}]}],
            ValueError,
            "base64 picture of a message cannot be decoded",
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
