"""The options of the commands for quantised models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mllama import MllamaForConditionalGeneration, MllamaProcessor, cli
from mllama.checkpoints import saving
from mllama.demo import checkpoint_path
from mllama.quantized_modules import Quantized

DEMO = str(checkpoint_path())


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    code = cli.main([*map(str, arguments)])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def generate(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    shared = ("--prompt", "What is it?", "--device", "cpu", "--greedy", "--max-new-tokens", 4)
    return run(capsys, "generate", *shared, *arguments)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serialised") / "model"
    shared = ["generate", "--prompt", "hi", "--device", "cpu", "--max-new-tokens", "2"]
    assert (
        cli.main(
            [
                *shared,
                "--quantization-encoding",
                "q8_0",
                "--save-to-serialized-model-path",
                str(folder),
            ]
        )
        == 0
    )
    return folder


def test_a_serialised_model_is_there_with_its_processor_or_not_at_all(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target, full = tmp_path / "in", tmp_path / "out", tmp_path / "full"
    shutil.copytree(DEMO, source)
    processor = MllamaProcessor.from_pretrained(DEMO)
    processor.chat_template = {"default": processor.chat_template, "short": "{{ messages }}"}
    processor.save_pretrained(source)
    shared = ("--model", source, "--save-to-serialized-model-path")
    code, _, err = generate(capsys, *shared, target)
    assert code == 0, err
    assert MllamaProcessor.from_pretrained(target).chat_template == processor.chat_template

    def no_space(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving, "save_file", no_space)
    code, _, err = generate(capsys, *shared, full)
    assert code == 1 and "No space left on device" in err and not list(full.iterdir())


def test_a_serialised_model_answers_as_the_one_it_was_made_of(
    capsys: pytest.CaptureFixture[str], stored: Path
) -> None:
    _, expected, _ = generate(capsys, "--quantization-encoding", "q8_0")
    code, out, _ = generate(capsys, "--serialized-model-path", stored)
    assert code == 0 and out == expected
    again = ("--serialized-model-path", stored, "--quantization-encoding", "q8_0")
    assert generate(capsys, *again)[:2] == (0, expected)
    assert (stored / "tokenizer.json").is_file() and (stored / "chat_template.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--quantization-encoding", "float32", "--dtype", "bfloat16"], "contradict each other"),
        (["--serialized-model-path", "a", "--save-to-serialized-model-path", "b"], "contradict"),
        (["--quantization-override", "*=q8_0"], "goes with a --quantization-encoding"),
        (
            ["--quantization-encoding", "q8_0", "--quantization-override", "q8_0"],
            "PATTERN=ENCODING",
        ),
        (["--save-to-serialized-model-path", DEMO], "holds a model already"),
        (["--save-to-serialized-model-path", "a", "--adapter", "b"], "without an adapter"),
    ],
)
def test_options_that_contradict_each_other(
    capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    code, _, err = generate(capsys, "--model", DEMO, *arguments)
    assert code == 2 and said in err


def test_another_encoding_than_stored(capsys: pytest.CaptureFixture[str], stored: Path) -> None:
    code, _, err = generate(
        capsys, "--serialized-model-path", stored, "--quantization-encoding", "q6_k"
    )
    assert code == 2 and "holds q8_0, --quantization-encoding asks for q6_k" in err
    code, _, err = generate(
        capsys, "--serialized-model-path", stored, "--quantization-encoding", "float32"
    )
    assert code == 2 and "holds q8_0, --quantization-encoding asks for float32" in err
    with pytest.raises(SystemExit) as caught:
        generate(capsys, "--quantization-encoding", "nf4")
    assert caught.value.code == 2


def test_a_dtype_as_encoding(capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(capsys, "--quantization-encoding", "float32")[0] == 0
    given = ("--quantization-encoding", "float32", "--dtype", "float32")
    assert generate(capsys, *given)[0] == 0


def test_overrides_reach_the_model(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}
    load = MllamaForConditionalGeneration.from_pretrained.__func__

    def recorded(cls: Any, folder: Any, **options: Any) -> Any:
        seen.update(options)
        return load(cls, folder, **options)

    monkeypatch.setattr(MllamaForConditionalGeneration, "from_pretrained", classmethod(recorded))
    overrides = ("--quantization-override", "*.down_proj.weight=q4_0")
    code, _, _ = generate(capsys, "--quantization-encoding", "q8_0", *overrides, "--force")
    assert code == 0 and seen["force"] and seen["quantization"] == "q8_0"
    assert seen["quantization_overrides"] == {"*.down_proj.weight": "q4_0"}


def test_info_and_plan_of_a_stored_model(capsys: pytest.CaptureFixture[str], stored: Path) -> None:
    _, out, _ = run(capsys, "info", "--model", stored)
    assert "mllama_kernels" in out and "q8_0: 69 tensors" in out
    _, out, _ = run(capsys, "info", "--model", stored, "--json")
    model = json.loads(out)["model"]
    _, out, _ = run(capsys, "plan", "--model", stored, "--json", "--device", "cpu")
    assert json.loads(out)["weights"] == model["bytes"]


def test_info_tells_what_an_encoding_would_give(
    capsys: pytest.CaptureFixture[str], stored: Path
) -> None:
    asked = ("--quantization-encoding", "q4_k", "--quantization-override", "*.up_proj.weight=q8_0")
    code, out, _ = run(capsys, "info", "--model", DEMO, *asked, "--json")
    loaded = json.loads(out)["model"]["loaded"]
    model = MllamaForConditionalGeneration.from_pretrained(
        DEMO,
        device="cpu",
        quantization="q4_k",
        quantization_overrides={"*.up_proj.weight": "q8_0"},
    )
    encodings = [m.weight.encoding for m in model.modules() if isinstance(m, Quantized)]
    assert code == 0 and loaded[0].startswith("q4_k, 0.00")
    assert f"q4_0: {encodings.count('q4_0')} tensors" in loaded
    assert any("rows of 128 are no whole blocks of q4_k" in line for line in loaded)
    code, out, _ = run(
        capsys, "info", "--model", DEMO, "--quantization-encoding", "float32", "--json"
    )
    found = json.loads(out)["model"]
    assert code == 0 and found["loaded"] == [f"float32, {4 * found['parameters'] / 1e9:.3f} GB"]
    code, _, err = run(capsys, "info", "--model", stored, "--quantization-encoding", "q6_k")
    assert code == 1 and "it is quantised, q8_0" in err
    code, _, err = run(capsys, "info", "--quantization-encoding", "q6_k")
    assert code == 2 and "goes with a checkpoint in --model" in err


def test_info_of_serialised_models(
    capsys: pytest.CaptureFixture[str], stored: Path, tmp_path: Path
) -> None:
    _, expected, _ = run(capsys, "info", "--model", stored, "--json")
    code, out, _ = run(capsys, "info", "--serialized-model-path", stored, "--json")
    assert code == 0 and json.loads(out)["model"] == json.loads(expected)["model"]
    again = ("--serialized-model-path", stored, "--quantization-encoding")
    assert run(capsys, "info", *again, "q8_0")[0] == 0
    code, _, err = run(capsys, "info", *again, "q6_k")
    assert code == 2 and "holds q8_0, --quantization-encoding asks for q6_k" in err
    target = tmp_path / "written"
    written = ("--save-to-serialized-model-path", target)
    asked = ("--model", DEMO, "--quantization-encoding", "q8_0")
    code, out, err = run(capsys, "info", *asked, *written, "--json")
    assert code == 0 and json.loads(out)["model"]["loaded"][0].startswith("q8_0")
    _, out, _ = run(capsys, "info", "--model", target, "--json")
    model = json.loads(out)["model"]
    assert model["encodings"] == json.loads(expected)["model"]["encodings"]
    for given, said in (
        (written, "goes with a checkpoint in --model"),
        ((*asked, *written), "holds a model already"),
        ((*written, "--serialized-model-path", stored), "contradict"),
    ):
        code, out, err = run(capsys, "info", *given)
        assert code == 2 and said in err and not out


def test_verify_refuses_an_original_of_a_plain_model(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "verify", "--model", DEMO, "--original", DEMO, "--device", "cpu")
    assert code == 2 and "--original goes with a quantised model" in err


def test_verify_refuses_an_original_that_is_none(
    capsys: pytest.CaptureFixture[str], stored: Path, tmp_path: Path
) -> None:
    shared = ("verify", "--model", stored, "--device", "cpu", "--original")
    code, out, err = run(capsys, *shared, stored)
    assert code == 2 and out == "" and "is quantised itself (q8_0)" in err
    code, out, err = run(capsys, *shared, tmp_path / "nothing")
    assert code == 1 and out == "" and "nothing" in err


def test_verify_reports_what_quantising_has_cost(
    capsys: pytest.CaptureFixture[str], stored: Path
) -> None:
    code, out, _ = run(
        capsys, "verify", "--model", stored, "--original", DEMO, "--device", "cpu", "--json"
    )
    report = json.loads(out)
    names = {row["name"] for row in report["ops"]}
    assert {"quantized_linear", "quantized_rows"} <= names
    failed = [row for row in report["ops"] + report["layers"] if not row["passed"]]
    assert code == 0 and report["passed"], failed
    assert report["quantization"] == "q8_0"
    assert 0 <= report["quantization_loss"]["kl"] < 0.1
    assert report["quantization_loss"]["top_1_agreement"] > 0.8
    code, _, err = run(capsys, "verify", "--model", stored, "--against", "transformers")
    assert code == 2 and "this one is quantised" in err
