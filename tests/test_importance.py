"""Files of importance: llama.cpp's and our own, and what is wrong with others."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mllama.quantization.importance import ImportanceError, read_importance, write_importance

GATE = "model.language_model.layers.0.mlp.gate_proj.weight"
DOWN = "model.language_model.layers.0.mlp.down_proj.weight"
CROSS = "model.language_model.layers.1.cross_attn.k_proj.weight"
PUBLISHED = {
    GATE: "language_model.model.layers.0.mlp.gate_proj.weight",
    DOWN: "language_model.model.layers.0.mlp.down_proj.weight",
    CROSS: "language_model.model.layers.1.cross_attn.k_proj.weight",
}
WIDTHS = {GATE: 8, DOWN: 16, CROSS: 8}


def write_imatrix(path, entries, kind="imatrix", dtype=np.float32) -> None:
    """As llama.cpp writes it: (sum of squares, count) by name."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.kv_data[0].pop("general.architecture")
    writer.add_string("general.type", kind)
    writer.add_array("imatrix.datasets", ["text.txt"])
    writer.add_uint32("imatrix.chunk_count", 3)
    for name, (sums, count) in entries.items():
        writer.add_tensor(f"{name}.in_sum2", np.asarray(sums, dtype)[None])
        if count is not None:
            writer.add_tensor(f"{name}.counts", np.asarray(count, dtype).reshape(-1, 1))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_an_imatrix_holds_sums_and_counts(tmp_path):
    path = tmp_path / "imatrix.gguf"
    gate, down = np.arange(8.0), np.ones(16)
    entries = {
        "blk.0.ffn_gate.weight": (gate, 4.0),
        "blk.0.ffn_down.weight": (down, 2.0),
        "blk.1.cross_attn_k_proj.weight": (np.zeros(8), 0.0),  # never seen
    }
    write_imatrix(path, entries)
    found = read_importance(path, WIDTHS)
    assert found.keys() == {GATE, DOWN}
    assert found[GATE].equal(torch.arange(8, dtype=torch.float64) / 4)
    assert found[DOWN].equal(torch.full((16,), 0.5, dtype=torch.float64))


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "importance.safetensors"
    means = {name: torch.rand(width).double() for name, width in WIDTHS.items()}
    write_importance(path, {PUBLISHED[name]: mean for name, mean in means.items()})
    found = read_importance(path, WIDTHS)
    assert {n: v.float().tolist() for n, v in found.items()} == {
        n: v.float().tolist() for n, v in means.items()
    }


@pytest.mark.parametrize(
    ("entries", "text"),
    [
        ({PUBLISHED[GATE]: torch.ones(7)}, r"gate_proj.weight must have 8 columns, got \(7,\)"),
        ({PUBLISHED[GATE]: -torch.ones(8)}, "gate_proj.weight holds values that are negative"),
        ({PUBLISHED[GATE]: torch.ones(8) / 0}, "gate_proj.weight holds values that are negative or not"),
        ({"model.norm.weight": torch.ones(8)}, "norm.weight is no weight of the model"),
        ({PUBLISHED[GATE]: torch.ones(8, 8)}, "vector of floats .*gate_proj.weight are something else"),
        ({PUBLISHED[GATE]: torch.ones(8).int()}, "vector of floats for each weight"),
    ],
)  # fmt: skip
def test_faults_of_our_own_form_are_named(tmp_path, entries, text):
    path = tmp_path / "importance.safetensors"
    save_file(entries, path)
    with pytest.raises(ImportanceError, match=f"(?s)importance.safetensors cannot be used.*{text}"):
        read_importance(path, WIDTHS)


@pytest.mark.parametrize(
    ("entries", "options", "text"),
    [
        ({}, {"kind": "model"}, "general.type must be \"imatrix\", got 'model'"),
        ({"blk.0.ffn_gate.weight": (np.ones(8), None)}, {}, "needs .in_sum2 and .counts.*nothing"),
        ({"blk.0.ffn_gate.weight": (np.ones(8), 1)}, {"dtype": np.float16}, "both F32, got F16"),
        ({"blk.0.ffn_gate.weight": (np.ones(8), [1, 2])}, {}, "must count the vectors of one matrix"),
        ({"blk.0.ffn_gate.weight": (np.ones(8), np.nan)}, {}, "must count the vectors of one matrix"),
        ({"blk.0.ffn_gate.weight": (np.ones(4), 1)}, {}, r"must have 8 columns, got \(4,\)"),
        ({"blk.7.ffn_gate.weight": (np.ones(8), 1)}, {}, "blk.7.ffn_gate.weight is no weight of"),
        ({"blk.0.attn_sinks.weight": (np.ones(8), 1)}, {}, "attn_sinks.weight is no weight of"),
    ],
)  # fmt: skip
def test_faults_of_an_imatrix_are_named(tmp_path, entries, options, text):
    path = tmp_path / "imatrix.gguf"
    write_imatrix(path, entries, **options)
    with pytest.raises(ImportanceError, match=f"(?s)imatrix.gguf cannot be used.*{text}"):
        read_importance(path, WIDTHS)


def test_a_weight_has_one_vector(tmp_path):
    path = tmp_path / "importance.safetensors"
    save_file({PUBLISHED[GATE]: torch.ones(8), GATE: torch.zeros(8)}, path)
    with pytest.raises(
        ImportanceError, match=r"gate_proj.weight and .*gate_proj.weight are of the"
    ):
        read_importance(path, WIDTHS)


def test_what_else_an_imatrix_holds_is_named(tmp_path):
    path = tmp_path / "imatrix.gguf"
    seen = {"blk.0.ffn_gate.weight": (np.ones(8), 1)}
    write_imatrix(path, {**seen, "x.counts": (np.ones(8), None)})
    with pytest.raises(ImportanceError, match=r"x\.counts needs .*got F32 and nothing"):
        read_importance(path, WIDTHS)
    path.write_bytes(path.read_bytes().replace(b"x.counts.in_sum2", b"blk.9.attn_q.sum"))
    with pytest.raises(ImportanceError, match=r"blk.9.attn_q.sum is neither .in_sum2 nor .counts"):
        read_importance(path, WIDTHS)


@pytest.mark.parametrize("own", [True, False])
def test_vectors_of_another_width_are_not_read(tmp_path, monkeypatch, own):
    def read(*_):
        raise AssertionError("a vector is read before its width is compared")

    path, wide = tmp_path / "importance", 10_000
    if own:
        save_file({PUBLISHED[GATE]: torch.ones(wide)}, path)
        monkeypatch.setattr("mllama.quantization.importance.safe_open", Unread)
    else:
        write_imatrix(path, {"blk.0.ffn_gate.weight": (np.ones(wide), 1)})
        monkeypatch.setattr("mllama.checkpoints.gguf.container.GgufFile.read", read)
    with pytest.raises(ImportanceError, match="must have 8 columns"):
        read_importance(path, WIDTHS)


class Unread:
    """In the place of a file of safetensors: nothing may be read of it."""

    def __init__(self, *_, **__):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "imatrix.dat"  # llama.cpp's older form
    path.write_bytes(b"\x05\x00\x00\x00" + b"blk.0" * 100)
    with pytest.raises(ImportanceError, match="not a safetensors file"):
        read_importance(path, WIDTHS)
    with pytest.raises(ImportanceError, match="is missing"):
        read_importance(tmp_path / "nothing", WIDTHS)
    with pytest.raises(ImportanceError):
        read_importance(tmp_path, WIDTHS)
