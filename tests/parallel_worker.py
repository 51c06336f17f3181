"""One of several processes that share models: `python parallel_worker.py RANK SIZE FOLDER`.

The folder has some checkpoints and `given.pt` (for each of them batches of inputs; a tokenizer), and gets
`RANK of SIZE.pt`: by the name of a check what came out, or the error. Most of them run on whole models too.
"""

from __future__ import annotations

import copy
import os
import pickle
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import mllama
import mllama.memory as memory_of_devices
from mllama import MllamaForConditionalGeneration as Model

SEMANTICS = (
    "meta",
    "transformers",
    {"vision_taps": "output"},
    {"imageless_rows": "leak"},
    {"decode_rows": "repeat_last"},
)


@dataclass
class Place:
    """Where checks run: on one of the ranks, or on a whole model as the first of them would."""

    folder: Path
    case: dict[str, Any]
    tokenizer: Any
    rank: int = 0
    group: Any = False

    def load(self, kind: Any = Model, name: str | None = None, **options: Any) -> Any:
        options = {"tensor_parallel": self.group, "device": "cpu", "dtype": "float32"} | options
        options = {"backend": self.case["backend"]} | options
        return kind.from_pretrained(self.folder / (name or self.case["name"]), **options)


def outputs_of(model: nn.Module, batches: dict[str, Any]) -> dict[str, Any]:
    with torch.no_grad():
        return {name: model(**batch).logits for name, batch in batches.items()}


def forward(at: Place) -> Any:
    """Every depth of the text tower, with and without a cache."""
    model, found = at.load(), {}
    for name, batch in at.case["batches"].items():
        for caching in (False, True):
            with torch.no_grad():
                output = model(**batch, use_cache=caching, output_hidden_states=True)
            found[f"{name} {caching}"] = (output.logits, *output.hidden_states)
    return found


def generated(model: Any, batch: dict[str, Tensor], **options: Any) -> Any:
    options = {"max_new_tokens": 6, "pad_token_id": 0, "return_dict_in_generate": True} | options
    output = model.generate(**batch, output_logits=True, **options)
    return {"tokens": output.sequences, "logits": output.logits, "given": batch["input_ids"]}


def greedy(at: Place) -> Any:
    model, found = at.load(), {}
    for name, batch in at.case["prompts"].items():
        found[name] = generated(model, batch)
    plain = model.generate(**batch, max_new_tokens=6, pad_token_id=0)
    assert torch.equal(plain, found[name]["tokens"])  # other steps, the same tokens
    return found


