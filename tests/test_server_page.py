"""The page: its files, and a person's way through it in a real browser."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("httpx2")
pytest.importorskip("fastapi")
pytest.importorskip("llguidance")

import httpx2
from server_helpers import PNG, Running, served

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
SIZES = {"narrow": (390, 844), "wide": (1440, 900)}


# Files


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with served(models=("demo", "other")) as running:
        yield running


def test_the_page_is_small_and_loads_nothing_from_elsewhere(server):
    pages = {"": httpx2.get(server.url + "/")}
    names = ("page.css", "page.js", "chat.js", "code.js", "pictures.js", "icon.svg")
    pages |= {name: httpx2.get(f"{server.url}/static/{name}") for name in names}
    for name, found in pages.items():
        assert found.status_code == 200 and found.headers["x-content-type-options"] == "nosniff"
        policy = found.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
        links = re.findall(r"https?://[^\s\"']*", found.text)
        assert set(links) <= {"http://www.w3.org/2000/svg"}, (name, links)
    assert sum(len(found.content) for found in pages.values()) < 60_000
    # Answers are text: nothing that a browser would parse as HTML is made of them.
    code = "".join(found.text for name, found in pages.items() if name.endswith(".js"))
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|Function\(", code
    )
    assert " style=" not in pages[""].text and " onclick" not in pages[""].text
    used = re.findall(r'\$\("([a-z-]+)"\)', code)
    ids = re.findall(r'id="([a-z-]+)"', pages[""].text)
    assert set(used) <= set(ids) and len(set(ids)) == len(ids)


@pytest.mark.parametrize(
    "path",
    [
        "/static/index.html",
        "/static/..%2fpage.py",
        "/static/%2e%2e/page.py",
        "/static/samples/0.png",
        "/static/samples/5.png",
        "/static/samples/a.png",
        "/static/",
    ],
)
def test_other_files_are_not_served(server, path):
    found = httpx2.get(server.url + path)
    assert found.status_code == 404 and found.json()["error"]["code"] == "not_found"


def test_samples_are_pictures_of_the_demo(server):
    from io import BytesIO

    from PIL import Image

    found = [httpx2.get(f"{server.url}/static/samples/{i}.png").content for i in range(1, 5)]
    assert len(set(found)) == 4
    for data in found:
        image = Image.open(BytesIO(data))
        assert image.format == "PNG" and image.width == image.height


def test_the_page_needs_no_key():
    with served(api_keys=("secret",)) as keyed:
        for path in ("/", "/static/page.js", "/static/samples/1.png"):
            assert httpx2.get(keyed.url + path).status_code == 200
        assert httpx2.get(keyed.url + "/v1/models").status_code == 401


# In a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if BROWSER is None:
        assert not os.environ.get("CI"), "Chromium is not installed"
        pytest.skip("there is no Chromium here (apt-get install chromium)")
    sync = pytest.importorskip("playwright.sync_api")
    with sync.sync_playwright() as playwright:
        found = playwright.chromium.launch(
            executable_path=BROWSER, args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        yield found
        found.close()


@pytest.fixture(params=sorted(SIZES))
def page(browser, server, request) -> Iterator[Any]:
    yield from opened(browser, server, request.param, request.node.name)


def opened(browser: Any, server: Running, size: str, name: str) -> Iterator[Any]:
    width, height = SIZES[size]
    context = browser.new_context(
        viewport={"width": width, "height": height},
        color_scheme="light" if size == "narrow" else "dark",
        permissions=["clipboard-read", "clipboard-write"],
    )
    context.set_default_timeout(30_000)
    found = context.new_page()
    problems: list[str] = []
    expected = ("the server responded with a status of", "ERR_CONNECTION_REFUSED")
    found.on("pageerror", lambda error: problems.append(str(error)))
    found.on(
        "console",
        lambda m: (
            m.type == "error"
            and not any(words in m.text for words in expected)
            and problems.append(m.text)
        ),
    )
    found.goto(server.url + "/")
    yield found
    if folder := os.environ.get("MLLAMA_SCREENSHOTS"):
        found.screenshot(path=Path(folder) / f"{re.sub(r'[^a-z0-9]+', '-', name)}.png")
    assert not problems, problems
    assert found.evaluate("document.documentElement.scrollWidth") <= width
    context.close()


def connected(page: Any, model: str) -> None:
    page.locator("#model").filter(has_text=re.compile(f"^{model}$")).wait_for()


def ask(page: Any, words: str) -> None:
    page.get_by_role("textbox", name="Message").fill(words)
    page.get_by_role("button", name="Send").click()


def answers(page: Any) -> list[str]:
    page.locator("#stop").wait_for(state="hidden")
    return page.locator(".turn.assistant .text").all_inner_texts()


def accessible(page: Any) -> None:
    """Nothing that axe-core calls serious."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    # The page's own policy would refuse the script: it is brought in as an extension's is.
    source = (Path(axe.__file__).with_name("axe.min.js")).read_text()
    page.evaluate(source)
    found = page.evaluate("axe.run()")["violations"]
    told = [(v["id"], [n["html"] for n in v["nodes"]]) for v in found]
    assert not [v for v in found if v["impact"] in ("serious", "critical")], told


