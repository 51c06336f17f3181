"""The processor against `transformers`: same folders, same ids, same masks, same prompts."""

import base64
import io
import json
import random

import jinja2
import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from mllama.chat_template import render_chat_template, template_variables
from mllama.image_processor import MllamaImageProcessor
from mllama.image_spans import cross_attention_mask, image_spans
from mllama.images import ImageOpenError
from mllama.processor import MllamaProcessor
from mllama.tokenizer import MllamaTokenizer

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
    {%- if m['role'] == 'skip' %}{% continue %}{% endif %}
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


def picture(rng):
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
        images = [[picture(rng) for _ in range(n)] for n in counts]
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
    image, text = picture(random.Random(1)), f"{IMAGE}what is it?"
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
    """Rows without, with one and with two pictures; `transformers` 5.17 refuses such a batch, so
    the parts it is made of are the reference."""
    rng = random.Random(2)
    ours, theirs = pair()
    a, b, c = (picture(rng) for _ in range(3))
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
        len(ours.tokenizer.encode(ours._with_bos(t))) for t in texts
    ]


def test_batch_whose_rows_all_lack_pictures_is_text_alone():
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
    image = picture(random.Random(5))
    for text in (f"{IMAGE}what", f"{BOS}{IMAGE}what", f"{IMAGE}{BOS}what", f"a {IMAGE}"):
        got = ours(image, text, return_tensors="pt")
        bos = ours.tokenizer.bos_token_id
        assert (got.input_ids == bos).sum() == 1
        want = theirs(image, text, add_special_tokens=False, return_tensors="pt")
        assert_same(got, want)
        doubled = ours(image, text, add_special_tokens=True, return_tensors="pt")
        assert_same(doubled, theirs(image, text, return_tensors="pt"))
    assert ours(text="what").input_ids[0].count(ours.tokenizer.bos_token_id) == 1


CONVERSATIONS = [
    [{"role": "user", "content": "what is it?"}],
    [
        {"role": "system", "content": "  Be brief. "},
        {"role": "user", "content": "the red circle?"},
        {"role": "skip", "content": "nothing"},
        {"role": "assistant", "content": "blue"},
        {"role": "user", "content": [{"type": "text", "text": "where is it?"}]},
    ],
]
VARIANTS = [
    {},
    {"add_generation_prompt": True},
    {"date_string": "26 Jul 2024"},
    {"tools": [{"type": "function", "function": {"name": "über<>&", "parameters": {"a": 1}}}]},
    {"tools": [{"name": "f"}], "documents": [{"title": "t", "text": "x"}]},
    {"continue_final_message": True},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_prompts_equal_transformers(variant):
    ours, theirs = pair()
    for conversation in (*CONVERSATIONS, CONVERSATIONS):
        got = ours.apply_chat_template(conversation, **variant)
        assert got == theirs.apply_chat_template(conversation, **variant)
        got = ours.apply_chat_template(conversation, tokenize=True, **variant)
        assert got == theirs.apply_chat_template(conversation, tokenize=True, **variant)


@pytest.mark.parametrize("adds_bos", [True, False])
def test_conversations_with_pictures_equal_transformers(adds_bos, tmp_path):
    rng = random.Random(6)
    ours, theirs = pair(adds_bos)
    image, path = picture(rng), tmp_path / "picture.png"
    picture(rng).save(path)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    encoded = base64.b64encode(buffer.getvalue()).decode()
    uri = f"data:image/png;base64,{encoded}"
    conversations = [
        [{"role": "user", "content": [part, {"type": "text", "text": "what is it?"}, *more]}]
        for part, more in (
            ({"type": "image", "image": image}, []),
            ({"type": "image", "path": str(path)}, [{"type": "image", "image": image}]),
            ({"type": "image", "url": str(path)}, []),
            ({"type": "image", "base64": encoded}, []),
            ({"type": "image", "url": uri}, []),
            ({"type": "image_url", "image_url": {"url": uri}}, []),
        )
    ]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    for conversation in conversations:
        before = repr(conversation)
        got = ours.apply_chat_template(conversation, add_generation_prompt=True, **options)
        assert repr(conversation) == before
        want = theirs.apply_chat_template(conversation, add_generation_prompt=True, **options)
        assert_same(got, want)
    padded = {"padding": True, "padding_side": "left"}
    got = ours.apply_chat_template(conversations, **options, processor_kwargs=padded)
    want = theirs.apply_chat_template(conversations, **options, processor_kwargs={**padded})
    assert_same(got, want)
    assert_same(ours.apply_chat_template(conversations, **options, **padded), want)


def test_batch_of_conversations_with_and_without_pictures():
    ours, _ = pair()
    image = picture(random.Random(7))
    with_image = [{"role": "user", "content": [{"type": "image", "image": image}]}]
    got = ours.apply_chat_template(
        [with_image, CONVERSATIONS[0]],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        padding=True,
    )
    assert got.pixel_values.shape[:2] == (2, 1) and got.aspect_ratio_ids[1].item() == 0


def test_system_turn_with_a_picture_is_refused_by_the_template():
    ours, _ = pair()
    conversation = [
        {"role": "system", "content": "x"},
        {"role": "user", "content": [{"type": "image"}]},
    ]
    with pytest.raises(jinja2.TemplateError, match="incompatible with system messages"):
        ours.apply_chat_template(conversation)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__.json }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ strftime_now.__globals__['datetime'] }}",
        "{% for i in range(10 ** 9) %}x{% endfor %}",
    ],
)
def test_templates_run_in_a_sandbox(template):
    with pytest.raises((jinja2.exceptions.SecurityError, jinja2.UndefinedError, OverflowError)):
        render_chat_template(template, [{"role": "user", "content": "x"}])


