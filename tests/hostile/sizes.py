"""Images of hundreds of megabytes, wherever one is taken: the size is checked before a copy is made."""

import time

from common import ask, peak, png, processor, told

from mllama.limits import REQUESTS

TOO_LARGE = "bytes; at most 134217728 are read (max_bytes)"


def refused(call, *arguments, said=TOO_LARGE, **options):
    before, start = peak(), time.process_time()
    text = call(*arguments, **options)
    assert said in text, text
    assert peak() - before < 60, (said, peak() - before)
    assert time.process_time() - start < 20


ask({"type": "image", "image": png()})
letters = "A" * 600_000_000
for key in ("base64", "image", "path"):
    refused(ask, {"type": "image", key: letters}, said="449999808 " + TOO_LARGE)
refused(told, processor, [letters], "<|image|>")
del letters
uri = "data:image/png;base64," + "A" * 600_000_000
for key in ("base64", "image", "path", "url"):
    refused(ask, {"type": "image", key: uri})
refused(ask, {"type": "image_url", "image_url": {"url": uri}})
refused(told, processor, [uri], "<|image|>")
del uri
data = bytes(600_000_000)
for key in ("base64", "image"):
    refused(ask, {"type": "image", key: data})
refused(told, processor, [data], "<|image|>", said="600000000 " + TOO_LARGE)
refused(
    ask,
    {"type": "image", "base64": data[: 30 * 2**20]},
    limits=REQUESTS,
    said="at most 20971520 are",
)
del data
refused(ask, {"type": "image", "image": bytearray(10)}, said="is not an image")
for text in (
    "http://" + "a" * 50_000_000,
    "x" * 50_000_000,
    "data:" + "," * 50_000_000,
    "/" * 50_000_000,
    "data:image/png;base64," + "%" * 50_000_000,
    " " * 50_000_000,
    "A" * 49_999_999 + "!",
    "data:image/png;base64," + "AA " * 16_000_000,
):
    for key in ("url", "image", "path", "base64"):
        start = time.process_time()
        assert len(ask({"type": "image", key: text})) < 400
        assert time.process_time() - start < 10, (key, text[:30])
