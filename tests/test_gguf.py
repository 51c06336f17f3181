"""GGUF files as checkpoints: element types, names, order of rows, gates, configuration, and halves."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import gguf_writer
import numpy as np
import pytest
import torch
from gguf_writer import as_float32, as_type, random_blocks, write_split, write_unified

from mllama import MllamaConfig, MllamaForConditionalGeneration
from mllama.checkpoints.checkpoint import CheckpointError
from mllama.checkpoints.gguf.checkpoint import GgufCheckpoint
from mllama.checkpoints.gguf.container import GgufFile, is_gguf
from mllama.checkpoints.gguf.gates import gate_of
from mllama.checkpoints.gguf.types import TYPES
from mllama.checkpoints.key_layout import canonical_name
from mllama.demo import checkpoint_path
from mllama.quantization.policy import kind_of
from mllama_kernels.quantized_tensor import QuantizedTensor

DEMO = Path(checkpoint_path())
WIDE = {  # rows of whole blocks of 256, heads of 128, and a square vision feed-forward layer
    "image_token_index": 64,
    "text_config": {
        "vocab_size": 64,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "cross_attention_layers": [1],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 3,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "vision_config": {
        "hidden_size": 256,
        "intermediate_size": 256,
        "attention_heads": 4,
        "image_size": 28,
        "num_hidden_layers": 2,
        "num_global_layers": 2,
        "intermediate_layers_indices": [0],
        "vision_output_dim": 512,
    },
}
KEPT = {"Q8_0": "q8_0", "Q6_K": "q6_k", "Q4_K": "q4_k", "Q4_0": "q4_0"}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of WIDE with random weights, gates among them."""
    folder = tmp_path_factory.mktemp("wide")
    torch.manual_seed(5)
    model = MllamaForConditionalGeneration(MllamaConfig.from_dict(WIDE), backend="reference")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gate" in name.rsplit(".", 1)[-1]:
                parameter.normal_()
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def published(folder: Path) -> dict[str, torch.Tensor]:
    return {canonical_name(name): t for name, t in gguf_writer.stored(folder)[0].items()}


def written(folder: Path, place: Path, dialect: str, quantise=as_float32) -> GgufCheckpoint:
    if dialect == "unified":
        return GgufCheckpoint(write_unified(folder, place / "model.gguf", quantise))
    text, projector = place / "text.gguf", place / "projector.gguf"
    return GgufCheckpoint(*write_split(folder, text, projector, quantise))


def values_of(checkpoint: GgufCheckpoint) -> dict[str, torch.Tensor | QuantizedTensor]:
    return dict(checkpoint.read(list(checkpoint.tensors)))


def refused(*files: Path, problem: str, with_vision: bool = True) -> None:
    with pytest.raises(CheckpointError, match=problem):
        checkpoint = GgufCheckpoint(*files, with_vision=with_vision)
        if checkpoint.problems:
            raise CheckpointError(files[0], checkpoint.problems)


def test_types_are_those_of_the_package():
    """But for two types of activations, which no file holds."""
    theirs = {
        int(kind): (kind.name, *gguf.GGML_QUANT_SIZES[kind]) for kind in gguf.GGML_QUANT_SIZES
    }
    ours = {number: (kind.name, kind.block, kind.nbytes) for number, kind in TYPES.items()}
    assert ours == {n: one for n, one in theirs.items() if one[0] not in ("Q8_1", "Q8_K")}


@pytest.mark.parametrize("number", [n for n, kind in TYPES.items() if kind.decode is not None])
def test_decoders_have_the_bits_of_the_package(number):
    kind = TYPES[number]
    blocks = torch.randint(0, 256, (2000, kind.nbytes), dtype=torch.uint8)
    with np.errstate(all="ignore"):  # any scale, infinite ones too
        expected = gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType(number))
    found = kind.decode(blocks).numpy()
    same = (found.view(np.uint32) == expected.view(np.uint32)) | (
        np.isnan(found) & np.isnan(expected)
    )
    assert found.dtype == np.float32 and same.all()


