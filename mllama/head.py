"""The head that turns the hidden states of a model into logits and a loss."""

from __future__ import annotations

from contextlib import AbstractContextManager
from numbers import Integral

import torch
from torch import Tensor, nn

from mllama.base import MllamaPreTrainedModel
from mllama.cache import MllamaCache
from mllama.generation import GenerationMixin
from mllama.kinds import Asked
from mllama.linear import Projection
from mllama.loss import (
    causal_lm_loss,
    checked_targets,
    per_item,
    reduction_for,
    targets_of,
)
from mllama.packed import PackedTokens
from mllama.parallel.rules import ColumnParallel
from mllama.quantization.workspace import PART
from mllama.vocabulary import rows_of_head
from mllama_kernels._arguments import IGNORED
from mllama_kernels.plain import is_plain


class LanguageHead(GenerationMixin, MllamaPreTrainedModel):
    """What the models that end in logits have in common."""

    lm_head: nn.Module
    head: Projection  # of it
    # What the Trainer of `transformers` asks: whether num_items_in_batch is taken, and by which of its
    # losses, whose targets it counts.
    accepts_loss_kwargs = True
    loss_type = "ForCausalLM"

    def new_head(self) -> Projection:
        """The output head, which becomes a child; split over ranks by the vocabulary."""
        config = self.config.get_text_config()
        rule = ColumnParallel(what="rows of the vocabulary", is_gathered=True)
        return Projection(self, config.hidden_size, {"lm_head": config.vocab_size}, rule=rule)

    @property
    def head_rows(self) -> int:
        """The classes of the head, on all ranks together."""
        if self.share is not None:
            return self.share.head_rows
        return rows_of_head(self.lm_head, self.config.get_text_config())

    @property
    def text_tower(self) -> nn.Module:
        return getattr(self.model, "language_model", self.model)

    def packed_logits(
        self, ids: Tensor, packed: PackedTokens, last: Tensor | None = None
    ) -> Tensor:
        """The logits (S, V) after those of the tokens ids (N,) that are at ``last`` (S,), or after each.

        The model, :attr:`model` and the text tower themselves are not called, only what is inside; see
        :meth:`called_part`.
        """
        tower, varlen = self.text_tower, packed.varlen
        if varlen.rows is None:
            embeds = varlen.unpad(tower.embed_tokens(varlen.pad(ids)))
        else:
            embeds = tower.embed_tokens(ids)
        states = tower.forward_packed(embeds, packed)
        states = states if last is None else states[last]
        return self.head(self.ops, states.unsqueeze(1)).squeeze(1)

    def called_part(self) -> tuple[str, nn.Module] | None:
        """A part that :meth:`packed_logits` would bypass though calling it does more, by name: it has hooks,
        or a forward that is not of this package. None if there is none."""
        parts = {"model": self, "model.model": self.model, "text tower": self.text_tower}
        for name, part in parts.items():
            own = type(part).forward.__module__.partition(".")[0] == "mllama"
            if not own or not is_plain(part, type(part)):
                return name, part
        return None

    def _targets(
        self,
        given: Tensor | None,
        labels: Tensor | None,
        shift_labels: Tensor | None,
        logits_to_keep: int | Tensor,
        return_logits: bool,
    ) -> Tensor | None:
        """The checked targets (B, L) of what is given, ids or embeddings (B, L, ...)."""
        _check_kept(logits_to_keep)
        if labels is None:
            if not return_logits:
                raise ValueError("return_logits=False leaves nothing without labels")
            return None
        if not (isinstance(logits_to_keep, Integral) and logits_to_keep == 0):
            raise ValueError("labels need the logits of all tokens: leave logits_to_keep at 0")
        if given is not None and labels.shape != given.shape[:2]:
            expected, got = tuple(given.shape[:2]), tuple(labels.shape)
            raise ValueError(f"labels must be {expected}, like the text, got {got}")
        classes = self.head_rows
        image_token = getattr(self.config, "image_token_index", None)
        if shift_labels is None:
            return targets_of(labels, classes, image_token)
        if shift_labels.numel() != labels.numel():
            expected, got = tuple(labels.shape), tuple(shift_labels.shape)
            raise ValueError(f"shift_labels must be {expected}, like labels, got {got}")
        return checked_targets(shift_labels.view_as(labels), classes, image_token)

    def _caching(
        self,
        use_cache: bool | None,
        cache: MllamaCache | None,
        labels: Tensor | None,
        *inputs: Tensor | None,
    ) -> AbstractContextManager[bool]:
        """As :meth:`no_grad_if_caching`. Raises: ValueError for a loss that would have no gradient."""
        if labels is not None and (use_cache or cache is not None) and torch.is_grad_enabled():
            if any(x is not None and x.requires_grad for x in (*inputs, *self.parameters())):
                given = "past_key_values" if cache is not None else "use_cache=True"
                raise ValueError(
                    f"labels with {given}: a cache holds no graph, so the loss would have no gradient; "
                    "train without it, or compute the loss under torch.no_grad()"
                )
        return self.no_grad_if_caching(use_cache, cache, labels)

    def _columns(
        self, given: Tensor | None, targets: Tensor | None, logits_to_keep: int | Tensor
    ) -> dict[str, int]:
        """What the tower is told of a text (B, L, ...) that it may read in parts: how many columns are
        wanted of it."""
        if targets is not None or not isinstance(logits_to_keep, Integral) or not logits_to_keep:
            return {}
        if given is None or given.dim() < 2 or given.shape[0] * given.shape[1] <= PART:
            return {}
        return {"columns_to_keep": int(logits_to_keep)}

    def _head(
        self,
        hidden: Tensor,
        targets: Tensor | None,
        items: Tensor | int | None,
        logits_to_keep: int | Tensor,
        return_logits: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Loss and logits of hidden (B, L, E), as far as they are wanted."""
        if targets is not None:
            targets = targets.to(hidden.device)
        if targets is not None and not return_logits:
            is_target = targets != IGNORED
            rows, targets = hidden[is_target], targets[is_target]
            is_whole = self.head.collective is None
            weight = self.head.kernel_weight(Asked) if is_whole else None
            if weight is None or weight.bias is not None or not isinstance(weight.matrix, Tensor):
                return causal_lm_loss(self.head(self.ops, rows), targets, items), None
            loss = self.ops.linear_cross_entropy(
                rows, weight.matrix, targets, reduction=reduction_for(items)
            )
            return per_item(loss, items), None
        logits = self.head(self.ops, _kept_columns(hidden, logits_to_keep))
        return None if targets is None else causal_lm_loss(logits, targets, items), logits


def _check_kept(logits_to_keep: int | Tensor) -> None:
    wrong_shape = isinstance(logits_to_keep, Tensor) and logits_to_keep.dim() != 1
    if logits_to_keep is None or wrong_shape:
        got = f"a tensor of shape {tuple(logits_to_keep.shape)}" if wrong_shape else None
        raise ValueError(
            f"logits_to_keep must be a number of columns or their indices (n,), got {got}"
        )


def _kept_columns(hidden: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """The columns of hidden (B, L, E) whose logits are wanted: the last so many (0: all), or by index."""
    if isinstance(logits_to_keep, Integral):
        return hidden[:, -logits_to_keep:] if logits_to_keep else hidden
    return hidden[:, logits_to_keep]
