"""Adapters that somebody else made: nothing in their configuration hangs, allocates or runs anything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("peft")

from confinement import confined
from test_lora import logits
from test_lora_names import Case

from mllama.training.adapter_selection import answer
from mllama.training.adapters import use_adapter

_SETUP = """
import json, os, pathlib, shutil, struct, sys, tempfile, time, warnings
warnings.simplefilter("ignore")
import torch
from safetensors.torch import load_file, save_file
from mllama.training.adapters import use_adapter
from mllama import MllamaForConditionalGeneration as Model
from mllama.demo import checkpoint_path
import peft
model = Model.from_pretrained(checkpoint_path(), dtype="float32", device="cpu", backend="reference")
clean = {name: x.clone() for name, x in model.state_dict().items()}
SOURCE = pathlib.Path(tempfile.mkdtemp())
import copy
config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
peft.get_peft_model(copy.deepcopy(model), config).save_pretrained(SOURCE)
raw = json.loads((SOURCE / "adapter_config.json").read_text())
tensors = load_file(SOURCE / "adapter_model.safetensors")
FOLDER = pathlib.Path(tempfile.mkdtemp())
def attempt(name):
    start = time.process_time()
    try:
        use_adapter(model, FOLDER)
        kind, text = "", ""
    except BaseException as error:
        kind, text = "/".join(k.__name__ for k in type(error).__mro__), str(error)
    now = model.state_dict()
    same = now.keys() == clean.keys() and all(clean[n].equal(x) for n, x in now.items())
    seconds = time.process_time() - start
    print(json.dumps([name, kind, text[:3000], len(text), seconds, same]), flush=True)
def case(name, changed_tensors=None, **changes):
    for file in FOLDER.iterdir():
        file.unlink()
    entries = {**raw, **changes}
    entries = {name: value for name, value in entries.items() if value is not ...}
    (FOLDER / "adapter_config.json").write_text(json.dumps(entries))
    save_file(tensors if changed_tensors is None else changed_tensors, FOLDER / "adapter_model.safetensors")
    attempt(name)
"""


def _refused(code: str, count: int, *, seconds: float = 100, longest: float = 4) -> dict[str, str]:
    """Every case is a ValueError in few words, soon, and leaves the model as it was."""
    ended = confined(_SETUP + code, seconds=seconds, mebibytes=6000)
    assert ended.kind == "ok", (ended.kind, ended.out[-1500:], ended.err[-3000:])
    assert ended.peak < 1100, ended.peak
    found = [json.loads(line) for line in ended.out.splitlines() if line.startswith("[")]
    assert len(found) == count, [line[0] for line in found]
    for name, kind, text, length, took, same in found:
        assert "ValueError" in kind or "FileNotFoundError" in kind, (name, kind, text)
        assert length < 3000 and took < longest and same, (name, text, length, took, same)
    return {line[0]: line[2] for line in found}


def test_patterns_that_take_years() -> None:
    said = _refused(
        """
slow = r"(\\w+\\.?)+\\w*!"
case("target", target_modules=slow)
case("exclude", exclude_modules=slow)
case("rank", rank_pattern={slow: 2})
case("alpha", alpha_pattern={slow: 2})
case("layers", layers_to_transform=[1], layers_pattern=[slow])
case("memory", target_modules="(" * 90 + "a{0,65000}" * 300 + ")" * 90)
""",
        6,
        longest=30,
    )
    assert "took more than" in said["target"], said


def test_values_that_cannot_be() -> None:
    said = _refused(
        """
