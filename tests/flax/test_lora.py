"""LoRA adapters in JAX: PEFT's numbers, trained by optax, saved so that PEFT loads them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mistral_hf import FlaxLoraAdapter, MistralForCausalLM
from mistral_hf.checkpoints.reader import CheckpointError
from tests.helpers.flax_models import array, arrays, differences, jax, jnp, leaves, stacked, to_flax

peft = pytest.importorskip("peft")

TARGETS = ["q_proj", "o_proj", "down_proj"]


@pytest.fixture(scope="module")
def model(make_model: Callable[..., Any]) -> Any:
    return make_model()


@pytest.fixture(scope="module")
def twin(model: Any) -> Any:
    return to_flax(model)


@pytest.fixture
def make_adapter(model: Any, tmp_path: Path) -> Callable[..., tuple[Path, Any]]:
    """A folder that PEFT wrote, whose matrices are random, and PEFT's logits of a batch."""

    def make(inputs: Any, **options: Any) -> tuple[Path, Any]:
        torch.manual_seed(5)
        settings = {"r": 4, "lora_alpha": 12, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **options}
        base = MistralForCausalLM(model.config).eval()
        base.load_state_dict(model.state_dict())
        adapted = peft.get_peft_model(base, peft.LoraConfig(**settings)).eval()
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        adapted.save_pretrained(tmp_path / "peft")
        return tmp_path / "peft", adapted(**inputs).logits.detach()

    return make


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"layers_to_transform": [1]}], ids=str)
def test_an_adapter_of_peft_has_its_logits_applied_and_merged(
    make_adapter: Any, twin: Any, padded: Any, options: dict[str, Any]
) -> None:
    inputs = padded(9, 6)
    folder, expected = make_adapter(inputs, **options)
    adapter, real, given = FlaxLoraAdapter.from_pretrained(folder), inputs["attention_mask"], arrays(inputs)
    plain = twin(**given).logits
    for params in (adapter.applied(twin.params), adapter.merged(twin.params)):
        assert differences(twin(**given, params=params).logits, expected, real) < 2e-5
    assert differences(plain, expected, real) > 0.05
    assert isinstance(adapter.merged(twin.params)["model"]["layers"]["1"]["mlp"]["down_proj"]["weight"], jax.Array)


def test_stacked_layers_and_int8_weights_take_an_adapter(make_adapter: Any, twin: Any, padded: Any) -> None:
    inputs = padded(9, 6)
    folder, expected = make_adapter(inputs)
    adapter, given, real = FlaxLoraAdapter.from_pretrained(folder), arrays(inputs), inputs["attention_mask"]
    scanned = stacked(twin)
    for apply in (adapter.applied, adapter.merged):
        assert differences(scanned(**given, params=apply(scanned.params)).logits, expected, real) < 2e-5
    quantized = type(twin)(twin.config, _do_init=False)
    quantized.params = twin.params
    quantized.quantize()
    dense = jax.tree.map(lambda w: w, adapter.merged(quantized.params))
    found = quantized(**given, params=adapter.applied(quantized.params)).logits
    np.testing.assert_allclose(found, twin(**given, params=_dense(dense)).logits, atol=2e-5)
    assert differences(found, expected, real) < 0.3


def _dense(params: Any) -> Any:
    from mistral_hf.flax.weights import PACKED

    is_leaf = lambda leaf: isinstance(leaf, PACKED)  # noqa: E731
    return jax.tree.map(lambda leaf: leaf.dense() if is_leaf(leaf) else leaf, params, is_leaf=is_leaf)


def test_training_changes_the_matrices_only_and_peft_loads_the_result(
    model: Any, twin: Any, padded: Any, tmp_path: Path
) -> None:
    """The logits of the trained adapter are those of PEFT, and generation uses it."""
    optax = pytest.importorskip("optax")
    inputs, given = padded(9, 6), arrays(padded(9, 6))
    adapter = FlaxLoraAdapter.create(twin, r=4, lora_alpha=8, target_modules=TARGETS)
    before = twin(**given).logits
    np.testing.assert_array_equal(twin(**given, params=adapter.applied(twin.params)).logits, before)
    optimizer = optax.adam(3e-2)

    @jax.jit
    def step(lora: Any, state: Any, base: Any, batch: Any) -> Any:
        def loss_of(lora: Any) -> Any:
            return twin.loss(**batch, params=adapter.applied(base, lora))

        loss, gradient = jax.value_and_grad(loss_of)(lora)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(lora, updates), state, loss

    lora, state, losses = adapter.params, optimizer.init(adapter.params), []
    assert sum(leaf.size for leaf in jax.tree.leaves(state[0].mu)) == sum(leaf.size for leaf in jax.tree.leaves(lora))
    for _ in range(6):
        lora, state, loss = step(lora, state, twin.params, given)
        losses.append(float(loss))
    assert losses[-1] < 0.8 * losses[0]
    adapter.save_pretrained(tmp_path / "adapter", lora)
    (tmp_path / "adapter/README.md").write_text("of the user")
    adapter.save_pretrained(tmp_path / "adapter", lora)  # it is replaced
    assert (tmp_path / "adapter/README.md").read_text() == "of the user"
    (tmp_path / "other").mkdir()
    (tmp_path / "other/file").touch()
    with pytest.raises(FileExistsError, match=r"other is not the folder of an adapter \(it holds no adapter_config"):
        adapter.save_pretrained(tmp_path / "other")

    base = MistralForCausalLM(model.config).eval()
    base.load_state_dict(model.state_dict())
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    params, real = adapter.applied(twin.params, lora), inputs["attention_mask"]
    assert differences(twin(**given, params=params).logits, adapted(**inputs).logits, real) < 2e-5
    again = FlaxLoraAdapter.from_pretrained(tmp_path / "adapter")
    assert {name: array.tolist() for name, array in leaves(again.params).items()} == {
        name: array.tolist() for name, array in leaves(lora).items()
    }
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": -1}
    expected = adapted.generate(**inputs, **{**options, "eos_token_id": None})
    assert np.array_equal(twin.generate(**given, params=params, max_new_tokens=5, do_sample=False).sequences, expected)


