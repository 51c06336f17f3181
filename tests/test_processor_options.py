"""Every option that `transformers` takes: honoured with its values, or refused by name."""

import inspect
import random

import numpy as np
import pytest
import torch
from processor_helpers import (
    BOS,
    CONVERSATIONS,
    IMAGE,
    IMAGE_OPTIONS,
    SPECIAL,
    TEMPLATE,
    assert_same,
    backend,
    mllama_processing,
    pair,
    pil,
    random_image,
    transformers,
)

from mllama.processing.batch_feature import convert_to_tensors
from mllama.processing.image_processor import MllamaImageProcessor
from mllama.processing.options import is_option
from mllama.processing.processor import MllamaProcessor
from mllama.processing.tokenizer import MllamaTokenizer

utils = pytest.importorskip("transformers.processing_utils")
# Values that ask for something, for options that we have no use for.
ASKING = {
    "text_pair": "x",
    "text_target": "x",
    "text_pair_target": "x",
    "max_target_length": 3,
    "tokenizer_kwargs": {"padding": True},
    "stride": 1,
    "is_split_into_words": True,
    "return_overflowing_tokens": True,
    "return_mm_token_type_ids": True,
    "return_text_replacement_offsets": True,
    "default_to_square": False,
    "crop_size": {"height": 3, "width": 3},
    "do_center_crop": True,
    "pad_size": {"height": 3, "width": 3},
    "data_format": "channels_last",
    "image_seq_length": 3,
    "videos": ["a.mp4"],
    "videos_kwargs": {"fps": 3},
    "audio": ["a.wav"],
    "audio_kwargs": {"sampling_rate": 3},
    "load_audio_from_video": True,
}
CHANGES_NOTHING = {"verbose", "disable_grouping"}
OURS = {"self", "kwargs", "text", "images", "return_tensors", "conversation"}


def names(function):
    return set(inspect.signature(function).parameters) - OURS


def options_of_transformers():
    found = set(utils.TextKwargs.__annotations__) | set(utils.ImagesKwargs.__annotations__)
    found |= set(pil.MllamaImageProcessorPil.valid_kwargs.__annotations__)
    found |= names(transformers.PreTrainedTokenizerFast.__call__)
    found |= names(utils.ProcessorMixin.__call__) | {"videos_kwargs", "audio_kwargs"}
    return sorted(found - {"return_tensors"})


@pytest.mark.parametrize("name", options_of_transformers())
def test_every_option_of_transformers_is_honoured_or_refused(name):
    ours, _ = pair()
    assert is_option(name)
    if name in CHANGES_NOTHING:
        assert ours(text="x", **{name: True}).input_ids == ours(text="x").input_ids
    elif name in ASKING:
        with pytest.raises(ValueError, match=f"{name}=.* is not supported here"):
            ours(text="x", **{name: ASKING[name]})
        for group in ("text_kwargs", "images_kwargs", "common_kwargs"):
            with pytest.raises(ValueError, match=f"{name}=.* is not supported here"):
                ours(text="x", **{group: {name: ASKING[name]}})
    assert ours(text="x", **{name: None}).input_ids == ours(text="x").input_ids


def test_every_argument_of_apply_chat_template_is_known():
    taken = names(MllamaProcessor.apply_chat_template)
    for name in names(utils.ProcessorMixin.apply_chat_template):
        assert name in taken or is_option(name), name
    ours, _ = pair()
    with pytest.raises(ValueError, match="load_audio_from_video=True is not supported"):
        ours.apply_chat_template(CONVERSATIONS[0], tokenize=True, load_audio_from_video=True)


def test_neutral_values_change_nothing():
    ours, _ = pair()
    image, want = random_image(random.Random(1)), None
    neutral = {
        "stride": 0,
        "is_split_into_words": False,
        "data_format": transformers.image_utils.ChannelDimension.FIRST,
        "do_center_crop": False,
        "return_overflowing_tokens": False,
        "verbose": False,
        "device": "cpu",
        "videos": None,
        "audio_kwargs": {},
    }
    want = ours(image, IMAGE, return_tensors="pt")
    assert_same(ours(image, IMAGE, return_tensors="pt", **neutral), want)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("adds_bos", [True, False])
