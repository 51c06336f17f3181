"""One process of several that fine-tune: `torchrun finetune_worker.py RUNS FOLDER`.

RUNS is a file of JSON, a list of runs, each `{"options": [...], "stop": ..., "on_rank": [...]}`: options of
`mllama finetune`; "step N" to stop all ranks once the log has that step, or "state N" while its state is
written; and options for the last rank alone. FOLDER gets `ended-RANK.json`: of each run its exit code, and
what it has printed.
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

from mllama import cli
from mllama.training import ranks, state
from mllama.training.trainer import FineTuner


class Stopped(BaseException):
    """Ends a run as a kill does: nothing of it catches this."""


@contextlib.contextmanager
def stopping(where: str | None) -> Any:
    kind, _, step = (where or " ").partition(" ")
    log, save_file = FineTuner.log, state.save_file

    def log_and_stop(self: FineTuner, *arguments: Any, **options: Any) -> None:
        log(self, *arguments, **options)
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
        if kind == "state":
            patches.enter_context(patch.object(state, "save_file", write_half))
        yield


def ended(run: dict[str, Any]) -> list[Any]:
    is_last = dist.get_rank() == dist.get_world_size() - 1
    options = [*run["options"], *(run.get("on_last", []) if is_last else [])]
    printed = io.StringIO()
    code: Any = None
    with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
        try:
            with stopping(run.get("stop")):
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
