"""Compiles host-side C++ of the kernels as a Python module."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

TESTS = Path(__file__).parent


def build(name: str, folder: Path, *flags: str) -> ModuleType:
    """The module that tests/<name>.cpp defines, built into `folder`."""
    import pybind11

    output = folder / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    command = [os.environ.get("CXX", "c++"), "-std=c++20", "-O1", "-shared", "-fPIC", *includes]
    subprocess.run([*command, *flags, str(TESTS / f"{name}.cpp"), "-o", str(output)], check=True)
    spec = importlib.util.spec_from_file_location(name, output)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
