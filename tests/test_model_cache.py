"""Forwards with a cache equal one forward without, however the text is cut."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from model_helpers import BACKENDS, Prompt, Shape, assert_close, batch_of, hf_model, our_model, to
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import mllama
from mllama.cache import PAGE_SIZE

pytestmark = pytest.mark.filterwarnings("ignore:`hidden_state` is deprecated")
IMAGES = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
PROMPTS = [Prompt(80, (4,), (2,)), Prompt(50, (6, 30), (6, 1)), Prompt(33)]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> tuple[str, str]:
    return request.param


def _in_chunks(
    model: mllama.MllamaForConditionalGeneration,
    batch: dict[str, Tensor],
    cuts: list[int],
    cache: mllama.MllamaCache | None = None,
    whole_masks: bool = True,
) -> Tensor:
    """Logits of the batch, forwarded from cut to cut; images go with the first chunk."""
    length = batch["input_ids"].shape[1]
    logits = []
    for begin, end in zip([0, *cuts], [*cuts, length]):
        chunk: dict[str, Any] = {"input_ids": batch["input_ids"][:, begin:end]}
        chunk["attention_mask"] = batch["attention_mask"][:, (0 if whole_masks else begin) : end]
        shown = batch["cross_attention_mask"]
        chunk["cross_attention_mask"] = shown if whole_masks else shown[:, begin:end]
        if begin == 0:
            chunk |= {name: batch[name] for name in IMAGES}
        output = model(**chunk, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits.append(output.logits)
    return torch.cat(logits, 1)


@pytest.mark.parametrize("semantics", ["transformers", "meta"])
@pytest.mark.parametrize("padding", ["left", "right", "holes"])
def test_chunks_equal_one_forward(
    padding: str, semantics: str, seed: int, backend: tuple[str, str]
) -> None:
    rng = random.Random(seed)
    shape = Shape()
    model = our_model(shape, hf_model(shape), backend, semantics)
    batch = to(batch_of(shape, PROMPTS, padding), backend[1])
    where = batch["attention_mask"]
    with torch.no_grad():
        expected = model(**batch, use_cache=False).logits
        cuts = sorted(rng.sample(range(1, 80), rng.randint(1, 5)))
        print(f"seed {seed}, cuts {cuts}")
        assert_close(_in_chunks(model, batch, cuts), expected, where)
        one_by_one = [20, *range(70, 80)]
        fixed = mllama.MllamaCache(
            model.config.text_config, 3, dtype=torch.float32, device=backend[1], max_tokens=80
        )
        assert_close(_in_chunks(model, batch, one_by_one, fixed), expected, where)


def test_masks_of_the_new_rows_alone_are_enough(backend: tuple[str, str]) -> None:
    shape = Shape()
    model = our_model(shape, hf_model(shape), backend)
    batch = to(batch_of(shape, [Prompt(20, (4,), (2,)), Prompt(15, (0,), (3,))]), backend[1])
    with torch.no_grad():
        expected = model(**batch, use_cache=False).logits
        actual = _in_chunks(model, batch, [10, 19], whole_masks=False)
    assert_close(actual, expected, batch["attention_mask"])


def test_decode_equals_transformers_generate_loop(backend: tuple[str, str]) -> None:
    """Left padding, the last mask row repeated, positions counted from the first real token."""
    shape = Shape()
    hf = hf_model(shape)
    model = our_model(shape, hf, backend)
    batch = batch_of(shape, [Prompt(44, (4,), (2,)), Prompt(50, (6, 11), (6, 1))])
    with torch.no_grad():  # from the first page into the second
        expected = hf.generate(
            **batch, max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        mask = batch["attention_mask"]
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        inputs = to({**batch, "position_ids": positions}, backend[1])
        output = model(**inputs, use_cache=True, logits_to_keep=1)
        tokens = [output.logits[:, -1:].argmax(-1)]
        while len(tokens) < 24:
            output = model(tokens[-1], past_key_values=output.past_key_values)
            tokens.append(output.logits.argmax(-1))
    assert torch.cat([batch["input_ids"], torch.cat(tokens, 1).cpu()], 1).equal(expected)


@pytest.mark.parametrize("semantics", ["transformers", "meta"])
def test_second_image_in_a_later_turn(semantics: str, backend: tuple[str, str]) -> None:
    """Under "meta" equal to the joint forward; under "transformers" equal to `transformers`' own turns."""
    shape = Shape()
    hf = hf_model(shape)
    model = our_model(shape, hf, backend, semantics)
    batch = batch_of(shape, [Prompt(30, (4, 18), (2, 6)), Prompt(30, (0, 16), (5, 1))])
    turns: list[dict[str, Any]] = []
    for index, (begin, end) in enumerate([(0, 15), (15, 30)]):
        turn = {name: batch[name][:, index : index + 1] for name in IMAGES}
        turn |= {"input_ids": batch["input_ids"][:, begin:end]}
        turn |= {"cross_attention_mask": batch["cross_attention_mask"][:, :end, : index + 1]}
        turns.append(turn)
    with torch.no_grad():
        if semantics == "meta":
            expected = model(**to(batch, backend[1]), use_cache=False).logits
        else:
            past, logits = None, []
            for turn in turns:
                output = hf(**turn, past_key_values=past, use_cache=True)
                past = output.past_key_values
                logits.append(output.logits)
            expected = torch.cat(logits, 1)
        cache, logits = None, []
        for turn in turns:
            output = model(**to(turn, backend[1]), past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            logits.append(output.logits)
        # The next token: as the last one under "transformers", blind after two images under "meta".
        new = torch.full((2, 1), 5)
        shown = batch["cross_attention_mask"]
        last = shown[:, -1:] * (semantics == "transformers")
        if semantics == "meta":
            batch |= {"input_ids": torch.cat([batch["input_ids"], new], 1)}
            batch |= {"attention_mask": torch.ones(2, 31)}
            batch |= {"cross_attention_mask": torch.cat([shown, last], 1)}
            next_expected = model(**to(batch, backend[1]), use_cache=False).logits[:, -1:]
        else:
            mask = torch.cat([shown, last], 1)
            next_expected = hf(new, cross_attention_mask=mask, past_key_values=past).logits
        next_actual = model(new.to(backend[1]), past_key_values=cache).logits
    assert_close(torch.cat(logits, 1), expected)
    assert_close(next_actual, next_expected)
    # Under "meta" only the tiles of the images are kept, not their padding.
    assert cache.num_tiles == 8
    assert cache.num_tiles_stored == (2 + 4 + 2 + 1 if semantics == "meta" else 16)


def test_image_after_turns_of_text(backend: tuple[str, str]) -> None:
    shape = Shape()
    model = our_model(shape, hf_model(shape), backend, "meta")
    batch = to(batch_of(shape, [Prompt(20, (12,), (6,))]), backend[1])
    with torch.no_grad():
        expected = model(**batch, use_cache=False).logits
        first = model(batch["input_ids"][:, :9], use_cache=True)
        rest = {name: batch[name] for name in (*IMAGES, "cross_attention_mask")}
        second = model(batch["input_ids"][:, 9:], past_key_values=first.past_key_values, **rest)
    assert_close(torch.cat([first.logits, second.logits], 1), expected)


def test_a_sequence_without_new_tokens_keeps_its_state(backend: tuple[str, str]) -> None:
    shape = Shape()
    model = our_model(shape, hf_model(shape), backend, "meta")
    batch = batch_of(shape, [Prompt(20, (4,), (2,)), Prompt(10, (2,), (3,))], "right")
    batch = to(batch, backend[1])
    new = torch.randint(3, shape.vocab, (2, 1), device=backend[1])
    one, two = (
        mllama.MllamaCache(model.config.text_config, 2, dtype=torch.float32, device=backend[1])
        for _ in range(2)
    )
    with torch.no_grad():
        model(**batch, past_key_values=one)
        _in_chunks(model, batch, [10], two)
        assert one.lengths.tolist() == two.lengths.tolist() == [20, 10]
        outputs = [model(new, past_key_values=cache).logits for cache in (one, two)]
    assert_close(outputs[1], outputs[0], rtol=1e-5)


def test_columns_of_nothing_but_padding(backend: tuple[str, str]) -> None:
    shape = Shape()
    model = our_model(shape, hf_model(shape), backend)
    batch = batch_of(shape, [Prompt(9, (4,), (2,)), Prompt(9, (1,), (3,))])
    wide = {
        "input_ids": F.pad(batch["input_ids"], (5, 0)),
        "attention_mask": F.pad(batch["attention_mask"], (5, 0)),
        "cross_attention_mask": F.pad(batch["cross_attention_mask"], (0, 0, 0, 0, 5, 0)),
        **{name: batch[name] for name in IMAGES},
    }
    with torch.no_grad():
        expected = model(**to(wide, backend[1]), use_cache=False).logits
        assert_close(_in_chunks(model, to(wide, backend[1]), [5]), expected)


def test_cross_keys_and_values_are_computed_once() -> None:
    shape = Shape()
    model = our_model(shape, hf_model(shape))
    batch = batch_of(shape, [Prompt(20, (4,), (2,))])
    calls = {"vision": 0, "keys": 0}

    def count(name: str) -> Any:
        def hook(*args: Any) -> None:
            calls[name] += 1

        return hook

    model.model.vision_model.transformer.register_forward_hook(count("vision"))
    for layer in model.model.language_model.layers:
        if hasattr(layer, "cross_attn"):
            layer.cross_attn.k_proj.register_forward_hook(count("keys"))
    with torch.no_grad():
        cache = model(**batch, use_cache=True).past_key_values
        for token in range(3, 6):
            model(torch.tensor([[token]]), past_key_values=cache)
        model(torch.randint(3, 90, (1, 7)), past_key_values=cache)
    assert calls == {"vision": 1, "keys": 2}


def test_room_grows_unless_it_is_fixed() -> None:
    shape = Shape()
    config = mllama.MllamaTextConfig(**shape.configs()["text_config"])
    cache = mllama.MllamaCache(config, 2, dtype=torch.float32, device="cpu")
    assert cache.capacity == 0
    cache.reserve(1)
    assert cache.capacity == PAGE_SIZE
    pages = cache.store.pages(0)[0]
    pages[cache.page_table[1, 0]] = 7.0
    cache.reserve(3 * PAGE_SIZE)
    assert cache.capacity == 3 * PAGE_SIZE
    assert cache.page_table.flatten().sort().values.tolist() == list(range(6))
    assert (cache.store.pages(0)[0][cache.page_table[1, 0]] == 7.0).all()
    fixed = mllama.MllamaCache(config, 2, dtype=torch.float32, device="cpu", max_tokens=100)
    assert fixed.capacity == 2 * PAGE_SIZE
    with pytest.raises(ValueError, match="max_tokens=100; it holds 0 and 101 more do not fit"):
        fixed.reserve(101)


def test_reset_makes_a_cache_new(backend: tuple[str, str]) -> None:
    shape = Shape()
    model = our_model(shape, hf_model(shape), backend)
    first = to(batch_of(shape, [Prompt(90, (4, 9), (2, 6))]), backend[1])
    second = to(batch_of(shape, [Prompt(20, (12,), (1,))]), backend[1])
    with torch.no_grad():
        expected = model(**second, use_cache=False).logits
        cache = model(**first, use_cache=True).past_key_values
        address = cache.store.pages(0)[0].data_ptr()
        cache.reset()
        actual = model(**second, past_key_values=cache).logits
    assert_close(actual, expected)
    assert cache.store.pages(0)[0].data_ptr() == address


class _NoHostReads(TorchDispatchMode):
    """Fails on anything that would make a GPU's host wait for a value or a data-dependent shape."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal"):
            raise AssertionError(f"{name} reads a value on the host")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("semantics", ["transformers", "meta"])
@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_decode_step_reads_nothing_on_the_host(semantics: str, backend: tuple[str, str]) -> None:
    """The reference ops are exempt: they walk over the sequences on the host."""
    shape = Shape()
    model = our_model(shape, hf_model(shape), backend, semantics)
    batch = to(batch_of(shape, [Prompt(20, (4,), (2,)), Prompt(14, (1, 5), (6, 1))]), backend[1])
    token = torch.full((2, 1), 5, device=backend[1])
    with torch.no_grad():
        cache = model(**batch, use_cache=True).past_key_values
        with pytest.raises(AssertionError, match="reads a value on the host"), _NoHostReads():
            model(**batch)  # a padded prompt is packed, once: the check itself works
        with _NoHostReads():
            model(token, past_key_values=cache)
            model(token, past_key_values=cache, position_ids=token)


def test_decode_step_keeps_every_address_and_shape() -> None:
    """What a CUDA graph needs: after the first step nothing is allocated anew or changes its size."""
    shape = Shape()
    model = our_model(shape, hf_model(shape))
    batch = batch_of(shape, [Prompt(20, (4,), (2,)), Prompt(14, (1,), (6,))])
    cache = mllama.MllamaCache(
        model.config.text_config, 2, dtype=torch.float32, device="cpu", max_tokens=64
    )

    def state() -> list[tuple[int, tuple[int, ...]]]:
        view = cache.visible_tiles.view
        tensors = [cache.lengths, cache.next_position, cache.page_table, cache.tile_table]
        tensors += [view.tile_mask, view.row_mask, *cache.store.pages(0), *cache.store.tiles(1)]
        return [(t.data_ptr(), tuple(t.shape)) for t in tensors]

    with torch.no_grad():
        model(**batch, past_key_values=cache)
        before = state()
        for token in range(3, 8):
            model(torch.full((2, 1), token), past_key_values=cache)
    assert state() == before
    assert cache.lengths.tolist() == [25, 19]
    assert cache.columns == 25