@pytest.mark.parametrize("dialect", ["unified", "split"])
@pytest.mark.parametrize("source", ["demo", "wide"])
def test_weights_are_the_published_ones(dialect, source, tmp_path, wide):
    """In float32, which holds them all: every tensor, in the published order, and gates to the last bit."""
    folder = DEMO if source == "demo" else wide
    expected = published(folder)
    checkpoint = written(folder, tmp_path, dialect)
    assert checkpoint.problems == [] and checkpoint.unreadable == set()
    assert checkpoint.tensors.keys() == expected.keys()
    for name, value in values_of(checkpoint).items():
        info = checkpoint.tensors[name]
        assert (info.shape, info.dtype) == (tuple(value.shape), value.dtype), name
        assert torch.equal(value.to(torch.bfloat16), expected[name]), name


@pytest.mark.parametrize("dialect", ["unified", "split"])
def test_the_configuration_is_the_published_one(dialect, tmp_path):
    checkpoint = written(DEMO, tmp_path, dialect, as_type("F16"))
    stored = json.loads((DEMO / "config.json").read_text())
    stored.pop("torch_dtype")
    # What ends turns is in the demo's generation_config.json alone; published models have it twice.
    stored["text_config"]["eos_token_id"] = [439, 446, 447]
    ours, theirs = MllamaConfig.from_dict(checkpoint.config), MllamaConfig.from_dict(stored)
    assert ours.to_dict() == theirs.to_dict()
    assert checkpoint.config["dtype"] == "bfloat16"
    assert checkpoint.config_problems(ours) == []
    assert checkpoint.generation_config["eos_token_id"] == [439, 446, 447]


def test_all_float32_is_a_float32_model(tmp_path):
    assert written(DEMO, tmp_path, "unified").config["dtype"] == "float32"


@pytest.mark.parametrize("dialect", ["unified", "split"])
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_matrices_are_kept_or_decoded(kind, dialect, tmp_path):
    """Quantising row by row and putting rows into another order can change places."""
    checkpoint = written(DEMO, tmp_path, dialect, as_type(kind))
    expected, found = published(DEMO), values_of(checkpoint)
    assert checkpoint.problems == [] and found.keys() == expected.keys()
    number, kept = gguf.GGMLQuantizationType[kind], 0
    for name, value in found.items():
        info = checkpoint.tensors[name]
        # Converters quantise no projector file.
        is_quantised = kind_of(name) is not None and (
            dialect == "unified" or not name.startswith(("model.vision", "model.multi"))
        )
        assert info.encoding == (KEPT.get(kind) if is_quantised else None), name
        assert info.is_decoded == (is_quantised and kind not in KEPT), name
        if not is_quantised:  # float16 lacks the smallest of bfloat16
            published_value = expected[name].to(info.dtype).to(torch.bfloat16)
            assert torch.equal(value.to(torch.bfloat16), published_value), name
            continue
        kept += 1
        blocks = gguf.quants.quantize(expected[name].float().numpy(), number)
        decoded = torch.from_numpy(gguf.quants.dequantize(blocks, number))
        if kind in KEPT:
            assert isinstance(value, QuantizedTensor) and info.packed_bytes == blocks.nbytes
            assert torch.equal(value.blocks(), torch.from_numpy(blocks)), name
            value = value.dequantize()
        assert torch.equal(value, decoded), name
    assert kept > 30
    notes = checkpoint.found[0].notes
    assert any(kind in note for note in notes) == (kind not in KEPT)


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"])
def test_types_of_long_rows(kind, tmp_path, wide):
    """Against the package's decoder of what lies in the file; v has no order of rows, q has."""
    path = write_unified(wide, tmp_path / "model.gguf", random_blocks(kind))
    checkpoint = GgufCheckpoint(path)
    assert checkpoint.problems == []
    found = values_of(checkpoint)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    number = gguf.GGMLQuantizationType[kind]
    for stored, name, heads in (
        ("blk.0.attn_v.weight", "layers.0.self_attn.v_proj.weight", None),
        ("blk.0.attn_q.weight", "layers.0.self_attn.q_proj.weight", 4),
        ("blk.1.cross_attn_k_proj.weight", "layers.1.cross_attn.k_proj.weight", 2),
        ("token_embd.weight", "embed_tokens.weight", None),
    ):
        assert tensors[stored].tensor_type == number
        expected = torch.from_numpy(gguf.quants.dequantize(tensors[stored].data, number))
        if heads is not None:
            pairs = expected.reshape(heads, -1, 2, expected.shape[1])
            expected = torch.cat([pairs[:, :, 0], pairs[:, :, 1]], dim=1).reshape(expected.shape)
        value = found[f"model.language_model.{name}"]
        assert isinstance(value, QuantizedTensor) == (kind in KEPT)
        value = value.dequantize() if kind in KEPT else value
        assert torch.equal(value, expected), stored


