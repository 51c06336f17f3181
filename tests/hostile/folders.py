"""`allow_paths` as a folder: what is inside is opened, what is not is refused with the same words."""

import os

from common import ask, folder, png

inside, outside = folder / "in", folder / "out"
inside.mkdir()
outside.mkdir()
(inside / "deep").mkdir()
(folder / "in2").mkdir()
for place in (inside, outside, inside / "deep", folder / "in2"):
    (place / "a.png").write_bytes(png())
(inside / "key").write_text("TOPSECRET-0123456789")
(inside / "link.png").symlink_to(outside / "a.png")
(inside / "dead.png").symlink_to(outside / "absent.png")
(inside / "twice.png").symlink_to(inside / "link.png")
(inside / "round.png").symlink_to(inside / "round.png")
(inside / "linked").symlink_to(outside)
(inside / "within.png").symlink_to(inside / "deep" / "a.png")
(folder / "alias").symlink_to(inside)
os.mkfifo(inside / "pipe")
good = [
    inside / "a.png",
    inside / "deep" / "a.png",
    inside / "deep" / ".." / "a.png",
    inside / "within.png",
    folder / "alias" / "a.png",
    outside / ".." / "in" / "a.png",
]
bad = [
    outside / "a.png",
    outside / "absent",
    inside / "link.png",
    inside / "dead.png",
    inside / "twice.png",
    inside / "linked" / "a.png",
    inside / "linked" / "absent.png",
    inside / ".." / "out" / "a.png",
    folder / "in2" / "a.png",
    inside / "deep" / ".." / ".." / "out" / "a.png",
    "/etc/passwd",
    "/etc/absent",
    "a\0b",
    "x\ud800",
    "/proc/self/cwd",
    "/proc/self/root/etc/passwd",
    folder,
]
for allow in (inside, str(inside), folder / "alias", inside / "deep" / ".."):
    for name in good:
        for part in ({"type": "image", "path": str(name)}, {"type": "image", "image": name}):
            assert ask(part, allow_paths=allow) == "accepted", (name, allow)
    words = set()
    for name in bad:
        for part in ({"type": "image", "path": str(name)}, {"type": "image", "image": str(name)}):
            words.add(ask(part, allow_paths=allow))
    assert words == {"images[0][0] names a file that is not inside the folder of allow_paths"}, (
        words
    )
os.chdir(inside)
assert ask({"type": "image", "path": "a.png"}, allow_paths=".") == "accepted"
assert ask({"type": "image", "path": "a.png"}, allow_paths=inside / "deep") in words
for name, said in (
    ("key", "is not an image"),
    ("pipe", "not a regular file"),
    ("absent.png", "cannot be read"),
    ("deep", "not a regular file"),
):
    assert said in ask({"type": "image", "path": str(inside / name)}, allow_paths=inside)
loop = ask({"type": "image", "path": str(inside / "round.png")}, allow_paths=inside)
assert "cannot be read" in loop or loop in words, loop
for allow, said in (
    ("", "names no folder"),
    (folder / "absent", "names no folder"),
    (inside / "a.png", "names no"),
    (5, "True, False or a folder, got int"),
    (None, "True, False or a folder"),
    (b"x", "got bytes"),
):
    assert said in ask({"type": "image", "image": png()}, allow_paths=allow), allow
