"""Conversations as token ids, with what the assistant says as labels."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllama.loss import IGNORED
from mllama.processing.processor import MllamaProcessor

from .conversations import Conversation, read_each

_MARKS = ("0", "1")  # they differ in their first and in their last character


@dataclass(frozen=True)
class Example:
    """A conversation ready for the model; its pictures are opened when its turn comes.

    Attributes:
        line: of the data file.
        input_ids, labels: of equal length; labels are IGNORED but on the assistant's tokens.
        images: in the order of the image tokens.
    """

    line: int
    input_ids: list[int]
    labels: list[int]
    images: list[Path]


def read_examples(path: Path, processor: MllamaProcessor, max_length: int) -> list[Example]:
    """The conversations of a data file, encoded.

    Raises: DataError with every fault: those of the file and its pictures, conversations that the chat
        template refuses, and those longer than ``max_length`` tokens.
    """

    def example(conversation: Conversation) -> Example:
        encoded = encode(processor, conversation)
        if len(encoded.input_ids) > max_length:
            raise ValueError(f"{len(encoded.input_ids)} tokens, at most {max_length} are taken")
        return encoded

    return read_each(path, example)


def encode(processor: MllamaProcessor, conversation: Conversation) -> Example:
    """The ids that the model is given when it is asked, and after those the ones it shall answer with.

    The text is cut where the assistant begins and ends, and each piece tokenized by itself, as in use:
    there the prompt is tokenized before there is an answer. The token that ends a turn is learnt too.

    Raises: ValueError for a conversation that the template does not write as it is.
    """
    try:
        text, spans = _assistant_spans(processor, conversation.messages)
    except ValueError:
        raise
    except Exception as error:  # what a template raises is its own choice
        raise ValueError(f"the chat template refuses it: {error}") from error
    pieces, position = [], 0
    for begin, end in spans:
        pieces += [(text[position:begin], False), (text[begin:end], True)]
        position = end
    ids: list[int] = []
    labels: list[int] = []
    for number, (piece, is_answer) in enumerate(pieces):
        piece = processor.with_bos(piece) if number == 0 else piece
        new = processor.tokenizer([piece], add_special_tokens=False)["input_ids"][0]
        ids += new
        labels += new if is_answer else [IGNORED] * len(new)
    tokens = ids.count(processor.image_token_id)
    if tokens != len(conversation.images):
        raise ValueError(
            f"its text has {tokens} image tokens ({processor.image_token}) for "
            f"{len(conversation.images)} pictures"
        )
    return Example(conversation.line, ids, labels, conversation.images)


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
        begin = next((k for k, (a, b) in enumerate(zip(one, other)) if a != b), None)
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