def test_a_table_of_blocks_is_decoded(tmp_path):
    """Position tables are never quantised here, and are read wherever a tool has quantised them."""
    weights, config = gguf_writer.stored(DEMO)
    tensors = gguf_writer.vision_tensors(weights, config, unified=True)
    tensors |= gguf_writer.text_tensors(weights, config, unified=True)
    entries = gguf_writer.text_entries(DEMO, config, pre="llama-bpe")
    entries |= gguf_writer.vision_entries(config)
    kind = gguf.GGMLQuantizationType.Q8_0

    def quantise(name, values):
        if name == "v.position_embd.weight":
            return gguf.quants.quantize(values, kind), kind
        return as_float32(name, values)

    checkpoint = GgufCheckpoint(gguf_writer.write(tmp_path / "m.gguf", entries, tensors, quantise))
    name = "model.vision_model.gated_positional_embedding.embedding"
    [(_, value)] = checkpoint.read([name])
    blocks = gguf.quants.quantize(tensors["v.position_embd.weight"], kind)
    assert torch.equal(value, torch.from_numpy(gguf.quants.dequantize(blocks, kind)))


def test_gates_come_back_from_their_tanh():
    gates = torch.cat([torch.linspace(-4, 4, 1001), torch.tensor([0.0, 1.328125, 9.0])]).bfloat16()
    stored = torch.from_numpy(np.tanh(gates.float().numpy()))
    assert torch.equal(gate_of(stored[:-1]), gates[:-1].double())
    trained = torch.tensor([0.123456, -1.7654321])  # in float32
    assert torch.allclose(gate_of(trained.tanh()), trained.double(), rtol=1e-6, atol=0)
    for saturated in (1.0, -1.0):
        found = gate_of(torch.tensor([saturated]))
        assert found.isfinite() and found.float().tanh().item() == saturated
    for wrong in (1.001, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="no tanh"):
            gate_of(torch.tensor([wrong]))


def test_gates_that_ollama_0_7_0_left_are_refused(tmp_path, wide):
    path = write_unified(wide, tmp_path / "model.gguf", raw_gates=True)
    refused(path, problem=r"stored without tanh.*as Ollama 0\.7\.0's converter did")


def test_two_position_gates_are_of_one(tmp_path):
    weights, config = gguf_writer.stored(DEMO)
    text, projector = write_split(DEMO, tmp_path / "t.gguf", tmp_path / "p.gguf")
    tensors = gguf_writer.vision_tensors(weights, config, unified=False)
    tensors["v.position_embd.gate"] = tensors["v.position_embd.gate"] + np.float32(0.01)
    other = gguf_writer.write(tmp_path / "other.gguf", gguf_writer.vision_entries(config), tensors)
    refused(text, other, problem="gates of the two position tables")
    del tensors["v.position_embd.gate"]
    entries = gguf_writer.vision_entries(config)
    other = gguf_writer.write(tmp_path / "lacking.gguf", entries, tensors)
    refused(text, other, problem=r"missing: v\.position_embd\.gate in lacking\.gguf")
    assert GgufCheckpoint(text, projector).problems == []


