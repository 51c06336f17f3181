"""The page of the server in Chromium: opened, used, looked at.

With MLLAMA_SCREENSHOTS=DIR pictures of it are left there, and a browser that is missing is a failure.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
FOLDER = os.environ.get("MLLAMA_SCREENSHOTS")
PATIENCE = 120_000  # milliseconds; two busy cores take seconds for what takes one a moment

_TOUCH = {"has_touch": True, "is_mobile": True}
SIZES: dict[str, dict[str, Any]] = {
    "small": {"viewport": {"width": 360, "height": 640}, **_TOUCH},
    "phone": {"viewport": {"width": 390, "height": 844}, **_TOUCH},
    "slim": {"viewport": {"width": 390, "height": 844}},  # a window with a keyboard
    "desk": {"viewport": {"width": 1440, "height": 900}, "color_scheme": "dark"},
}


def lacking(reason: str) -> None:
    """Skips, unless pictures are asked for."""
    if FOLDER:
        pytest.fail(f"MLLAMA_SCREENSHOTS asks for pictures of the page, but {reason}")
    pytest.skip(reason)


@contextmanager
def chromium() -> Iterator[Any]:
    """The distribution's, headless."""
    if BROWSER is None:
        lacking("there is no Chromium here (apt-get install chromium)")
    try:
        import axe_playwright_python  # noqa: F401
        from playwright.sync_api import sync_playwright
    except ImportError as error:
        lacking(f"there is no {error.name} here")
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(
            executable_path=BROWSER,
            args=["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"],
            timeout=PATIENCE,
        )
        yield found
        found.close()


@contextmanager
def opened(
    browser: Any, url: str, size: str, *, allowed: tuple[str, ...] = (), **options: Any
) -> Iterator[Any]:
    """The page in a tab of its own. Fails where it reports errors, asks elsewhere, or is too wide.

    Args:
        allowed: what errors of the console may say.
        options: of the browser's context.
    """
    allowed = ("the server responded with a status of", *allowed)
    problems: list[str] = []

    def on_console(message: Any) -> None:
        if message.type == "error" and not any(words in message.text for words in allowed):
            problems.append(message.text)

    def on_request(request: Any) -> None:
        if not request.url.startswith((url + "/", "data:")):
            problems.append(f"asked for {request.url}")

    context = browser.new_context(
        permissions=["clipboard-read", "clipboard-write"],
        **{**SIZES[size], "reduced_motion": "reduce", **options},
    )
    try:
        context.set_default_timeout(PATIENCE)
        page = context.new_page()
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", on_console)
        page.on("request", on_request)
        # Choosers are taken from the browser while somebody listens: not only from some moment of a test on.
        page.on("filechooser", lambda chooser: None)
        page.goto(url + "/")
        yield page
        assert not problems, problems
        fits(page)
    finally:
        context.close()


# Using it


def connected(page: Any, model: str) -> None:
    page.locator("#model").filter(has_text=re.compile(f"^{model}$")).wait_for()


def message(page: Any) -> Any:
    return page.get_by_role("textbox", name="Message")


def ask(page: Any, words: str) -> None:
    message(page).fill(words)
    page.get_by_role("button", name="Send").click()


def answers(page: Any, count: int) -> list[str]:
    """All of them, as soon as there are as many and the last has ended."""
    page.locator(f".turn.assistant:not(.busy) >> nth={count - 1}").wait_for(state="attached")
    page.locator("#stop").wait_for(state="hidden")
    found = page.locator(".turn.assistant .text").all_inner_texts()
    assert len(found) == count, found
    return found


def begun(page: Any) -> None:
    """There are words of an answer that comes."""
    page.locator(".busy .text").filter(has_text=re.compile(r"\S")).wait_for()


def drop(page: Any, *files: tuple[bytes, str, str]) -> None:
    """Files of (bytes, name, type), from another program."""
    page.evaluate(
        """(files) => {
            const transfer = new DataTransfer();
            for (const [bytes, name, type] of files)
                transfer.items.add(new File([new Uint8Array(bytes)], name, { type }));
            const options = { dataTransfer: transfer, bubbles: true, cancelable: true };
            for (const event of ["dragenter", "dragover", "drop"])
                document.body.dispatchEvent(new DragEvent(event, options));
        }""",
        [[list(data), name, kind] for data, name, kind in files],
    )


def paste(page: Any, data: bytes, name: str, kind: str) -> None:
    page.evaluate(
        """([bytes, name, type]) => {
            const clipboardData = new DataTransfer();
            clipboardData.items.add(new File([new Uint8Array(bytes)], name, { type }));
            dispatchEvent(new ClipboardEvent("paste", { clipboardData }));
        }""",
        [list(data), name, kind],
    )


_FOCUS = """() => {
    const at = document.activeElement, line = document.querySelector(".line");
    if (at === document.body) return { name: "" };
    const name = at.ariaLabel || at.labels?.[0]?.innerText || at.innerText || at.tagName;
    const ring = at.id === "text" ? getComputedStyle(line).boxShadow : getComputedStyle(at).outlineStyle;
    const box = at.getBoundingClientRect();
    const top = document.elementFromPoint(box.x + box.width / 2, box.y + box.height / 2);
    return { name: name.trim(), isMarked: ring !== "none", isSeen: at === top || at.contains(top) };
}"""


def tab_to(page: Any, name: str, *, back: bool = False) -> None:
    """Press Tab until something has the keyboard; what has it on the way is marked and not hidden."""
    passed = []
    for _ in range(60):
        page.keyboard.press("Shift+Tab" if back else "Tab")
        at = page.evaluate(_FOCUS)
        passed.append(at["name"])
        if not at["name"]:  # beyond the last one
            continue
        assert at["isMarked"] and at["isSeen"], at
        if re.match(name, at["name"]):
            return
    raise AssertionError(f"{name} is not reached, but {passed}")


# Looking at it


def fits(page: Any) -> None:
    """Nothing is wider than the screen or than an open dialog."""
    width = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert width[0] <= width[1], width
    for box in page.locator("dialog[open]").all():
        assert box.evaluate("(one) => one.scrollWidth <= one.clientWidth")


@functools.cache
def _axe() -> str:
    import axe_playwright_python

    return Path(axe_playwright_python.__file__).with_name("axe.min.js").read_text()


def looked_at(page: Any, name: str, *, checked: bool = True) -> None:
    """A picture of it, light and dark; axe-core finds nothing serious in either."""
    fits(page)
    # What is dark differs in its colours alone.
    for scheme, rules in (("light", {}), ("dark", {"runOnly": ["color-contrast"]})):
        page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
        if FOLDER:
            page.screenshot(path=Path(FOLDER) / f"{name}-{scheme}.png")
        if not checked:
            continue
        if not page.evaluate("'axe' in window"):
            page.evaluate(_axe())  # which the page's own policy keeps from scripts, not from tools
        options = {"resultTypes": ["violations"], **rules}
        found = page.evaluate("(options) => axe.run(options)", options)["violations"]
        told = [(v["id"], v["impact"], [n["html"] for n in v["nodes"]]) for v in found]
        assert not [v for v in found if v["impact"] in ("serious", "critical")], (name, told)
