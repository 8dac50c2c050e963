"""TensorFlow models with the weights of PyTorch models; importing this skips a module where the port cannot run."""

from typing import Any

import numpy as np
import pytest

_REASON = "the TensorFlow port needs: pip install 'mistral_hf[tf]'"
tf = pytest.importorskip("tensorflow", reason=_REASON)
keras = pytest.importorskip("keras", reason=_REASON)
if keras.backend.backend() != "tensorflow":
    pytest.skip(f"Keras runs on {keras.backend.backend()} here, not on TensorFlow", allow_module_level=True)

# After the skips above: these import TensorFlow.
import mistral_hf  # noqa: E402
from mistral_hf.tf import attention as tf_attention  # noqa: E402
from mistral_hf.tf import generation as tf_generation  # noqa: E402
from mistral_hf.tf import layers as tf_layers  # noqa: E402
from mistral_hf.tf import logits as tf_logits  # noqa: E402
from mistral_hf.tf import losses as tf_losses  # noqa: E402
from mistral_hf.tf import pretrained as tf_pretrained  # noqa: E402

__all__ = ["arrays", "assert_close", "keras", "tf", "to_tf"]
__all__ += ["tf_attention", "tf_generation", "tf_layers", "tf_logits", "tf_losses", "tf_pretrained"]


def to_tf(model: Any, dtype: Any = None) -> Any:
    """The TensorFlow model of the same head, configuration and weights."""
    ported = getattr(mistral_hf, f"TF{type(model).__name__}")(model.config, dtype=dtype)
    weights = dict(model.named_parameters())
    variables = ported.named_weights()
    assert variables.keys() == weights.keys()
    for name, variable in variables.items():
        variable.assign(weights[name].detach().float().numpy())
    return ported


def arrays(inputs: Any) -> dict[str, Any]:
    """A batch of torch tensors as NumPy arrays."""
    return {name: tensor.numpy() for name, tensor in inputs.items()}


def assert_close(found: Any, expected: Any, where: Any = ..., *, rtol: float = 0, atol: float = 2e-5) -> None:
    """Check that arrays are equal within a tolerance, at the positions that a mask or an index marks."""
    np.testing.assert_allclose(np.asarray(found)[where], np.asarray(expected)[where], rtol, atol, equal_nan=False)
