"""Options of generate that nobody means, refused before anything is allocated; many stop strings."""

from __future__ import annotations

import random
import re
import time

import pytest
import torch
from hostile_folders import outcomes, refused

from mllama import MllamaCache
from mllama.config import MllamaTextConfig
from mllama.generation.fields import OPTION_FIELDS
from mllama.generation.processors import _no_bad_words
from mllama.generation.stopping import StopStrings, StopStringScanner

_SETUP = """
from mllama import MllamaProcessor
processor = MllamaProcessor.from_pretrained(FOLDER)
inputs = dict(processor(text="hi", return_tensors="pt"))
model = load()
def stored(**entries):
    (FOLDER / "generation_config.json").write_text(json.dumps(entries))
    fresh = load()
    case(str(entries)[:60], lambda: fresh.generate(**inputs, **(
        {"tokenizer": processor} if "stop_strings" in entries else {})))
def given(**options):
    case(next(iter(options)), lambda: model.generate(**inputs, **options))
"""


def test_every_stored_option_of_another_kind() -> None:
    names = sorted(OPTION_FIELDS)
    values = "[float('nan'), -2, 1.5, 'x', [[1]], {'a': 1}, 10**400, [None], [2**40], '']"
    found = outcomes(
        _SETUP
        + f"""
for name in {names!r}:
    for value in {values}:
        if not (name == "stop_strings" and value == "x"):
            stored(**{{name: value}})
""",
        seconds=180,
    )
    taken = [outcome for outcome in found if not outcome.kind]
    assert {outcome.name for outcome in taken} == {
        "{'temperature': 1.5}",
        "{'repetition_penalty': 1.5}",
        "{'bad_words_ids': [[1]]}",
    }
    refused([outcome for outcome in found if outcome.kind], 10 * len(names) - 4, built=True)
    for outcome in found:
        assert not outcome.kind or outcome.name.split("'")[1] in outcome.text, outcome


def test_what_does_not_fit_is_refused_with_the_numbers() -> None:
    found = outcomes(
        _SETUP.replace("model = load()", "")
        + """
config(text__max_position_embeddings=10**12)
model = load()
given(max_new_tokens=10**11)
given(max_length=10**11)
given(max_new_tokens=2**40)
stored(max_new_tokens=10**11)
case("cache", lambda: model.new_cache(1, 10**9))
case("rows", lambda: model.new_cache(2**30, 64))
case("pages", lambda: model.new_cache(2**20, 2**30))
case("stream", lambda: model.stream(**inputs, tokenizer=processor, max_new_tokens=10**11))
case("many", lambda: model.generate(**{k: v.expand(4096, -1) for k, v in inputs.items()},
                                    pad_token_id=0, max_new_tokens=10**7))
case("copies", lambda: model.generate(**inputs, do_sample=True, num_return_sequences=16_000,
                                      max_new_tokens=10**6))
""",
        peak=600,
    )
    refused(found, 10)
    for outcome in found:
        assert re.search(
            r"takes [\d.]+ GB, cpu has [\d.]+ GB free|32 bits|at most|does not fit: the prompt",
            outcome.text,
        ), outcome


def test_options_of_a_call_out_of_all_bounds() -> None:
    found = outcomes(
        _SETUP
        + """
given(max_new_tokens=10**12)
given(max_length=10**12)
given(max_new_tokens=10**5000)
given(num_return_sequences=10**6, do_sample=True)
given(num_return_sequences=16_384, do_sample=True, max_new_tokens=10**9)
given(top_k=10**400, do_sample=True)
given(temperature=1e-300, do_sample=True)
given(temperature=10**400, do_sample=True)
given(repetition_penalty=1e300)
given(no_repeat_ngram_size=10**6)
given(eos_token_id=list(range(10**6)))
given(pad_token_id=2**63)
given(bad_words_ids=[[1]] * 10**6)
given(bad_words_ids=[[1] * 10**6])
given(suppress_tokens=list(range(10**6)))
given(forced_decoder_ids=[[1, 2]] * 10**6)
given(sequence_bias={(1,): 2.0})
given(stop_strings=[str(i) for i in range(10**5)], tokenizer=processor)
given(stop_strings=["x" * 10**7], tokenizer=processor)
given(stop_strings=[f"{i}" * 200 for i in range(900)], tokenizer=processor)
given(**{f"option_{i}": 1 for i in range(10**5)})
given(generation_config={f"option_{i}": 1 for i in range(10**5)})
nested = []
for _ in range(10**5):
    nested = [nested]
given(bad_words_ids=nested)
given(suppress_tokens=nested)
given(seed=[1] * 10**6)
case("batch", lambda: model.generate(inputs["input_ids"].expand(10**6, -1), pad_token_id=0))
case("another cache", lambda: model.generate(**inputs, past_key_values=__import__("mllama").MllamaCache(
    MllamaTextConfig(), 1, dtype=torch.float32, device="cpu")))
""",
        seconds=90,
    )
    refused(found, 27, built=True)


