"""Models that 2 and 4 processes share: logits, losses and tokens are those of the whole model, the same bytes
on all ranks; and what cannot be shared is refused by name."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import parallel_worker
import pytest
import torch
from generation_helpers import byte_tokenizer
from model_helpers import RATIOS, Prompt, Shape, batch_of, randomise
from torch import Tensor

import mllama
from mllama_kernels import _library

ROOT = Path(__file__).parents[1]
VOCAB = 259  # no multiple of a number of ranks; bytes, and an end

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="this PyTorch has no gloo",
)


def drawn(rng: random.Random, kv_heads: int) -> tuple[Shape, dict[str, Any]]:
    """A model of 8 query heads, with widths that do not divide evenly, and its configuration."""
    shape = Shape(
        tile_side=rng.choice((28, 42)),
        vision_heads=rng.choice((4, 8)),
        vision_head_dim=rng.choice((16, 32)) if kv_heads == 1 else 64,
        local_layers=3,
        global_layers=1,
        taps=tuple(sorted(rng.sample(range(3), 2))),
        heads=8,
        kv_heads=kv_heads,
        head_dim=32 if kv_heads == 1 else 64,
        intermediate=rng.choice((97, 131, 166)),
        layers=3,
        cross=(rng.choice((1, 2)),),
        vocab=VOCAB,
    )
    config = shape.configs()
    config["vision_config"]["intermediate_size"] = rng.choice((101, 203))
    return shape, config


def write(folder: Path, config: dict[str, Any]) -> None:
    model = mllama.MllamaForConditionalGeneration(mllama.MllamaConfig(**config))
    randomise(model)
    model.save_pretrained(folder)


def case_of(shape: Shape, config: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    def ratio() -> int:
        return rng.randint(1, len(RATIOS))

    one = [Prompt(8, (1,), (ratio(),))]
    several = [Prompt(11, (1, 5), (ratio(), ratio()))]
    mixed = [Prompt(9, (0,), (6,)), Prompt(5), Prompt(10, (2, 4), (ratio(), 1))]
    prompts = {"text": batch_of(shape, [Prompt(9)]), "one picture": batch_of(shape, one)}
    prompts |= {"several pictures": batch_of(shape, several), "mixed": batch_of(shape, mixed)}
    batches = {
        f"mixed, {side}": batch_of(shape, mixed, side) for side in ("left", "right", "holes")
    }
    (cross,) = shape.cross
    plain = 0 if cross else 1
    text, vision = "model.language_model.layers", "model.vision_model"
    parts = [f"{text}.{plain}.self_attn.{name}_proj" for name in "qo"]
    parts += [f"{text}.{plain}.mlp.{name}" for name in ("up_proj", "down_proj", "act_fn")]
    parts += [f"{text}.{cross}.cross_attn.{name}" for name in ("v_proj", "q_norm", "k_norm")]
    parts += [
        f"{vision}.transformer.layers.1.mlp.{name}" for name in ("fc1", "fc2", "activation_fn")
    ]
    parts += [f"{vision}.global_transformer.layers.0.self_attn.k_proj", "lm_head"]
    return {
        "name": f"{shape.kv_heads} kv heads",
        "backend": "reference" if shape.kv_heads == 1 else "auto",
        "prompts": prompts,
        "batches": {"text": prompts["text"], "several": prompts["several pictures"], **batches},
        "image_token": shape.vocab,
        "cross": cross,
        "parts": parts,
        "text_config": config["text_config"],
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any, pytestconfig: Any) -> Path:
    """Checkpoints of random configurations and inputs for them, as the processes find them."""
    path, seed = tmp_path_factory.mktemp("parallel"), pytestconfig.getoption("--seed")
    rng = random.Random(seed)
    torch.manual_seed(seed)
    cases = []
    for kv_heads in (1, 2, 4):
        shape, config = drawn(rng, kv_heads)
        cases.append(case_of(shape, config, rng))
        write(path / cases[-1]["name"], config)
    few: dict[str, Any] = {"layers": 2, "cross": (1,), "heads": 8, "kv_heads": 4, "vision_heads": 4}
    for name, heads in (
        ("6 heads of 3", {"heads": 6, "kv_heads": 3}),
        ("3 vision heads", {"vision_heads": 3}),
    ):
        write(path / name, Shape(**few | heads).configs())
    torch.save({"cases": cases, "tokenizer": byte_tokenizer()}, path / "given.pt")
    return path


@pytest.fixture(scope="module", params=[2, 4], ids=lambda size: f"{size} ranks")
def ranks(request: Any, folder: Path) -> list[dict[str, Any]]:
    """What came out on each rank, by check and model."""
    size, script = request.param, str(ROOT / "tests" / "parallel_worker.py")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, script]
    workers = [
        subprocess.Popen([*command, str(rank), str(size), str(folder)], env=environment)
        for rank in range(size)
    ]
    try:
        assert [worker.wait(timeout=400) for worker in workers] == [0] * size
    finally:
        for worker in workers:
            worker.kill()
    return [torch.load(folder / f"{rank} of {size}.pt", weights_only=False) for rank in range(size)]


@pytest.fixture(scope="module")
def whole(folder: Path) -> dict[str, Any]:
    """The same of one process."""
    return parallel_worker.run(parallel_worker.places(folder), parallel_worker.VALUES)


def of_all(ranks: list[dict[str, Any]], name: str) -> list[Any]:
    """What a check has given on each rank."""
    for rank in ranks:
        assert not isinstance(rank[name], str), rank[name]
    return [rank[name] for rank in ranks]


def same_bytes(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_bytes(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_bytes, a, b))
    return a == b


def compare(actual: Any, expected: Any, where: str) -> None:
    """Integers are equal, numbers within 1e-5 of the largest."""
    if isinstance(expected, dict) and "given" in expected:
        compare_tokens(actual, expected, where)
    elif isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        for name, value in expected.items():
            compare(actual[name], value, f"{where}, {name}")
    elif isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected), where
        for index, value in enumerate(expected):
            compare(actual[index], value, f"{where} {index}")
    elif expected.is_floating_point():
        assert actual.dtype == expected.dtype and actual.shape == expected.shape, where
        assert expected.isfinite().all(), where
        largest = expected.abs().max() if expected.numel() else 0.0
        error = (actual - expected).abs().max() if expected.numel() else 0.0
        assert error <= 1e-5 * largest, f"{where}: error {error:.1e} of {largest:.1e}"
    else:
        assert torch.equal(actual, expected), f"{where}: {actual.tolist()}, not {expected.tolist()}"


def compare_tokens(actual: dict[str, Any], expected: dict[str, Any], where: str) -> None:
    """Of greedy decoding: a row's first other token is one of two that are as likely within 1e-4."""
    begin = expected["given"].shape[1]
    for row, tokens in enumerate(expected["tokens"][:, begin:].tolist()):
        for step, token in enumerate(tokens):
            logits, own = expected["logits"][step][row], actual["logits"][step][row]
            compare(own, logits, f"{where}, row {row}, step {step}")
            if int(actual["tokens"][row, begin + step]) != token:
                first, second = logits.topk(2).values.tolist()
                assert first - second <= 1e-4, f"{where}: row {row} differs at {step}"
                break


