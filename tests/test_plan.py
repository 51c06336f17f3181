"""What a model takes on a device, said before anything is loaded."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from model_helpers import Shape

import mllama
from mllama import cli
from mllama.checkpoints import planning
from mllama.commands import plan as planning_command
from mllama.demo import checkpoint_path
from mllama.quantization.plan import (
    MemoryPlan,
    longest_context,
    named_config,
    plan,
    refusal,
    usable,
    weight_bytes,
)

GIB = 2**30
# Thousands of tokens, by card: what is promised for one 4-tile image.
CONTEXTS = {
    ("11b", "q4_k"): {8: 5.7, 12: 38, 16: 71, 24: 128},
    ("11b", "q4_k_m"): {8: 3, 12: 35, 16: 68, 24: 128},
    ("11b", "q6_k"): {8: 0, 12: 20, 16: 53, 24: 118, 48: 128},
    ("11b", "q8_0"): {8: 0, 12: 2, 16: 35, 24: 100, 48: 128},
    ("11b", "int8"): {8: 0, 12: 1, 16: 33, 24: 99, 48: 128},
    ("90b", "q4_k"): {24: 0, 48: 0, 80: 98, 96: 128, 141: 128},
    ("90b", "q4_k_m"): {24: 0, 48: 0, 80: 87, 96: 128, 141: 128},
    ("90b", "q6_k"): {48: 0, 80: 30, 96: 82, 141: 128},
    ("90b", "int8"): {80: 0, 96: 32, 141: 128},
    ("90b", "q8_0"): {80: 0, 96: 18, 141: 128},
}


@pytest.mark.parametrize(("name", "encoding"), CONTEXTS)
def test_what_fits_is_at_least_what_was_promised(name: str, encoding: str) -> None:
    for card, promised in CONTEXTS[name, encoding].items():
        longest, missing = longest_context(named_config(name), encoding, usable(card * GIB))
        assert (longest > 0) == (promised > 0) == (missing == 0), (card, longest)
        # The plan of the 90B takes less workspace than was reckoned with.
        assert 0.96 * 1000 * promised <= longest <= max(1024 * promised + 4300, 0)


@pytest.mark.parametrize(("encoding", "batch"), [("q4_k", 30), ("q6_k", 23), ("int8", 17)])
def test_many_prompts_of_8000_tokens_fit_the_largest_card(encoding: str, batch: int) -> None:
    made = plan("90b", encoding, 8000, batch)
    assert made.total <= usable(141 * GIB)
    assert plan("90b", "q4_k", 131072, 2).total <= usable(141 * GIB)


def test_the_parts_of_a_plan() -> None:
    made = mllama.plan("11b", "q4_k", 8192, batch=2, images=3)
    assert made.self_kv == 2 * 8192 * 131_072
    assert made.cross_kv == 2 * 3 * 209_846_272
    assert made.total == sum(
        getattr(made, name) for name in ("weights", "self_kv", "cross_kv", "workspace", "graphs")
    )
    assert made.to_json()["total"] == made.total
    assert 0.3e9 < plan("11b", "q4_k", 8192).workspace <= 0.35e9
    assert plan("90b", "q4_k", 8192).workspace <= 1.2e9
    assert plan("11b", "float32", 64).weights == pytest.approx(2 * 21.34e9, rel=1e-3)
    assert plan("11b", "q4_k", 64, overrides={"vision_model.*": "bfloat16"}).weights > made.weights


def test_the_cache_takes_what_the_plan_says() -> None:
    config = mllama.MllamaConfig(**Shape().configs())
    made = plan(config, "float32", 500, batch=3, images=0)
    cache = mllama.MllamaCache(
        config.text_config, 3, dtype=torch.float32, device="cpu", max_tokens=500
    )
    assert made.self_kv == cache.store.page_values.nbytes


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"encoding": "q5_k"}, "encoding must be one of"),
        ({"context": 0}, "context must be an integer from 1 to 131,072, got 0"),
        ({"context": 200_000}, "context must be"),
        ({"batch": True}, "batch must be"),
        ({"images": -1}, "images must be"),
        ({"tiles": 5}, "tiles must be an integer from 1 to 4"),
        ({"config": "7b"}, "'11b' or '90b', got '7b'"),
        ({"overrides": {"nothing": "q8_0"}}, "matches no weight"),
        ({"encoding": "bfloat16", "overrides": {"*": "q8_0"}}, "bfloat16 does not"),
    ],
)
def test_what_cannot_be_planned(changed: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        plan(**({"config": "11b", "encoding": "q4_k", "context": 64} | changed))


def test_a_refusal_names_what_is_missing_and_what_fits() -> None:
    config = named_config("11b")
    made = plan(config, "q8_0", 40_000)
    text = refusal(made, config, usable(12 * GIB), "cuda:0")
    assert "4.94 GB are missing; a context of 2,304 fits" in text
    text = refusal(made, config, usable(8 * GIB), "cuda:0")
    assert "q4_k_m fits, with a context of up to" in text
    text = refusal(plan("90b", "q4_k", 64), named_config("90b"), 10**9, "cuda:0")
    assert "no encoding fits" in text


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model in q8_0."""
    folder = tmp_path_factory.mktemp("stored")
    load(checkpoint_path(), quantization="q8_0").save_pretrained(folder)
    return folder


