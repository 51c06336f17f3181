"""The processor of a GGUF file beside that of the folder it was made from."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import gguf_writer
import numpy as np
import pytest
from gguf_writer import write_split, write_unified

from mllama import MllamaForConditionalGeneration, MllamaImageProcessor, MllamaProcessor
from mllama.checkpoints.gguf.checkpoint import GgufCheckpoint
from mllama.demo import checkpoint_path
from mllama.processing.published_template import PUBLISHED_TEMPLATE
from mllama.processing.tokenizer import MllamaTokenizer

DEMO = Path(checkpoint_path())
TEXTS = [
    "How many red circles are there?",
    "<|image|><|begin_of_text|>Grüße 你好 12345 <|eot_id|>\n\n  x  ",
    " it's a\ttriangle!!",
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """A unified file, and the text and projector files of a split one."""
    folder = tmp_path_factory.mktemp("gguf")
    split = write_split(DEMO, folder / "text.gguf", folder / "projector.gguf")
    return {"unified": [write_unified(DEMO, folder / "model.gguf")], "split": list(split)}


def read(files: list[Path], **options: Any) -> MllamaProcessor:
    path, *projector = files
    return MllamaProcessor.from_pretrained(path, projector=next(iter(projector), None), **options)


def changed(path: Path, **entries: Any) -> Path:
    """A text file with other entries of the tokenizer's; None for those that are left out."""
    weights, config = gguf_writer.stored(DEMO)
    stored = gguf_writer.text_entries(DEMO, config, pre="llama-bpe")
    stored |= gguf_writer.vision_entries(config)
    stored |= {f"tokenizer.{key.replace('__', '.')}": value for key, value in entries.items()}
    stored = {key: value for key, value in stored.items() if value is not None}
    tensors = gguf_writer.text_tensors(weights, config, unified=False)
    return gguf_writer.write(path, stored, tensors)


@pytest.mark.parametrize("dialect", ["unified", "split"])
def test_it_reads_as_that_of_the_folder(dialect, files):
    theirs, ours = MllamaProcessor.from_pretrained(DEMO), read(files[dialect])
    assert ours.image_processor.to_dict() == theirs.image_processor.to_dict()
    assert ours.tokenizer.special_tokens_map == theirs.tokenizer.special_tokens_map
    assert ours.tokenizer.model_max_length == theirs.tokenizer.model_max_length
    assert (ours.chat_template, len(ours.tokenizer)) == (
        theirs.chat_template,
        len(theirs.tokenizer),
    )
    for text in TEXTS:
        for options in ({}, {"add_special_tokens": False}, {"split_special_tokens": True}):
            ids = ours.tokenizer.encode(text, **options)
            assert ids == theirs.tokenizer.encode(text, **options), (text, options)
            for skip in (True, False):
                assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(
                    ids, skip_special_tokens=skip
                )
    image = np.random.randint(0, 256, (70, 130, 3), dtype=np.uint8)
    conversation = [
        {
            "role": "user",
            "content": [{"type": "image", "image": image}, {"type": "text", "text": "?"}],
        }
    ]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    one, other = (p.apply_chat_template(conversation, **options) for p in (ours, theirs))
    assert one.keys() == other.keys()
    assert all((one[name] == other[name]).all() for name in one)


def test_options_override_the_file(files):
    processor = read(files["unified"], size=28, padding_side="left", model_max_length=9)
    assert processor.image_processor.size == {"height": 28, "width": 28}
    assert (processor.tokenizer.padding_side, processor.tokenizer.model_max_length) == ("left", 9)
    own = MllamaTokenizer.from_pretrained(files["split"][0])
    assert read(files["unified"], tokenizer=own).tokenizer is own
    with pytest.raises(TypeError, match="unknown option 'colour'"):
        read(files["unified"], colour=1)


def test_a_text_file_does_not_say_how_large_tiles_are(files):
    text, projector = files["split"]
    with pytest.raises(ValueError, match=r"text\.gguf is a text file.*projector="):
        MllamaProcessor.from_pretrained(text)
    with pytest.raises(ValueError, match=r"projector= goes with a GGUF text file"):
        MllamaProcessor.from_pretrained(DEMO, projector=projector)
    own = MllamaImageProcessor.from_pretrained(projector)
    assert MllamaProcessor.from_pretrained(text, image_processor=own).image_processor is own
    assert len(MllamaTokenizer.from_pretrained(text)) == 451


