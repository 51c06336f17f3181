"""The benchmark's rows of quantised weights: codes, peers and models, without a clock."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # last: an installed or simulated build of the kernels goes first

from benchmarks import llama_cpp, measure, model, quantized_model, random_codes, run  # noqa: E402
from benchmarks.budget import Budget  # noqa: E402
from benchmarks.case import OURS, PLAIN, Case, Impl, Setting  # noqa: E402
from benchmarks.cases import quantized_linear  # noqa: E402
from benchmarks.correctness import Gate  # noqa: E402
from benchmarks.quantized_model import Row  # noqa: E402
from benchmarks.scenario import Scenario  # noqa: E402
from mllama.quantized_modules import Quantized  # noqa: E402
from mllama_kernels.encodings import ENCODINGS  # noqa: E402

CPU = torch.device("cpu")
VOCABULARY = 1536
CEILING = {"read_gbps": 10.0, "matmul_tflops_bfloat16": 1.0}


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_random_codes_are_weights(encoding: str) -> None:
    n, k = 48, 1024
    weight = random_codes.weight_of(encoding, n, k, CPU)
    assert weight.shape == (n, k) and weight.dequantize().isfinite().all()
    assert 0.6 < weight.dequantize().std() * k**0.5 < 1.6
    assert random_codes.nbytes(encoding, n, k) == sum(p.nbytes for p in weight.parts().values())


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_implementation_multiplies_by_the_same_weight(
    encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = quantized_linear.Layer("11B", "small", 64, 512, on_cpu=True)
    monkeypatch.setattr(quantized_linear, "layers", lambda _: [small])
    for case in quantized_linear.cases(Setting(CPU, torch.bfloat16)):
        if case.shape["encoding"] == encoding and case.shape["rows"] == 8:
            args = case.make()
            gate = Gate(case, args)
            for impl in case.impls:
                if not impl.unavailable:
                    output = impl.call(*impl.prepare(*args))
                    assert gate.check(impl, output, impl.name == OURS)[1] is None, impl.name
    names = {impl.name for impl in case.impls}
    assert {OURS, PLAIN, quantized_linear.UNQUANTISED} <= names


def test_what_a_case_does_not_read_does_not_make_it_cold() -> None:
    """The copies that rotate exceed the cache by what is read, not by all that is there to read."""
    case = Case(
        op="sum",
        shape={},
        dtype=torch.float32,
        make=lambda: (torch.randn(1000), torch.randn(9000)),
        truth=lambda x, _: x.sum(-1),
        impls=(Impl(OURS, lambda x, _: x.sum(-1)), Impl(PLAIN, lambda x, _: x.sum(-1))),
        bytes=4000,
        bound="read",
    )
    effort = measure.Effort(CPU, rounds=1, seconds=1e-4, cold_bytes=40_000)
    row = measure.measure(case, effort)
    assert row["copies"] == 10 and row["state"]["read_gbps"] is None
    assert all(impl["cpu_us"] > 0 for impl in row["impls"])
    reader = SimpleNamespace(round=lambda: 2.0)
    row = measure.measure(case, replace(effort, reader=reader))
    assert row["state"]["read_gbps"] == 2.0
    mine = row["impls"][0]
    assert mine["share_of_reading"] == pytest.approx(mine["gbps"] / 2, rel=0.01)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a narrow model, with the widths of blocks."""
    configs = quantized_model.Layers.configs

    def narrower(self: Any, vocabulary: int, tile: int) -> dict[str, Any]:
        found = configs(self, vocabulary, tile)
        found["text_config"] |= {"hidden_size": 512, "intermediate_size": 768}
        found["text_config"] |= {"num_attention_heads": 4, "num_key_value_heads": 1}
        found["vision_config"] |= {"hidden_size": 320, "attention_heads": 4}
        found["vision_config"] |= {"intermediate_size": 512, "vision_output_dim": 640}
        return found

    monkeypatch.setattr(quantized_model.Layers, "configs", narrower)


def row_of(encoding: str, text: bool) -> Row:
    rows = quantized_model.rows(CPU, quick=True)
    found = next(row for row in rows if row.encoding == encoding and row.is_text == text)
    tile = found.scenario.tile if text else 112
    return replace(found, scenario=Scenario(1, 8, 2, tile))


