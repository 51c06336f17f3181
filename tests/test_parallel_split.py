"""Which part of each parameter a rank gets; no process group is needed for that."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from model_helpers import Shape

import mllama
from mllama.parallel.ranks import Ranks
from mllama.parallel.rules import Cut, spans
from mllama.parallel.split import CannotSplit, Share, Split

WIDE: dict[str, Any] = {"layers": 2, "cross": (1,), "heads": 8, "vision_heads": 8, "head_dim": 8}
WIDE |= {"vision_head_dim": 8, "local_layers": 1, "taps": (0,), "global_layers": 1, "vocab": 97}


def config_of(**sizes: Any) -> mllama.MllamaConfig:
    return mllama.MllamaConfig(**Shape(**WIDE | sizes).configs())


def model_of(**sizes: Any) -> mllama.MllamaForConditionalGeneration:
    return made_of(config_of(**sizes))


def made_of(config: mllama.MllamaConfig) -> mllama.MllamaForConditionalGeneration:
    with torch.device("meta"):
        return mllama.MllamaForConditionalGeneration(config)


def test_spans_cover_all_units_evenly() -> None:
    for units, size in itertools.product(range(1, 30), range(1, 9)):
        found = spans(units, size)
        if units < size:
            assert found is None
            continue
        assert (found[0][0], found[-1][1]) == (0, units)
        assert all(a[1] == b[0] for a, b in itertools.pairwise(found))
        lengths = {end - begin for begin, end in found}
        assert max(lengths) - min(lengths) <= 1 and min(lengths) > 0


def test_spans_of_fewer_units_repeat_them() -> None:
    assert spans(2, 4, repeats=True) == [(0, 1), (0, 1), (1, 2), (1, 2)]
    assert spans(1, 3, repeats=True) == [(0, 1)] * 3
    assert spans(4, 4, repeats=True) == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert spans(8, 4, repeats=True) == [(0, 2), (2, 4), (4, 6), (6, 8)]
    assert spans(3, 4, repeats=True) is None


def test_a_cut_is_a_view_and_zeros_are_new() -> None:
    whole = torch.arange(12.0).view(3, 4)
    rows, columns = Cut(0, 1, 3)(whole), Cut(1, 0, 2)(whole)
    assert rows.tolist() == [[4, 5, 6, 7], [8, 9, 10, 11]] and columns.shape == (3, 2)
    assert rows.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
    assert Cut(0, 0, 3, is_zero=True)(whole).count_nonzero() == 0 and whole[2, 3] == 11


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8])
def test_all_ranks_together_have_each_parameter_once(size: int, kv_heads: int) -> None:
    model = model_of(kv_heads=kv_heads, intermediate=101)
    split = Split(model, size, {})
    parameters = dict(model.named_parameters())
    assert split.cuts.keys() <= parameters.keys()
    for name, parameter in parameters.items():
        last = ".".join(name.split(".")[-2:])
        cuts = split.cuts.get(name)
        if "norm" in name or "embed" in name or "gate" in name.split(".")[-1]:
            assert cuts is None, name
        elif "multi_modal_projector" in name:
            assert cuts is None
        elif last == "fc2.bias":
            assert [cut.is_zero for cut in cuts] == [False] + [True] * (size - 1)
            assert all((cut.begin, cut.end) == (0, len(parameter)) for cut in cuts)
        else:
            assert len(cuts) == size and len({cut.dim for cut in cuts}) == 1, name
            is_row_parallel = last in ("o_proj.weight", "down_proj.weight", "fc2.weight")
            assert cuts[0].dim == (1 if is_row_parallel else 0), name
            is_key_or_value = last in ("k_proj.weight", "v_proj.weight") and "vision" not in name
            copies = max(1, size // kv_heads) if is_key_or_value else 1
            counts = torch.zeros(parameter.shape[cuts[0].dim], dtype=torch.int64)
            for cut in cuts:
                counts[cut.begin : cut.end] += 1
            assert (counts == copies).all(), (name, counts)


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_queries_are_where_their_keys_are(size: int, kv_heads: int) -> None:
    cuts = Split(model_of(kv_heads=kv_heads), size, {}).cuts
    for path in ("layers.0.self_attn", "layers.1.cross_attn"):
        place = f"model.language_model.{path}"
        for rank in range(size):
            query, key, value, output = (
                cuts[f"{place}.{name}_proj.weight"][rank] for name in ("q", "k", "v", "o")
            )
            heads = range(query.begin // 8, query.end // 8)
            needed = {head * kv_heads // 8 for head in heads}
            assert needed == set(range(key.begin // 8, key.end // 8))
            assert (key.begin, key.end) == (value.begin, value.end)
            assert (query.begin, query.end) == (output.begin, output.end)


def test_what_was_made_for_one_input_is_cut_at_the_same_place() -> None:
    cuts = Split(model_of(intermediate=101), 4, {}).cuts
    for layer in (0, 1):
        mlp = f"model.language_model.layers.{layer}.mlp"
        gate, up, down = (
            [(cut.begin, cut.end) for cut in cuts[f"{mlp}.{name}_proj.weight"]]
            for name in ("gate", "up", "down")
        )
        assert gate == up == down and gate[0] == (0, 25)


@pytest.mark.parametrize(
    ("sizes", "ranks", "message"),
    [
        ({}, 3, r"3 ranks cannot share the 8 heads of model\.vision_model\.transformer\.layers\.0"),
        ({"vision_heads": 3}, 2, r"2 ranks cannot share the 3 heads of model\.vision_model"),
        ({"heads": 6, "kv_heads": 3}, 2, r"2 ranks cannot share the 3 heads .*self_attn\.k_proj"),
        ({"heads": 6, "kv_heads": 6}, 4, r"4 ranks cannot share the 6 heads .*self_attn\.q_proj"),
        ({"heads": 24, "kv_heads": 6}, 4, r"4 ranks cannot share the 6 heads .*self_attn\.k_proj"),
        ({"intermediate": 3}, 4, r"4 ranks cannot share the 3 features of .*mlp\.gate_proj"),
    ],
)
def test_what_does_not_divide_is_refused(sizes: Any, ranks: int, message: str) -> None:
    with pytest.raises(CannotSplit, match=message):
        Split(model_of(**sizes), ranks, {})


def test_a_share_says_the_whole_vocabulary_and_its_own_heads() -> None:
    config = config_of(kv_heads=2, intermediate=101)
    model = made_of(config)
    plain = model.config.to_dict()
    share = Share(Ranks(None, 3, 4), Split(model, 4, {}))
    share.take(model)
    layer = model.model.language_model.layers[0]
    assert (model.head_rows, model.lm_head.out_features) == (97, 25)
    assert (layer.mlp.down_proj.in_features, layer.self_attn.k_proj.out_features) == (26, 8)
    assert model.config.text_config.local_key_value_heads == 1
    assert model.config.to_dict() == plain
    assert config.text_config.local_key_value_heads == 2  # another model may be made of it
    assert all(part.share is share for part in (model.model, model.model.vision_model))
