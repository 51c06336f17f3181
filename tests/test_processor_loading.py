"""`from_pretrained` with the options people pass, named chat templates, Meta's files, and added tokens."""

import base64
import inspect
import json
import random
from dataclasses import replace

import pytest
import torch
from processor_helpers import (
    BOS,
    CONVERSATIONS,
    EOT,
    IMAGE,
    IMAGE_OPTIONS,
    PAD,
    TEMPLATE,
    WORDS,
    backend,
    equal_on_inputs,
    mllama_processing,
    pair,
    random_image,
    transformers,
)
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, trainers

from mllama.limits import OWN_FILES
from mllama.processing.image_processor import MllamaImageProcessor
from mllama.processing.processor import MllamaProcessor
from mllama.processing.tiktoken import read_tiktoken
from mllama.processing.tokenizer import MllamaTokenizer

utils = pytest.importorskip("transformers.processing_utils")
TikTokenConverter = pytest.importorskip("transformers.convert_slow_tokenizer").TikTokenConverter
SAY = "{{ bos_token }}" + "{% for m in messages %}{{ m.content }}{% endfor %}"
NAMED = {"default": TEMPLATE, "rag": SAY + "|rag", "tool_use": SAY + "|tools"}


@pytest.fixture
def folder(tmp_path):
    pair()[0].save_pretrained(tmp_path)
    return tmp_path


def test_options_go_where_they_belong(folder):
    got = MllamaProcessor.from_pretrained(
        folder,
        use_fast=True,
        trust_remote_code=False,
        token="secret",
        revision="main",
        cache_dir="/nowhere",
        local_files_only=True,
        force_download=False,
        padding_side="left",
        truncation_side="left",
        model_max_length=77,
        pad_token=EOT,
        size=42,
        max_image_tiles=2,
        limits=replace(OWN_FILES, max_pixels=10**6),
        do_normalize=None,
    )
    assert got.tokenizer.padding_side == got.tokenizer.truncation_side == "left"
    assert got.tokenizer.model_max_length == 77 and got.tokenizer.pad_token == EOT
    assert got.image_processor.size["width"] == 42 and got.image_processor.max_image_tiles == 2
    assert (
        got.image_processor.limits.max_pixels == 10**6 and got.image_processor.do_normalize is True
    )
    assert got.chat_template == TEMPLATE


def test_parts_that_are_given_are_used(folder):
    ours, theirs = pair(padding_side="left")
    images = MllamaImageProcessor(size=56)
    got = MllamaProcessor.from_pretrained(
        str(folder), tokenizer=ours.tokenizer, image_processor=images, chat_template=SAY
    )
    assert got.tokenizer is ours.tokenizer and got.image_processor is images
    assert got.apply_chat_template(CONVERSATIONS[0]) == f"{BOS}what is it?"
    mixed = MllamaProcessor.from_pretrained(folder, tokenizer=theirs.tokenizer)
    assert mixed.tokenizer is theirs.tokenizer
    equal_on_inputs(mixed, theirs)
    (folder / "tokenizer.json").unlink()
    (folder / "preprocessor_config.json").unlink()
    (folder / "processor_config.json").unlink()
    got = MllamaProcessor.from_pretrained(folder, tokenizer=ours.tokenizer, image_processor=images)
    assert got.chat_template == TEMPLATE


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nonsense": 1}, "unknown option 'nonsense'; there are .*padding_side"),
        ({"dtype": "auto"}, "unknown option 'dtype'"),
        (
            {"extra_special_tokens": ["<a>"], "additional_special_tokens": ["<b>"]},
            "extra_special_tokens was given twice, also by its older name",
        ),
        (
            {"padding_side": "left", "tokenizer": 1},
            "padding_side is for the tokenizer of the folder",
        ),
        ({"size": 3, "image_processor": 1}, "size is for the image_processor of the folder"),
    ],
)
def test_options_that_are_refused(folder, options, message):
    with pytest.raises(TypeError, match=message):
        MllamaProcessor.from_pretrained(folder, **options)
    for kind in (MllamaTokenizer, MllamaImageProcessor):
        with pytest.raises(TypeError, match="nonsense"):
            kind.from_pretrained(folder, nonsense=1)


def test_every_argument_of_transformers_is_taken(folder):
    published = inspect.signature(utils.ProcessorMixin.from_pretrained).parameters
    for name, parameter in published.items():
        if name not in ("pretrained_model_name_or_path", "kwargs"):
            MllamaProcessor.from_pretrained(folder, **{name: parameter.default})
    for kind in (MllamaProcessor, MllamaTokenizer, MllamaImageProcessor):
        kind.from_pretrained(folder, use_fast=False, trust_remote_code=True, revision="main")