@pytest.mark.parametrize("check", [*parallel_worker.VALUES, "pair"])
def test_values_are_those_of_one_process(
    check: str, ranks: list[dict[str, Any]], whole: dict[str, Any]
) -> None:
    found = of_all(ranks, check)
    if check == "pair":
        assert found[:-2] == [[None]] * (len(ranks) - 2)
        found = found[-2:]
    assert all(same_bytes(rank, found[0]) for rank in found)
    expected = whole[check] if check != "pair" else whole["greedy"][2:]
    if check != "lower precision":
        compare(found[0], expected, check)
        return
    # A branch of a layer rounds half a dozen times, a split one at most three times more: each part and their
    # sum. Of independent errors the sum then grows by less than half.
    for rank, one in zip(found[0], expected, strict=True):
        exact = one["float32"].double()
        for name in ("bfloat16", "autocast"):
            error, allowed = ((t[name].double() - exact).norm() for t in (rank, one))
            assert 0 < error <= 1.5 * allowed, (name, error / exact.norm(), allowed / exact.norm())


def test_what_would_see_a_part_is_refused(ranks: list[dict[str, Any]]) -> None:
    classes = {"act_fn": "SiLU", "activation_fn": "GELU", "q_norm": "RMSNorm", "k_norm": "RMSNorm"}
    for (found,) in of_all(ranks, "hooked"):
        for place, error in found.items():
            name = place.rpartition(".")[2]
            what = f"{classes[name]} beside " if name in classes else f"Linear at {name} "
            what = "Linear at q_proj " if place == "all modules" else what
            assert error.startswith(f"TypeError: {what}"), (place, error)
            assert "has a hook, a forward of its own or FSDP around it; in a model that is" in error


