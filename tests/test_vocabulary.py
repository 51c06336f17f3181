"""More or fewer tokens: embedding and head of `transformers` with the same seed, saved and loaded again."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from model_helpers import Prompt, Shape, assert_close, batch_of, hf_model, our_model
from safetensors.torch import load_file, save_file
from torch import nn

import mllama
from mllama.checkpoints.checkpoint import CheckpointError

SHAPE = Shape(
    layers=2, cross=(1,), local_layers=1, global_layers=1, taps=(0,), tile_side=28, head_dim=32
)
V, E = SHAPE.vocab, SHAPE.vocab + 8
WIDTH = SHAPE.heads * SHAPE.head_dim
pytestmark = pytest.mark.filterwarnings("ignore:`hidden_state` is deprecated")


@pytest.fixture(scope="module")
def _hf() -> nn.Module:
    torch.manual_seed(0)
    return hf_model(SHAPE)


@pytest.fixture
def hf(_hf: nn.Module) -> Any:
    return copy.deepcopy(_hf)


@pytest.fixture
def ours(_hf: nn.Module) -> Any:
    return our_model(SHAPE, _hf)


def _rows(model: Any) -> tuple[int, int, int]:
    """Of the embedding, of the head, and what the configuration says."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert embedding.num_embeddings == embedding.weight.shape[0]
    assert head.out_features == head.weight.shape[0]
    return embedding.num_embeddings, head.out_features, model.config.get_text_config().vocab_size


def _enlarge_head(model: Any, by: int = 1) -> None:
    """As the documentation of Mllama in `transformers` has it, whose model has lost its `vocab_size`."""
    old, config = model.get_output_embeddings(), model.config.get_text_config()
    classes = getattr(model, "vocab_size", config.vocab_size)
    new = model._get_resized_lm_head(old, new_num_tokens=classes + by, mean_resizing=True)
    new.requires_grad_(old.weight.requires_grad)
    model.set_output_embeddings(new)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "more": lambda m: m.resize_token_embeddings(112),
    "one more than the tokenizer had": lambda m: m.resize_token_embeddings(V + 1),
    "as many": lambda m: m.resize_token_embeddings(E),
    "to a multiple": lambda m: m.resize_token_embeddings(110, pad_to_multiple_of=64),
    "only to a multiple": lambda m: m.resize_token_embeddings(pad_to_multiple_of=64),
    "without the mean": lambda m: m.resize_token_embeddings(130, mean_resizing=False),
    "nothing": lambda m: m.resize_token_embeddings(),
    "twice": lambda m: (m.resize_token_embeddings(130), m.resize_token_embeddings(120)),
    "the head": _enlarge_head,
    "the head by eight": lambda m: _enlarge_head(m, 8),
    "a head, then all": lambda m: (_enlarge_head(m), m.resize_token_embeddings(110)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_equals_transformers_and_loads_again(
    change: str, hf: Any, ours: Any, tmp_path: Path
) -> None:
    for model in (hf, ours):
        torch.manual_seed(7)
        CHANGES[change](model)
    assert _rows(ours) == _rows(hf)
    expected = hf.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-6)
    ours.save_pretrained(tmp_path / "ours")
    hf.save_pretrained(tmp_path / "theirs")
    batch = batch_of(SHAPE, [Prompt(5, (1,), (2,)), Prompt(4)])
    with torch.no_grad():
        logits = ours(**batch).logits
        for folder in ("ours", "theirs"):
            again = mllama.MllamaForConditionalGeneration.from_pretrained(tmp_path / folder)
            assert _rows(again) == _rows(ours)
            assert_close(again(**batch).logits, logits, where=batch["attention_mask"], rtol=1e-5)
    text = mllama.MllamaForCausalLM.from_pretrained(tmp_path / "theirs")
    assert _rows(text) == _rows(ours)
    assert mllama.MllamaTextModel.from_pretrained(tmp_path / "theirs").vocab_size == _rows(ours)[2]


def test_transformers_loads_an_enlarged_checkpoint_only_in_its_own_layout(
    ours: Any, tmp_path: Path
) -> None:
    ours.resize_token_embeddings(112)
    ours.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        transformers.MllamaForConditionalGeneration.from_pretrained(tmp_path)


def test_new_tokens_are_read_learned_and_written(ours: Any) -> None:
    ids = torch.tensor([[3, 111, 5]])
    with pytest.raises(ValueError, match=rf"within 0\.\.{E - 1}"):
        ours(ids)
    with pytest.raises(ValueError, match=rf"labels must be -100 or within 0\.\.{V - 1}"):
        ours(ids % E, labels=torch.tensor([[3, V + 1, 5]]))
    ours.resize_token_embeddings(112)
    loss = ours(ids, labels=ids).loss
    loss.backward()
    assert ours.get_input_embeddings().weight.grad[111].abs().sum() > 0
    assert ours(ids, labels=ids, return_logits=False).loss.isclose(loss)
    with torch.no_grad():
        ours.lm_head.weight[111] = ours(ids, output_hidden_states=True).hidden_states[-1][0, -1] * 9
    tokens = ours.generate(ids, max_new_tokens=2, do_sample=False, repetition_penalty=1.1)
    assert tokens[0, 3] == 111


