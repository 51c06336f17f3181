"""The layers keep the conventions that make them usable as another module's forward."""

from __future__ import annotations

import inspect
import types

import pytest
import torch
from torch import nn

from mllama_kernels import layers, reference


@pytest.mark.parametrize("cls", [layers.RMSNorm, layers.SiluAndMul])
def test_layers_are_stateless(cls):
    assert cls.__init__ is nn.Module.__init__
    own = {name for name, _ in inspect.getmembers(cls)} - {
        n for n, _ in inspect.getmembers(nn.Module)
    }
    assert own <= {"can_torch_compile", "has_backward"}


def test_a_norm_lends_its_weight():
    norm = nn.Module()
    norm.weight, norm.variance_epsilon = nn.Parameter(torch.rand(32)), 1e-3
    norm.forward = types.MethodType(layers.RMSNorm.forward, norm)
    x = torch.randn(3, 32)
    with torch.no_grad():
        torch.testing.assert_close(norm(x), reference.rms_norm(x, norm.weight, 1e-3))


def test_an_activation():
    x = torch.randn(3, 32)
    torch.testing.assert_close(layers.SiluAndMul()(x), reference.swiglu(x))
