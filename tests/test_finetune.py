"""Fine-tuning on a file of conversations: what is learned, what is refused, and runs that are killed."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from model_helpers import BACKENDS
from safetensors.torch import load_file, save_file

from mllama import MllamaForConditionalGeneration, MllamaProcessor, cli
from mllama.demo import checkpoint_path, sample_picture
from mllama.loss import IGNORED
from mllama.training import state
from mllama.training.batches import Order, collate
from mllama.training.conversations import DataError, read_conversations
from mllama.training.encoding import encode, read_examples
from mllama.training.folder import RunFolder
from mllama.training.log import Log, read_log
from mllama.training.options import TrainingOptions
from mllama.training.ranks import TrainingRanks
from mllama.training.state import Learned, State, save_state
from mllama.training.state_folders import newest, remove_others
from mllama.training.trainer import FineTuner

MODEL = str(checkpoint_path())
QUESTION, ANSWER = "What do you see?", "blue"  # whatever the image shows


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny models wait longer for each other's threads than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def processor() -> MllamaProcessor:
    return MllamaProcessor.from_pretrained(MODEL)


def said(role: str, text: str, *images: str) -> dict[str, Any]:
    parts = [{"type": "image", "path": path} for path in images]
    return {"role": role, "content": [*parts, {"type": "text", "text": text}]}


def conversation(*images: str, answer: str = ANSWER) -> list[dict[str, Any]]:
    return [said("user", QUESTION, *images), said("assistant", answer)]


def write(path: Path, *conversations: Any) -> Path:
    lines = (c if isinstance(c, str) else json.dumps({"messages": c}) for c in conversations)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Six conversations, one of them without an image and one of two turns."""
    (tmp_path / "photos").mkdir()
    for i in range(4):
        sample_picture(i)[0].save(tmp_path / "photos" / f"{i}.png")
    return write(
        tmp_path / "data.jsonl",
        *(conversation(f"photos/{i}.png") for i in range(4)),
        [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": ANSWER}],
        [*conversation("photos/0.png"), *conversation()],
    )


def finetune(data: Path, output: Path, *options: str) -> int:
    base = ["finetune", "--model", MODEL, "--data", str(data), "--output", str(output)]
    base += ["--backend", "reference", "--device", "cpu", "--dtype", "float32"]
    base += ["--batch-size", "2", "--accumulate", "1", "--lora-rank", "2"]
    return cli.main([*base, *options])


def adapter(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "adapter_model.safetensors")


def losses(output: Path) -> list[dict[str, Any]]:
    """The log without the times."""
    return [
        {k: v for k, v in entry.items() if k != "seconds"}
        for entry in read_log(output / "log.jsonl")
    ]


def assert_same_run(one: Path, other: Path) -> None:
    assert losses(one) == losses(other)
    a, b = adapter(one), adapter(other)
    assert a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


# Examples


def test_only_what_the_assistant_says_is_learned(processor: MllamaProcessor, data: Path) -> None:
    *_, example = read_examples(data, processor, 1000)
    learned = [i for i, label in enumerate(example.labels) if label != IGNORED]
    assert all(example.input_ids[i] == example.labels[i] for i in learned)
    assert processor.decode([example.labels[i] for i in learned]) == 2 * f"{ANSWER}<|eot_id|>"
    assert processor.decode(example.input_ids) == processor.apply_chat_template(
        [*conversation("photos/0.png"), *conversation()]
    )


def test_the_prompt_is_the_one_of_generation(processor: MllamaProcessor, data: Path) -> None:
    example = read_examples(data, processor, 1000)[0]
    user = said("user", QUESTION, str(data.parent / "photos" / "0.png"))
    asked = processor.apply_chat_template(
        [user], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    (prompt,) = asked["input_ids"].tolist()
    assert example.input_ids[: len(prompt)] == prompt
    assert example.labels[: len(prompt)] == [IGNORED] * len(prompt)
    assert IGNORED not in example.labels[len(prompt) :]
    batch = collate(processor, [example])
    for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"):
        assert batch[name].equal(asked[name]), name
    assert batch["cross_attention_mask"][:, : len(prompt)].equal(asked["cross_attention_mask"])


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] | trim }}</s>{% endfor %}",
        "{{ messages | length }}{% for m in messages %}<{{ m['content'] }}>\n{% endfor %}",
        "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}<|eot_id|>"
        "{% endif %}{% endfor %}",
    ],
)
def test_any_template_that_writes_turns(
    processor: MllamaProcessor, tmp_path: Path, template: str
) -> None:
    other = MllamaProcessor(processor.image_processor, processor.tokenizer, template)
    turns = [
        {"role": "user", "content": "0 or 1?"},
        {"role": "assistant", "content": " 1 "},
        {"role": "user", "content": "1"},
        {"role": "assistant", "content": "0"},
    ]
    (found,) = read_conversations(write(tmp_path / "data.jsonl", turns))
    example = encode(other, found)
    ending = other.apply_chat_template(turns).rpartition("0")[2]
    told = " 1 " if "trim" not in template else "1"
    labels = [label for label in example.labels if label != IGNORED]
    assert processor.decode(labels) == f"{told}{ending}0{ending}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages[0]['content'] }}", "does not write message 1 as it is"),
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}", "does not end every turn"),
        ("{{ raise_exception('no such talk') }}", "the chat template refuses it: no such talk"),
        ("{{ 'Q: ' + messages[0]['content'] }}", "the chat template refuses it: .*concatenate"),
    ],
)
def test_templates_that_hide_what_is_said(
    processor: MllamaProcessor, tmp_path: Path, template: str, message: str
) -> None:
    other = MllamaProcessor(processor.image_processor, processor.tokenizer, template)
    sample_picture(0)[0].save(tmp_path / "0.png")
    with pytest.raises(DataError, match=f"line 1: .*{message}"):
        read_examples(write(tmp_path / "d.jsonl", conversation("0.png")), other, 1000)


