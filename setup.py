"""Builds mllama_kernels/_C.abi3.so: the CPU kernels and, where nvcc is found, the CUDA kernels.

Environment: MAX_JOBS, NVCC_THREADS, TORCH_CUDA_ARCH_LIST, CUDA_HOME, MLLAMA_KERNELS_CUDA=auto|1|0,
MLLAMA_KERNELS_SIMULATE=1 (embed PTX and run the CUDA kernels on CPU tensors), CXX,
MLLAMA_KERNELS_SANITIZE=1|generic|avx2|avx512 (the CPU kernels of this machine's or that instruction set
only, with g++'s address and undefined-behaviour sanitizers; tests/run_fuzz.sh shows how to load it).
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
TORCH_TARGET = "0x020b000000000000"  # 2.11, the oldest torch the library runs on
MIN_TORCH, MIN_CUDA = (2, 11), (12, 8)
X86 = platform.machine() in ("x86_64", "AMD64")
# The CPU kernels are compiled once per instruction set; csrc/cpu/dispatch.cpp picks one at run time.
ANY_ISA = ("dispatch.cpp", "machine.cpp", "shared_memory.cpp")
# Ops that give the same bits on every instruction set and device: a product and a sum are rounded apart.
SAME_BITS = ("quantize", "sample")
ISA_FLAGS = {"generic": ""}
if X86:
    ISA_FLAGS["avx2"] = "-mavx2 -mfma -mf16c"
    ISA_FLAGS["avx512"] = (
        "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512bf16 -mavx512vnni -mfma -mf16c"
        " -mamx-tile -mamx-bf16 -mamx-int8"
    )


def version(text: str) -> tuple[int, int]:
    major, minor = re.findall(r"\d+", text)[:2]
    return int(major), int(minor)


def fail(found: str, needed: str, remedy: str) -> None:
    sys.exit(
        f"\nmllama-kernels cannot be built.\n  found:  {found}\n  needed: {needed}\n  remedy: {remedy}\n"
    )


def find_torch():
    try:
        import torch
    except ImportError:
        fail(
            "no torch",
            "torch >= 2.11 to compile against",
            "pip install torch, or drop --no-build-isolation",
        )
    if version(torch.__version__) < MIN_TORCH:
        fail(f"torch {torch.__version__}", "torch >= 2.11", "pip install -U torch")
    return torch


def find_tool(name: str, remedy: str) -> str:
    path = shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
    if path is None:
        fail(f"no {name} on PATH", name, remedy)
    return path


def find_cuda(torch) -> tuple[Path, str] | None:
    """(CUDA home, nvcc version), or None for a CPU-only build."""
    wanted = os.environ.get("MLLAMA_KERNELS_CUDA", "auto")
    if wanted not in ("auto", "1", "0"):
        fail(f"MLLAMA_KERNELS_CUDA={wanted}", "auto, 1 or 0", "unset it")
    if wanted == "0":
        return None
    nvcc = shutil.which("nvcc")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home is None and Path("/usr/local/cuda/bin/nvcc").exists():
        home = "/usr/local/cuda"
    if home is None and nvcc:
        home = str(Path(nvcc).resolve().parents[1])
    missing = "no nvcc (CUDA_HOME and PATH)"
    if home:
        have_nvcc = (Path(home) / "bin" / "nvcc").exists()
        have_headers = (Path(home) / "include" / "cuda_runtime.h").exists()
        if have_nvcc and have_headers:
            return check_cuda(torch, Path(home))
        missing = (
            f"CUDA_HOME={home} without {'include/cuda_runtime.h' if have_nvcc else 'bin/nvcc'}"
        )
    if wanted == "1" or os.environ.get("CUDA_HOME"):
        fail(
            missing, "nvcc and its headers, CUDA >= 12.8", "set CUDA_HOME, or MLLAMA_KERNELS_CUDA=0"
        )
    print(f"mllama-kernels: {missing}; building the CPU kernels only", file=sys.stderr)
    return None


def check_cuda(torch, home: Path) -> tuple[Path, str]:
    text = subprocess.run(
        [home / "bin" / "nvcc", "--version"], capture_output=True, text=True, check=True
    )
    found = re.search(r"release ([\d.]+)", text.stdout).group(1)
    remedy = (
        "point CUDA_HOME at a fitting toolkit, or set MLLAMA_KERNELS_CUDA=0 for the CPU kernels"
    )
    if version(found) < MIN_CUDA:
        fail(f"nvcc {found} in {home}", "CUDA >= 12.8", remedy)
    if torch.version.cuda and version(torch.version.cuda)[0] != version(found)[0]:
        major = version(torch.version.cuda)[0]
        fail(f"nvcc {found}, torch for CUDA {torch.version.cuda}", f"nvcc of CUDA {major}", remedy)
    return home, found


def gencode(torch) -> tuple[str, str]:
    """nvcc's flags and a name for what they produce."""
    names = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    if not names and os.environ.get("MLLAMA_KERNELS_SIMULATE") == "1":
        # Lines of the sources in the simulator's reports; in a binary they are two thirds of the size.
        names = ("compute_80", "compute_90a")
        flags = " ".join(f"-gencode arch={name},code={name}" for name in names)
        return f"{flags} --no-compress -lineinfo", "/".join(names)
    if not names and torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        names = [f"{major}.{minor}{'a' if major == 9 else ''}"]
    codes = []
    for name in names or ["8.0+PTX", "9.0a"]:
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", name)
        if match is None or int(match[1]) < 8:
            fail(
                f"TORCH_CUDA_ARCH_LIST={name}",
                "8.0 or newer, as in '8.0;9.0a'",
                "correct or unset it",
            )
        arch = match[1] + match[2] + match[3]
        codes.append((arch, f"sm_{arch}"))
        if match[4]:
            codes.append((arch, f"compute_{arch}"))
    flags = " ".join(f"-gencode arch=compute_{arch},code={code}" for arch, code in codes)
    return flags, "/".join(code for _, code in codes)


