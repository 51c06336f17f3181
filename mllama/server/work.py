"""From the body of a request to what the engine is asked for."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

from mllama.server.errors import RequestError, json_shown
from mllama.server.messages import template_messages
from mllama.server.pictures import Pictures
from mllama.server.protocol import Grammar, Options, ToolUse, Work
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


async def chat_work(request: ChatRequest, settings: Settings, pictures: Pictures) -> Work:
    """Raises: RequestError for a picture that cannot be had."""
    messages, links = template_messages(request.messages, settings.system_with_images)
    top = (request.top_logprobs or 0) if request.logprobs else None
    return Work(
        key=_key(),
        options=_options(request, settings, top),
        messages=messages,
        pictures=await pictures.read(links),
        tool_use=_tool_use(request),
    )


def completion_works(request: CompletionRequest, settings: Settings) -> list[Work]:
    """One for each prompt."""
    options = _options(request, settings, request.logprobs)
    prompts: list[Any] = request.prompt
    return [
        Work(key=_key(), options=options, prompt=p if isinstance(p, str) else tuple(p))
        for p in prompts
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
        grammar=_grammar(request),
    )


def _grammar(request: Sampling) -> Grammar | None:
    wanted = request.response_format
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object" or wanted.json_schema is None:
        return Grammar("json_object")
    return Grammar("json_schema", wanted.json_schema.schema_)


def _tool_use(request: ChatRequest) -> ToolUse | None:
    choice = request.tool_choice
    if not request.tools or choice == "none":
        return None
    tools = tuple(
        {"type": "function", "function": tool.function.model_dump(exclude_none=True)}
        for tool in request.tools
    )
    parallel = request.parallel_tool_calls is not False
    if isinstance(choice, NamedTool):
        return ToolUse(tools, "named", choice.function.name, parallel)
    return ToolUse(tools, "auto" if choice is None else choice, None, parallel)