def test_a_batch_of_rows_with_and_without_images(processor: MllamaProcessor, data: Path) -> None:
    examples = read_examples(data, processor, 1000)
    text, both = examples[4], collate(processor, [examples[5], examples[4]])
    length = len(text.input_ids)
    assert both["attention_mask"].sum(1).tolist() == [len(examples[5].input_ids), length]
    assert both["aspect_ratio_ids"][1].tolist() == [0]
    assert not both["cross_attention_mask"][1].any()
    assert both["labels"][1, length:].eq(IGNORED).all()
    assert "pixel_values" not in collate(processor, [text])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[]", r'line 2: expected {"messages": \[...\]}'),
        ('{"messages": []}', "at least one message"),
        ([{"role": "cook", "content": "x"}], "message 0 needs a role, one of system, user, assis"),
        ([{"role": "user"}], "message 0 needs content"),
        ([said("user", "x")], "the last message is the user's"),
        ([said("user", "x"), said("assistant", " ")], "message 1: the assistant says nothing"),
        ([said("user", "x"), said("assistant", "y", "1.png")], "the assistant cannot show"),
        ([{"role": "user", "content": [{"type": "audio"}]}], "has a part that is neither"),
        (conversation("missing.png"), "line 2: .*missing.png cannot be read: .*No such file"),
        (conversation("data.jsonl"), "line 2: .*data.jsonl is not an image"),
        (conversation(answer="blue " * 200), r"line 2: \d+ tokens, at most 100 are taken"),
        (
            [{"role": "system", "content": "Be brief."}, *conversation("photos/0.png")],
            "line 2: the chat template refuses it: .*incompatible with system messages",
        ),
    ],
)
def test_faults_are_told_with_their_line(capsys: Any, data: Path, line: Any, message: str) -> None:
    text = data.read_text().splitlines()
    write(data, text[0], line, text[1])
    output = data.parent / "out"
    assert finetune(data, output, "--max-length", "100") == 1
    err = capsys.readouterr().err
    assert re.search(message, err), err
    assert "Traceback" not in err and not output.exists(), "nothing has begun"


def test_all_faults_come_in_one_message(data: Path) -> None:
    write(data, *(["{"] * 30))
    with pytest.raises(DataError, match=r"line 20: not JSON.*\n.*and 10 more") as caught:
        read_conversations(data)
    assert len(caught.value.problems) == 30


