"""Answers that are held to a form: the grammar a request asks for, compiled off the event loop."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

from mllama.engine.interface import Refused
from mllama.grammar.compiling import Constraint, GrammarCompiler
from mllama.grammar.forms import Calls, Function, GrammarError, grammar_of
from mllama.server.called import ToolUse
from mllama.server.schema import Sampling

_THREADS = 2


class Forms:
    """Makes the constraints of requests.

    Args:
        compiler: of the model's vocabulary.
    """

    def __init__(self, compiler: GrammarCompiler) -> None:
        self._compiler = compiler
        self._threads = ThreadPoolExecutor(_THREADS, "mllama-grammar")

    async def constraint(self, request: Sampling, use: ToolUse | None) -> Constraint | None:
        """What the answers have to be; None where they are free. Raises: Refused."""
        schema = request.form
        calls = _calls(use, schema is not None)
        if schema is None and calls is None:
            return None

        def compiled() -> Constraint:
            return self._compiler.compile(grammar_of(schema, calls))

        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._threads, compiled)
        except GrammarError as error:
            if use is not None and calls is not None and error.function is not None:
                names = [tool["function"]["name"] for tool in use.tools]
                place = names.index(calls.functions[error.function].name)
                where = f"tools[{place}].function.parameters"
            else:
                where = "tools" if schema is None else "response_format"
            raise Refused(f"{where}: {error}", where) from None


def _calls(use: ToolUse | None, has_schema: bool) -> Calls | None:
    """The calls that a grammar has to know of: not those that may be, or not, with any arguments."""
    if use is None:
        return None
    functions = [tool["function"] for tool in use.tools]
    if use.choice == "auto" and not has_schema and not use.strict:
        return None
    if use.choice == "named":
        functions = [function for function in functions if function["name"] == use.name]
    return Calls(
        tuple(Function(f["name"], f.get("parameters")) for f in functions),
        required=use.choice != "auto",
        several=use.several,
    )
