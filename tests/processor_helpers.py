"""A tiny Llama-3-style tokenizer and template, and our processor beside that of `transformers`."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from mllama.processing.image_processor import MllamaImageProcessor
from mllama.processing.processor import MllamaProcessor
from mllama.processing.tokenizer import MllamaTokenizer

transformers = pytest.importorskip("transformers")
mllama_processing = pytest.importorskip("transformers.models.mllama.processing_mllama")
pil = pytest.importorskip("transformers.models.mllama.image_processing_pil_mllama")

BOS, EOT, PAD, IMAGE = "<|begin_of_text|>", "<|eot_id|>", "<|finetune_right_pad_id|>", "<|image|>"
SPECIAL = {"bos_token": BOS, "eos_token": EOT, "pad_token": PAD}
OTHERS = ("<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|python_tag|>")
WORDS = (
    "the red circle and a blue square: what is shown in this picture, where is it? Grüße 你好 \n\n"
)
TEMPLATE = """{{- bos_token }}
{%- set has_image = namespace(value=false) %}
{%- for m in messages if m['content'] is not string %}
    {%- for part in m['content'] if part['type'] == 'image' %}
        {%- set has_image.value = true %}
    {%- endfor %}
{%- endfor %}
{%- if messages[0]['role'] == 'system' and has_image.value %}
    {{- raise_exception('Prompting with images is incompatible with system messages.') }}
{%- endif %}
{%- if tools is not none and tools %}
    {{- 'Tools: ' + tools | tojson(indent=2) + (documents or []) | tojson + '\n' }}
{%- endif %}
{%- if date_string is defined %}{{- 'Today: ' + date_string }}{% endif %}
{%- for m in messages %}
    {%- if m['role'] == 'function' %}{% continue %}{% endif %}
    {{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}
    {%- if m['content'] is string %}
        {%- generation %}{{- m['content'] | trim }}{% endgeneration %}
    {%- else %}
        {%- for part in m['content'] %}
            {{- '<|image|>' if part['type'] == 'image' else part['text'] }}
        {%- endfor %}
    {%- endif %}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}
"""
IMAGE_OPTIONS = {
    "size": {"height": 28, "width": 28},
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


def backend(adds_bos):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=[BOS, EOT, PAD, *OTHERS, IMAGE],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([WORDS] * 5, trainer)
    if adds_bos:
        bos = (BOS, tokenizer.token_to_id(BOS))
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[bos]
        )
    return tokenizer


def pair(adds_bos=False, **options):
    """Our processor and theirs on the same tokenizer."""
    text = {"model_max_length": 4096, **options}
    ours = MllamaProcessor(
        MllamaImageProcessor(**IMAGE_OPTIONS),
        MllamaTokenizer(backend(adds_bos), SPECIAL, **text),
        TEMPLATE,
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend(adds_bos), **SPECIAL, **text
    )
    theirs = mllama_processing.MllamaProcessor(
        pil.MllamaImageProcessorPil(**IMAGE_OPTIONS), fast, chat_template=TEMPLATE
    )
    return ours, theirs


def random_image(rng):
    size = rng.randint(1, 120), rng.randint(1, 120)
    pixels = np.random.default_rng(rng.getrandbits(32)).integers(0, 256, (*size[::-1], 3), np.uint8)
    return Image.fromarray(pixels)


def assert_same(got, want):
    assert set(got) == set(want), (set(got), set(want))
    for name, value in want.items():
        assert type(got[name]) is type(value), name
        if isinstance(value, torch.Tensor):
            assert got[name].dtype == value.dtype and torch.equal(got[name], value), name
        elif isinstance(value, np.ndarray):
            assert got[name].dtype == value.dtype and np.array_equal(got[name], value), name
        else:
            assert got[name] == value, name


CONVERSATIONS = [
    [{"role": "user", "content": "what is it?"}],
    [
        {"role": "system", "content": "  Be brief. "},
        {"role": "user", "content": "the red circle?"},
        {"role": "function", "content": "nothing"},
        {"role": "assistant", "content": "blue"},
        {"role": "user", "content": [{"type": "text", "text": "where is it?"}]},
    ],
]


def equal_on_inputs(one, other):
    rng = random.Random(9)
    image, text = random_image(rng), f"{IMAGE}what is it? Grüße"
    options = {"add_special_tokens": False, "return_tensors": "pt"}
    assert_same(one(image, text, **options), other(image, text, **options))
    conversation = CONVERSATIONS[1]
    assert one.apply_chat_template(conversation) == other.apply_chat_template(conversation)
