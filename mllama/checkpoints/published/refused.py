"""Formats that are not read, by what they store and by the name in config.json, and what to load instead."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mllama.checkpoints.checkpoint import CheckpointError
from mllama.checkpoints.published.gptq import is_awq
from mllama.checkpoints.safetensors_files import SafetensorsCheckpoint
from mllama.wording import quoted, shown

_READ = (
    "the unquantised model with quantization=, or one that was quantised with bitsandbytes, "
    "compressed-tensors, GPTQ or AutoRound"
)
_GGUF = f"a GGUF file, {_READ}"
_AWQ = "one that was quantised with GPTQ, AutoRound or compressed-tensors w4a16, or the unquantised model"

# By the quant_method of config.json: how people call it, and what to load instead.
_METHODS = {
    "awq": ("AWQ", _AWQ),
    "hqq": ("HQQ", _READ),
    "torchao": ("torchao", _READ),
    "exl2": ("EXL2", _GGUF),
    "exl3": ("EXL3", _GGUF),
    "metal": ("MLX", _GGUF),
    "mlx": ("MLX", _GGUF),
    "aqlm": ("AQLM", _READ),
    "vptq": ("VPTQ", _READ),
    "quip": ("QuIP#", _READ),
    "spqr": ("SpQR", _READ),
    "quanto": ("quanto", _READ),
    "quark": ("Quark", _READ),
    "eetq": ("EETQ", _READ),
    "higgs": ("HIGGS", _READ),
    "bitnet": ("BitNet", _READ),
    "fp_quant": ("FP-Quant", _READ),
    "sinq": ("SINQ", _READ),
    "mxfp4": ("MXFP4", _READ),
    "mxfp8": ("MXFP8", _READ),
    "nvfp4": ("NVFP4", _READ),
    "fouroversix": ("NVFP4", _READ),
}
# Those whose tensors a module of this package reads, and our own.
_KNOWN = {
    "bitsandbytes",
    "compressed-tensors",
    "gptq",
    "auto-round",
    "intel/auto-round",
    "fp8",
    "fbgemm_fp8",
    "modelopt",
    "mllama_kernels",
}

_Tell = Callable[[SafetensorsCheckpoint, str], bool]


def _ends(*ends: str) -> _Tell:
    return lambda stored, name: name.endswith(ends)


def _mlx(stored: SafetensorsCheckpoint, name: str) -> bool:
    module, _, member = name.rpartition(".")
    is_packed = member == "weight" and stored.tensors[name].dtype_name == "U32"
    return is_packed and f"{module}.scales" in stored.tensors


def _awq(stored: SafetensorsCheckpoint, name: str) -> bool:
    return name.endswith(".qweight") and is_awq(stored, name.removesuffix(".qweight"))


def _four_bit_float(stored: SafetensorsCheckpoint, name: str) -> bool:
    return name.endswith(".weight_packed") and stored.tensors[name].dtype_name == "U8"


# In the order in which they are asked; the first that knows a tensor names the format.
_TELLS: tuple[tuple[_Tell, str, str], ...] = (
    (_mlx, "MLX", _GGUF),
    (_awq, "AWQ", _AWQ),
    (_ends(".q_weight", ".q_scale_max", ".q_groups"), "EXL2", _GGUF),
    (_ends(".trellis"), "EXL3", _GGUF),
    (_ends(".W_q"), "HQQ", _READ),
    (_ends("._weight_qdata", "._weight_scale", "._weight_zero_point"), "torchao", _READ),
    (_ends(".weight._data", ".weight._scale"), "quanto", _READ),
    (_four_bit_float, "NVFP4 or MXFP4", _READ),
    (_ends(".weight_scale_2"), "NVFP4", _READ),
    (_ends(".codebooks", ".codes"), "AQLM", _READ),
    (_ends(".weight_scales"), "EETQ", _READ),
    (_ends(".bitmask", ".row_offsets", ".scale_packed"), "compressed sparse weights", _READ),
)


def find_refused(stored: SafetensorsCheckpoint, config: Mapping[str, Any]) -> None:
    """Nothing of what is not read; see `stored_weights.Finder`.

    Raises: CheckpointError, at once, for a format that is known and not read, and for a quant_method that
        nobody knows: what the loader would say of hundreds of tensors tells less.
    """
    for tells, name, instead in _TELLS:
        theirs = [tensor for tensor in stored.tensors if tells(stored, tensor)]
        if theirs:
            info = stored.tensors[theirs[0]]
            where = f"{shown(info.stored_name)} in {shown(info.file)} and {len(theirs) - 1} more tensors"
            raise _refused(stored, name, f"{where} are {name}'s", instead)
    method = config.get("quant_method")
    word = method.lower() if isinstance(method, str) else ""
    if method is None or word in _KNOWN:
        return
    if word in _METHODS:
        name, instead = _METHODS[word]
        raise _refused(stored, name, f"config.json has quant_method {quoted(method)}", instead)
    problem = f"config.json has an unknown quant_method {quoted(method)}, expected one of {sorted(_KNOWN)}"
    raise CheckpointError(stored.folder, [*stored.problems, problem])


def _refused(
    stored: SafetensorsCheckpoint, name: str, evidence: str, instead: str
) -> CheckpointError:
    problem = f"{evidence}: {name} is not read; load {instead}"
    return CheckpointError(stored.folder, [*stored.problems, problem])
