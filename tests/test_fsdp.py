"""Training under FSDP, both versions, in two processes: losses, weights and tokens are the bare model's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import fsdp_worker
import pytest
import torch
from model_helpers import Prompt, Shape, batch_of, hf_model, our_model

ROOT = Path(__file__).parents[1]
SHAPE = Shape(tile_side=28, layers=3, cross=(1,), local_layers=2, taps=(0, 1), global_layers=1)

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="this PyTorch has no gloo",
)


@pytest.fixture(scope="module")
def given() -> dict[str, Any]:
    torch.manual_seed(0)
    hf = hf_model(SHAPE)
    batches = []
    for ratio in (2, 6):
        batch = batch_of(SHAPE, [Prompt(9, (1,), (ratio,))])
        labels = batch["input_ids"].masked_fill(batch["input_ids"] == SHAPE.vocab, -100)
        batches.append(batch | {"labels": labels})
    return {"config": SHAPE.configs(), "weights": hf.state_dict(), "batches": batches, "hf": hf}


@pytest.fixture(scope="module")
def results(given: dict[str, Any], tmp_path_factory: Any) -> list[dict[str, Any]]:
    """What came out in each process."""
    folder = tmp_path_factory.mktemp("fsdp")
    torch.save({k: v for k, v in given.items() if k != "hf"}, folder / "given.pt")
    script = str(ROOT / "tests" / "fsdp_worker.py")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    workers = [
        subprocess.Popen([sys.executable, script, str(rank), str(folder)], env=environment)
        for rank in range(2)
    ]
    try:
        assert [worker.wait(timeout=400) for worker in workers] == [0, 0]
    finally:
        for worker in workers:
            worker.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module")
def bare(given: dict[str, Any]) -> dict[str, Any]:
    model = our_model(SHAPE, given["hf"], ("auto", "cpu")).train()
    losses = [loss.item() for loss in fsdp_worker.steps(model, given["batches"])]
    prompt = {k: v for k, v in given["batches"][0].items() if k != "labels"}
    return {
        "losses": losses,
        "weights": model.state_dict(),
        "tokens": fsdp_worker.generated(model, prompt).tolist(),
    }


@pytest.mark.parametrize("name", fsdp_worker.WAYS)
def test_values_are_those_of_the_bare_model(
    name: str, results: list[dict[str, Any]], bare: dict[str, Any]
) -> None:
    # bfloat16 keeps 8 bits of weights and activations, whose errors add up as a random walk.
    tolerance = 2**-7 if "bfloat16" in name else 1e-5
    for result in (rank[name] for rank in results):
        assert not isinstance(result, str), result
        assert result["losses"] == pytest.approx(bare["losses"], rel=tolerance)
        assert result["loss alone"] == pytest.approx(result["loss"], rel=tolerance)
        assert set(result["weights"]) == set(bare["weights"])
        for key, expected in bare["weights"].items():
            error = (result["weights"][key].float() - expected).norm()
            assert error <= tolerance * expected.norm(), key
        if "bfloat16" not in name:
            assert result["tokens"] == bare["tokens"]
