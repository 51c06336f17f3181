"""The engine on an event loop, with requests as a server reads them, on the demo model."""

from __future__ import annotations

import asyncio
import io
import uuid

import pytest
from engine_helpers import OnOrder, engine_of, wait

import mllama
from mllama.demo import checkpoint_path, is_right, questions_for, sample_picture
from mllama.engine.interface import Options, Overloaded, Piece, Refused, Unavailable, WorkFailed
from mllama.engine.prompts import prepare_chat, prepare_chat_with, prepare_picture
from mllama.server import serving
from mllama.server.metrics import ENGINE_WORDS
from mllama.server.protocol import Picture, Work
from mllama.server.serving import AsyncEngine


@pytest.fixture(scope="module")
def engine():
    model = mllama.MllamaForConditionalGeneration.from_pretrained(checkpoint_path())
    processor = mllama.MllamaProcessor.from_pretrained(checkpoint_path())
    with engine_of(model, processor, num_pages=200, num_slots=64) as engine:
        yield engine


@pytest.fixture
def served(engine):
    served = AsyncEngine(engine)
    yield served
    served.close()


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    sample_picture(seed)[0].save(buffer, "PNG")
    return buffer.getvalue()


def asked(question: str, images: int = 1) -> tuple:
    parts = [{"type": "image"}] * images + [{"type": "text", "text": question}]
    return ({"role": "user", "content": parts},)


def work(question: str = "What is in the image?", seed: int = 3, **options) -> Work:
    pictures = (Picture(png(seed), "messages[0].content[0]"),)
    return Work(uuid.uuid4().hex, Options(**options), asked(question), pictures=pictures)


async def answer(served: AsyncEngine, request: Work) -> tuple[str, list[Piece]]:
    pieces = [piece async for piece in await served.submit(request)]
    return "".join(piece.text for piece in pieces), pieces


