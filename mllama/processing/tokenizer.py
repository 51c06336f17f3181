"""Text to ids and back: a thin layer over the `tokenizers` package.

The backend does the work; this adds what `tokenizer_config.json` holds (names of special tokens,
padding side, maximum length), padding, truncation and tensors, as `transformers` does them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from tokenizers import Tokenizer

from mllama.limits import OWN_FILES, Limits
from mllama.processing.batch_feature import BatchFeature, convert_to_tensors
from mllama.processing.bounds import check_array
from mllama.processing.encoders import ConfinedEncoder, Encoder, NativeEncoder
from mllama.processing.options import refuse_foreign
from mllama.processing.plain_text import well_formed
from mllama.processing.rows import Row, plain_rows, whole_rows
from mllama.processing.special_tokens import NewToken, SpecialTokens
from mllama.processing.templates import Templates
from mllama.processing.tokenizer_files import UNLIMITED, read_tokenizer, write_tokenizer
from mllama.wording import quoted

_FILLS = {"special_tokens_mask": 1, "offset_mapping": (0, 0)}  # of padding; 0 for the others


class MllamaTokenizer(SpecialTokens):
    """A `tokenizers.Tokenizer` with named special tokens, padding and truncation.

    Args:
        backend: the tokenizer proper; its own padding and truncation settings are switched off.
        special_tokens: names to tokens, for instance {"bos_token": "<|begin_of_text|>"}.
        extra_special_tokens: special tokens without a name.
        model_max_length: length that truncation=True cuts to.
        padding_side, truncation_side: "right" or "left".
        split_special_tokens: read special tokens in texts as plain text, unless a call says otherwise.
        chat_template: a jinja2 template, or named ones, see `mllama.processing.templates`.
        config: other entries of tokenizer_config.json, kept for `save_pretrained`.
        confined: encode and decode in a process of its own, within limits, see `mllama.processing.encoders`.
        name: of the tokenizer's file, for errors.
    Raises: ValueError for a special token that the backend does not have, or a wrong side.
    """

    model_input_names: ClassVar[list[str]] = ["input_ids", "attention_mask"]

    def __init__(
        self,
        backend: Tokenizer,
        special_tokens: Mapping[str, str],
        *,
        extra_special_tokens: Iterable[str] = (),
        model_max_length: int = UNLIMITED,
        padding_side: str = "right",
        truncation_side: str = "right",
        split_special_tokens: bool = False,
        chat_template: Templates | None = None,
        config: Mapping[str, Any] | None = None,
        confined: bool = False,
        name: str = "this processor",
    ) -> None:
        backend.no_padding()
        backend.no_truncation()
        super().__init__(backend, special_tokens, extra_special_tokens)
        self.model_max_length = model_max_length
        self.padding_side = _checked_side("padding_side", padding_side)
        self.truncation_side = _checked_side("truncation_side", truncation_side)
        self.split_special_tokens = split_special_tokens
        self.chat_template = chat_template
        self.config = dict(config or {})
        self._confined, self._name = confined, name
        self._encoders: tuple[Any, dict[bool, Encoder]] = (None, {})

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        add_special_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_tensors: str | None = None,
        return_attention_mask: bool | None = None,
        return_token_type_ids: bool | None = None,
        return_special_tokens_mask: bool = False,
        return_offsets_mapping: bool = False,
        return_length: bool = False,
        split_special_tokens: bool | None = None,
        escape_mark: str | None = None,
        limits: Limits = OWN_FILES,
        **others: Any,
    ) -> BatchFeature:
        """Tokenise one text or a batch.

        Args:
            text: a string, or a list of them; lone surrogates count as U+FFFD.
            add_special_tokens: let the tokenizer's post-processor add what it adds (for Llama 3,
                bos in front).
            padding: False or "do_not_pad"; True or "longest" of the batch; "max_length".
            truncation: None or False or "do_not_truncate"; True, "longest_first" or "only_first":
                cut to `max_length`. With `max_length` and neither padding nor truncation given, it
                cuts.
            max_length: tokens, special ones included; default `model_max_length`.
            pad_to_multiple_of: pad up to a multiple of this.
            padding_side: "right" or "left" instead of the tokenizer's.
            return_tensors: "pt", "np", or None for lists.
            return_attention_mask: also return attention_mask; False leaves it out.
            return_token_type_ids: also return token_type_ids, zeros for one text per row.
            return_special_tokens_mask: also return special_tokens_mask, 1 on what `add_special_tokens`
                and padding added.
            return_offsets_mapping: also return offset_mapping, (begin, end) of every token in its text.
            return_length: also return length, of every row, padding included.
            split_special_tokens: read special tokens in the text as plain text.
            escape_mark: a character that is left out of the text; a special token that it stands in is
                plain text. Offsets do not count it.
            limits: how many tokens may be asked for, see `mllama.limits`.
            **others: other arguments of `transformers`' tokenizers, where they change nothing.
        Returns: input_ids and attention_mask, (B, L) int64 where tensors; for one text and
            return_tensors=None plain lists without the batch axis.
        Raises: TypeError for a text of another kind; ValueError for unknown strategies, padding
            without a pad token or beyond a limit, rows of unequal length where a tensor is wanted, and for
            options of `transformers` that are not had here.
        """
        refuse_foreign(others)
        texts = [text] if isinstance(text, str) else list(text)
        for i, item in enumerate(texts):
            if not isinstance(item, str):
                raise TypeError(f"text[{i}] must be a string, got {type(item).__name__}")
        if not texts:
            raise ValueError("text is an empty list")
        if max_length is not None and padding is False and truncation is None:
            truncation = True
        lengths_asked = {
            "padding": padding,
            "max_length": max_length,
            "pad_to_multiple_of": pad_to_multiple_of,
        }
        check_lengths(lengths_asked, self.model_max_length, limits)
        limit = self._truncation_limit(truncation, max_length)
        split = self.split_special_tokens if split_special_tokens is None else split_special_tokens
        texts = [well_formed(item) for item in texts]
        made = self._rows(texts, add_special_tokens, split, escape_mark)
        if limit is not None:
            made = [row.truncated(limit, self.truncation_side) for row in made]
        rows: dict[str, list[Any]] = {"input_ids": [row.input_ids for row in made]}
        if return_token_type_ids:
            rows["token_type_ids"] = [row.token_type_ids for row in made]
        if return_attention_mask is not False:
            rows["attention_mask"] = [[1] * len(row.input_ids) for row in made]
        if return_special_tokens_mask:
            rows["special_tokens_mask"] = [row.special_tokens_mask for row in made]
        if return_offsets_mapping:
            rows["offset_mapping"] = [row.offset_mapping for row in made]
        target = self._padded_length(padding, max_length, rows["input_ids"])
        if target is not None:
            if pad_to_multiple_of:
                target = -(-target // pad_to_multiple_of) * pad_to_multiple_of
            shape = (len(made), target)
            check_array("the padded batch", shape, "max_mask_values", limits.max_mask_values)
            side = _checked_side("padding_side", padding_side or self.padding_side)
            fills = {**_FILLS, "input_ids": self._pad_id()}
            for name, row in rows.items():
                fill = fills.get(name, 0)
                rows[name] = [_pad(r, target, fill, side) for r in row]
        lengths = [len(row) for row in rows["input_ids"]]
        if isinstance(text, str) and return_tensors is None:
            single = {name: row[0] for name, row in rows.items()}
            return BatchFeature({**single, "length": lengths} if return_length else single)
        if return_length:
            rows["length"] = lengths
        return convert_to_tensors(rows, return_tensors)

    def add_tokens(
        self, new_tokens: NewToken | Sequence[NewToken], special_tokens: bool = False
    ) -> int:
        """See `SpecialTokens.add_tokens`."""
        if self._confined:  # a normalizer that is not known sees them there before it does here
            given = new_tokens if isinstance(new_tokens, (list, tuple)) else [new_tokens]
            contents = [getattr(token, "content", token) for token in given]
            self._encoder().encode_batch([t for t in contents if isinstance(t, str)], False)
        return super().add_tokens(new_tokens, special_tokens)

    def encode(self, text: str, **options: Any) -> Any:
        """Ids of one text; options as those of a call."""
        return self(text, **options).input_ids

    def decode(
        self,
        token_ids: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> str | list[str]:
        """Text of a sequence of ids; a list of texts for a batch.

        Args:
            token_ids: an id, a list, an array or a tensor, of one or two dimensions.
            skip_special_tokens: leave out tokens that the backend marks as special.
            clean_up_tokenization_spaces: accepted and without effect, as in `transformers` 5:
                byte-level BPE decodes to the very text, and cleaning would damage it.
        """
        if isinstance(token_ids, (np.ndarray, torch.Tensor)):
            token_ids = token_ids.tolist()
        if isinstance(token_ids, int):
            token_ids = [token_ids]
        if len(token_ids) and isinstance(token_ids[0], (list, tuple, np.ndarray, torch.Tensor)):
            return [self.decode(row, skip_special_tokens) for row in token_ids]
        ids = [int(index) for index in token_ids]
        return self._encoder().decode(ids, skip_special_tokens)

    def batch_decode(
        self,
        sequences: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> list[str]:
        """As `decode`, and always a list."""
        text = self.decode(sequences, skip_special_tokens, clean_up_tokenization_spaces)
        return [text] if isinstance(text, str) else text

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike, **options: Any) -> MllamaTokenizer:
        """Read the tokenizer of a folder or hub id: tokenizer.json, or Meta's tokenizer.model; or of a GGUF
        file.

        Nothing that the files name is imported or run. A tokenizer.json with parts that are not known
        (patterns above all) encodes and decodes in a process of its own; what goes beyond its limits is a
        ValueError.

        Args:
            **options: arguments of the class and names of special tokens that override the files; and as
                `transformers` takes them token, revision, cache_dir, local_files_only, force_download,
                subfolder, use_fast, trust_remote_code.
        Raises: FileNotFoundError or ValueError naming the file; TypeError for an unknown option.
        """
        arguments = read_tokenizer(folder, options)
        extra = arguments.pop("extra_special_tokens")
        tokenizer = cls(**arguments)
        if extra:  # those that the vocabulary does not have are added, as transformers does
            tokenizer.add_special_tokens({"extra_special_tokens": extra})
        return tokenizer

    def save_pretrained(self, folder: str | os.PathLike) -> list[str]:
        """Write the files that `from_pretrained`, and `transformers` 4 and 5, read."""
        return write_tokenizer(self, Path(folder))

    def __repr__(self) -> str:
        return f"MllamaTokenizer({len(self)} tokens, {self.special_tokens_map})"

    def _truncation_limit(
        self, truncation: bool | str | None, max_length: int | None
    ) -> int | None:
        if truncation in (None, False, "do_not_truncate"):
            return None
        if truncation not in (True, "longest_first", "only_first"):
            raise ValueError(
                f"truncation must be a bool or longest_first, got {quoted(truncation)}"
            )
        limit = self.model_max_length if max_length is None else max_length
        return None if limit >= UNLIMITED else limit

    def _rows(self, texts: list[str], special: bool, split: bool, mark: str | None) -> list[Row]:
        if not split and mark is None:
            return whole_rows(self._encoder(), texts, special)
        known = {token: self.convert_tokens_to_ids(token) for token in self.control_tokens}
        known = {token: index for token, index in known.items() if token != self.unk_token}
        plain = self._encoder(plain=True)
        return plain_rows(self._encoder(), plain, texts, special, known, split, mark or "")

    def _encoder(self, plain: bool = False) -> Encoder:
        """The tokenizer, or a copy that reads special tokens as text: other threads use it as it is."""
        state = len(self), self.all_special_tokens
        if self._encoders[0] != state:  # tokens were added or named
            self._encoders = state, {}
        made = self._encoders[1]
        if plain not in made:
            made[plain] = self._made_encoder(plain)
        return made[plain]

    def _made_encoder(self, plain: bool) -> Encoder:
        backend = self.backend_tokenizer
        if plain:
            backend = Tokenizer.from_str(backend.to_str())
            backend.add_special_tokens(self.control_tokens)  # named ones may be marked as ordinary
            backend.encode_special_tokens = True
        if self._confined:
            return ConfinedEncoder(backend.to_str(), self._name, plain)
        return NativeEncoder(backend, self._name)

    def _padded_length(
        self, padding: bool | str, max_length: int | None, rows: list[list[int]]
    ) -> int | None:
        if padding in (False, "do_not_pad"):
            return None
        if padding in (True, "longest"):
            return max(len(row) for row in rows)
        if padding == "max_length":
            limit = self.model_max_length if max_length is None else max_length
            return None if limit >= UNLIMITED else limit
        raise ValueError(
            f'padding must be a bool, "longest" or "max_length", got {quoted(padding)}'
        )

    def _pad_id(self) -> int:
        if self.pad_token_id is None:
            raise ValueError("padding needs a pad_token, and this tokenizer has none")
        return self.pad_token_id


def check_lengths(options: Mapping[str, Any], model_max_length: int, limits: Limits) -> None:
    """The options that say how long rows become, by name.

    Raises: TypeError or ValueError naming the option.
    """
    for name, least in (("max_length", 0), ("pad_to_multiple_of", 1)):
        value = options.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an integer, got {quoted(value)}")
        if not least <= value <= limits.max_tokens and value < UNLIMITED:
            raise ValueError(
                f"{name} must be {least} to {limits.max_tokens} (max_tokens), got {quoted(value)}"
            )
    is_own = options.get("max_length") is None and options.get("padding") == "max_length"
    if is_own and limits.max_tokens < model_max_length < UNLIMITED:
        raise ValueError(
            f"padding='max_length' asks for the tokenizer's model_max_length, {model_max_length}; at most "
            f"{limits.max_tokens} tokens are taken (max_tokens)"
        )


def _checked_side(name: str, side: str) -> str:
    if side not in ("right", "left"):
        raise ValueError(f'{name} must be "right" or "left", got {quoted(side)}')
    return side


def _pad(row: list[Any], length: int, fill: Any, side: str) -> list[Any]:
    padding = [fill] * (length - len(row))
    return padding + row if side == "left" else row + padding