def jobs() -> int:
    if os.environ.get("MAX_JOBS"):
        return int(os.environ["MAX_JOBS"])
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    pages = os.sysconf("SC_AVPHYS_PAGES") if sys.platform == "linux" else 1 << 20
    gigabytes = pages * os.sysconf("SC_PAGE_SIZE") / 2**30
    return max(1, min(cpus, int(gigabytes / 2)))  # one nvcc holds up to 2 GB


def sanitized_isa(cxx: str) -> str | None:
    """The one instruction set of a build with sanitizers; None for an ordinary build."""
    wanted = os.environ.get("MLLAMA_KERNELS_SANITIZE", "0")
    if wanted == "0":
        return None
    for name in ("MLLAMA_KERNELS_CUDA", "MLLAMA_KERNELS_SIMULATE"):
        if os.environ.get(name) == "1":
            fail(
                f"MLLAMA_KERNELS_SANITIZE={wanted} with {name}=1",
                "one of them; sanitizers see only the CPU kernels",
                f"unset {name}",
            )
    if wanted in ISA_FLAGS:
        return wanted
    if wanted != "1":
        fail(f"MLLAMA_KERNELS_SANITIZE={wanted}", f"0, 1, {' or '.join(ISA_FLAGS)}", "unset it")
    if not X86:
        return "generic"
    native = [*shlex.split(cxx), "-march=native", "-dM", "-E", "-x", "c", os.devnull]
    found = subprocess.run(native, capture_output=True, text=True, check=True).stdout
    # The names of the compiler's macros for what dispatch.cpp asks of the machine.
    if all(f"__AVX512{part}__ " in found for part in ("F", "BW", "VL", "DQ", "BF16", "VNNI")):
        return "avx512"
    return "avx2" if all(f"__{part}__ " in found for part in ("AVX2", "FMA", "F16C")) else "generic"


def slowest_first(sources: Iterable[Path]) -> list[Path]:
    """Roughly: by the bytes of a source and of the headers of ours that it includes. Most of a kernel stands
    in headers, and ninja starts what it knows no times of in the order that it is given."""

    def size(source: Path) -> int:
        seen, left = {source}, [source]
        while left:
            path = left.pop()
            names = re.findall(r'#include "(.*)"', path.read_text())
            headers = {(path.parent / name).resolve() for name in names} - seen
            seen |= headers
            left += headers
        return sum(path.stat().st_size for path in seen)

    return sorted(sources, key=lambda source: (-size(source), source))


