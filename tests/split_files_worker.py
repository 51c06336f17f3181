"""One rank of a split model that is saved and adapted: `python split_files_worker.py RANK SIZE FOLDER`.

The folder has `checkpoint`, and `adapter`, and gets `RANK.pt`: what came out, or the error.
"""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import torch.distributed as dist

import mllama
from mllama.quantization.decoded import decoded_copy
from mllama.quantized_modules import WholeWeights
from mllama.training.adapters import use_adapter

IDS = torch.arange(3, 12)[None]


def load(folder: Path, **options: Any) -> Any:
    return mllama.MllamaForConditionalGeneration.from_pretrained(
        folder / "checkpoint", tensor_parallel=True, device="cpu", **options
    )


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def adapter_of(wrapped: Any) -> dict[str, torch.Tensor]:
    return peft.get_peft_model_state_dict(wrapped, save_embedding_layers=False)


def failure(call: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    try:
        call(*arguments, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def saved(folder: Path) -> dict[str, Any]:
    """State dicts, folders and refusals."""
    model = load(folder)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(folder / "plain", max_shard_size="1MB")
    own = dict(model.state_dict(destination=WholeWeights()))
    before = {name: tensor.clone() for name, tensor in own.items()}
    with torch.no_grad():
        for tensor in own.values():
            tensor.zero_()
    told = model.load_state_dict(state)
    same = all(torch.equal(before[name], tensor) for name, tensor in own.items())
    assigned = load(folder)
    assigned.load_state_dict(state, assign=True)
    down = assigned.model.language_model.layers[0].mlp.down_proj.weight
    found = {
        "state": state,
        "is loaded": same and not told.missing_keys and not told.unexpected_keys,
        "is assigned": torch.equal(logits(assigned), logits(model)),
        "own memory": down.untyped_storage().nbytes() == down.nbytes,
        "parts given": failure(model.load_state_dict, own),
        "part": failure(model.model.state_dict),
        "keep_vars": failure(model.state_dict, keep_vars=True),
        "given": failure(model.save_pretrained, folder / "given", state_dict=state),
        "copied": failure(copy.deepcopy, model),
        "pickled": failure(pickle.dumps, model),
        "resized": failure(model.resize_token_embeddings, 500),
        "drawn": failure(model.init_weights),
        "head": failure(model.set_output_embeddings, torch.nn.Linear(512, 450, bias=False)),
        "parameters": model.num_parameters(),
        "part's": failure(model.model.num_parameters),
        "written": failure(model.save_pretrained, folder / "checkpoint" / "config.json"),
    }
    for encoding in ("q4_0", "int8"):
        quantized = load(folder, quantization=encoding)
        quantized.save_pretrained(folder / encoding)
        found[encoding] = quantized.state_dict()
        quantized.load_state_dict(found[encoding])
        found[f"{encoding} decoded"] = logits(decoded_copy(quantized, torch.float32, "auto"))
        found[f"{encoding} parameters"] = quantized.num_parameters()
    return found


def adapted(folder: Path) -> dict[str, Any]:
    """The adapter beside plain and quantised weights, and merged."""
    wrapped = peft.PeftModel.from_pretrained(load(folder), folder / "adapter")
    found = {"beside": logits(wrapped), "adapter": adapter_of(wrapped)}
    around = wrapped.state_dict()
    found["without values"] = {n: tuple(t.shape) for n, t in around.items() if t.is_meta}
    wrapped.save_pretrained(folder / f"saved {dist.get_rank()}")
    merged = wrapped.merge_and_unload()
    found |= {"merged": logits(merged), "merged state": merged.state_dict()}
    pissa = Path(shutil.copytree(folder / "adapter", folder / f"pissa {dist.get_rank()}"))
    config = json.loads((pissa / "adapter_config.json").read_text())
    (pissa / "adapter_config.json").write_text(json.dumps(config | {"init_lora_weights": "pissa"}))
    found["pissa"] = failure(peft.PeftModel.from_pretrained, load(folder), pissa)
    found["DoRA"] = failure(peft.PeftModel.from_pretrained, load(folder), folder / "dora")
    model = load(folder)
    found["DoRA used"] = failure(use_adapter, model, folder / "dora")
    loha = peft.get_peft_model(model, peft.LoHaConfig(r=4, target_modules=r".*\.down_proj"))
    found["LoHa"] = failure(logits, loha)
    for name, options in (("used", {}), ("quantised", {"quantization": "q8_0"})):
        model = load(folder, **options)
        use_adapter(model, folder / "adapter")
        found[name] = logits(model)
    return found


if __name__ == "__main__":
    rank, size, place = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{place / 'store'}", rank=rank, world_size=size
    )
    try:
        result: Any = saved(place) | adapted(place)
    except Exception:
        result = traceback.format_exc()
    torch.save(result, place / f"{rank}.pt")
