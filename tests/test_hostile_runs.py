"""Folders of training runs that somebody else sent, to be gone on with: nothing is written outside of them,
and no state is believed."""

from __future__ import annotations

import json

from confinement import confined

_SETUP = """
import contextlib, io, json, os, pathlib, shutil, sys, tempfile
import torch
from mllama import cli
from mllama.demo import checkpoint_path
from safetensors.torch import load_file, save_file
from mllama.training import trainer
W = pathlib.Path(tempfile.mkdtemp())
data = W / "data.jsonl"
turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
data.write_text((json.dumps({"messages": turns}) + "\\n") * 4)
victim = W / "victim"
victim.mkdir()
(victim / "precious").write_text("precious")
(victim / "x.jinja").write_text("precious")
def run(folder, *more):
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        code = cli.main(["finetune", "--model", str(checkpoint_path()), "--data", str(data), "--output",
                         str(folder), "--device", "cpu", "--backend", "reference", "--max-steps", "2",
                         "--save-every", "1", "--lora-rank", "2", *more])
    return code, err.getvalue()
save_state = trainer.save_state
def stopped(*arguments):
    save_state(*arguments)
    raise KeyboardInterrupt
trainer.save_state = stopped
assert run(W / "base")[0] == 130
trainer.save_state = save_state
S, F, C = "state-1", "state-1/rank-0-of-1.safetensors", "state-1/trainer_state.json"
def case(name, change):
    folder = W / name.replace("/", "_")
    shutil.copytree(W / "base", folder)
    state = load_file(folder / F)
    changed = change(folder, state)
    if changed:
        save_file({k: t.contiguous() for k, t in state.items()}, folder / F)
    code, err = run(folder, "--resume")
    intact = all(p.read_text() == "precious" for p in victim.iterdir()) and len(os.listdir(victim)) == 2
    print("case", json.dumps([name, code, err[-3000:], intact]), flush=True)
"""


def _cases(code: str) -> dict[str, tuple[int, str, bool]]:
    ended = confined(_SETUP + code, seconds=400, mebibytes=6000)
    assert ended.kind == "ok", (ended.kind, ended.err[-3000:])
    lines = [json.loads(x[5:]) for x in ended.out.splitlines() if x.startswith("case ")]
    return {name: (code, err, intact) for name, code, err, intact in lines}


def test_links_are_not_written_through() -> None:
    found = _cases("""
names = ["README.md", "adapter_config.json", "adapter_model.safetensors", "log.jsonl", F, "run.json", C,
         "tokenizer_config.json", "config.json", "x.partial"]
for name in names:
    def link(folder, state, name=name):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(victim / "precious")
    case(name, link)
def dangling(folder, state):
    (folder / "README.md").symlink_to(victim / "new")
case("dangling", dangling)
def linked_folder(folder, state):
    (folder / "additional_chat_templates").symlink_to(victim)
case("folder", linked_folder)
def deeper(folder, state):
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "a.jinja").symlink_to(victim / "precious")
case("deeper", deeper)
def linked_state(folder, state):
    shutil.move(folder / S, folder / "away")
    (folder / S).symlink_to(folder / "away")
case("state", linked_state)
case("pipe", lambda folder, state: os.mkfifo(folder / "README.md"))
case("a folder for a file", lambda folder, state: (folder / "y.partial").mkdir())
""")
    assert len(found) == 16
    for name, (code, err, intact) in found.items():
        assert intact, name
        if name == "a folder for a file":
            assert code == 0, err
        else:
            assert code == 1 and ("is a link" in err or "is no regular file" in err), (name, err)


