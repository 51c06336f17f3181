"""What each rank of a split model reads of files in every layout, and what it is saved as."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_writer import as_type, write_split, write_unified
from meta_writer import write_original
from published_folders import FOLDERS, write_folder
from safetensors.torch import load_file, save_file
from split_checkpoints import alone, check_ranks, load, weights_of, write_checkpoint
from torch import Tensor

from mllama import MllamaForConditionalGeneration
from mllama.checkpoints import meta_params, planning, weights
from mllama.checkpoints.checkpoint import read_json
from mllama.checkpoints.weights import plan_source
from mllama.memory import return_freed
from mllama.parallel.split import CannotSplit
from mllama.quantization.plan import MemoryPlan
from mllama.stores import KeyValueStore

SIZES = (2, 4)
_STATUS = Path("/proc/self/status")


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return write_checkpoint(tmp_path_factory.mktemp("split"))


def test_safetensors_of_every_layout(stored: Path, tmp_path: Path) -> None:
    check_ranks(stored, *SIZES)
    load(stored).save_pretrained(tmp_path / "shards", max_shard_size="1MB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 5
    check_ranks(tmp_path / "shards", 2)
    older = tmp_path / "older"
    older.mkdir()
    state = load(stored).state_dict()
    save_file(
        {name: tensor.contiguous() for name, tensor in state.items()}, older / "model.safetensors"
    )
    (older / "config.json").write_bytes((stored / "config.json").read_bytes())
    check_ranks(older, 2, dtype=torch.bfloat16)


def test_gguf(stored: Path, tmp_path: Path) -> None:
    check_ranks(write_unified(stored, tmp_path / "plain.gguf"), 2)
    check_ranks(write_unified(stored, tmp_path / "q8.gguf", as_type("Q8_0")), *SIZES)
    text, projector = write_split(
        stored, tmp_path / "text.gguf", tmp_path / "projector.gguf", as_type("Q4_0")
    )
    check_ranks(text, 2, projector=projector)
    check_ranks(text, 4, projector=projector, dequantize=True)


# One of each form that is read; of the others only what makes the parts differs.
@pytest.mark.parametrize(
    "kind",
    [
        "bnb nf4",
        "bnb fp4",
        "bnb int8",
        "fp8 dynamic",
        "fp8 of blocks",
        "w4a16",
        "gptq",
        "AutoRound",
    ],
)
def test_what_others_quantised(tmp_path: Path, kind: str) -> None:
    write_folder(tmp_path, FOLDERS[kind])
    check_ranks(tmp_path, 2)
    check_ranks(tmp_path, 2, dequantize=True)


@pytest.mark.parametrize("encoding", ["q8_0", "q4_0", "q4_k", "q4_k_m", "int8", "fp8"])
def test_quantising_while_loading(stored: Path, encoding: str, tmp_path: Path) -> None:
    """The bits of one process; and those of a folder that was quantised before."""
    sizes = (2,) if encoding.startswith("q4_k") else SIZES
    check_ranks(stored, *sizes, quantization=encoding)
    load(stored, quantization=encoding).save_pretrained(tmp_path)
    check_ranks(tmp_path, sizes[-1])


def test_blocks_that_ranks_cannot_share(stored: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Refused with the numbers before a tensor is read."""
    for name in ("gptq of 128", "gptq"):
        write_folder(tmp_path / name, FOLDERS[name])
    monkeypatch.setattr(weights, "fill", None)
    with pytest.raises(
        CannotSplit,
        match=r"4 ranks would divide the 512 columns of model\.language_model\.layers\.0\.self_attn\.o_proj"
        r"\.weight at 128, within one of the blocks of 256 that it is quantised in: take fewer ranks",
    ):
        load(stored, alone(0, 4), quantization="q4_k")
    with pytest.raises(
        CannotSplit, match=r"2 ranks would divide the 128 .* at 64, .* blocks of 128 "
    ):
        load(tmp_path / "gptq of 128", alone(0, 2))
    overrides = {"*fc2.weight": "q4_k"}
    with pytest.raises(
        CannotSplit, match=r"2 ranks cannot share the 1 block of 256 features of .*fc1"
    ):
        load(stored, alone(1, 2), quantization="q8_0", quantization_overrides=overrides)