def test_files_in_each_others_place_are_named(files):
    text, projector = files["split"]
    with pytest.raises(ValueError, match=r"projector\.gguf is a projector file.*the text file as"):
        read([projector])
    for load in (MllamaProcessor, MllamaForConditionalGeneration):
        with pytest.raises(
            ValueError, match=r"swapped: projector\.gguf .*text\.gguf the text"
        ) as said:
            load.from_pretrained(projector, projector=text)
        assert "is no projector file" not in str(said.value)


def test_a_projector_file_has_no_tokenizer(files):
    with pytest.raises(
        ValueError, match=r"projector\.gguf is a projector file.*the text model's file"
    ):
        MllamaTokenizer.from_pretrained(files["split"][1])


def test_it_can_be_saved_as_a_folder(files, tmp_path):
    read(files["unified"]).save_pretrained(tmp_path)
    theirs, ours = read(files["unified"]), MllamaProcessor.from_pretrained(tmp_path)
    assert all(ours.tokenizer.encode(t) == theirs.tokenizer.encode(t) for t in TEXTS)
    assert ours.image_processor.to_dict() == theirs.image_processor.to_dict()


def test_a_first_token_only_where_the_file_wants_it(tmp_path):
    without = MllamaTokenizer.from_pretrained(
        changed(tmp_path / "m.gguf", ggml__add_bos_token=False)
    )
    assert without.bos_token == "<|begin_of_text|>"
    assert without.encode("a") == MllamaTokenizer.from_pretrained(DEMO).encode("a")[1:]


def test_user_defined_tokens_are_no_special_ones(tmp_path):
    _, config = gguf_writer.stored(DEMO)
    kinds = gguf_writer.text_entries(DEMO, config, pre="llama-bpe")["tokenizer.ggml.token_type"]
    tokenizer = MllamaTokenizer.from_pretrained(
        changed(tmp_path / "m.gguf", ggml__token_type=[*kinds[:-2], 4, kinds[-1]])
    )
    text = "<|reserved_special_token_2|>"
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text


@pytest.mark.parametrize("template", [None, "{{ messages[0]['content'] }}"])
def test_the_published_template_stands_in(template, tmp_path, caplog):
    """Where a file has none, and where its own knows no images, as Llama 3.1's in fine-tunes of text."""
    path = changed(tmp_path / "m.gguf", chat_template=template)
    with caplog.at_level(logging.INFO, logger="mllama"):
        processor = MllamaProcessor.from_pretrained(path)
    assert processor.chat_template == PUBLISHED_TEMPLATE
    assert "no chat template for images" in caplog.text


def test_named_templates_are_kept(tmp_path):
    path = changed(tmp_path / "m.gguf", chat_template__tools="{{ tools }}")
    assert set(MllamaProcessor.from_pretrained(path).chat_template) == {"default", "tools"}


def test_the_published_template_writes_what_the_published_one_does(files):
    """By the ids and texts of the specification."""
    processor = read(files["unified"], chat_template=PUBLISHED_TEMPLATE)

    def written(*messages: Any, **options: Any) -> str:
        return processor.apply_chat_template(list(messages), **options)

    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": " What? "}]}
    system = {"role": "system", "content": " Be brief. "}
    assert written(user, add_generation_prompt=True) == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n<|image|> What? <|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    question = {"role": "user", "content": "Hi"}
    head = "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
    dates = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
    turn = "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    assert written(question, date_string="26 Jul 2024") == head + dates + turn
    assert written(system, question, date_string="26 Jul 2024") == head + dates + "Be brief." + turn
    assert "Today Date: " in written(question)
    with pytest.raises(Exception, match="Prompting with images is incompatible with system"):
        written(system, user)
    with pytest.raises(Exception, match="writes no tools"):
        written(question, tools=[{"name": "f"}])


def test_what_ends_an_answer(tmp_path):
    """All that ends turns of an instruct model, one token of a base model, or what the file lists."""

    def ends(**entries: Any) -> dict[str, Any]:
        path = changed(tmp_path / "m.gguf", **{f"ggml__{k}": v for k, v in entries.items()})
        return GgufCheckpoint(path, with_vision=False).generation_config

    instruct, base = ends(), ends(eos_token_id=439)
    assert instruct["eos_token_id"] == [439, 446, 447]
    assert (instruct["do_sample"], instruct["temperature"], instruct["top_p"]) == (True, 0.6, 0.9)
    assert base["eos_token_id"] == [439] and "do_sample" not in base
    assert ends(eos_token_ids=[447, 440])["eos_token_id"] == [447, 440]
    with pytest.raises(ValueError, match=r"eos_token_ids must be below 451, got \[451\]"):
        ends(eos_token_ids=[451])
