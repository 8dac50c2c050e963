"""The JAX port without other packages, on several devices, and in its example."""

import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mistral_hf import BUNDLED_CHECKPOINT, FlaxMistralForCausalLM
from mistral_hf.flax.sharding import weight_sharding
from tests.helpers.flax_models import jax
from tests.helpers.processes import run_python

P = jax.sharding.PartitionSpec
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("missing", ["jax", "flax"])
def test_without_the_extra_the_first_use_says_what_to_install(missing: str) -> None:
    """The package itself is imported without jax."""
    code = """
import mistral_hf
print(any(name in sys.modules for name in ("jax", "flax", "tensorflow")))
try:
    mistral_hf.FlaxMistralForCausalLM
except ImportError as error:
    print(error)
"""
    first, message = run_python(code, (missing, "torch")).strip().splitlines()[-2:]
    assert first == "False"
    assert f"needs {missing}" in message
    assert "pip install 'mistral_hf[flax]'" in message


def test_the_port_needs_neither_torch_nor_tensorflow() -> None:
    code = """
import numpy as np
from mistral_hf import BUNDLED_CHECKPOINT, FlaxMistralForCausalLM
model = FlaxMistralForCausalLM.from_pretrained(BUNDLED_CHECKPOINT)
sequences = model.generate(np.array([[1, 5, 9]]), max_new_tokens=2, do_sample=False).sequences
print("torch" in sys.modules, "tensorflow" in sys.modules, sequences.shape)
"""
    assert run_python(code, ("torch", "tensorflow")).splitlines()[-1] == "False False (1, 5)"


MESHES = """
import jax, numpy as np, tempfile
from jax.sharding import Mesh
from mistral_hf import FlaxMistralForCausalLM, MistralConfig
from mistral_hf.flax.compiled import generation_programs
from mistral_hf.flax.sharding import shard_rows
from mistral_hf.generation_options import GenerationOptions
jax.config.update("jax_disable_most_optimizations", True)
config = MistralConfig(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=8,
    num_key_value_heads=4, head_dim=8, sliding_window=6, initializer_range=0.2, eos_token_id=None)
ids = np.random.default_rng(0).integers(1, 96, (2, 10))
mask = np.ones_like(ids)
mask[1, :4] = 0
options = {"max_new_tokens": 12, "do_sample": False}
alone = FlaxMistralForCausalLM(config)
mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "model"))
with tempfile.TemporaryDirectory() as folder:
    alone.save_pretrained(folder)
    model = FlaxMistralForCausalLM.from_pretrained(folder, mesh=mesh)
    weight = model.params["model"]["layers"]["0"]["mlp"]["down_proj"]["weight"]
    assert weight.addressable_shards[0].data.shape == (32, 12)
    model.save_pretrained(folder)
    saved = FlaxMistralForCausalLM.from_pretrained(folder)
assert all(jax.tree.leaves(jax.tree.map(lambda a, b: (a == b).all(), saved.params, alone.params)))
found, expected = model(ids, mask).logits, alone(ids, mask).logits
assert found.addressable_shards[0].data.shape[0] == 1
for row, start in enumerate((0, 4)):
    np.testing.assert_allclose(found[row, start:], expected[row, start:], atol=3e-5)
tokens = alone.generate(ids, mask, **options).sequences
assert np.array_equal(model.generate(ids, mask, **options).sequences, tokens)
programs = generation_programs(model._graph, GenerationOptions(16, 0))
rows = [shard_rows(np.pad(x, ((0, 0), (6, 0))), mesh) for x in (ids.astype("int32"), mask > 0)]
keys = programs.prefill(model.params, *rows, 12, jax.random.key(0)).cache.keys[0]
assert keys.addressable_shards[0].data.shape == (1, 1, 6, 8)
assert programs.prefill._cache_size() == 2  # for one device, and for the mesh
gradient = jax.grad(lambda params: model.loss(ids, mask, params=params))(model.params)
gradient = gradient["model"]["layers"]["0"]["mlp"]["down_proj"]["weight"]
assert gradient.sharding.is_equivalent_to(weight.sharding, 2)
print(len(jax.devices()))
"""


def test_eight_devices_compute_what_one_computes() -> None:
    """Tensor and data parallel: weights are spread over the devices; logits and tokens are the same."""
    environment = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    assert run_python(MESHES, **environment).splitlines()[-1] == "8"


def test_a_mesh_that_does_not_fit_is_refused() -> None:
    mesh: Any = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("rows", "model"))
    with pytest.raises(ValueError, match=r"'rows'.*'data', 'model'"):
        FlaxMistralForCausalLM.from_pretrained(BUNDLED_CHECKPOINT, mesh=mesh)
    wide = jax.sharding.AbstractMesh((1, 5), ("data", "model"))
    with pytest.raises(ValueError, match=r"q_proj.*5 devices, as 256"):
        weight_sharding("model.layers.0.self_attn.q_proj.weight", (256, 256), wide)
    assert weight_sharding("layers.self_attn.o_proj.weight", (4, 256, 255), wide).spec == P(None, None, "model")


def test_the_example_lowers_the_loss(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("optax")
    text = tmp_path / "text.txt"
    text.write_text((BUNDLED_CHECKPOINT / "heldout.txt").read_text()[:600])
    arguments = ["--text", str(text), "--steps", "12", "--batch", "2", "--length", "64", "--learning-rate", "1e-3"]
    monkeypatch.setattr(sys, "argv", ["finetune_flax.py", *arguments, "--output", str(tmp_path / "tuned")])
    runpy.run_path(str(ROOT / "examples" / "finetune_flax.py"), run_name="__main__")
    assert "12/12" in capsys.readouterr().err
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(tmp_path / "tuned")(text.read_text(), return_tensors="np").input_ids
    before, after = (
        float(FlaxMistralForCausalLM.from_pretrained(folder, dtype="float32").loss(ids))
        for folder in (BUNDLED_CHECKPOINT, tmp_path / "tuned")
    )
    assert after < before - 0.3
