"""Conversations as token ids, with what the assistant says as labels."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllama.loss import IGNORED
from mllama.processing.plain_text import check_marked
from mllama.processing.processor import MllamaProcessor
from mllama.wording import reason

from .conversations import Conversation, read_each

_MARKS = ("0", "1")  # they differ in their first and in their last character
# Of one conversation: it is written anew for every turn of the assistant.
_MOST_TURNS, _MOST_WRITTEN = 1000, 10**8  # turns; characters in all


@dataclass(frozen=True)
class Example:
    """A conversation ready for the model; its images are opened when its turn comes.

    Attributes:
        line: of the data file.
        input_ids, labels: of equal length; labels are IGNORED but on the assistant's tokens.
        images: in the order of the image tokens; what is no path is open already.
        folder: that those have to be inside of.
        texts: the tokens of each, where it has several conversations; else empty.
    """

    line: int
    input_ids: list[int]
    labels: list[int]
    images: list[Any]
    folder: Path
    texts: tuple[int, ...] = ()


def read_examples(
    path: Path,
    processor: MllamaProcessor,
    max_length: int,
    *,
    escape_special_tokens: bool = True,
    folder: Path | None = None,
) -> list[Example]:
    """The conversations of a data file, encoded.

    Args:
        max_length: tokens of the longest that is taken.
        escape_special_tokens: see `encode`.
        folder: that images have to be inside of; None: that of the file.
    Raises: DataError with every fault: those of the file and its images, conversations that the chat
        template refuses, and those longer than ``max_length`` tokens.
    """

    longest = max(map(len, processor.tokenizer.get_vocab()), default=1)

    def example(conversation: Conversation) -> Example:
        if (count := _characters(conversation.messages)) > max_length * longest:
            raise ValueError(
                f"{count} characters, which are more than the {max_length} tokens that are taken"
            )
        if (count := len(conversation.images)) > max_length:
            raise ValueError(f"{count} images, which are more than the {max_length} tokens taken")
        encoded = encode(processor, conversation, escape_special_tokens)
        if len(encoded.input_ids) > max_length:
            raise ValueError(f"{len(encoded.input_ids)} tokens, at most {max_length} are taken")
        return encoded

    return read_each(path, example, folder)


def encode(
    processor: MllamaProcessor, conversation: Conversation, escape_special_tokens: bool = True
) -> Example:
    """The ids that the model is given when it is asked, and after those the ones it is to answer with.

    The text is cut where the assistant begins and ends, and each piece tokenized by itself, as in use:
    there the prompt is tokenized before there is an answer. The token that ends a turn is learned too.

    Args:
        escape_special_tokens: special tokens in the words of a message are plain text, as they are where the
            model is used; else they are learned as what the template itself writes.
    Raises: ValueError for a conversation that the template does not write as it is.
    """
    messages, mark = conversation.messages, None
    turns = sum(message["role"] == "assistant" for message in messages)
    if turns > _MOST_TURNS or turns * _characters(messages) > _MOST_WRITTEN:
        raise ValueError(
            f"{turns} turns of the assistant in {len(messages)} messages; at most {_MOST_TURNS} are "
            f"taken, and fewer of long ones: {_MOST_WRITTEN} characters by all turns"
        )
    if escape_special_tokens:
        messages, mark = processor.with_words_escaped(messages)
    try:
        text, spans = _assistant_spans(processor, messages)
    except ValueError:
        raise
    except Exception as error:  # what a template raises is its own choice
        raise ValueError(f"the chat template refuses it: {reason(error)}") from error
    options: dict[str, Any] = {}
    if mark is not None:
        check_marked(text, mark)
        options["escape_mark"] = mark
    pieces, position = [], 0
    for begin, end in spans:
        pieces += [(text[position:begin], False), (text[begin:end], True)]
        position = end
    ids: list[int] = []
    labels: list[int] = []
    for number, (piece, is_answer) in enumerate(pieces):
        piece = processor.with_bos(piece) if number == 0 else piece
        new = processor.tokenizer([piece], add_special_tokens=False, **options)["input_ids"][0]
        ids += new
        labels += new if is_answer else [IGNORED] * len(new)
    tokens = ids.count(processor.image_token_id)
    if tokens != len(conversation.images):
        raise ValueError(
            f"its text has {tokens} image tokens ({processor.image_token}) for "
            f"{len(conversation.images)} images"
        )
    return Example(conversation.line, ids, labels, conversation.images, conversation.folder)


def _assistant_spans(
    processor: MllamaProcessor, messages: list[dict[str, Any]]
) -> tuple[str, list[tuple[int, int]]]:
    """The conversation as text, and where in it each assistant's turn begins and ends.

    What changes with the words of a message is where those words are, whatever the template.
    """
    text: str = processor.apply_chat_template(messages)
    contents = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        one, other = (
            processor.apply_chat_template(
                [*messages[:i], {**message, "content": mark}, *messages[i + 1 :]]
            )
            for mark in _MARKS
        )
        begin = _first_difference(one, other)
        if begin is None or len(one) != len(other) or one[:begin] != text[:begin]:
            raise ValueError(f"the chat template does not write message {i} as it is")
        contents.append((begin, len(text) - (len(one) - begin - 1)))
    ending = text[contents[-1][1] :]
    spans = []
    for begin, end in contents:
        if not ending or not text.startswith(ending, end):
            raise ValueError("the chat template does not end every turn of the assistant alike")
        spans.append((begin, end + len(ending)))
    return text, spans


def _characters(messages: list[dict[str, Any]]) -> int:
    """How many characters the texts of the messages have."""
    contents = [message["content"] for message in messages]
    texts = [content for content in contents if isinstance(content, str)]
    parts = [part for content in contents if not isinstance(content, str) for part in content]
    return sum(map(len, texts)) + sum(len(part.get("text", "")) for part in parts)


def _first_difference(one: str, other: str) -> int | None:
    """Where two texts differ first; None where one of them begins with the other."""
    same, end = (
        0,
        min(len(one), len(other)),
    )  # they agree up to `same`, and differ before `end` if at all
    if one[:end] == other[:end]:
        return None
    while end - same > 1:
        middle = (same + end) // 2
        if one[same:middle] == other[same:middle]:
            same = middle
        else:
            end = middle
    return same
