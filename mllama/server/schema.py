"""What the bodies of `/v1/chat/completions` and `/v1/completions` may say."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from mllama.server.errors import json_shown
from mllama.server.fields import Body, Integer, Number, Wrong, optional, required
from mllama.server.messages import Message

_NAME = re.compile(r"[A-Za-z0-9_\-.]{1,64}")
_LONGEST_STOP = 1000  # characters
_MOST_STOPS = 16
_MOST_BIASES = 300
_MOST_PROMPTS = 16
_TOKENS = 2**31

# Fields that clients send and that change nothing here.
WITHOUT_EFFECT = frozenset(
    "user metadata store service_tier reasoning_effort prompt_cache_key safety_identifier "
    "prompt_cache_retention verbosity".split()
)
# Fields that would change the answer: the values that ask for nothing, and what to do instead.
_INSTEAD = "response_format says what an answer has to be"
_CALLS = "tools and tool_choice name the functions"
REFUSED: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "chat_template": ((), "the template of the checkpoint is used, never one of a request"),
    "chat_template_kwargs": (({},), "a request sets nothing in the template"),
    "audio": ((), "the model takes text and pictures and answers in text"),
    "modalities": ((["text"],), "the model answers in text"),
    "web_search_options": ((), "nothing is fetched for an answer"),
    "functions": (([],), _CALLS),
    "function_call": (("none",), _CALLS),
    "guided_json": ((), _INSTEAD),
    "guided_regex": ((), _INSTEAD),
    "guided_choice": ((), _INSTEAD),
    "guided_grammar": ((), _INSTEAD),
    "structured_outputs": ((), _INSTEAD),
    "use_beam_search": ((False,), "answers are sampled"),
    "best_of": ((1,), "n says how many answers there are"),
    "echo": ((False,), "an answer does not repeat its prompt"),
    "suffix": (("",), "the model continues a text at its end"),
    "add_generation_prompt": ((True,), "a chat is always answered"),
    "continue_final_message": ((False,), "a chat is always answered by a new message"),
    "truncate_prompt_tokens": ((-1,), "a prompt is answered whole or refused"),
    "prompt_logprobs": ((0,), "logprobs are those of the answer"),
}


class StreamOptions(Body):
    """What a stream holds beside the answer."""

    include_usage: bool | None = optional("true or false")


class JsonSchema(Body):
    """A schema and its name."""

    name: str = required(
        "1 to 64 letters, digits, dashes or underscores", pattern=f"^{_NAME.pattern}$"
    )
    description: str | None = optional("a string")
    strict: bool | None = optional("true or false")
    # `schema` is a method of pydantic's models
    schema_: dict[str, Any] = Field(alias="schema", description="an object, the JSON schema")


class ResponseFormat(Body):
    """What an answer has to be."""

    type: Literal["text", "json_object", "json_schema"] = required(
        "text, json_object or json_schema"
    )
    json_schema: JsonSchema | None = optional("an object with name and schema")

    @model_validator(mode="after")
    def _has_schema(self) -> ResponseFormat:
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("json_schema is missing; expected an object with name and schema")
        return self


class FunctionSpec(Body):
    """A function that may be called."""

    name: str = required(
        "1 to 64 letters, digits, dashes, dots or underscores", pattern=f"^{_NAME.pattern}$"
    )
    description: str | None = optional("a string")
    parameters: dict[str, Any] | None = optional("an object, the JSON schema of the arguments")
    strict: bool | None = optional("true or false")


class Tool(Body):
    """A tool, of which functions are the only kind."""

    type: Literal["function"] = required("function")
    function: FunctionSpec = required("an object with name, description and parameters")


class FunctionName(Body):
    name: str = required("the name of one of tools")


class NamedTool(Body):
    """The tool that has to be called."""

    type: Literal["function"] = required("function")
    function: FunctionName = required("an object with the name of one of tools")


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("#word")]
    | Annotated[NamedTool, Tag("#named")],
    Discriminator(lambda value: "#named" if isinstance(value, (dict, NamedTool)) else "#word"),
]


class Sampling(Body):
    """What both routes take."""

    model: str | None = optional("the name of a model of /v1/models")
    stream: bool | None = optional("true or false")
    stream_options: StreamOptions | None = optional("an object with include_usage")
    max_tokens: Integer | None = optional("an integer from 1 to 2147483647", ge=1, lt=_TOKENS)
    min_tokens: Integer | None = optional("an integer from 0 to 2147483647", ge=0, lt=_TOKENS)
    temperature: Number | None = optional("a number from 0 to 2", ge=0, le=2)
    top_p: Number | None = optional("a number above 0, at most 1", gt=0, le=1)
    top_k: Integer | None = optional(
        "an integer of at least 1, or 0 or -1 for all tokens", ge=-1, lt=_TOKENS
    )
    min_p: Number | None = optional("a number from 0 to 1", ge=0, le=1)
    seed: Integer | None = optional("an integer of 64 bits", ge=-(2**63), lt=2**63)
    stop: list[str] | None = optional("a string or an array of at most 16 strings")
    stop_token_ids: list[Integer] | None = optional("an array of at most 64 token ids")
    ignore_eos: bool | None = optional("true or false")
    n: Integer | None = optional("an integer from 1 to 8", ge=1, le=8)
    logit_bias: dict[str, Number] | None = optional(
        "an object of at most 300 token ids, each with a number from -100 to 100"
    )
    presence_penalty: Number | None = optional("a number from -2 to 2", ge=-2, le=2)
    frequency_penalty: Number | None = optional("a number from -2 to 2", ge=-2, le=2)
    repetition_penalty: Number | None = optional("a number above 0, at most 10", gt=0, le=10)
    response_format: ResponseFormat | None = optional("an object with type")

    @model_validator(mode="before")
    @classmethod
    def _not_refused(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        for name, (neutral, instead) in REFUSED.items():
            if name in cls.model_fields or (given := values.get(name)) is None:
                continue
            if not any(type(given) is type(value) and given == value for value in neutral):
                message = f"{name} is not taken, got {json_shown(given)}: {instead}"
                raise Wrong(message, name)
        return values

    @field_validator("stop", mode="before", json_schema_input_type=str | list[str] | None)
    @classmethod
    def _one_or_more(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("stop")
    @classmethod
    def _stops(cls, value: list[str] | None) -> list[str] | None:
        if value is None:
            return None
        if len(value) > _MOST_STOPS:
            raise ValueError(f"{len(value)} strings are given; expected at most {_MOST_STOPS}")
        if not all(0 < len(text) <= _LONGEST_STOP for text in value):
            raise ValueError(f"each string must have 1 to {_LONGEST_STOP} characters")
        return value

    @field_validator("stop_token_ids")
    @classmethod
    def _ids(cls, value: list[int] | None) -> list[int] | None:
        if value and (len(value) > 64 or not all(0 <= token < _TOKENS for token in value)):
            raise ValueError("expected an array of at most 64 token ids, which are not negative")
        return value

    @field_validator("logit_bias")
    @classmethod
    def _biases(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        if value is None:
            return None
        if len(value) > _MOST_BIASES:
            raise ValueError(f"{len(value)} tokens are given; expected at most {_MOST_BIASES}")
        for key, bias in value.items():
            if not re.fullmatch(r"[0-9]{1,9}", key, re.ASCII):
                raise ValueError(f"a key must be a token id, got {json_shown(key)}")
            if not -100 <= bias <= 100:
                raise ValueError(f"a bias must be a number from -100 to 100, got {bias:g}")
        if len({int(key) for key in value}) != len(value):
            raise ValueError("a token is given twice")
        return value

    @model_validator(mode="after")
    def _fit_together(self) -> Sampling:
        limit = self.longest
        if self.min_tokens and limit is not None and self.min_tokens > limit:
            raise Wrong(
                f"min_tokens is {self.min_tokens} and max_tokens {limit}; expected no more than that",
                "min_tokens",
            )
        if self.form is not None:
            self._check_no_least_length("response_format")
        if self.stream_options is not None and not self.stream:
            raise Wrong(
                "stream_options is given without stream; expected stream to be true",
                "stream_options",
            )
        return self

    def _check_no_least_length(self, form: str) -> None:
        """An answer that has a form ends where that does."""
        for name in ("min_tokens", "ignore_eos"):
            if getattr(self, name):
                raise Wrong(
                    f"{form} asks for an answer that ends by its form, and {name} for one that goes on; "
                    "expected one of them",
                    name,
                )

    @property
    def form(self) -> Mapping[str, Any] | None:
        """The JSON schema that the answer has to be a value of."""
        wanted = self.response_format
        if wanted is None or wanted.type == "text":
            return None
        if wanted.type == "json_object" or wanted.json_schema is None:
            return {"type": "object"}
        return wanted.json_schema.schema_

    @property
    def longest(self) -> int | None:
        """Tokens of an answer, as far as the request says it."""
        return self.max_tokens

    @property
    def answers(self) -> int:
        return self.n or 1

    @property
    def wants_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatRequest(Sampling):
    """The body of /v1/chat/completions."""

    messages: list[Message] = required(
        "an array of 1 to 4096 messages", min_length=1, max_length=4096
    )
    max_completion_tokens: Integer | None = optional(
        "an integer from 1 to 2147483647", ge=1, lt=_TOKENS
    )
    logprobs: bool | None = optional("true or false")
    top_logprobs: Integer | None = optional("an integer from 0 to 20", ge=0, le=20)
    tools: list[Tool] | None = optional("an array of at most 128 tools", max_length=128)
    tool_choice: ToolChoice | None = optional(
        "none, auto, required, or an object that names a function of tools"
    )
    parallel_tool_calls: bool | None = optional("true or false")

    @model_validator(mode="after")
    def _chat_fits_together(self) -> ChatRequest:
        one, other = self.max_tokens, self.max_completion_tokens
        if one is not None and other is not None and one != other:
            raise Wrong(
                f"max_tokens is {one} and max_completion_tokens {other}; expected one of them, or the "
                "same number",
                "max_tokens",
            )
        if self.top_logprobs is not None and not self.logprobs:
            raise Wrong(
                "top_logprobs is given without logprobs; expected logprobs to be true",
                "top_logprobs",
            )
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) != len(names):
            raise Wrong("two tools have the same name; expected names to differ", "tools")
        if isinstance(self.tool_choice, NamedTool):
            if self.tool_choice.function.name not in names:
                name = json_shown(self.tool_choice.function.name)
                raise Wrong(f"tool_choice names {name}, which is not among tools", "tool_choice")
        elif self.tool_choice == "required" and not names:
            raise Wrong("tool_choice is required without tools; expected one", "tool_choice")
        if names and self.tool_choice not in (None, "none", "auto"):
            if self.form is not None:
                raise Wrong(
                    "tool_choice asks for a call and response_format for an answer; expected one of them",
                    "tool_choice",
                )
            self._check_no_least_length("tool_choice")
        elif self.tool_choice != "none" and any(tool.function.strict for tool in self.tools or ()):
            self._check_no_least_length("a strict function")
        return self

    @property
    def longest(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class CompletionRequest(Sampling):
    """The body of /v1/completions: texts or token ids that are continued as they are."""

    prompt: list[str] | list[list[Integer]] = required(
        "a string, an array of token ids, or an array of at most 16 of either"
    )
    logprobs: Integer | None = optional("an integer from 0 to 20", ge=0, le=20)

    @field_validator(
        "prompt",
        mode="wrap",
        json_schema_input_type=str | list[int] | list[str] | list[list[int]],
    )
    @classmethod
    def _prompts(cls, value: Any, handler: Any) -> Any:
        if isinstance(value, str):
            value = [value]
        elif isinstance(value, list) and value and not isinstance(value[0], (str, list)):
            value = [value]
        is_texts = isinstance(value, list) and all(isinstance(p, str) for p in value)
        is_ids = isinstance(value, list) and all(_is_ids(p) for p in value)
        if not (is_texts or is_ids) or not 1 <= len(value) <= _MOST_PROMPTS:
            raise ValueError(
                "expected a string, an array of token ids, or an array of 1 to 16 of either, got "
                f"{json_shown(value)}"
            )
        if not all(value):
            raise ValueError("a prompt is empty; expected a character or a token at least")
        return value


def _is_ids(value: Any) -> bool:
    if not isinstance(value, list):
        return False
    return all(type(token) is int and 0 <= token < _TOKENS for token in value)


def unknown_fields(model: type[Body], value: Mapping[str, Any]) -> list[str]:
    """Names of a body's own entries that the model does not know; they are left out."""
    known = set(model.model_fields) | WITHOUT_EFFECT | REFUSED.keys()
    return [name for name in value if name not in known]
