"""Images as strings: base64 in its forms, URLs, and messages that stay short; formats with a cost."""

import base64
import io
import struct
import time
import urllib.parse
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from processor_helpers import pair
from test_images import encoded, noise, png_header

from mllama.limits import OWN_FILES
from mllama.processing.image_processor import MllamaImageProcessor
from mllama.processing.images import FORMATS, ImageOpenError, check_image, open_image

DATA = encoded(noise(), "PNG")
PLAIN = base64.b64encode(DATA).decode()
FORMS = {
    "plain": PLAIN,
    "line breaks": base64.encodebytes(DATA).decode(),
    "CRLF": base64.encodebytes(DATA).decode().replace("\n", "\r\n"),
    "URL-safe": base64.urlsafe_b64encode(DATA).decode(),
    "no padding": PLAIN.rstrip("="),
    "blanks around": f" \n{PLAIN}\n ",
}


@pytest.mark.parametrize("form", FORMS)
def test_base64_in_every_form(form):
    text, want = FORMS[form], noise().tobytes()
    for source in (
        text,
        f"data:image/png;base64,{text}",
        f"DATA:image/PNG;charset=utf-8;Base64,{text}",
        f"data:image/png;base64,{urllib.parse.quote(text)}",
    ):
        assert open_image(source).tobytes() == want
        check_image(source)


@pytest.mark.parametrize("kind", FORMATS)
def test_bare_base64_of_every_format(kind):
    data = encoded(noise(), kind)
    assert open_image(base64.b64encode(data).decode()).tobytes() == open_image(data).tobytes()


def test_parts_of_every_client():
    ours, _ = pair()
    uri = f"data:image/png;base64,{PLAIN}"
    parts = [
        {"type": "image", "image": PLAIN},
        {"type": "image", "url": uri},
        {"type": "image", "base64": PLAIN},
        {"type": "image", "base64": FORMS["line breaks"]},
        {"type": "image", "base64": FORMS["URL-safe"].encode()},
        {"type": "image", "base64": uri},
        {"type": "image_url", "image_url": uri},
        {"type": "image_url", "image_url": {"url": uri, "detail": "high"}},
        {"type": "input_image", "image_url": uri},
        {"type": "input_image", "image_url": {"url": uri}},
    ]
    wants = ours([noise()], "<|image|>").pixel_values
    for part in parts:
        for text in ("text", "input_text"):
            content = [part, {"type": text, "text": "what is it?"}]
            got = ours.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=True, return_dict=True
            )
            assert np.array_equal(got.pixel_values, wants)
            assert "what is it?" in ours.decode(got.input_ids[0])


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (
            {"type": "input_image", "file_id": "file-1"},
            r"message 0 has a part 'input_image' without",
        ),
        ({"type": "image_url"}, "message 0 has a part 'image_url' without image_url"),
        ({"type": "image_url", "image_url": {"uri": "x"}}, "without image_url"),
        ({"type": "input_audio", "input_audio": {}}, "'input_audio'; the model takes text and im"),
        ({"type": "video", "video": "a.mp4"}, "'video'; the model takes text and images"),
        ({"type": "image", "url": "file:///a/b.png"}, r"file:///a/b\.png is a file:// URL; pass"),
        ({"type": "image", "path": "FILE:a.png"}, "is a file:// URL"),
        ({"type": "image", "url": "s3://bucket/a.png"}, "is a URL; nothing is fetched"),
        ({"type": "image", "base64": PLAIN[:-40]}, "truncated or damaged"),
        (
            {"type": "image", "base64": "é" * 4000},
            "image of a message cannot be decoded, it is not",
        ),
    ],
    ids=str,
)
def test_parts_that_are_refused(part, message):
    ours, _ = pair()
    with pytest.raises(ValueError, match=message):
        ours.apply_chat_template([{"role": "user", "content": [part]}], tokenize=True)


