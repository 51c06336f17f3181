"""The processor against `transformers`: same ids, masks and images, and calls that cannot work."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from processor_helpers import BOS, IMAGE, WORDS, assert_same, mllama_processing, pair, random_image

from mllama.processing.image_spans import cross_attention_mask, image_spans
from mllama.processing.images import ImageOpenError


def random_prompt(rng, images):
    """Words with `images` image tokens anywhere: in front, inside, adjacent, or at the end."""
    words = [rng.choice(WORDS.split()) for _ in range(rng.randint(1, 25))]
    for _ in range(images):
        words.insert(rng.choice([0, rng.randint(0, len(words)), len(words)]), IMAGE)
    text = (" " if rng.random() < 0.5 else "").join(words)
    return BOS + text if rng.random() < 0.3 else text


@pytest.mark.parametrize("tensors", ["pt", "np", None])
def test_random_batches_equal_transformers(tensors):
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    ours, theirs = pair()
    for _ in range(40):
        counts = [rng.randint(1, 3) for _ in range(rng.randint(1, 4))]
        texts = [random_prompt(rng, n) for n in counts]
        images = [[random_image(rng) for _ in range(n)] for n in counts]
        options = {
            "padding": rng.choice([True, "longest"]),
            "padding_side": rng.choice(["left", "right"]),
            "pad_to_multiple_of": rng.choice([None, 8]),
            "return_tensors": tensors,
        }
        if rng.random() < 0.3:
            options.update(padding="max_length", max_length=256, pad_to_multiple_of=None)
        assert_same(ours(images, texts, **options), theirs(images, texts, **options))


def test_single_inputs_and_defaults_equal_transformers():
    ours, theirs = pair()
    image, text = random_image(random.Random(1)), f"{IMAGE}what is it?"
    for call in (
        {"images": image, "text": text},
        {"images": [image], "text": [text]},
        {"images": image},
        {"text": "what is it?", "return_tensors": "pt"},
        {"text": ["what", "what is it"], "padding": True, "return_tensors": "pt"},
        {"text": ["what", "what is it"]},
        {"images": [[image, image]], "text": f"{IMAGE}{IMAGE} x", "max_length": 9},
        {"images": image, "text": text, "do_rescale": False, "images_kwargs": {"resample": 0}},
        {"images": image, "text": text, "text_kwargs": {"padding": "max_length", "max_length": 40}},
    ):
        assert_same(ours(**call), theirs(**call))
    assert set(ours.model_input_names) == set(theirs.model_input_names)


@pytest.mark.parametrize("side", ["left", "right"])
def test_mixed_batch(side):
    """Rows without, with one and with two images; `transformers` 5.17 refuses such a batch, so
    the parts it is made of are the reference."""
    rng = random.Random(2)
    ours, theirs = pair()
    a, b, c = (random_image(rng) for _ in range(3))
    images = [[a], [], [b, c]]
    texts = [f"{IMAGE}what is it?", "the red circle and a blue square", f"{IMAGE}a {IMAGE}{BOS}b c"]
    got = ours(images, texts, padding=True, padding_side=side, return_tensors="pt")
    parts = theirs.image_processor(images, return_tensors="pt")
    for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"):
        assert torch.equal(got[name], parts[name])
    rows = got["input_ids"].tolist()
    want = mllama_processing.convert_sparse_cross_attention_mask_to_dense(
        [mllama_processing.get_cross_attention_token_mask(r, ours.image_token_id) for r in rows],
        parts["num_tiles"],
        4,
        len(rows[0]),
    )
    assert got["cross_attention_mask"].dtype == torch.int64
    assert np.array_equal(got["cross_attention_mask"].numpy(), want)
    assert not got["cross_attention_mask"][1].any()
    assert got["attention_mask"].sum(1).tolist() == [
        len(ours.tokenizer.encode(ours.with_bos(t))) for t in texts
    ]


def test_batch_whose_rows_all_lack_images_is_text_alone():
    ours, theirs = pair()
    got = ours([[], []], ["a", "b c"], padding=True, return_tensors="pt")
    assert_same(got, theirs(text=["a", "b c"], padding=True, return_tensors="pt"))


def test_masks_of_random_sequences_equal_transformers():
    rng = random.Random(4)
    for _ in range(500):
        ids = [rng.choice([7, 1, 2]) for _ in range(rng.randint(1, 12))]
        want = mllama_processing.get_cross_attention_token_mask(ids, 7)
        assert image_spans(ids, 7) == [(s, len(ids) if e == -1 else e) for s, e in want]
        tiles = [[rng.randint(1, 4) for _ in want]]
        dense = mllama_processing.convert_sparse_cross_attention_mask_to_dense(
            [want], tiles, 4, len(ids)
        )
        assert np.array_equal(cross_attention_mask([ids], tiles, 7, 4), dense)


@pytest.mark.parametrize(
    ("ids", "spans"),
    [
        ("I1I1", [(0, 2), (2, 4)]),
        ("II11II1", [(0, 4), (1, 4), (4, 7), (5, 7)]),
        ("1III1", [(1, 5), (2, 5), (3, 5)]),
        ("11", []),
        ("1I", [(1, 2)]),
    ],
)
def test_spans_of_known_sequences(ids, spans):
    assert image_spans([7 if c == "I" else 1 for c in ids], 7) == spans


def test_tile_slots_of_the_mask_follow_the_call():
    ours, _ = pair()
    got = ours(Image.new("RGB", (200, 20)), f"{IMAGE}x", max_image_tiles=2, return_tensors="pt")
    assert got.pixel_values.shape[2] == got.cross_attention_mask.shape[3] == 2


@pytest.mark.parametrize("adds_bos", [True, False])
def test_there_is_one_bos(adds_bos):
    ours, theirs = pair(adds_bos)
    image = random_image(random.Random(5))
    for text in (f"{IMAGE}what", f"{BOS}{IMAGE}what", f"{IMAGE}{BOS}what", f"a {IMAGE}"):
        got = ours(image, text, return_tensors="pt")
        bos = ours.tokenizer.bos_token_id
        assert (got.input_ids == bos).sum() == 1
        want = theirs(image, text, add_special_tokens=False, return_tensors="pt")
        assert_same(got, want)
        doubled = ours(image, text, add_special_tokens=True, return_tensors="pt")
        assert_same(doubled, theirs(image, text, return_tensors="pt"))
    assert ours(text="what").input_ids[0].count(ours.tokenizer.bos_token_id) == 1


class Untouchable:
    """An image that must not be opened."""

    def read(self, size):
        raise AssertionError("opened before the checks")


@pytest.mark.parametrize(
    ("images", "text", "message"),
    [
        (None, None, "give images, text or both"),
        (None, f"{IMAGE}x", r"the texts have \[1\] image tokens, and no image was given"),
        (Untouchable(), "x", r"have \[0\] image tokens .* their images number \[1\]"),
        ([[Untouchable()], []], [f"{IMAGE}x"], r"\[1\] image tokens .* number \[1, 0\]"),
        ([[], [Untouchable()]], [f"{IMAGE}x", "y"], r"\[1, 0\] .* \[0, 1\]; pass one list"),
        ([Untouchable(), Untouchable()], [f"{IMAGE}x"] * 2, r"\[1, 1\] .* \[2\]; pass one list"),
        ([[]], f"{IMAGE}x", r"\[1\] image tokens .* number \[0\]"),
        (Untouchable(), "xyz " * 30 + IMAGE, "text.0. has 1 image tokens and its ids have 0"),
    ],
)
def test_counts_that_do_not_agree(images, text, message):
    ours, _ = pair()
    with pytest.raises(ValueError, match=message):
        ours(images, text, truncation=True, max_length=8)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ({"text": "x", "pading": True}, TypeError, "unknown option 'pading'; there are add_spec"),
        ({"text": "x", "text_kwargs": {"size": 1}}, TypeError, "unknown option 'size' in text_kw"),
        (
            {"text": "x", "padding": True, "text_kwargs": {"padding": True}},
            TypeError,
            "padding was given twice",
        ),
        ({"text": 3}, TypeError, "not iterable"),
        ({"text": ["a", 3]}, TypeError, r"text\[1\] must be a string, got int"),
        ({"text": []}, ValueError, "text is an empty list"),
        ({"text": "x", "return_tensors": "tf"}, ValueError, "return_tensors must be .* got 'tf'"),
        ({"text": ["x", "x y"], "return_tensors": "pt"}, ValueError, "pass padding=True"),
        ({"text": "x", "padding": "most"}, ValueError, "padding must be .* got 'most'"),
        ({"text": "x", "truncation": "all"}, ValueError, "truncation must be .* got 'all'"),
        ({"text": "x", "padding": True, "padding_side": "up"}, ValueError, "padding_side must be"),
        ({"images": "http://h/x.png"}, ImageOpenError, "nothing is fetched"),
    ],
)
def test_calls_that_cannot_work(call, error, message):
    ours, _ = pair()
    with pytest.raises(error, match=message):
        ours(**call)


def test_batch_moves_and_casts():
    ours, _ = pair()
    batch = ours(random_image(random.Random(3)), f"{IMAGE}x", return_tensors="pt")
    assert batch.to(torch.bfloat16) is batch
    assert batch.pixel_values.dtype == torch.bfloat16 and batch.input_ids.dtype == torch.int64
    batch.to("meta", torch.float16)
    assert {v.device.type for v in batch.values()} == {"meta"}
    assert batch.pixel_values.dtype == torch.float16
    with pytest.raises(AttributeError, match="no entry 'labels'"):
        _ = batch.labels