def test_states_that_no_run_has() -> None:
    found = _cases("""
def first(state, kind):
    return next(name for name in sorted(state) if name.startswith(kind + "."))
def tensors(kind, change):
    def do(folder, state):
        name = first(state, kind)
        state[name] = change(state[name])
        return True
    return do
def counts(change, text=None):
    def do(folder, state):
        found = json.loads((folder / C).read_text())
        (folder / C).write_text(text or json.dumps({**found, **change}))
    return do
def rng(place, value):
    def do(folder, state):
        left = torch.tensor(list(value), dtype=torch.uint8)
        state["rng"][place : place + len(left)] = left
        return True
    return do
def renamed(to):
    return lambda folder, state: (folder / F).rename(folder / S / to) and None
def cut(folder, state):
    (folder / F).write_bytes((folder / F).read_bytes()[:-10])
parameter = lambda change: tensors("parameter", change)
case("genuine", lambda folder, state: False)
case("step -1", counts({"global_step": -1}))
case("step 10**15", counts({"global_step": 10**15}))
case("step True", counts({"global_step": True}))
case("step of another folder", counts({"global_step": 2}))
case("counts of another run", counts({"max_steps": 10}))
case("more counts", counts({"stateful_callbacks": {"x": {"args": {}}}}))
case("no object", counts({}, "[]"))
case("no JSON", counts({}, "{"))
case("deep JSON", counts({}, "[" * 10**5))
case("no counts", lambda folder, state: (folder / C).unlink())
case("no file", lambda folder, state: (folder / F).unlink())
case("file of 0 ranks", renamed("rank-0-of-0.safetensors"))
case("file of two ranks", renamed("rank-0-of-2.safetensors"))
case("file of many", renamed("rank-0-of-99999.safetensors"))
def twice(folder, state):
    shutil.copy(folder / F, folder / S / "rank-0-of-2.safetensors")
case("two first files", twice)
case("cut", cut)
case("pickle", lambda folder, state: torch.save(state, folder / F))
case("nan", parameter(lambda p: p * float("nan")))
case("inf", parameter(lambda p: p + float("inf")))
case("complex", parameter(lambda p: p.to(torch.complex64)))
case("int8", parameter(lambda p: p.to(torch.int8)))
case("float64", parameter(lambda p: p.double()))
case("of another shape", parameter(lambda p: p[:1]))
case("parameter lacks", lambda folder, state: bool(state.pop(first(state, "parameter")) is not None))
case("more parameters", lambda folder, state: state.update({"parameter.x": torch.zeros(2)}) is None)
case("exp_avg nan", tensors("exp_avg", lambda t: t * float("nan")))
case("exp_avg_sq below 0", tensors("exp_avg_sq", lambda t: t - 1))
case("exp_avg lacks", lambda folder, state: bool(state.pop(first(state, "exp_avg")) is not None))
def more_averages(folder, state):
    state["max_" + first(state, "exp_avg")] = torch.zeros(3)
    return True
case("more averages", more_averages)
case("averages of another shape", tensors("exp_avg", lambda t: t.T.contiguous()))
case("averages' step nan", tensors("step", lambda t: t * float("nan")))
case("averages' step below 0", tensors("step", lambda t: t - 10))
case("averages' steps", tensors("step", lambda t: torch.ones(5)))
case("rng lacks", lambda folder, state: bool(state.pop("rng") is not None))
case("rng short", lambda folder, state: state.update(rng=torch.zeros(3, dtype=torch.uint8)) is None)
case("rng float", lambda folder, state: state.update(rng=torch.zeros(5056)) is None)
case("rng zeros", lambda folder, state: state.update(rng=torch.zeros(5056, dtype=torch.uint8)) is None)
case("rng that reads past its words", lambda folder, state: rng(8, b"\\x70\\2\\0\\0")(folder, state)
     and rng(16, b"\\x70\\2\\0\\0\\0\\0\\0\\0")(folder, state))
def ranks(value):
    def do(folder, state):
        asked = json.loads((folder / "run.json").read_text())
        (folder / "run.json").write_text(json.dumps({**asked, "ranks": value}))
    return do
for value in (0, -1, 10**9, 1.0, True, None, "1"):
    case(f"ranks {value!r}", ranks(value))
""")
    assert len(found) == 46 and found.pop("genuine")[0] == 0
    for name, (code, err, _) in found.items():
        where = "run.json" if name.startswith("ranks") else "state-1"
        assert code == 1 and where in err, (name, err)
        assert "unexpected" not in err and "Traceback" not in err, (name, err)
        assert len(err) < 1000, (name, err)


def test_conversations_that_would_take_days() -> None:
    """Their turns are written one by one, and all their words tokenized."""
    ended = confined(
        """
import json, pathlib, sys, tempfile, time
from mllama import MllamaProcessor
from mllama.demo import checkpoint_path
from mllama.training.encoding import read_examples
processor = MllamaProcessor.from_pretrained(checkpoint_path())
path = pathlib.Path(tempfile.mkdtemp()) / "data.jsonl"
user, assistant = ({"role": role, "content": "a"} for role in ("user", "assistant"))
image = {"type": "image", "path": "absent.png"}
def case(name, messages, limit=131_072):
    path.write_text(json.dumps({"messages": messages}) + "\\n")
    start = time.process_time()
    try:
        said = str(len(read_examples(path, processor, limit)[0].input_ids))
    except ValueError as error:
        said = str(error)
    print(json.dumps([name, said[:2000], len(said), time.process_time() - start]), flush=True)
case("genuine", [user, assistant] * 40)
case("turns", [user, assistant] * 40_000)
case("long turns", [{**user, "content": "a" * 3_000_000}, assistant] + [user, assistant] * 300)
case("words", [{**user, "content": "a " * 1_500_000}, assistant], 2048)
case("parts", [{"role": "user", "content": [{"type": "text", "text": "a"}] * 100_000}, assistant], 2048)
case("images", [{"role": "user", "content": [image] * 90_000}, assistant], 2048)
""",
        seconds=120,
    )
    assert ended.kind == "ok" and ended.peak < 900, (ended.kind, ended.peak, ended.err[-2000:])
    found = {x[0]: x[1:] for x in map(json.loads, ended.out.splitlines())}
    assert int(found.pop("genuine")[0]) > 80
    assert "40000 turns of the assistant in 80000 messages; at most 1000" in found["turns"][0]
    assert "301 turns of the assistant" in found["long turns"][0]
    assert "3000001 characters, which are more than the 2048 tokens" in found["words"][0]
    for name, (said, length, seconds) in found.items():
        assert "line 1: " in said and length < 3000 and seconds < 10, (name, said[:300], seconds)
