"""A request on its way through the engine: what it asks for, checked, and its answers as they grow."""

from __future__ import annotations

import secrets
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol

from mllama.config_fields import FLAG, integer, named, number, value_problem
from mllama.engine.answers import Answer, Vocabulary
from mllama.engine.interface import Constraint, Options, Piece, Refused
from mllama.engine.prompts import PreparedPicture, Prompt
from mllama.engine.sampling import Sampling
from mllama.engine.sequence import Request
from mllama.generation.config import GenerationConfig
from mllama.generation.sampling import SAMPLING_FIELDS, SamplingConfig, row_seeds
from mllama.generation.stopping import StopStrings
from mllama.semantics import Semantics
from mllama.vocabulary import embedding_rows
from mllama.wording import quoted
from mllama_kernels.reference_sampling import MAX_LIKELIEST

# Beyond every logit, and far from what a float32 cannot hold.
_BIAS = number(-1e6, 1e6)
_MOST_ANSWERS = 1024
# Of options, those that are checked wherever they are given, also where they do nothing beside others.
_FIELDS = {
    **SAMPLING_FIELDS,
    "temperature": named(number(0, 1e30), "a number >= 0 (0: greedy)"),
    "n": integer(1, _MOST_ANSWERS),
    "max_tokens": integer(1),
    "min_tokens": integer(0),
    "presence_penalty": _BIAS,
    "frequency_penalty": _BIAS,
    "seed": named(integer(-(2**63), 2**64 - 1), "an integer of at most 64 bits"),
    "top_logprobs": integer(0, MAX_LIKELIEST),
    "ignore_eos": FLAG,
}
# What may be left to the checkpoint.
_OPEN = {field.name for field in fields(Options) if field.default is None}


class Outbox(Protocol):
    """Where a client waits for what is new; equal ones are given it together."""

    def post(self, news: Sequence[tuple[str, Piece | Exception]]) -> None:
        """Take over pieces, each with the key of its request, or what has ended that; from the engine's
        thread."""
        ...


@dataclass(eq=False)
class Job:
    """One request.

    Attributes:
        key: names it.
        prompt: as it was prepared.
        request: of the scheduler.
        samplings: one for each answer.
        answers: likewise.
        outbox: of its client.
        arrived, started: times of the monotonic clock; started is None before the first step with it.
        num_open: answers that have not ended.
        cached_tokens: those of the prompt that were computed before.
    """

    key: str
    prompt: Prompt
    request: Request
    samplings: tuple[Sampling, ...]
    answers: tuple[Answer, ...]
    outbox: Outbox
    arrived: float = field(default_factory=time.monotonic)
    started: float | None = None
    sequences: tuple[int, ...] = ()
    num_open: int = 0
    cached_tokens: int = 0


