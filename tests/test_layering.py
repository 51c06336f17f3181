"""Dependencies run one way, and what one op needs is where the tree says it is."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import mllama
import mllama_kernels
from mllama_kernels import _library, reference

ROOT = Path(__file__).parents[1]
CORE = {"torch", "safetensors", "tokenizers", "PIL", "numpy", "jinja2", "tqdm"}
EXTRAS = {  # by folder: what is installed by an extra, for those who import that folder
    "transformers": {"transformers"},
    "training": {"transformers"},
    "grammar": {"llguidance"},
    "server": {
        *{"fastapi", "starlette", "pydantic", "typing_extensions"},
        *{"uvicorn", "h11", "prometheus_client", "httpx2"},
    },
}


def sources(folder: str) -> list[Path]:
    return [path for path in (ROOT / "csrc" / folder).rglob("*.*") if path.is_file()]


def imports_of(path: Path, top_level_only: bool) -> set[str]:
    """The packages a Python file imports, without those under TYPE_CHECKING or inside functions."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(str(node.module).split(".")[0])
    return found


def test_kernels_know_nothing_of_models():
    for path in (ROOT / "mllama_kernels").rglob("*.py"):
        assert "mllama" not in imports_of(path, top_level_only=False), path


def test_only_core_dependencies_are_imported_at_the_top():
    import sys

    for path in [*(ROOT / "mllama").rglob("*.py"), *(ROOT / "mllama_kernels").rglob("*.py")]:
        others = imports_of(path, top_level_only=True) - set(sys.stdlib_module_names)
        extra = EXTRAS.get(path.parent.name, set())
        assert others <= CORE | {"mllama", "mllama_kernels"} | extra, path


@pytest.mark.parametrize(
    ("path", "needs"),
    [
        ("confined.py", set()),
        ("confined_worker.py", set()),
        ("processing/template_job.py", {"jinja2"}),
        ("processing/tokenizer_job.py", {"tokenizers"}),
        ("grammar/compile_job.py", {"llguidance"}),
    ],
)
def test_what_runs_in_a_process_of_its_own_imports_little(path, needs):
    import sys

    found = imports_of(ROOT / "mllama" / path, top_level_only=False)
    assert found - set(sys.stdlib_module_names) == needs


def test_only_the_drop_in_package_needs_transformers():
    import subprocess
    import sys

    script = "import mllama, mllama_kernels, sys; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


@pytest.mark.parametrize(
    ("folder", "above"),
    [
        ("engine", {"server", "commands", "grammar"}),
        ("generation", {"server", "commands", "grammar"}),
        ("grammar", {"server", "commands", "engine"}),
        ("server", {"commands"}),
    ],
)
def test_the_engine_knows_nothing_of_who_asks_it(folder, above):
    for path in (ROOT / "mllama" / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            module = str(getattr(node, "module", ""))
            assert module.removeprefix("mllama.").split(".")[0] not in above, (path, module)


def test_the_scheduler_needs_no_torch():
    """A plan is plain data, for processes that hold no model as well."""
    import subprocess
    import sys

    script = "import mllama.engine.scheduler, sys; assert not {'torch', 'numpy'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


def test_only_the_bindings_include_torch():
    for path in (ROOT / "csrc").rglob("*"):
        if path.is_file() and path.parent.name != "bindings":
            assert not re.search(r"#include <(torch|ATen|c10|Python)", path.read_text()), path


def test_cpu_sources_include_no_cuda():
    for path in [*(ROOT / "csrc").glob("*.h"), *sources("cpu")]:
        assert not re.search(r"#include [<\"].*cuda", path.read_text()), path


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_an_op_includes_what_ops_share_and_that_common(device):
    """Never up, and never another op, whose folder (on the CPU: files) stands beside; likewise few_rows."""
    height = {"common": 0, "attention": 1, "few_rows": 1}
    for path in sources(device):
        for name in re.findall(r'#include "(.*)"', path.read_text()):
            target = (path.parent / name).resolve()
            assert target.is_file(), (path, name)
            above = height.get(path.parent.name, 2)
            if target.parent == ROOT / "csrc":  # an op's parameters are for the op
                assert above == 2 or target.stem in ("common", "build_info"), (path, name)
            elif target.parent != path.parent:
                assert height.get(target.parent.name, 2) < above, (path, name)


def test_one_file_launches_and_one_reads_strides():
    """A launch asks what the device allows; a stride of a dimension of one element means nothing."""
    for path in (ROOT / "csrc").rglob("*"):
        text = path.read_text() if path.is_file() else ""
        assert "<<<" not in text, path
        assert path.name == "launch.h" or "cudaLaunchKernel" not in text, path
        assert path.name == "launch.cu" or "cudaFuncSetAttribute" not in text, path
        assert path.name == "error_text.cu" or "cudaGetLastError()" not in text, path
        assert path.name == "strides.h" or not re.search(r"[.>]stride\(", text), path


def test_a_kernel_without_code_for_an_architecture_traps():
    """Launched there by mistake it must not end in silence, with whatever its results held."""
    kernels = 0
    for path in sources("cuda"):
        text = path.read_text()
        assert "kCompiles) return;" not in text, path
        for start in re.finditer(r"\n__global__", text):
            body = text[start.start() : text.index("\n}\n", start.start())]
            if "{\n#ifdef MLLAMA_SM90A_DEVICE\n" in body:
                assert body.endswith("\n#else\n  __trap();\n#endif"), path
                kernels += 1
    assert kernels >= 7


@pytest.mark.parametrize("name", _library.OPS)
def test_one_word_names_an_op_everywhere(name):
    word = {
        "add_rms_norm": "rms_norm",
        "quantized_rows": "quantized_linear",
        "rotary_attention_cached": "rotary_attention",
    }.get(name, name)
    for place in (
        f"csrc/{word}.h",
        f"csrc/bindings/{word}.cpp",
        f"csrc/cpu/{word}.cpp",
        f"csrc/cuda/{word}/{word}.cu",
        f"mllama_kernels/{word}.py",
        f"tests/test_{word}.py",
    ):
        assert (ROOT / place).is_file(), place
    assert getattr(mllama_kernels, name).__doc__ and getattr(reference, name).__doc__
    assert name in mllama_kernels.__all__ and name in reference.__all__
    for page in ("README.md", "docs/ops.md"):
        assert f"| `{name}` |" in (ROOT / page).read_text(), page


@pytest.mark.parametrize("name", _library.OPS)
def test_reference_has_the_same_signature(name):
    import inspect

    ours = inspect.signature(getattr(mllama_kernels, name))
    assert ours == inspect.signature(getattr(reference, name))


def test_files_stay_small():
    for folder in ("mllama", "mllama_kernels", "csrc"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in {".py", ".cu", ".cuh", ".h", ".cpp"}:
                assert len(path.read_text().splitlines()) <= 450, path


def test_type_checkers_see_the_public_names_where_they_are_imported_from():
    """The one list of them at run time, and the imports that only a type checker reads."""
    tree = ast.parse((ROOT / "mllama" / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {(a.name, a.asname, node.module) for node in block.body for a in node.names}
    assert seen == {(name, name, module) for name, module in mllama._MODULES.items()}
    assert set(dir(mllama)) == set(mllama.__all__) == {name for name, _, _ in seen}
    for name, _, module in seen:
        assert getattr(mllama, name).__module__ == module
