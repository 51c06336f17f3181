"""Whether texts and their ids have an image token for every image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mllama.wording import quoted


def check_image_tokens(
    texts: Sequence[str],
    samples: Sequence[Sequence[Any]] | None,
    image_token: str,
    could_escape: bool,
) -> None:
    """Compare texts with the images of each; None for no images.

    Args:
        could_escape: image tokens in somebody's words would be plain text if the caller asked for that.
    Raises: ValueError.
    """
    tokens = [text.count(image_token) for text in texts]
    counts = [0] * len(tokens) if samples is None else [len(sample) for sample in samples]
    if tokens == counts:
        return
    hint = ""
    if sum(tokens) == sum(counts):
        hint = "; pass one list of images per text, [] where a text has none"
    elif sum(tokens) > sum(counts) and could_escape:
        hint = "; escape_special_tokens=True makes those in somebody's words plain text"
    if samples is None:
        raise ValueError(
            f"the texts have {quoted(tokens)} image tokens, and no image was given{hint}"
        )
    raise ValueError(
        f"the texts have {quoted(tokens)} image tokens ({image_token}), their images number "
        f"{quoted(counts)}{hint}"
    )


def check_not_cut(
    texts: Sequence[str], input_ids: Sequence[Sequence[int]], image_token: str, image_token_id: int
) -> None:
    """Raises: ValueError when truncation has cut image tokens off."""
    for i, (text, ids) in enumerate(zip(texts, input_ids)):
        wanted, found = text.count(image_token), list(ids).count(image_token_id)
        if wanted != found:
            raise ValueError(
                f"text[{i}] has {wanted} image tokens and its ids have {found}: max_length "
                "cuts them off; raise it or shorten the text"
            )
