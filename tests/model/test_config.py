"""ModelConfig refuses what no network can be, whatever number a file states."""

from dataclasses import replace

import pytest

from gemstill.core.errors import Error
from gemstill.model.config import LARGEST, PRESETS, ModelConfig
from tests.model.reference import BASE


@pytest.mark.parametrize("name", LARGEST)
@pytest.mark.parametrize("value", [0, -1, -(2**63), 2**32, 2**63, 10**400])
def test_sizes_that_no_network_has(name, value):
    with pytest.raises(Error, match=rf"{name} is .*(must be above 0|at most)") as caught:
        replace(BASE, **{name: value})
    assert len(str(caught.value)) < 120


@pytest.mark.parametrize(
    "name", ["query_pre_attn_scalar", "rope_theta", "rope_local_theta", "rms_norm_eps", "attn_logit_softcap"]
)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 0.0, -1.0])
def test_constants_that_give_no_numbers(name, value):
    with pytest.raises(Error, match=rf"{name} is .*must be above 0"):
        replace(BASE, **{name: value})


def test_every_published_size_is_far_below_the_largest():
    for preset in PRESETS.values():
        assert all(getattr(preset, name) * 2 <= most for name, most in LARGEST.items())


def test_the_bytes_of_any_matrix_can_be_counted():
    largest = ModelConfig(**LARGEST, query_pre_attn_scalar=1.0)
    widest = max(largest.vocab_size, largest.intermediate_size, largest.num_heads * largest.head_dim)
    assert 8 * widest * largest.hidden_size < 2**63
