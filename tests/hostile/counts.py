"""Very many images, texts and values in one call, and values nested deeply."""

import base64
import io

from common import ask, peak, processor, told

from mllama import MllamaProcessor
from mllama.demo import checkpoint_path
from mllama.limits import REQUESTS

gif = b"GIF89a\1\0\1\0\x80\0\0\0\0\0\xff\xff\xff\x2c\0\0\0\0\1\0\1\0\0\2\2\x44\1\0\x3b"
coded = base64.b64encode(gif).decode()


def many(count, **options):
    return ask(*[{"type": "image", "base64": coded}] * count, **options)


assert many(256) == "accepted" and many(16, limits=REQUESTS) == "accepted"
wide = MllamaProcessor.from_pretrained(checkpoint_path(), size=560, limits=REQUESTS)
before = peak()
assert "1000 images; at most 256 are taken (max_images)" in many(1000)
assert "17 images; at most 16 are taken (max_images)" in many(17, limits=REQUESTS)


class Opened(io.BytesIO):
    def read(self, *args):
        raise AssertionError("it was opened")


for samples in ([Opened()] * 1000, [[Opened()]] * 1000):
    for call in (
        processor,
        lambda s: processor(s, ["<|image|>"] * 1000),
        processor.image_processor,
    ):
        assert "(max_images)" in told(call, samples)
assert "(max_images)" in told(wide, [Opened()] * 17)
assert "max_texts" in told(wide, [[]] * 65 + [[Opened()]])
turns = [[{"role": "user", "content": "x"}]] * 65
assert "65 conversations; at most 64" in told(
    processor.apply_chat_template, turns, limits=REQUESTS, tokenize=True
)
batch = [[{"role": "user", "content": [{"type": "image", "base64": coded}]}]] * 300
assert "300 images" in told(processor.apply_chat_template, batch, tokenize=True)
said = told(processor, [[Opened()] * 16] + [[Opened()]] * 60, size=2048)
assert (
    "pixel_values of shape (61, 16, 4, 3, 2048, 2048) has" in said and "(max_pixel_values)" in said
), said
said = told(wide, [[Opened()] * 8, *[[Opened()]] * 5], size=1024)
assert "(max_pixel_values)" in said, said
said = told(
    processor,
    [[Opened()] * 200] + [[]] * 300,
    ["<|image|>" * 200] + ["z9" * 1500] * 300,
    padding=True,
    size=28,
)
assert "(max_mask_values)" in said, said
assert "(max_text)" in told(processor, text="a" * (17 * 2**20)), "own"
assert "(max_text)" in told(processor, text=["a" * 2**20] * 3, limits=REQUESTS)
assert "(max_texts)" in told(processor, text=["a"] * 65, limits=REQUESTS)
chat = processor.apply_chat_template
long, turn = "a" * (2**21 + 1), {"role": "user", "content": "x"}
for conversation, options in (
    ([{"role": "user", "content": long}], {}),
    ([turn], {"tools": [{"x": long}]}),
    ([turn], {"tools": [{long: 1}]}),
    ([{"role": "user", "content": [{"type": "text", "text": long}]}], {}),
    ([{**turn, "name": long}], {}),
):
    for escape in ({}, {"tokenize": True, "escape_special_tokens": True}):
        said = told(chat, conversation, limits=REQUESTS, **options, **escape)
        assert "(max_text)" in said, said
deep = "x"
for _ in range(100_000):
    deep = [deep]
loop = {}
loop["x"] = loop
for bad in (deep, loop, {"x": deep}):
    for conversation, options in (
        ([turn], {"tools": [{"x": bad}]}),
        ([{"role": "tool", "content": bad}], {}),
        ([{**turn, "tool_calls": [bad]}], {}),
    ):
        for escape in ({}, {"tokenize": True, "escape_special_tokens": True}):
            assert "nested more than" in told(chat, conversation, **options, **escape)
assert peak() - before < 1200, peak() - before
