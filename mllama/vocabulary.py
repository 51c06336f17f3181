"""The embedding and the head: how many tokens they know, and giving them more or fewer.

In the published layout the embedding has eight rows more than the head, and the head as many as
`vocab_size` says. `resize_token_embeddings` gives both the same number, and the documentation of Mllama in
`transformers` gives only the head one more. So the modules themselves are asked for their rows, and the
configuration only where they do not say.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mllama.config_fields import integer, value_problem
from mllama.layers import init_normal
from mllama.parallel.split import Share, require_whole
from mllama.quantized_modules import Quantized
from mllama.shapes import EXTRA_ROWS

if TYPE_CHECKING:
    from mllama.config import MllamaTextConfig

_COUNT = integer(1, 2**24)  # of rows


def embedding_rows(embedding: nn.Module, config: MllamaTextConfig) -> int:
    """How many tokens an embedding knows."""
    return _rows(embedding, "num_embeddings", config.vocab_size + EXTRA_ROWS)


def rows_of_head(head: nn.Module, config: MllamaTextConfig) -> int:
    """How many classes a head has."""
    return _rows(head, "out_features", config.vocab_size)


def _rows(module: nn.Module, attribute: str, default: int) -> int:
    rows = getattr(module, attribute, None)
    if isinstance(rows, int):
        return rows
    weight = getattr(module, "weight", None)  # of an adapter's wrapper
    return weight.shape[0] if isinstance(weight, Tensor) and weight.dim() == 2 else default


def fits(vocab_size: int, embedding: int | None, head: int | None) -> bool:
    """Whether a checkpoint can have so many rows: tokens may have been added, but none that is known to the
    configuration or made by the head lacks an embedding. None for a part that there is not."""
    return embedding is None or (
        embedding >= vocab_size and (head is None or 0 < head <= embedding)
    )


class VocabularyMixin:
    """Access to the embedding and the head under the names of `transformers`."""

    config: Any
    share: Share | None

    @property
    def vocab_size(self) -> int:
        """The configuration's: tokens without the embedding's extra rows."""
        return self.config.get_text_config().vocab_size

    def get_input_embeddings(self) -> nn.Module:
        """What turns tokens (in the vision tower: pixels) into vectors."""
        owner, name = self._embedding_place()
        return getattr(owner, name)

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Put another module in the place of :meth:`get_input_embeddings`.

        Raises: ValueError for vectors of another width.
        """
        owner, name = self._embedding_place()
        if name == "embed_tokens":
            _check_width("the embedding", getattr(value, "embedding_dim", None), self.config)
        setattr(owner, name, value)

    def _embedding_place(self) -> tuple[nn.Module, str]:
        for name in ("embed_tokens", "patch_embedding"):
            if hasattr(self, name):
                return self, name  # type: ignore[return-value]
        return (self.model if hasattr(self, "model") else self.language_model)._embedding_place()

    def get_output_embeddings(self) -> nn.Module | None:
        """The head that turns vectors into logits, in the models that have one."""
        return getattr(self, "lm_head", None)

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Put another module in the place of the head. Its number of classes may differ.

        Raises: ValueError for one that takes vectors of another width; TypeError for a model without head, or
            that is split over ranks.
        """
        require_whole(self, "set_output_embeddings()")
        if self.get_output_embeddings() is None:
            raise TypeError(f"{type(self).__name__} has no head")
        _check_width("the head", getattr(new_embeddings, "in_features", None), self.config)
        self.lm_head = new_embeddings

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the head has weights of its own."""

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Module:
        """Give the embedding and the head the same number of rows, and say so in the configuration.

        The rows at the end are added or dropped, as in `transformers`: also the embedding's extra rows count,
        and the head gets rows for them. Here such a model can be saved and loaded again; `transformers`
        itself loads only models whose embedding has eight rows more than their head.

        Args:
            new_num_tokens: None for as many as the embedding has.
            pad_to_multiple_of: round up to a multiple of this.
            mean_resizing: draw new rows around the mean of the old ones; False: as in a fresh model.
        Returns: the embedding.
        Raises: ValueError for numbers that are none, or too few for the image token; TypeError for a model
            without tokens, that is split over ranks, or whose embedding or head has been replaced by a module
            of another kind.
        """
        embedding = self.get_input_embeddings()
        if new_num_tokens is None and pad_to_multiple_of is None:
            return embedding
        require_whole(self, "resize_token_embeddings()")
        count = _row_count(new_num_tokens, pad_to_multiple_of, embedding)
        image_token = getattr(self.config, "image_token_index", -1)
        if count <= image_token:
            raise ValueError(f"{count} rows are too few: the image token is {image_token}")
        _check_plain(embedding, head := self.get_output_embeddings())
        if not isinstance(embedding, nn.Embedding):
            raise TypeError(f"only an nn.Embedding can be resized, got {type(embedding).__name__}")
        if head is not None:
            _check_linear(head)  # before anything changes
        std = self.config.get_text_config().initializer_range
        if count != embedding.num_embeddings:
            options = {"device": embedding.weight.device, "dtype": embedding.weight.dtype}
            new = nn.Embedding(count, embedding.embedding_dim, **options)
            _fill(new, embedding.weight, None if mean_resizing else std)
            # The module and its parameter stay, so that hooks and optimisers do.
            embedding.weight.data = new.weight.data
            embedding.num_embeddings = count
            if embedding.padding_idx is not None and embedding.padding_idx >= count:
                embedding.padding_idx = None
        if head is not None:
            self.set_output_embeddings(
                self._get_resized_lm_head(head, count, mean_resizing=mean_resizing)
            )
        self.config.get_text_config().vocab_size = count
        return embedding

    def _get_resized_lm_head(
        self,
        old_lm_head: nn.Module,
        new_num_tokens: int | None = None,
        transposed: bool = False,
        mean_resizing: bool = True,
    ) -> nn.Module:
        """A head with other classes at the end, for :meth:`set_output_embeddings`; the documented way to give
        the head a row for the image token. Arguments as in `transformers`."""
        require_whole(self, "resizing the head")
        if transposed:
            raise ValueError("transposed can only be False: a head's rows are its classes")
        _check_plain(old_lm_head)
        _check_linear(old_lm_head)
        if new_num_tokens is None:
            return old_lm_head
        count = _row_count(new_num_tokens, None, old_lm_head)
        if count == old_lm_head.out_features:
            return old_lm_head
        weight = old_lm_head.weight
        new = nn.Linear(
            old_lm_head.in_features, count, bias=False, device=weight.device, dtype=weight.dtype
        )
        std = self.config.get_text_config().initializer_range
        _fill(new, weight, None if mean_resizing else std)
        return new.requires_grad_(weight.requires_grad)


