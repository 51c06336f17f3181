"""Pictures and text to the inputs of the model, and the model's ids back to text."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mllama.checkpoints.checkpoint import read_json
from mllama.checkpoints.hub import resolve_folder
from mllama.processing.batch_feature import BatchFeature, convert_to_tensors
from mllama.processing.chat_template import render_chat_template, template_variables
from mllama.processing.conversation import conversation_images, normalized
from mllama.processing.image_processor import IMAGE_OPTIONS, MllamaImageProcessor
from mllama.processing.image_spans import cross_attention_mask
from mllama.processing.images import nest_images
from mllama.processing.tokenizer import MllamaTokenizer

_TEXT_OPTIONS = (
    "add_special_tokens",
    "padding",
    "truncation",
    "max_length",
    "pad_to_multiple_of",
    "padding_side",
    "return_attention_mask",
)
_IMAGE_OPTIONS = (*IMAGE_OPTIONS, "input_data_format")


class MllamaProcessor:
    """An image processor and a tokenizer under one call.

    Args:
        image_processor: turns pictures into tiles.
        tokenizer: turns text into ids; those of `transformers` work as well.
        chat_template: a jinja2 template; default the tokenizer's, if it has one.
    Raises: ValueError when the tokenizer has no image token.
    """

    def __init__(
        self,
        image_processor: MllamaImageProcessor,
        tokenizer: MllamaTokenizer,
        chat_template: str | None = None,
    ) -> None:
        self.image_processor = image_processor
        self.tokenizer = tokenizer
        self.chat_template = chat_template or getattr(tokenizer, "chat_template", None)
        self.image_token: str = getattr(tokenizer, "image_token", None) or "<|image|>"
        self.image_token_id: int = tokenizer.convert_tokens_to_ids(self.image_token)
        unknown = getattr(tokenizer, "unk_token_id", None)
        if self.image_token_id is None or self.image_token_id == unknown:
            raise ValueError(f"the tokenizer has no image token {self.image_token!r}")
        self.bos_token: str | None = tokenizer.bos_token

    @property
    def model_input_names(self) -> list[str]:
        """Keys of the model's inputs that this processor makes."""
        images = [n for n in self.image_processor.model_input_names if n != "num_tiles"]
        return [*self.tokenizer.model_input_names, *images, "cross_attention_mask"]

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        *,
        return_tensors: str | None = None,
        text_kwargs: Mapping[str, Any] | None = None,
        images_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> BatchFeature:
        """Prepare a batch; everything is checked before a picture is opened.

        The begin-of-text token is put in front of a text that does not hold one, after leading
        image tokens, and the tokenizer is then not asked to add another. (That is the one
        difference from `transformers`, which doubles it with tokenizers that add it themselves;
        add_special_tokens=True asks for that.)

        Args:
            images: as `MllamaImageProcessor.preprocess`: a picture, a list for one sample, or one
                list per sample, [] where it has none.
            text: a prompt or a list of prompts, with one image token per picture.
            return_tensors: "pt", "np", or None (lists and numpy arrays).
            text_kwargs, images_kwargs: options below as dictionaries.
            **options: add_special_tokens, padding, truncation, max_length, pad_to_multiple_of,
                padding_side, return_attention_mask (see `MllamaTokenizer`), and the options of the
                image processor.
        Returns, as far as images and text were given: input_ids and attention_mask (B, L) int64;
            pixel_values (B, N, T, 3, t, t) float32; aspect_ratio_ids (B, N) int64;
            aspect_ratio_mask (B, N, T) int64; cross_attention_mask (B, L, N, T) int64.
        Raises: ValueError when the numbers of texts, image tokens and pictures do not agree, or
            truncation would cut an image token off; TypeError for unknown options; ImageOpenError
            and others for the pictures.
        """
        text_options = _grouped("text_kwargs", _TEXT_OPTIONS, text_kwargs, options)
        image_options = _grouped("images_kwargs", _IMAGE_OPTIONS, images_kwargs, options)
        _refuse_unknown(options)
        if images is None and text is None:
            raise ValueError("give images, text or both")
        samples = None if images is None else nest_images(images)
        data: dict[str, Any] = {}
        if text is not None:
            texts = _text_list(text)
            _check_counts(texts, samples, self.image_token)
            samples = samples if samples and any(samples) else None
            texts = [self.with_bos(t) for t in texts]
            text_options.setdefault("add_special_tokens", self.bos_token is None)
            data.update(self.tokenizer(texts, **text_options))
            self._check_not_cut(texts, data["input_ids"])
        if samples is not None:
            encoded = self.image_processor(samples, **image_options)
            num_tiles = encoded.pop("num_tiles")
            if text is not None:
                data["cross_attention_mask"] = cross_attention_mask(
                    data["input_ids"], num_tiles, self.image_token_id, encoded.pixel_values.shape[2]
                )
            data.update(encoded)
        return convert_to_tensors(data, return_tensors)

    def apply_chat_template(
        self,
        conversation: Sequence[Any],
        chat_template: str | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = False,
        return_dict: bool = False,
        return_tensors: str | None = None,
        processor_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Write a conversation, or a batch of them, as the prompt the model was trained on.

        Args:
            conversation: messages {"role", "content"}, or a list of conversations. Content is a
                string or a list of parts: {"type": "text", "text": ...} and {"type": "image"},
                which with tokenize=True carries the picture under "image", "path", "url" (no
                network) or "base64"; OpenAI's "image_url" parts are understood.
            chat_template: a template instead of the processor's.
            tools, documents, add_generation_prompt, continue_final_message: see
                `mllama.processing.chat_template.render_chat_template`.
            tokenize: return ids instead of text.
            return_dict: with tokenize, return everything `__call__` returns, pictures included.
            return_tensors: "pt", "np" or None.
            processor_kwargs: options for `__call__`.
            **kwargs: variables of the template, such as date_string; names that the template does
                not read and `__call__` knows, such as padding, go there.
        Returns: a string (a list for a batch); with tokenize input_ids, or the whole batch.
        Raises: jinja2.TemplateError for what the template refuses; otherwise as `__call__`.
        """
        template = chat_template or self.chat_template
        if template is None:
            raise ValueError("this processor has no chat template; pass chat_template")
        if not conversation:
            raise ValueError("the conversation is empty")
        batched = isinstance(conversation[0], (list, tuple))
        conversations = [normalized(c) for c in (conversation if batched else [conversation])]
        call_options = dict(processor_kwargs or {})
        reads = template_variables(template)
        for name in [n for n in kwargs if n in (*_TEXT_OPTIONS, *_IMAGE_OPTIONS)]:
            if name not in reads:
                call_options[name] = kwargs.pop(name)
        ignored = sorted(set(kwargs) - reads - set(self.tokenizer.special_tokens_map))
        if ignored:
            raise TypeError(f"neither the template nor the processor knows {ignored[0]!r}")
        prompts = [
            render_chat_template(
                template,
                messages,
                tools=tools,
                documents=documents,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **{**self.tokenizer.special_tokens_map, **kwargs},
            )
            for messages in conversations
        ]
        if not tokenize:
            return prompts if batched else prompts[0]
        images = [conversation_images(messages) for messages in conversations]
        if return_tensors is not None:
            call_options["return_tensors"] = return_tensors
        batch = self(images if any(images) else None, prompts, **call_options)
        return batch if return_dict else batch["input_ids"]

    def with_bos(self, text: str) -> str:
        """The text as it is tokenized: behind leading image tokens begin-of-text, if it holds none."""
        bos, image = self.bos_token, self.image_token
        if bos is None or bos in text:
            return text
        rest = text
        while rest.startswith(image):
            rest = rest[len(image) :]
        return text[: len(text) - len(rest)] + bos + rest

    def decode(self, *args: Any, **kwargs: Any) -> Any:
        """See `MllamaTokenizer.decode`."""
        return self.tokenizer.decode(*args, **kwargs)

    def batch_decode(self, *args: Any, **kwargs: Any) -> list[str]:
        """See `MllamaTokenizer.batch_decode`."""
        return self.tokenizer.batch_decode(*args, **kwargs)

    def post_process_image_text_to_text(
        self,
        generated_outputs: Any,
        skip_special_tokens: bool = True,
        clean_up_tokenization_spaces: bool = False,
        **kwargs: Any,
    ) -> list[str]:
        """Texts of what `generate` returned, (B, L) or (L,), without special tokens."""
        return self.tokenizer.batch_decode(
            generated_outputs,
            skip_special_tokens=skip_special_tokens,
            clean_up_tokenization_spaces=clean_up_tokenization_spaces,
            **kwargs,
        )

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike, **image_options: Any) -> MllamaProcessor:
        """Read the tokenizer, the image processor and the chat template of a folder or hub id.

        The template is the first of: `chat_template` in processor_config.json,
        chat_template.json, chat_template.jinja, `chat_template` in tokenizer_config.json.
        Args: image_options: options of the image processor that override its file.
        Raises: FileNotFoundError or ValueError naming the file.
        """
        folder = resolve_folder(folder)
        image_processor = MllamaImageProcessor.from_pretrained(folder, **image_options)
        tokenizer = MllamaTokenizer.from_pretrained(folder)
        return cls(image_processor, tokenizer, _read_template(folder))

    def save_pretrained(self, folder: str | os.PathLike) -> list[str]:
        """Write everything that `from_pretrained`, and `transformers` 4 and 5, read."""
        folder = Path(folder)
        written = [
            *self.tokenizer.save_pretrained(folder),
            *self.image_processor.save_pretrained(folder),
        ]
        nested = self.image_processor.to_dict()
        files = {
            "processor_config.json": {
                "image_processor": nested,
                "processor_class": "MllamaProcessor",
            }
        }
        if self.chat_template is not None:
            files["chat_template.json"] = {"chat_template": self.chat_template}
            path = folder / "chat_template.jinja"
            path.write_text(self.chat_template, encoding="utf-8")
            written.append(str(path))
        for name, content in files.items():
            text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
            (folder / name).write_text(text, encoding="utf-8")
            written.append(str(folder / name))
        return written

    def __repr__(self) -> str:
        return f"MllamaProcessor({self.image_processor!r}, {self.tokenizer!r})"

    def _check_not_cut(self, texts: list[str], input_ids: list[list[int]]) -> None:
        for i, (text, ids) in enumerate(zip(texts, input_ids)):
            wanted, found = text.count(self.image_token), ids.count(self.image_token_id)
            if wanted != found:
                raise ValueError(
                    f"text[{i}] has {wanted} image tokens and its ids have {found}: max_length "
                    "cuts them off; raise it or shorten the text"
                )


def _text_list(text: str | Sequence[str]) -> list[str]:
    texts = [text] if isinstance(text, str) else list(text)
    for i, item in enumerate(texts):
        if not isinstance(item, str):
            raise TypeError(f"text[{i}] must be a string, got {type(item).__name__}")
    return texts


def _check_counts(texts: list[str], samples: list[list[Any]] | None, image_token: str) -> None:
    tokens = [text.count(image_token) for text in texts]
    if samples is None:
        if any(tokens):
            raise ValueError(f"the texts have {tokens} image tokens, and no picture was given")
        return
    pictures = [len(sample) for sample in samples]
    if tokens != pictures:
        hint = ""
        if sum(tokens) == sum(pictures):
            hint = "; pass one list of pictures per text, [] where a text has none"
        raise ValueError(
            f"the texts have {tokens} image tokens ({image_token}), their pictures number "
            f"{pictures}{hint}"
        )


def _grouped(
    group: str,
    names: tuple[str, ...],
    given: Mapping[str, Any] | None,
    options: dict[str, Any],
) -> dict[str, Any]:
    """Options of one kind, from a dictionary and from keywords; the latter leave `options`."""
    chosen = dict(given or {})
    unknown = sorted(set(chosen) - set(names))
    if unknown:
        raise TypeError(f"unknown option {unknown[0]!r} in {group}; there are {', '.join(names)}")
    for name in [n for n in options if n in names]:
        if name in chosen:
            raise TypeError(f"{name} was given twice, in {group} and as a keyword")
        chosen[name] = options.pop(name)
    return {name: value for name, value in chosen.items() if value is not None}


def _refuse_unknown(options: Mapping[str, Any]) -> None:
    if options:
        known = ", ".join((*_TEXT_OPTIONS, *_IMAGE_OPTIONS))
        raise TypeError(f"unknown option {next(iter(options))!r}; there are {known}")


def _read_template(folder: Path) -> str | None:
    for name in ("processor_config.json", "chat_template.json"):
        path = folder / name
        template = read_json(path).get("chat_template") if path.is_file() else None
        if template is not None:
            if not isinstance(template, str):
                raise ValueError(f"{path}: chat_template must be a string")
            return template
    path = folder / "chat_template.jinja"
    return path.read_text(encoding="utf-8") if path.is_file() else None