def drop(page: Any, data: bytes, name: str, kind: str) -> None:
    page.evaluate(
        """([bytes, name, type]) => {
            const transfer = new DataTransfer();
            transfer.items.add(new File([new Uint8Array(bytes)], name, { type }));
            for (const event of ["dragenter", "dragover", "drop"])
                document.body.dispatchEvent(new DragEvent(event, { dataTransfer: transfer, bubbles: true }));
        }""",
        [list(data), name, kind],
    )


def test_a_picture_is_dropped_and_talked_about(page, server):
    connected(page, "demo")
    accessible(page)
    drop(page, PNG, "grey.png", "image/png")
    page.get_by_role("img", name="grey.png").wait_for()
    assert page.get_by_role("textbox", name="Message").input_value() == "Describe the picture."
    accessible(page)
    ask(page, "What is <b>this</b>?")
    assert answers(page) == ["<picture> What is <b>this</b>?"]
    assert page.locator(".turn b").count() == 0
    figures = page.locator(".figures").inner_text()
    assert re.fullmatch(
        r"\d+\.\d\d s to the first token( · [\d.,]+ tokens/s)? · 1 of 5 tokens cached", figures
    ), figures
    ask(page, "And now?")
    assert answers(page)[1] == "And now?"
    work = server.engine.works[-1]
    assert [m["role"] for m in work.messages] == ["user", "assistant", "user"]
    assert [p.data for p in work.pictures] == [PNG]
    accessible(page)


def test_pictures_are_chosen_pasted_taken_off_and_drawn(page, server):
    page.set_input_files("#files", [{"name": "a.png", "mimeType": "image/png", "buffer": PNG}])
    page.get_by_role("button", name="Sample 2").click()
    page.evaluate(
        """(bytes) => {
            const data = new DataTransfer();
            data.items.add(new File([new Uint8Array(bytes)], "b.png", { type: "image/png" }));
            dispatchEvent(new ClipboardEvent("paste", { clipboardData: data }));
        }""",
        list(PNG),
    )
    page.locator("#tray li").nth(2).wait_for()
    page.get_by_role("button", name="Remove a.png").click()
    ask(page, "two")
    assert answers(page) == ["<picture> <picture> two"]
    sample, pasted = server.engine.works[-1].pictures
    assert sample.data == httpx2.get(server.url + "/static/samples/2.png").content
    assert pasted.data == PNG
    drop(page, b"text", "notes.txt", "text/plain")
    assert page.get_by_role("alert").inner_text() == "notes.txt is not a picture."


def test_a_large_picture_is_drawn_smaller(page, server):
    import io

    from PIL import Image

    noise = Image.effect_noise((3000, 1500), 90).convert("RGB")
    file = io.BytesIO()
    noise.save(file, "PNG")
    assert len(file.getvalue()) > 3_000_000
    page.set_input_files(
        "#files", [{"name": "n.png", "mimeType": "image/png", "buffer": file.getvalue()}]
    )
    page.locator("#tray img").wait_for()
    ask(page, "large")
    assert answers(page) == ["<picture> large"]
    (picture,) = server.engine.works[-1].pictures
    image = Image.open(io.BytesIO(picture.data))
    assert image.format == "JPEG" and image.size == (2240, 1120)


def test_an_answer_is_stopped(page, server):
    ask(page, "!hang a b")
    page.get_by_text("!hang", exact=True).wait_for()
    page.keyboard.press("Escape")
    assert answers(page) == ["!hang"]
    assert "stopped" in page.locator(".figures").inner_text()
    from server_helpers import eventually

    eventually(lambda: not server.engine.running)
    ask(page, "!hang a b")
    page.get_by_role("button", name="Stop").click()
    assert len(answers(page)) == 2


