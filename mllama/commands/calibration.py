"""How much the columns of a model's weights matter, found by running the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from mllama import MllamaForConditionalGeneration, MllamaProcessor
from mllama.checkpoints.key_layout import KeyLayout
from mllama.commands.common import chat_inputs, user_turn
from mllama.files import FileRefused, read_text
from mllama.processing.images import check_image
from mllama.progress import bar
from mllama.quantization.policy import kind_of
from mllama.training.batches import collate
from mllama.training.encoding import Example, read_examples
from mllama.wording import shown

# What is asked about the images of a folder.
QUESTION = "Describe this image."
MAX_TOKENS = 2048  # of a piece of text
MAX_TEXT_BYTES = 64 * 2**20
_IMAGES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})

Inputs = Callable[[], dict[str, Tensor]]


def read_inputs(path: Path, processor: MllamaProcessor, max_length: int) -> list[Inputs]:
    """What a model is run on, made when its turn comes.

    Args:
        path: a JSON Lines file of conversations, as `mllama finetune` takes it; or a folder, of which each
            image is described, and each .txt file is read in pieces of 2048 tokens.
        max_length: tokens that the model takes.
    Raises: ValueError, OSError for what cannot be read, with its name, before anything runs.
    """
    if not path.is_dir():
        examples = read_examples(path, processor, max_length)
        return [lambda example=example: _unlabelled(processor, example) for example in examples]
    found: list[Inputs] = []
    for file in sorted(path.iterdir()):
        if file.suffix.lower() in _IMAGES:
            check_image(file)
            found.append(lambda file=file: _described(processor, file))
        elif file.suffix.lower() == ".txt":
            found += _pieces(processor, file, min(max_length, MAX_TOKENS))
    if not found:
        kinds = ", ".join(sorted(_IMAGES))
        raise ValueError(
            f"{shown(str(path))} holds nothing to run the model on: neither images ({kinds}) nor .txt files"
        )
    return found


def _unlabelled(processor: MllamaProcessor, example: Example) -> dict[str, Tensor]:
    inputs = collate(processor, [example])
    del inputs["labels"]
    return inputs


def _described(processor: MllamaProcessor, image: Path) -> dict[str, Tensor]:
    return chat_inputs(processor, [user_turn(QUESTION, [str(image)])], torch.device("cpu"))


def _pieces(processor: MllamaProcessor, file: Path, length: int) -> Iterator[Inputs]:
    try:
        text = read_text(file, MAX_TEXT_BYTES)
    except FileRefused as error:
        raise ValueError(f"{shown(str(file))} cannot be read: {error}") from None
    ids = processor.tokenizer([text], add_special_tokens=False)["input_ids"][0]
    for begin in range(0, len(ids), length):
        piece = torch.tensor([ids[begin : begin + length]])
        yield lambda piece=piece: {"input_ids": piece}


class _Squares:
    """The sums of squares of a linear's inputs, by column."""

    def __init__(self, linear: nn.Module) -> None:
        self.total: Tensor | None = None
        self.count = 0
        self.hook = linear.register_forward_pre_hook(self._add)

    def _add(self, linear: nn.Module, inputs: Sequence[Tensor]) -> None:
        x = inputs[0].detach().flatten(0, -2)
        # In slabs: a prompt of 128k tokens in float32 would be as large as the model.
        for slab in x.split(4096):
            squares = slab.float().square().sum(0, dtype=torch.float64)
            self.total = squares if self.total is None else self.total + squares
        self.count += len(x)


def mean_squares(
    model: MllamaForConditionalGeneration, inputs: Sequence[Inputs]
) -> dict[str, Tensor]:
    """The mean squares (K,) of what each weight is multiplied by, float32 by canonical name.

    A weight whose linear no input reached, as those of the cross-attention without an image, is not among
    them.

    Raises: ValueError, naming the weight, for inputs that are not finite.
    """
    layout = KeyLayout(type(model).__name__)
    found: dict[str, _Squares] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            canonical = layout.canonical_name(f"{path}.weight")
            if kind_of(canonical) is not None:
                found[canonical] = _Squares(module)
    try:
        with torch.inference_mode(), bar("calibrating", len(inputs), "prompt") as progress:
            for make in inputs:
                batch = {name: value.to(model.device) for name, value in make().items()}
                model(**batch)
                progress.update()
    finally:
        for squares in found.values():
            squares.hook.remove()
    means = {n: (s.total / s.count).float().cpu() for n, s in found.items() if s.total is not None}
    for name, mean in means.items():
        if not bool(mean.isfinite().all()):
            raise ValueError(
                f"the model's activations are not finite where {shown(name)} is multiplied"
            )
    return means