def test_both_models_have_the_same_weights(small: None) -> None:
    row = row_of("q4_k", text=False)
    quantised, plain = quantized_model.build(row, torch.bfloat16, CPU, VOCABULARY)
    weights = {
        name: module.weight
        for name, module in quantised.named_modules()
        if isinstance(module, Quantized)
    }
    assert {weight.encoding for weight in weights.values()} == {"q4_k", "q6_k", "q8_0"}
    for name, weight in weights.items():
        assert torch.equal(plain.get_parameter(f"{name}.weight"), weight.dequantize(torch.bfloat16))
    for name, parameter in quantised.named_parameters():
        assert parameter.data_ptr() == plain.get_parameter(name).data_ptr()
    inputs = model.inputs_of(row.scenario, torch.bfloat16, CPU, VOCABULARY)
    with torch.no_grad():
        logits, expected = (m(**inputs, logits_to_keep=1).logits for m in (quantised, plain))
    assert model.difference(logits, expected) < model.TOLERANCE[torch.bfloat16]
    read = [model.bytes_per_step(m, row.scenario) for m in (quantised, plain)]
    tower = ("lm_head", "model.language_model.layers.")
    unused = ("cross_attn.k_proj", "cross_attn.v_proj")
    saved = sum(
        plain.get_parameter(f"{name}.weight").nbytes - weight.nbytes
        for name, weight in weights.items()
        if name.startswith(tower) and not name.endswith(unused)
    )
    assert read[1] - read[0] == saved > 0.5 * read[1]


@pytest.mark.parametrize("encoding", quantized_model.ENCODINGS)
def test_a_file_for_llama_cpp_holds_the_blocks(encoding: str, small: None, tmp_path: Path) -> None:
    quantised, _ = quantized_model.build(row_of(encoding, True), torch.float32, CPU, VOCABULARY)
    llama_cpp.write(tmp_path / "model.gguf", quantised, encoding)
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    tensors = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    assert len(tensors) == 3 + 4 * 9
    own = quantised.get_submodule
    assert np.array_equal(tensors["output.weight"], own("lm_head").weight.dequantize().numpy())
    rows = own("model.embed_tokens").weight.dequantize()[:VOCABULARY].numpy()
    assert np.array_equal(tensors["token_embd.weight"], rows)
    down = own("model.layers.3.mlp.down_proj").weight.dequantize().numpy()
    assert np.array_equal(tensors["blk.3.ffn_down.weight"], down)
    q = own("model.layers.0.self_attn.q_proj").weight.dequantize().view(4, 128, 512)
    pairs = torch.stack([q[:, :64], q[:, 64:]], 2).reshape(512, 512)  # as llama.cpp rotates them
    assert np.array_equal(tensors["blk.0.attn_q.weight"], pairs.numpy())
    assert tensors["blk.0.attn_norm.weight"].shape == (512,)


@pytest.mark.skipif(llama_cpp.missing() is not None, reason=str(llama_cpp.missing()))
@pytest.mark.parametrize("encoding", quantized_model.ENCODINGS)
def test_llama_cpp_computes_the_same(encoding: str, small: None) -> None:
    row = row_of(encoding, text=True)
    quantised, _ = quantized_model.build(row, torch.float32, CPU, VOCABULARY)
    ids = torch.randint(0, VOCABULARY, (1, row.scenario.prompt))
    watch = model.Stopwatch()
    with torch.no_grad(), llama_cpp.model(quantised, encoding, row.scenario) as peer:
        expected = quantised(input_ids=ids, logits_to_keep=1).logits
        for _ in range(2):  # its cache is emptied
            assert model.difference(peer(ids).logits, expected) < llama_cpp.TOLERANCE
        peer.generate(ids, max_new_tokens=row.scenario.new, streamer=watch)
    assert watch.token > 0


def test_without_time_rows_are_left_out_by_name() -> None:
    told: list[tuple[str, str]] = []
    dtypes = [torch.bfloat16, torch.float32]
    rows = quantized_model.run(
        CPU, dtypes, True, 0, Budget(0), CEILING, lambda *words: told.append(words)
    )
    assert list(rows) == []
    assert len(told) == len(quantized_model.rows(CPU, quick=True))
    assert all("bfloat16" in name and encoding_in(name) for name, _ in told)
    for name, reason in told:
        assert reason == "no time was left" or llama_cpp.NAME in reason, name


def encoding_in(name: str) -> bool:
    return any(encoding in name for encoding in quantized_model.ENCODINGS)


def test_the_file_says_which_models_were_left_out(tmp_path: Path) -> None:
    results = run.ResultFile(tmp_path / "run.json", {"ceilings": CEILING}, Budget(0))
    results.leave_out("model q8_0", "no time was left")
    assert results.document["left_out"] == [{"case": "model q8_0", "reason": "no time was left"}]
