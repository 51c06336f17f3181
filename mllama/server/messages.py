"""Messages of a chat: their roles and parts, and the form in which templates take them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Tag, field_validator, model_validator

from mllama.server.errors import RequestError, json_shown
from mllama.server.fields import Body, optional, required
from mllama.strict_json import parse_json

Link = tuple[str, str]  # where the request names a picture, and its address
_ROLES = "system, developer, user, assistant or tool"
_REFUSED_PARTS = ("input_audio", "audio", "audio_url", "video", "video_url", "file", "input_file")
_TEXT_PARTS = ("text", "input_text", "output_text")
_DETAILS = "auto, low or high, without an effect: a picture has as many tiles as it needs"
_MOST_PARTS = 1024
_LONGEST_ARGUMENTS = 2**18  # characters; what is JSON in a string is in no bound of the body's JSON


class ImageUrl(Body):
    """A picture's address."""

    url: str = required("a data: URL of a picture", min_length=1)
    detail: str | None = optional(_DETAILS)


class Part(Body):
    """A piece of a message: a text or a picture."""

    type: str = required("text or image_url")
    text: str | None = optional("a string")
    image_url: (
        Annotated[
            Annotated[str, Tag("#bare")] | Annotated[ImageUrl, Tag("#object")],
            Discriminator(lambda value: "#bare" if isinstance(value, str) else "#object"),
        ]
        | None
    ) = optional("a data: URL of a picture, or an object with it under url")

    @model_validator(mode="after")
    def _has_what_it_says(self) -> Part:
        if self.type in _TEXT_PARTS:
            if self.text is None:
                raise ValueError("a text part needs a string under text")
        elif self.type == "image_url":
            if not self.address:
                raise ValueError("an image_url part needs an address under image_url")
        elif self.type in _REFUSED_PARTS:
            raise ValueError(
                f"a part of the type {self.type} is not taken; the model reads text and pictures, "
                "expected text or image_url"
            )
        elif self.type != "refusal":
            raise ValueError(
                f"the type of a part must be text or image_url, got {json_shown(self.type)}"
            )
        return self

    @property
    def address(self) -> str | None:
        """That of a picture."""
        return self.image_url.url if isinstance(self.image_url, ImageUrl) else self.image_url


class CalledFunction(Body):
    """A function and its arguments, in a turn of the past."""

    name: str = required("a function's name", pattern=r"^[A-Za-z0-9_\-.]{1,64}$")
    arguments: str = required("a string that is a JSON object")

    @field_validator("arguments")
    @classmethod
    def _is_object(cls, value: str) -> str:
        if len(value) > _LONGEST_ARGUMENTS:
            raise ValueError(
                f"the arguments have {len(value)} characters; at most {_LONGEST_ARGUMENTS} are taken"
            )
        try:
            is_object = isinstance(parse_json(value or "{}"), dict)
        except ValueError:
            is_object = False
        if not is_object:
            raise ValueError(f"expected a string that is a JSON object, got {json_shown(value)}")
        return value

    def written(self) -> dict[str, Any]:
        """As templates take it."""
        return {"name": self.name, "arguments": parse_json(self.arguments or "{}")}


class PastCall(Body):
    """A call in a turn of the past."""

    id: str | None = optional("a string")
    type: Literal["function"] = required("function")
    function: CalledFunction = required("an object with name and arguments")


Content = Annotated[
    Annotated[str, Tag("#text")] | Annotated[list[Part], Tag("#parts")],
    Discriminator(lambda value: "#text" if isinstance(value, str) else "#parts"),
]


class Message(Body):
    """A turn."""

    role: Literal["system", "developer", "user", "assistant", "tool"] = required(_ROLES)
    content: Content | None = optional("a string or an array of at most 1024 parts")
    name: str | None = optional("a string")
    tool_calls: list[PastCall] | None = optional("an array of at most 128 calls", max_length=128)
    tool_call_id: str | None = optional("a string")
    # What an answer of another server said before it began, which clients send back; it is left out.
    reasoning_content: str | None = optional("a string")

    @field_validator("content")
    @classmethod
    def _not_too_many(cls, content: Any) -> Any:
        if isinstance(content, list) and len(content) > _MOST_PARTS:
            raise ValueError(f"{len(content)} parts are given; expected at most {_MOST_PARTS}")
        return content

    @model_validator(mode="after")
    def _has_words(self) -> Message:
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"a {self.role} message has no tool_calls; an assistant message may")
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError("content is missing; expected a string or an array of parts")
        return self


