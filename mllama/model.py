"""The models: both towers joined, and the heads that turn their output into logits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mllama.arguments import refuse
from mllama.backend import Ops
from mllama.base import MllamaPreTrainedModel
from mllama.cache import MllamaCache
from mllama.checkpoints.key_layout import OLDER_NAMES
from mllama.checks import (
    TextInputs,
    check_cross_attention_mask,
    check_image_tokens,
    check_images,
    check_states,
    check_text,
)
from mllama.config import MllamaConfig, MllamaTextConfig
from mllama.head import LanguageHead
from mllama.kinds import Asked
from mllama.linear import Projection
from mllama.outputs import BaseModelOutput, CausalLMOutput
from mllama.semantics import SemanticsLike
from mllama.text import Checked, MllamaTextModel
from mllama.tiles import IMAGE, LOOSE, ImageTiles
from mllama.vision import MllamaVisionModel


class MllamaModel(MllamaPreTrainedModel):
    """Vision tower, projector and text tower, without the output head.

    Args:
        config, backend, semantics: see :class:`MllamaPreTrainedModel`.
    """

    config: MllamaConfig

    def __init__(
        self,
        config: MllamaConfig,
        *,
        backend: str | Ops = "auto",
        semantics: SemanticsLike | None = None,
    ) -> None:
        super().__init__(config, backend=backend, semantics=semantics)
        vision, text = self.config.vision_config, self.config.text_config
        self.vision_model = MllamaVisionModel(vision, backend=self.ops)
        self.language_model = MllamaTextModel(text, backend=self.ops)
        sizes = {"multi_modal_projector": text.hidden_size}
        self.projector = Projection(self, vision.vision_output_dim, sizes, bias=True)
        self.init_weights()

    def encode_images(
        self,
        pixel_values: Tensor,
        aspect_ratio_ids: Tensor,
        aspect_ratio_mask: Tensor,
        cross_attention_mask: Tensor | None = None,
        has_tokens: bool = True,
    ) -> ImageTiles:
        """Vision tower and projector: the tiles that text may see.

        Args: as in :meth:`forward`, and
            has_tokens: whether an image token stands for each image.
        Returns: all tiles when image-less rows leak, since those rows see them all; otherwise the tiles
            that belong to an image or that the mask shows to some token.
        """
        batch, is_image = pixel_values.shape[0], aspect_ratio_ids > 0
        kinds = is_image.to(torch.int8) * (IMAGE if has_tokens else LOOSE)
        vision = self.vision_model(
            pixel_values=pixel_values,
            aspect_ratio_ids=aspect_ratio_ids,
            aspect_ratio_mask=aspect_ratio_mask,
        )
        states, is_read = vision.last_hidden_state, self.projector.kernel_weight(Asked) is not None
        if not is_read:  # a projector that is called sees all of them, as in `transformers`
            states = self.multi_modal_projector(states)
        states, keep, exporting = states.flatten(0, 2), None, torch.compiler.is_exporting()
        if self.semantics.imageless_rows != "leak":
            keep = ((aspect_ratio_mask != 0) & is_image.unsqueeze(-1)).flatten(1)
            if cross_attention_mask is not None:
                shown = (cross_attention_mask == 1).any(1).flatten(1)
                keep = keep | shown[:, -keep.shape[1] :]  # the new images are the last ones
            if not exporting:  # there no shape may depend on a value
                states = states[keep.flatten()]
        if is_read:
            states = self.projector(self.ops, states)
        if keep is not None and not exporting:
            return ImageTiles(states, ImageTiles.table_of(keep), kinds)
        every = ImageTiles.from_states(states, batch, kinds)
        return every if keep is None else replace(every, table=every.table.where(keep, -1))

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        aspect_ratio_mask: Tensor | None = None,
        aspect_ratio_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cross_attention_mask: Tensor | None = None,
        cross_attention_states: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: MllamaCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **others: Any,
    ) -> BaseModelOutput | tuple[Any, ...]:
        """Run both towers.

        Args:
            pixel_values: (B, M, tiles, C, t, t), images that are not in the cache yet.
            aspect_ratio_ids: (B, M) int64, 0 for a padded image.
            aspect_ratio_mask: (B, M, tiles), 1 for a tile of the image, 0 for padding.
            cross_attention_states: what the projector gave for such images, instead of
                ``pixel_values``; neither tower nor projector runs.
            others: see :meth:`MllamaTextModel.forward` and :mod:`mllama.arguments`.
        Returns: ``last_hidden_state`` (B, L, E), zero at padding; ``past_key_values``;
            ``hidden_states``.
        Raises: ValueError naming what was given and what is expected, before anything runs.
        """
        kept = {name: others.pop(name) for name in ("columns_to_keep",) if name in others}
        refuse(others)
        config = self.config
        text = check_text(
            config.text_config,
            input_ids,
            inputs_embeds,
            attention_mask,
            position_ids,
            past_key_values,
            self.get_input_embeddings(),
        )
        new_tiles = 0
        if pixel_values is not None:
            if cross_attention_states is not None:
                raise ValueError("give pixel_values or cross_attention_states, not both")
            check_images(config.vision_config, pixel_values, aspect_ratio_ids, aspect_ratio_mask)
            new_tiles = pixel_values.shape[1] * pixel_values.shape[2]
        elif cross_attention_states is not None:
            check_states(config.text_config, cross_attention_states, text.batch)
            new_tiles = cross_attention_states.shape[0] // text.batch
        if cross_attention_states is None:
            new_ids = aspect_ratio_ids if pixel_values is not None else None
            check_image_tokens(config, text, new_ids, cross_attention_mask, past_key_values)
        check_cross_attention_mask(cross_attention_mask, text, new_tiles, past_key_values)
        with self.no_grad_if_caching(use_cache, past_key_values) as caching:
            tiles = None
            if pixel_values is not None:
                assert aspect_ratio_ids is not None and aspect_ratio_mask is not None
                tiles = self.encode_images(
                    pixel_values,
                    aspect_ratio_ids,
                    aspect_ratio_mask,
                    cross_attention_mask,
                    has_tokens=input_ids is not None,
                )
            elif cross_attention_states is not None:
                tiles = ImageTiles.from_states(
                    cross_attention_states, text.batch, self._kinds_of_states(text, new_tiles)
                )
            arguments = {
                "input_ids": input_ids,
                "attention_mask": attention_mask,
                "position_ids": position_ids,
                "past_key_values": past_key_values,
                "inputs_embeds": inputs_embeds,
            }
            output = self.language_model(
                **arguments,
                cross_attention_states=tiles.states if tiles is not None else None,
                cross_attention_mask=cross_attention_mask,
                use_cache=caching,
                output_hidden_states=self.wants_hidden_states(output_hidden_states),
                checked=Checked(text, tiles, arguments),
                **kept,
            )
        return output.to_tuple() if return_dict is False else output

    def _kinds_of_states(self, text: TextInputs, new_tiles: int) -> Tensor | None:
        """(B, images) kinds of images given as states: by the image tokens, where there is any."""
        images, rest = divmod(new_tiles, self.config.vision_config.max_num_tiles)
        if text.input_ids is None or rest:
            return None
        tokens = (text.input_ids == self.config.image_token_index).sum(1, keepdim=True)
        kinds = (torch.arange(images, device=text.device) < tokens).to(torch.int8) * IMAGE
        return torch.where(tokens.any(), kinds, LOOSE)


class MllamaForConditionalGeneration(LanguageHead):
    """Llama 3.2 Vision: text and images in, logits out.

    Args:
        config, backend, semantics: see :class:`MllamaPreTrainedModel`.
    """

    config: MllamaConfig
    _checkpoint_conversion_mapping = OLDER_NAMES  # read by PEFT

    def __init__(
        self,
        config: MllamaConfig,
        *,
        backend: str | Ops = "auto",
        semantics: SemanticsLike | None = None,
    ) -> None:
        super().__init__(config, backend=backend, semantics=semantics)
        self.model = MllamaModel(self.config, backend=self.ops)
        self.head = self.new_head()
        self.init_weights()

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        aspect_ratio_mask: Tensor | None = None,
        aspect_ratio_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cross_attention_mask: Tensor | None = None,
        cross_attention_states: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: MllamaCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        return_logits: bool = True,
        num_items_in_batch: Tensor | int | None = None,
        return_dict: bool | None = None,
        **others: Any,
    ) -> CausalLMOutput | tuple[Any, ...]:
        """Logits of the next token, and the loss.

        Args:
            labels: (B, L) int64, -100 where there is no target; image tokens never are one. The shift
                happens here.
            logits_to_keep: how many of the last columns to give logits for, 0 for all; or their indices.
            return_logits: False for the loss only: just the rows with a target reach the head.
            num_items_in_batch: what the sum of the losses is divided by, instead of the targets here: with
                accumulated gradients those of all batches of a step.
            return_dict: False for a tuple.
            shift_labels: (B, L), beside labels: the targets of the tokens themselves, with no shift. Not in
                the signature, where trainers look for the labels that they have to give.
            others: see :meth:`MllamaModel.forward` and :mod:`mllama.arguments`.
        Returns: ``loss`` (float32, None without labels), ``logits`` (B, kept, V) in the model's dtype,
            ``past_key_values``, ``hidden_states``.
        Raises: ValueError naming what was given and what is expected, before anything runs.
        """
        shift_labels = others.pop("shift_labels", None)
        refuse(others)
        given = inputs_embeds if input_ids is None else input_ids
        targets = self._targets(given, labels, shift_labels, logits_to_keep, return_logits)
        inputs = (inputs_embeds, pixel_values, cross_attention_states)
        with self._caching(use_cache, past_key_values, labels, *inputs) as caching:
            outputs = self.model(
                input_ids=input_ids,
                pixel_values=pixel_values,
                aspect_ratio_mask=aspect_ratio_mask,
                aspect_ratio_ids=aspect_ratio_ids,
                attention_mask=attention_mask,
                cross_attention_mask=cross_attention_mask,
                cross_attention_states=cross_attention_states,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                use_cache=caching,
                output_hidden_states=self.wants_hidden_states(output_hidden_states),
                **self._columns(given, targets, logits_to_keep),
            )
            loss, logits = self._head(
                outputs.last_hidden_state,
                targets,
                num_items_in_batch,
                logits_to_keep,
                return_logits,
            )
        output = CausalLMOutput(loss, logits, outputs.past_key_values, outputs.hidden_states)
        return output.to_tuple() if return_dict is False else output


class MllamaForCausalLM(LanguageHead):
    """The text tower with its head, without the vision tower; images only as precomputed states.

    Args:
        config: a text configuration, or a whole one, whose text part is used.
        backend, semantics: see :class:`MllamaPreTrainedModel`.
    """

    config: MllamaTextConfig

    def __init__(
        self,
        config: MllamaTextConfig | MllamaConfig,
        *,
        backend: str | Ops = "auto",
        semantics: SemanticsLike | None = None,
    ) -> None:
        super().__init__(
            getattr(config, "text_config", config), backend=backend, semantics=semantics
        )
        self.model = MllamaTextModel(self.config, backend=self.ops)
        self.head = self.new_head()
        self.init_weights()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cross_attention_states: Tensor | None = None,
        cross_attention_mask: Tensor | None = None,
        past_key_values: MllamaCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        return_logits: bool = True,
        num_items_in_batch: Tensor | int | None = None,
        return_dict: bool | None = None,
        **others: Any,
    ) -> CausalLMOutput | tuple[Any, ...]:
        """Logits of the next token in float32, and the loss.

        Args: as in :meth:`MllamaForConditionalGeneration.forward`; ``cross_attention_mask`` is per
            tile, (B, L, M, tiles), here too.
        """
        shift_labels = others.pop("shift_labels", None)
        refuse(others)
        given = inputs_embeds if input_ids is None else input_ids
        targets = self._targets(given, labels, shift_labels, logits_to_keep, return_logits)
        inputs = (inputs_embeds, cross_attention_states)
        with self._caching(use_cache, past_key_values, labels, *inputs) as caching:
            outputs = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                cross_attention_states=cross_attention_states,
                cross_attention_mask=cross_attention_mask,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                use_cache=caching,
                output_hidden_states=self.wants_hidden_states(output_hidden_states),
                **self._columns(given, targets, logits_to_keep),
            )
            loss, logits = self._head(
                outputs.last_hidden_state,
                targets,
                num_items_in_batch,
                logits_to_keep,
                return_logits,
            )
            logits = None if logits is None else logits.float()
        output = CausalLMOutput(loss, logits, outputs.past_key_values, outputs.hidden_states)
        return output.to_tuple() if return_dict is False else output
