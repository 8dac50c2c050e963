"""The ports' rotary frequencies, in NumPy, are those of the library, to the last bits of float32."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from mistral_hf import MistralConfig
from mistral_hf.modeling_mistral import MistralRotaryEmbedding
from mistral_hf.rope import ROTARY_TYPES, rotary_frequencies

LENGTHS = (1, 63, 64, 65, 100, 1023, 1024, 1025, 5000)  # around the pretrained lengths, 64 and 1024


@pytest.fixture
def config(tiny: Any, rope_parameters: Any) -> Callable[..., MistralConfig]:
    """A configuration with a rotary embedding of a type, and changed parameters."""

    def build(kind: str, head_dim: int = 12, **parameters: Any) -> MistralConfig:
        return MistralConfig(**tiny(head_dim=head_dim, rope_parameters={**rope_parameters(kind), **parameters}))

    return build


def expected(config: MistralConfig, length: int) -> np.ndarray:
    """Those that PyTorch uses for a sequence of that length."""
    rotary = MistralRotaryEmbedding(config)
    rotary(torch.zeros(1), torch.arange(length)[None])
    return rotary.inv_freq.numpy()


def test_the_ports_have_every_type_of_the_library() -> None:
    assert ROTARY_TYPES.keys() == ROPE_INIT_FUNCTIONS.keys() | {"default"}


@pytest.mark.parametrize("kind", sorted(ROTARY_TYPES))
def test_frequencies_of_every_length_are_those_of_the_library(config: Any, kind: str) -> None:
    chosen = config(kind)
    found = rotary_frequencies(chosen)
    assert found.scaling == pytest.approx(MistralRotaryEmbedding(chosen).attention_scaling)
    for length in LENGTHS:
        ours = found.of_length(np.float32(length), np)
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, expected(chosen, length), rtol=1e-6, err_msg=str(length))
    assert (found.pretrained is not None) == (kind in ("dynamic", "longrope"))


@pytest.mark.parametrize("theta", [100.0, 1e4, 5e5, 1e6, 1e8])
@pytest.mark.parametrize("head_dim", [32, 80, 96, 128])
def test_default_frequencies_are_rounded_as_in_the_library(config: Any, theta: float, head_dim: int) -> None:
    """To one bit at most: computed in float64, a third of them would differ, and by up to four bits."""
    chosen = config("default", head_dim, rope_theta=theta)
    np.testing.assert_array_max_ulp(rotary_frequencies(chosen).of_length(None, np), expected(chosen, 1), maxulp=1)


@pytest.mark.parametrize(
    ("kind", "parameters"),
    [
        ("yarn", {"factor": None}),
        ("yarn", {"truncate": False, "beta_fast": 20.0, "beta_slow": 2.0}),
        ("yarn", {"mscale": 0.7, "mscale_all_dim": 1.3}),
        ("yarn", {"attention_factor": 0.8}),
        ("longrope", {"factor": None}),
        ("longrope", {"factor": 1.0}),
        ("longrope", {"attention_factor": 1.5}),
        ("proportional", {"partial_rotary_factor": 0.3, "factor": 2.0}),
        ("proportional", {"partial_rotary_factor": 1.0}),
        ("default", {"partial_rotary_factor": 0.5}),
    ],
    ids=str,
)
def test_fields_that_are_optional_are_honoured(config: Any, kind: str, parameters: dict[str, Any]) -> None:
    chosen = config(kind, **parameters)
    found = rotary_frequencies(chosen)
    assert found.scaling == pytest.approx(MistralRotaryEmbedding(chosen).attention_scaling)
    np.testing.assert_allclose(found.of_length(np.float32(100), np), expected(chosen, 100), rtol=1e-6)


def test_frequencies_can_be_a_key_of_compiled_programs(config: Any) -> None:
    assert len({rotary_frequencies(config(kind)) for kind in ROTARY_TYPES}) == len(ROTARY_TYPES)
    assert rotary_frequencies(config("longrope")) == rotary_frequencies(config("longrope"))


def test_what_cannot_be_rotated_is_named(config: Any) -> None:
    with pytest.raises(ValueError, match=r"partial_rotary_factor.*'proportional'"):
        rotary_frequencies(config("linear", partial_rotary_factor=0.5))
    with pytest.raises(ValueError, match="3 values of long_factor, but needs 6"):
        rotary_frequencies(config("longrope", long_factor=[1.0, 2.0, 3.0]))
    unknown = config("default")
    unknown.rope_parameters = {"rope_type": "spiral", "rope_theta": 1.0}
    with pytest.raises(ValueError, match=r"rope_type='spiral' is unknown.*default, dynamic"):
        rotary_frequencies(unknown)
