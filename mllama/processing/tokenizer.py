"""Text to ids and back: a thin layer over the `tokenizers` package.

The backend does the work; this adds what `tokenizer_config.json` holds (names of special tokens,
padding side, maximum length), padding, truncation and tensors, as `transformers` does them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from tokenizers import Encoding, Tokenizer

from mllama.checkpoints.checkpoint import read_json
from mllama.checkpoints.hub import resolve_folder
from mllama.processing.batch_feature import BatchFeature, convert_to_tensors

_UNLIMITED = int(1e30)  # what transformers writes where no maximum length is known
_NAMED = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
# Entries of a tokenizer_config.json that are written anew, or that name code or files.
_NOT_KEPT = ("added_tokens_decoder", "auto_map", "backend", "chat_template", "tokenizer_file")


class MllamaTokenizer:
    """A `tokenizers.Tokenizer` with named special tokens, padding and truncation.

    Args:
        backend: the tokenizer proper; its own padding and truncation settings are switched off.
        special_tokens: names to tokens, for instance {"bos_token": "<|begin_of_text|>"}.
        model_max_length: length that truncation=True cuts to.
        padding_side, truncation_side: "right" or "left".
        chat_template: a jinja2 template, see `mllama.processing.chat_template`.
        config: further entries of tokenizer_config.json, kept for `save_pretrained`.
    Raises: ValueError for a special token that the backend does not have, or a wrong side.
    """

    model_input_names: ClassVar[list[str]] = ["input_ids", "attention_mask"]

    def __init__(
        self,
        backend: Tokenizer,
        special_tokens: Mapping[str, str],
        *,
        model_max_length: int = _UNLIMITED,
        padding_side: str = "right",
        truncation_side: str = "right",
        chat_template: str | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        backend.no_padding()
        backend.no_truncation()
        self.backend_tokenizer = backend
        self.special_tokens_map: dict[str, str] = {}
        for name, token in special_tokens.items():
            self._set_special_token(name, token)
        self.model_max_length = model_max_length
        self.padding_side = _checked_side("padding_side", padding_side)
        self.truncation_side = _checked_side("truncation_side", truncation_side)
        self.chat_template = chat_template
        self._config = dict(config or {})

    def __getattr__(self, name: str) -> Any:
        # bos_token, bos_token_id, and so on for every named token; None where one is not set.
        tokens = self.__dict__.get("special_tokens_map", {})
        key = name.removesuffix("_id")
        if key in tokens or key in _NAMED:
            token = tokens.get(key)
            wants_id = key != name and token is not None
            return self.backend_tokenizer.token_to_id(token) if wants_id else token
        raise AttributeError(f"MllamaTokenizer has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _NAMED:  # tokenizer.pad_token = tokenizer.eos_token
            self._set_special_token(name, value)
        else:
            super().__setattr__(name, value)

    def _set_special_token(self, name: str, token: str) -> None:
        if not isinstance(token, str) or self.backend_tokenizer.token_to_id(token) is None:
            raise ValueError(f"{name} is {token!r}, which the tokenizer does not have")
        self.special_tokens_map[name] = token

    def __len__(self) -> int:
        return self.backend_tokenizer.get_vocab_size(with_added_tokens=True)

    @property
    def vocab_size(self) -> int:
        """Number of tokens without the added ones."""
        return self.backend_tokenizer.get_vocab_size(with_added_tokens=False)

    @property
    def all_special_ids(self) -> list[int]:
        """Ids of the named special tokens."""
        return [self.backend_tokenizer.token_to_id(t) for t in self.special_tokens_map.values()]

    def get_vocab(self) -> dict[str, int]:
        """All tokens and their ids."""
        return self.backend_tokenizer.get_vocab(with_added_tokens=True)

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> Any:
        """Id of a token, or the list of ids; the unknown token's id, else None, for a stranger."""
        if not isinstance(tokens, str):
            return [self.convert_tokens_to_ids(token) for token in tokens]
        index = self.backend_tokenizer.token_to_id(tokens)
        return self.unk_token_id if index is None else index

    def convert_ids_to_tokens(self, ids: int | Iterable[int]) -> Any:
        """Token of an id, or the list of tokens; None for an id outside the vocabulary."""
        if isinstance(ids, int):
            return self.backend_tokenizer.id_to_token(ids)
        return [self.backend_tokenizer.id_to_token(int(index)) for index in ids]

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
        return_attention_mask: bool = True,
    ) -> BatchFeature:
        """Tokenise one text or a batch.

        Args:
            text: a string, or a list of them.
            add_special_tokens: let the tokenizer's post-processor add what it adds (for Llama 3,
                bos in front).
            padding: False or "do_not_pad"; True or "longest" of the batch; "max_length".
            truncation: None or False or "do_not_truncate"; True, "longest_first" or "only_first":
                cut to `max_length`. With `max_length` and neither padding nor truncation given, it
                cuts.
            max_length: tokens, special ones included; default `model_max_length`.
            pad_to_multiple_of: pad further, to a multiple of this.
            padding_side: "right" or "left" instead of the tokenizer's.
            return_tensors: "pt", "np", or None for lists.
            return_attention_mask: also return attention_mask.
        Returns: input_ids and attention_mask, (B, L) int64 where tensors; for one text and
            return_tensors=None plain lists without the batch axis.
        Raises: TypeError for a text of another kind; ValueError for unknown strategies, padding
            without a pad token, or rows of unequal length where a tensor is wanted.
        """
        texts = [text] if isinstance(text, str) else list(text)
        for i, item in enumerate(texts):
            if not isinstance(item, str):
                raise TypeError(f"text[{i}] must be a string, got {type(item).__name__}")
        if not texts:
            raise ValueError("text is an empty list")
        if max_length is not None and padding is False and truncation is None:
            truncation = True
        limit = self._truncation_limit(truncation, max_length)
        encodings = self._encode(texts, add_special_tokens, limit)
        rows = {"input_ids": [e.ids for e in encodings]}
        rows["attention_mask"] = [[1] * len(ids) for ids in rows["input_ids"]]
        target = self._padded_length(padding, max_length, rows["input_ids"])
        if target is not None:
            side = _checked_side("padding_side", padding_side or self.padding_side)
            for name, fill in (("input_ids", self._pad_id()), ("attention_mask", 0)):
                rows[name] = [_pad(r, target, fill, side, pad_to_multiple_of) for r in rows[name]]
        if not return_attention_mask:
            del rows["attention_mask"]
        if isinstance(text, str) and return_tensors is None:
            return BatchFeature({name: row[0] for name, row in rows.items()})
        return convert_to_tensors(rows, return_tensors)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of one text."""
        return self(text, add_special_tokens=add_special_tokens).input_ids

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
        return self.backend_tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

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
    def from_pretrained(cls, folder: str | os.PathLike) -> MllamaTokenizer:
        """Read tokenizer.json, tokenizer_config.json and special_tokens_map.json of a folder.

        The first must be there. Nothing that the files name is imported or run.
        Raises: FileNotFoundError or ValueError naming the file.
        """
        folder = resolve_folder(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise FileNotFoundError(f"{folder} has no tokenizer.json")
        try:
            backend = Tokenizer.from_file(str(path))
        except Exception as error:  # the Rust side raises bare Exception
            raise ValueError(f"{path} is not a tokenizer: {error}") from None
        config = _optional_json(folder / "tokenizer_config.json")
        special: dict[str, str] = {}
        for source in (_optional_json(folder / "special_tokens_map.json"), config):
            extra = source.get("extra_special_tokens")
            for name, token in {**source, **(extra if isinstance(extra, Mapping) else {})}.items():
                content = _content(token)
                if name.endswith("_token") and content:
                    special[name] = content
        options = {n: config.pop(n) for n in ("padding_side", "truncation_side") if n in config}
        return cls(
            backend,
            special,
            model_max_length=int(config.pop("model_max_length", None) or _UNLIMITED),
            chat_template=_default_template(config.get("chat_template")),
            config={k: v for k, v in config.items() if k not in (*_NOT_KEPT, *special)},
            **options,
        )

    def save_pretrained(self, folder: str | os.PathLike) -> list[str]:
        """Write the files that `from_pretrained`, and `transformers` 4 and 5, read."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "processor_class": "MllamaProcessor",
            "clean_up_tokenization_spaces": False,
            "model_input_names": self.model_input_names,
            **self._config,
            **self.special_tokens_map,
            "model_max_length": self.model_max_length,
            "padding_side": self.padding_side,
            "truncation_side": self.truncation_side,
        }
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        files = {
            "tokenizer_config.json": config,
            "special_tokens_map.json": self.special_tokens_map,
        }
        self.backend_tokenizer.save(str(folder / "tokenizer.json"))
        for name, content in files.items():
            text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
            (folder / name).write_text(text, encoding="utf-8")
        return [str(folder / name) for name in ("tokenizer.json", *files)]

    def __repr__(self) -> str:
        return f"MllamaTokenizer({len(self)} tokens, {self.special_tokens_map})"

    def _truncation_limit(
        self, truncation: bool | str | None, max_length: int | None
    ) -> int | None:
        if truncation in (None, False, "do_not_truncate"):
            return None
        if truncation not in (True, "longest_first", "only_first"):
            raise ValueError(f"truncation must be a bool or longest_first, got {truncation!r}")
        limit = self.model_max_length if max_length is None else max_length
        return None if limit >= _UNLIMITED else limit

    def _encode(self, texts: list[str], special: bool, limit: int | None) -> list[Encoding]:
        encodings = self.backend_tokenizer.encode_batch(texts, add_special_tokens=special)
        if limit is None or all(len(e) <= limit for e in encodings):
            return encodings
        # The special tokens count and stay: cut the text alone, then add them.
        added = self.backend_tokenizer.num_special_tokens_to_add(False) if special else 0
        if limit < added:
            raise ValueError(f"max_length {limit} has no room for the {added} special tokens")
        encodings = self.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
        for encoding in encodings:
            encoding.truncate(limit - added, direction=self.truncation_side)
        return [self.backend_tokenizer.post_process(e, None, special) for e in encodings]

    def _padded_length(
        self, padding: bool | str, max_length: int | None, rows: list[list[int]]
    ) -> int | None:
        if padding in (False, "do_not_pad"):
            return None
        if padding in (True, "longest"):
            return max(len(row) for row in rows)
        if padding == "max_length":
            limit = self.model_max_length if max_length is None else max_length
            return None if limit >= _UNLIMITED else limit
        raise ValueError(f'padding must be a bool, "longest" or "max_length", got {padding!r}')

    def _pad_id(self) -> int:
        if self.pad_token_id is None:
            raise ValueError("padding needs a pad_token, and this tokenizer has none")
        return self.pad_token_id


def _checked_side(name: str, side: str) -> str:
    if side not in ("right", "left"):
        raise ValueError(f'{name} must be "right" or "left", got {side!r}')
    return side


def _pad(row: list[int], length: int, fill: int, side: str, multiple: int | None) -> list[int]:
    if multiple:
        length = -(-length // multiple) * multiple
    padding = [fill] * (length - len(row))
    return padding + row if side == "left" else row + padding


def _content(token: Any) -> str | None:
    content = token.get("content") if isinstance(token, Mapping) else token
    return content if isinstance(content, str) else None


def _default_template(templates: Any) -> str | None:
    """The template, or the one called "default" of a list of named ones."""
    if isinstance(templates, list):
        named = {t.get("name"): t.get("template") for t in templates if isinstance(t, Mapping)}
        templates = named.get("default")
    return templates if isinstance(templates, str) else None


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