def _row_count(given: int | None, multiple: int | None, module: nn.Module) -> int:
    """Raises: ValueError naming what is no number of rows."""
    values: dict[str, Any] = {"new_num_tokens": given, "pad_to_multiple_of": multiple}
    asked = [name for name, value in values.items() if value is not None]
    if problems := [p for name in asked for p in value_problem(name, _COUNT, values)]:
        raise ValueError("; ".join(problems))
    count, step = values["new_num_tokens"], values["pad_to_multiple_of"] or 1
    count = module.weight.shape[0] if count is None else count
    return -(-count // step) * step


def _check_plain(*modules: nn.Module | None) -> None:
    for module in modules:
        if isinstance(module, Quantized):
            raise TypeError(
                f"{type(module).__name__} is quantised ({module.weight.encoding}) and cannot be resized: "
                "load the model with dequantize=True"
            )


def _check_linear(head: nn.Module) -> None:
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise TypeError(f"only an nn.Linear without bias can be resized, got {head}")


def _check_width(what: str, width: Any, config: Any) -> None:
    expected = config.get_text_config().hidden_size
    if isinstance(width, int) and width != expected:
        raise ValueError(f"{what} must be of width {expected} (hidden_size), got {width}")


@torch.no_grad()
def _fill(new: nn.Module, old: Tensor, std: float | None) -> None:
    """Copy the rows that both have; draw the others by ``std``, or around the mean of the old ones.

    The latter as `transformers` does, from a normal distribution of their mean and 1e-9 of their covariance
    (Hewitt 2021, "Initializing new word embeddings for pretrained language models"), if it is one.
    """
    rows = min(len(new.weight), len(old))
    added = len(new.weight) - rows
    if added and std is not None:
        init_normal(new, std)
    elif added and not old.is_meta:
        values = old.float()
        mean = values.mean(0)
        centred = values - mean
        covariance = 1e-9 * (centred.T @ centred / len(old))
        constraint = torch.distributions.constraints.positive_definite
        if constraint.check(covariance).all():
            drawn = torch.distributions.MultivariateNormal(mean, covariance).sample((added,))
        else:
            drawn = mean.expand(added, -1)
        new.weight[rows:] = drawn.to(old.dtype)
    new.weight[:rows] = old[:rows]