def test_what_only_a_whole_model_can_do_is_refused(
    ranks: list[dict[str, Any]], whole: dict[str, Any]
) -> None:
    copied = "TypeError: a model that is split over ranks cannot be pickled or copied"
    expected = {
        "deepcopy": copied,
        "deepcopy of a layer": copied,
        "pickle": copied,
        "init_weights": "TypeError: init_weights() needs the whole model, and this one is split",
        "resize": "TypeError: resize_token_embeddings() needs the whole model",
        "head": "TypeError: set_output_embeddings() needs the whole model",
        "export": "TypeError: a model that is split over ranks (tensor_parallel) cannot be exported",
        "FSDP": "TypeError: Linear at q_proj has a hook, a forward of its own or FSDP around it",
        "not finite": "RuntimeError: the logits of row 0 are not finite at new token 0",
        "assigned head": "ValueError: a product of 259 features instead of the ",
        "assigned keys": "ValueError: k_proj, v_proj must give [",
        "whole cache": "ValueError: past_key_values was made for key/value heads 4, the model has",
        "whole cache in a forward": "RuntimeError: mllama_kernels.rotary_attention_cached: k_cache",
    }
    for (found,) in of_all(ranks, "changed"):
        assert found.keys() == expected.keys() | {"after all of it"}
        for name, beginning in expected.items():
            assert found[name].startswith(beginning), (name, found[name])
        compare(found["after all of it"], whole["forward"][2]["text False"][0], "after")


def test_there_are_no_gradients(ranks: list[dict[str, Any]]) -> None:
    expected = "RuntimeError: a model that is split over ranks (tensor_parallel) has no gradients"
    for (found,) in of_all(ranks, "gradients"):
        assert len(found) == 4
        assert all(error.startswith(expected) for error in found.values()), found


def test_ranks_that_were_given_different_things_all_say_so(ranks: list[dict[str, Any]]) -> None:
    names = {"prompt": "input_ids", "pixels": "pixel_values", "missing": "input_ids"}
    names |= {"number": "max_new_tokens", "seed": "seed", "cache": "past_key_values"}
    names |= {"kept text": "past_key_values", "functions": "stopping_criteria"}
    names |= {"dtype": "dtype", "encoding": "the encoding of the weights"}
    names |= {"semantics": "semantics", "weights": "the weights of norms in the checkpoint"}
    for rank, (found,) in enumerate(of_all(ranks, "unlike")):
        room = found.pop("room")
        assert room.startswith(
            "ValueError: the text of 1 rows"
            if rank == 1
            else "ValueError: on rank 1 ValueError: the t"
        ), room
        assert found.keys() == names.keys()
        for case, error in found.items():
            assert error.startswith(f"ValueError: {names[case]} is not the same on ranks 0 and 1")


def test_each_rank_has_its_part_of_the_memory(folder: Path, ranks: list[dict[str, Any]]) -> None:
    places = parallel_worker.places(folder)
    for rank in of_all(ranks, "memory"):
        for found, heads, at in zip(rank, (1, 2, 4), places, strict=True):
            alone, own = parallel_worker.memory(at), max(1, heads // len(ranks))
            assert (alone["heads"], found["heads"]) == (heads, own)
            assert found["page"] * heads == alone["page"] * own
            assert found["cache"] * heads == alone["cache"] * own
            assert found["of a copied configuration"] == found["cache"]
            assert found["weights"] == 4 * found["own parameters"] < alone["weights"]
            assert found["parameters"] == alone["parameters"] == alone["own parameters"]
            assert found["stored"] == alone["stored"]  # nothing of the split is
            has_memory = Path("/dev/shm").is_dir() and not _library.missing
            assert found["exchanges"] == ("SharedMemory" if has_memory else "NoneType")


def test_what_cannot_be_shared_is_refused_before_it_is_read(
    ranks: list[dict[str, Any]], whole: dict[str, Any]
) -> None:
    size = len(ranks)
    heads = "3 heads" if size == 2 else "6 heads"
    for rank, (found,) in enumerate(of_all(ranks, "refused")):
        share, logits = found["alone"]
        assert share is None and found["default"] is None
        compare(logits, {"text": whole["forward"][2]["text True"][0]}, "alone")
        for name in ("yes", "1"):
            assert found[name].startswith("TypeError: tensor_parallel must be True, False or a")
        if rank:
            assert found["others"].endswith("this process is not a member of the process group")
        refused = f"CannotSplit: {size} ranks cannot share the"
        assert found["6 heads of 3"].startswith(f"{refused} {heads} of model.language_model")
        assert found["3 vision heads"].startswith(f"{refused} 3 heads of model.vision_model")
        assert found["loaded"] == []


def test_without_a_process_group(folder: Path) -> None:
    at = parallel_worker.places(folder)[0]
    with pytest.raises(
        ValueError, match=r"run under torchrun, or call torch\.distributed\.init_pro"
    ):
        at.load(tensor_parallel=True)
