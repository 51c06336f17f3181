"""The tokens of a tokenizer as bytes, which grammars are matched against."""

from __future__ import annotations

from collections.abc import Collection

from mllama.processing.byte_level import is_byte_level, token_bytes
from mllama.processing.tokenizer import MllamaTokenizer


class Vocabulary:
    """What `llguidance.LLTokenizer` reads of a tokenizer, under the names it reads.

    Args:
        tokenizer: a byte-level one, as those of Llama 3.
        size: rows of the output head; a token beyond them is never sampled.
        end_ids: tokens that end an answer.
    Raises: ValueError for a tokenizer whose tokens are no bytes, or without a token that ends an answer.
    """

    bos_token_id = None
    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: MllamaTokenizer, size: int, end_ids: Collection[int]) -> None:
        self.size = size
        self.end_ids = sorted(index for index in end_ids if index < size)
        if not self.end_ids:
            raise ValueError("the checkpoint names no token that ends an answer")
        self.eos_token_id = self.end_ids[0]
        self._backend = tokenizer.backend_tokenizer
        if not is_byte_level(self._backend):
            raise ValueError("the tokenizer is not byte-level, as that of Llama 3 is")
        controls = set(tokenizer.control_tokens)
        added = {i: t for i, t in tokenizer.added_tokens_decoder.items() if i < size}
        self.special_token_ids = sorted(
            {i for i, token in added.items() if token.content in controls} | set(self.end_ids)
        )
        self.tokens = [b""] * size  # a row without a token is never allowed
        for token, index in self._backend.get_vocab(with_added_tokens=False).items():
            if index < size:
                self.tokens[index] = token_bytes(token)
        for index, token in added.items():
            self.tokens[index] = token.content.encode("utf-8")

    def __call__(self, text: bytes | str) -> list[int]:
        """The tokens of what a grammar leaves no choice in."""
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        return self._backend.encode(text, add_special_tokens=False).ids
