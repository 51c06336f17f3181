"""Many engines on Ray: replicas of the server behind one address, or files of requests."""

from __future__ import annotations

import argparse

from mllama.commands import ray_batch, ray_serve

_ACTIONS = {
    "serve": (ray_serve, "replicas of `mllama serve` behind one address"),
    "batch": (ray_batch, "answer files of requests with many engines"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, (module, summary) in _ACTIONS.items():
        action = actions.add_parser(
            name,
            help=summary,
            description=module.__doc__,
            formatter_class=parser.formatter_class,
        )
        module.add_arguments(action)


def run(options: argparse.Namespace) -> int:
    return _ACTIONS[options.action][0].run(options)
