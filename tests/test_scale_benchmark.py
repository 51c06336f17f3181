"""The benchmark of several ranks, on a model that takes no time."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # last: an installed or simulated build of the kernels goes first

import mllama  # noqa: E402
from benchmarks import scale  # noqa: E402
from benchmarks.budget import Budget  # noqa: E402
from benchmarks.scale_ranks import CrewFailed, Task, Ways  # noqa: E402
from benchmarks.scenario import Layers, Scenario  # noqa: E402

SIZES = {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2}
SIZES |= {"intermediate_size": 131}
TINY = Task("tiny", Layers(2, (1,), 1, 1, (0,)), 259, torch.float32, Scenario(1, 4, 5), sizes=SIZES)

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="this PyTorch has no gloo",
)


def test_one_and_two_ranks_are_timed() -> None:
    row = json.loads(json.dumps(scale.measure(TINY, [Ways(1, 1), Ways(2, 1)], 2, Budget())))
    one, two = row["contenders"]
    assert (one["status"], two["status"]) == ("timed", "timed")
    assert two["difference"] < 1e-5 and one["difference"] == 0
    assert (one["exchange"], two["exchange"]) == (None, "shared memory")
    # Two for each layer, and one for the logits.
    assert two["exchanges_per_step"] == 5 and "exchanges_per_step" not in one
    assert 0 < two["exchanging_ms"]["median"] <= two["exchanging_and_waiting_ms"]["median"]
    assert two["alone_us"].keys() == {"all_reduce", "all_gather"}
    assert len(one["token_rounds_ms"]) == 2 and one["share_of_floor"] > 0
    shared = sum(two["bytes_per_step"]) - one["bytes_per_step"][0]
    norms = 4 * (5 * 512 + 2 * 64 + 2)  # of which both have all, the gates among them
    assert 0 < shared <= norms
    (goal,) = scale.judged([row], "cpu")
    assert goal["value"] == two["times_the_first"]["median"] and goal["target"] == 0.8
    assert scale.line(row).count("tokens/s") == 2


def test_a_model_that_says_other_things_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale, "difference", lambda actual, expected: 0.1)
    row = scale.measure(TINY, [Ways(1, 1)], 1, Budget())
    assert row["contenders"][0]["status"] == "wrong"
    assert "logits differ by 0.1" in scale.line(row)
    assert scale.judged([row], "cpu") == []


def test_a_rank_that_fails_says_why() -> None:
    with pytest.raises(CrewFailed, match=r"rank 0 of 3 ranks of 1 thread: CannotSplit: 3 ranks"):
        scale.measure(TINY, [Ways(3, 1)], 1, Budget())


def test_what_is_measured() -> None:
    names = [
        (task.model, way.name) for task, ways in scale.jobs(["float32"], False, 0) for way in ways
    ]
    model = "4 text layers of the 11B"
    assert names == [(model, "1 rank of 2 threads"), (model, "2 ranks of 1 thread")]
    (task, ways), (large, four) = scale.jobs([], False, 4)
    assert [way.name for way in ways] == ["1 GPU", "2 GPUs", "4 GPUs"] and task.model == "11B"
    assert [way.name for way in four] == ["4 GPUs"] and large.model == "90B"
    with torch.device("meta"):
        text = mllama.MllamaForCausalLM(large.config())
    assert 87e9 < text.num_parameters() < 89e9  # of the 90B without the vision tower
    assert scale.needed_bytes(replace(task, dtype=torch.float32), ways[:1]) > 4 * 9e9
