"""Text generation: ``generate`` and ``stream`` for the models with a language head."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mllama.cache import MllamaCache
from mllama.engine.graphs import KeptSteps, captures
from mllama.engine.lending import KeptStore, Need
from mllama.generation.agreement import agreed_run
from mllama.generation.borrowing import borrowed_cache, need_of, require_borrowed_room
from mllama.generation.config import (
    GenerationConfig,
    GenerationPlan,
    make_plan,
    sequences_per_prompt,
    stop_token_ids,
)
from mllama.generation.decoding import (
    Decoder,
    called_decoder,
    captured_decoder,
    packed_decoder,
)
from mllama.generation.options import settle
from mllama.generation.processors import GuidedSampler, Record
from mllama.generation.prompt import MODEL_INPUTS, Prompt, repeated
from mllama.generation.reader import TokenReader
from mllama.generation.room import require_outputs, require_rows
from mllama.generation.sampling import INVALID_TOKEN, Sampler
from mllama.generation.stopping import StopCondition
from mllama.generation.streaming import Streamer, check_streamer
from mllama.outputs import GenerateOutput
from mllama.wording import quoted


class GenerationMixin:
    """``generate`` and ``stream``, for models whose forward takes ``past_key_values`` and
    ``logits_to_keep``. Comes first among the bases.

    Where the model runs its kernels on CUDA, the decode step is captured as a CUDA graph in the third
    step, and replayed from then on. A later call replays at once that reads the same pages and agrees in the
    number of rows, the room for tokens and the tiles per row, the latter two rounded up to powers of two; all
    else is data. The model keeps the pages of calls without a cache of their own, and what was captured on
    any; see :class:`mllama.engine.lending.KeptStore`. A graph is captured anew when the model has changed in
    more than the values of its weights; see :func:`mllama.engine.fingerprint.fingerprint`.
    A model that is to be called, for hooks on it or a forward of its own, is called in every step, and none
    is captured; what is inside it may be changed in any way.

    Attributes:
        generation_config: the checkpoint's defaults; a mapping may be assigned.
        cuda_graph: whether steps are captured and pages kept; assigning False frees those kept.
        kept_steps, kept_store: what is kept.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._cuda_graph = True
        self.kept_steps, self.kept_store = KeptSteps(), KeptStore()

    @property
    def cuda_graph(self) -> bool:
        return self._cuda_graph

    @cuda_graph.setter
    def cuda_graph(self, enabled: bool) -> None:
        self._cuda_graph = enabled
        if not enabled:
            self.free_idle_caches()

    def free_idle_caches(self) -> None:
        """Free the pages, and graphs, that are kept for later calls; moving the model does as well."""
        self.kept_store.clear()
        self.kept_steps.clear()

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self.free_idle_caches()  # no step captured on other parameters would be replayed
        return super()._apply(*args, **kwargs)

    @property
    def generation_config(self) -> GenerationConfig:
        config = self.__dict__.get("_generation_config")
        if not config:
            text = self.config.get_text_config()
            tokens = ("bos_token_id", "eos_token_id", "pad_token_id")
            config = GenerationConfig({name: getattr(text, name) for name in tokens})
            self.__dict__["_generation_config"] = config
        return config

    @generation_config.setter
    def generation_config(self, values: Mapping[str, Any]) -> None:
        self.__dict__["_generation_config"] = GenerationConfig(values)

    def new_cache(self, batch_size: int = 1, max_tokens: int | None = None) -> MllamaCache:
        """An empty cache to pass as ``past_key_values`` and to use again in the next turn.

        Args:
            batch_size, max_tokens: see :class:`mllama.MllamaCache`. With ``max_tokens`` nothing is
                allocated anew from turn to turn, so that steps captured in one serve the next.
        """
        return MllamaCache(
            self.config.get_text_config(),
            batch_size,
            dtype=self.dtype,
            device=self.device,
            max_tokens=max_tokens,
        )

    def prepare_inputs_for_generation(self, input_ids: Tensor, **inputs: Any) -> dict[str, Any]:
        """The inputs of one forward; generate() prepares its own, wrappers such as PEFT's ask for this."""
        return {"input_ids": input_ids, **inputs}

    def generate(
        self,
        input_ids: Tensor | None = None,
        generation_config: Any = None,
        *,
        past_key_values: MllamaCache | None = None,
        streamer: Streamer | None = None,
        **inputs_and_options: Any,
    ) -> Tensor | GenerateOutput:
        """Continue every row of a batch of prompts.

        A row ends with a stop token, with the token that completes a stop string, where a stopping
        criterion says so, or after ``max_new_tokens``; what follows in the row is ``pad_token_id``.

        Args:
            input_ids: (B, L) int64, the whole text of every row; padding may lie on either side. The
                keyword ``inputs`` means the same.
            generation_config: options, as a mapping or an object of transformers; those of the call
                itself go before.
            past_key_values: the cache of an earlier call, extended in place. As far as it agrees
                with the text, nothing is computed again, and images in that part are not encoded
                again whether they are passed again or not. It is taken for granted that they are
                the same images. After an interrupt it holds the text so far and can be used on.
            streamer: gets put(input_ids), put() with the (B,) tokens of every step, and end(), all
                on the host.
            inputs_and_options: the inputs of the forward pass that a processor returns
                (attention_mask, pixel_values, aspect_ratio_ids, aspect_ratio_mask,
                cross_attention_mask, cross_attention_states); inputs_embeds (B, L, E), read in place of
                the embeddings of input_ids, which may be left out; and the options of
                :class:`mllama.generation.options.GenerationOptions`. Callables among these run
                between two steps, which are then not captured as a CUDA graph.
        Returns: (B, L + new) int64 on the device of input_ids, or a GenerateOutput; only the new tokens
            without input_ids. B is num_return_sequences times as large where that is given.
        Raises: ValueError or TypeError before anything runs, naming the argument, what was given
            and what is expected; RuntimeError if the logits of a row are not finite.
        """
        check_streamer(streamer)
        run = self._run(input_ids, past_key_values, generation_config, inputs_and_options)
        if streamer is not None:
            streamer.put(run.prompt.input_ids.cpu())
        try:
            with torch.no_grad(), closing(run.steps()) as steps:
                for tokens, _ in steps:
                    if streamer is not None:
                        streamer.put(torch.tensor(tokens))
        finally:
            if streamer is not None:
                streamer.end()
        return run.output() if run.plan.returns_dict else run.sequences()

    def stream(
        self,
        input_ids: Tensor | None = None,
        generation_config: Any = None,
        *,
        tokenizer: Any,
        past_key_values: MllamaCache | None = None,
        **inputs_and_options: Any,
    ) -> Iterator[str]:
        """Continue one prompt and yield its text in pieces as it becomes certain.

        A piece ends between two characters. Special tokens and stop strings are no part of the
        text; what may be the beginning of a stop string is held back until that is decided.
        Closing the iterator ends the generation and leaves ``past_key_values`` usable.

        Args:
            input_ids: (1, L) int64.
            tokenizer: a processor or tokenizer.
            generation_config, past_key_values, inputs_and_options: as for generate(), without those
                that say what it returns.
        Raises: as generate(), when called and not with the first piece.
        """
        given = inputs_and_options.items()
        if refused := [name for name, value in given if name in _OF_GENERATE and value]:
            raise TypeError(
                f"unknown arguments {quoted(refused)}: stream() yields text, see generate()"
            )
        options = {name: value for name, value in given if name not in _OF_GENERATE}
        options |= dict.fromkeys(_OF_GENERATE - {"streamer"}) | {"tokenizer": tokenizer}
        options.setdefault("num_return_sequences", None)  # the checkpoint's is for generate()
        run = self._run(input_ids, past_key_values, generation_config, options, text=True)
        if run.prompt.batch_size != 1:
            raise ValueError(f"stream() takes one row of input_ids, got {run.prompt.batch_size}")
        return self._pieces(run)

    def _run(self, *arguments: Any, text: bool = False) -> _Run:
        make = partial(_Run, self, *arguments, text=text)
        return make() if self.share is None else agreed_run(self.share.ranks, make)

    @torch.no_grad()
    def _pieces(self, run: _Run) -> Iterator[str]:
        with closing(run.steps()) as steps:
            for _, (piece,) in steps:
                if piece:
                    yield piece
        if rest := run.condition.text[0].flush():
            yield rest


