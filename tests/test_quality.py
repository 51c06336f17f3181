"""What quantising costs: held on the demo model, and in the committed measurements and tables."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # last: an installed or simulated build of the kernels goes first

import mllama_kernels._library as library  # noqa: E402
from benchmarks import quality, quality_tables  # noqa: E402
from benchmarks.quality import ENCODINGS, PLAIN, agreement, divergence, load  # noqa: E402
from mllama import MllamaForConditionalGeneration, MllamaProcessor  # noqa: E402
from mllama.config import MllamaConfig  # noqa: E402
from mllama.demo import checkpoint_path, sample_picture  # noqa: E402
from tools.demo_model import widen  # noqa: E402
from tools.demo_model.config import save_configs  # noqa: E402
from tools.demo_model.evaluate import Report, examine  # noqa: E402
from tools.demo_model.tokenizer import build_tokenizer  # noqa: E402
from tools.demo_model.train import HELD_OUT_SEED  # noqa: E402

EIGHT_BITS = ("int8", "fp8", "q8_0")
# Points of accuracy that may be lost.
MOST_LOST = {e: 0.01 if e in EIGHT_BITS else 0.03 for e in ENCODINGS if e != PLAIN}
SEEDS = range(HELD_OUT_SEED, HELD_OUT_SEED + 16)
MEASURED = json.loads(quality.OUTPUT.read_text())


@pytest.fixture(scope="module")
def plain() -> Report:
    model = load(checkpoint_path(), PLAIN, torch.device("cpu"))
    return examine(model, MllamaProcessor.from_pretrained(checkpoint_path()), SEEDS)


@pytest.mark.skipif(library.simulated, reason="thousands of tokens take hours on simulated kernels")
@pytest.mark.parametrize("encoding", ["fp8", "q8_0", "q4_0"])
def test_the_demo_model_keeps_its_answers(encoding: str, plain: Report) -> None:
    """Its rows of 128 make q6_k q8_0 and q4_k q4_0; the committed file has all encodings of the wide one."""
    model = load(checkpoint_path(), encoding, torch.device("cpu"))
    report = examine(model, MllamaProcessor.from_pretrained(checkpoint_path()), SEEDS)
    assert report.accuracy() >= plain.accuracy() - MOST_LOST[encoding]
    assert agreement(report, plain) >= 1 - 2 * MOST_LOST[encoding]


@pytest.mark.parametrize("part", ["demo", "wide"])
@pytest.mark.parametrize("encoding", MOST_LOST)
def test_measured_accuracy_is_kept(part: str, encoding: str) -> None:
    rows = MEASURED[part]["encodings"]
    assert rows[encoding]["accuracy"] >= rows[PLAIN]["accuracy"] - MOST_LOST[encoding]


def test_the_wide_model_has_every_encoding() -> None:
    for encoding, row in MEASURED["wide"]["encodings"].items():
        assert encoding in (PLAIN, "q4_k_m") or encoding in row["encodings"], row["encodings"]


def test_the_mix_buys_accuracy() -> None:
    rows = MEASURED["stack"]["encodings"]
    for case in ("image", "text"):
        assert rows["q4_k_m"][case]["kl"] < 0.9 * rows["q4_k"][case]["kl"]


def test_the_page_has_the_tables_of_the_plan_and_the_file() -> None:
    text = quality_tables.PAGE.read_text()
    assert quality_tables.page(text, MEASURED) == text


def test_parts_of_one_run_are_of_one_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the file that the first of them writes is a change to what is committed."""
    output = tmp_path / "quality.json"
    monkeypatch.setattr(
        quality.machine, "commit", lambda: {"commit": "abc", "dirty": output.exists()}
    )
    monkeypatch.setattr(quality, "measured", lambda part, options: {"width": part})
    wide = ["--wide", str(tmp_path), "--output", str(output)]
    assert quality.main(wide) == 0
    document = json.loads(output.read_text())
    assert [(name, part["width"], part["dirty"]) for name, part in document.items()] == [
        (part, part, False) for part in quality.PARTS
    ]


def test_divergence_is_that_of_the_expected_distribution() -> None:
    expected = torch.tensor([[0.75, 0.25], [0.5, 0.5]]).log()
    actual = torch.tensor([[0.25, 0.75], [0.5, 0.5]]).log()
    found = divergence(actual, expected)
    assert found["kl"] == pytest.approx(0.5 * 0.5 * torch.tensor(3.0).log().item(), rel=1e-6)
    assert found["top1"] == 0.5
    assert divergence(expected, expected) == {"kl": 0.0, "top1": 1.0}


def test_the_widened_model_computes_the_same(tmp_path: Path, seed: int) -> None:
    save_configs(build_tokenizer(), tmp_path, 256)
    narrow = MllamaForConditionalGeneration.from_pretrained(checkpoint_path(), dtype="float32")
    wide = MllamaForConditionalGeneration(
        MllamaConfig.from_pretrained(tmp_path), semantics=narrow.semantics
    )
    widen.widen(narrow, wide, seed)
    processor = MllamaProcessor.from_pretrained(checkpoint_path())
    ask = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Why?"}]}]
    prompt = processor.apply_chat_template(ask, add_generation_prompt=True)
    inputs = processor(sample_picture(seed)[0], prompt, return_tensors="pt")
    with torch.no_grad():
        expected = narrow(**inputs).logits
        torch.testing.assert_close(wide.eval()(**inputs).logits, expected, rtol=1e-4, atol=1e-4)
