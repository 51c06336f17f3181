"""From the body of a request to what the engine is asked for."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mllama.engine.interface import Options
from mllama.server.call_prompts import with_functions
from mllama.server.called import ToolUse
from mllama.server.errors import RequestError, json_shown
from mllama.server.held import Forms
from mllama.server.messages import Link, check_length, template_messages
from mllama.server.pictures import Pictures
from mllama.server.protocol import Work
from mllama.server.schema import ChatRequest, CompletionRequest, NamedTool, Sampling
from mllama.server.settings import Settings


def check_model(name: str | None, settings: Settings) -> str:
    """The model's name, the first where a request gives none. Raises: RequestError with 404."""
    if name is None:
        return settings.models[0]
    if name not in settings.models:
        known = ", ".join(settings.models)
        message = f"there is no model {json_shown(name)} here; expected {known}"
        raise RequestError(404, message, param="model", code="model_not_found")
    return name


@dataclass(frozen=True)
class Written:
    """A conversation as the template takes it.

    Attributes:
        tools: the functions that are left for the template to write.
        links: to the pictures, in the order of their parts.
        use: the functions that may be called.
    """

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...]
    links: Sequence[Link]
    use: ToolUse | None


@dataclass(frozen=True)
class Asked:
    """What the engine is asked for, and the calls that its answers are read for."""

    work: Work
    tool_use: ToolUse | None = None


class Preparation:
    """Makes work of requests.

    Args:
        template_writes_calls: see `call_prompts.with_functions`.
    """

    def __init__(
        self, settings: Settings, pictures: Pictures, forms: Forms, template_writes_calls: bool
    ) -> None:
        self._settings = settings
        self._pictures = pictures
        self._forms = forms
        self._template_writes_calls = template_writes_calls

    def written(self, request: ChatRequest) -> Written:
        """Takes time where there is much of it. Raises: RequestError for what no template takes."""
        check_length(request.messages, self._settings.limits.max_text)
        messages, links = template_messages(request.messages, self._settings.system_with_images)
        use = _tool_use(request)
        tools: tuple[Mapping[str, Any], ...] = use.tools if use else ()
        messages, tools = with_functions(messages, tools, self._template_writes_calls)
        return Written(messages, tools, links, use)

    async def chat(
        self, request: ChatRequest, written: Written, take: Callable[[int], None]
    ) -> list[Asked]:
        """What the one answer is made of.

        Args:
            take: see `Pictures.read`.
        Raises: RequestError for a picture that cannot be had; Refused for a form that none can have.
        """
        top = (request.top_logprobs or 0) if request.logprobs else None
        work = Work(
            key=_key(),
            options=_options(request, self._settings, top),
            messages=written.messages,
            tools=written.tools,
            constraint=await self._forms.constraint(request, written.use),
            pictures=await self._pictures.read(written.links, take),
        )
        return [Asked(work, written.use)]

    async def completions(self, request: CompletionRequest) -> list[Asked]:
        """One for each prompt. Raises: Refused for a form that none can have."""
        options = _options(request, self._settings, request.logprobs)
        constraint = await self._forms.constraint(request, None)
        prompts: list[Any] = request.prompt
        return [
            Asked(
                Work(
                    key=_key(),
                    options=options,
                    prompt=prompt if isinstance(prompt, str) else tuple(prompt),
                    constraint=constraint and constraint.fork(),
                )
            )
            for prompt in prompts
        ]


def _key() -> str:
    return uuid.uuid4().hex


def _options(request: Sampling, settings: Settings, top_logprobs: int | None) -> Options:
    limits = [n for n in (request.longest, settings.max_new_tokens) if n is not None]
    biases: Mapping[str, float] = request.logit_bias or {}
    return Options(
        max_tokens=min(limits, default=None),
        min_tokens=request.min_tokens or 0,
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=settings.top_k if request.top_k is None else max(request.top_k, 0),
        min_p=request.min_p,
        repetition_penalty=request.repetition_penalty,
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        logit_bias={int(token): bias for token, bias in biases.items()},
        seed=request.seed,
        stop=tuple(request.stop or ()),
        stop_token_ids=tuple(request.stop_token_ids or ()),
        ignore_eos=bool(request.ignore_eos),
        n=request.answers,
        top_logprobs=top_logprobs,
    )


def _tool_use(request: ChatRequest) -> ToolUse | None:
    choice = request.tool_choice
    if not request.tools or choice == "none":
        return None
    tools = tuple(
        {
            "type": "function",
            "function": tool.function.model_dump(exclude_none=True, exclude={"strict"}),
        }
        for tool in request.tools
    )
    strict = any(tool.function.strict for tool in request.tools)
    parallel = request.parallel_tool_calls is not False
    if isinstance(choice, NamedTool):
        return ToolUse(tools, "named", choice.function.name, parallel, strict)
    return ToolUse(tools, "auto" if choice is None else choice, None, parallel, strict)