def test_what_the_tokenizer_returns_equals_transformers(adds_bos, side):
    ours, theirs = pair(adds_bos, padding_side=side)
    texts = ["what is it? Grüße 你好", "a", f"{BOS}the red\n\n circle <|eot_id|>"]
    wanted = {
        "return_offsets_mapping": True,
        "return_length": True,
        "return_special_tokens_mask": True,
        "return_token_type_ids": True,
    }
    for options in (
        {},
        {"padding": True},
        {"padding": True, "return_tensors": "pt"},
        {"padding": "max_length", "max_length": 40, "return_tensors": "np"},
        {"padding": True, "truncation": True, "max_length": 6},
        {"padding": True, "pad_to_multiple_of": 16},
        {"return_attention_mask": False},
    ):
        got, want = (
            ours.tokenizer(texts, **wanted, **options),
            theirs.tokenizer(texts, **wanted, **options),
        )
        assert_same(got, dict(want))
        if not adds_bos:  # theirs doubles the begin-of-text token otherwise
            assert_same(
                ours(text=texts, **wanted, **options), dict(theirs(text=texts, **wanted, **options))
            )
    for single in ({}, {"return_tensors": "pt"}):
        got, want = (
            ours.tokenizer("what", **wanted, **single),
            theirs.tokenizer("what", **wanted, **single),
        )
        assert_same(got, dict(want))


def test_groups_equal_transformers():
    ours, theirs = pair()
    image = random_image(random.Random(2))
    for options in (
        {"common_kwargs": {"return_tensors": "pt"}},
        {"text_kwargs": {"padding": "max_length", "max_length": 20, "return_tensors": "pt"}},
        {"common_kwargs": {"return_tensors": "np"}, "images_kwargs": {"do_normalize": False}},
        {"images_kwargs": {"do_rescale": False}, "text_kwargs": {"return_length": True}},
    ):
        assert_same(
            ours(image, f"{IMAGE}x", **options), dict(theirs(image, f"{IMAGE}x", **options))
        )
    got = ours(
        text=["a", "bcd"], common_kwargs={"padding": True}, padding="max_length", max_length=9
    )
    assert len(got.input_ids[0]) == 9


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"common_kwargs": {"nonsense": 1}}, TypeError, "unknown option 'nonsense'"),
        ({"nonsense": 1}, TypeError, "unknown option 'nonsense'; there are add_special_tokens"),
        ({"text_kwargs": {"size": 1}}, TypeError, "unknown option 'size' in text_kwargs"),
        (
            {"return_tensors": "pt", "common_kwargs": {"return_tensors": "np"}},
            TypeError,
            "return_tensors was given twice: 'np', 'pt'",
        ),
        ({"return_tensors": "tf"}, ValueError, "return_tensors must be"),
        (
            {"images": np.zeros((9, 9), np.uint8), "device": "meta"},
            ValueError,
            'needs return_tensors="pt"',
        ),
    ],
)
def test_options_that_cannot_work(options, error, message):
    text = IMAGE if "images" in options else "x"
    with pytest.raises(error, match=message):
        pair()[0](text=text, **options)


def test_device_of_the_image_inputs():
    ours, _ = pair()
    image = random_image(random.Random(3))
    for got in (
        ours(image, IMAGE, return_tensors="pt", device="meta"),
        ours(image, IMAGE, return_tensors="pt", images_kwargs={"device": torch.device("meta")}),
    ):
        assert {n for n, v in got.items() if v.is_meta} == {
            "pixel_values",
            "aspect_ratio_ids",
            "aspect_ratio_mask",
        }
    got = ours.image_processor(image, return_tensors="pt", device="meta")
    assert got.pixel_values.is_meta


class Turned(pil.MllamaImageProcessorPil):
    """As the torchvision one: torch tensors, whatever is asked for."""

    as_list = False

    def preprocess(self, images, **options):
        made = super().preprocess(images, **{**options, "return_tensors": "pt"})
        if self.as_list:
            made["pixel_values"] = list(made["pixel_values"])
        return made