def test_faults_of_every_kind_come_together(capsys: Any, data: Path) -> None:
    (data.parent / "bad.png").write_text("no image")
    lines = [json.dumps({"messages": c}) for c in (
        conversation("photos/0.png"),
        conversation("missing.png", "bad.png"),
        conversation(answer="<|image|>"),
        [{"role": "system", "content": "x"}, *conversation("missing.png")],
        conversation(answer="blue " * 200),
    )]  # fmt: skip
    raw = [line.encode() for line in lines]
    raw += [b"{", b'{"messages": "caf\xc3"}', b"[]"]
    data.write_bytes(b"\n".join(raw))
    options = ("--max-length", "100", "--no-escape-special-tokens")
    assert finetune(data, data.parent / "out", *options) == 1
    told = [line.strip() for line in capsys.readouterr().err.splitlines()[1:]]
    assert [re.search(r"- line (\d+): (.{12})", line).groups() for line in told] == [
        ("2", f"{data.parent}/missing.png"[:12]),
        ("2", f"{data.parent}/bad.png"[:12]),
        ("3", "its text has"),
        ("4", f"{data.parent}/missing.png"[:12]),
        ("4", "the chat tem"),
        ("5", told[5].partition(": ")[2][:12]),
        ("6", "not JSON: Ex"),
        ("7", "not UTF-8: i"),
        ("8", 'expected {"m'),
    ]
    assert "tokens, at most 100 are taken" in told[5] and not (data.parent / "out").exists()


def test_faults_of_both_files_come_together(capsys: Any, data: Path) -> None:
    write(data, conversation(), "{")
    held_out = write(data.parent / "held_out.jsonl", conversation(), conversation(), "[]")
    for path, fault in ((held_out, "line 3: expected"), (data.parent / "none", "No such file")):
        assert finetune(data, data.parent / "out", "--eval-data", str(path)) == 1
        err = capsys.readouterr().err
        assert "line 2: not JSON" in err and fault in err and str(path) in err


def test_conversations_longer_than_the_model_takes(capsys: Any, data: Path) -> None:
    write(data, conversation(), conversation(answer="blue " * 2500), "{")
    assert finetune(data, data.parent / "out") == 1
    err = capsys.readouterr().err
    assert re.search(r"line 2: \d+ tokens, at most \d+ are taken\n.*line 3: not JSON", err), err


def test_lines_of_any_unicode(processor: MllamaProcessor, tmp_path: Path) -> None:
    """Separators of Unicode inside a text end no line, escaped or not."""
    words = "a\u2028b\x85c \u2029\v\f\x1c \U0001f600"
    path = tmp_path / "data.jsonl"
    for is_escaped in (True, False):
        entry = {"messages": [said("user", words), said("assistant", words)]}
        line = json.dumps(entry, ensure_ascii=is_escaped)
        path.write_bytes(b"\xef\xbb\xbf" + line.encode())
        (example,) = read_examples(path, processor, 1000)
        if is_escaped:
            first = example
    assert first.input_ids == example.input_ids and first.labels == example.labels


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--eval-data", os.devnull], "it is not a regular file"),
        (["--batch-size", "0"], "batch_size must be above 0, got 0"),
        (["--learning-rate", "-1"], "learning_rate must be 0 or more, got -1.0"),
        (["--warmup", "1"], "warmup must be at least 0 and below 1"),
        (["--dtype", "float16"], "invalid choice"),
        (["--output", "/proc/nobody/writes/here"], "/proc/nobody"),
        (["--model", "/nowhere"], "/nowhere"),
        (["--device", "warp"], "warp"),
    ],
)
def test_misuse_is_refused_before_training(
    capsys: Any, data: Path, options: list[str], message: str
) -> None:
    try:
        code = finetune(data, data.parent / "out", *options)
    except SystemExit as stop:
        code = stop.code
    assert code in (1, 2) and message in capsys.readouterr().err
    assert not (data.parent / "out" / "log.jsonl").exists()


def test_without_peft(capsys: Any, monkeypatch: Any, data: Path) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    assert finetune(data, data.parent / "out") == 1
    assert "adapters need peft: pip install 'mllama-kernels[train]'" in capsys.readouterr().err
    assert not (data.parent / "out").exists()


# Steps


def test_every_epoch_has_every_example_once() -> None:
    order = Order(examples=7, per_step=3, seed=4)
    assert order.steps_per_epoch == 3
    epochs = [[i for s in range(3) for i in order.indices(3 * e + s)] for e in range(3)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1] and Order(7, 3, seed=5).indices(0) != order.indices(0)


