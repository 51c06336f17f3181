"""What people call on a model besides forward and generate: the answers of `transformers`' model."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import transformers
from model_helpers import Prompt, Shape, batch_of, hf_model, our_model
from PIL import Image

import mllama
from mllama.demo import checkpoint_path

SHAPE = Shape(
    layers=2, cross=(1,), local_layers=1, global_layers=1, taps=(0,), tile_side=28, head_dim=32
)
pytestmark = pytest.mark.filterwarnings("ignore:`hidden_state` is deprecated")


@pytest.fixture(scope="module")
def hf() -> Any:
    torch.manual_seed(0)
    return hf_model(SHAPE)


@pytest.fixture
def ours(hf: Any) -> Any:
    return our_model(SHAPE, hf)


PARTS = {
    "whole": lambda m: m,
    "inner": lambda m: m.model,
    "text": lambda m: m.model.language_model,
    "vision": lambda m: m.model.vision_model,
}


@pytest.mark.parametrize("part", PARTS)
def test_answers_of_every_class(part: str, hf: Any, ours: Any) -> None:
    mine, theirs = PARTS[part](ours), PARTS[part](hf)
    for only_trainable in (False, True):
        for frozen in (mine, theirs):
            next(frozen.parameters()).requires_grad_(False)
        for exclude in (False, True):
            arguments = {"only_trainable": only_trainable, "exclude_embeddings": exclude}
            assert mine.num_parameters(**arguments) == theirs.num_parameters(**arguments)
    for model in (mine, theirs):
        next(model.parameters()).requires_grad_(True)
    assert mine.get_memory_footprint(False) == theirs.get_memory_footprint(return_buffers=False)
    assert mine.can_generate() == theirs.can_generate() == type(mine).can_generate()
    assert mine.input_modalities == theirs.input_modalities
    assert mine.main_input_name == theirs.main_input_name
    assert mine.name_or_path == theirs.name_or_path == ""
    assert mine.config.get_text_config().model_type == theirs.config.get_text_config().model_type
    assert mine.tie_weights() is None


def test_vision_tower_by_itself(hf: Any, ours: Any) -> None:
    batch = batch_of(SHAPE, [Prompt(5, (1,), (6,))])
    images = {n: batch[n] for n in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")}
    with torch.no_grad():
        mine = ours.model.vision_model(**images).last_hidden_state
        theirs = hf.model.vision_model(**images).last_hidden_state
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_gradients_begin_at_the_embedding(ours: Any) -> None:
    """For adapters on a frozen model whose layers are checkpointed."""
    ids = torch.tensor([[3, 4, 5]])
    ours.requires_grad_(False).train()
    assert not ours(ids).logits.requires_grad
    for _ in range(2):  # twice is once
        ours.enable_input_require_grads()
    assert ours(ids).logits.requires_grad
    twin = pickle.loads(pickle.dumps(copy.deepcopy(ours)))
    assert twin(ids).logits.requires_grad
    tokens = ours.eval().generate(ids, max_new_tokens=2, do_sample=False)
    ours.disable_input_require_grads()
    assert not ours.train()(ids).logits.requires_grad
    assert tokens.equal(ours.eval().generate(ids, max_new_tokens=2, do_sample=False))
    ours.disable_input_require_grads()


@pytest.mark.parametrize("processor", [transformers.AutoProcessor, mllama.MllamaProcessor])
def test_pipeline(processor: Any) -> None:
    folder = checkpoint_path()
    model = mllama.MllamaForConditionalGeneration.from_pretrained(folder)
    pipeline = transformers.pipeline(
        "image-text-to-text", model=model, processor=processor.from_pretrained(folder)
    )
    assert pipeline.model is model and "MllamaForConditionalGeneration" in repr(pipeline)
    image = {"type": "image", "image": Image.new("RGB", (60, 60), (255, 0, 0))}
    question = {"type": "text", "text": "What colour is the square?"}
    (answer,) = pipeline(text=[{"role": "user", "content": [image, question]}], max_new_tokens=5)
    assert answer["generated_text"][-1] == {"role": "assistant", "content": "red"}