def check_length(messages: Sequence[Message], most: int) -> None:
    """Raises: RequestError for messages of more characters together, pictures not counted."""
    count = 0
    for message in messages:
        if isinstance(message.content, list):
            count += sum(len(part.text or "") for part in message.content)
        else:
            count += len(message.content or "")
        count += sum(len(call.function.arguments) for call in message.tool_calls or ())
    if count > most:
        raise RequestError(
            400,
            f"the messages have {count} characters; at most {most} are taken",
            param="messages",
        )


def template_messages(
    messages: list[Message], system_with_images: Literal["fold", "error"]
) -> tuple[tuple[dict[str, Any], ...], list[Link]]:
    """The messages as templates take them, and the pictures' addresses in the order of their parts.

    Args:
        system_with_images: "fold" puts the text of a system message that opens a conversation with pictures
            before the first text of the user's; "error" leaves it, for the template to refuse.
    Raises: RequestError for a picture where no template reads one.
    """
    links: list[Link] = []
    written = [_written(message, i, links) for i, message in enumerate(messages)]
    if links and system_with_images == "fold":
        written = _folded(written)
    return tuple(written), links


def _written(message: Message, index: int, links: list[Link]) -> dict[str, Any]:
    role = "system" if message.role == "developer" else message.role
    entry: dict[str, Any] = {"role": role}
    if isinstance(message.content, list):
        entry["content"] = [
            _written_part(part, role, f"messages[{index}].content[{j}]", links)
            for j, part in enumerate(message.content)
        ]
        if all(part["type"] == "text" for part in entry["content"]):  # as every template takes it
            entry["content"] = "".join(part["text"] for part in entry["content"])
    else:
        entry["content"] = message.content or ""
    if message.tool_calls:
        entry["tool_calls"] = [
            {"id": call.id, "type": "function", "function": call.function.written()}
            for call in message.tool_calls
        ]
    if message.tool_call_id is not None:
        entry["tool_call_id"] = message.tool_call_id
    return entry


def _written_part(part: Part, role: str, where: str, links: list[Link]) -> dict[str, Any]:
    if part.address is not None and part.type == "image_url":
        if role != "user":
            raise RequestError(
                400,
                f"{where} is a picture in a message of the role {role}; expected it in one of the "
                "user",
                param=where,
            )
        links.append((where, part.address))
        return {"type": "image"}
    return {"type": "text", "text": part.text or ""}


def _folded(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without the system messages at its beginning, whose text stands before the user's first."""
    count = next((i for i, m in enumerate(messages) if m["role"] != "system"), len(messages))
    system = "\n\n".join(m["content"] for m in messages[:count] if m["content"].strip())
    rest = messages[count:]
    if not count or not any(message["role"] == "user" for message in rest):
        return messages
    return before_first_text(rest, system) if system else rest


def before_first_text(messages: Sequence[Mapping[str, Any]], text: str) -> list[dict[str, Any]]:
    """A copy of written messages with a text before the first of the user's.

    Raises: RequestError where no message is the user's.
    """
    first = next((i for i, m in enumerate(messages) if m["role"] == "user"), None)
    if first is None:
        message = "no message is one of the user; expected one"
        raise RequestError(400, message, param="messages")
    content = messages[first]["content"]
    if isinstance(content, str):
        content = f"{text}\n\n{content}"
    else:
        at = next((j for j, p in enumerate(content) if p["type"] == "text"), len(content))
        old = content[at]["text"] if at < len(content) else ""
        joined = f"{text}\n\n{old}" if old else text
        content = [*content[:at], {"type": "text", "text": joined}, *content[at + 1 :]]
    written = [dict(message) for message in messages]
    written[first]["content"] = content
    return written