def ninja_file(build: Path, output: Path) -> str:
    torch = find_torch()
    from torch.utils import cpp_extension

    cxx = os.environ.get("CXX") or find_tool("c++", "install a C++20 compiler, such as g++ >= 11")
    only = sanitized_isa(cxx)
    cuda = None if only else find_cuda(torch)
    simulate = os.environ.get("MLLAMA_KERNELS_SIMULATE") == "1"
    if simulate and cuda is None:
        fail("MLLAMA_KERNELS_SIMULATE=1 without CUDA", "nvcc and its headers", "set CUDA_HOME")
    includes = " ".join(f"-isystem {shlex.quote(p)}" for p in cpp_extension.include_paths())
    sanitizers = "-fsanitize=address,undefined -fno-sanitize-recover=all"
    # Aligned: by where the linker happened to put it, a loop took up to a quarter longer.
    speed = "-O3 -falign-functions=64 -DNDEBUG"
    if only:
        speed = f"-O1 -g1 -fno-omit-frame-pointer {sanitizers}"
    common = (
        f"{speed} -std=c++20 -fPIC -fvisibility=hidden -Wall -Wno-psabi -Wno-maybe-uninitialized"
    )
    defines = "-DMLLAMA_X86=1" if X86 else ""
    defines += f" -DMLLAMA_ONLY_ISA={only}" if only else ""
    isa_flags = {only: ISA_FLAGS[only]} if only else ISA_FLAGS
    link = (
        f"-L{shlex.quote(cpp_extension.library_paths()[0])} -Wl,--no-as-needed -ltorch -ltorch_cpu"
    )
    link += f" {sanitizers}" if only else ""
    # Only the host's side knows what it is linked to, so that builds with CUDA, without, and simulated ones
    # share the kernels' objects.
    host, variant = "", ""
    if cuda:
        home, found = cuda
        flags, name = gencode(torch)
        variant = "simulated" if simulate else "cuda"
        host = f"-DMLLAMA_WITH_CUDA -DUSE_CUDA -DMLLAMA_CUDA_VERSION={found} -DMLLAMA_CUDA_ARCHS={name}"
        host += " -DMLLAMA_SIMULATE" if simulate else ""
        sm90a = "-DMLLAMA_SM90A" if "90a" in name else ""
        runtime = "-lcudart" if simulate else "-lcudart_static -ldl -lrt -lpthread"
        lib = next((p for p in (home / "lib64", home / "lib") if p.exists()), home / "lib64")
        link += f" -L{shlex.quote(str(lib))} {runtime}"
        nvcc = f"{shlex.quote(str(home / 'bin' / 'nvcc'))} -O3 -std=c++20 {flags} {sm90a}"
        nvcc += " --expt-relaxed-constexpr"  # headers of csrc/ know no __device__
        nvcc += f" --threads {os.environ.get('NVCC_THREADS', '1')} -ccbin {shlex.quote(cxx)}"
        nvcc += " -Xcompiler -fPIC,-fvisibility=hidden"
    lines = [
        "rule cxx",
        f"  command = {cxx} {common} {defines} $flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d\n  deps = gcc\n  description = c++ $in $isa",
        "rule nvcc",
        f"  command = {nvcc if cuda else 'false'} $flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d\n  deps = gcc\n  description = nvcc $in",
        "rule link",
        f"  command = {cxx} -shared -o $out $in {link}\n  description = link $out",
    ]
    objects = []

    def add(rule: str, source: Path, flags: str = "", isa: str = "") -> None:
        objects.append(f"{source.relative_to(ROOT / 'csrc')}.{isa}.o")
        lines.append(f"build {objects[-1]}: {rule} {str(source).replace(' ', '$ ')}")
        lines.append(f"  flags = {flags}\n  isa = {isa}")

    csrc = ROOT / "csrc"
    if cuda:
        for source in slowest_first((csrc / "cuda").rglob("*.cu")):
            add("nvcc", source, "-fmad=false" if source.stem in SAME_BITS else "")
    for source in sorted((csrc / "cpu").rglob("*.cpp")):
        contract = " -ffp-contract=off" if source.stem in SAME_BITS else ""
        for isa, flags in isa_flags.items() if source.name not in ANY_ISA else [("", "")]:
            add("cxx", source, f"{flags}{contract} -DMLLAMA_ISA={isa}" if isa else "", isa)
    for source in sorted((csrc / "bindings").glob("*.cpp")):
        add("cxx", source, f"{host} -DTORCH_TARGET_VERSION={TORCH_TARGET} {includes}", variant)
    add("cxx", csrc / "build_info.cpp", host, variant)
    lines.append(f"build {str(output).replace(' ', '$ ')}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


class NinjaBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        # One place for whichever command builds, so that an editable install and wheels of the same sources
        # share what they compile; not for what is compiled with sanitizers.
        sanitized = os.environ.get("MLLAMA_KERNELS_SANITIZE", "0") != "0"
        build = Path(self.build_temp).resolve() if sanitized else ROOT / "build" / "objects"
        build.mkdir(parents=True, exist_ok=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        ninja = find_tool("ninja", "pip install ninja")
        (build / "build.ninja").write_text(ninja_file(build, output))
        try:
            subprocess.run([ninja, "-C", build, "-j", str(jobs())], check=True)
        except subprocess.CalledProcessError:
            sys.exit("mllama-kernels: the compiler stopped with the error above")


setup(
    ext_modules=[Extension("mllama_kernels._C", sources=[], py_limited_api=True)],
    cmdclass={"build_ext": NinjaBuild},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
