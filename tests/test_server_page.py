"""The page: its files, and a person's way through it in a real browser."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import browser_helpers as browsing
import pytest
from browser_helpers import (
    answers,
    ask,
    begun,
    connected,
    drop,
    lacking,
    looked_at,
    message,
    opened,
    paste,
    tab_to,
)

if not browsing.FOLDER:
    pytest.importorskip("httpx2")
    pytest.importorskip("fastapi")
    pytest.importorskip("llguidance")

from PIL import Image
from server_helpers import PNG, Running, eventually, served, web

import mllama.server.page

FILES = Path(mllama.server.page.__file__).with_name("static")


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with served(models=("demo", "other")) as running:
        yield running


@pytest.fixture(scope="module")
def keyed() -> Iterator[Running]:
    with served(api_keys=("right",)) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with browsing.chromium() as found:
        yield found


@pytest.fixture(params=["phone", "desk"])
def page(browser, server, request) -> Iterator[Any]:
    with opened(browser, server.url, request.param) as found:
        yield found


@pytest.fixture
def desk(browser, server) -> Iterator[Any]:
    with opened(browser, server.url, "desk") as found:
        yield found


# Files


def test_the_page_is_small_and_loads_nothing_from_elsewhere(server):
    pages = {"index.html": web.get(server.url + "/")}
    for path in FILES.iterdir():
        if path.name != "index.html":
            pages[path.name] = web.get(f"{server.url}/static/{path.name}")
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
    index = pages["index.html"].text
    assert not re.search(r"\s(style|on[a-z]+)=|<style|<script(?! type=\"module\" src=)", index)
    used = re.findall(r'\$\("([a-z-]+)"\)', code)
    ids = re.findall(r'id="([a-z-]+)"', index)
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
    found = web.get(server.url + path)
    assert found.status_code == 404 and found.json()["error"]["code"] == "not_found"


def test_samples_are_pictures_of_the_demo(server):
    found = [web.get(f"{server.url}/static/samples/{i}.png").content for i in range(1, 5)]
    assert len(set(found)) == 4
    for data in found:
        image = Image.open(io.BytesIO(data))
        assert image.format == "PNG" and image.width == image.height


def test_the_page_needs_no_key(keyed):
    for path in ("/", "/static/page.js", "/static/samples/1.png"):
        assert web.get(keyed.url + path).status_code == 200
    assert web.get(keyed.url + "/v1/models").status_code == 401


# In a browser


def test_a_picture_is_dropped_and_talked_about(page, server):
    connected(page, "demo")
    drop(page, (PNG, "grey.png", "image/png"))
    page.get_by_role("img", name="grey.png").wait_for()
    assert message(page).input_value() == "Describe the picture."
    ask(page, "What is this?")
    assert answers(page, 1) == ["<picture> What is this?"]
    figures = page.locator(".figures span").all_inner_texts()
    assert re.fullmatch(r"\d+\.\d\d s to first token", figures[0]), figures
    assert figures[-1] == "1 of 5 tokens cached"
    ask(page, "And now?")
    assert answers(page, 2)[1] == "And now?"
    work = server.engine.works[-1]
    assert [m["role"] for m in work.messages] == ["user", "assistant", "user"]
    assert work.messages[1]["content"] == "<picture> What is this?"
    assert [p.data for p in work.pictures] == [PNG]


def test_pictures_are_chosen_pasted_dropped_drawn_and_taken_off(page, server):
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Add pictures").click()
    assert chooser.value.is_multiple()
    files = [{"name": f"{n}.png", "mimeType": "image/png", "buffer": PNG} for n in "ab"]
    chooser.value.set_files(files)
    page.get_by_role("img", name="b.png").wait_for()
    page.get_by_role("button", name="Sample 2").click()
    page.get_by_role("img", name="Sample 2").wait_for()
    paste(page, PNG, "c.png", "image/png")
    page.get_by_role("img", name="c.png").wait_for()
    wide = io.BytesIO()
    Image.new("RGB", (40, 20), "teal").save(wide, "JPEG")
    drop(page, (wide.getvalue(), "d.jpg", "image/jpeg"), (b"text", "notes.txt", "text/plain"))
    page.get_by_role("img", name="d.jpg").wait_for()
    assert page.get_by_role("alert").inner_text() == "notes.txt is not a picture."
    for name in ("a.png", "b.png"):
        page.get_by_role("button", name=f"Remove {name}").click()
    ask(page, "three")
    assert answers(page, 1) == ["<picture> <picture> <picture> three"]
    assert page.locator(".turn.user img").count() == 3
    sample, pasted, dropped = server.engine.works[-1].pictures
    assert sample.data == web.get(server.url + "/static/samples/2.png").content
    assert pasted.data == PNG and dropped.data == wide.getvalue()
    assert page.get_by_role("alert").count() == 0


def test_a_photo_is_taken_where_there_is_a_touch_screen(browser, server):
    with opened(browser, server.url, "phone") as page:
        with page.expect_file_chooser() as chooser:
            page.get_by_role("button", name="Take a photo").tap()
        assert chooser.value.element.get_attribute("capture") == "environment"
        photo = {"name": "photo.png", "mimeType": "image/png", "buffer": PNG}
        chooser.value.set_files([photo])
        page.get_by_role("img", name="photo.png").wait_for()
        page.get_by_role("button", name="Send").tap()
        assert answers(page, 1) == ["<picture> Describe the picture."]
    with opened(browser, server.url, "desk") as page:
        assert page.get_by_role("button", name="Take a photo").count() == 0
        assert "photo" not in page.locator("#welcome").inner_text()


def test_a_large_picture_is_drawn_smaller(desk, server):
    noise = Image.effect_noise((3000, 1500), 90).convert("RGB")
    file = io.BytesIO()
    noise.save(file, "PNG", compress_level=1)
    assert len(file.getvalue()) > 3_000_000
    large = {"name": "n.png", "mimeType": "image/png", "buffer": file.getvalue()}
    desk.set_input_files("#files", [large])
    desk.locator("#tray img").wait_for()
    ask(desk, "large")
    assert answers(desk, 1) == ["<picture> large"]
    (picture,) = server.engine.works[-1].pictures
    image = Image.open(io.BytesIO(picture.data))
    assert image.format == "JPEG" and image.size == (2240, 1120)


def test_an_answer_is_stopped(page, server):
    ask(page, "!hang a b")
    page.get_by_role("button", name="Stop").wait_for()
    begun(page)
    page.keyboard.press("Escape")
    assert answers(page, 1) == ["!hang"]
    assert page.locator(".figures span").last.inner_text() == "stopped"
    eventually(lambda: not server.engine.running)
    ask(page, "!hang-before a")  # nothing has come of it yet
    eventually(lambda: server.engine.running)
    page.get_by_role("button", name="Stop").click()
    assert answers(page, 2)[1] == ""
    eventually(lambda: not server.engine.running)
    ask(page, "on")
    assert answers(page, 3)[2] == "on"


def test_a_message_is_edited_and_an_answer_asked_for_again(page, server):
    for i, words in enumerate(("one", "two", "three")):
        ask(page, words)
        answers(page, i + 1)
    message(page).fill("unsent")
    page.get_by_role("button", name="Edit").nth(1).click()
    assert message(page).input_value() == "two" and page.locator(".edited").count() == 1
    page.get_by_role("button", name="Cancel").click()
    assert message(page).input_value() == "unsent" and page.locator(".edited").count() == 0
    page.get_by_role("button", name="Edit").nth(1).click()
    ask(page, "zwei")
    assert answers(page, 2) == ["one", "zwei"]
    assert [m["content"] for m in server.engine.works[-1].messages] == ["one", "one", "zwei"]
    assert message(page).input_value() == "unsent"
    count = len(server.engine.works)
    page.get_by_role("button", name="Edit").nth(1).click()
    page.get_by_role("button", name="Again").first.click()
    assert answers(page, 1) == ["one"] and len(server.engine.works) == count + 1
    ask(page, "more")  # the message that was being edited is gone
    assert answers(page, 2) == ["one", "more"]
    page.get_by_role("button", name="New chat").click()
    assert page.locator(".turn").count() == 0
    page.get_by_role("heading", name="Talk about a picture").wait_for()


def test_a_message_with_a_picture_is_edited(desk, server):
    desk.get_by_role("button", name="Sample 3").click()
    desk.locator("#tray img").wait_for()
    desk.get_by_role("button", name="Send").click()
    answers(desk, 1)
    desk.get_by_role("button", name="Edit").click()
    desk.get_by_role("button", name="Remove Sample 3").click()
    desk.get_by_role("button", name="Cancel").click()
    assert desk.locator(".turn.user img").count() == 1  # what was taken off comes back
    desk.get_by_role("button", name="Edit").click()
    ask(desk, "again")
    assert answers(desk, 1) == ["<picture> again"]


def test_an_error_is_told_where_it_happened(page):
    for words, told in (
        ("!refuse", "The prompt has 9 tokens; at most 8 are taken."),
        ("!full", "4 requests wait already; at most 4 do."),
        ("!fail a b", "The numbers of the answer are not finite."),
    ):
        ask(page, words)
        answers(page, 1)
        assert page.locator(".turn.assistant .wrong span").inner_text() == told
        page.get_by_role("button", name="Try again").click()
        answers(page, 1)
        assert page.locator(".turn.assistant .wrong span").inner_text() == told
        page.get_by_role("button", name="New chat").click()


def test_a_server_that_is_gone_is_told_in_words(browser, server):
    with opened(browser, server.url, "desk", allowed=("ERR_FAILED",)) as page:
        connected(page, "demo")
        for handler, told in (
            (lambda route: route.abort(), "The server does not answer. Is it still running?"),
            (lambda route: route.fulfill(status=502), "The server answered with status 502."),
            (
                lambda route: route.fulfill(body='data: {"choices": []}\n\ndata: {"cho'),
                "The connection ended before the answer did.",
            ),
            (lambda route: route.fulfill(body="data: x\n\n"), "The answer cannot be read."),
        ):
            page.route("**/v1/chat/completions", handler)
            ask(page, "a")
            answers(page, 1)
            assert page.locator(".turn.assistant .wrong span").inner_text() == told
            page.unroute("**/v1/chat/completions")
            page.get_by_role("button", name="Try again").click()
            assert answers(page, 1) == ["a"] and page.locator(".wrong:visible").count() == 0
            page.get_by_role("button", name="New chat").click()
        page.route("**/v1/models", lambda route: route.abort())
        page.reload()
        connected(page, "not connected")
        page.get_by_role("alert").get_by_text("The server does not answer.").wait_for()
        page.unroute("**/v1/models")
        page.get_by_role("button", name="Try again").click()
        connected(page, "demo")
        assert page.get_by_role("alert").count() == 0


def test_settings_are_sent_and_kept(page, server):
    connected(page, "demo")
    page.get_by_role("button", name="Settings").click()
    page.get_by_role("slider").fill("0.5")
    page.get_by_label("Longest answer").fill("2")
    page.get_by_label("System text").fill("Be brief.")
    page.get_by_label("Model").select_option("other")
    page.get_by_role("button", name="Done").click()
    page.reload()
    connected(page, "other")
    ask(page, "a b c")
    assert answers(page, 1) == ["a b"]
    assert page.locator(".figures span").last.inner_text() == "cut at its length"
    work = server.engine.works[-1]
    assert work.options.temperature == 0.5 and work.options.max_tokens == 2
    assert work.messages[0] == {"role": "system", "content": "Be brief."}
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Longest answer").fill("-3")
    page.get_by_role("button", name="Done").click()  # which the browser refuses, with its words
    assert page.locator("#settings[open] #length:invalid").count() == 1
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Settings").click()
    assert page.get_by_label("Longest answer").input_value() == "2"
    page.get_by_role("slider").press("Home")
    assert page.locator("#temperature-shown").inner_text() == "0"
    page.get_by_role("button", name="Reset").click()
    assert (
        page.locator("#temperature-shown").inner_text()
        == "the model\N{RIGHT SINGLE QUOTATION MARK}s own"
    )
    page.keyboard.press("Escape")
    ask(page, "a b c")
    assert answers(page, 2)[1] == "a b c"
    work = server.engine.works[-1]
    assert work.options.temperature is None and work.messages[0]["role"] == "user"


@pytest.mark.parametrize("size", ["slim", "desk"])
def test_everything_is_reached_by_keyboard_alone(browser, server, size):
    with opened(browser, server.url, size) as page:
        press, write = page.keyboard.press, page.keyboard.type
        connected(page, "demo")
        tab_to(page, "Sample 2")
        press("Enter")
        page.get_by_role("img", name="Sample 2").wait_for()
        tab_to(page, "Remove Sample 2", back=True)
        press("Enter")
        assert page.locator("#tray li").count() == 0
        tab_to(page, "Add pictures", back=True)
        with page.expect_file_chooser() as chooser:
            press("Enter")
        chooser.value.set_files([{"name": "a.png", "mimeType": "image/png", "buffer": PNG}])
        page.get_by_role("img", name="a.png").wait_for()
        tab_to(page, "Message")
        press("Control+a")
        write("What is")
        press("Shift+Enter")
        write("it?")
        press("Enter")
        assert answers(page, 1) == ["<picture> What is it?"]
        assert server.engine.works[-1].messages[0]["content"][1]["text"] == "What is\nit?"
        write("!hang a b")
        press("Enter")
        begun(page)
        press("Escape")
        assert answers(page, 2)[1] == "!hang"
        tab_to(page, "Edit", back=True)
        press("Enter")
        press("Control+a")
        write("!refuse")
        tab_to(page, "Send")
        press("Enter")
        answers(page, 2)
        tab_to(page, "Try again", back=True)
        press("Enter")
        answers(page, 2)
        tab_to(page, "Copy as curl", back=True)
        press("Enter")
        page.get_by_role("button", name="Copy as curl").get_by_text("Copied").wait_for()
        tab_to(page, "Again", back=True)
        press("Enter")
        assert answers(page, 1) == ["<picture> What is it?"]
        tab_to(page, "Settings", back=True)
        press("Enter")
        tab_to(page, "Temperature")
        press("ArrowRight")
        tab_to(page, "Longest answer")
        write("1")
        tab_to(page, "System text")
        write("Be brief.")
        tab_to(page, "Done")
        press("Enter")
        page.locator("#settings").wait_for(state="hidden")
        tab_to(page, "Message")
        write("a b")
        press("Enter")
        assert answers(page, 2)[1] == "a"
        assert server.engine.works[-1].options.temperature == 1.05
        tab_to(page, "New chat", back=True)
        press("Enter")
        assert page.locator(".turn").count() == 0


@pytest.mark.parametrize("size", ["phone", "desk"])
def test_the_key_is_asked_for_once(browser, keyed, size):
    with opened(browser, keyed.url, size) as page:
        heading = page.get_by_role("heading", name="This server asks for a key")
        field = page.get_by_label("Key", exact=True)
        heading.wait_for()
        field.fill("wrong")
        page.keyboard.press("Enter")
        page.get_by_role("alert").get_by_text("The server does not know this key.").wait_for()
        looked_at(page, f"{size}-key")
        page.get_by_role("button", name="Not now").click()
        connected(page, "a key is needed")
        ask(page, "a b")  # which asks for it again, and then for the answer
        heading.wait_for()
        field.fill("right")
        page.get_by_role("button", name="Use it").click()
        assert answers(page, 1) == ["a b"]
        page.reload()
        connected(page, "echo")
        ask(page, "a b")
        assert answers(page, 1) == ["a b"] and heading.count() == 0
        page.get_by_role("button", name="Copy as curl").click()
        text = page.evaluate("navigator.clipboard.readText()")
        assert "Bearer $MLLAMA_API_KEY" in text and "right" not in text
        assert page.evaluate("sessionStorage['mllama-key']") == "right"
        assert page.evaluate("localStorage.length") == 0 and page.context.cookies() == []
        page.get_by_role("button", name="Settings").click()
        page.get_by_role("button", name="Forget the key").click()
        heading.wait_for()
        assert page.evaluate("sessionStorage['mllama-key']") is None


def test_a_key_of_yesterday_is_asked_for_anew(browser, keyed):
    with opened(browser, keyed.url, "desk") as page:
        page.evaluate("sessionStorage['mllama-key'] = 'old'")
        page.reload()
        page.get_by_role("alert").get_by_text("The server does not know this key.").wait_for()


# A request as code


def copied(page: Any, name: str) -> str:
    page.get_by_role("button", name=f"Copy as {name}").click()
    page.get_by_role("button", name=f"Copy as {name}").get_by_text("Copied").wait_for()
    return page.evaluate("navigator.clipboard.readText()")


def output(*command: str, folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_request_is_copied_as_code_that_runs(desk, server, tmp_path):
    if not shutil.which("curl"):
        lacking("there is no curl here")
    if not browsing.FOLDER:
        pytest.importorskip("openai")
    name = "my $(touch x) 'p' \"q\" `touch y` \\.png"
    (tmp_path / name).write_bytes(PNG)
    desk.get_by_role("button", name="Sample 1").click()
    desk.locator("#tray img").wait_for()
    desk.set_input_files("#files", str(tmp_path / name))
    desk.locator("#tray img").nth(1).wait_for()
    desk.get_by_role("button", name="Settings").click()
    desk.get_by_role("slider").fill("0.5")
    desk.get_by_role("button", name="Done").click()
    words = 'It\'s `$HOME` "quoted" \\n \N{SNOWMAN} \N{GRINNING FACE}'
    ask(desk, words)
    expected = f"<picture> <picture> {words}"
    assert answers(desk, 1) == [expected]
    sent = server.engine.works[-1]
    curl = copied(desk, "curl")
    for shell in ("bash", "sh"):
        found = json.loads(output(shell, "-c", curl, folder=tmp_path))
        assert found["choices"][0]["message"]["content"] == expected
        assert_same(server.engine.works[-1], sent)
    script = tmp_path / "asked.py"
    script.write_text(copied(desk, "Python"))
    assert output(sys.executable, str(script), folder=tmp_path) == expected + "\n"
    assert_same(server.engine.works[-1], sent)
    assert {path.name for path in tmp_path.iterdir()} == {name, "asked.py"}


def assert_same(work: Any, sent: Any) -> None:
    assert work.key != sent.key
    assert (work.messages, work.options) == (sent.messages, sent.options)
    assert [p.data for p in work.pictures] == [p.data for p in sent.pictures]


def test_what_the_browser_does_not_copy_is_shown(desk):
    desk.evaluate("Object.defineProperty(navigator, 'clipboard', { value: undefined })")
    ask(desk, "a")
    answers(desk, 1)
    desk.get_by_role("button", name="Copy as Python").click()
    found = desk.get_by_role("textbox", name="To copy by hand")
    assert found.input_value().startswith("from openai import OpenAI")
    looked_at(desk, "desk-by-hand")
    desk.get_by_role("button", name="Done").click()
    found.wait_for(state="hidden")


# What a page may not do


def test_words_are_never_html(browser, server):
    evil = '<img src=x onerror="window.harmed=1"><b>b</b><script>window.harmed=1</script>'
    with opened(browser, server.url, "desk") as page:
        drop(page, (PNG, f"{evil.replace('/', '')}.png", "image/png"))
        page.locator("#tray img").wait_for()
        page.get_by_role("button", name="Settings").click()
        page.get_by_label("System text").fill(evil)
        page.get_by_role("button", name="Done").click()
        ask(page, evil)
        assert answers(page, 1) == [f"<picture> {evil} {evil}"]  # the system text and the question
        assert page.locator(".turn.user .text").inner_text() == evil
        page.route(
            "**/v1/chat/completions",
            lambda route: route.fulfill(status=400, json={"error": {"message": evil}}),
        )
        ask(page, "a")
        answers(page, 2)
        assert page.locator(".turn .wrong span").inner_text() == f"{evil}."
        assert page.locator(".turn :is(b, script), .turn img").count() == 1  # the dropped one
        assert page.evaluate("window.harmed") is None


def test_the_policy_holds(browser, server):
    allowed = ("Content Security Policy", "TrustedHTML", "TrustedScript", "Refused to")
    with opened(browser, server.url, "desk", allowed=allowed) as page:
        told = page.evaluate(
            """async () => {
                const told = {};
                // Outside of this call, which as a tool's may more than the page.
                const apart = (act) => new Promise((resolve) => setTimeout(() => {
                    try { act(); resolve("done"); } catch (error) { resolve(error.name); }
                }));
                told.eval = await apart(() => window.eval("window.harmed = 1"));
                told.html = await apart(() => { document.body.innerHTML += "<b>b</b>"; });
                told.style = await apart(() => {
                    const style = document.createElement("style");
                    style.textContent = "body { color: rgb(1, 2, 3) !important; }";
                    document.head.append(style);
                });
                told.color = getComputedStyle(document.body).color;
                told.elsewhere = await fetch("http://127.0.0.2:1/").then(() => "done", (e) => e.name);
                return told;
            }"""
        )
        assert told["eval"] != "done" and told["html"] == "TypeError", told
        assert told["color"] != "rgb(1, 2, 3)" and told["elsewhere"] == "TypeError", told
        assert page.evaluate("window.harmed") is None
