"""A training step beside `transformers`: the loss of an image and a text, and every parameter's gradient.

All models share their parameters in memory and see the same batch. What an optimizer would do, the same for
all of them, is left out. On a CPU there are few layers and a small vocabulary, so that gradients fit into
memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import machine, model
from benchmarks.budget import Budget
from benchmarks.case import ACCELERATED, OURS
from benchmarks.measure import in_words
from benchmarks.model import LEFT_OUT, PEER
from benchmarks.scenario import FULL, SMALL_VOCABULARY, Layers, Scenario, fitting, products
from benchmarks.shapes import VOCAB
from benchmarks.timing import Spread, interleave, ratios, significant
from benchmarks.training import ATTENTION_FLOPS
from mllama.loss import IGNORED

REDUCED = Layers(2, (1,), 1, 1, (0,))
SAMPLED = 4096  # elements of each gradient that are compared


@dataclass(frozen=True)
class Trainee:
    """A model as it is trained: ``context`` is entered around a step and not timed."""

    name: str
    model: Any
    options: dict[str, Any]
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    unavailable: str | None = None


def scenarios(device: torch.device, quick: bool) -> list[Scenario]:
    if device.type == "cpu":
        return [Scenario(1, 512, 0)]
    return [Scenario(1, 2048, 0)] if quick else [Scenario(1, 512, 0), Scenario(1, 2048, 0)]


def batch_of(
    scenario: Scenario, vocabulary: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    batch = model.inputs_of(scenario, dtype, device, vocabulary)
    ids = batch["input_ids"]  # the image's token is the only one that is no class
    return batch | {"labels": ids.masked_fill(ids == vocabulary, IGNORED)}


def trainees(mine: Any, theirs: Any, quick: bool) -> list[Trainee]:
    from mllama_kernels.transformers import accelerated

    on_cpu = mine.device.type == "cpu"
    no_time = "compiling takes longer than all the rest of this run" if on_cpu or quick else None
    return [
        Trainee(OURS, mine, {"return_logits": False}),
        Trainee(PEER, theirs, {}),
        Trainee(ACCELERATED, theirs, {}, partial(accelerated, theirs, loss=True)),
        Trainee("transformers compiled", theirs, {}, partial(compiled, theirs), no_time),
        liger(theirs),
    ]


@contextmanager
def compiled(theirs: Any) -> Iterator[None]:
    """Each tower as a whole. Dynamo keeps what it compiled for the next time."""
    towers = (theirs.model.language_model, theirs.model.vision_model)
    for tower in towers:
        tower.compile(dynamic=False)
    try:
        yield
    finally:
        for tower in towers:
            tower._compiled_call_impl = None


def liger(theirs: Any) -> Trainee:
    """liger-kernel patches a model for good, and functions for every model: it has a model of its own.

    Its fused loss is for the text model only and would drop the image.
    """
    name = "liger-kernel"
    if theirs.device.type == "cpu":
        return unavailable(name, "runs on CUDA only")
    try:
        from liger_kernel.transformers import apply_liger_kernel_to_mllama
    except (ImportError, OSError) as error:
        return unavailable(name, in_words(error))
    from transformers.models.mllama import modeling_mllama as module

    with torch.device("meta"):
        patched = type(theirs)(theirs.config)
    patched.load_state_dict(theirs.state_dict(), assign=True)
    text = theirs.model.language_model
    patched.model.language_model.rotary_emb = text.rotary_emb
    before = dict(vars(module))
    apply_liger_kernel_to_mllama(model=patched, fused_linear_cross_entropy=False)
    after = {key: value for key, value in vars(module).items() if before.get(key) is not value}
    vars(module).update({key: before[key] for key in after})

    @contextmanager
    def context() -> Iterator[None]:
        vars(module).update(after)
        try:
            yield
        finally:
            vars(module).update({key: before[key] for key in after})

    return Trainee(name, patched.train(), {}, context)


def unavailable(name: str, reason: str) -> Trainee:
    return Trainee(name, None, {}, unavailable=reason)


def step(trainee: Trainee, batch: dict[str, Tensor]) -> float:
    """Seconds from the batch to all gradients, which stay in ``.grad``."""
    with trainee.context():
        _synchronize(trainee.model)
        begin = time.perf_counter()
        loss = trainee.model(**batch, use_cache=False, **trainee.options).loss
        loss.backward()
        _synchronize(trainee.model)
        return time.perf_counter() - begin


def timed(trainee: Trainee, batch: dict[str, Tensor]) -> float:
    """Seconds of a step, whose gradients do not stay: the models share parameters, but not gradients."""
    seconds = step(trainee, batch)
    trainee.model.zero_grad(set_to_none=True)
    return seconds


def _synchronize(trained: Any) -> None:
    if trained.device.type == "cuda":
        torch.cuda.synchronize()


def samples(trained: Any) -> dict[str, Tensor]:
    """Of every parameter's gradient some elements, spread over it."""
    found = {}
    for name, parameter in trained.named_parameters():
        grad = parameter.grad
        if grad is None:
            raise RuntimeError(f"{name} has no gradient")
        found[name] = grad.flatten()[:: max(1, grad.numel() // SAMPLED)].double()
    return found


def difference(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Euclidean distance of all samples relative to the expected ones."""
    a, e = (torch.cat([grads[name] for name in expected]) for grads in (actual, expected))
    return (torch.linalg.vector_norm(a - e) / torch.linalg.vector_norm(e)).item()


def flops_per_step(trained: Any, scenario: Scenario) -> int:
    """Products of useful tokens: a weight's once forward and twice backward, attention's by its masks."""
    weight_products, attention = products(trained, scenario)
    return scenario.batch * int(2 * 3 * weight_products + 4 * ATTENTION_FLOPS * attention)


def runs_flops(trained: Any, scenario: Scenario) -> int:
    """Of comparing the three models that run on a CPU, and of one round; and as much beside products."""
    return 2 * 2 * 3 * flops_per_step(trained, scenario)


def measure(
    mine: Any, theirs: Any, batch: dict[str, Tensor], quick: bool, budget: Budget | None = None
) -> dict[str, Any]:
    """A row without its shape, ready for JSON; the peer comes first, to be compared with."""
    device = mine.device
    budget = budget or Budget()
    before = machine.state(device)
    records: list[dict[str, Any]] = []
    runs: list[tuple[dict[str, Any], Callable[[], float]]] = []
    expected: dict[str, Tensor] | None = None
    for trainee in sorted(trainees(mine, theirs, quick), key=lambda t: t.name != PEER):
        record: dict[str, Any] = {"name": trainee.name, "status": "timed"}
        records.append(record)
        if trainee.unavailable:
            record |= {"status": "unavailable", "reason": trainee.unavailable}
            continue
        if budget.interrupted or (budget.over and trainee.name not in (OURS, PEER)):
            record |= {"status": "left out", "reason": LEFT_OUT}
            continue
        budget.say(f"training step, {mine.dtype}: {trainee.name} is compared")
        try:
            if device.type == "cuda":
                timed(trainee, batch)  # compiles, tunes and allocates
                torch.cuda.reset_peak_memory_stats()
            step(trainee, batch)
            if device.type == "cuda":
                record["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
            found = samples(trainee.model)
            expected = found if expected is None else expected
            record["difference"] = significant(difference(found, expected), 3)
            if not record["difference"] <= model.TOLERANCE[mine.dtype]:
                reason = f"gradients differ by {record['difference']} of those of {PEER}"
                record |= {"status": "wrong", "reason": reason}
                continue
        except Exception as error:  # out of memory, a peer that does not compile
            record |= {"status": "failed", "reason": in_words(error)}
            continue
        finally:
            trainee.model.zero_grad(set_to_none=True)
            if device.type == "cuda":
                torch.cuda.empty_cache()
        runs.append((record, partial(timed, trainee, batch)))
    budget.say(f"training step, {mine.dtype}: rounds of {len(runs)} models")
    rows = interleave([run for _, run in runs], 5 if device.type == "cuda" else 3, budget)
    if not all(rows):
        for record, _ in runs:
            record |= {"status": "left out", "reason": LEFT_OUT}
        runs = []
    times = {record["name"]: row for (record, _), row in zip(runs, rows)}
    for record, _ in runs:
        seconds = times[record["name"]]
        record["us"] = Spread.of([s * 1e6 for s in seconds]).to_json()
        record["rounds_us"] = [significant(s * 1e6, 5) for s in seconds]
        if OURS in times and record["name"] != OURS:
            record["ours_is_faster"] = ratios(times[OURS], seconds).to_json()
    records.sort(key=lambda record: record["name"] != OURS)
    return {
        "op": "training step",
        "dtype": str(mine.dtype).removeprefix("torch."),
        "state": {"before": before, "after": machine.state(device)},
        "impls": records,
    }


def run(
    device: torch.device,
    dtypes: list[torch.dtype],
    quick: bool,
    seed: int,
    budget: Budget,
    tflops: Mapping[torch.dtype, float],
) -> Iterator[dict[str, Any]]:
    """One row per dtype and scenario; a quick run on a CPU has smaller images where that one is slow."""
    on_cpu = device.type == "cpu"
    layers = REDUCED if on_cpu else FULL
    vocabulary = SMALL_VOCABULARY if on_cpu else VOCAB
    for number, dtype in enumerate(dtypes):
        if budget.interrupted:
            return
        torch.manual_seed(seed)
        chosen = scenarios(device, quick)
        with budget.share(1 / (len(dtypes) - number)):
            if on_cpu and quick:
                seconds = budget.left
                chosen = [fitting(layers, s, runs_flops, seconds, tflops[dtype]) for s in chosen]
            budget.say(f"training step, {dtype}: makes its weights; rows to come: {len(chosen)}")
            mine, theirs = model.build(layers, dtype, device, vocabulary, chosen[0].tile)
            for place, scenario in enumerate(chosen):
                batch = batch_of(scenario, vocabulary, dtype, device)
                with budget.share(1 / (len(chosen) - place)):
                    row = measure(mine.train(), theirs.train(), batch, quick, budget)
                shape = {"batch": scenario.batch, "tokens": scenario.prompt}
                row["shape"] = shape | scenario.sizes(layers)
                yield row | {"flops": flops_per_step(mine, scenario), "bytes": 0, "bound": "copy"}
            del mine, theirs