LONG = {
    "cut base64": PLAIN[: len(PLAIN) // 2],
    "base64 with other characters": PLAIN[:500] + "!" + PLAIN[500:],
    "base64 of a PDF": base64.b64encode(b"%PDF-1.7\n" * 300).decode(),
    "cut data URI": "data:image/png;base64," + PLAIN[: len(PLAIN) // 2],
    "other data URI": "data:text/plain," + "x" * 3000,
    "long URL": "https://a.example/" + "x" * 3000,
    "long file URL": "file:///" + "x" * 3000,
    "long path": "x/" * 2500 + ".png",
    "words": "please look at this picture " * 300,
}


@pytest.mark.parametrize("name", LONG)
def test_messages_stay_short(name):
    for call in (open_image, check_image, MllamaImageProcessor()):
        if call is check_image and name.startswith("cut"):
            continue  # found in decoding
        with pytest.raises(ImageOpenError) as error:
            call(LONG[name])
        assert len(str(error.value)) < 400


def test_strings_are_told_apart_in_linear_time():
    start = time.process_time()
    for text in (" " * 300_000 + "!", "A" * 300_000 + "!", "=" * 300_000, "A\n" * 150_000):
        with pytest.raises(ImageOpenError):
            open_image(text)
    assert time.process_time() - start < 1


def test_a_file_goes_before_base64(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = base64.b64encode(b"GIF89a" + bytes(60)).decode().replace("/", "_").rstrip("=")
    (tmp_path / name).write_bytes(DATA)
    assert open_image(name).tobytes() == noise().tobytes()


def icon(body, count=1):
    entry = struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(body), 6 + 16 * count)
    return b"\0\0\1\0" + struct.pack("<H", count) + entry * count + body


def bitmap(width, height, compression=0):
    return struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, compression, 0, 0, 0, 0, 0)


@pytest.mark.parametrize(
    "data",
    [
        icon(png_header(10_000, 10_000)),
        icon(png_header(60_000, 60_000)),
        icon(bitmap(20_000, 40_000)),
        icon(bitmap(20_000, -40_000, 1)),
        b"P6\n10000 10000\n255\n",
        b"P5\n# a\n# b\n10000 10000\n65535\n",
    ],
    ids=repr,
)
def test_bombs_of_the_added_formats(data):
    with pytest.raises(ImageOpenError, match=r"at most 89478485 are decoded|too large"):
        check_image(data)


def test_caps_hold_for_the_added_formats():
    for kind in ("ICO", "PPM", *(["AVIF"] if "AVIF" in FORMATS else [])):
        with pytest.raises(ImageOpenError, match="37 x 23 = 851 pixels; at most 850"):
            open_image(encoded(noise(), kind), limits=replace(OWN_FILES, max_pixels=850))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            b"P3 3000 3000 255 " + b"1 2 3 " * 3_000_000,
            "pixels or bytes of text, of run lengths or with a maximum of its own",
        ),
        (
            b"P6 2000 2000 100 " + bytes(12_000_000),
            "pixels or bytes of text, of run lengths or with a maximum of its own",
        ),
        (b"P6\n" + b"#" * 10_000_000, "no sizes in 1024 bytes of PPM"),
    ],
    ids=["text", "maximum", "comment"],
)
def test_ppm_that_would_take_minutes(data, message):
    start = time.process_time()
    with pytest.raises(ImageOpenError, match=message):
        open_image(data)
    assert time.process_time() - start < 1


@pytest.mark.parametrize("kind", ["1", "L", "RGB", "plain"])
def test_every_kind_of_ppm(kind):
    image = noise().convert("RGB" if kind == "plain" else kind)
    data = encoded(image, "PPM")
    if kind == "plain":
        numbers = " ".join(map(str, np.asarray(image).ravel()))
        data = f"P3\n# by hand\n37 23\n255\n{numbers}\n".encode()
    assert open_image(io.BytesIO(data)).tobytes() == image.convert("RGB").tobytes()


def test_the_largest_image_of_an_icon():
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(buffer, "ICO", sizes=[(16, 16), (64, 64), (32, 32)])
    got = open_image(buffer.getvalue())
    assert got.size == (64, 64) and got.getpixel((5, 5)) == (255, 0, 0)