def test_rotary_factors_are_those_of_the_configuration(tmp_path):
    weights, config = gguf_writer.stored(DEMO)
    tensors = gguf_writer.text_tensors(weights, config, unified=False)
    entries = gguf_writer.text_entries(DEMO, config, pre="llama-bpe")
    own = MllamaConfig.from_dict(config)
    # Converters do not write the scaling: that of the published models is meant.
    del entries["mllama.rope.scaling.original_context_length"]
    path = gguf_writer.write(tmp_path / "t.gguf", entries, tensors)
    checkpoint = GgufCheckpoint(path, with_vision=False)
    published_scaling = MllamaConfig.from_dict(checkpoint.config)
    [problem] = checkpoint.config_problems(published_scaling)
    assert "rope_freqs.weight has" in problem and "give config=" in problem
    assert checkpoint.config_problems(own) == []
    # None are there where nothing is scaled.
    del tensors["rope_freqs.weight"]
    path = gguf_writer.write(tmp_path / "none.gguf", entries, tensors)
    [problem] = GgufCheckpoint(path, with_vision=False).config_problems(own)
    assert "there is no rope_freqs.weight" in problem
    entries["mllama.rope.scaling.type"] = "none"
    path = gguf_writer.write(tmp_path / "unscaled.gguf", entries, tensors)
    checkpoint = GgufCheckpoint(path, with_vision=False)
    unscaled = MllamaConfig.from_dict(checkpoint.config)
    assert unscaled.text_config.rope_scaling is None
    assert checkpoint.config_problems(unscaled) == []
    assert len(checkpoint.config_problems(own)) == 1


def test_other_heads_are_another_order_of_rows(tmp_path):
    checkpoint = written(DEMO, tmp_path, "unified")
    config = MllamaConfig.from_dict(checkpoint.config)
    config.text_config.num_attention_heads = 4
    problems = checkpoint.config_problems(config)
    assert any("num_attention_heads is 4, model.gguf has 2" in problem for problem in problems)


def test_halves_that_do_not_belong_together(tmp_path, wide):
    text, projector = write_split(DEMO, tmp_path / "t.gguf", tmp_path / "p.gguf")
    other_text, other = write_split(wide, tmp_path / "t2.gguf", tmp_path / "p2.gguf")
    whole = write_unified(DEMO, tmp_path / "u.gguf")
    refused(projector, problem="p.gguf is a projector file.*give the text file as the model")
    refused(
        projector, text, problem="swapped: p.gguf is the projector file, and t.gguf the text file"
    )
    refused(projector, other, problem=r"p.gguf is a projector file[\s\S]*text file as the model")
    refused(text, problem="t.gguf is a text file.*projector=")
    refused(text, text, problem="t.gguf is no projector file")
    refused(text, whole, problem="u.gguf is no projector file")
    refused(whole, projector, problem="u.gguf is a whole model, which takes no projector file")
    refused(text, other, problem="p2.gguf projects to a width of 256.*t.gguf has 128")
    refused(other_text, projector, problem="halves of two models")
    refused(text, tmp_path / "missing.gguf", problem="missing.gguf cannot be read: No such file")
    refused(tmp_path, problem="not a regular file")
    assert GgufCheckpoint(text, with_vision=False).problems == []


def test_a_model_of_another_architecture(tmp_path):
    weights, config = gguf_writer.stored(DEMO)
    tensors = gguf_writer.text_tensors(weights, config, unified=False)
    entries = gguf_writer.text_entries(DEMO, config, pre="llama-bpe")
    path = gguf_writer.write(tmp_path / "l.gguf", entries, tensors, architecture="llama")
    refused(path, problem="architecture 'llama', expected 'mllama'", with_vision=False)


