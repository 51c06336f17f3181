"""The tokenizer, and whole folders in both directions between us and `transformers`."""

import json
import random

import pytest
import torch
from processor_helpers import (
    BOS,
    CONVERSATIONS,
    EOT,
    IMAGE,
    IMAGE_OPTIONS,
    PAD,
    SPECIAL,
    TEMPLATE,
    WORDS,
    backend,
    equal_on_inputs,
    mllama_processing,
    pair,
    transformers,
)
from tokenizers import Tokenizer, models

from mllama.processing.image_processor import MllamaImageProcessor
from mllama.processing.processor import MllamaProcessor
from mllama.processing.tokenizer import MllamaTokenizer


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
