"""Streaming text: whole characters, stop strings across token boundaries, streamers."""

from __future__ import annotations

import io
import random

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers import TextStreamer as HfTextStreamer

from mllama.generation.stopping import (
    RowText,
    StopCondition,
    StopStrings,
    StopStringScanner,
    special_tokens,
)
from mllama.generation.streaming import IncrementalDetokenizer, TextStreamer, make_decoder
from mllama.processing.tokenizer import MllamaTokenizer

TEXTS = [
    "plain words, then a full stop.",
    "naïve café — 日本語と한국어, Ελληνικά",
    "👩‍👩‍👧‍👦 family, 🇨🇭 flag, e\u0301 combining",
    "\n\n  spaces\tand\r\nlines \n",
]


def byte_tokenizer(special: tuple[str, ...] = ("<|end|>",)) -> Tokenizer:
    """A byte-level tokenizer without merges: every token is one byte, so each character of more
    than one byte is split over tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: index for index, symbol in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in special])
    return tokenizer


def byte_ids(tokenizer: Tokenizer, data: bytes) -> list[int]:
    """The tokens of any bytes, valid text or not."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    by_byte: dict[int, int] = {}
    for index, symbol in enumerate(symbols):
        code = ord(symbol)
        by_byte[code if code < 256 else -1 - index] = index
    # the 68 bytes that are no printable Latin-1 character are mapped to 256, 257, ... in order
    unprintable = [b for b in range(256) if b not in by_byte]
    for byte, index in zip(unprintable, (i for i, s in enumerate(symbols) if ord(s) >= 256)):
        by_byte[byte] = index
    return [by_byte[b] for b in data]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_add_up_and_are_whole_characters(text: str) -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode(text).ids
    assert len(ids) == len(text.encode()) and ids == byte_ids(tokenizer, text.encode())
    detokenizer = IncrementalDetokenizer(make_decoder(tokenizer))
    seen = ""
    for count, token in enumerate(ids, 1):
        seen += detokenizer.push(token)
        complete = text.encode()[:count].decode(errors="ignore")
        assert seen == complete, "a character must come out with its last byte, not before or after"
    assert detokenizer.flush() == "" and seen == text


@pytest.mark.parametrize("seed", range(3))
def test_random_bytes_and_long_streams(seed: int) -> None:
    """Invalid bytes, special tokens in between and many windows: the sum is the whole decoding."""
    print(f"seed {seed}")
    rng = random.Random(seed)
    tokenizer = byte_tokenizer()
    data = b"".join(
        rng.choice([rng.choice(TEXTS).encode(), bytes([rng.randrange(256)]), b"\xf0\x9f\x98"])
        for _ in range(40)
    )
    ids = byte_ids(tokenizer, data)
    for _ in range(10):
        ids.insert(rng.randrange(len(ids)), tokenizer.token_to_id("<|end|>"))
    decode = make_decoder(tokenizer)
    detokenizer = IncrementalDetokenizer(decode)
    pieces = [detokenizer.push(token) for token in ids]
    assert "".join(pieces) + detokenizer.flush() == decode(ids)
    assert detokenizer.push(ids[0]) + detokenizer.flush() == decode(ids[:1]), "a new text begins"


def test_an_endless_run_of_invalid_bytes_is_not_held_back() -> None:
    tokenizer = byte_tokenizer()
    calls: list[int] = []
    decode = make_decoder(tokenizer)

    def counted(ids: list[int]) -> str:
        calls.append(len(ids))
        return decode(ids)

    detokenizer = IncrementalDetokenizer(counted)
    emitted = sum(len(detokenizer.push(token)) for token in byte_ids(tokenizer, b"\xff" * 500))
    assert 497 <= emitted <= 500
    assert max(calls) <= 64, "the cost per token must not grow with the text"