def test_metadata_that_lack_or_lie(tmp_path):
    weights, config = gguf_writer.stored(DEMO)
    tensors = gguf_writer.text_tensors(weights, config, unified=False)
    entries = gguf_writer.text_entries(DEMO, config, pre="llama-bpe")

    def refused_with(problem: str, **changes) -> None:
        changed = {**entries, **{f"mllama.{k.replace('__', '.')}": v for k, v in changes.items()}}
        changed = {key: value for key, value in changed.items() if value is not None}
        path = gguf_writer.write(tmp_path / "m.gguf", changed, tensors)
        refused(path, problem=problem, with_vision=False)

    refused_with("it lacks mllama.block_count", block_count=None)
    refused_with("block_count must be an integer of at least 1", block_count=0)
    refused_with("head_count must be an integer", attention__head_count="two")
    refused_with("head_count_kv must be an integer", attention__head_count_kv=[1, 1])
    refused_with("scaling.type is 'yarn', which is not supported", rope__scaling__type="yarn")
    refused_with("no 3 heads of pairs", attention__head_count=3)


def test_tensors_that_are_not_read(tmp_path):
    """Norms of blocks, types without a decoder and integers are named; unknown names are the loader's."""
    weights, config = gguf_writer.stored(DEMO)
    tensors = gguf_writer.text_tensors(weights, config, unified=False)
    entries = gguf_writer.text_entries(DEMO, config, pre="llama-bpe")
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "mllama")
    for key, value in entries.items():
        kind = {bool: "bool", int: "uint32", float: "float32", str: "string", list: "array"}
        getattr(writer, f"add_{kind[type(value)]}")(key, value)
    for name, values in tensors.items():
        data, kind = values, gguf.GGMLQuantizationType.F32
        if name == "blk.0.attn_norm.weight":
            kind = gguf.GGMLQuantizationType.Q8_0
            data = gguf.quants.quantize(values[None], kind)[0]
        elif name == "blk.0.ffn_down.weight":
            kind = gguf.GGMLQuantizationType.IQ2_XXS
            data = np.zeros((128, 66), np.uint8)
        elif name == "blk.0.ffn_up.weight":
            kind, data = gguf.GGMLQuantizationType.I8, values.astype(np.int8)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.add_tensor("blk.0.surprise.weight", tensors["blk.0.attn_v.weight"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    checkpoint = GgufCheckpoint(tmp_path / "m.gguf", with_vision=False)
    problems = "\n".join(checkpoint.problems)
    assert "blk.0.attn_norm.weight in m.gguf is Q8_0: norms, gates and biases are" in problems
    assert "blk.0.ffn_down.weight in m.gguf is IQ2_XXS; F32, F16, Q4_0" in problems
    assert "blk.0.ffn_up.weight in m.gguf is I8" in problems
    assert len(checkpoint.problems) == len(checkpoint.unreadable) == 3
    assert "blk.0.surprise.weight" in checkpoint.tensors


def test_opening_reads_only_headers_and_gates(tmp_path, monkeypatch):
    path = write_unified(DEMO, tmp_path / "model.gguf")
    read: list[int] = []
    inner = GgufFile.read
    monkeypatch.setattr(
        GgufFile, "read", lambda self, one: (read.append(one.nbytes), inner(self, one))[1]
    )
    GgufCheckpoint(path)
    assert sum(read) < 500 and is_gguf(path) and not is_gguf(DEMO) and not is_gguf(tmp_path / "no")


def test_a_file_that_changes_while_it_is_loaded(tmp_path):
    path = write_unified(DEMO, tmp_path / "model.gguf")
    checkpoint = GgufCheckpoint(path)
    reading = checkpoint.read(list(checkpoint.tensors))
    next(reading)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 4096)
    with pytest.raises(CheckpointError, match="was changed while it was loaded"):
        list(reading)
