"""What the scripts of hostile messages share; test_hostile_messages.py runs each in a child of its own."""

import io
import os
import pathlib
import re
import sys

from PIL import Image

from mllama import MllamaProcessor
from mllama.demo import checkpoint_path

processor = MllamaProcessor.from_pretrained(checkpoint_path())
folder = pathlib.Path(sys.argv[1])


def peak():
    # Not ru_maxrss, which begins with what the process was before it became this program.
    return int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1]) // 1024


def told(call, *arguments, **options):
    try:
        call(*arguments, **options)
    except (ValueError, TypeError) as error:
        text = str(error)
        assert len(text) < 700, (len(text), text[:200])
        assert "TOPSECRET" not in text, text
        return text
    return "accepted"


def ask(*parts, **options):
    content = [*parts, {"type": "text", "text": "hi"}]
    return told(
        processor.apply_chat_template,
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        **options,
    )


def png(size=(8, 8)):
    buffer = io.BytesIO()
    Image.new("RGB", size).save(buffer, "PNG")
    return buffer.getvalue()


# Every way to the disk that Python code has, from here on.
touched = []


def spied(name, function):
    def spy(*args, **kwargs):
        touched.append((name, args))
        return function(*args, **kwargs)

    return spy


def watch():
    watched = ("open", "os.listdir", "os.scandir", "glob.glob")
    sys.addaudithook(
        lambda event, args: touched.append((event, args)) if event in watched else None
    )
    for name in ("stat", "lstat", "readlink"):
        setattr(os, name, spied(name, getattr(os, name)))
