"""The command ``mllama``: picks a subcommand and turns errors into exit codes.

Exit codes: 0 done, 1 failed, 2 misused, 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys

COMMANDS = {
    "demo": "answer questions about a picture with the model that ships with the package",
    "generate": "picture and prompt to text, streamed",
    "chat": "talk with a model about pictures",
    "finetune": "train adapters, or all weights, on conversations about pictures",
    "verify": "check the kernels on this machine, with your checkpoint",
    "info": "versions, kernels, and what a checkpoint is",
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mllama", description="Llama 3.2 Vision on its own kernels."
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="log more on stderr")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in COMMANDS.items():
        module = importlib.import_module(f"mllama.commands.{name}")
        sub = commands.add_parser(
            name,
            help=summary,
            description=module.__doc__,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        module.add_arguments(sub)
        sub.set_defaults(run=module.run)
    return parser


def main(arguments: list[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    level = logging.INFO if options.verbose else logging.WARNING
    logging.basicConfig(level=level, format="%(name)s: %(message)s", stream=sys.stderr)
    try:
        return options.run(options)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of stdout has gone, as in `mllama generate | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (
        OSError,
        ValueError,
        TypeError,
        RuntimeError,
        NotImplementedError,
        ImportError,
    ) as error:
        if options.verbose:
            logging.getLogger("mllama").exception("failed")
        print(f"mllama {options.command}: {error}", file=sys.stderr)
        return 1