def test_byte_fallback_decoders_do_not_leak_half_characters() -> None:
    vocab = {"<unk>": 0, "a": 1, **{f"<0x{byte:02X}>": 2 + byte for byte in range(256)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    detokenizer = IncrementalDetokenizer(make_decoder(tokenizer))
    ids = [1, *(2 + byte for byte in "😀".encode()), 1]
    assert [detokenizer.push(token) for token in ids] == ["a", "", "", "", "😀", "a"]


def test_decoders_of_every_kind_agree() -> None:
    tokenizer = byte_tokenizer()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")

    class Processor:
        pass

    processor = Processor()
    processor.tokenizer = tokenizer
    ids = [*tokenizer.encode("Hello , world .").ids, tokenizer.token_to_id("<|end|>")]
    ours = MllamaTokenizer(tokenizer, {"eos_token": "<|end|>"})
    for kind in (tokenizer, wrapped, processor, ours):
        assert make_decoder(kind)(ids) == "Hello , world ."
        assert make_decoder(kind, skip_special_tokens=False)(ids) == "Hello , world .<|end|>"
        assert special_tokens(kind) == {"<|end|>": tokenizer.token_to_id("<|end|>")}
    with pytest.raises(TypeError, match="processor or have a decode method, got int"):
        make_decoder(3)


def scan(pieces: list[str], stop_strings: list[str]) -> tuple[str, bool]:
    scanner = StopStringScanner(StopStrings(stop_strings))
    text = "".join(scanner.push(piece) for piece in pieces) + scanner.flush()
    return text, scanner.stopped


@pytest.mark.parametrize(
    ("text", "stop_strings", "expected"),
    [
        ("one STOP two", ["STOP"], "one "),
        ("one STO", ["STOP"], "one STO"),
        ("SSTSTOP", ["STOP"], "SST"),
        ("aaab", ["aab"], "a"),
        ("ababac", ["abac"], "ab"),
        ("abc", ["abcd", "bc"], "a"),  # complete first
        ("xab", ["b", "ab"], "x"),  # complete together: the longest
        ("nothing", ["zzz"], "nothing"),
        ("STOP", ["STOP"], ""),
        ("a\n\nb", ["\n\n"], "a"),
        ("日本語。次", ["。"], "日本語"),
    ],
)
def test_stop_strings_however_the_text_is_cut(
    text: str, stop_strings: list[str], expected: str
) -> None:
    stopped = expected != text
    assert scan([text], stop_strings) == (expected, stopped)
    assert scan(list(text), stop_strings) == (expected, stopped)
    for cut in range(len(text)):
        assert scan([text[:cut], text[cut:]], stop_strings) == (expected, stopped)


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    scanner = StopStringScanner(StopStrings(["STOP"]))
    assert scanner.push("go S") == "go "
    assert scanner.push("T") == ""
    assert scanner.push("ART S") == "START "
    assert scanner.flush() == "S"


@pytest.mark.parametrize("seed", range(3))
def test_stop_strings_against_a_plain_search(seed: int) -> None:
    print(f"seed {seed}")
    rng = random.Random(seed)
    for _ in range(300):
        text = "".join(rng.choices("abc", k=rng.randrange(30)))
        stops = [
            "".join(rng.choices("abc", k=rng.randrange(1, 5))) for _ in range(rng.randrange(4))
        ]
        ends = [end for end in range(len(text) + 1) if text[:end].endswith(tuple(stops))]
        expected = text
        if ends and stops:
            longest = max(len(s) for s in stops if text[: ends[0]].endswith(s))
            expected = text[: ends[0] - longest]
        pieces, rest = [], text
        while rest:
            size = rng.randrange(1, 6)
            pieces.append(rest[:size])
            rest = rest[size:]
        assert scan(pieces, stops)[0] == expected


def test_stop_string_within_characters_of_several_tokens() -> None:
    tokenizer = byte_tokenizer()
    row = RowText(tokenizer, StopStrings(["語。"]))
    text = "".join(row.push(token) for token in tokenizer.encode("日本語。次").ids)
    assert row.stopped and text + row.flush() == "日本"


def test_row_flushes_an_unfinished_stop_string_and_an_unfinished_character() -> None:
    tokenizer = byte_tokenizer()
    row = RowText(tokenizer, StopStrings(["END"]))
    ids = [*tokenizer.encode("the EN").ids, *byte_ids(tokenizer, "é".encode()[:1])]
    text = "".join(row.push(token) for token in ids)
    assert text == "the " and row.flush() == "EN\N{REPLACEMENT CHARACTER}" and not row.stopped


def test_stop_condition() -> None:
    tokenizer = byte_tokenizer(("<|end|>", "<|turn|>"))
    end, turn = (tokenizer.token_to_id(text) for text in ("<|end|>", "<|turn|>"))
    a, b = tokenizer.encode("ab").ids
    condition = StopCondition(3, [end], ["ab", "<|turn|>"], tokenizer)
    assert [condition.push(row, a) for row in range(3)] == ["", "", ""]
    assert condition.push(0, b) == "" and condition.finished == [True, False, False]
    assert condition.push(1, end) == "" and condition.finished == [True, True, False]
    assert condition.push(2, a) == "a"
    assert condition.push(2, turn) == "" and condition.finished == [True, True, True]
    assert condition.text[2].flush() == "a"
    tokens_only = StopCondition(1, [b])
    assert tokens_only.push(0, a) == "" and tokens_only.finished == [False]
    assert tokens_only.push(0, b) == "" and tokens_only.finished == [True]


@pytest.mark.parametrize("skip_prompt", [False, True])
def test_text_streamer_writes_what_transformers_writes(
    skip_prompt: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = byte_tokenizer()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    prompt, answer = (tokenizer.encode(text).ids for text in ("Frage: ", "schöne Grüße 😀"))
    ours_file = io.StringIO()
    theirs = HfTextStreamer(wrapped, skip_prompt=skip_prompt)
    for streamer in (TextStreamer(tokenizer, skip_prompt, file=ours_file), theirs):
        for _ in range(2):  # a streamer can be used again
            streamer.put(torch.tensor([prompt]))
            for token in answer:
                streamer.put(torch.tensor([token]))
            streamer.end()
    assert ours_file.getvalue() == capsys.readouterr().out
    assert ours_file.getvalue().startswith("schöne" if skip_prompt else "Frage: schöne")


def test_text_streamer_refuses_batches() -> None:
    with pytest.raises(ValueError, match="one sequence, got a batch of 2"):
        TextStreamer(byte_tokenizer()).put(torch.zeros(2, 3, dtype=torch.int64))