@pytest.mark.parametrize("name", ["extra_special_tokens", "additional_special_tokens"])
def test_further_special_tokens_by_either_name(folder, name):
    got = MllamaProcessor.from_pretrained(
        folder, backend="pil", legacy=False, clean_up_tokenization_spaces=False, **{name: ["<a>"]}
    )
    assert got.tokenizer.extra_special_tokens == ["<a>"]
    assert got.tokenizer.decode(got.tokenizer.encode("x<a>"), skip_special_tokens=True) == "x"


@pytest.mark.parametrize("template", [3, {"rag": SAY}, ["rag"]])
def test_a_template_of_another_kind_is_refused(template):
    with pytest.raises(TypeError, match="chat_template must be a template or a name, got"):
        pair()[0].apply_chat_template(CONVERSATIONS[0], template)


def test_subfolder(folder):
    parent = folder.parent
    got = MllamaProcessor.from_pretrained(parent, subfolder=folder.name)
    assert got.chat_template == TEMPLATE


def test_named_templates_equal_transformers():
    ours, theirs = pair()
    ours.chat_template = theirs.chat_template = NAMED
    for conversation in CONVERSATIONS:
        for name in (None, "default", "rag", "tool_use", SAY):
            got = ours.apply_chat_template(conversation[-1:], name)
            assert got == theirs.apply_chat_template(conversation[-1:], name)
    assert ours.apply_chat_template(CONVERSATIONS[0], "rag").endswith("|rag")
    ours.chat_template = theirs.chat_template = {"rag": SAY}
    for processor, message in ((ours, "none is the default: rag"), (theirs, "rag")):
        with pytest.raises(ValueError, match=message):
            processor.apply_chat_template(CONVERSATIONS[0])


@pytest.mark.parametrize("templates", [TEMPLATE, NAMED, None])
def test_a_name_that_is_none_is_not_written_as_a_prompt(templates):
    ours, _ = pair()
    ours.chat_template = templates
    with pytest.raises(ValueError, match="no chat template is called 'rga', and it is none itself"):
        ours.apply_chat_template(CONVERSATIONS[0], "rga")


@pytest.mark.parametrize("templates", [TEMPLATE, NAMED, {"rag": SAY}, {"default": SAY}])
def test_templates_are_saved_and_loaded_in_both_directions(tmp_path, templates):
    ours, theirs = pair()
    ours.chat_template = theirs.chat_template = templates
    want = templates["default"] if templates == {"default": SAY} else templates
    MllamaProcessor(ours.image_processor, ours.tokenizer, NAMED).save_pretrained(tmp_path / "ours")
    MllamaProcessor(ours.image_processor, ours.tokenizer, TEMPLATE).save_pretrained(
        tmp_path / "ours"
    )
    paths = ours.save_pretrained(tmp_path / "ours")  # over other ones
    assert all((tmp_path / "ours" / path).is_file() for path in paths)
    theirs.save_pretrained(tmp_path / "theirs")
    for name in ("ours", "theirs"):
        assert MllamaProcessor.from_pretrained(tmp_path / name).chat_template == want
        loaded = mllama_processing.MllamaProcessor.from_pretrained(tmp_path / name)
        assert loaded.chat_template == want


def test_templates_of_the_tokenizer(tmp_path):
    ours, theirs = pair()
    ours.tokenizer.chat_template = theirs.tokenizer.chat_template = NAMED
    ours.tokenizer.save_pretrained(tmp_path / "ours")
    theirs.tokenizer.save_pretrained(tmp_path / "theirs", save_jinja_files=False)
    ours.image_processor.save_pretrained(tmp_path / "theirs")
    assert MllamaTokenizer.from_pretrained(tmp_path / "theirs").chat_template == NAMED
    assert MllamaProcessor.from_pretrained(tmp_path / "theirs").chat_template == NAMED
    loaded = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "ours")
    assert loaded.chat_template == NAMED
    got = MllamaTokenizer.from_pretrained(tmp_path / "ours", chat_template=SAY)
    assert got.chat_template == SAY


@pytest.mark.parametrize("value", [3, [{"name": "a"}], {"a": 1}, [["a", "b"]]])
def test_templates_that_are_none(folder, value):
    config = json.loads((folder / "processor_config.json").read_text())
    (folder / "processor_config.json").write_text(json.dumps({**config, "chat_template": value}))
    with pytest.raises(ValueError, match=r"processor_config\.json: chat_template must be a string"):
        MllamaProcessor.from_pretrained(folder)


def test_names_of_templates_leave_no_folder(tmp_path):
    ours, _ = pair()
    ours.chat_template = {"../evil": SAY}
    with pytest.raises(ValueError, match=r"a chat template cannot be called '\.\./evil'"):
        ours.save_pretrained(tmp_path / "a")