def load(folder: Path, **options: Any) -> Any:
    given = {"device": "cpu", "dtype": "bfloat16", **options}
    return mllama.MllamaForConditionalGeneration.from_pretrained(folder, **given)


def advice(
    monkeypatch: pytest.MonkeyPatch, folder: Path, room: int, **options: Any
) -> re.Match[str]:
    """What is said where a model does not fit into so many bytes, which it does not from here on."""
    monkeypatch.setattr(planning, "free_bytes", lambda device: room)
    with pytest.raises(ValueError, match="are missing; ") as caught:
        load(folder, **options)
    said = re.search(
        r"missing; (?P<text>.*?(?P<context>[\d,]+)?(?: fits)?); force=True", str(caught.value)
    )
    assert said is not None, caught.value
    return said


def tokens(said: re.Match[str]) -> int:
    return int(said["context"].replace(",", ""))


def test_fewer_images_are_proposed_where_they_fit(
    monkeypatch: pytest.MonkeyPatch, stored: Path
) -> None:
    config = load(stored).config
    shared = {"device": "cpu", "weights": weight_bytes(config, "q8_0")}
    room = plan(config, "q8_0", 64, images=2, **shared).total
    said = advice(monkeypatch, stored, room, context=100, images=5)
    assert said["text"].startswith("with 2 images a context of up to ")
    load(stored, context=tokens(said), images=2)
    room = plan(config, "q8_0", 64, images=0, **shared).total
    said = advice(monkeypatch, stored, room, context=100, images=1)
    assert said["text"].startswith("with no image a context of up to ")
    load(stored, context=tokens(said), images=0)


def test_of_stored_weights_no_other_encoding_is_proposed(
    monkeypatch: pytest.MonkeyPatch, stored: Path
) -> None:
    config = load(stored).config
    shared = {"device": "cpu", "weights": weight_bytes(config, "q8_0")}
    room = plan(config, "q8_0", 64, images=0, **shared).total - 1
    said = advice(monkeypatch, stored, room, context=64, images=0)
    assert said["text"].startswith("its weights stay as they are stored; of the original, ")
    encoding = re.search(r"original, (\S+) fits", said["text"])[1]
    with pytest.raises(ValueError, match="it is quantised, q8_0"):
        load(stored, quantization=encoding)
    load(checkpoint_path(), quantization=encoding, context=tokens(said), images=0)


