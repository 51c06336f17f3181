"""The command ``mllama``: picks a subcommand and turns errors into exit codes.

Exit codes: 0 done, 1 failed, 2 misused, 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import logging
import os
import sys
from collections.abc import Iterator

from jinja2 import TemplateError

from mllama.commands import ranks
from mllama.commands.usage import UsageError
from mllama.parallel.member import Member
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


_INTERRUPTED = 130


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
        sub.set_defaults(run=module.run, **ranks.ALONE)
    return parser


def main(arguments: list[str] | None = None) -> int:
    try:
        member = Member.of_environment()
        if member is not None:
            member.end_with_parent()
        with _first_alone(member):
            options = build_parser().parse_args(arguments)
    except (
        ValueError
    ) as error:  # MLLAMA_KERNELS_* of the environment, read when the kernels are loaded, and ranks
        print(f"mllama: {message(str(error))}", file=sys.stderr)
        return 1
    _log(options.verbose, member)
    errors = sys.stderr
    if member is not None:
        member.keep_quiet()
    code, reason = _run(options, member, arguments)
    if reason is None:
        return code
    number = f"rank {member.rank}: " if member is not None and member.rank else ""
    text = reason and f"mllama {options.command}: {number}{reason}"
    if code == _INTERRUPTED and not reason:
        # The first rank is told by a terminal; of another, told alone, the launcher speaks.
        text, reason = ("", "interrupted") if number else ("interrupted", "")
    if member is None:
        if text:
            print(text, file=errors)
        return code
    member.fail(code, reason, text, errors)


@contextlib.contextmanager
def _first_alone(member: Member | None) -> Iterator[None]:
    """What all of several ranks would print, as of arguments that are wrong, is printed by the first."""
    if member is None or member.rank == 0:
        yield
        return
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def _log(is_verbose: bool, member: Member | None) -> None:
    """Log to stderr; the first of several ranks says what all would say."""
    others = member is not None and member.rank > 0
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        _Escaped(
            f"rank {member.rank}: %(name)s: %(message)s" if others else "%(name)s: %(message)s"
        )
    )
    level = logging.INFO if is_verbose else logging.ERROR if others else logging.WARNING
    logging.basicConfig(level=level, handlers=[handler])


def _run(
    options: argparse.Namespace, member: Member | None, arguments: list[str] | None
) -> tuple[int, str | None]:
    """The exit code of a command, and why it failed; None where it has not, empty if nobody is to be told."""
    try:
        return ranks.run(options, member, arguments), None
    except UsageError as error:
        return 2, message(str(error))
    except ranks.RanksFailed as error:
        return error.code, message(str(error))
    except KeyboardInterrupt:
        return _INTERRUPTED, ""
    except BrokenPipeError:  # the reader of stdout has gone, as in `mllama generate | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1, ""
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
        return 1, message(str(error))
    except Exception as error:  # what nobody has thought of is an error of one line as well
        if options.verbose:
            logging.getLogger("mllama").exception("failed")
        unexpected = f"unexpected {type(error).__name__}: {message(str(error))}"
        return 1, f"{unexpected} (`mllama -v` shows where)"


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
