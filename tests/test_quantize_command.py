"""mllama quantize: the folder it writes, what it prints, and what it refuses before it works."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from quantizer_weights import relative_error
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from wide_checkpoint import write_wide_checkpoint

import mllama_kernels
from mllama import MllamaConfig, MllamaForConditionalGeneration, MllamaProcessor, cli
from mllama.commands import quantize as command
from mllama.demo import checkpoint_path, sample_picture
from mllama.quantization.error_table import ErrorTable

DOWN = "language_model.model.layers.0.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    torch.manual_seed(3)
    return write_wide_checkpoint(tmp_path_factory.mktemp("wide"), torch.bfloat16)


@pytest.fixture
def data(tmp_path) -> Path:
    for number in range(2):
        sample_picture(number)[0].save(tmp_path / f"{number}.png")
    lines = [
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "path": f"{number}.png"},
                        {"type": "text", "text": "What is this?"},
                    ],
                },
                {"role": "assistant", "content": "a red circle"},
            ]
        }
        for number in range(2)
    ]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    code = cli.main(["quantize", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {
        k: v for p in sorted(folder.glob("model*.safetensors")) for k, v in load_file(p).items()
    }


def test_the_folder_holds_what_quantize_makes(capsys, folder, tmp_path):
    output = tmp_path / "out"
    code, out, err = run(
        capsys, "--model", folder, "--encoding", "q4_k", "--output", output, "--json"
    )
    assert code == 0, err
    report = json.loads(out)
    plain, made = load_file(folder / "model.safetensors"), stored(output)
    expected = mllama_kernels.quantize(plain[DOWN], "q4_k")
    assert made[f"{DOWN}.q4_k"].equal(expected.blocks()) and DOWN not in made
    norm = "language_model.model.norm.weight"
    assert made[norm].equal(plain[norm])
    config = json.loads((output / "config.json").read_text())
    assert config["quantization_config"] == {
        "quant_method": "mllama_kernels", "version": 1, "encoding": "q4_k", "overrides": {}
    }  # fmt: skip
    assert report["encoding"] == "q4_k" and report["without_importance"] > 0
    assert report["bytes"] == (output / "model.safetensors").stat().st_size
    rows = {(row["kind"], row["encoding"]): row for row in report["errors"]}
    assert rows["down_proj", "q4_k"]["tensors"] == 6
    assert 0.05 < rows["down_proj", "q4_k"]["relative_error"] < 0.08
    assert 0.01 < rows["lm_head", "q6_k"]["relative_error"] < 0.02
    assert all(row["weighted_error"] is None for row in report["errors"])
    model = MllamaForConditionalGeneration.from_pretrained(output, device="cpu")
    assert model.quantization.encoding == "q4_k"
    MllamaProcessor.from_pretrained(output)


@pytest.mark.parametrize("encoding", ["int8", "fp8"])
def test_eight_bits_are_written_for_other_libraries_too(capsys, folder, tmp_path, encoding):
    output = tmp_path / "out"
    code, out, err = run(capsys, "--model", folder, "--encoding", encoding, "--output", output)
    assert code == 0, err
    assert "relative error" in out and "down_proj" in out
    config = json.loads((output / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    made, plain = stored(output), load_file(folder / "model.safetensors")
    expected = mllama_kernels.quantize(plain[DOWN], encoding)
    assert made[DOWN].view(torch.uint8).equal(expected.data.view(torch.uint8))
    assert made[f"{DOWN}_scale"][:, 0].equal(expected.scale)


def test_overrides_and_rows_that_do_not_fit(capsys, tmp_path):
    output = tmp_path / "out"
    code, _, err = run(
        capsys, "--model", checkpoint_path(), "--encoding", "q4_k", "--output", output,
        "--override", "*.layers.0.mlp.down_proj.weight=q6_k", "--override", "vision_model.*=bfloat16",
    )  # fmt: skip
    assert code == 0, err
    assert "rows of 128 are no whole blocks of q4_k: q4_0 instead" in err
    made = stored(output)
    assert f"{DOWN}.q6_k" in made
    assert not any(n.startswith("vision_model.") and n.endswith(".q8_0") for n in made)
    overrides = json.loads((output / "config.json").read_text())["quantization_config"]["overrides"]
    assert list(overrides) == ["*.layers.0.mlp.down_proj.weight", "vision_model.*"]


def test_files_are_cut_before_their_limit(capsys, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "SHARD_BYTES", 300_000)
    output = tmp_path / "out"
    code, _, err = run(capsys, "--model", folder, "--encoding", "q8_0", "--output", output)
    assert code == 0, err
    shards = sorted(output.glob("model-*.safetensors"))
    assert len(shards) > 3 and (output / "model.safetensors.index.json").is_file()
    for path in shards:
        with safe_open(path, "pt") as file:
            keys = list(file.keys())
        assert path.stat().st_size < 400_000 or len(keys) == 1
    MllamaForConditionalGeneration.from_pretrained(output, device="cpu")


def test_calibration_is_used_kept_and_read_again(capsys, folder, tmp_path, data):
    first, second = tmp_path / "first", tmp_path / "second"
    shared = ("--model", folder, "--encoding", "q4_k", "--device", "cpu", "--json")
    code, out, err = run(capsys, *shared, "--output", first, "--calibrate", data)
    assert code == 0, err
    report = json.loads(out)
    assert report["weighted"] > 10
    importance = load_file(first / command.IMPORTANCE)
    plain = load_file(folder / "model.safetensors")
    assert importance[DOWN].shape == plain[DOWN].shape[1:]
    assert "language_model.model.layers.1.cross_attn.k_proj.weight" in importance
    expected = mllama_kernels.quantize(plain[DOWN], "q4_k", importance[DOWN])
    assert stored(first)[f"{DOWN}.q4_k"].equal(expected.blocks())
    code, out, err = run(
        capsys, *shared, "--output", second, "--importance", first / command.IMPORTANCE
    )
    assert code == 0, err
    assert json.loads(out)["weighted"] == report["weighted"]
    ours, again = stored(first), stored(second)
    assert ours.keys() == again.keys() and all(ours[name].equal(again[name]) for name in ours)


def test_what_a_run_that_failed_had_learnt_is_used(capsys, folder, tmp_path):
    output, name = tmp_path / "out", command.IMPORTANCE
    output.mkdir()
    columns = load_file(folder / "model.safetensors")[DOWN].shape[1]
    save_file({DOWN: torch.linspace(1, 9, columns)}, output / name)
    code, out, err = run(
        capsys, "--model", folder, "--encoding", "q4_k", "--output", output, "--json",
        "--importance", output / name,
    )  # fmt: skip
    assert code == 0, err
    assert json.loads(out)["weighted"] == 1 and DOWN in load_file(output / name)
    code, _, err = run(capsys, "--model", folder, "--encoding", "q4_k", "--output", output)
    assert code == 1 and "holds a model" in err and name not in err


def test_calibration_means_the_squares_of_what_the_linears_see(folder, data):
    from mllama.commands.calibration import mean_squares, read_inputs

    model = MllamaForConditionalGeneration.from_pretrained(folder, device="cpu", dtype="float32")
    inputs = read_inputs(data, MllamaProcessor.from_pretrained(folder), 2048)
    means = mean_squares(model, inputs)
    linear = model.model.language_model.layers[0].mlp.down_proj
    seen = []
    hook = linear.register_forward_pre_hook(lambda _, x: seen.append(x[0].flatten(0, -2)))
    with torch.no_grad():
        for make in inputs:
            model(**make())
    hook.remove()
    exact = torch.cat(seen).double().square().mean(0).float()
    torch.testing.assert_close(
        means["model.language_model.layers.0.mlp.down_proj.weight"], exact, rtol=1e-5, atol=0
    )
    assert not linear._forward_pre_hooks


def test_a_folder_of_images_and_text_calibrates(capsys, folder, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "text.txt").write_text("a red circle and a blue square " * 30)
    shared = (
        "--model",
        folder,
        "--encoding",
        "q4_k",
        "--device",
        "cpu",
        "--json",
        "--calibrate",
        source,
    )
    code, out, err = run(capsys, *shared, "--output", tmp_path / "text")
    assert code == 0, err
    without_images = json.loads(out)
    assert without_images["without_importance"] > 0  # those of the cross-attention among them
    sample_picture(1)[0].save(source / "1.png")
    code, out, err = run(capsys, *shared, "--output", tmp_path / "both")
    assert code == 0, err
    assert json.loads(out)["weighted"] > without_images["weighted"]


def test_importance_lowers_the_error_that_counts(folder, tmp_path, capsys, data):
    output = tmp_path / "out"
    code, *_ = run(
        capsys, "--model", folder, "--encoding", "q4_0", "--output", output, "--calibrate", data,
        "--device", "cpu",
    )  # fmt: skip
    assert code == 0
    plain = load_file(folder / "model.safetensors")[DOWN].float()
    importance = load_file(output / command.IMPORTANCE)[DOWN]
    without, given = (mllama_kernels.quantize(plain, "q4_0", i) for i in (None, importance))
    errors = [relative_error(plain, q.dequantize(), importance) for q in (without, given)]
    assert errors[1] < 0.98 * errors[0]


def test_refusals_come_before_the_work(capsys, folder, tmp_path, data):
    output = tmp_path / "out"
    shared = ("--model", folder, "--output", output)
    empty = tmp_path / "empty"
    empty.mkdir()
    for arguments, text in [
        ((*shared, "--encoding", "q4_k", "--override", "*.q_prj.*=q6_k"), "matches no weight"),
        ((*shared, "--encoding", "q4_k", "--override", "*=q5_k"), "must be one of"),
        (
            (
                *shared,
                "--encoding",
                "q4_k",
                "--override",
                "*v_proj*=q6_k",
                "--override",
                "*v_proj*=q8_0",
            ),
            "given twice, as q6_k and q8_0",
        ),
        ((*shared, "--encoding", "q8_0", "--calibrate", data), "importance would change nothing"),
        (
            (*shared, "--encoding", "q4_k", "--calibrate", empty),
            "holds nothing to run the model on",
        ),
        ((*shared, "--encoding", "q4_k", "--importance", tmp_path / "no"), "no is missing"),
        (("--model", folder, "--encoding", "q4_k", "--output", folder), "holds a model"),
        (("--model", folder, "--encoding", "q4_k", "--output", data), "is no folder"),
        (
            (*shared, "--encoding", "q4_k", "--calibrate", data, "--override", "x=q6_k"),
            "matches no weight",
        ),
    ]:
        code, out, err = run(capsys, *arguments)
        expected = 2 if "given twice" in text else 1
        assert code == expected and text in err and not out, err
        assert not output.exists()
    for words in (["--override", "q4_k"], ["--importance", "a", "--calibrate", "b"]):
        with pytest.raises(SystemExit) as stop:
            run(capsys, *shared, "--encoding", "q4_k", *words)
        assert stop.value.code == 2


def test_what_is_quantised_is_not_quantised_again(capsys, folder, tmp_path):
    once, twice = tmp_path / "once", tmp_path / "twice"
    assert run(capsys, "--model", folder, "--encoding", "q8_0", "--output", once)[0] == 0
    for encoding in ("q8_0", "q4_k"):
        code, _, err = run(capsys, "--model", once, "--encoding", encoding, "--output", twice)
        assert code == 1 and "quantised already" in err and "quantise the original" in err
    assert not twice.exists()


def test_a_weight_that_cannot_be_encoded_is_named(capsys, folder, tmp_path):
    damaged, output = tmp_path / "damaged", tmp_path / "out"
    shutil.copytree(folder, damaged)
    tensors = load_file(damaged / "model.safetensors")
    tensors[DOWN][2, 5] = float("nan")
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    code, _, err = run(capsys, "--model", damaged, "--encoding", "q4_k", "--output", output)
    assert code == 1 and f"{DOWN} in model.safetensors" in err and "row 2, column 5 is nan" in err
    assert not list(output.iterdir())


def test_a_killed_run_leaves_no_folder_that_loads(folder, tmp_path):
    output = tmp_path / "out"
    script = (
        "import sys, time, mllama_kernels\n"
        "from mllama import cli\n"
        "from mllama.commands import quantize as command\n"
        "command.SHARD_BYTES = 100_000\n"
        "made, count = mllama_kernels.quantize, 0\n"
        "def slow(*arguments):\n"
        "    global count\n"
        "    count += 1\n"
        "    if count > 20:\n"
        "        time.sleep(60)\n"
        "    return made(*arguments)\n"
        "mllama_kernels.quantize = slow\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    words = ["quantize", "--model", str(folder), "--encoding", "q8_0", "--output", str(output)]
    process = subprocess.Popen([sys.executable, "-c", script, *words], env=os.environ)
    until = time.monotonic() + 300
    while not list(output.glob("model-*partial")) and time.monotonic() < until:
        time.sleep(0.2)
    process.kill()
    process.wait()
    assert list(output.glob("model-*partial"))
    assert all(path.name.endswith(".partial") for path in output.iterdir())
    for kind in (MllamaForConditionalGeneration, MllamaProcessor):
        with pytest.raises((ValueError, OSError)):
            kind.from_pretrained(output)


def test_a_processor_that_cannot_be_written_leaves_nothing(capsys, folder, tmp_path, monkeypatch):
    def full(self, target: Path) -> None:
        (target / "tokenizer.json").write_text("{}")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(MllamaProcessor, "save_pretrained", full)
    output = tmp_path / "out"
    code, _, err = run(capsys, "--model", folder, "--encoding", "q8_0", "--output", output)
    assert code == 1 and "No space left on device" in err
    assert not list(output.iterdir())


def test_named_templates_are_written_with_the_model(capsys, folder, tmp_path):
    """They lie in a folder of their own."""
    source, output = tmp_path / "in", tmp_path / "out"
    processor = MllamaProcessor.from_pretrained(folder)
    shutil.copytree(folder, source)
    processor.chat_template = {"default": processor.chat_template, "short": "{{ messages }}"}
    processor.save_pretrained(source)
    code, _, err = run(capsys, "--model", source, "--encoding", "q8_0", "--output", output)
    assert code == 0, err
    assert MllamaProcessor.from_pretrained(output).chat_template == processor.chat_template
    assert not list(output.rglob("*.partial"))


@pytest.mark.parametrize("name", ["tokenizer.json", "preprocessor_config.json"])
def test_a_folder_with_a_processor_is_left_alone(capsys, folder, tmp_path, name):
    (tmp_path / name).write_text("{}")
    code, _, err = run(capsys, "--model", folder, "--encoding", "q8_0", "--output", tmp_path)
    assert code == 1 and f"holds a model ({name})" in err
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_the_table_of_errors():
    table, weight = ErrorTable(), torch.randn(8, 256)
    quantized = mllama_kernels.quantize(weight, "q4_k")
    table.add("gate_proj", weight, quantized, None)
    table.add("gate_proj", weight, quantized, None)
    importance = torch.rand(256) + 0.1
    table.add("up_proj", weight.bfloat16(), quantized, importance)
    table.add(
        "lm_head", torch.zeros(2, 256), mllama_kernels.quantize(torch.zeros(2, 256), "q8_0"), None
    )
    gate, head, up = table.rows()
    assert (gate["tensors"], gate["bytes"]) == (2, 2 * quantized.nbytes)
    expected = relative_error(weight, quantized.dequantize())
    assert gate["relative_error"] == pytest.approx(expected, rel=1e-5)
    expected = relative_error(weight.bfloat16(), quantized.dequantize(), importance)
    assert up["weighted_error"] == pytest.approx(expected, rel=1e-5)
    assert head["relative_error"] is None
    lines = list(table.lines())
    assert len(lines) == 4 and "weighted" in lines[0] and lines[2].split()[-2:] == ["-", "-"]


_MEASURE = """
import sys
from mllama import cli
def status(key):
    for line in open("/proc/self/status"):
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
cli.build_parser()
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # resets the peak
shared = ["--encoding", "q4_k", "--device", "cpu"]
assert cli.main(["quantize", "--model", sys.argv[1], "--output", sys.argv[2], *shared]) == 0
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_the_peak_is_the_result_and_what_a_weight_takes(tmp_path):
    """What is freed between two weights goes back to the system."""
    entries = json.loads((checkpoint_path() / "config.json").read_text())
    sizes = {"hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 6}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 4}
    entries["text_config"] |= {**sizes, **heads, "cross_attention_layers": [1, 3]}
    with torch.device("meta"):
        model = MllamaForConditionalGeneration(MllamaConfig.from_dict(entries))
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.1, 0.1)
    model.save_pretrained(tmp_path / "plain")
    for path in checkpoint_path().iterdir():
        if path.name not in ("model.safetensors", "config.json"):
            shutil.copy(path, tmp_path / "plain" / path.name)
    command = [sys.executable, "-c", _MEASURE, str(tmp_path / "plain"), str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    peak = int(result.stdout.split()[-1])
    written = sum(p.stat().st_size for p in (tmp_path / "out").glob("model*.safetensors"))
    print(f"written {written / 1e6:.0f} MB, peak {peak / 1e6:.0f} MB")
    # Of a weight of 3.7 million numbers: it and its sums in float32, as it is encoded and as it is packed.
    assert written <= peak <= written + 110 * 10**6