def test_what_is_decoded_is_proposed_as_it_is_stored(
    monkeypatch: pytest.MonkeyPatch, stored: Path
) -> None:
    config = load(stored).config
    shared = {"device": "cpu", "dtype": "float32"}
    room = plan(config, "float32", 64, images=0, **shared).total - 1
    given = {"context": 64, "images": 0, "dtype": "float32"}
    said = advice(monkeypatch, stored, room, dequantize=True, **given)
    assert said["text"].startswith("without dequantize=True it fits, with a context of up to ")
    load(stored, **given)


def test_a_smaller_encoding_of_a_plain_checkpoint_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load(checkpoint_path()).config
    overrides = {"*.down_proj.weight": "bfloat16"}
    shared = {"device": "cpu", "weights": weight_bytes(config, "q8_0", overrides)}
    room = plan(config, "q8_0", 64, images=0, **shared).total - 1
    given = {"context": 64, "images": 0}
    asked = {"quantization": "q8_0", "quantization_overrides": overrides}
    said = advice(monkeypatch, checkpoint_path(), room, **asked, **given)
    encoding = re.match(r"(\S+) without overrides fits", said["text"])[1]
    load(checkpoint_path(), quantization=encoding, **given)


_MEASURE = """
import ctypes, gc, sys, torch, mllama
from mllama.quantization.plan import plan
def status(key):
    for line in open("/proc/self/status"):
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
torch.set_num_threads(1)
folder, encoding, tokens, images = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
load = mllama.MllamaForConditionalGeneration.from_pretrained
from mllama.demo import checkpoint_path
model = load(checkpoint_path(), device="cpu", quantization=encoding)
model.generate(torch.ones(1, 300).long(), max_new_tokens=2)
del model
gc.collect()
ctypes.CDLL(None).malloc_trim(0)
before, code = status("VmRSS"), status("RssFile")
model = load(folder, device="cpu", quantization=encoding)
config = model.config
ids = torch.full((1, tokens), 5)
ids[0, 1 : 1 + images] = config.image_token_index
given, vision = {}, config.vision_config
if images:
    side, tiles = vision.image_size, vision.max_num_tiles
    given = {
        "pixel_values": torch.randn(1, images, tiles, 3, side, side),
        "aspect_ratio_ids": torch.full((1, images), 6),
        "aspect_ratio_mask": torch.ones(1, images, tiles).long(),
        "cross_attention_mask": torch.ones(1, tokens, images, tiles).long(),
    }
gc.collect()
open("/proc/self/clear_refs", "w").write("5")  # resets the peak
model.generate(ids, max_new_tokens=2, do_sample=False, **given)
made = plan(config, encoding, tokens + 2, images=images, device="cpu")
# Without the libraries' code that was read from files meanwhile, more or less of it at once.
print(status("VmHWM") - before - (status("RssFile") - code), made.total)
"""


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose plan has parts of similar sizes."""
    config = mllama.MllamaConfig(
        text_config={
            "hidden_size": 1024,
            "intermediate_size": 3584,
            "num_hidden_layers": 5,
            "num_attention_heads": 16,
            "num_key_value_heads": 4,
            "vocab_size": 32_000,
            "cross_attention_layers": [1, 3],
            "max_position_embeddings": 4096,
            "pad_token_id": 0,
        },
        vision_config={
            "hidden_size": 320,
            "intermediate_size": 1280,
            "num_hidden_layers": 3,
            "num_global_layers": 1,
            "attention_heads": 4,
            "intermediate_layers_indices": [0, 1],
            "vision_output_dim": 960,
            "image_size": 560,
        },
        image_token_index=31_999,
    )
    with torch.device("meta"):
        model = mllama.MllamaForConditionalGeneration(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.05, 0.05)
    folder = tmp_path_factory.mktemp("plain")
    model.save_pretrained(folder)
    return folder


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(("tokens", "images"), [(2200, 0), (64, 1), (1600, 1)])
def test_the_peak_is_as_planned(plain: Path, tokens: int, images: int) -> None:
    """Of the process, while a prompt is read: by the layers of the text, by the vision tower, and by the
    layers of the text beside the states of an image."""
    command = [sys.executable, "-c", _MEASURE, str(plain), "q8_0", str(tokens), str(images)]
    # What is freed goes back to the system, also of the sizes that glibc would keep.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072"}
    result = subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=300, env=environment
    )
    measured, planned = map(int, result.stdout.split())
    print(f"measured {measured / 1e6:.1f} MB, planned {planned / 1e6:.1f} MB")
    # Of an image's tower 3 % more is planned than is taken, give or take half a percent.
    assert 0.96 * planned <= measured <= 1.03 * planned


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = cli.main(["plan", *arguments])
    return code, capsys.readouterr().out


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    code, out = run(capsys, "--model", "11b", "--memory", "24GB")
    assert code == 0 and "q4_k_m" in out and "131,072" in out
    code, out = run(capsys, "--model", "90b", "--memory", "48GB", "--json")
    rows = {row["encoding"]: row for row in json.loads(out)["encodings"]}
    assert rows["q4_k"]["missing"] == pytest.approx(0.86e9, rel=0.05)
    code, out = run(
        capsys,
        *("--model", "11b", "--memory", "8GB", "--quantization-encoding", "q4_k"),
        *("--max-length", "5000", "--json"),
    )
    made = json.loads(out)
    assert (
        code == 0
        and made["fits"]
        and made
        == {
            **made,
            **dataclasses.asdict(plan("11b", "q4_k", 5000)),
        }
    )
    code, out = run(capsys, "--model", "11b", "--memory", "8GB", "--quantization-encoding", "q8_0")
    assert code == 1 and "are missing" in out
    code, _ = run(capsys, "--model", str(checkpoint_path()), "--quantization-encoding", "q8_0")
    assert code == 0
    _, out = run(capsys, "--model", "11b", "--memory", "30MB", "--json")
    assert json.loads(out)["free"] == 0
    for wrong in ("24XB", "-1", "0GB", "12"):
        with pytest.raises(SystemExit):
            run(capsys, "--model", "11b", f"--memory={wrong}")
        said = capsys.readouterr().err
        assert "with its unit, such as 24GB" in said and f"'{wrong}'" in said
    code, _ = run(capsys, "--model", "11b", "--memory", "24GB", "--projector", "none.gguf")
    assert code == 2


def test_nothing_is_planned_that_is_not_loaded(
    stored: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("--model", str(stored), "--memory", "24GB", "--json", "--quantization-encoding")
    assert cli.main(["plan", *asked, "q4_k"]) == 1
    said = capsys.readouterr()
    assert "it is quantised, q8_0" in said.err and not said.out
    overrides = ("--quantization-override", "*.q_proj.weight=q6_k")
    assert cli.main(["plan", *asked, "q8_0", *overrides]) == 1
    assert "cannot be met" in capsys.readouterr().err
    # A dtype is that of the activations and of what is plain.
    made = {dtype: json.loads(run(capsys, *asked, dtype)[1]) for dtype in ("bfloat16", "float32")}
    assert {entry["encoding"] for entry in made.values()} == {"q8_0"}
    assert made["float32"]["self_kv"] == 2 * made["bfloat16"]["self_kv"]
    assert made["float32"]["weights"] > made["bfloat16"]["weights"]


def test_a_model_is_refused_for_the_context_it_is_loaded_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = {"quantization": "q8_0"}
    config = load(checkpoint_path(), **given).config
    most = config.text_config.max_position_embeddings
    shared = {"device": "cpu", "weights": weight_bytes(config, "q8_0")}
    room = plan(config, "q8_0", most, images=3, **shared).total
    assert room > plan(config, "q8_0", 64, images=3, **shared).total
    monkeypatch.setattr(planning, "free_bytes", lambda device: room)
    # More than the model takes is as much as it takes.
    load(checkpoint_path(), **given, context=10 * most, images=3)
    monkeypatch.setattr(planning, "free_bytes", lambda device: room - 1)
    load(checkpoint_path(), **given)
    load(checkpoint_path(), **given, context=most, images=2)
    load(checkpoint_path(), **given, context=most, images=3, force=True)
    with pytest.raises(
        ValueError, match=f"a context of {most:,} takes .* are missing; a context of"
    ):
        load(checkpoint_path(), **given, context=most, images=3)
    for wrong, said in (({"context": 0}, "context must be"), ({"images": -1}, "images must be")):
        for force in (False, True):
            with pytest.raises(ValueError, match=said):
                load(checkpoint_path(), **given, **wrong, force=force)
    with pytest.raises(ValueError, match="context and images are planned for the whole model"):
        mllama.MllamaForCausalLM.from_pretrained(
            checkpoint_path(), device="cpu", context=8, images=1
        )


def test_generate_plans_for_its_prompt_and_answer(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def recorded(config: object, encoding: str, context: int, **options: object) -> MemoryPlan:
        seen.append((context, options["images"]))
        return plan(config, encoding, context, **options)

    monkeypatch.setattr(planning, "plan", recorded)
    arguments = ["generate", "--prompt", "What is it?", "--device", "cpu", "--max-new-tokens", "7"]
    assert cli.main([*arguments, "--json"]) == 0
    prompt = json.loads(capsys.readouterr().out)["prompt_tokens"]
    assert seen == [(prompt + 7, 0)]


@pytest.mark.parametrize(("encoding", "size"), [("bfloat16", 2), ("int8", 4), ("q4_k_m", 8)])
def test_a_plan_of_one_of_several_ranks(encoding: str, size: int) -> None:
    """Halves of what is split, and whole what each has; below, the bytes are compared with loaded models."""
    whole, part = (plan("90b", encoding, 8192, tensor_parallel=n) for n in (1, size))
    assert part.tensor_parallel == size
    assert (part.self_kv * size, part.cross_kv * size) == (whole.self_kv, whole.cross_kv)
    assert whole.weights / size < part.weights < whole.weights / size * (1 + 0.01 * size * size)
    assert whole.workspace / size < part.workspace < whole.workspace
    config, free = named_config("90b"), part.total + 10**9
    assert longest_context(config, encoding, free, tensor_parallel=size)[0] > 8192
    assert longest_context(config, encoding, free)[0] == 0


def test_ranks_that_cannot_share_a_model() -> None:
    with pytest.raises(ValueError, match=r"3 ranks cannot share the (32|64|16) heads of "):
        plan("11b", "q8_0", 64, tensor_parallel=3)
    with pytest.raises(ValueError, match=r"tensor_parallel must be an integer from 1 to 32, got 0"):
        plan("11b", "q8_0", 64, tensor_parallel=0)


def test_the_table_names_the_encodings_that_ranks_cannot_share(
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = str(checkpoint_path())
    assert cli.main(["plan", "--model", model, "--tensor-parallel", "2", "--memory", "1GB"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "2 ranks cannot share the 1 block of 256 features" in lines["q4_k"]
    assert lines["bfloat16"].endswith("2,048") and lines["q8_0"].endswith("2,048")
    assert cli.main(["plan", "--model", model, "--tensor-parallel", "3", "--memory", "1GB"]) == 1
    assert "3 ranks cannot share the 2 heads" in capsys.readouterr().err


def test_ranks_on_the_host_have_equal_parts_of_its_memory(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning_command, "free_bytes", lambda device: 8 * 10**9)
    model = ("--model", str(checkpoint_path()), "--json", "--tensor-parallel", "2")
    for more, free in ((("--device", "cpu"), 4 * 10**9), (("--memory", "8GB"), usable(8 * GIB))):
        code, out = run(capsys, *model, *more)
        assert code == 0 and json.loads(out)["free"] == free
