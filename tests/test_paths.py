"""Which kernel runs for a call, asked of the ops' entries without any: csrc/cuda/<op>/<op>.cu."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import host_build
import pytest

MISALIGNED = 716  # cudaErrorMisalignedAddress


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    folder = tmp_path_factory.mktemp("paths")
    return host_build.build("paths_module", folder, f"-I{host_build.TESTS / 'fake_cuda'}")


@pytest.fixture(params=["sm_80", "sm_90a", "a slice of sm_90a"])
def device(module: ModuleType, request: pytest.FixtureRequest) -> str:
    module.use_device(request.param != "sm_80", request.param == "sm_90a")
    return request.param


def on(device: str, **kernels: str) -> list[str]:
    """What is called on a device: by architecture, sliced where a slice differs."""
    arch = "sm80" if device == "sm_80" else "sm90"
    return kernels.get("sliced" if device.startswith("a slice") else arch, kernels[arch]).split()


VIEWS: list[dict[str, int]] = [  # of values; what no tensor map can describe
    {"batch_stride": 0, "token_stride": 128, "head_stride": 64},
    {"batch_stride": 256, "token_stride": 0, "head_stride": 64},
    {"batch_stride": 256, "token_stride": 128, "head_stride": 0},
    {"batch_stride": 256, "token_stride": 32, "head_stride": 64},
    {"batch_stride": 1 << 39, "token_stride": 128, "head_stride": 64},
]


def test_prefill(module, device):
    swapped = {"batch_stride": 64, "token_stride": 256, "head_stride": 128}
    for call in ({}, swapped):
        rotary = on(
            device,
            sm80="rotary_append rotary_prefill_sm80",
            sm90="rotary_append rotary_prefill_sm90",
        )
        assert module.rotary_attention(call) == (rotary, 0)
        cross = on(device, sm80="cross_prefill_sm80", sm90="cross_prefill_sm90")
        assert module.cross_attention(call) == (cross, 0)
        vision = on(device, sm80="vision_dense_sm80", sm90="vision_dense_sm90")
        assert module.vision_attention(call) == vision
    packed = on(device, sm80="cross_prefill_sm80", sm90="cross_prefill_sm90")
    assert module.cross_attention({"packed": 1}) == (["cross_fill_no_sequence", *packed], 0)


@pytest.mark.parametrize("call", [*VIEWS, {"bytes": 4}])
def test_what_tensor_maps_do_not_take_runs_everywhere(module, device, call: dict[str, Any]):
    assert module.rotary_attention(call) == (["rotary_append", "rotary_prefill_sm80"], 0)
    assert module.cross_attention(call) == (["cross_prefill_sm80"], 0)
    assert module.vision_attention(call) == ["vision_dense_sm80"]


def test_decode(module, device):
    call = {"paged": 1, "max_seqlen": 1, "num_q_heads": 32, "num_kv_heads": 8}
    split, cluster = "rotary_append rotary_decode_split", "rotary_decode_cluster"
    expected = on(device, sm80=split, sm90=cluster, sliced=split)
    assert module.rotary_attention(call) == (expected, 1)
    # Clusters take groups of up to 8 heads in 16 bits, splits up to 16 in any.
    for change in ({"num_q_heads": 128}, {"bytes": 4}):
        assert module.rotary_attention(call | change) == (split.split(), 1)
    for change in ({"max_seqlen": 2}, {"paged": 0}, {"num_q_heads": 34, "num_kv_heads": 2}):
        kernels, workspace = module.rotary_attention(call | change)
        assert kernels[0] == "rotary_append" and "prefill" in kernels[1] and workspace == 0

    call = {"max_seqlen": 1, "num_q_heads": 32, "num_kv_heads": 8}
    split, cluster = "cross_decode_split", "cross_decode_cluster"
    expected = on(device, sm80=split, sm90=cluster, sliced=split)
    assert module.cross_attention(call) == (expected, 1)
    assert module.cross_attention(call | {"packed": 1}) == (expected, 1)
    for change in ({"num_q_heads": 128}, {"bytes": 4}, {"tiles": 8193}):
        assert module.cross_attention(call | change) == ([split], 1)
    for change in ({"max_seqlen": 2}, {"lse": 1}, {"num_q_heads": 34, "num_kv_heads": 2}):
        kernels, workspace = module.cross_attention(call | change)
        assert "prefill" in kernels[0] and workspace == 0


def test_many_tiles_do_not_fit_beside_the_operands(module, device):
    assert module.cross_attention({"tiles": 129})[0] == ["cross_prefill_sm80"]
    expected = on(device, sm80="cross_prefill_sm80", sm90="cross_prefill_sm90")
    assert module.cross_attention({"tiles": 128})[0] == expected


def test_patch_embed(module, device):
    plain = "patch_forward_sm80"
    assert module.patch_embed({}) == on(device, sm80=plain, sm90="patch_forward_sm90", sliced=plain)
    for change in ({"bytes": 4}, {"dim": 1284}, {"patch": 15}, {"misaligned": 1}, {"backward": 1}):
        assert module.patch_embed(change) == [plain]


def test_skinny_linear(module, device):
    expected = on(device, sm80="skinny_linear_sm80", sm90="skinny_linear_sm90")
    for rows in (1, 16):
        assert module.skinny_linear({"rows": rows}) == expected
    for change in ({"k": 72}, {"weight_row_stride": 0}):
        assert module.skinny_linear(change) == ["skinny_linear_sm80"]
    for change in ({"bytes": 4}, {"k": 65}, {"misaligned": 1}, {"k": 0}):
        assert module.skinny_linear(change) == ["skinny_linear_simt"]
    assert module.skinny_linear({"rows": 0}) == []


def test_sample(module, device):
    blocks = "sample_in_blocks"
    assert module.sample({}) == on(device, sm80=blocks, sm90="sample_in_clusters", sliced=blocks)
    assert module.sample({"vocab": 1 << 19}) == [blocks]


def test_attention_refuses_rows_that_vectors_do_not_take(module, device):
    for op in (module.rotary_attention, module.cross_attention):
        assert op({"misaligned": 1})[0] == MISALIGNED
    assert module.vision_attention({"misaligned": 1}) == MISALIGNED