@pytest.mark.parametrize("template", ["{% include '/etc/passwd' %}", "{% import 'os' as os %}"])
def test_templates_load_no_files(template):
    with pytest.raises((TypeError, jinja2.TemplateError)):
        render_chat_template(template, [])


def test_template_helpers():
    now = render_chat_template("{{ strftime_now('%Y') }}", [])
    assert now.isdigit() and len(now) == 4
    assert render_chat_template("{{ messages | tojson }}", [{"a": "<ü>"}]) == '[{"a": "<ü>"}]'
    assert template_variables("{{ a }}{% set b = 1 %}{{ b }}") == {"a"}
    with pytest.raises(TypeError, match=r"tools\[0\] must be a dict, got str"):
        render_chat_template("", [], tools=["f"])


def test_decoding_equals_transformers():
    rng = random.Random(8)
    ours, theirs = pair()
    ids = torch.tensor([[rng.randrange(len(ours.tokenizer)) for _ in range(40)] for _ in range(3)])
    for value in (ids, ids.numpy(), ids.tolist(), ids[0], ids[0].tolist()):
        for skip in (True, False):
            options = {"skip_special_tokens": skip}
            assert ours.batch_decode(value, **options) == theirs.batch_decode(value, **options)
            assert ours.decode(value, **options) == theirs.decode(value, **options)
        got = ours.post_process_image_text_to_text(value)
        assert got == theirs.post_process_image_text_to_text(value)
    assert ours.decode(5) == theirs.decode(5)
    text = f"{BOS}Grüße 你好 , ok . {EOT}"
    assert ours.decode(ours.tokenizer.encode(text)) == text


def test_tokenizer_truncation_equals_transformers():
    for adds_bos in (True, False):
        for side in ("left", "right"):
            ours, theirs = pair(adds_bos, truncation_side=side)
            for options in (
                {"truncation": True, "max_length": 5},
                {"max_length": 7},
                {"truncation": True, "max_length": 6, "padding": "max_length"},
                {"truncation": True, "max_length": 1000, "padding": True},
                {"truncation": True, "padding": True},
            ):
                texts = [WORDS, "what"]
                got, want = ours.tokenizer(texts, **options), theirs.tokenizer(texts, **options)
                assert dict(got) == {k: want[k] for k in ("input_ids", "attention_mask")}
    with pytest.raises(ValueError, match="max_length 0 has no room for the 1 special tokens"):
        pair(True)[0].tokenizer("what", truncation=True, max_length=0)


def test_ids_and_tokens_equal_transformers():
    ours, theirs = pair()
    for name in ("bos", "eos", "pad", "unk"):
        for suffix in ("_token", "_token_id"):
            assert getattr(ours.tokenizer, name + suffix) == getattr(
                theirs.tokenizer, name + suffix
            )
    assert len(ours.tokenizer) == len(theirs.tokenizer)
    assert ours.tokenizer.vocab_size == theirs.tokenizer.vocab_size
    assert ours.tokenizer.get_vocab() == theirs.tokenizer.get_vocab()
    assert ours.tokenizer.all_special_ids == theirs.tokenizer.all_special_ids
    tokens = [IMAGE, "a", "no such token"]
    assert ours.tokenizer.convert_tokens_to_ids(tokens) == theirs.tokenizer.convert_tokens_to_ids(
        tokens
    )
    ids = [0, 9, 10**6]
    assert ours.tokenizer.convert_ids_to_tokens(ids) == [
        BOS,
        ours.tokenizer.convert_ids_to_tokens(9),
        None,
    ]
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = ours.tokenizer.nonsense


