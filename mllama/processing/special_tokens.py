"""The tokens of a tokenizer: their ids, the names of the special ones, and adding more."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Tokenizer

from mllama.wording import quoted

NAMED = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
EXTRA = ("extra_special_tokens", "additional_special_tokens")  # transformers 5's name, and 4's
NewToken = str | AddedToken


class SpecialTokens:
    """Named and other special tokens of a `tokenizers.Tokenizer`.

    Args:
        backend: the tokenizer proper.
        special_tokens: names to tokens, for instance {"bos_token": "<|begin_of_text|>"}.
        extra_special_tokens: special tokens without a name.
    Raises: ValueError for a token that the backend does not have.
    """

    def __init__(
        self,
        backend: Tokenizer,
        special_tokens: Mapping[str, str],
        extra_special_tokens: Iterable[str] = (),
    ) -> None:
        self.backend_tokenizer = backend
        self.special_tokens_map: dict[str, str] = {}
        self.extra_special_tokens: list[str] = []
        for name, token in special_tokens.items():
            self._set_special_token(name, token)
        for token in extra_special_tokens:
            self._check_token("extra_special_tokens", token)
            self.extra_special_tokens.append(token)

    def __getattr__(self, name: str) -> Any:
        # bos_token, bos_token_id, and so on for every named token; None where one is not set.
        tokens = self.__dict__.get("special_tokens_map", {})
        key = name.removesuffix("_id")
        if key in tokens or key in NAMED:
            token = tokens.get(key)
            wants_id = key != name and token is not None
            return self.backend_tokenizer.token_to_id(token) if wants_id else token
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        key = name.removesuffix("_id")
        if key not in NAMED:
            super().__setattr__(name, value)
        elif key != name and value is not None:  # tokenizer.pad_token_id = 5
            token = self.backend_tokenizer.id_to_token(value)
            if token is None:
                raise ValueError(f"{name} is {value}, which is no token's id")
            self._set_special_token(key, token)
        else:  # tokenizer.pad_token = tokenizer.eos_token
            self._set_special_token(key, value)

    def _set_special_token(self, name: str, token: str | None) -> None:
        if token is None:
            self.special_tokens_map.pop(name, None)
            return
        self._check_token(name, token)
        self.special_tokens_map[name] = token

    def _check_token(self, name: str, token: Any) -> None:
        if not isinstance(token, str) or self.backend_tokenizer.token_to_id(token) is None:
            raise ValueError(
                f"{name} is {quoted(token)}, which the tokenizer does not have; add_special_tokens adds one"
            )

    def __len__(self) -> int:
        return self.backend_tokenizer.get_vocab_size(with_added_tokens=True)

    @property
    def vocab_size(self) -> int:
        """Number of tokens without the added ones."""
        return self.backend_tokenizer.get_vocab_size(with_added_tokens=False)

    @property
    def all_special_tokens(self) -> list[str]:
        """The named special tokens in the order of `NAMED`, then the others, each once."""
        named = self.special_tokens_map
        first = [named[name] for name in NAMED if name in named]
        return list(dict.fromkeys([*first, *named.values(), *self.extra_special_tokens]))

    @property
    def control_tokens(self) -> list[str]:
        """What a text must not become by chance: the special tokens, and those only the backend calls so."""
        added = self.added_tokens_decoder.values()
        return list(
            dict.fromkeys([*(t.content for t in added if t.special), *self.all_special_tokens])
        )

    @property
    def all_special_ids(self) -> list[int]:
        """Ids of `all_special_tokens`."""
        return self.convert_tokens_to_ids(self.all_special_tokens)

    @property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        """Ids to the tokens that were added to the vocabulary, special or not."""
        return self.backend_tokenizer.get_added_tokens_decoder()

    def get_added_vocab(self) -> dict[str, int]:
        """Added tokens and their ids."""
        return {token.content: index for index, token in sorted(self.added_tokens_decoder.items())}

    def get_vocab(self) -> dict[str, int]:
        """All tokens and their ids."""
        return self.backend_tokenizer.get_vocab(with_added_tokens=True)

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> Any:
        """Id of a token, or the list of ids; the unknown token's id, else None, for a stranger."""
        if not isinstance(tokens, str):
            return [self.convert_tokens_to_ids(token) for token in tokens]
        index = self.backend_tokenizer.token_to_id(tokens)
        return self.unk_token_id if index is None else index

    def convert_ids_to_tokens(
        self, ids: int | Iterable[int], skip_special_tokens: bool = False
    ) -> Any:
        """Token of an id, or the list of tokens; None for an id outside the vocabulary."""
        if isinstance(ids, int):
            return self.backend_tokenizer.id_to_token(ids)
        skipped = set(self.all_special_ids) if skip_special_tokens else set()
        kept = [int(index) for index in ids if int(index) not in skipped]
        return [self.backend_tokenizer.id_to_token(index) for index in kept]

    def add_tokens(
        self, new_tokens: NewToken | Sequence[NewToken], special_tokens: bool = False
    ) -> int:
        """Add tokens after the vocabulary; those that it has keep their ids.

        Args:
            new_tokens: a token, or a list of them.
            special_tokens: they are left out where special tokens are skipped in decoding.
        Returns: how many were new. Enlarge the model to `len(tokenizer)` afterwards.
        Raises: TypeError for what is no token.
        """
        tokens = list(new_tokens) if isinstance(new_tokens, (list, tuple)) else [new_tokens]
        for token in tokens:
            if not isinstance(token, (str, AddedToken)):
                raise TypeError(f"a token is a string or an AddedToken, got {type(token).__name__}")
        add = self.backend_tokenizer
        return add.add_special_tokens(tokens) if special_tokens else add.add_tokens(tokens)

    def add_special_tokens(
        self,
        special_tokens_dict: Mapping[str, NewToken | Sequence[NewToken]],
        replace_extra_special_tokens: bool = True,
    ) -> int:
        """Name special tokens, and add those that the vocabulary does not have.

        Args:
            special_tokens_dict: names (bos_token, pad_token, ...) to tokens; "extra_special_tokens" (or
                "additional_special_tokens") to a list of tokens without a name.
            replace_extra_special_tokens: forget the extra ones there were (they stay in the vocabulary).
        Returns: how many were new.
        Raises: ValueError for another name; TypeError for what is no token.
        """
        added = 0
        for name, value in special_tokens_dict.items():
            if name in EXTRA:
                tokens = self._special(name, value, many=True)
                kept = [] if replace_extra_special_tokens else self.extra_special_tokens
                contents = [token.content for token in tokens]
                added += self.add_tokens(tokens, special_tokens=True)
                self.extra_special_tokens = list(dict.fromkeys([*kept, *contents]))
            elif name in NAMED or name in self.special_tokens_map:
                tokens = self._special(name, value, many=False)
                added += self.add_tokens(tokens, special_tokens=True)
                self._set_special_token(name, tokens[0].content)
            else:
                known = ", ".join((*NAMED, EXTRA[0]))
                raise ValueError(f"{quoted(name)} names no special token; there are {known}")
        return added

    @staticmethod
    def _special(name: str, value: Any, many: bool) -> list[AddedToken]:
        values = value if many else [value]
        if not isinstance(values, (list, tuple)) or not all(
            isinstance(token, (str, AddedToken)) for token in values
        ):
            wanted = "a list of strings or AddedTokens" if many else "a string or an AddedToken"
            raise TypeError(f"{name} must be {wanted}, got {quoted(value)}")
        return [
            AddedToken(token, normalized=False, special=True) if isinstance(token, str) else token
            for token in values
        ]
