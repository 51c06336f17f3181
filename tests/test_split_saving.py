"""State dicts, folders and adapters of models that are split over 2 and 4 ranks are those of one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import split_files_worker as worker
import torch
from safetensors.torch import load_file
from split_checkpoints import load, write_checkpoint
from torch import Tensor

from mllama.quantization.decoded import decoded_copy
from mllama.training.adapters import use_adapter

ROOT = Path(__file__).parents[1]
# Every kind of linear, in both towers and between; of those that are split by columns, rows and not at all.
TARGETS = r".*(_proj|fc1|fc2|multi_modal_projector|lm_head)"

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="this PyTorch has no gloo",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("whole")
    write_checkpoint(path / "checkpoint")
    config = peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False)
    peft.get_peft_model(load(path / "checkpoint"), config).save_pretrained(
        path / "adapter", save_embedding_layers=False
    )
    dora = peft.LoraConfig(r=4, target_modules=r".*\.o_proj", use_dora=True)
    peft.get_peft_model(load(path / "checkpoint"), dora).save_pretrained(path / "dora")
    return path


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: Any, folder: Path, tmp_path_factory: Any) -> tuple[Path, list[dict[str, Any]]]:
    """What came out on each rank, and where they wrote."""
    place = tmp_path_factory.mktemp("ranks")
    for name in ("checkpoint", "adapter", "dora"):
        (place / name).symlink_to(folder / name)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    environment["HF_HUB_OFFLINE"] = (
        "1"  # where PEFT would look for the configuration of the base model
    )
    script = [sys.executable, worker.__file__]
    workers = [
        subprocess.Popen([*script, str(rank), str(request.param), str(place)], env=environment)
        for rank in range(request.param)
    ]
    try:
        assert {worker.wait(timeout=400) for worker in workers} == {0}
    finally:
        for process in workers:
            process.kill()
    found = [torch.load(place / f"{rank}.pt") for rank in range(request.param)]
    assert all(isinstance(one, dict) for one in found), found
    return place, found


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_state_dicts_are_whole(folder: Path, ranks: Any) -> None:
    _, found = ranks
    for encoding, name in ((None, "state"), ("q4_0", "q4_0"), ("int8", "int8")):
        whole = load(folder / "checkpoint", quantization=encoding).state_dict()
        for one in found:
            assert_same(one[name], whole)


def test_copies_and_counts_are_of_the_whole(folder: Path, ranks: Any) -> None:
    for encoding in ("q4_0", "int8"):
        whole = load(folder / "checkpoint", quantization=encoding)
        values = worker.logits(decoded_copy(whole, torch.float32, "auto"))
        for one in ranks[1]:
            error = (one[f"{encoding} decoded"] - values).abs().max()
            assert error <= 1e-5 * values.abs().max()
            counts = one["parameters"], one[f"{encoding} parameters"]
            assert counts == (whole.num_parameters(),) * 2


def test_whole_tensors_are_loaded_by_parts(ranks: Any) -> None:
    for one in ranks[1]:
        assert one["is loaded"] and one["is assigned"] and one["own memory"]
        assert (
            "size mismatch for" in one["parts given"] and "whole tensors, of" in one["parts given"]
        )


@pytest.mark.parametrize(("encoding", "limit"), [(None, "1MB"), ("q4_0", "5GB"), ("int8", "5GB")])
def test_folders_are_those_of_one_process(
    folder: Path, ranks: Any, tmp_path: Path, encoding: str | None, limit: str
) -> None:
    place = ranks[0] / (encoding or "plain")
    load(folder / "checkpoint", quantization=encoding).save_pretrained(tmp_path, limit)
    written = sorted(path.name for path in tmp_path.iterdir())
    assert written == sorted(path.name for path in place.iterdir())
    assert (len(written) > 8) == (encoding is None)
    for name in written:
        assert (place / name).read_bytes() == (tmp_path / name).read_bytes(), name


def test_what_is_refused(ranks: Any) -> None:
    first, *others = ranks[1]
    for one in ranks[1]:
        assert (
            "gives a state dict as a whole only" in one["part"] and one["keep_vars"] == one["part"]
        )
        assert "leave state_dict out" in one["given"]
        assert (
            "counted as a whole" in one["part's"]
            and "init_weights() needs the whole model" in one["drawn"]
        )
        assert "resize_token_embeddings() needs the whole model" in one["resized"]
        assert "set_output_embeddings() needs the whole model" in one["head"]
        assert "init_lora_weights='pissa', which changes weights by the whole" in one["pissa"]
        for name in ("DoRA", "DoRA used"):
            assert "takes LoRA alone beside what is in parts" in one[name]
            assert "o_proj.lora_magnitude_vector" in one[name]
        assert "Linear at down_proj has" in one["LoHa"]
        assert "cannot be pickled or copied" in one["copied"]
        assert "cannot be pickled or copied" in one["pickled"]
    assert first["written"].startswith("FileExistsError")
    for one in others:  # and none of them waits for the first
        assert one["written"].startswith(
            "RuntimeError: rank 0 could not write the model: FileExists"
        )


def test_adapters(folder: Path, ranks: Any, tmp_path: Path) -> None:
    """Logits within the rounding of sums in another order; the adapter itself and merged weights exactly, but
    for the last bit of products of other sizes."""
    wrapped = peft.PeftModel.from_pretrained(load(folder / "checkpoint"), folder / "adapter")
    beside, adapter = worker.logits(wrapped), worker.adapter_of(wrapped)
    shapes = {name: tuple(tensor.shape) for name, tensor in wrapped.state_dict().items()}
    wrapped.save_pretrained(tmp_path)
    merged = wrapped.merge_and_unload()
    quantized = load(folder / "checkpoint", quantization="q8_0")
    use_adapter(quantized, folder / "adapter")
    expected = {
        "beside": beside,
        "merged": worker.logits(merged),
        "used": worker.logits(merged),
        "quantised": worker.logits(quantized),
    }
    plain = worker.logits(load(folder / "checkpoint"))
    assert (plain - beside).norm() > 0.1 * beside.norm()  # the adapter matters
    for rank, one in enumerate(ranks[1]):
        assert_same(one["adapter"], adapter)
        weights = one[
            "without values"
        ].items()  # nobody asked for those, and one process may not hold them
        assert weights <= shapes.items() and not any(".lora_" in name for name, _ in weights)
        assert {name for name in shapes if name.endswith("o_proj.base_layer.weight")} <= dict(
            weights
        ).keys()
        saved = load_file(ranks[0] / f"saved {rank}" / "adapter_model.safetensors")
        expected_file = load_file(tmp_path / "adapter_model.safetensors")
        assert_same(dict(sorted(saved.items())), dict(sorted(expected_file.items())))
        for name, tensor in merged.state_dict().items():
            assert torch.allclose(one["merged state"][name], tensor, rtol=1e-5, atol=1e-6), name
        for name, values in expected.items():
            assert (one[name] - values).abs().max() <= 1e-5 * values.abs().max(), name