@pytest.mark.parametrize(
    ("encoding", "kept"), [(None, "float32"), ("int8", "int8"), ("q4_0", "q4_0")]
)
def test_what_is_planned_is_what_a_rank_loads(
    stored: Path, tmp_path: Path, monkeypatch: Any, encoding: str | None, kept: str
) -> None:
    load(stored, quantization=encoding).save_pretrained(tmp_path)
    asked: list[MemoryPlan] = []
    made = planning.plan
    monkeypatch.setattr(planning, "plan", lambda *a, **k: asked.append(made(*a, **k)) or asked[-1])
    for size in SIZES:
        most = 0
        for folder, options in ((stored, {"quantization": encoding}), (tmp_path, {})):
            for rank in range(size):
                model = load(folder, alone(rank, size), **options)
                parts = [w for _, w in weights_of(model)]
                own = sum(
                    w.nbytes if isinstance(w, Tensor) else sum(p.nbytes for p in w.parts().values())
                    for w in parts
                )
                most = max(most, own)
                assert asked[-1].tensor_parallel == size
                # Of a folder the scales of whole rows are counted by the columns.
                assert asked[-1].weights == pytest.approx(
                    own, rel=0.01 if folder == tmp_path else 0
                )
                store = KeyValueStore(model.config.text_config, dtype=torch.float32, device="meta")
                assert asked[-1].self_kv == store.page_nbytes()
        config = model.config
        planned = made(config, kept, 64, dtype="float32", tensor_parallel=size)
        assert planned.weights == most
        source = plan_source(MllamaForConditionalGeneration, tmp_path, tensor_parallel=size)
        assert source.nbytes == pytest.approx(most, rel=0.01)
        assert source.config.text_config.local_key_value_heads == max(1, 2 // size)


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 110 MB, of which no tensor has 4, in every layout."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("deep")
    text = {"num_hidden_layers": 8, "cross_attention_layers": [1], "intermediate_size": 1792}
    write_checkpoint(folder / "safetensors", text=text, vision={"intermediate_size": 512})
    weights = load_file(folder / "safetensors" / "model.safetensors")
    write_original(folder / "Meta", weights, read_json(folder / "safetensors" / "config.json"), 2)
    write_unified(folder / "safetensors", folder / "GGUF")
    return folder


@pytest.mark.skipif(
    not _STATUS.exists() or "RssAnon" not in _STATUS.read_text(),
    reason="the system does not tell how much of a process is in no file",
)
@pytest.mark.parametrize("layout", ["safetensors", "GGUF", "Meta"])
def test_a_rank_holds_its_share_and_a_tensor(deep: Path, monkeypatch: Any, layout: str) -> None:
    """What is mapped is the files', whoever reads them; the rest is the part that stays and what it is cut
    out of."""
    monkeypatch.setattr(meta_params, "_VISION_LAYERS", 2)
    monkeypatch.setattr(meta_params, "_GLOBAL_LAYERS", 1)
    monkeypatch.setattr(meta_params, "_TAPS", [0, 1])
    seen: list[int] = []
    largest = 0
    fill = weights.fill

    def watched(model: Any, checkpoint: Any, *rest: Any, **options: Any) -> None:
        nonlocal largest
        largest = max(info.nbytes for info in checkpoint.tensors.values())
        read = checkpoint.read

        def reading(names: Any) -> Any:
            for pair in read(names):
                seen.append(_anonymous_bytes())
                yield pair
                seen.append(_anonymous_bytes())

        monkeypatch.setattr(checkpoint, "read", reading)
        fill(model, checkpoint, *rest, **options)

    monkeypatch.setattr(weights, "fill", watched)
    return_freed()
    before = _anonymous_bytes()
    model = load(deep / layout, alone(1, 4))
    share = model.get_memory_footprint()
    whole = 4 * (share - model.get_input_embeddings().weight.nbytes)
    # A tensor as it is stored, joined and cut, and what the allocator keeps of those before.
    assert max(seen) - before < share + 8 * largest < 0.6 * whole


def _anonymous_bytes() -> int:
    (line,) = (line for line in _STATUS.read_text().splitlines() if line.startswith("RssAnon:"))
    return 1024 * int(line.split()[1])