def test_missing_files_are_named_with_where_to_get_them(tmp_path):
    where = "meta-llama/Llama-3.2-11B-Vision-Instruct, or pass "
    with pytest.raises(
        FileNotFoundError, match=f"has no preprocessor_config.json .*{where}image_proc"
    ):
        MllamaProcessor.from_pretrained(tmp_path)
    ours, _ = pair()
    ours.image_processor.save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"has no tokenizer.json, .*{where}tokenizer="):
        MllamaProcessor.from_pretrained(tmp_path)
    ours.tokenizer.save_pretrained(tmp_path)
    got = MllamaProcessor.from_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"has no chat template; .*chat_template\.json of meta-llama"
    ):
        got.apply_chat_template(CONVERSATIONS[0])


def llama_words():
    """A tokenizer with Llama 3's cutting of words, and the lines of its tokenizer.model."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = read_words()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([WORDS * 3, "12345 don't  \n\n x_y z=1;"] * 5, trainer)
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    byte_of, free = {}, 256
    for byte in range(256):
        byte_of[chr(byte) if byte in printable else chr(free)] = byte
        free += byte not in printable
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    lines = [
        base64.b64encode(bytes(byte_of[c] for c in token)) + b" %d" % rank
        for token, rank in vocabulary
    ]
    return tokenizer, b"\n".join(lines) + b"\n"


def read_words():
    pattern = inspect.signature(TikTokenConverter.__init__).parameters["pattern"].default
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


@pytest.mark.parametrize("where", ["original", "."])
def test_metas_folder_is_read(tmp_path, where, monkeypatch):
    tokenizer, lines = llama_words()
    meta = tmp_path / where
    meta.mkdir(exist_ok=True)
    (meta / "tokenizer.model").write_bytes(lines)
    params = {"vision_chunk_size": 56, "vision_max_num_chunks": 2}
    (meta / "params.json").write_text(json.dumps(params))
    got = MllamaProcessor.from_pretrained(tmp_path)
    size = tokenizer.get_vocab_size()
    assert got.image_token_id == size + 256 == len(got.tokenizer) - 1
    assert got.tokenizer.bos_token_id == size and got.tokenizer.pad_token_id == size + 4
    assert got.tokenizer.convert_tokens_to_ids(EOT) == size + 9
    assert got.image_processor.max_image_tiles == 2
    assert got.image_processor.size == {"height": 56, "width": 56}
    assert got.image_processor.image_mean == IMAGE_OPTIONS["image_mean"]
    rng = random.Random(3)
    texts = [WORDS, "12345 don't", "", "x_y  z=1;\n\n\n"]
    texts += ["".join(rng.choices(WORDS + "12\t\r\n'sé你😀", k=40)) for _ in range(60)]
    for text in texts:
        assert got.tokenizer(text, add_special_tokens=False).input_ids == tokenizer.encode(text).ids
        assert got.decode(got.tokenizer(text).input_ids, skip_special_tokens=True) == text
    assert got.tokenizer("x").input_ids[0] == size
    ranks = {base64.b64decode(t): int(r) for t, r in (line.split() for line in lines.splitlines())}
    monkeypatch.setattr(TikTokenConverter, "load_tiktoken_bpe", staticmethod(lambda _: ranks))
    theirs = TikTokenConverter("x").converted()
    for text in texts:
        assert theirs.encode(text).ids == got.tokenizer(text, add_special_tokens=False).input_ids
    image = random_image(rng)
    batch = got(image, f"{IMAGE}what is it?", return_tensors="pt")
    assert batch.pixel_values.shape == (1, 1, 2, 3, 56, 56)
    got.save_pretrained(tmp_path / "saved")
    again = MllamaProcessor.from_pretrained(tmp_path / "saved")
    assert torch.equal(
        again(image, f"{IMAGE}what", return_tensors="pt").input_ids,
        got(image, f"{IMAGE}what", return_tensors="pt").input_ids,
    )
    assert again.tokenizer.model_max_length == 131072


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (b"aGk=\n", "line 1 is not a base64 token and its rank"),
        (b"YQ== 0\n? 1\n", "line 2 is not a base64 token"),
        (b"YQ== 0\nYg== 2\n", "its ranks do not count from 0 without gaps"),
        (b"", "its ranks do not count from 0"),
    ],
)
def test_damaged_tokenizer_models_are_named(tmp_path, lines, message):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(lines)
    with pytest.raises(ValueError, match=rf"tokenizer\.model is not a tiktoken file: {message}"):
        read_tiktoken(path)


def test_params_of_a_text_model(tmp_path):
    (tmp_path / "params.json").write_text("{}")
    with pytest.raises(ValueError, match=r"params\.json has no vision_chunk_size"):
        MllamaImageProcessor.from_pretrained(tmp_path)


ADDITIONS = [
    lambda t: t.add_tokens("<one>"),
    lambda t: t.add_tokens(["<one>", "<two>", "the", BOS, "<one>"]),
    lambda t: t.add_tokens([AddedToken("<wide>", lstrip=True, rstrip=True)]),
    lambda t: t.add_tokens(["<s1>"], special_tokens=True),
    lambda t: t.add_special_tokens({"pad_token": "<pad>"}),
    lambda t: t.add_special_tokens({"unk_token": AddedToken("<unk>", special=True)}),
    lambda t: t.add_special_tokens({"extra_special_tokens": ["<x1>", "<x2>"]}),
    lambda t: t.add_special_tokens({"additional_special_tokens": ["<x3>", EOT]}),
    lambda t: t.add_special_tokens(
        {"extra_special_tokens": ["<x4>"]}, replace_extra_special_tokens=False
    ),
    lambda t: t.add_special_tokens({}),
    lambda t: t.add_special_tokens({"extra_special_tokens": ["<x5>"], "eos_token": "<eos>"}),
]


@pytest.mark.parametrize("seed", range(4))
def test_added_tokens_equal_transformers(seed, tmp_path):
    ours, theirs = pair()
    order = random.Random(seed).sample(ADDITIONS, len(ADDITIONS))
    text = f"the <one><two> a  <wide>  b <s1><pad><x1>{EOT}<x5><eos>"
    mine, other = ours.tokenizer, theirs.tokenizer

    def assert_same_tokens(mine, other):
        assert len(mine) == len(other) and mine.get_vocab() == other.get_vocab()
        assert mine.special_tokens_map == other.special_tokens_map
        assert mine.all_special_tokens == other.all_special_tokens
        assert mine.all_special_ids == other.all_special_ids
        assert mine.get_added_vocab() == other.get_added_vocab()
        assert list(mine.added_tokens_decoder) == list(other.added_tokens_decoder)
        assert mine(text).input_ids == other(text)["input_ids"]
        for skip in (True, False):
            got = mine.decode(mine(text).input_ids, skip_special_tokens=skip)
            assert got == other.decode(other(text)["input_ids"], skip_special_tokens=skip)

    for add in order:
        assert add(mine) == add(other)
        assert mine.extra_special_tokens == other.extra_special_tokens
        assert_same_tokens(mine, other)
    ours.save_pretrained(tmp_path)
    again = MllamaProcessor.from_pretrained(tmp_path).tokenizer
    assert_same_tokens(again, mine)
    assert again.extra_special_tokens == mine.extra_special_tokens
    assert_same_tokens(again, transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path))
    theirs.save_pretrained(tmp_path / "theirs")
    assert_same_tokens(MllamaProcessor.from_pretrained(tmp_path / "theirs").tokenizer, other)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda t: t.add_tokens([3]), TypeError, "a token is a string or an AddedToken, got int"),
        (
            lambda t: t.add_special_tokens({"nonsense": "x"}),
            ValueError,
            "'nonsense' names no special",
        ),
        (
            lambda t: t.add_special_tokens({"pad_token": ["x"]}),
            TypeError,
            "pad_token must be a string",
        ),
        (
            lambda t: t.add_special_tokens({"extra_special_tokens": "x"}),
            TypeError,
            "extra_special_tokens must be a list of strings",
        ),
    ],
)
def test_what_is_no_token(call, error, message):
    tokenizer = MllamaTokenizer(backend(False), {"bos_token": BOS, "pad_token": PAD})
    size = len(tokenizer)
    with pytest.raises(error, match=message):
        call(tokenizer)
    assert len(tokenizer) == size


def test_extra_special_tokens_of_a_folder(folder):
    got = MllamaTokenizer.from_pretrained(folder, extra_special_tokens=[EOT, "<new>"])
    assert got.extra_special_tokens == [EOT, "<new>"]
    assert got.convert_tokens_to_ids("<new>") == len(got) - 1
    got = MllamaProcessor.from_pretrained(folder, extra_special_tokens={"image_token": IMAGE})
    assert got.tokenizer.image_token == IMAGE and got.tokenizer.extra_special_tokens == []
    with pytest.raises(
        ValueError, match="extra_special_tokens is '<new>', which the tokenizer does"
    ):
        MllamaTokenizer(backend(False), {}, extra_special_tokens=["<new>"])


def test_special_tokens_by_id_and_none():
    ours, theirs = pair()
    for tokenizer in (ours.tokenizer, theirs.tokenizer):
        tokenizer.pad_token_id = tokenizer.eos_token_id
        tokenizer.eos_token = None
    assert ours.tokenizer.special_tokens_map == theirs.tokenizer.special_tokens_map
    assert ours.tokenizer.eos_token_id is None is theirs.tokenizer.eos_token_id
    assert ours.tokenizer.pad_token == EOT == theirs.tokenizer.pad_token
    with pytest.raises(ValueError, match="pad_token_id is 99999, which is no token's id"):
        ours.tokenizer.pad_token_id = 99999
