"""Models of GGUF files beside those of the folder they were made from, and the commands on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf_writer import (
    as_type,
    stored,
    text_entries,
    text_tensors,
    write,
    write_split,
    write_unified,
)
from test_gguf import WIDE

from mllama import (
    MllamaConfig,
    MllamaForCausalLM,
    MllamaForConditionalGeneration,
    MllamaProcessor,
    MllamaTextModel,
    MllamaVisionModel,
    cli,
)
from mllama.checkpoints.checkpoint import CheckpointError
from mllama.demo import checkpoint_path, sample_picture
from mllama_kernels import quantize
from mllama_kernels.testing import assert_close_to_exact

DEMO = Path(checkpoint_path())
QUESTION = "How many red circles are there?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model.gguf, all in float32; q8.gguf, whose matrices are Q8_0, and q5.gguf; text and projector."""
    folder = tmp_path_factory.mktemp("gguf")
    write_unified(DEMO, folder / "model.gguf")
    write_unified(DEMO, folder / "q8.gguf", as_type("Q8_0"))
    write_unified(DEMO, folder / "q5.gguf", as_type("Q5_1"))
    write_split(DEMO, folder / "text.gguf", folder / "projector.gguf", as_type("Q4_0"))
    return folder


def inputs(processor: MllamaProcessor) -> dict[str, torch.Tensor]:
    turn = [{"type": "image", "image": sample_picture(3)[0]}, {"type": "text", "text": QUESTION}]
    return processor.apply_chat_template(
        [{"role": "user", "content": turn}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


def load(path: Path, projector: Path | None = None, **options: Any) -> Any:
    return MllamaForConditionalGeneration.from_pretrained(path, projector=projector, **options)


def test_a_float32_file_is_the_published_model(folder):
    theirs, ours = load(DEMO, dtype="float32"), load(folder / "model.gguf")
    assert (ours.dtype, ours.quantization) == (torch.float32, None)
    assert (ours.semantics.name, ours.semantics_reason) == ("meta", "a GGUF file has Meta's")
    expected = theirs.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    assert all(torch.equal(t, expected[name]) for name, t in ours.state_dict().items())
    batch = inputs(MllamaProcessor.from_pretrained(folder / "model.gguf"))
    with torch.no_grad():
        assert torch.equal(ours(**batch).logits, theirs(**batch).logits)
    greedy = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(ours.generate(**batch, **greedy), theirs.generate(**batch, **greedy))


@pytest.mark.parametrize("files", [["q8.gguf"], ["text.gguf", "projector.gguf"]])
def test_packed_weights_compute_as_decoded_ones(files, folder):
    """By the rule of errors, beside the model whose weights were decoded while they were loaded."""
    paths = [folder / name for name in files]
    packed = load(*paths, dtype="float32")
    decoded = load(*paths, dtype="float32", dequantize=True)
    plain, exact = (
        load(*paths, dtype=dtype, dequantize=True, backend="reference")
        for dtype in ("float32", "float64")
    )
    assert packed.quantization.encoding == ("q8_0" if len(files) == 1 else "q4_0")
    assert packed.quantization.method == "GGUF" and decoded.quantization is None
    batch = inputs(MllamaProcessor.from_pretrained(DEMO))
    with torch.no_grad():
        expected = exact(**{**batch, "pixel_values": batch["pixel_values"].double()}).logits
        assert_close_to_exact(packed(**batch).logits, expected, plain(**batch).logits)
    greedy = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(packed.generate(**batch, **greedy), decoded.generate(**batch, **greedy))


def test_a_mix_of_k_types(tmp_path):
    """As llama.cpp's Q4_K_M: most matrices in q4_k, some in q6_k, in the order of rows that files have."""
    torch.manual_seed(3)
    model = MllamaForConditionalGeneration(MllamaConfig.from_dict(WIDE), backend="reference")
    model.to(torch.bfloat16).save_pretrained(tmp_path / "folder")

    def quantise(name, values):
        if values.ndim != 2 or "position" in name:
            return values, gguf.GGMLQuantizationType.F32
        kind = "Q6_K" if "attn_v" in name or name == "output.weight" else "Q4_K"
        blocks = quantize(torch.from_numpy(values.copy()), kind.lower()).blocks()
        return blocks.numpy(), gguf.GGMLQuantizationType[kind]

    path = write_unified(tmp_path / "folder", tmp_path / "model.gguf", quantise)
    packed = load(path, dtype="float32")
    assert packed.quantization.encoding == "q4_k"
    batch = {
        "input_ids": torch.tensor([[1, 64, 7, 9, 30, 5]]),
        "pixel_values": torch.randn(1, 1, 4, 3, 28, 28),
        "aspect_ratio_ids": torch.tensor([[6]]),
        "aspect_ratio_mask": torch.ones(1, 1, 4, dtype=torch.long),
        "cross_attention_mask": torch.ones(1, 6, 1, 4, dtype=torch.long),
    }
    plain, exact = (
        load(path, dtype=dtype, dequantize=True, backend="reference")
        for dtype in ("float32", "float64")
    )
    with torch.no_grad():
        expected = exact(**{**batch, "pixel_values": batch["pixel_values"].double()}).logits
        assert_close_to_exact(packed(**batch).logits, expected, plain(**batch).logits)


def test_what_has_no_kernel_is_decoded_or_encoded_anew(folder, caplog):
    with caplog.at_level("INFO", logger="mllama"):
        decoded = load(folder / "q5.gguf")
    assert "decoded to the model's dtype" in caplog.text and "tensors of Q5_1" in caplog.text
    assert (decoded.dtype, decoded.quantization.encoding) == (torch.bfloat16, "decoded")
    again = load(folder / "q5.gguf", quantization="q8_0")
    assert again.quantization.encoding == "q8_0"


def test_it_can_be_saved_as_a_folder(folder, tmp_path):
    model = load(folder / "q8.gguf")
    model.save_pretrained(tmp_path)
    MllamaProcessor.from_pretrained(folder / "q8.gguf").save_pretrained(tmp_path)
    again = load(tmp_path)
    assert again.quantization.encoding == "q8_0"
    batch = inputs(MllamaProcessor.from_pretrained(tmp_path))
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, again(**batch).logits)


def test_parts_of_a_model(folder):
    text, projector = folder / "text.gguf", folder / "projector.gguf"
    whole = load(text, projector, dtype="float32").state_dict()
    for cls, files, prefix in (
        (MllamaForCausalLM, [text], "model.language_model."),
        (MllamaTextModel, [text, projector], "model.language_model."),
        (MllamaVisionModel, [text, projector], "model.vision_model."),
    ):
        part = cls.from_pretrained(files[0], projector=(files + [None])[1], dtype="float32")
        name = {"MllamaForCausalLM": "model.norm.weight", "MllamaTextModel": "norm.weight"}.get(
            cls.__name__, "layernorm_pre.weight"
        )
        own = name.removeprefix("model.")
        assert torch.equal(part.state_dict()[name], whole[prefix + own]), cls


def test_what_is_lacking_is_named(folder, tmp_path):
    text, projector = folder / "text.gguf", folder / "projector.gguf"
    with pytest.raises(CheckpointError, match=r"text\.gguf is a text file.*projector="):
        load(text)
    with pytest.raises(ValueError, match="is no GGUF file"):
        load(DEMO, projector)
    with pytest.raises(ValueError, match="revision"):
        load(text, projector, revision="main")
    weights, config = stored(DEMO)
    tensors = text_tensors(weights, config, unified=False)
    entries = text_entries(DEMO, config, pre="llama-bpe")
    lacking = {
        k: v for k, v in tensors.items() if k not in ("blk.0.attn_q.weight", "output.weight")
    }
    lacking["blk.9.attn_q.weight"] = tensors["blk.0.attn_q.weight"]
    path = write(tmp_path / "lacking.gguf", entries, lacking)
    with pytest.raises(CheckpointError) as raised:
        MllamaForCausalLM.from_pretrained(path)
    assert [problem.split(" ")[:2] for problem in raised.value.problems] == [
        ["extra:", "blk.9.attn_q.weight"],
        ["missing:", "lm_head.weight"],
        ["missing:", "model.layers.0.self_attn.q_proj.weight"],
    ]


def test_rotary_factors_of_another_scaling_are_an_error(folder, tmp_path):
    """Unless the configuration that is given has it."""
    weights, config = stored(DEMO)
    entries = text_entries(DEMO, config, pre="llama-bpe")
    del entries["mllama.rope.scaling.original_context_length"]
    path = write(
        tmp_path / "t.gguf", entries, text_tensors(weights, config, unified=False), as_type("F16")
    )
    with pytest.raises(CheckpointError, match=r"rope_freqs\.weight has .*give config="):
        load(path, folder / "projector.gguf")
    model = load(path, folder / "projector.gguf", config=DEMO)
    rope = model.config.text_config.rope_parameters
    assert rope["original_max_position_embeddings"] == 256


def test_a_tensor_of_a_type_that_is_not_read(folder, tmp_path):
    kind = gguf.GGMLQuantizationType.TQ2_0
    weights, config = stored(DEMO)
    tensors = text_tensors(weights, config, unified=False)

    def quantise(name, values):
        if name == "blk.0.ffn_down.weight":
            return gguf.quants.quantize(values, kind), kind
        return values, gguf.GGMLQuantizationType.F32

    path = write(
        tmp_path / "t.gguf", text_entries(DEMO, config, pre="llama-bpe"), tensors, quantise
    )
    with pytest.raises(CheckpointError) as raised:
        MllamaForCausalLM.from_pretrained(path)
    assert raised.value.problems == [
        "blk.0.ffn_down.weight in t.gguf is TQ2_0; F32, F16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, "
        "Q5_K, Q6_K, IQ4_NL, IQ4_XS, F64, BF16 are read"
    ]


def run(capsys: Any, *arguments: object) -> tuple[int, str, str]:
    code = cli.main(list(map(str, arguments)))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_commands(folder, tmp_path, capsys):
    image = tmp_path / "image.png"
    sample_picture(3)[0].save(image)
    text, projector = folder / "text.gguf", folder / "projector.gguf"
    ask = ("generate", "--image", image, "--prompt", QUESTION, "--greedy", "--device", "cpu")
    code, theirs, _ = run(capsys, *ask, "--model", DEMO, "--dtype", "float32")
    code, ours, _ = run(capsys, *ask, "--model", folder / "model.gguf")
    assert (code, ours) == (0, theirs)
    code, answer, _ = run(capsys, *ask, "--model", text, "--projector", projector)
    assert code == 0 and answer.strip()
    code, _, error = run(capsys, *ask, "--model", text)
    assert code == 1 and "text.gguf is a text file" in error and "--projector" in error
    code, out, _ = run(capsys, "info", "--model", text, "--projector", projector, "--json")
    model = json.loads(out)["model"]
    assert code == 0 and (model["layout"], model["encoding"]) == ("GGUF", "q4_0")
    assert model["semantics"] == "meta"
    code, _, error = run(capsys, "info", "--model", projector)
    assert code == 1 and "projector.gguf is a projector file" in error
