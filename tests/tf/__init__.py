"""Tests of the TensorFlow port, skipped without its extra."""

import pytest

for package in ("tensorflow", "keras"):
    pytest.importorskip(package, reason="the TensorFlow port needs pip install 'mistral_hf[tf]'")