def test_questions_about_pictures_are_answered_together(engine):
    encoded = engine.stats().counters["encoded_pictures"]
    seeds = range(40, 44)  # which no other test has shown to this engine
    asked_of = [(s, q) for s in seeds for q in list(questions_for(sample_picture(s)[1], s))[:3]]
    texts = [
        engine.submit(asked(question), [sample_picture(seed)[0]], Options(max_tokens=60))
        for seed, (question, _) in asked_of
    ]
    answers = ["".join(text) for text in texts]
    right = [is_right(said, expected) for said, (_, (_, expected)) in zip(answers, asked_of)]
    assert sum(right) >= len(right) - 1, answers
    assert engine.stats().counters["encoded_pictures"] == encoded + 4


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("What is this?",), "messages must be a list of dictionaries with role and content"),
        ((asked("What?"), sample_picture(3)[0]), "images must be a list of images, got"),
        ((asked("What?"), "a.png"), "images must be a list of images, got 'a.png'"),
        ((asked("What?", 0), (), {"max_tokens": 3}), "options must be mllama.Options, got"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_arguments_of_other_kinds_are_named(engine, arguments, said):
    with pytest.raises(TypeError, match=said):
        engine.submit(*arguments)


def test_requests_of_an_event_loop(served):
    async def run():
        requests = [work(seed=seed, max_tokens=60) for seed in (3, 4, 5, 3)]
        return await asyncio.gather(*(answer(served, request) for request in requests))

    answers = asyncio.run(run())
    texts = [text for text, _ in answers]
    assert texts[0] == texts[3] and len(set(texts)) == 3
    for _, pieces in answers:
        assert pieces[-1].finish_reason == "stop" and pieces[-1].usage.completion_tokens > 2
        assert all(piece.finish_reason is None for piece in pieces[:-1])


@pytest.fixture
def opened(monkeypatch) -> list[int]:
    """The lengths of the files that are opened."""
    lengths: list[int] = []
    open_image = serving.open_image

    def counting(data, **options):
        lengths.append(len(data))
        return open_image(data, **options)

    monkeypatch.setattr(serving, "open_image", counting)
    return lengths


def test_a_picture_that_was_seen_is_not_opened_again(engine, served, opened):
    async def run():
        return [(await answer(served, work(seed=seed, max_tokens=8)))[0] for seed in (31, 32, 31)]

    encoded = engine.stats().counters["encoded_pictures"]
    texts = asyncio.run(run())
    assert opened == [len(png(31)), len(png(32))] and texts[0] == texts[2]
    counters = served.stats().counters
    assert counters["pictures"] == 3 and counters["picture_files_known"] == 1
    assert counters["encoded_pictures"] == encoded + 2


def test_what_is_counted_has_its_words(served):
    stats = served.stats()
    assert {*stats.gauges, *stats.counters, *stats.distributions} == {*ENGINE_WORDS}


def test_known_pictures_have_a_bound(engine, opened):
    prepared = prepare_picture(engine.processor, sample_picture(11)[0])
    served = AsyncEngine(engine, pixel_bytes=2 * prepared.pixels.nbytes)

    async def run(*seeds):
        for seed in seeds:
            await answer(served, work(seed=seed, max_tokens=1))

    asyncio.run(run(11, 12, 11, 13, 11, 12))  # 13 takes the place of 12, used before 11
    assert opened == [len(png(seed)) for seed in (11, 12, 13, 12)]
    served.close()


def test_the_pixels_of_all_requests_together_have_a_bound(engine):
    size = prepare_picture(engine.processor, sample_picture(11)[0]).pixels.nbytes
    served = AsyncEngine(engine, held_bytes=2 * size - 1)
    both = tuple(Picture(png(seed), f"messages[0].content[{seed}]") for seed in (13, 14))
    two = Work("two", Options(max_tokens=1), asked("Which?", 2), pictures=both)

    async def run():
        held = await served.submit(work(seed=11, max_tokens=1500, ignore_eos=True))
        for other in (work(seed=12), two):
            with pytest.raises(Overloaded, match=f"take {size} bytes; at most {2 * size - 1} are"):
                await served.submit(other)
        await answer(served, work(seed=11, max_tokens=1))  # the same picture takes no more
        with pytest.raises(Refused):
            await answer(served, work(seed=11, max_tokens=0))
        assert served._held.num_bytes == size
        await held.aclose()
        assert served._held.num_bytes == 0
        assert await answer(served, two)  # alone: what it may bring at all is taken

    asyncio.run(run())
    assert served._held.num_bytes == 0
    served.close()


def test_a_picture_that_is_none_is_not_kept(served, opened):
    for _ in range(2):
        request = Work(**{**vars(work()), "pictures": (Picture(b"\x89PNG\r\n", "a"),)})
        with pytest.raises(Refused, match="a: "):
            asyncio.run(answer(served, request))
    assert opened == [6, 6]


def test_pictures_that_are_prepared_make_the_same_prompt(engine):
    pictures = [sample_picture(seed)[0] for seed in (1, 2)]
    words = "<|image|> and <|eot_id|> are words"
    messages = [
        *asked(words, images=1),
        {"role": "assistant", "content": "Yes."},
        *asked("And now?", images=1),
    ]
    whole = prepare_chat(engine.processor, messages, pictures)
    prepared = [prepare_picture(engine.processor, picture) for picture in pictures]
    parts = prepare_chat_with(engine.processor, messages, prepared)
    assert parts.tokens == whole.tokens
    assert [p.key for p in parts.pictures] == [p.key for p in whole.pictures]


def test_a_prompt_is_a_text_or_tokens(served):
    async def run(prompt):
        return await answer(
            served, Work("a", Options(max_tokens=4, ignore_eos=True), prompt=prompt)
        )

    _, pieces = asyncio.run(run("<|image|> is plain text<|eot_id|>"))
    assert pieces[-1].usage.completion_tokens == 4 and pieces[-1].usage.prompt_tokens > 12
    _, pieces = asyncio.run(run((438, 5, 6)))
    assert pieces[-1].usage.prompt_tokens == 3


@pytest.mark.parametrize(
    ("change", "words", "param"),
    [
        ({"pictures": ()}, "1 image tokens and 0 pictures", None),
        (
            {"pictures": (Picture(b"\x89PNG\r\n\x1a\n", "messages[0].content[0]"),)},
            r"messages\[0\]\.content\[0\]: ",
            "messages[0].content[0]",
        ),
        ({"messages": ({"role": "nobody", "content": "a"},)}, "role", "messages"),
        ({"messages": None, "prompt": (5, 10**6)}, "the prompt has the token 1000000", "prompt"),
        (
            {"options": Options(max_tokens=0)},
            "max_tokens must be an integer of at least 1",
            "max_tokens",
        ),
    ],
)
def test_what_is_wrong_is_said_in_words(served, change, words, param):
    request = Work(**{**vars(work()), **change})
    if "messages" in change:
        request = Work(**{**vars(request), "pictures": ()})
    with pytest.raises(Refused, match=words) as refused:
        asyncio.run(answer(served, request))
    assert refused.value.param == param


def test_what_python_says_of_a_template_is_not_told(engine, served, monkeypatch):
    request = Work("a", Options(), ({"role": "user", "content": "a"},))
    for template, words in (
        ("{{ messages[0].a.b }}", "the chat template cannot write these messages$"),
        ("{{ messages[0] + 1 }}", "the chat template cannot write these messages$"),
        ("{{ raise_exception('no') }}", "the chat template refuses the messages: no$"),
    ):
        monkeypatch.setattr(engine.processor, "chat_template", template)
        with pytest.raises(Refused, match=words):
            asyncio.run(answer(served, request))


def test_readers_that_go_away_end_their_requests(engine, served):
    async def run():
        for leave in ("close", "forget", "cancel", "key"):
            request = work(max_tokens=1500, ignore_eos=True)
            pieces = await served.submit(request)
            await pieces.__anext__()
            if leave == "close":
                await pieces.aclose()
            elif leave == "key":
                served.cancel(request.key)
            elif leave == "cancel":
                task = asyncio.ensure_future(collected(pieces))
                await asyncio.sleep(0.01)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
            del pieces
            while engine.loop.num_running:
                await asyncio.sleep(0.01)

    async def collected(pieces):
        return [piece async for piece in pieces]

    asyncio.run(asyncio.wait_for(run(), 300))


def test_a_request_may_be_cancelled_before_it_is_queued(engine, served):
    async def run():
        request = work()
        task = asyncio.ensure_future(served.submit(request))
        await asyncio.sleep(0)
        served.cancel(request.key)
        with pytest.raises(Unavailable, match="cancelled"):
            await task

    steps = engine.stats().counters["steps"]
    asyncio.run(run())
    assert engine.stats().counters["steps"] == steps


def test_an_event_loop_that_is_closed_ends_its_requests(engine, served):
    async def leave():
        pieces.append(await served.submit(work(max_tokens=1500, ignore_eos=True)))

    pieces: list = []
    asyncio.run(leave())
    wait(lambda: not engine.loop.num_running and not engine.loop.num_waiting)
    assert engine.loop.state == "ready"


def test_the_end_of_an_engine_is_told():
    model = mllama.MllamaForConditionalGeneration.from_pretrained(checkpoint_path())
    processor = mllama.MllamaProcessor.from_pretrained(checkpoint_path())
    engine = engine_of(model, processor, num_pages=100, num_slots=16)
    OnOrder(engine)
    served = AsyncEngine(engine)

    async def run():
        pieces = await served.submit(work(max_tokens=1500, ignore_eos=True))
        await pieces.__anext__()
        await asyncio.to_thread(engine.close)
        assert served.health() == "dead"
        with pytest.raises(WorkFailed, match="the engine has ended"):
            async for _ in pieces:
                pass
        with pytest.raises(Unavailable, match="dead"):
            await served.submit(work())

    asyncio.run(asyncio.wait_for(run(), 300))
    served.close()