def test_gradients_are_those_of_peft(make_adapter: Any, model: Any, twin: Any, padded: Any) -> None:
    inputs = padded(9, 6)
    folder, _ = make_adapter(inputs)
    adapter = FlaxLoraAdapter.from_pretrained(folder)
    found = leaves(
        jax.grad(lambda lora: twin.loss(**arrays(inputs), params=adapter.applied(twin.params, lora)))(adapter.params)
    )
    base = MistralForCausalLM(model.config).eval()
    base.load_state_dict(model.state_dict())
    adapted = peft.PeftModel.from_pretrained(base, folder, is_trainable=True).eval()
    labels = inputs["input_ids"].clone()
    labels[1, :4] = -100
    adapted(**inputs, labels=labels).loss.backward()
    expected = {
        name.removeprefix("base_model.model.").replace(".default", ""): parameter.grad
        for name, parameter in adapted.named_parameters()
        if parameter.grad is not None
    }
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert differences(found[name], gradient) < 1e-5, name


def test_the_model_is_saved_with_a_merged_adapter_only(
    make_adapter: Any, twin: Any, padded: Any, tmp_path: Path
) -> None:
    inputs = padded(9)
    folder, expected = make_adapter(inputs)
    adapter = FlaxLoraAdapter.from_pretrained(folder)
    with pytest.raises(ValueError, match=r"q_proj.weight is in int8 or has an adapter.*adapter\.merged"):
        twin.save_pretrained(tmp_path / "merged", params=adapter.applied(twin.params))
    twin.save_pretrained(tmp_path / "merged", params=adapter.merged(twin.params))
    logits = MistralForCausalLM.from_pretrained(tmp_path / "merged")(**inputs).logits
    assert differences(array(logits), expected) < 2e-5


def test_adapters_that_do_not_fit_are_refused(make_adapter: Any, twin: Any, padded: Any, tmp_path: Path) -> None:
    folder, _ = make_adapter(padded(9))
    with pytest.raises(FileNotFoundError, match=r"has no adapter_config\.json"):
        FlaxLoraAdapter.from_pretrained(tmp_path)
    config = json.loads((folder / "adapter_config.json").read_text())
    for change in ({"use_dora": True}, {"bias": "all"}, {"peft_type": "IA3"}, {"modules_to_save": ["lm_head"]}):
        with pytest.raises(ValueError, match=rf"{next(iter(change))}=.*merge_and_unload"):
            FlaxLoraAdapter({**config, **change}, {})
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="is not JSON"):
        FlaxLoraAdapter.from_pretrained(folder)
    adapter = FlaxLoraAdapter.create(twin, r=2)
    name = "model.layers.0.self_attn.q_proj"
    cases = {
        "maps 5 to 48 features": {
            f"{name}.lora_A.weight": jnp.zeros((2, 5)),
            f"{name}.lora_B.weight": jnp.zeros((48, 2)),
        },
        "changes model.layers.7": {f"{name.replace('0', '7')}.lora_{k}.weight": jnp.zeros((2, 2)) for k in "AB"},
        "only lora_A and lora_B": {f"{name}.bias": jnp.zeros(3)},
    }
    for message, tensors in cases.items():
        with pytest.raises(ValueError, match=message):
            adapter.applied(twin.params, tensors)
    with pytest.raises(ValueError, match="target_modules has 'wq'"):
        FlaxLoraAdapter.create(twin, target_modules=["wq"])
    with pytest.raises(ValueError, match="scan_layers=False"):
        FlaxLoraAdapter.create(stacked(twin))


def test_names_are_those_of_peft(make_adapter: Any, twin: Any, padded: Any, tmp_path: Path) -> None:
    folder, _ = make_adapter(padded(9))
    FlaxLoraAdapter.create(twin, r=4, target_modules=TARGETS).save_pretrained(tmp_path / "ours")
    ours, theirs = (load_file(path / "adapter_model.safetensors") for path in (tmp_path / "ours", folder))
    assert {name: tensor.shape for name, tensor in ours.items()} == {n: t.shape for n, t in theirs.items()}