def options(at: Place) -> Any:
    """What samples, penalises and ends; functions differ from rank to rank, and count on the first."""
    model, batch = at.load(), at.case["prompts"]["mixed"]
    length = batch["input_ids"].shape[1]
    torch.manual_seed(100 + at.rank)  # which is where seeds that nobody gives come from

    def biased(_ids: Tensor, scores: Tensor) -> Tensor:
        scores[:, 20 + at.rank] += 50
        return scores

    def ends(ids: Tensor, _scores: Any) -> bool:
        return ids.shape[1] >= length + 3 - at.rank

    def letters(_row: int, _ids: Tensor) -> list[int]:
        return [at.tokenizer.token_to_id(letter) for letter in "abcdefgh"]

    sampled = {"do_sample": True, "temperature": 0.7}
    calls: dict[str, dict[str, Any]] = {
        "a seed": sampled | {"seed": 5},
        "seeds": sampled | {"seed": [3, 1, 2], "top_k": 20, "top_p": 0.9},
        "no seed": sampled,
        "no seed again": sampled,
        "several": sampled | {"num_return_sequences": 2, "min_p": 0.01, "seed": 1},
        "penalties": {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
        "words": {"bad_words_ids": [[i] for i in range(3, 90)], "min_new_tokens": 4},
        "processor": {"logits_processor": [biased]},
        "processor and draw": sampled | {"logits_processor": [biased]},
        "criterion": {"stopping_criteria": [ends]},
        "prefix": {"prefix_allowed_tokens_fn": letters},
    }
    found = {}
    for name, call in calls.items():
        call = {"max_new_tokens": 4, "pad_token_id": 0} | call
        found[name] = model.generate(**batch, **call)
    text = at.tokenizer.decode(found["prefix"][0, length:].tolist())
    stop = {"stop_strings": [text[1:3]], "tokenizer": at.tokenizer}
    stop |= {"prefix_allowed_tokens_fn": letters, "max_new_tokens": 4, "pad_token_id": 0}
    kept = {"return_dict_in_generate": True, "output_hidden_states": True, "output_scores": True}
    output = model.generate(**batch, max_new_tokens=2, pad_token_id=0, **kept)
    found["kept"] = (output.hidden_states, output.scores)
    streamed = model.stream(
        **at.case["prompts"]["text"], tokenizer=at.tokenizer, max_new_tokens=4, seed=2, **sampled
    )
    found["streamed"] = torch.tensor(list("".join(streamed).encode()))
    found["stop string"] = model.generate(**at.case["prompts"]["one picture"], **stop)
    return found


def turns(at: Place) -> Any:
    """Two turns in a cache of the model's, and in one that is made of its configuration."""
    model, batch = at.load(), at.case["prompts"]["one picture"]
    config = model.config.text_config
    found = []
    for cache in (
        model.new_cache(1),
        mllama.MllamaCache(config, 1, dtype=model.dtype, device="cpu"),
    ):
        first = model.generate(**batch, past_key_values=cache, max_new_tokens=5, eos_token_id=[])
        ids = torch.cat([first, torch.arange(5, 12).unsqueeze(0)], 1)
        seen = batch["cross_attention_mask"]
        added = seen[:, -1:].expand(-1, ids.shape[1] - seen.shape[1], -1, -1)
        second = batch | {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "cross_attention_mask": torch.cat([seen, added], 1),
        }
        found.append(generated(model, second, past_key_values=cache))
        forward = model(input_ids=torch.tensor([[7, 8]]), past_key_values=cache)
        found.append(forward.logits)
    return found


def semantics(at: Place) -> Any:
    found = []
    for choice in SEMANTICS:
        model = at.load(semantics=choice)
        batch = at.case["batches"]["mixed, left"]
        found.append(generated(model, batch, max_new_tokens=3))
        with torch.no_grad():
            found.append(model(**batch).logits)
    return found


def lower_precision(at: Place) -> Any:
    """In bfloat16 and under autocast, as float32."""
    batch = at.case["batches"]["mixed, left"]
    found = {"float32": at.load()(**batch).logits}
    with torch.autocast("cpu", torch.bfloat16):
        found["autocast"] = at.load()(**batch, use_cache=False).logits.float()
    model = at.load(dtype="bfloat16")
    found["bfloat16"] = model(**batch).logits.float()
    found["tokens"] = model.generate(**batch, max_new_tokens=4, pad_token_id=0)
    return {name: value.detach() for name, value in found.items()}


def classes(at: Place) -> Any:
    """The models that are part of the whole one."""
    batch = at.case["batches"]["mixed, left"]
    images = {n: t for n, t in batch.items() if n in ("pixel_values",) or n.startswith("aspect_")}
    vision = at.load(mllama.MllamaVisionModel)
    inner = at.load(mllama.MllamaModel)
    text = at.load(mllama.MllamaForCausalLM)
    with torch.no_grad():
        states = inner.vision_model(**images).last_hidden_state
        projected = inner.multi_modal_projector(states).flatten(0, 2)
        ids = batch["input_ids"].clamp_max(96)
        seen = {"cross_attention_states": projected}
        seen["cross_attention_mask"] = batch["cross_attention_mask"]
        return {
            "vision": vision(**images).last_hidden_state,
            "inner": inner(**batch).last_hidden_state,
            "text": text(input_ids=ids, attention_mask=batch["attention_mask"], **seen).logits,
            "tokens": text.generate(input_ids=ids[:1], max_new_tokens=5, pad_token_id=0),
        }


def loss(at: Place) -> Any:
    """Also of no target at all, and in training mode, where nothing is random."""
    batch = at.case["batches"]["mixed, left"]
    image_token = at.case["image_token"]
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels = labels.masked_fill(labels == image_token, -100)
    model, found = at.load(), []
    with torch.no_grad():
        for options in ({}, {"return_logits": False}, {"num_items_in_batch": 7}):
            found.append(model(**batch, labels=labels, **options).loss)
        nothing = torch.full_like(labels, -100)
        found.append(model(**batch, labels=nothing, return_logits=False, num_items_in_batch=3).loss)
    trained = model.train()(**batch, labels=labels)  # a graph is kept
    return [*found, trained.loss.detach(), trained.logits.detach()]


def hooks(at: Place) -> Any:
    """On what gives whole values; each sees them, and what it gives counts."""
    model, seen = at.load(), []

    def double(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        first, *rest = output if isinstance(output, tuple) else (output,)
        seen.append(first.detach())
        return (2 * first, *rest) if isinstance(output, tuple) else 2 * first

    language, vision = model.model.language_model, model.model.vision_model
    cross = at.case["cross"]
    plain = next(i for i in range(len(language.layers)) if i != cross)
    places = [language.layers[plain].mlp, language.layers[plain].self_attn]
    places += [language.layers[cross].mlp, language.layers[cross].cross_attn]
    places += [language.layers[cross], language.norm, language.embed_tokens]
    places += [language.layers[plain].input_layernorm, model.model.multi_modal_projector]
    places += [vision.transformer.layers[0].mlp, vision.transformer.layers[0].self_attn]
    places += [vision.transformer.layers[0], vision.patch_embedding]
    for place in places:
        place.register_forward_hook(double)
    batch = at.case["prompts"]["mixed"]
    return {"logits": outputs_of(model, {"mixed": batch}), "seen": seen}


# Each with the models that it is about, by their place among the cases.
VALUES: dict[str, tuple[Callable[[Place], Any], tuple[int, ...]]] = {
    "forward": (forward, (0, 1, 2)),
    "greedy": (greedy, (0, 1, 2)),
    "semantics": (semantics, (1,)),
    "options": (options, (1,)),
    "turns": (turns, (1,)),
    "classes": (classes, (2,)),
    "loss": (loss, (0,)),
    "hooks": (hooks, (2,)),
    "lower precision": (lower_precision, (0, 2)),
}


def error_of(call: Callable[[], Any]) -> str:
    try:
        return f"nothing was raised: {call()!r:.80}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def hooked(at: Place) -> Any:
    """What a hook on each module says that would see a part."""
    found, batch = {}, at.case["prompts"]["mixed"]
    model = at.load()
    for place in at.case["parts"]:
        handle = model.get_submodule(place).register_forward_hook(lambda *_: None)
        found[place] = error_of(lambda: model(**batch))
        handle.remove()
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    found["all modules"] = error_of(lambda: model(**batch))
    handle.remove()
    return found


def changed(at: Place) -> Any:
    """What would make something of a part that only a whole model can be."""
    model, batch = at.load(), at.case["prompts"]["text"]
    layer, rows = model.model.language_model.layers[0], model.head_rows
    found = {
        "deepcopy": error_of(lambda: copy.deepcopy(model)),
        "deepcopy of a layer": error_of(lambda: copy.deepcopy(layer)),
        "pickle": error_of(lambda: pickle.dumps(model)),
        "init_weights": error_of(model.init_weights),
        "resize": error_of(lambda: model.resize_token_embeddings(rows + 40)),
        "head": error_of(
            lambda: model.set_output_embeddings(
                nn.Linear(model.lm_head.in_features, rows, bias=False)
            )
        ),
        "export": error_of(
            lambda: torch.export.export(model, (), dict(batch) | {"use_cache": False}, strict=False)
        ),
    }
    whole_cache = mllama.MllamaCache(
        mllama.MllamaTextConfig(**at.case["text_config"]), 1, dtype=model.dtype, device="cpu"
    )
    found["whole cache"] = error_of(lambda: model.generate(**batch, past_key_values=whole_cache))
    found["whole cache in a forward"] = error_of(
        lambda: model(batch["input_ids"], past_key_values=whole_cache)
    )
    wrapped = at.load()
    for module in wrapped.modules():
        vars(module)["_is_fsdp_managed_module"] = True
    found["FSDP"] = error_of(lambda: wrapped(**batch))
    other = at.load()
    if at.rank == 1:
        with torch.no_grad():
            other.model.language_model.layers[0].mlp.down_proj.weight[0, 0] = torch.nan
    found["not finite"] = error_of(lambda: other.generate(**batch))
    attention = wrapped.model.language_model.layers[at.case["cross"]].cross_attn
    for module in wrapped.modules():
        del vars(module)["_is_fsdp_managed_module"]
    for name in ("k_proj", "v_proj"):
        whole = nn.Linear(attention.k_proj.in_features, 4 * attention.head_dim, bias=False)
        setattr(attention, name, whole)
    picture = at.case["prompts"]["one picture"]
    found["assigned keys"] = error_of(lambda: wrapped(**picture, use_cache=False))
    head = nn.Linear(other.lm_head.in_features, rows, bias=False)
    other.lm_head = head
    found["assigned head"] = error_of(lambda: other(**batch))
    found["after all of it"] = model(**batch).logits.detach()
    return found


def gradients(at: Place) -> Any:
    batch, found = at.case["prompts"]["one picture"], {}
    for name in ("plain", "recomputing"):
        model = at.load().train()
        if name == "recomputing":
            model.gradient_checkpointing_enable()
        inputs = {**batch, "labels": batch["input_ids"].masked_fill(batch["input_ids"] > 90, -100)}
        found[name] = error_of(lambda m=model, i=inputs: m(**i).loss.backward())
        states = model.model(**batch).last_hidden_state.sum()
        found[f"{name}, without the head"] = error_of(states.backward)
    return found


def unlike(at: Place) -> Any:
    """Ranks that were given different things, all of which hear of it."""
    model, batch = at.load(), at.case["prompts"]["mixed"]
    own = {**batch, "input_ids": batch["input_ids"].clone()}
    own["input_ids"][0, -1] = 5 + at.rank
    pixels = {**batch, "pixel_values": batch["pixel_values"] + at.rank}
    seeds = {"do_sample": True, "seed": at.rank}
    cache = {"past_key_values": model.new_cache(3)}
    text = at.case["prompts"]["text"]
    kept = {"past_key_values": model.new_cache(1)}
    model.generate(**text, **kept, max_new_tokens=2)
    if at.rank == 0:
        kept["past_key_values"].reset()
    found = {}
    free = memory_of_devices.free_bytes
    if at.rank == 1:
        memory_of_devices.free_bytes = lambda _device: 5
    found["room"] = error_of(lambda: model.generate(**text, max_new_tokens=900))
    memory_of_devices.free_bytes = free
    name = at.case["name"]
    if at.rank == 1:
        other = at.load(tensor_parallel=False)
        with torch.no_grad():
            other.model.language_model.norm.weight.mul_(1.5)
        other.save_pretrained(at.folder / (name := "other weights"))
    return found | {
        "dtype": error_of(lambda: at.load(dtype=("bfloat16", "float32")[min(at.rank, 1)])),
        "encoding": error_of(lambda: at.load(quantization=("q8_0", None)[min(at.rank, 1)])),
        "semantics": error_of(lambda: at.load(semantics=SEMANTICS[min(at.rank, 1)])),
        "weights": error_of(lambda: at.load(name=name)),
        "prompt": error_of(lambda: model.generate(**own, max_new_tokens=2)),
        "pixels": error_of(lambda: model.generate(**pixels, max_new_tokens=2)),
        "missing": error_of(lambda: model.generate(**(text if at.rank else batch))),
        "number": error_of(lambda: model.generate(**batch, max_new_tokens=2 + at.rank)),
        "functions": error_of(
            lambda: model.generate(**batch, stopping_criteria=[lambda *_: True] * (at.rank == 0))
        ),
        "seed": error_of(lambda: model.generate(**batch, **seeds)),
        "cache": error_of(lambda: model.generate(**batch, **(cache if at.rank else {}))),
        "kept text": error_of(lambda: model.generate(**text, **kept)),
    }


def memory(at: Place) -> Any:
    model = at.load()
    cache = model.new_cache(2, max_tokens=40)
    config = model.config.text_config
    return {
        "heads": cache.store.page_values.shape[3],
        "page": cache.store.page_nbytes(),
        "cache": cache.nbytes,
        "weights": model.get_memory_footprint(),
        "parameters": model.num_parameters(),
        "own parameters": sum(parameter.numel() for parameter in model.parameters()),
        "stored": (config.to_dict(), model.config.to_dict()),
        "exchanges": model.share and type(model.share.ranks.memory).__name__,
        "of a copied configuration": mllama.MllamaCache(
            copy.deepcopy(config), 2, dtype=model.dtype, device="cpu", max_tokens=40
        ).nbytes,
    }


def refused(at: Place) -> Any:
    """Before anything is loaded."""
    own_groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    others = dist.new_group([0])
    alone = at.load(tensor_parallel=own_groups[at.rank])
    text = {"text": at.case["prompts"]["text"]}
    found = {
        "alone": (alone.share, outputs_of(alone, text)),
        "default": at.load(tensor_parallel=False).share,
        "yes": error_of(lambda: at.load(tensor_parallel="yes")),
        "1": error_of(lambda: at.load(tensor_parallel=1)),
    }
    if at.rank:
        found["others"] = error_of(lambda: at.load(tensor_parallel=others))
    loaded = []
    from mllama.checkpoints import weights

    original, weights.fill = weights.fill, lambda *_, **__: loaded.append(1)
    for name in ("6 heads of 3", "3 vision heads"):
        found[name] = error_of(lambda n=name: at.load(name=n))
    weights.fill = original
    return {**found, "loaded": loaded}


def pair(at: Place) -> Any:
    """The last two of the ranks share a model; the others do something else."""
    last = dist.get_world_size() - 2
    group = dist.new_group([last, last + 1])
    if at.rank < last:
        return None
    return greedy(Place(at.folder, at.case, at.tokenizer, at.rank - last, group))


OTHERS: dict[str, tuple[Callable[[Place], Any], tuple[int, ...]]] = {
    "hooked": (hooked, (0,)),
    "changed": (changed, (2,)),
    "gradients": (gradients, (1,)),
    "unlike": (unlike, (0,)),
    "memory": (memory, (0, 1, 2)),
    "refused": (refused, (2,)),
    "pair": (pair, (2,)),
}


def run(places: list[Place], checks: dict[str, Any]) -> dict[str, list[Any]]:
    """What comes out of each check on each of its models."""
    return {name: [check(places[at]) for at in where] for name, (check, where) in checks.items()}


def places(folder: Path, rank: int = 0, group: Any = False) -> list[Place]:
    given = torch.load(folder / "given.pt", weights_only=False)
    return [Place(folder, case, given["tokenizer"], rank, group) for case in given["cases"]]


def main(rank: int, size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{folder / f'meeting of {size}'}"
    timeout = timedelta(seconds=300)
    dist.init_process_group(
        "gloo", init_method=meeting, rank=rank, world_size=size, timeout=timeout
    )
    results: dict[str, Any] = {}
    for name, check in (VALUES | OTHERS).items():
        try:
            results |= run(places(folder, rank, True), {name: check})
        except Exception:
            results[name] = traceback.format_exc()
    torch.save(results, folder / f"{rank} of {size}.pt")
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
