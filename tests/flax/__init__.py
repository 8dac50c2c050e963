"""Tests of the JAX port, skipped without its extra."""

import pytest

for package in ("jax", "flax.nnx"):
    pytest.importorskip(package, reason="the JAX port needs pip install 'mistral_hf[flax]'")
