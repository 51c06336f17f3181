"""Images that messages name: what is no file of the disk is taken, and nothing else is looked at."""

import base64
import io
import os
import pathlib

import numpy as np
from common import ask, folder, png, processor, told, touched, watch
from PIL import Image

(folder / "a.png").write_bytes(png())
(folder / "key").write_text("TOPSECRET-0123456789")
os.mkfifo(folder / "pipe")
names = [
    folder / "a.png",
    folder / "key",
    folder / "pipe",
    folder / "absent",
    folder,
    "/etc/passwd",
    "/proc/self/environ",
    "/proc/kmsg",
    "/dev/zero",
    "/dev/stdin",
    "../../etc/passwd",
    "~/x.png",
    "a b",
    "//host/share/a.png",
    "\\\\host\\share\\a.png",
    "a\0b",
    "/tmp/\udcff\ud800.png",
    "x" * 10**6,
    base64.b64encode(b"GIF89a" + bytes(60)).decode().replace("/", "_")[:-2] + ".png",
]
names = [str(name) for name in names]
data = "data:image/png;base64," + base64.b64encode(png()).decode()
ask({"type": "image", "url": data})  # what is imported late is imported
watch()
for name in names:
    for part in (
        {"type": "image_url", "image_url": {"url": name}},
        {"type": "image_url", "image_url": name},
        {"type": "input_image", "image_url": name},
        {"type": "image", "url": name},
    ):
        for allow in (True, False, folder):
            touched.clear()
            said = ask(part, allow_paths=allow)
            assert "url takes data:image" in said and 'under "path"' in said, said
            where = [
                t for t in touched if t[1] and str(t[1][0]) != str(folder)
            ]  # that of allow_paths itself
            assert not [t for t in where if name[:60] in str(t)], (name[:60], where)
for name in names[:-1]:
    for part in (
        {"type": "image", "path": name},
        {"type": "image", "image": name},
        {"type": "image", "path": pathlib.PurePath(name)},
        {"type": "image", "image": pathlib.Path(name)},
    ):
        touched.clear()
        said = ask(part, allow_paths=False)
        assert "allow_paths=False" in said or "is no path" in said, said
        assert not [t for t in touched if name[:60] in str(t)], (name[:60], touched)
    for images in (name, [name], [[pathlib.Path(name)]]):
        touched.clear()
        for call in (
            lambda i: processor(i, "<|image|>hi", allow_paths=False),
            lambda i: processor(images=i, allow_paths=False),
            lambda i: processor.image_processor(i, allow_paths=False),
        ):
            said = told(call, images)
            assert "allow_paths=False" in said or "is no path" in said, said
            assert "images[0][0]" in said or "is no path" in said, said
        assert not [t for t in touched if name[:60] in str(t)], (name[:60], touched)
touched.clear()
for url in (
    "http://a.example/b.png",
    "https://a.example/b.png",
    "s3://a/b",
    "file:///etc/passwd",
    "FILE:x",
):
    said = ask({"type": "image", "url": url})
    assert "nothing is fetched" in said or "file:// URL" in said, said
# What is no file of the disk is taken.
for part in (
    {"type": "image", "url": data},
    {"type": "image", "image": png()},
    {"type": "image", "image": data},
    {"type": "image", "base64": data.partition(",")[2]},
    {"type": "image", "image": io.BytesIO(png())},
    {"type": "image", "image": Image.new("RGB", (4, 4))},
    {"type": "image", "path": data},
    {"type": "image", "image": data.partition(",")[2]},
    {"type": "image", "image": np.zeros((4, 4, 3), np.uint8)},
):
    assert ask(part, allow_paths=False) == "accepted", part
assert not [t for t in touched if "b64" in str(t) or data[30:60] in str(t)]