nan, big = float("nan"), 10**400
for name, values in {
    "r": (10**7, 0, -1, big, 1.5, "4", True, nan, None, [4]), "lora_alpha": (nan, big, -1, "x", [1], True),
    "target_modules": (..., None, 5, {}, [[1]], ["q_proj"] * 10**5, "x" * 10**6, [], ""),
    "rank_pattern": ({"q_proj": 10**7}, {"q_proj": "x"}, ["q_proj"], {"x" * 10**5: 4},
                     {f"x{i}": 4 for i in range(10**5)}, {"(": 4}, {"q_proj": 2}, {"never": 4}),
    "alpha_pattern": ({"q_proj": nan}, {"q_proj": None}, 5, {"[": 4.0}, {"never": 4}),
    "layers_to_transform": (list(range(10**6)), [-1], "x", [1.5], [[1]], [0]),
    "layers_pattern": (5, ["x" * 10**5], [5], ["x"] * 10**4),
    "modules_to_save": (["(a+)+$"], ["lm_head"], [5], "lm_head", ["x"] * 10**5, [""]),
    "lora_dropout": (nan, 2, -1, "x"), "bias": ("some", 5, ["none"]), "use_dora": ("yes", 1, True),
    "use_rslora": ([], "x"), "fan_in_fan_out": ("x",),
    "init_lora_weights": ("eva", "loftq", 5, "pissa_niter_999"),
    "layer_replication": ([[0, 10**6]], [[0, 2], [1, 3]]), "megatron_config": ({"a": 1},),
    "trainable_token_indices": ([10**7], list(range(10**6)), {"a": [1]}, [1, 2]),
    "target_parameters": (["x"],), "loftq_config": ({"loftq_bits": 4},), "eva_config": ({"rho": 2},),
    "alora_invocation_tokens": ([1, 2],), "use_qalora": (True,), "arrow_config": ({"top_k": 3},),
    "an_option_of_tomorrow": (True, {"nested": {"nested": {}}}), "peft_type": ("IA3", 5, None, ["LORA"], ...),
    "exclude_modules": ("q_proj" * 10**5, ["q_proj"], 5),
}.items():
    for i, value in enumerate(values):
        case(f"{name} {i}", **{name: value})
""",
        94,
        seconds=240,
    )
    for case, text in said.items():
        name = case.split()[0]
        by_file = (
            "lacks",
            "no place",
            "rank",
            "does not fit",
            "cannot be read",
            "LORA is supported",
        )
        assert name in text or any(words in text for words in by_file), (case, text)


def test_files_that_lie() -> None:
    said = _refused(
        """
key = next(iter(tensors))
wide = {n: torch.zeros((9, x.shape[1]) if "lora_A" in n else (x.shape[0], 9)) for n, x in tensors.items()}
case("another rank", wide)
case("ranks that differ", {n: wide[n] if "layers.0." in n else x for n, x in tensors.items()})
case("half", {n: x for n, x in tensors.items() if "lora_A" in n})
case("shape", {**tensors, key: torch.zeros(4, 3)})
case("empty tensor", {**tensors, key: torch.zeros(0, 128)})
case("scalar", {**tensors, key: torch.tensor(1.0)})
case("integers", {**tensors, key: tensors[key].to(torch.int32)})
case("elsewhere", {**tensors, "base_model.model.odd.lora_A.weight": torch.zeros(4, 3)})
case("a norm", {**tensors, "base_model.model.model.language_model.norm.weight": torch.zeros(128)})
case("none", {})
older = key.replace("model.language_model.", "language_model.model.", 1)
case("two names", {**tensors, older: 100 * tensors[key]})
case("without a prefix too", {**tensors, key.removeprefix("base_model.model."): 100 * tensors[key]})
def damaged(name, data):
    case_folder = FOLDER / "adapter_model.safetensors"
    case_folder.write_bytes(data)
    attempt(name)