@pytest.mark.parametrize("as_list", [False, True])
@pytest.mark.parametrize("kind", ["pt", "np", None])
def test_image_processors_of_transformers_inside_ours(kind, as_list):
    ours, theirs = pair()
    rng = random.Random(4)
    images = [[random_image(rng)], [random_image(rng), random_image(rng)]]
    texts = [f"{IMAGE}a", f"{IMAGE}{IMAGE}b"]
    want = theirs(images, texts, padding=True, return_tensors="pt")
    turned = Turned(**IMAGE_OPTIONS)
    turned.as_list = as_list
    for inner in (turned, theirs.image_processor):
        mixed = MllamaProcessor(inner, ours.tokenizer, TEMPLATE)
        got = mixed(images, texts, padding=True, return_tensors=kind)
        for name, value in want.items():
            stacked = got[name]
            if kind is None and isinstance(stacked, list) and isinstance(stacked[0], torch.Tensor):
                stacked = torch.stack(stacked)
            assert torch.equal(torch.as_tensor(stacked), value), name
            if kind is not None:
                assert isinstance(got[name], torch.Tensor if kind == "pt" else np.ndarray)
    assert mixed.to_dict()["processor_class"] == "MllamaProcessor"


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        ([[1, 2]], torch.int64),
        ([1, 2], torch.int64),
        ([[]], torch.int64),
        ([[0.25, -0.5]], torch.float32),
        ([[True, False]], torch.bool),
        (np.zeros((1, 2), np.float16), torch.float16),
        (np.zeros((1, 2), np.int32), torch.int32),
        ([np.zeros(2, np.float32), np.ones(2, np.float32)], torch.float32),
        (torch.tensor([[0.5]]), torch.float32),
        (torch.tensor([[0.5]], dtype=torch.bfloat16), torch.bfloat16),
        ([torch.tensor([0.5]), torch.tensor([-0.5])], torch.float32),
        ([[(0, 1), (1, 2)]], torch.int64),
    ],
    ids=str,
)
def test_what_is_no_integer_stays_what_it_is(value, dtype):
    got = convert_to_tensors({"x": value}, "pt").x
    assert got.dtype == dtype
    if isinstance(value, list):
        flat = (
            torch.cat([torch.as_tensor(v).flatten() for v in value])
            if value != [[]]
            else got.flatten()
        )
        assert torch.equal(got.flatten().double(), flat.double())
    array = convert_to_tensors({"x": value}, "np").x
    assert isinstance(array, np.ndarray) and np.array_equal(array, got.float().numpy())
    assert convert_to_tensors({"x": value}, None).x is value


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([[1], [1, 2]], "x has rows of 1 to 2 entries"),
        ([torch.zeros(1), torch.zeros(2)], "x has rows of 1 to 2 entries"),
        ([[[1], [1, 2]]], "x has nested rows of unequal length"),
        (["a"], "x holds <U1 values, which make no tensor"),
    ],
    ids=str,
)
def test_what_makes_no_tensor(value, message):
    with pytest.raises(ValueError, match=message):
        convert_to_tensors({"x": value}, "pt")


TALK = [
    {"role": "user", "content": "what is it?"},
    {"role": "assistant", "content": "a red circle, Grüße"},
    {"role": "user", "content": "where?"},
    {"role": "assistant", "content": " in  the picture "},
]


@pytest.mark.parametrize("side", ["left", "right"])
def test_masks_of_the_assistant_equal_transformers(side):
    ours, theirs = pair(padding_side=side)
    template = TEMPLATE.replace(
        "{%- generation %}{{- m['content'] | trim }}{% endgeneration %}",
        "{%- if m['role'] == 'assistant' %}{%- generation %}{{- m['content'] | trim }}{% endgeneration %}"
        "{%- else %}{{- m['content'] | trim }}{%- endif %}",
    )
    options = {"return_assistant_tokens_mask": True, "tokenize": True, "return_dict": True}
    for conversation, more in (
        (TALK, {}),
        (TALK, {"return_tensors": "pt"}),
        (TALK, {"return_tensors": "np", "add_generation_prompt": True}),
        ([TALK], {"processor_kwargs": {"truncation": True, "max_length": 70}}),
        ([TALK, TALK[:2]], {}),
    ):
        got = ours.apply_chat_template(conversation, template, **options, **more)
        if more.get("processor_kwargs"):
            more = {"processor_kwargs": dict(more["processor_kwargs"])}
        want = theirs.apply_chat_template(conversation, template, **options, **more)
        assert_same(got, dict(want))
    ids, mask = got.input_ids[0], got.assistant_masks[0]
    assert ours.decode([i for i, m in zip(ids, mask) if m]).startswith("a red circle, Grüße")
    padded = {"padding": True, "return_tensors": "pt"}
    got = ours.apply_chat_template([TALK, TALK[:2]], template, **options, processor_kwargs=padded)
    for row, mask in zip(got.input_ids, got.assistant_masks):
        assert ours.decode(row[mask.bool()]).startswith("a red circle, Grüße")
    kept = ours.apply_chat_template(TALK, template, **options, return_offsets_mapping=True)
    assert "offset_mapping" in kept


