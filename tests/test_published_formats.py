"""Every kind of folder that others quantise: found per tensor, and read to every bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from published_folders import FOLDERS, TEXT, Published, Written, write_folder
from torch import Tensor

from mllama.checkpoints.key_layout import canonical_name
from mllama.checkpoints.published import FINDERS
from mllama.checkpoints.safetensors_files import SafetensorsCheckpoint
from mllama.checkpoints.stored_weights import Found, StoredWeights
from mllama.demo import checkpoint_path
from mllama_kernels.quantized_tensor import QuantizedTensor


def read_folder(folder: Path) -> tuple[StoredWeights, list[Found]]:
    stored = SafetensorsCheckpoint(folder)
    config = json.loads((folder / "config.json").read_text()).get("quantization_config", {})
    found = [f for find in FINDERS if (f := find(stored, config)) is not None]
    return StoredWeights(stored, found), found


@pytest.mark.parametrize("kind", FOLDERS)
def test_every_bit_is_read(tmp_path, kind):
    check_folder(tmp_path, FOLDERS[kind])
    # What no weight is made of is plain, or the format's own: the loader finds nothing extra.
    found = {name: info.shape for name, info in read_folder(tmp_path)[0].tensors.items()}
    plain = SafetensorsCheckpoint(checkpoint_path()).tensors
    assert found == {name: info.shape for name, info in plain.items()}


def check_folder(folder: Path, published: Published) -> None:
    decoded = write_folder(folder, published)
    weights, found = read_folder(folder)
    assert not weights.problems and len(found) == 1
    assert found[0].weights.keys() == {canonical_name(name) for name in decoded}
    wanted = {canonical_name(name): values for name, values in decoded.items()}
    count = 0
    for name, weight in weights.read(weights.tensors):
        info = weights.tensors[name]
        assert info.shape == tuple(weight.shape)
        if name not in wanted:
            assert isinstance(weight, torch.Tensor) and weight.dtype == torch.bfloat16
            continue
        count += 1
        assert info.encoding == published.encoding
        if info.encoding is None:
            assert weight.dtype == info.dtype == torch.float32
        else:
            assert isinstance(weight, QuantizedTensor) and weight.encoding == info.encoding
            assert info.packed_bytes == sum(part.nbytes for part in weight.parts().values())
            assert info.unit == weight.unit
            weight = weight.dequantize()
        assert torch.equal(weight, wanted[name]), (name, (weight - wanted[name]).abs().max())
    assert count == len(wanted)
    assert ("decoded" in " ".join(found[0].notes)) == (published.encoding is None)


def test_blocks_that_config_json_makes_longer_than_the_weight(tmp_path):
    """A scale is spread over the rows there are, not over those the configuration tells of."""

    def write(weight: Tensor) -> Written:
        numbers = weight.to(torch.float8_e4m3fn)
        scales = torch.linspace(0.5, 2, weight.shape[1] // 64)[None]
        stored = {"weight": numbers, "weight_scale_inv": scales}
        return stored, numbers.float() * scales.repeat_interleave(64, dim=1)

    config = {"quant_method": "fp8", "weight_block_size": [2**40, 64]}
    check_folder(tmp_path, Published(write, config, TEXT, None))


# ------------------------------------------------------------------- what the libraries themselves write


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bitsandbytes_writes_and_decodes_the_same(tmp_path, kind, nested):
    functional = pytest.importorskip("bitsandbytes").functional

    def write(weight: Tensor) -> Written:
        data, state = functional.quantize_4bit(
            weight.float(), quant_type=kind, compress_statistics=nested, blocksize=64
        )
        stored = {f"weight.{name}": part for name, part in state.as_dict(packed=True).items()}
        return {"weight": data, **stored}, functional.dequantize_4bit(data, state)

    check_folder(tmp_path, Published(write, {"quant_method": "bitsandbytes"}, TEXT, kind))


def test_bitsandbytes_writes_and_decodes_the_same_8_bits(tmp_path):
    functional = pytest.importorskip("bitsandbytes").functional
    modules = pytest.importorskip("bitsandbytes").nn

    def write(weight: Tensor) -> Written:
        linear = modules.Linear8bitLt(*weight.shape[::-1], bias=False, has_fp16_weights=False)
        numbers, largest, _ = functional.int8_vectorwise_quant(weight.half())
        linear.weight = modules.Int8Params(numbers, requires_grad=False, has_fp16_weights=False)
        linear.weight.SCB = largest
        # The library multiplies by 1 / 127 in float32, which is not always the quotient.
        exact = numbers.float() * (largest / 127)[:, None]
        theirs = functional.int8_vectorwise_dequant(numbers, largest)
        assert torch.allclose(exact, theirs, rtol=2**-22, atol=0)
        return {k: v.clone() for k, v in linear.state_dict().items()}, exact

    check_folder(tmp_path, Published(write, {"quant_method": "bitsandbytes"}, TEXT, "int8"))


@pytest.mark.parametrize(
    ("bits", "strategy", "symmetric", "encoding"),
    [
        (4, "group", True, "int4"),
        (4, "group", False, "int4"),
        (4, "channel", False, "int4"),
        (8, "channel", True, "int8"),
        (8, "group", False, None),
    ],
)
def test_compressed_tensors_packs_and_decodes_the_same(
    tmp_path, bits, strategy, symmetric, encoding
):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import PackedQuantizationCompressor as Compressor

    group = 64 if strategy == "group" else None
    scheme = _scheme(
        num_bits=bits, type="int", strategy=strategy, symmetric=symmetric, group_size=group
    )
    write = _written_by(Compressor, scheme, bits, 64 if group else 0, symmetric)
    check_folder(tmp_path, Published(write, {"quant_method": "compressed-tensors"}, TEXT, encoding))


@pytest.mark.parametrize(
    ("kind", "strategy"), [("float", "channel"), ("float", "tensor"), ("int", "channel")]
)
def test_compressed_tensors_writes_and_decodes_the_same_8_bits(tmp_path, kind, strategy):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import NaiveQuantizationCompressor as Compressor

    scheme = _scheme(num_bits=8, type=kind, strategy=strategy, symmetric=True)
    write = _written_by(Compressor, scheme, 8, 0 if strategy == "channel" else None, True)
    encoding = "fp8" if kind == "float" else "int8"
    check_folder(tmp_path, Published(write, {"quant_method": "compressed-tensors"}, TEXT, encoding))


def _scheme(**weights: Any) -> Any:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    return QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))


def _written_by(
    compressor: Any, scheme: Any, bits: int, group: int | None, symmetric: bool
) -> Callable[[Tensor], Written]:
    """``group``: 0: a row, None: the whole weight."""

    def write(weight: Tensor) -> Written:
        weight = weight.float()
        rows, columns = weight.shape
        blocks = weight.view(1, -1) if group is None else weight.view(rows, -1, group or columns)
        most = 448 if scheme.weights.type == "float" else (1 << (bits - 1)) - 0.5
        scale = blocks.abs().amax(-1) / most
        scale = scale.view(1) if group is None else scale
        entries = {"weight": weight, "weight_scale": scale}
        if not symmetric:
            entries["weight_zero_point"] = (
                (torch.arange(scale.numel()) % 5 - 2).view_as(scale).to(torch.int8)
            )
        stored = compressor.compress(entries, scheme)
        return stored, compressor.decompress(dict(stored), scheme)["weight"].float()

    return write
