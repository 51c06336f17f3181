"""Dependencies run one way, and what one op needs is where the tree says it is."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import mllama_kernels
from mllama_kernels import _library, reference

ROOT = Path(__file__).parents[1]
CORE = {"torch", "safetensors", "tokenizers", "PIL", "numpy", "jinja2"}


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
        drop_in = {"transformers"} if path.parent.name == "transformers" else set()
        assert others <= CORE | {"mllama", "mllama_kernels"} | drop_in, path


def test_only_the_drop_in_package_needs_transformers():
    import subprocess
    import sys

    script = "import mllama, mllama_kernels, sys; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


def test_only_the_bindings_include_torch():
    for path in (ROOT / "csrc").rglob("*"):
        if path.is_file() and path.parent.name != "bindings":
            assert not re.search(r"#include <(torch|ATen|c10|Python)", path.read_text()), path


def test_cpu_sources_include_no_cuda():
    for path in [*(ROOT / "csrc").glob("*.h"), *(ROOT / "csrc" / "cpu").iterdir()]:
        assert not re.search(r"#include [<\"].*cuda", path.read_text()), path


def test_one_file_launches_and_one_reads_strides():
    """A launch asks what the device allows; a stride of a dimension of one element means nothing."""
    for path in (ROOT / "csrc").rglob("*"):
        text = path.read_text() if path.is_file() else ""
        assert "<<<" not in text, path
        assert path.name == "launch.h" or "cudaLaunchKernel" not in text, path
        assert path.name == "launch.cu" or "cudaFuncSetAttribute" not in text, path
        assert path.name == "error_text.cu" or "cudaGetLastError()" not in text, path
        assert path.name == "strides.h" or not re.search(r"[.>]stride\(", text), path


@pytest.mark.parametrize("name", _library.OPS)
def test_one_word_names_an_op_everywhere(name):
    word = {"add_rms_norm": "rms_norm", "rotary_attention_cached": "rotary_attention"}.get(
        name, name
    )
    for place in (
        f"csrc/{word}.h",
        f"csrc/cpu/{word}.cpp",
        f"csrc/cuda/{word}.cu",
        f"mllama_kernels/{word}.py",
        f"tests/test_{word}.py",
    ):
        assert (ROOT / place).is_file(), place
    assert getattr(mllama_kernels, name).__doc__ and getattr(reference, name).__doc__
    assert name in mllama_kernels.__all__ and name in reference.__all__
    assert f"`{name}`" in (ROOT / "README.md").read_text()


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