def test_all_options_in_one_error() -> None:
    (found,) = outcomes(
        _SETUP
        + "given(max_new_tokens=-1, top_k='x', temperature=float('nan'), num_beams=4, max_time=3)"
    )
    for name in ("max_new_tokens", "top_k", "temperature", "num_beams", "max_time", "5 options"):
        assert name in found.text


def test_a_cache_takes_only_sizes() -> None:
    for options in (
        {"batch_size": 0},
        {"batch_size": True},
        {"batch_size": 1.0},
        {"batch_size": 2**31},
    ):
        with pytest.raises(ValueError, match="batch_size must be an integer"):
            MllamaCache(MllamaTextConfig(), **options, dtype=torch.float32, device="cpu")
    for tokens in (0, -1, "x", 10**400):
        with pytest.raises(ValueError, match="max_tokens must be an integer"):
            MllamaCache(MllamaTextConfig(), 1, dtype=torch.float32, device="cpu", max_tokens=tokens)


class _Plain:
    """What a scanner is to do, said as slowly as can be: the text so far is searched anew."""

    def __init__(self, strings: list[str]) -> None:
        self._strings, self._text, self._given, self.stopped = strings, "", 0, False

    def push(self, piece: str) -> str:
        for character in piece:
            if self.stopped:
                break
            self._text += character
            whole = [s for s in self._strings if self._text.endswith(s)]
            if whole:
                self.stopped = True
                return self._take(len(self._text) - max(map(len, whole)))
        if self.stopped:
            return ""
        held = (n for n in range(len(self._text), 0, -1) if self._begins(self._text[-n:]))
        return self._take(len(self._text) - next(held, 0))

    def _begins(self, end: str) -> bool:
        return any(s.startswith(end) and s != end for s in self._strings)

    def _take(self, end: int) -> str:
        text, self._given = self._text[self._given : end], max(self._given, end)
        return text

    def flush(self) -> str:
        return "" if self.stopped else self._take(len(self._text))


@pytest.mark.parametrize("seed", range(40))
def test_many_stop_strings_are_found_as_one_by_one(seed: int) -> None:
    rng = random.Random(seed)
    letters = "ab" if seed % 2 else "abcé語"

    def word(longest: int) -> str:
        return "".join(rng.choices(letters, k=rng.randint(1, longest)))

    strings = list({word(7) for _ in range(rng.randint(0, 30))})
    if seed % 3:
        strings = [s for s in strings if len(s) > 3]
    ours, plain = StopStringScanner(StopStrings(strings)), _Plain(strings)
    for _ in range(60):
        piece = "".join(rng.choices(letters, k=rng.randint(0, 5)))
        assert ours.push(piece) == plain.push(piece)
        assert ours.stopped == plain.stopped
    assert ours.flush() == plain.flush()


def test_the_largest_set_of_stop_strings_reads_a_long_text_in_one_pass() -> None:
    """All of them nearly begin at every character, which is the worst there is."""
    strings = ["a" * n + "b" for n in range(1, 360)] + ["a" * 600 + f"{i}" for i in range(1)]
    start = time.process_time()
    compiled = StopStrings(strings)
    scanner = StopStringScanner(compiled)
    passed = sum(len(scanner.push("a" * 7)) for _ in range(30_000))
    assert passed + len(scanner.flush()) == 7 * 30_000 and not scanner.stopped
    assert time.process_time() - start < 5


def test_generation_with_many_stop_strings_ends_as_with_one() -> None:
    found = outcomes(
        _SETUP
        + """
def run(**options):
    options = {"eos_token_id": [], "pad_token_id": 0, **options}
    tokens = model.generate(**inputs, max_new_tokens=40, do_sample=False, **options)
    return tokens[0, inputs["input_ids"].shape[1]:].tolist()
free = run()
text = processor.decode(free, skip_special_tokens=True)
stop = text[len(text) // 2 :][:3]
many = [f"no such text {i}" for i in range(999)] + [stop]
def same():
    one = run(stop_strings=stop, tokenizer=processor)
    assert len(one) < len(free), (one, free)
    assert run(stop_strings=many, tokenizer=processor) == one
    assert run(eos_token_id=[free[3], *range(10**4, 10**4 + 1000)]) == free[:1 + free.index(free[3])]
case("same", same)
"""
    )
    assert [outcome.kind for outcome in found] == [""], found


@pytest.mark.parametrize("seed", range(5))
def test_bad_words_are_looked_up_as_one_by_one(seed: int) -> None:
    rng = random.Random(seed)
    words = [tuple(rng.choices(range(6), k=rng.randint(1, 4))) for _ in range(30)]
    ids = torch.tensor([rng.choices(range(6), k=5) for _ in range(4)])
    got = _no_bad_words(words)(ids, torch.zeros(4, 6)) == -torch.inf
    for row, text in enumerate(ids.tolist()):
        banned = {w[-1] for w in words if len(w) == 1 or text[-len(w) + 1 :] == list(w[:-1])}
        assert set(got[row].nonzero().flatten().tolist()) == banned