def test_masks_of_the_assistant_in_other_cases():
    ours, _ = pair()
    options = {"return_assistant_tokens_mask": True, "tokenize": True, "return_dict": True}
    said = "{% generation %}{{ m.content }}{% endgeneration %}"
    loop = "{% for m in messages %}" + said + "{{ '<|eot_id|>' }}{% endfor %}"
    got = ours.apply_chat_template(
        TALK[1:2], loop, **options
    )  # the template writes no begin-of-text
    assert got.assistant_masks[0] == [0] + [1] * (len(got.input_ids[0]) - 2) + [0]
    got = ours.apply_chat_template(
        TALK[1:2], "{% macro x(m) %}" + said + "{% endmacro %}ab{{ x(messages[0]) }}", **options
    )
    words = [i for i, m in zip(got.input_ids[0], got.assistant_masks[0]) if m]
    assert ours.decode(words) == TALK[1]["content"]
    escaped = [{"role": "assistant", "content": f"a {IMAGE}<b"}]
    got = ours.apply_chat_template(escaped, loop, **options, escape_special_tokens=True)
    words = [i for i, m in zip(got.input_ids[0], got.assistant_masks[0]) if m]
    assert ours.decode(words) == escaped[0]["content"]
    with pytest.warns(UserWarning, match="the chat template has no {% generation %}"):
        got = ours.apply_chat_template(TALK, "{{ messages[0].content }}", **options)
    assert not any(got.assistant_masks[0])
    with pytest.raises(ValueError, match="needs tokenize=True and return_dict=True"):
        ours.apply_chat_template(TALK, return_assistant_tokens_mask=True)
    with pytest.raises(ValueError, match="exclude each other"):
        ours.apply_chat_template(TALK, continue_final_message=True, **options)


def test_continuing_another_entry_equals_transformers():
    ours, theirs = pair()
    template = "{% for m in messages %}{{ m.thought }}|{{ m.content }}<|eot_id|>{% endfor %}"
    talk = [{"role": "assistant", "content": "x", "thought": "because"}]
    options = {"continue_final_message": "thought"}
    got = ours.apply_chat_template(talk, template, **options)
    assert got == theirs.apply_chat_template(talk, template, **options) == "because"


def test_descriptions_equal_transformers():
    ours, theirs = pair()
    plain = mllama_processing.MllamaProcessor(
        pil.MllamaImageProcessorPil(**IMAGE_OPTIONS), theirs.tokenizer
    )
    assert MllamaProcessor.get_attributes() == theirs.get_attributes()
    stored, got = utils.json.loads(plain.to_json_string()), ours.to_dict()
    assert got["processor_class"] == stored["processor_class"]
    assert set(got) == set(stored)
    mine = {k: v for k, v in got["image_processor"].items() if k != "image_processor_type"}
    assert mine == {k: v for k, v in stored["image_processor"].items() if k in mine}
    again = utils.json.loads(ours.to_json_string())
    assert again == got


def test_files_of_a_description(tmp_path):
    ours, _ = pair()
    ours.to_json_file(tmp_path / "x.json")
    assert (tmp_path / "x.json").read_text() == ours.to_json_string()
    with pytest.raises(ValueError, match="push_to_hub is not had here"):
        ours.save_pretrained(tmp_path, push_to_hub=True)


def test_the_pipeline_takes_our_processor():
    ours, theirs = pair()
    config = transformers.MllamaConfig(
        vision_config={
            "hidden_size": 32, "attention_heads": 2, "num_hidden_layers": 2, "num_global_layers": 1,
            "intermediate_size": 32, "image_size": 28, "intermediate_layers_indices": [0],
            "vision_output_dim": 64,
        },
        text_config={
            "vocab_size": 340, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1,
            "intermediate_size": 32, "num_hidden_layers": 2, "cross_attention_layers": [1],
            "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        image_token_index=ours.image_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.MllamaForConditionalGeneration(config).eval()
    image = random_image(random.Random(8))
    content = [{"type": "image", "image": image}, {"type": "text", "text": "what is it?"}]
    chat = [{"role": "user", "content": content}]
    answers = []
    for processor in (ours, theirs):
        pipe = transformers.pipeline("image-text-to-text", model=model, processor=processor)
        options = {"max_new_tokens": 4}
        answers.append(
            [
                pipe(text=chat, **options),
                pipe(text=chat, return_full_text=False, **options),
                pipe(images=[image], text=f"{IMAGE}what is it?", **options),
                pipe(text=[chat, chat], **options),
                pipe(text=chat, processor_kwargs={"add_special_tokens": False}, **options),
            ]
        )
    assert str(answers[0]) == str(answers[1])


def test_the_image_processor_alone():
    processor = MllamaImageProcessor(**IMAGE_OPTIONS)
    image = random_image(random.Random(9))
    want = processor(image).pixel_values
    assert np.array_equal(processor(image, data_format="channels_first").pixel_values, want)
    with pytest.raises(ValueError, match="do_center_crop=True is not supported here"):
        processor(image, do_center_crop=True)
    assert MllamaTokenizer(backend(False), SPECIAL)("x", verbose=True).input_ids