def test_an_enlarged_head_under_every_option_of_generation(ours: Any) -> None:
    _enlarge_head(ours)
    ids = torch.tensor([[3, 4, 5]])
    assert ours(ids).logits.shape[-1] == V + 1
    ours.generate(ids, max_new_tokens=3, do_sample=True, repetition_penalty=1.3, top_p=0.9, seed=1)


def test_hooks_and_optimisers_keep_the_embedding(ours: Any) -> None:
    embedding = ours.get_input_embeddings()
    parameter = embedding.weight
    parameter.requires_grad_(False)
    ours.lm_head.weight.requires_grad_(False)
    assert ours.resize_token_embeddings(112) is embedding is ours.get_input_embeddings()
    assert embedding.weight is parameter and not parameter.requires_grad
    assert not ours.lm_head.weight.requires_grad
    assert embedding.padding_idx == SHAPE.configs()["text_config"]["pad_token_id"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(ours: Any, dtype: torch.dtype) -> None:
    ours.to(dtype).resize_token_embeddings(112)
    assert {p.dtype for p in ours.parameters()} == {dtype}


def test_without_weights(ours: Any) -> None:
    with torch.device("meta"):
        model = mllama.MllamaForConditionalGeneration(ours.config)
    model.resize_token_embeddings(112)
    assert _rows(model) == (112, 112, 112)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0,), ValueError, "new_num_tokens must be an integer of at least 1, got 0"),
        ((-5,), ValueError, "new_num_tokens"),
        ((112.5,), ValueError, "new_num_tokens"),
        (("112",), ValueError, "new_num_tokens"),
        ((True,), ValueError, "new_num_tokens"),
        ((112, 0), ValueError, "pad_to_multiple_of must be an integer of at least 1, got 0"),
        ((None, 1.5), ValueError, "pad_to_multiple_of"),
        ((V,), ValueError, "96 rows are too few: the image token is 96"),
    ],
)
def test_numbers_of_tokens_that_are_none(
    arguments: Any, error: type, message: str, ours: Any
) -> None:
    before = _rows(ours)
    with pytest.raises(error, match=message):
        ours.resize_token_embeddings(*arguments)
    assert _rows(ours) == before


def test_modules_that_do_not_fit_are_refused(ours: Any) -> None:
    with pytest.raises(ValueError, match=rf"embedding must be of width {WIDTH} .*, got 7"):
        ours.set_input_embeddings(nn.Embedding(E, 7))
    with pytest.raises(ValueError, match=rf"head must be of width {WIDTH} .*, got 7"):
        ours.set_output_embeddings(nn.Linear(7, V))
    with pytest.raises(TypeError, match="MllamaModel has no head"):
        ours.model.set_output_embeddings(nn.Linear(WIDTH, V))
    with pytest.raises(TypeError, match=r"only an nn\.Embedding can be resized, got Conv2d"):
        ours.model.vision_model.resize_token_embeddings(9)
    with pytest.raises(TypeError, match=r"only an nn\.Linear without bias can be resized"):
        ours._get_resized_lm_head(nn.Linear(WIDTH, V), 100)
    before = _rows(ours)
    ours.set_output_embeddings(nn.Linear(WIDTH, V))
    with pytest.raises(TypeError, match=r"only an nn\.Linear without bias can be resized"):
        ours.resize_token_embeddings(112)
    assert _rows(ours) == before
    with pytest.raises(ValueError, match="transposed can only be False"):
        ours._get_resized_lm_head(ours.lm_head, 100, transposed=True)


def test_modules_of_ones_own(ours: Any, tmp_path: Path) -> None:
    """Set from outside, used from then on, and saved; where a part is the owner, through every class."""
    embedding = nn.Embedding(200, WIDTH)
    ours.set_input_embeddings(embedding)
    assert ours.model.language_model.embed_tokens is embedding is ours.model.get_input_embeddings()
    head = nn.Linear(WIDTH, 150, bias=False)
    ours.set_output_embeddings(head)
    assert ours.eval()(torch.tensor([[199]])).logits.shape[-1] == 150
    ours.save_pretrained(tmp_path)
    again = mllama.MllamaForConditionalGeneration.from_pretrained(tmp_path)
    assert _rows(again) == (200, 150, V)
    ours.model.vision_model.set_input_embeddings(ours.model.vision_model.get_input_embeddings())
    ours.tie_weights()
    assert again.lm_head.weight is not again.get_input_embeddings().weight


@pytest.mark.parametrize(("embedding", "head"), [(E, E + 1), (V - 1, V - 1)])
def test_a_vocabulary_that_could_not_be_loaded_is_not_saved(
    embedding: int, head: int, ours: Any, tmp_path: Path
) -> None:
    ours.set_input_embeddings(nn.Embedding(embedding, WIDTH))
    ours.set_output_embeddings(nn.Linear(WIDTH, head, bias=False))
    with pytest.raises(
        ValueError, match="could not be loaded: vocab_size is 96, the embedding has"
    ):
        ours.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("embedding", "head"), [(V - 1, V), (E, E + 1), (E, 0)])
def test_tables_that_fit_nothing_are_wrong_shapes(
    embedding: int, head: int, hf: Any, tmp_path: Path
) -> None:
    hf.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors["language_model.model.embed_tokens.weight"] = torch.zeros(embedding, WIDTH)
    tensors["language_model.lm_head.weight"] = torch.zeros(head, WIDTH)
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match="wrong shape: language_model"):
        mllama.MllamaForConditionalGeneration.from_pretrained(tmp_path)