whole = (FOLDER / "adapter_model.safetensors")
save_file(tensors, whole)
data = whole.read_bytes()
damaged("cut", data[:-1])
damaged("long", data + b"x")
damaged("no header", b"")
damaged("huge header", struct.pack("<Q", 2**62) + data)
huge = json.dumps({key: {"dtype": "F32", "shape": [10**7, 10**7], "data_offsets": [0, 4 * 10**14]}}).encode()
damaged("sizes without data", struct.pack("<Q", len(huge)) + huge)
many = ",".join('"%07d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % i for i in range(300_000))
many = ("{" + many + "}").encode()
damaged("many", struct.pack("<Q", len(many)) + many)
whole.unlink()
os.mkfifo(whole)
attempt("pipe")
whole.unlink()
os.symlink("/dev/zero", whole)
attempt("zero")
whole.unlink()
save_file(tensors, whole)
config = FOLDER / "adapter_config.json"
for name, text in {"nested": "[" * 10**5, "list": "[]", "twice": '{"peft_type": "LORA", "peft_type": "LORA"}',
                   "long": '{"a": "' + "x" * 10**7 + '"}', "empty": ""}.items():
    config.write_text(text)
    attempt("config " + name)
config.unlink()
os.mkfifo(config)
attempt("config pipe")
""",
        26,
    )
    assert "is there a second time" in said["two names"]
    assert "is there a second time" in said["without a prefix too"]
    assert "has rank 9 in the file and 4 in the configuration" in said["another rank"]
    assert "size mismatch" in said["shape"]


def test_no_code_is_imported_and_nothing_is_fetched() -> None:
    ended = confined(
        _SETUP
        + """
import builtins, importlib, socket
(FOLDER / "planted.py").write_text("raise SystemExit(9)")
sys.path.insert(0, str(FOLDER))
tries = []
def refuse(*args, **kwargs):
    tries.append(args)
    raise OSError("no network here")
socket.socket.connect = refuse
socket.create_connection = refuse
socket.getaddrinfo = refuse
case("code", megatron_core="planted", base_model_name_or_path="somebody/some-model",
     auto_mapping={"parent_library": "planted", "base_model_class": "x"}, revision="main")
assert "planted" not in sys.modules and not tries, tries
""",
        seconds=60,
        mebibytes=6000,
    )
    assert ended.kind == "ok", ended.err[-2000:]
    assert json.loads(ended.out.splitlines()[-1])[1] == "", ended.out


OPTIONS: list[dict[str, Any]] = [
    {"bias": "all", "target_modules": ["fc1", "q_proj"]},
    {"bias": "lora_only", "target_modules": ["fc1", "q_proj"]},
    {"target_modules": ["embed_tokens", "patch_embedding"]},
    {"target_modules": ["lm_head"]},
    {"target_modules": "all-linear"},
    {"target_modules": r".*language_model.*\.(q_proj|down_proj)"},
    {"exclude_modules": r".*vision.*"},
    {"layers_to_transform": [1], "layers_pattern": "layers"},
    {"use_rslora": True, "rank_pattern": {"q_proj": 2, r".*layers\.1.*down_proj": 3}}
    | {"alpha_pattern": {"q_.*": 5, "k_proj": 1}},
    {"modules_to_save": ["lm_head", "multi_modal_projector"]},
    {"trainable_token_indices": [1, 2]},
    {"init_lora_weights": "olora"},
    {"lora_bias": True, "target_modules": ["fc1"]},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o))
def test_what_peft_can_do_is_merged_as_ever(options: dict[str, Any], tmp_path: Path) -> None:
    case = Case(tmp_path, **options)
    model = case.ours()
    use_adapter(model, tmp_path)
    found, expected = logits(model, case.batch), case.expected
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


def test_selection_is_pefts() -> None:
    """The job that tries patterns decides as the function of PEFT does."""
    import peft
    from peft.tuners.tuners_utils import check_target_module_exists

    names = ["", "lm_head", "model.lm_head", "layers.0.q_proj", "x.layers.10.mlp.q_proj.extra"]
    names += [
        f"model.{t}.layers.{i}.{m}"
        for t in ("a", "b")
        for i in (0, 1, 11)
        for m in ("q_proj", "mlp.up")
    ]
    for options in (
        {"target_modules": ["q_proj"]},
        {"target_modules": ["mlp.up", "lm_head"]},
        {"target_modules": r".*\.a\..*(q_proj|up)"},
        {"target_modules": ["q_proj", "up"], "layers_to_transform": [1, 11]},
        {"target_modules": ["q_proj", "up"], "layers_to_transform": 0, "layers_pattern": "layers"},
        {
            "target_modules": ["q_proj"],
            "layers_to_transform": [0],
            "layers_pattern": ["no", "a.layers"],
        },
        {"target_modules": ["q_proj", "up"], "exclude_modules": r".*b.*"},
        {"target_modules": ["q_proj", "up"], "exclude_modules": ["model.a.layers.0.q_proj", "up"]},
        {"target_modules": ["model.a.layers.0.q_proj"], "layers_to_transform": [1]},
    ):
        config = peft.LoraConfig(**options)
        wanted = [
            place
            for place, name in enumerate(names)
            if (found := check_target_module_exists(config, name))
            and type(found).__name__ != "_ExcludedModule"
        ]
        layers, patterns = options.get("layers_to_transform"), options.get("layers_pattern")
        request = {
            "names": names,
            "adapted": [],
            "exclude_modules": options.get("exclude_modules"),
            "target_modules": options["target_modules"],
            "layers_to_transform": [layers] if isinstance(layers, int) else layers,
            "layers_pattern": [patterns] if isinstance(patterns, str) else patterns,
            "rank_pattern": [],
            "alpha_pattern": [],
        }
        assert answer(request)[0]["selected"] == wanted, options
