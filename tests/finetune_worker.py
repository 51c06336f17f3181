"""One process of several that fine-tune: `torchrun finetune_worker.py RUNS FOLDER`.

RUNS is a file of JSON, a list of runs, each `{"options": [...], "stop": ..., "on_last": [...]}`: options of
`mllama finetune`; where to stop all ranks, "step N" once the log has that step, "state N" while its state is
written, "saved N" after that; and options for the last rank alone. A run `{"script": {...}}` is a Trainer's
of somebody's own. FOLDER gets `ended-RANK.json`: of each run its exit code, and what it has printed, or its
losses.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import transformers
from transformers.trainer_callback import PrinterCallback

from mllama import MllamaForConditionalGeneration, MllamaProcessor, cli
from mllama.demo import checkpoint_path
from mllama.parallel.member import Member
from mllama.training import ranks, state
from mllama.training.batches import collate
from mllama.training.encoding import read_examples
from mllama.training.trainer import FineTuner


class Stopped(BaseException):
    """Ends a run as a kill does: nothing of it catches this."""


@contextlib.contextmanager
def stopping(where: str | None) -> Any:
    kind, _, step = (where or " ").partition(" ")
    log, save, save_file = FineTuner.log, FineTuner._save_checkpoint, state.save_file

    def log_and_stop(self: FineTuner, *arguments: Any, **options: Any) -> None:
        log(self, *arguments, **options)
        if self.state.global_step == int(step):
            raise Stopped

    def save_and_stop(self: FineTuner, *arguments: Any) -> None:
        save(self, *arguments)
        if self.state.global_step == int(step):
            raise Stopped

    def write_half(tensors: Any, path: Path) -> None:
        if path.parent.name == f"state-{step}.partial":
            path.write_bytes(b"half of it")
            raise Stopped
        save_file(tensors, path)

    with contextlib.ExitStack() as patches:
        if kind == "step":
            patches.enter_context(patch.object(FineTuner, "log", log_and_stop))
        if kind == "saved":
            patches.enter_context(patch.object(FineTuner, "_save_checkpoint", save_and_stop))
        if kind == "state":
            patches.enter_context(patch.object(state, "save_file", write_half))
        yield


def own_script(data: str, output: str, rows: int) -> list[float]:
    """The losses of a plain Trainer on all weights of the demo model."""
    processor = MllamaProcessor.from_pretrained(checkpoint_path())
    arguments = transformers.TrainingArguments(
        output_dir=output,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=2,
        max_steps=4,
        logging_steps=1,
        learning_rate=1e-4,
        optim="sgd",
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    model = MllamaForConditionalGeneration.from_pretrained(checkpoint_path(), dtype="float32")
    trainer = transformers.Trainer(
        model,
        arguments,
        train_dataset=read_examples(Path(data), processor, 1000)[:4],
        data_collator=lambda examples: collate(processor, examples),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def ended(run: dict[str, Any]) -> list[Any]:
    if "script" in run:
        return [0, own_script(**run["script"])]
    is_last = dist.get_rank() == dist.get_world_size() - 1
    options = [*run["options"], *(run.get("on_last", []) if is_last else [])]
    printed = io.StringIO()
    code: Any = None
    with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
        try:
            # A rank whose command fails ends its process, which has more to run here.
            alone = patch.object(Member, "of_environment", lambda: None)
            with stopping(run.get("stop")), alone:
                code = cli.main(["finetune", *options])
        except SystemExit as stop:
            code = stop.code
        except Stopped:
            code = "stopped"
    return [code, printed.getvalue()]


def main(runs: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    ranks._WORD_SECONDS = 0  # no launcher ends this one
    dist.init_process_group("gloo")
    results = [ended(run) for run in json.loads(runs.read_text())]
    (folder / f"ended-{dist.get_rank()}.json").write_text(json.dumps(results))
    dist.barrier()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
