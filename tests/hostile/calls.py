"""Requests of very many small things, and of options that no request has: each in its share of time."""

import time
import warnings

import torch
from common import peak, told

from mllama import MllamaForConditionalGeneration, MllamaProcessor
from mllama.demo import checkpoint_path
from mllama.limits import REQUESTS

processor = MllamaProcessor.from_pretrained(checkpoint_path())
SHARES = {"limits": REQUESTS, "allow_paths": False, "escape_special_tokens": True}
WRITES_ALL = "{{ tools | tojson }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"


def asked(conversation, **options):
    given = {"tokenize": True, "return_dict": True, "return_tensors": "pt", **SHARES, **options}
    return processor.apply_chat_template(conversation, **given)


def user(content):
    return [{"role": "user", "content": content}]


asked(user("hi"))
before = peak()

# Texts of as many tokens as bytes, and of a million words.
for text in ("a" * 10**6, "\U0001f600" * 260_000, " \n" * 500_000, "<|eot_id|>" * 100_000):
    start = time.process_time()
    assert asked(user(text)).input_ids.shape[1] > 100_000
    assert time.process_time() - start < 8
for text in ("a" * 1_100_000, "\U0001f600" * 270_000, "\ud800" * 360_000):
    assert "(max_text_bytes)" in told(asked, user(text))
assert "(max_text_bytes)" in told(processor, text="\U0001f600" * 270_000, limits=REQUESTS)

# Very many messages, parts, values and keys; each is looked at a few times and not once for every mark.
part = {"type": "text", "text": "a"}
deep = [["a"] * 100_000]
for _ in range(90):
    deep = [deep]
for conversation, options in (
    (user([part] * 100_000), {}),
    (user("a") * 18_000, {}),
    (user("hi"), {"tools": [{"x": deep}], "chat_template": WRITES_ALL}),
    (user("hi"), {"tools": [{str(i): 0 for i in range(60_000)}], "chat_template": WRITES_ALL}),
):
    start = time.process_time()
    assert told(asked, conversation, **options) == "accepted"
    assert time.process_time() - start < 8
many = [{"x": [None] * 600_000}]
assert "524288 values" in told(asked, user("hi"), tools=many, chat_template=WRITES_ALL)

# What each conversation of a batch reads and writes is counted as often.
batch = [user("hi")] * 64
start = time.process_time()
for tools in ([{"x": "a" * 10**6}], [{"x": [None] * 100_000}]):
    said = told(asked, batch, tools=tools, chat_template=WRITES_ALL)
    assert "every conversation of the batch" in said, said
    bare = {"limits": REQUESTS, "tools": tools, "chat_template": WRITES_ALL}
    assert said == told(processor.apply_chat_template, batch, **bare)
said = told(asked, batch, chat_template="{{ messages[0].content * 30000 }}")
assert "text has 3840000 characters" in said, said
assert time.process_time() - start < 8
assert peak() - before < 1000, peak() - before

# Names that are arguments, names without end, and options that are none.
for name in ("messages", "template", "marks"):
    template = f"{{{{ {name} }}}}" + WRITES_ALL
    said = told(asked, user("hi"), chat_template=template, **{name: [{"role": "root"}]})
    assert "is no variable" in said, said
assert "(10000000 characters)" in told(asked, user("hi"), **{"k" * 10**7: 1})
for options in ("x", [["limits", 1]], 5, ["ab"]):
    assert "processor_kwargs must be a dict" in told(asked, user("hi"), processor_kwargs=options)
for name, value in SHARES.items():
    said = told(asked, user("hi"), processor_kwargs={name: value})
    assert (said == "accepted") == (name == "escape_special_tokens"), said
inside = asked(user("<|eot_id|>"), processor_kwargs={"escape_special_tokens": False}).input_ids
assert (inside == processor.tokenizer.convert_tokens_to_ids("<|eot_id|>")).sum() == 1
for device in ("cuda:99", "mps", "xpu", "lazy", "privateuseone", "ipu", 10**30, "x" * 10**6):
    assert "device must name" in told(asked, user("hi"), device=device)

# Arguments of generate that are no tensors, no streamer, or without values.
model = MllamaForConditionalGeneration.from_pretrained(checkpoint_path())
inputs = dict(asked(user("hi")))


def generated(**options):
    return told(model.generate, **{**inputs, "max_new_tokens": 2, **options})


TENSORS = (
    "attention_mask",
    "inputs_embeds",
    "pixel_values",
    "aspect_ratio_ids",
    "aspect_ratio_mask",
    "cross_attention_mask",
    "cross_attention_states",
)
for value in (True, 0, 1.5, "x" * 10**6, [1], [[1] * 10**5], {"a": 1}):
    for name in TENSORS:
        assert "tensor" in generated(**{name: value}) or name == "inputs_embeds"
        list_of = told(model.stream, **{**inputs, name: value}, tokenizer=processor)
        assert list_of != "accepted"
    assert "streamer must have" in generated(streamer=value)
assert "is on meta" in generated(attention_mask=torch.ones(1, 6, device="meta"))
assert "unknown arguments" in told(
    model.stream, **inputs, tokenizer=processor, streamer="x" * 10**6
)

# Lists of lists: counted before they are copied.
start = time.process_time()
for words in ([[1] * 1000] * 10_000, [[1] * 16_000] * 600, [[[1] * 16_000] * 1000] * 2):
    said = generated(bad_words_ids=words)
    assert "bad_words_ids must be" in said, said
assert generated(bad_words_ids=[[1] * (i % 300 + 1) for i in range(400)]) == "accepted"
assert time.process_time() - start < 8

# What every step leaves behind is planned.
rows = {"num_return_sequences": 16_384, "do_sample": True, "return_dict_in_generate": True}
for name in ("output_scores", "output_logits", "output_hidden_states"):
    said = generated(**rows, max_new_tokens=2000, **{name: True})
    assert f"{name} of 16384 rows and 2000 new tokens takes" in said, said

# Warnings are remembered by their text, so none has a number of the caller's in it.
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for i in range(20):
        generated(temperature=0.5 + i / 100, min_new_tokens=3 + i)
assert len(caught) == 40 and len({str(warning.message) for warning in caught}) == 2