@dataclass(frozen=True)
class ModelFacts:
    """What requests are checked against.

    Attributes:
        max_length: tokens of a sequence.
        vocab_size: of the logits.
        num_embeddings: ids that a prompt may have.
        image_token: None for a model without images.
        picture_shape: of a picture's pixels, (T, C, t, t); likewise.
        num_ratios: aspect ratios that the model knows.
        defaults: of the checkpoint.
    """

    max_length: int
    vocab_size: int
    num_embeddings: int
    image_token: int | None
    picture_shape: tuple[int, ...] | None
    num_ratios: int
    semantics: Semantics
    defaults: GenerationConfig

    @classmethod
    def of(cls, model: Any, max_length: int) -> ModelFacts:
        config, vision = (
            model.config.get_text_config(),
            getattr(model.config, "vision_config", None),
        )
        shape, ratios = None, 0
        if vision is not None:
            ratios = vision.max_aspect_ratio_id
            side = vision.image_size
            shape = (vision.max_num_tiles, vision.num_channels, side, side)
        return cls(
            max_length=max_length,
            vocab_size=model.head_rows,
            num_embeddings=embedding_rows(model.get_input_embeddings(), config),
            image_token=getattr(model.config, "image_token_index", None),
            picture_shape=shape,
            num_ratios=ratios,
            semantics=model.semantics,
            defaults=model.generation_config,
        )

    def job(
        self,
        key: str,
        prompt: Prompt,
        options: Options,
        vocabulary: Vocabulary,
        outbox: Outbox,
        constraint: Constraint | None = None,
    ) -> Job:
        """Raises: Refused, naming what was given and what is expected."""
        self._check(prompt, options)
        room = self.max_length - len(prompt.tokens)
        if room < 1:
            raise Refused(
                f"the prompt has {len(prompt.tokens)} tokens and a context at most {self.max_length}: no "
                "room for an answer",
                code="context_length_exceeded",
            )
        strings, stop_ids = self._stops(options, vocabulary)
        try:
            request = prompt.request(
                self.semantics,
                self.image_token,
                max_new_tokens=room
                if options.max_tokens is None
                else min(options.max_tokens, room),
                stop_token_ids=stop_ids,
                copies=options.n,
            )
            config = self._config(options)
        except ValueError as error:
            raise Refused(str(error)) from None
        first = secrets.randbits(62) if options.seed is None else options.seed
        sampling = Sampling(
            config,
            presence_penalty=options.presence_penalty,
            frequency_penalty=options.frequency_penalty,
            bias=options.logit_bias,
            min_tokens=options.min_tokens,
            stop_token_ids=stop_ids,
            top_logprobs=options.top_logprobs,
            constraint=constraint,
        )
        compiled = StopStrings(strings)
        return Job(
            key,
            prompt,
            request,
            samplings=tuple(
                replace(sampling, seed=(seed + 2**63) % 2**64 - 2**63)
                for seed in row_seeds(first, options.n)
            ),
            answers=tuple(
                Answer(index, vocabulary, compiled, stop_ids, options.min_tokens)
                for index in range(options.n)
            ),
            outbox=outbox,
            num_open=options.n,
        )

    def _check(self, prompt: Prompt, options: Options) -> None:
        if not prompt.tokens:
            raise Refused("the prompt has no token")
        for token in prompt.tokens:
            if not isinstance(token, int) or not 0 <= token < self.num_embeddings:
                raise Refused(
                    f"the prompt has the token {quoted(token)}; expected 0 to "
                    f"{self.num_embeddings - 1}",
                    "prompt",
                )
        for picture in prompt.pictures:
            self._check_picture(picture)
        for name, kind in _FIELDS.items():
            value = getattr(options, name)
            if value is None and name in _OPEN:
                continue
            if problems := value_problem(name, kind, {name: value}):
                raise Refused(problems[0], name)
        if options.max_tokens is not None and options.min_tokens > options.max_tokens:
            raise Refused(
                f"min_tokens is {options.min_tokens} and max_tokens {options.max_tokens}; expected no more "
                "than that",
                "min_tokens",
            )
        strings = options.stop
        if not isinstance(strings, (tuple, list)) or not all(isinstance(s, str) for s in strings):
            raise Refused(f"stop must be a tuple of strings, got {quoted(strings)}", "stop")
        if not all(strings):
            raise Refused("stop has an empty string, which occurs everywhere", "stop")
        self._check_tokens("stop_token_ids", options.stop_token_ids, (tuple, list, set, frozenset))
        self._check_tokens("logit_bias", options.logit_bias, Mapping)
        for bias in options.logit_bias.values():
            if problems := value_problem("logit_bias", _BIAS, {"logit_bias": bias}):
                raise Refused(problems[0], "logit_bias")

    def _check_picture(self, picture: PreparedPicture) -> None:
        """Raises: Refused for one that another processor made than the model's."""
        if (shape := tuple(picture.pixels.shape)) != self.picture_shape:
            raise Refused(f"a picture is {shape}; the model takes {self.picture_shape}")
        tiles = picture.tile_mask.tolist()
        if len(tiles) != shape[0] or not any(tiles):
            raise Refused(
                f"a picture has the tile mask {tiles}; expected one of {shape[0]} tiles, some of them its"
            )
        if not 1 <= picture.aspect_ratio_id <= self.num_ratios:
            raise Refused(
                f"a picture has the aspect ratio {picture.aspect_ratio_id}; expected 1 to {self.num_ratios}"
            )

    def _check_tokens(self, name: str, tokens: Collection[int], kinds: Any) -> None:
        if not isinstance(tokens, kinds):
            raise Refused(f"{name} must be a collection of tokens, got {quoted(tokens)}", name)
        known = integer(0, self.vocab_size - 1)
        if wrong := [t for t in tokens if value_problem(name, known, {name: t})]:
            raise Refused(
                f"{name} must name tokens from 0 to {self.vocab_size - 1}, got {quoted(wrong)}",
                name,
            )

    def _stops(self, options: Options, vocabulary: Vocabulary) -> tuple[list[str], frozenset[int]]:
        """The stop strings that are text, and the stop tokens: also those whose text is one, without those
        that no answer can have, as the token of images."""
        special = vocabulary.special
        ids = {special[string] for string in options.stop if string in special}
        ids |= set(options.stop_token_ids)
        if not options.ignore_eos and (eos := self.defaults.eos_token_id) is not None:
            ids |= {eos} if isinstance(eos, int) else set(eos)
        ids = {token for token in ids if token < self.vocab_size}
        return [string for string in options.stop if string not in special], frozenset(ids)

    def _config(self, options: Options) -> SamplingConfig:
        """What the request leaves out is the checkpoint's; a temperature of 0 is greedy."""

        def chosen(name: str, neutral: Any) -> Any:
            given = getattr(options, name)
            given = self.defaults.get(name) if given is None else given
            return neutral if given is None else given

        if options.temperature is None and not self.defaults.do_sample:
            temperature = 0.0
        else:
            temperature = chosen("temperature", 1.0)
        penalty = chosen("repetition_penalty", 1.0)
        if temperature == 0:
            return SamplingConfig(repetition_penalty=penalty)
        return SamplingConfig(
            do_sample=True,
            temperature=temperature,
            top_k=min(chosen("top_k", 0), self.vocab_size),
            top_p=chosen("top_p", 1.0),
            min_p=chosen("min_p", 0.0),
            repetition_penalty=penalty,
        )