def test_a_message_is_edited_and_an_answer_asked_for_again(page, server):
    for words in ("one", "two", "three"):
        ask(page, words)
        answers(page)
    page.get_by_role("button", name="Edit").nth(1).click()
    assert page.get_by_role("textbox", name="Message").input_value() == "two"
    page.get_by_role("button", name="Cancel").click()
    assert page.get_by_role("textbox", name="Message").input_value() == ""
    page.get_by_role("button", name="Edit").nth(1).click()
    ask(page, "zwei")
    assert answers(page) == ["one", "zwei"]
    count = len(server.engine.works)
    page.get_by_role("button", name="Edit").nth(1).click()
    page.get_by_role("button", name="Again").first.click()
    assert answers(page) == ["one"] and len(server.engine.works) == count + 1
    ask(page, "more")  # the message that was being edited is gone
    assert answers(page) == ["one", "more"]
    page.get_by_role("button", name="New chat").click()
    assert page.locator(".turn").count() == 0
    page.get_by_role("heading", name="Talk about a picture").wait_for()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("!refuse", "The prompt has 9 tokens; at most 8 are taken."),
        ("!full", "4 requests wait already; at most 4 do."),
        ("!fail a b", "The numbers of the answer are not finite."),
    ],
)
def test_an_error_is_told_where_it_happened(page, words, told):
    ask(page, words)
    page.locator(".wrong").wait_for()
    assert page.locator(".turn.assistant .wrong span").inner_text() == told
    accessible(page)
    page.get_by_role("button", name="Try again").click()
    page.locator(".wrong").wait_for()
    assert page.locator(".turn").count() == 2


def test_settings_are_sent_and_kept(page, server):
    page.get_by_role("button", name="Settings").click()
    page.get_by_role("slider").fill("0.5")
    page.get_by_label("Longest answer").fill("2")
    page.get_by_label("System text").fill("Be brief.")
    page.get_by_label("Model").select_option("other")
    accessible(page)
    page.get_by_role("button", name="Done").click()
    page.reload()
    connected(page, "other")
    ask(page, "a b c")
    assert answers(page) == ["a b"]
    assert "cut at its length" in page.locator(".figures").inner_text()
    work = server.engine.works[-1]
    assert work.options.temperature == 0.5 and work.options.max_tokens == 2
    assert work.messages[0] == {"role": "system", "content": "Be brief."}
    page.get_by_role("button", name="Settings").click()
    page.get_by_role("slider").press("Home")
    page.keyboard.press("Escape")
    ask(page, "a")
    answers(page)
    assert server.engine.works[-1].options.temperature is None


def test_by_keyboard_alone(page):
    connected(page, "demo")
    names = []
    for _ in range(7):
        page.keyboard.press("Tab")
        names.append(
            page.evaluate("document.activeElement.ariaLabel || document.activeElement.innerText")
        )
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none" or names[-1] == "Message", names
    assert names[:2] == ["Settings", "Sample 1"] and names[-1] == "Message"
    page.keyboard.type("hello")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("you")
    page.keyboard.press("Enter")
    assert answers(page) == ["hello you"]


@pytest.mark.parametrize("size", sorted(SIZES))
def test_the_key_is_asked_for_once(browser, size, request):
    with served(api_keys=("right",)) as keyed:
        for page in opened(browser, keyed, size, request.node.name):
            page.get_by_role("heading", name="This server asks for a key").wait_for()
            accessible(page)
            page.get_by_label("Key", exact=True).fill("wrong")
            page.keyboard.press("Enter")
            page.get_by_text("The server does not know this key.").wait_for()
            page.get_by_label("Key", exact=True).fill("right")
            page.get_by_role("button", name="Use it").click()
            connected(page, "echo")
            page.reload()
            connected(page, "echo")
            ask(page, "a b")
            assert answers(page) == ["a b"]
            page.get_by_role("button", name="Copy as curl").click()
            text = page.evaluate("navigator.clipboard.readText()")
            assert "Bearer $MLLAMA_API_KEY" in text and "right" not in text
            page.get_by_role("button", name="Settings").click()
            page.get_by_role("button", name="Forget the key").click()
            page.get_by_role("heading", name="This server asks for a key").wait_for()


def test_a_request_is_copied_as_code_that_runs(page, server, tmp_path):
    page.get_by_role("button", name="Sample 1").click()
    page.locator("#tray img").wait_for()
    page.set_input_files(
        "#files", [{"name": "my $(id) 'p'.png", "mimeType": "image/png", "buffer": PNG}]
    )
    page.locator("#tray img").nth(1).wait_for()
    words = 'It\'s `$HOME` "quoted" \\n \N{SNOWMAN}'
    ask(page, words)
    expected = f"<picture> <picture> {words}"
    assert answers(page) == [expected]
    sent = server.engine.works[-1]
    (tmp_path / "my___id___p_.png").write_bytes(PNG)
    for name in ("curl", "Python"):
        page.get_by_role("button", name=f"Copy as {name}").click()
        text = page.evaluate("navigator.clipboard.readText()")
        command = ["bash", "-c", text] if name == "curl" else [sys.executable, "-c", text]
        if not shutil.which("curl") or name == "Python":
            pytest.importorskip("openai")
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        if name == "curl":
            message = json.loads(done.stdout)["choices"][0]["message"]["content"]
        else:
            message = done.stdout.rstrip("\n")
        assert message == expected, done.stderr
        work = server.engine.works[-1]
        assert work.messages == sent.messages and work.key != sent.key
        assert [p.data for p in work.pictures] == [p.data for p in sent.pictures]