def test_the_rate_rises_and_falls() -> None:
    options = TrainingOptions(warmup=0.25, learning_rate=1.0)
    rates = [options.rate(step, 8) for step in range(8)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates == [*rates[:2], *sorted(rates[2:], reverse=True)] and rates[-1] < 0.1
    assert TrainingOptions().peak_rate == 2e-4 and TrainingOptions(lora_rank=0).peak_rate == 1e-5


def trained(data: Path, processor: MllamaProcessor, **options: Any) -> dict[str, torch.Tensor]:
    """The gates after two steps in them alone."""
    model = MllamaForConditionalGeneration.from_pretrained(
        MODEL, dtype=torch.float32, backend="reference"
    )
    model.requires_grad_(False)
    gates = {n: p.requires_grad_() for n, p in model.named_parameters() if p.shape == (1,)}
    chosen = TrainingOptions(**{"lora_rank": 0, "learning_rate": 1e-2, "max_steps": 2} | options)
    examples = read_examples(data, processor, 1000)
    name = f"run {options['batch_size']} {options['accumulate']}"
    folder = RunFolder(data.parent / name, {}, resume=False)
    ranks = TrainingRanks(0, 1, torch.device("cpu"))
    FineTuner(model.train(), processor, examples, [], chosen, ranks, folder).run()
    return gates


@pytest.mark.parametrize(("batch_size", "accumulate"), [(1, 4), (4, 1), (2, 2)])
def test_accumulated_batches_are_one_batch(
    data: Path, processor: MllamaProcessor, batch_size: int, accumulate: int
) -> None:
    """Whatever the lengths of the answers, every learned token counts alike."""
    lines = data.read_text().splitlines()
    write(data, *lines[:3], conversation("photos/3.png", answer="a small red cross, a blue one"))
    one = trained(data, processor, batch_size=3, accumulate=2)
    other = trained(data, processor, batch_size=batch_size, accumulate=accumulate)
    for name, gate in one.items():
        torch.testing.assert_close(gate, other[name], rtol=1e-4, atol=1e-5)


def test_a_loss_that_is_not_finite_stops_the_run(capsys: Any, monkeypatch: Any, data: Path) -> None:
    original = FineTuner.compute_loss

    def spoiled(*args: Any, **options: Any) -> torch.Tensor:
        return original(*args, **options) * float("nan")

    monkeypatch.setattr(FineTuner, "compute_loss", spoiled)
    assert finetune(data, data.parent / "out", "--max-steps", "2") == 1
    assert "step 1 has loss nan" in capsys.readouterr().err


# Runs


def test_an_adapter_is_learned_and_used(capsys: Any, data: Path) -> None:
    output, image = data.parent / "out", str(data.parent / "photos" / "1.png")
    options = ["--max-steps", "14", "--learning-rate", "0.02", "--save-every", "7"]
    assert finetune(data, output, *options, "--eval-data", str(data), "--lora-vision") == 0
    log = read_log(output / "log.jsonl")
    steps, measured = [e for e in log if "loss" in e], [e for e in log if "eval_loss" in e]
    assert [e["step"] for e in steps] == list(range(1, 15))
    assert steps[-1]["loss"] < 0.3 * steps[0]["loss"]
    assert [e["step"] for e in measured] == [7, 14]
    assert measured[1]["eval_loss"] < steps[0]["loss"] / 2
    assert not list(output.glob("state*")) and not list(output.glob("*.partial"))
    vision = [name for name in adapter(output) if "vision_model" in name]
    assert vision and len(vision) < len(adapter(output))
    ask = ["generate", "--model", MODEL, "--image", image, "--prompt", QUESTION, "--greedy"]
    ask += ["--device", "cpu", "--dtype", "float32", "--backend", "reference"]
    capsys.readouterr()
    assert cli.main(ask) == 0
    before = capsys.readouterr().out
    assert cli.main([*ask, "--adapter", str(output)]) == 0
    assert capsys.readouterr().out.strip() == ANSWER != before.strip()


class Killed(BaseException):
    """Ends a run as a kill does: nothing of it catches this."""


def kill_at(monkeypatch: Any, step: int) -> None:
    """Let the next run end right after the log has a line of this step."""
    original = Log.write

    def write_and_die(self: Log, **entry: Any) -> None:
        original(self, **entry)
        if entry["step"] == step:
            monkeypatch.setattr(Log, "write", original)
            raise Killed

    monkeypatch.setattr(Log, "write", write_and_die)


@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_a_killed_run_goes_on_as_if_it_had_not_been(
    monkeypatch: Any, data: Path, backend: tuple[str, str]
) -> None:
    """Before the first checkpoint, between two, at one, and with a line of the log cut off."""
    options = [
        "--max-steps",
        "7",
        "--save-every",
        "2",
        "--lora-dropout",
        "0.3",
        "--backend",
        backend[0],
    ]
    whole, killed = data.parent / "whole", data.parent / "killed"
    assert finetune(data, whole, *options) == 0
    for step in (1, 3, 6, 7):
        kill_at(monkeypatch, step)
        with pytest.raises(Killed):
            finetune(data, killed, *options, "--resume")
        assert not (killed / "adapter_model.safetensors").exists()
        with (killed / "log.jsonl").open("a") as log:
            log.write('{"step": 99, "lo')
    (killed / "run.json.1234.partial").write_bytes(b"half of it")
    (killed / "state-9.partial").mkdir()
    (killed / "state-9.partial" / "rank-0-of-1.safetensors").write_bytes(b"half of it")
    assert finetune(data, killed, *options, "--resume") == 0
    assert_same_run(whole, killed)
    assert {p.name for p in killed.iterdir()} == {p.name for p in whole.iterdir()}


def test_progress_is_for_terminals_and_counts_on(capsys: Any, monkeypatch: Any, data: Path) -> None:
    output, options = data.parent / "out", ["--max-steps", "3", "--save-every", "1", "--resume"]
    kill_at(monkeypatch, 2)
    with pytest.raises(Killed):
        finetune(data, output, *options)
    assert "training" not in capsys.readouterr().err
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert finetune(data, output, *options) == 0
    bars = [text for text in capsys.readouterr().err.split("\r") if text.startswith("training")]
    loss = losses(output)[-1]["loss"]
    assert "| 1/3 [" in bars[0], "the step before the kill is not taken again"
    assert re.search(rf"100%.*\| 3/3 \[.*step.*, loss {loss:.4f}\]\n", bars[-1])


@pytest.mark.parametrize("backend", BACKENDS[1:2])
def test_the_kernels_learn_what_the_reference_learns(data: Path, backend: tuple[str, str]) -> None:
    found = []
    for name in ("reference", backend[0]):
        output = data.parent / name
        assert finetune(data, output, "--max-steps", "6", "--backend", name) == 0
        found.append([entry["loss"] for entry in losses(output)])
    assert found[1] == pytest.approx(found[0], rel=1e-4) and found[0][-1] < found[0][0]


def test_all_weights_are_trained_and_resumed(monkeypatch: Any, data: Path) -> None:
    options = ["--max-steps", "3", "--save-every", "1", "--lora-rank", "0", "--dtype", "bfloat16"]
    options += ["--gradient-checkpointing", "--learning-rate", "1e-3"]
    whole, killed = data.parent / "whole", data.parent / "killed"
    assert finetune(data, whole, *options) == 0
    kill_at(monkeypatch, 2)
    with pytest.raises(Killed):
        finetune(data, killed, *options)
    assert finetune(data, killed, *options, "--resume") == 0
    assert losses(whole) == losses(killed)
    models = [
        MllamaForConditionalGeneration.from_pretrained(folder, backend="reference")
        for folder in (whole, killed, MODEL)
    ]
    one, other, before = (dict(model.named_parameters()) for model in models)
    assert models[0].dtype == torch.bfloat16 and models[0].semantics == models[2].semantics
    assert all(one[name].equal(other[name]) for name in one)
    assert sum(not one[name].equal(before[name]) for name in one) > 0.9 * len(one)
    MllamaProcessor.from_pretrained(whole)


def test_sigkill_at_any_moment(data: Path) -> None:
    options = ["--max-steps", "5", "--save-every", "1"]
    whole, killed = data.parent / "whole", data.parent / "killed"
    assert finetune(data, whole, *options) == 0
    code = (  # it does not come to its end
        "import sys, time, torch; torch.set_num_threads(1)\n"
        "from mllama import cli\n"
        "from mllama.training.log import Log\n"
        "write = Log.write\n"
        "def held(self, **entry):\n"
        "    entry['step'] < 5 or time.sleep(600)\n"
        "    write(self, **entry)\n"
        "Log.write = held\n"
        "sys.exit(cli.main(sys.argv[1:]))"
    )
    command = ["finetune", "--model", MODEL, "--data", str(data), "--output", str(killed)]
    command += ["--backend", "reference", "--device", "cpu", "--dtype", "float32"]
    command += ["--batch-size", "2", "--accumulate", "1", "--lora-rank", "2", *options]
    process = subprocess.Popen([sys.executable, "-c", code, *command], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        if len(read_log(killed / "log.jsonl")) >= 2:
            break
        time.sleep(0.002)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "it was to be killed on its way"
    assert len(read_log(killed / "log.jsonl")) >= 2
    assert finetune(data, killed, *options, "--resume") == 0
    assert_same_run(whole, killed)


def test_a_folder_has_one_run(capsys: Any, data: Path) -> None:
    output = data.parent / "out"
    assert finetune(data, output, "--max-steps", "1") == 0
    first = adapter(output)
    assert finetune(data, output, "--max-steps", "1") == 1
    assert "holds a run already" in capsys.readouterr().err
    assert finetune(data, output, "--max-steps", "1", "--resume") == 0
    assert "is finished" in capsys.readouterr().err
    assert finetune(data, output, "--max-steps", "2", "--lora-rank", "4", "--resume") == 1
    err = capsys.readouterr().err
    assert "lora_rank was 2, now 4; max_steps was 1, now 2" in err
    write(data, *data.read_text().splitlines()[:5])
    assert finetune(data, output, "--max-steps", "1", "--resume") == 1
    assert "made by another run: data was" in capsys.readouterr().err
    assert all(adapter(output)[name].equal(first[name]) for name in first)
    (output / "run.json").unlink()
    assert finetune(data, output, "--max-steps", "1", "--resume") == 1
    assert "holds a model or an adapter" in capsys.readouterr().err


COUNTS = {"max_steps": 9}
ALONE = TrainingRanks(0, 1, torch.device("cpu"))


def learned(model: torch.nn.Module) -> Learned:
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return Learned(model, optimizer, is_sharded=False)


def test_a_state_is_written_whole_or_not_at_all(monkeypatch: Any, tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    given = learned(model)
    save_state(tmp_path, 5, {**COUNTS, "global_step": 5}, given, ALONE)
    expected = model.weight.detach().clone()

    def half(tensors: Any, new: Path) -> None:
        new.write_bytes(b"half of it")
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(state, "save_file", half)
        with pytest.raises(Killed):
            save_state(tmp_path, 6, {**COUNTS, "global_step": 6}, given, ALONE)
    with torch.no_grad():
        model.weight.zero_()
    assert newest(tmp_path) == tmp_path / "state-5"
    State(tmp_path / "state-5", COUNTS).load(given, ALONE)
    assert model.weight.equal(expected)
    remove_others(tmp_path, tmp_path / "state-5")
    assert [path.name for path in tmp_path.iterdir()] == ["state-5"]
    with pytest.raises(ValueError, match=r"state-5 cannot be resumed from: .*shape"):
        State(tmp_path / "state-5", COUNTS).load(learned(torch.nn.Linear(3, 4)), ALONE)
    with pytest.raises(ValueError, match="state of another run"):
        State(tmp_path / "state-5", {"max_steps": 8})
    removing = tmp_path / "state-5"
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda path: (path / "trainer_state.json").unlink())
        remove_others(tmp_path, None)
    assert not removing.exists() and newest(tmp_path) is None, "half removed is none"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "adapter_config.json").unlink(), "holds no adapter"),
        (
            lambda folder: save_file(
                {name: torch.zeros(3, 3) for name in adapter(folder)},
                folder / "adapter_model.safetensors",
            ),
            "does not fit the model: .*size mismatch",
        ),
        (
            lambda folder: save_file(
                {**adapter(folder), "base_model.model.more.lora_A.weight": torch.zeros(2, 2)},
                folder / "adapter_model.safetensors",
            ),
            "does not fit the model: .*more",
        ),
        (
            lambda folder: (folder / "adapter_config.json").write_text('{"peft_type": "IA3"}'),
            "of type 'IA3'; LORA is supported",
        ),
    ],
    ids=["missing", "shape", "extra", "kind"],
)
def test_adapters_that_do_not_fit(capsys: Any, data: Path, spoil: Any, message: str) -> None:
    output = data.parent / "out"
    assert finetune(data, output, "--max-steps", "1") == 0
    spoil(output)
    ask = ["generate", "--model", MODEL, "--prompt", "x", "--adapter", str(output)]
    assert cli.main([*ask, "--device", "cpu", "--backend", "reference"]) == 1
    err = capsys.readouterr().err
    assert re.search(message, err, re.DOTALL), err
