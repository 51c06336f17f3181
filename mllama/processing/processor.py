"""Images and text to the inputs of the model, and the model's ids back to text."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllama.limits import OWN_FILES, Limits
from mllama.processing.batch_feature import BatchFeature, check_container, convert_to_tensors
from mllama.processing.bounds import (
    check_bytes,
    check_limits,
    check_mask,
    check_samples,
    check_texts,
)
from mllama.processing.conversation import conversation_images
from mllama.processing.image_processor import MllamaImageProcessor
from mllama.processing.image_spans import cross_attention_mask
from mllama.processing.image_tokens import check_image_tokens, check_not_cut
from mllama.processing.images import load_images, nest_images
from mllama.processing.options import CallOptions, call_options, is_option
from mllama.processing.paths import AllowPaths, check_allow_paths
from mllama.processing.plain_text import escaped, unused_marks, well_formed
from mllama.processing.processor_files import read_parts, write_processor
from mllama.processing.prompts import assistant_masks, write_prompts
from mllama.processing.templates import Templates, chosen_template, parsed_templates
from mllama.processing.tokenizer import MllamaTokenizer, check_lengths
from mllama.wording import quoted


@dataclass(frozen=True)
class _Sources:
    """What a call may take in."""

    limits: Limits
    allow_paths: AllowPaths


class MllamaProcessor:
    """An image processor and a tokenizer under one call.

    Args:
        image_processor: turns images into tiles; those of `transformers` work as well.
        tokenizer: turns text into ids; those of `transformers` work as well.
        chat_template: a jinja2 template, or a dict of named ones; default the tokenizer's, if it has one.
    Raises: ValueError when the tokenizer has no image token.
    """

    def __init__(
        self,
        image_processor: MllamaImageProcessor,
        tokenizer: MllamaTokenizer,
        chat_template: Templates | None = None,
    ) -> None:
        self.image_processor = image_processor
        self.tokenizer = tokenizer
        template = chat_template or getattr(tokenizer, "chat_template", None)
        self.chat_template = parsed_templates(template, "the processor")
        self.image_token: str = getattr(tokenizer, "image_token", None) or "<|image|>"
        self.image_token_id: int = tokenizer.convert_tokens_to_ids(self.image_token)
        unknown = getattr(tokenizer, "unk_token_id", None)
        if self.image_token_id is None or self.image_token_id == unknown:
            raise ValueError(f"the tokenizer has no image token {quoted(self.image_token)}")
        self.bos_token: str | None = tokenizer.bos_token

    @classmethod
    def get_attributes(cls) -> list[str]:
        """Names of the parts."""
        return ["image_processor", "tokenizer"]

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
        escape_special_tokens: bool = False,
        limits: Limits | None = None,
        allow_paths: AllowPaths = True,
        **options: Any,
    ) -> BatchFeature:
        """Prepare a batch; everything is checked before an image is opened.

        The begin-of-text token is put in front of a text that does not hold one, after leading
        image tokens, and the tokenizer is then not asked to add another. (That is the one
        difference from `transformers`, which doubles it with tokenizers that add it themselves;
        add_special_tokens=True asks for that.)

        Args:
            images: as `MllamaImageProcessor.preprocess`: an image, a list for one sample, or one
                list per sample, [] where it has none.
            text: a prompt or a list of prompts, with one image token per image. Lone surrogates in
                it become U+FFFD.
            return_tensors: "pt", "np", or None (lists and numpy arrays).
            escape_special_tokens: the texts are somebody's words: special tokens in them, the image
                token too, are encoded as plain text, and the images stand in front. By default the ids
                are those of `transformers`: words that look like control tokens become them, and can end
                a turn or speak for another role. Pass True for words that are not your own.
            limits: bounds of this call, see `mllama.limits`; None: those of the image processor.
            allow_paths: False when no image may be named by a file, a folder when only files inside it
                may be; for images that somebody else names. Open files and decoded images are your own.
            **options: of the tokenizer (add_special_tokens, padding, truncation, max_length,
                pad_to_multiple_of, padding_side, return_attention_mask, return_token_type_ids,
                return_special_tokens_mask, return_offsets_mapping, return_length, see
                `MllamaTokenizer`) and of the image processor; device, where the image inputs go;
                text_kwargs, images_kwargs and common_kwargs, the same in dictionaries. What else
                `transformers` takes is accepted where it changes nothing.
        Returns, as far as images and text were given: input_ids and attention_mask (B, L) int64;
            pixel_values (B, N, T, 3, t, t) float32; aspect_ratio_ids (B, N) int64;
            aspect_ratio_mask (B, N, T) int64; cross_attention_mask (B, L, N, T) int64.
        Raises: ValueError when the numbers of texts, image tokens and images do not agree, something is
            beyond its limit, or truncation would cut an image token off; TypeError for unknown options;
            ImageOpenError and others for the images.
        """
        sources = self._sources(limits, allow_paths)
        call = call_options(return_tensors, options)
        if images is None and text is None:
            raise ValueError("give images, text or both")
        samples = None if images is None else nest_images(images)
        if text is None:
            return self._batch(samples, None, call, sources)
        texts, mark = _text_list(text), None
        check_texts(texts, sources.limits)
        texts = [well_formed(item) for item in texts]
        if escape_special_tokens:
            [mark] = unused_marks(texts, 1)
            counts = [len(sample) for sample in samples or [[]] * len(texts)]
            if len(counts) != len(texts):
                raise ValueError(f"{len(texts)} texts came with {len(counts)} lists of images")
            words = escaped(texts, self._special_tokens(), mark)
            texts = [self.image_token * count + item for count, item in zip(counts, words)]
        return self._batch(samples, texts, call, sources, mark)

    def _batch(
        self,
        samples: list[list[Any]] | None,
        texts: list[str] | None,
        call: CallOptions,
        sources: _Sources,
        mark: str | None = None,
    ) -> BatchFeature:
        data: dict[str, Any] = {}
        limits, options = sources.limits, dict(call.images)
        check_container(call.return_tensors, options.get("device"))
        if samples is not None:
            check_samples(samples, limits, sources.allow_paths)
        if texts is not None:
            could_escape = mark is None and isinstance(self.tokenizer, MllamaTokenizer)
            check_image_tokens(texts, samples, self.image_token, could_escape)
            samples = samples if samples and any(samples) else None
        tiles = None if samples is None else self._tiles(samples, options, limits)
        if texts is not None:
            data = self._tokenized([self.with_bos(t) for t in texts], call, limits, mark)
        if samples is None:
            return convert_to_tensors(data, call.return_tensors)
        device = options.pop("device", None)
        if texts is not None:
            check_mask(data["input_ids"], samples, tiles, limits)
        if isinstance(self.image_processor, MllamaImageProcessor):
            options |= {"limits": limits, "allow_paths": sources.allow_paths}
        else:  # those of others open whatever they are given, and fetch it too
            samples = load_images(samples, limits=limits, allow_paths=sources.allow_paths)
        encoded = dict(self.image_processor(samples, **options))
        num_tiles = encoded.pop("num_tiles")
        if texts is not None:
            slots = len(encoded["pixel_values"][0][0])
            data["cross_attention_mask"] = cross_attention_mask(
                data["input_ids"], num_tiles, self.image_token_id, slots
            )
        made = convert_to_tensors(encoded, call.return_tensors, device)
        return BatchFeature({**convert_to_tensors(data, call.return_tensors), **made})

    def apply_chat_template(
        self,
        conversation: Sequence[Any],
        chat_template: str | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        return_assistant_tokens_mask: bool = False,
        tokenize: bool = False,
        return_dict: bool = False,
        return_tensors: str | None = None,
        escape_special_tokens: bool = False,
        limits: Limits | None = None,
        allow_paths: AllowPaths = True,
        processor_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Write a conversation, or a batch of them, as the prompt the model was trained on.

        Args:
            conversation: messages {"role", "content"}, or a list of conversations. Content is a
                string or a list of parts: {"type": "text", "text": ...} and {"type": "image"},
                which with tokenize=True carries the image under "image", "path", "url" (a data URI,
                nothing else: no network, no disk) or "base64"; OpenAI's parts "image_url",
                "input_image" and "input_text" are understood. Roles are those of
                `mllama.processing.conversation.ROLES`.
            chat_template: a template instead of the processor's, or the name of one of them.
            tools, documents, add_generation_prompt, continue_final_message: see
                `mllama.processing.chat_template.render_chat_template`.
            return_assistant_tokens_mask: with return_dict, also return assistant_masks (B, L), 1 on the
                tokens of what the template has inside `{% generation %}`.
            tokenize: return ids instead of text.
            return_dict: with tokenize, return everything `__call__` returns, images included.
            return_tensors: "pt", "np" or None.
            escape_special_tokens: with tokenize, special tokens in messages, tools, documents and variables,
                the image token too, are encoded as plain text; those of the template stay. By default
                the prompt is that of `transformers`: whoever writes a message can end a turn in it and
                speak for another role. Pass True for words that are not your own.
            limits, allow_paths: as `__call__`; files are named by "path" and "image".
            processor_kwargs: options for `__call__`.
            **kwargs: variables of the template, such as date_string; names that the template does
                not read and `__call__` knows, such as padding, go there.
        Returns: a string (a list for a batch); with tokenize input_ids, or the whole batch.
        Raises: jinja2.TemplateError for what the template refuses; otherwise as `__call__`.
        """
        sources = self._sources(limits, allow_paths)
        source = chosen_template(self.chat_template, chat_template)
        if processor_kwargs and not isinstance(processor_kwargs, Mapping):
            raise TypeError(f"processor_kwargs must be a dict, got {quoted(processor_kwargs)}")
        options = dict(processor_kwargs or {})
        escape = bool(options.pop("escape_special_tokens", False)) or escape_special_tokens
        if escape and not tokenize:
            raise ValueError(
                "escape_special_tokens needs tokenize=True: in text, plain and special look the same"
            )
        if return_assistant_tokens_mask and not (tokenize and return_dict):
            raise ValueError(
                "return_assistant_tokens_mask needs tokenize=True and return_dict=True"
            )
        prompts = write_prompts(
            source,
            conversation,
            special=self._special_tokens() if escape else None,
            with_spans=return_assistant_tokens_mask,
            is_option=is_option,
            tokens=self.tokenizer.special_tokens_map,
            variables=kwargs,
            limits=sources.limits,
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
        )
        options |= prompts.options
        if not tokenize:
            return prompts.texts if prompts.batched else prompts.texts[0]
        wants_offsets = options.get("return_offsets_mapping")
        if return_assistant_tokens_mask:
            options["return_offsets_mapping"] = True
        call = call_options(return_tensors, options)
        images = conversation_images(prompts.conversations, sources.limits, allow_paths)
        samples = nest_images(images) if any(images) else None
        batch = self._batch(samples, prompts.texts, call, sources, prompts.mark)
        if prompts.spans is None:
            return batch if return_dict else batch["input_ids"]
        shifts = [len(self.with_bos(text)) - len(text) for text in prompts.texts]
        masks = assistant_masks(batch["offset_mapping"], prompts.spans, shifts)
        if not wants_offsets:
            del batch["offset_mapping"]
        return BatchFeature(
            {**batch, **convert_to_tensors({"assistant_masks": masks}, call.return_tensors)}
        )

    def chat_ids(
        self,
        conversation: Sequence[Any],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        limits: Limits | None = None,
    ) -> list[int]:
        """The ids of a conversation that is to be answered, whose words are plain text; its images are not
        looked at. Raises: as `apply_chat_template`."""
        sources = self._sources(limits, False)
        prompts = write_prompts(
            chosen_template(self.chat_template, None),
            conversation,
            special=self._special_tokens(),
            with_spans=False,
            is_option=is_option,
            tokens=self.tokenizer.special_tokens_map,
            variables={},
            limits=sources.limits,
            tools=tools,
            add_generation_prompt=True,
        )
        texts, call = [self.with_bos(text) for text in prompts.texts], call_options(None, {})
        return self._tokenized(texts, call, sources.limits, prompts.mark)["input_ids"][0]

    def with_bos(self, text: str) -> str:
        """The text as it is tokenized: begin-of-text after leading image tokens, if it holds none."""
        bos, image = self.bos_token, self.image_token
        if bos is None or bos in text:
            return text
        rest = text
        while rest.startswith(image):
            rest = rest[len(image) :]
        return text[: len(text) - len(rest)] + bos + rest

    def with_words_escaped(self, messages: Any) -> tuple[Any, str]:
        """Messages whose special tokens are plain text, for a template and then the tokenizer.

        Returns: a copy, and the mark inside the tokens that is `escape_mark` of `MllamaTokenizer`.
        Raises: ValueError for another tokenizer than that.
        """
        [mark] = unused_marks([messages, self.chat_template], 1)
        return escaped(messages, self._special_tokens(), mark), mark

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
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *,
        tokenizer: MllamaTokenizer | None = None,
        image_processor: MllamaImageProcessor | None = None,
        chat_template: Templates | None = None,
        projector: str | os.PathLike | None = None,
        **options: Any,
    ) -> MllamaProcessor:
        """Read the tokenizer, the image processor and the chat template of a folder, hub id or GGUF file.

        The template is the first of: `chat_template` in processor_config.json, chat_template.json,
        chat_template.jinja with additional_chat_templates/, `chat_template` in tokenizer_config.json. In
        Meta's folder `original/` the tokenizer is tokenizer.model and the tiles are as params.json says. A
        GGUF file holds a vocabulary and the size of tiles; the rest is as published for Llama 3.2 Vision.

        Args:
            tokenizer, image_processor, chat_template: used instead of those of the folder.
            projector: the projector file that belongs to a GGUF text file.
            **options: of the image processor (size, max_image_tiles, ...) and of the tokenizer
                (padding_side, model_max_length, pad_token, ...) that override their files; token, revision,
                cache_dir, local_files_only, force_download and subfolder for hub ids; use_fast, backend,
                trust_remote_code and others of `transformers` that change nothing here.
        Raises: FileNotFoundError or ValueError naming the file; TypeError for an unknown option.
        """
        parts = read_parts(
            pretrained_model_name_or_path,
            image_processor,
            tokenizer,
            chat_template,
            projector,
            options,
        )
        return cls(*parts)

    def save_pretrained(
        self, save_directory: str | os.PathLike, push_to_hub: bool = False
    ) -> list[str]:
        """Write everything that `from_pretrained`, and `transformers` 4 and 5, read.

        Raises: ValueError for push_to_hub=True.
        """
        if push_to_hub:
            raise ValueError("push_to_hub is not had here; use huggingface_hub's upload_folder")
        return write_processor(self, Path(save_directory))

    def to_dict(self) -> dict[str, Any]:
        """The contents of processor_config.json."""
        return {
            "image_processor": self.image_processor.to_dict(),
            "processor_class": "MllamaProcessor",
        }

    def to_json_string(self) -> str:
        """`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    def to_json_file(self, json_file_path: str | os.PathLike) -> None:
        """Write `to_json_string` to a file."""
        Path(json_file_path).write_text(self.to_json_string(), encoding="utf-8")

    def __repr__(self) -> str:
        return f"MllamaProcessor({self.image_processor!r}, {self.tokenizer!r})"

    def _special_tokens(self) -> list[str]:
        if not isinstance(self.tokenizer, MllamaTokenizer):
            kind = type(self.tokenizer).__name__
            raise ValueError(f"escape_special_tokens needs a MllamaTokenizer, this one is a {kind}")
        return self.tokenizer.control_tokens

    def _sources(self, limits: Limits | None, allow_paths: AllowPaths) -> _Sources:
        if limits is None:
            limits = getattr(self.image_processor, "limits", OWN_FILES)
        check_limits(limits)
        check_allow_paths(allow_paths)
        return _Sources(limits, allow_paths)

    def _tiles(self, samples: list[list[Any]], options: Mapping[str, Any], limits: Limits) -> int:
        """Tiles of an image in a call. Raises: as `MllamaImageProcessor.call_options`."""
        if isinstance(self.image_processor, MllamaImageProcessor) and any(samples):
            return self.image_processor.call_options(samples, options, limits)["max_image_tiles"]
        return options.get("max_image_tiles") or self.image_processor.max_image_tiles

    def _tokenized(
        self, texts: list[str], call: CallOptions, limits: Limits, mark: str | None
    ) -> dict[str, Any]:
        check_bytes([text.replace(mark, "") if mark else text for text in texts], limits)
        options = {"add_special_tokens": self.bos_token is None, **call.text}
        if isinstance(self.tokenizer, MllamaTokenizer):
            options |= {"escape_mark": mark, "limits": limits}
        else:
            check_lengths(options, getattr(self.tokenizer, "model_max_length", 0), limits)
        data = dict(self.tokenizer(texts, **options))
        check_not_cut(texts, data["input_ids"], self.image_token, self.image_token_id)
        return data


def _text_list(text: str | Sequence[str]) -> list[str]:
    texts = [text] if isinstance(text, str) else list(text)
    for i, item in enumerate(texts):
        if not isinstance(item, str):
            raise TypeError(f"text[{i}] must be a string, got {type(item).__name__}")
    return texts
