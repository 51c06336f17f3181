"""`rope_freqs.weight`, the factors that stretch rotary frequencies, against a configuration's scaling."""

from __future__ import annotations

from torch import Tensor

from mllama.config import MllamaTextConfig
from mllama.rope import inverse_frequencies

_TOLERANCE = 1e-3  # converters compute in float32; a scaling that differs at all differs by more


def factors(config: MllamaTextConfig) -> Tensor:
    """(D / 2,): by how much the configuration's scaling divides each frequency."""
    base = {"rope_type": "default", "rope_theta": config.rope_theta}
    plain = MllamaTextConfig.from_dict(
        {**config.to_dict(), "rope_parameters": base, "rope_scaling": None}
    )
    return inverse_frequencies(plain) / inverse_frequencies(config)


def rope_problem(stored: Tensor | None, config: MllamaTextConfig) -> str | None:
    """Why the stored factors, None where there are none, are not those of a configuration."""
    expected = factors(config)
    scaling = config.rope_scaling or {"rope_type": "default"}
    remedy = f"the configuration's scaling is {scaling}; give config= with the model's own"
    if stored is None:
        if bool((expected == 1).all()):
            return None
        return f"there is no rope_freqs.weight, as if frequencies were not scaled; {remedy}"
    if stored.shape != expected.shape:
        return f"rope_freqs.weight has {len(stored)} factors, expected {len(expected)}"
    wrong = ~((stored.double() / expected.double() - 1).abs() <= _TOLERANCE)
    if not bool(wrong.any()):
        return None
    first = int(wrong.nonzero()[0])
    found, wanted = float(stored[first]), float(expected[first])
    return f"rope_freqs.weight has {found:g} at {first}, expected {wanted:g}: {remedy}"
