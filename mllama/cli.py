"""The command ``mllama``: picks a subcommand and turns errors into exit codes.

Exit codes: 0 done, 1 failed, 2 misused, 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys

from jinja2 import TemplateError

from mllama.commands.usage import UsageError
from mllama.wording import message

COMMANDS = {
    "demo": "answer questions about an image with the model that ships with the package",
    "generate": "image and prompt to text, streamed",
    "chat": "talk with a model about images",
    "serve": "answer requests of OpenAI's clients, and show a page to try it",
    "ray": "many engines: replicas of the server, or files of requests",
    "finetune": "train adapters, or all weights, on conversations about images",
    "quantize": "write a checkpoint with weights of 8, 6 or 4 bits",
    "verify": "check the kernels on this machine, with your checkpoint",
    "plan": "what a model takes on a device, and what fits",
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
            name, help=summary, description=module.__doc__, formatter_class=_Help
        )
        module.add_arguments(sub)
        sub.set_defaults(run=module.run)
    return parser


def main(arguments: list[str] | None = None) -> int:
    try:
        options = build_parser().parse_args(arguments)
    except (
        ValueError
    ) as error:  # MLLAMA_KERNELS_* of the environment, read when the kernels are loaded
        print(f"mllama: {message(str(error))}", file=sys.stderr)
        return 1
    level = logging.INFO if options.verbose else logging.WARNING
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Escaped("%(name)s: %(message)s"))
    logging.basicConfig(level=level, handlers=[handler])
    try:
        return options.run(options)
    except UsageError as error:
        print(f"mllama {options.command}: {message(str(error))}", file=sys.stderr)
        return 2
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
        TemplateError,
    ) as error:
        if options.verbose:
            logging.getLogger("mllama").exception("failed")
        print(f"mllama {options.command}: {message(str(error))}", file=sys.stderr)
        return 1
    except Exception as error:  # what nobody has thought of is an error of one line as well
        if options.verbose:
            logging.getLogger("mllama").exception("failed")
        text = f"unexpected {type(error).__name__}: {message(str(error))} (`mllama -v` shows where)"
        print(f"mllama {options.command}: {text}", file=sys.stderr)
        return 1


class _Help(argparse.HelpFormatter):
    """Appends the defaults that tell a reader something; where None stands for one, the help names it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default = action.default
        if default is None or default is False or default == [] or default == argparse.SUPPRESS:
            return action.help
        if "%(default)" in (action.help or ""):  # Python 3.10 appends it to --x, --no-x by itself
            return action.help
        return f"{action.help} (default: {'on' if default is True else '%(default)s'})"


class _Escaped(logging.Formatter):
    """Whatever is logged, by other libraries too, with nothing in it that a terminal obeys."""

    def format(self, record: logging.LogRecord) -> str:
        return message(super().format(record))