# What generate() returns besides tokens, or hands out meanwhile.
_OF_GENERATE = frozenset(
    ("streamer", "return_dict_in_generate")
    + ("output_scores", "output_logits", "output_hidden_states")
)


class _Run:
    """One call of generate() or stream(): checked arguments, then the steps, then the result."""

    def __init__(
        self,
        model: Any,
        input_ids: Tensor | None,
        cache: MllamaCache | None,
        generation_config: Any,
        arguments: dict[str, Any],
        *,
        text: bool = False,
    ) -> None:
        if "inputs" in arguments:
            if input_ids is not None:
                raise TypeError("give input_ids or inputs, which means the same, not both")
            arguments, input_ids = dict(arguments), arguments["inputs"]
            del arguments["inputs"]
        inputs = {name: value for name, value in arguments.items() if name in MODEL_INPUTS}
        options = {name: value for name, value in arguments.items() if name not in MODEL_INPUTS}
        config = model.config.get_text_config()
        self._model, self._vocab_size = model, model.head_rows
        for name, value in {"input_ids": input_ids, **inputs}.items():
            if (
                isinstance(value, Tensor)
                and value.device != model.device
                and (name in ("input_ids", "inputs_embeds") or value.is_meta)
            ):
                raise ValueError(f"{name} is on {value.device}, the model on {model.device}")
        if cache is not None and not isinstance(cache, MllamaCache):
            kind = type(cache).__name__
            raise TypeError(f"past_key_values must come from new_cache() or a model, got {kind}")
        settings = settle(model.generation_config, generation_config, options)
        copies = sequences_per_prompt(settings)
        require_rows(input_ids, inputs, copies)
        if copies > 1:
            input_ids, inputs = repeated(input_ids, inputs, copies)
        eos, pad = stop_token_ids(settings)
        self.prompt = Prompt(
            input_ids,
            inputs,
            image_token_id=getattr(model.config, "image_token_index", None),
            pad_token_id=pad,
            infer_padding=pad is not None and pad not in eos,
        )
        self.plan: GenerationPlan = make_plan(
            settings,
            batch_size=self.prompt.batch_size,
            prompt_length=self.prompt.length,
            text_length=self.prompt.text_length,
            max_text_length=config.max_position_embeddings,
            vocab_size=self._vocab_size,
        )
        self.given = {"input_ids": input_ids, **inputs, "seed": settings["seed"]}
        self.given["past_key_values"] = cache
        self._record = Record(self.plan.returns)
        self._guide: GuidedSampler | None = None
        self._is_packed = model.called_part() is None and "hidden_states" not in self.plan.returns
        self._captures = (
            self._is_packed and not self.plan.runs_python and captures(model, self.prompt.input_ids)
        )
        self._borrows_cache = self._captures and cache is None and not self.plan.returns_dict
        if cache is not None:
            cache.store.check_made_for(config, model.dtype, model.device)
        self.cache = model.new_cache(self.prompt.batch_size) if cache is None else cache
        prompt_only = model.semantics.decode_rows == "prompt_only"
        self._reused = self.prompt.reuse(self.cache, answers_are_blind=prompt_only)
        self._images = None
        if (vision := getattr(model.config, "vision_config", None)) is not None:
            tiles = vision.max_num_tiles
            self._images = self.prompt.cached_images(self.cache, self._reused, tiles)
        # Positions count the tokens of a row; a forward outside may have counted padding as well.
        self._offset = self.cache.next_position - self.cache.lengths.unsqueeze(1)
        self._inputs = self.prompt.new_inputs(self._reused, self._images)
        self._inputs["position_ids"] += self._offset
        self._require_room()
        searched = text or self.plan.stop_strings
        self.condition = StopCondition(
            self.prompt.batch_size,
            self.plan.eos_token_ids,
            self.plan.stop_strings,
            self.plan.tokenizer if searched else None,
        )
        self.rows: list[list[int]] = [[] for _ in range(self.prompt.batch_size)]

    def _require_room(self) -> None:
        """Raises: ValueError if what the whole answer takes in the cache does not fit into memory."""
        tokens = self._inputs["attention_mask"].shape[1] + self.plan.max_new_tokens
        require_outputs(self.plan, self._model, self.prompt.input_ids.shape, self._vocab_size)
        if not self._borrows_cache:
            # What is kept of the cache's text counts; the rest is forgotten first.
            self.cache.require_room(tokens, columns=max(self._reused))
        else:
            require_borrowed_room(self._model, self._need(), self.cache)

    def steps(self) -> Iterator[tuple[list[int], list[str]]]:
        """Per step the tokens of all rows, padding in those that ended, and their new text.

        However it ends, the cache then holds the text of every row without its last token.
        """
        if not self._borrows_cache:
            yield from self._steps()
            return
        with borrowed_cache(self._model, self._need()) as self.cache:
            yield from self._steps()

    def _steps(self) -> Iterator[tuple[list[int], list[str]]]:
        cache, plan = self.cache, self.plan
        cache.truncate(self._reused, self._offset)
        if self._images is not None:
            self._images.forget_others(cache)
        images = cache.mark_images()
        try:
            cache.reserve(self._inputs["attention_mask"].shape[1] + plan.max_new_tokens)
            forward = self._record.forward_of(self._model)
            prefill = forward(**self._inputs, past_key_values=cache, logits_to_keep=1)
            with self._decoder(forward) as decoder:
                decoder.accept(prefill.logits[:, -1])
                delay = 0 if self._guide is not None else _read_delay(decoder.tokens.device)
                reader = TokenReader(decoder.tokens, delay)
                for made in range(1, plan.max_new_tokens + 1):
                    reader.request()
                    is_last = made == plan.max_new_tokens
                    while reader.waiting > (0 if is_last else reader.delay):
                        tokens, pieces = self._take(self._agreed(reader.read()))
                        if self._guide is not None:
                            self._end_rows(decoder, tokens)
                        yield tokens, pieces
                        if all(self.condition.finished):
                            return
                    if not is_last:
                        decoder.advance()
        finally:
            self._settle(images)

    def sequences(self) -> Tensor:
        """(B, L + new): the prompts, the new tokens, and padding after those."""
        longest = max(map(len, self.rows))
        pad = self.plan.pad_token_id
        rows = [row + [pad] * (longest - len(row)) for row in self.rows]
        prompt = self.prompt.input_ids
        return torch.cat([prompt, torch.tensor(rows, dtype=prompt.dtype).to(prompt.device)], dim=1)

    def output(self) -> GenerateOutput:
        """The sequences, what was kept of the steps, and the cache."""
        record, states = self._record, self._record.hidden_states
        if states:
            prompt = (self.prompt.in_columns(state, self._reused) for state in states[0])
            states = (tuple(prompt), *states[1:])
        return GenerateOutput(
            sequences=self.sequences(),
            scores=record.scores,
            logits=record.logits,
            hidden_states=states,
            past_key_values=self.cache,
        )

    @contextmanager
    def _decoder(self, forward: Callable[..., Any]) -> Iterator[Decoder]:
        """What makes the tokens, once the cache holds the prompt; ``forward`` is the model's."""
        model, cache, plan, ids = self._model, self.cache, self.plan, self.prompt.input_ids
        if self._captures:
            sampled = (plan.sampling, ids, self._vocab_size, plan.seeds)
            with captured_decoder(model, cache, *sampled) as decoder:
                yield decoder
        elif self._is_packed:
            yield packed_decoder(model, cache, self._chooser())
        else:
            yield called_decoder(forward, cache, self._chooser())

    def _chooser(self) -> Callable[[Tensor], Tensor]:
        plan, ids = self.plan, self.prompt.input_ids
        rest = (ids, self._vocab_size, plan.seeds, self._model.ops)
        if not plan.runs_python:
            return Sampler(plan.sampling, *rest)
        unpenalised = Sampler(replace(plan.sampling, repetition_penalty=1.0), *rest)
        self._guide = GuidedSampler(unpenalised, plan, ids, self._record)
        return self._guide

    def _end_rows(self, decoder: Decoder, tokens: list[int]) -> None:
        """End the rows that a stopping criterion says, and continue those that ended with padding."""
        chosen = torch.tensor(tokens, device=decoder.tokens.device)
        decoder.tokens.copy_(chosen)
        for row, ends in enumerate(self._agreed(self._guide.extend(chosen))):
            self.condition.finished[row] |= ends

    def _agreed(self, made: list[Any]) -> list[Any]:
        """What functions of the caller have made, by the time or by chance, is the first rank's on all."""
        is_split = self._guide is not None and self._model.share is not None
        return self._model.share.ranks.agreed(made) if is_split else made

    def _need(self) -> Need:
        return need_of(self._model, self._inputs, self.plan.max_new_tokens)

    def _take(self, tokens: list[int]) -> tuple[list[int], list[str]]:
        """Add one token to every row that has not ended."""
        pieces = [""] * len(tokens)
        for row, token in enumerate(tokens):
            if self.condition.finished[row]:
                tokens[row] = self.plan.pad_token_id
                continue
            if token == INVALID_TOKEN:
                raise RuntimeError(
                    f"the logits of row {row} are not finite at new token {len(self.rows[row])}"
                )
            self.rows[row].append(token)
            pieces[row] = self.condition.push(row, token)
        return tokens, pieces

    def _settle(self, images: object) -> None:
        """Make the cache hold what was handed out, whatever else the device has computed."""
        if not all(self.rows):
            self.cache.truncate(self._reused, self._offset)
            self.cache.restore_images(images)
            return
        texts = [(text + row)[:-1] for text, row in zip(self.prompt.texts, self.rows)]
        self.cache.truncate([len(text) for text in texts], self._offset)
        self.cache.texts = texts if self.prompt.has_ids else None
        self.cache.prompt_lengths = [len(text) for text in self.prompt.texts]
        self.cache.columns = self.prompt.length + max(map(len, self.rows)) - 1


def _read_delay(device: torch.device) -> int:
    return 1 if device.type == "cuda" else 0