def equal_on_inputs(one, other):
    rng = random.Random(9)
    image, text = picture(rng), f"{IMAGE}what is it? Grüße"
    options = {"add_special_tokens": False, "return_tensors": "pt"}
    assert_same(one(image, text, **options), other(image, text, **options))
    conversation = CONVERSATIONS[1]
    assert one.apply_chat_template(conversation) == other.apply_chat_template(conversation)


@pytest.mark.parametrize("adds_bos", [True, False])
def test_our_folder_is_read_by_transformers(adds_bos, tmp_path):
    ours, theirs = pair(adds_bos, padding_side="left")
    written = ours.save_pretrained(tmp_path)
    assert all(json.loads(open(p, encoding="utf-8").read()) for p in written if p.endswith("json"))
    config = {"model_type": "mllama"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for cls in (mllama_processing.MllamaProcessor, transformers.AutoProcessor):
        loaded = cls.from_pretrained(tmp_path)
        assert type(loaded) is mllama_processing.MllamaProcessor
        assert loaded.tokenizer.padding_side == "left"
        assert loaded.tokenizer.model_max_length == 4096
        assert loaded.tokenizer.special_tokens_map == theirs.tokenizer.special_tokens_map
        equal_on_inputs(ours, loaded)
    equal_on_inputs(MllamaProcessor.from_pretrained(tmp_path), theirs)


@pytest.mark.parametrize("adds_bos", [True, False])
def test_folder_of_transformers_is_read(adds_bos, tmp_path):
    _, theirs = pair(adds_bos, padding_side="left")
    theirs.save_pretrained(tmp_path)
    loaded = MllamaProcessor.from_pretrained(tmp_path)
    assert loaded.tokenizer.padding_side == "left"
    assert loaded.tokenizer.model_max_length == 4096
    assert loaded.tokenizer.special_tokens_map == SPECIAL
    equal_on_inputs(loaded, theirs)
    loaded.save_pretrained(tmp_path / "again")
    equal_on_inputs(MllamaProcessor.from_pretrained(tmp_path / "again"), theirs)


def published_layout(folder, where):
    """The files of a published checkpoint: flat preprocessor_config, AddedToken dictionaries."""
    backend(True).save(str(folder / "tokenizer.json"))
    added = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    config = {
        "added_tokens_decoder": {"0": {"content": BOS, "special": True, **added}},
        "bos_token": BOS,
        "clean_up_tokenization_spaces": True,
        "eos_token": EOT,
        "model_max_length": 131072,
        "pad_token": PAD,
        "auto_map": {"AutoTokenizer": ["evil.py", None]},
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    if where == "tokenizer_config.json":
        config["chat_template"] = TEMPLATE
    elif where == "named":
        config["chat_template"] = [{"name": "default", "template": TEMPLATE}]
    elif where == "chat_template.json":
        (folder / where).write_text(json.dumps({"chat_template": TEMPLATE}))
    else:
        (folder / where).write_text(TEMPLATE)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    pad = {"content": PAD, **added}
    special = {"bos_token": BOS, "eos_token": EOT, "pad_token": pad}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    image = {**IMAGE_OPTIONS, "image_processor_type": "MllamaImageProcessor", "resample": 2}
    (folder / "preprocessor_config.json").write_text(json.dumps({**image, "processor_class": "x"}))


@pytest.mark.parametrize(
    "where", ["chat_template.json", "chat_template.jinja", "tokenizer_config.json", "named"]
)
def test_published_layouts_are_read(where, tmp_path):
    published_layout(tmp_path, where)
    loaded = MllamaProcessor.from_pretrained(tmp_path)
    assert loaded.chat_template == TEMPLATE
    assert loaded.tokenizer.special_tokens_map == SPECIAL
    assert loaded.image_processor.size == IMAGE_OPTIONS["size"]
    theirs = mllama_processing.MllamaProcessor.from_pretrained(tmp_path)
    theirs.chat_template = theirs.chat_template or TEMPLATE  # it does not look into the tokenizer
    equal_on_inputs(loaded, theirs)
    loaded.save_pretrained(tmp_path / "again")
    assert "evil" not in (tmp_path / "again" / "tokenizer_config.json").read_text()


def test_damaged_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        MllamaProcessor.from_pretrained(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"has no preprocessor_config\.json"):
        MllamaProcessor.from_pretrained(tmp_path)
    published_layout(tmp_path, "chat_template.json")
    for name in ("chat_template.json", "preprocessor_config.json", "tokenizer_config.json"):
        kept = (tmp_path / name).read_text()
        for text in ("{", "[1]"):
            (tmp_path / name).write_text(text)
            with pytest.raises(ValueError, match=name.replace(".", r"\.")):
                MllamaProcessor.from_pretrained(tmp_path)
        (tmp_path / name).write_text(kept)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer"):
        MllamaProcessor.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer\.json"):
        MllamaProcessor.from_pretrained(tmp_path)


def test_tokenizer_of_transformers_works_inside_our_processor():
    ours, theirs = pair()
    mixed = MllamaProcessor(ours.image_processor, theirs.tokenizer, TEMPLATE)
    equal_on_inputs(mixed, theirs)


class Untouchable:
    """A picture that must not be opened."""

    def read(self, size):
        raise AssertionError("opened before the checks")


@pytest.mark.parametrize(
    ("images", "text", "message"),
    [
        (None, None, "give images, text or both"),
        (None, f"{IMAGE}x", r"the texts have \[1\] image tokens, and no picture was given"),
        (Untouchable(), "x", r"have \[0\] image tokens .* their pictures number \[1\]"),
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


@pytest.mark.parametrize(
    ("conversation", "error", "message"),
    [
        ([], ValueError, "the conversation is empty"),
        (["hi"], TypeError, "message 0 must be a dict, got str"),
        ([{"content": "x"}], ValueError, r"message 0 has no role; it has \['content'\]"),
        ([{"role": "user", "content": [{"text": "x"}]}], ValueError, "part without a type"),
        ([{"role": "user", "content": [{"type": "image"}]}], ValueError, "no picture was given"),
        (
            [{"role": "user", "content": [{"type": "image", "base64": "?"}]}],
            ValueError,
            "base64 picture of a message cannot be decoded",
        ),
    ],
)
def test_conversations_that_cannot_work(conversation, error, message):
    ours, _ = pair()
    with pytest.raises(error, match=message):
        ours.apply_chat_template(conversation, tokenize=True)


def test_template_variables_that_nothing_reads_are_refused():
    ours, _ = pair()
    with pytest.raises(
        TypeError, match="neither the template nor the processor knows 'datestring'"
    ):
        ours.apply_chat_template(CONVERSATIONS[0], datestring="26 Jul 2024")


def test_construction_errors():
    images = MllamaImageProcessor(**IMAGE_OPTIONS)
    plain = Tokenizer(models.BPE())
    plain.add_special_tokens([BOS])
    with pytest.raises(ValueError, match=r"no image token '<\|image\|>'"):
        MllamaProcessor(images, MllamaTokenizer(plain, {"bos_token": BOS}))
    with pytest.raises(ValueError, match="pad_token is '<pad>', which the tokenizer does not"):
        MllamaTokenizer(plain, {"pad_token": "<pad>"})
    with pytest.raises(ValueError, match=r"padding_side must be .* got 'up'"):
        MllamaTokenizer(plain, {}, padding_side="up")
    with pytest.raises(ValueError, match="padding needs a pad_token"):
        MllamaTokenizer(plain, {})(BOS, padding=True)
    padded = MllamaTokenizer(plain, {"bos_token": BOS})
    padded.pad_token = padded.bos_token
    assert padded(["", BOS], padding=True).input_ids == [[0], [0]]
    with pytest.raises(ValueError, match="eos_token is 'x', which the tokenizer does not have"):
        padded.eos_token = "x"
    tokenizer = MllamaTokenizer(backend(False), SPECIAL)
    with pytest.raises(ValueError, match="has no chat template"):
        MllamaProcessor(images, tokenizer).apply_chat_template(CONVERSATIONS[0])


def test_batch_moves_and_casts():
    ours, _ = pair()
    batch = ours(picture(random.Random(3)), f"{IMAGE}x", return_tensors="pt")
    assert batch.to(torch.bfloat16) is batch
    assert batch.pixel_values.dtype == torch.bfloat16 and batch.input_ids.dtype == torch.int64
    batch.to("meta", torch.float16)
    assert {v.device.type for v in batch.values()} == {"meta"}
    assert batch.pixel_values.dtype == torch.float16
    with pytest.raises(AttributeError, match="no entry 'labels'"):
        _ = batch.labels
