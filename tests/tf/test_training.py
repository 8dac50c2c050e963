"""The TensorFlow models are Keras models: they fit, predict, save, export and train on several devices."""

import re
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mistral_hf
from tests.helpers.processes import run_python
from tests.helpers.tf_models import arrays, keras, tf, to_tf

EXAMPLE = Path(__file__).parents[2] / "examples" / "classify_text_tf.py"


@pytest.fixture
def batches(token_ids: Any) -> Any:
    """A data set of batches of 4 sequences with their labels."""
    ids = token_ids(8, 10).int().numpy()
    return tf.data.Dataset.from_tensor_slices({"input_ids": ids, "labels": ids}).batch(4)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_fitting_matches_training_in_pytorch(make_model: Any, batches: Any, jit_compile: bool) -> None:
    """Two epochs of plain gradient descent with the model's own loss, as `compile` is called without one."""
    model = make_model(tie_word_embeddings=True).train()
    ported = to_tf(model)
    ported.compile(keras.optimizers.SGD(0.1), jit_compile=jit_compile)
    found = ported.fit(batches, epochs=2, verbose=0).history["loss"]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    expected = []
    for _ in range(2):
        for batch in batches:
            ids = torch.tensor(batch["input_ids"].numpy()).long()
            loss = model(ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            expected.append(loss.item())
    np.testing.assert_allclose(found, np.reshape(expected, (2, 2)).mean(axis=1), rtol=1e-4)
    for name, variable in ported.named_weights().items():
        weight = dict(model.named_parameters())[name].detach()
        if name != "model.embed_tokens.weight":
            np.testing.assert_allclose(variable, weight, atol=1e-4)
    everything = next(iter(batches.unbatch().batch(8)))
    np.testing.assert_allclose(ported.evaluate(batches, verbose=0), ported(everything).loss, rtol=1e-5)


def test_labels_count_in_the_inputs_and_beside_them(make_model: Any, padded: Any) -> None:
    """For the model's own loss and for one of Keras's, with metrics."""
    ported = to_tf(make_model("ForSequenceClassification", num_labels=3))
    inputs = {name: array.astype("int32") for name, array in arrays(padded(9, 6, 4, 9)).items()}
    labels = np.array([0, 2, 1, 2])
    expected = ported({**inputs, "labels": labels}).loss.numpy()
    logits = ported(inputs).logits
    accuracy = (np.argmax(logits, axis=1) == labels).mean()
    data = tf.data.Dataset.from_tensor_slices
    own = {"optimizer": "sgd", "metrics": ["accuracy"]}
    theirs = {**own, "loss": keras.losses.SparseCategoricalCrossentropy(from_logits=True)}
    for options, given in [
        (own, data({**inputs, "labels": labels})),
        (own, data((inputs, labels))),
        (theirs, data((inputs, labels))),
    ]:
        ported.compile(**options)
        found = ported.evaluate(given.batch(4), verbose=0, return_dict=True)
        assert found == pytest.approx({"loss": expected, "accuracy": accuracy}, rel=1e-5)
    predicted = ported.predict(data(inputs).batch(2), verbose=0)
    np.testing.assert_allclose(predicted, logits, atol=1e-5)
    ported.compile(**own)
    with pytest.raises(ValueError, match="inputs are a dictionary without 'labels'"):
        ported.fit(data(inputs).batch(4), verbose=0)
    with pytest.raises(ValueError, match="takes no sample weights"):
        ported.fit(data((inputs, labels, np.ones(4))).batch(4), verbose=0)


def test_training_in_mixed_precision_lowers_the_loss_and_keeps_float32_weights(make_model: Any, batches: Any) -> None:
    ported = to_tf(make_model(initializer_range=0.05), "mixed_bfloat16")
    ported.compile(keras.optimizers.Adam(0.01))
    losses = ported.fit(batches, epochs=4, verbose=0).history["loss"]
    assert losses[-1] < 0.9 * losses[0]
    assert {variable.dtype for variable in ported.trainable_variables} == {"float32"}


def test_attention_dropout_is_random_unbiased_and_limited_to_training(make_model: Any, token_ids: Any) -> None:
    ported = to_tf(make_model("Model", attention_dropout=0.3, num_hidden_layers=1))
    ids = token_ids(1, 3).numpy()
    exact = ported(ids).last_hidden_state
    np.testing.assert_array_equal(ported(ids).last_hidden_state, exact)
    attention = ported.decoder_layers[0].self_attn
    weights = tf.fill([1, 4, 50, 50], 0.5)
    dropout = attention._dropout(True)
    dropped = dropout(weights, 0)
    assert not np.array_equal(dropped, dropout(weights, 1))  # the next block of queries
    assert set(np.unique(dropped)) == {np.float32(0), np.float32(0.5 / 0.7)}
    assert abs(float(tf.reduce_mean(dropped)) - 0.5) < 0.02
    trained = [ported(ids, training=True).last_hidden_state.numpy() for _ in range(2)]
    assert not np.array_equal(*trained)
    assert not np.array_equal(trained[0], exact)
    assert len(ported.trainable_weights) == len(ported.named_weights())


def test_files_of_keras_restore_weights_configuration_and_policy(
    make_model: Any, token_ids: Any, tmp_path: Path
) -> None:
    """Weights as HDF5, and whole models."""
    ported = to_tf(make_model(sliding_window=5), "mixed_bfloat16")
    ids = token_ids(2, 9).numpy()
    expected = tf.cast(ported(input_ids=ids).logits, tf.float32)
    ported.save_weights(tmp_path / "model.weights.h5")
    ported.save(tmp_path / "model.keras")
    fresh = mistral_hf.TFMistralForCausalLM(ported.config, dtype="mixed_bfloat16")
    assert not np.array_equal(tf.cast(fresh(input_ids=ids).logits, tf.float32), expected)
    fresh.load_weights(tmp_path / "model.weights.h5")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert type(again) is mistral_hf.TFMistralForCausalLM
    assert again.config.to_dict() == ported.config.to_dict()
    for model in (fresh, again):
        np.testing.assert_array_equal(tf.cast(model(input_ids=ids).logits, tf.float32), expected)


def test_exported_models_serve_batches_and_lengths_of_any_size(make_model: Any, padded: Any, tmp_path: Path) -> None:
    """By the export of Keras and that of TensorFlow."""
    ported = to_tf(make_model(sliding_window=5))
    ported.export(tmp_path / "exported", verbose=False)

    @tf.function(input_signature=[tf.TensorSpec([None, None], tf.int32, name="input_ids")])
    def serve(input_ids: Any) -> dict[str, Any]:
        return {"logits": ported(input_ids=input_ids).logits}

    tf.saved_model.save(ported, str(tmp_path / "saved"), signatures=serve)
    exported = tf.saved_model.load(str(tmp_path / "exported"))
    saved = tf.saved_model.load(str(tmp_path / "saved"))
    for lengths in [(7,), (12, 12, 4)]:
        inputs = {name: array.astype("int32") for name, array in arrays(padded(*lengths)).items()}
        found = exported.serve(inputs)
        assert list(found) == ["logits"]
        np.testing.assert_allclose(found["logits"], ported(inputs).logits, atol=2e-5)
        ids = {"input_ids": tf.constant(inputs["input_ids"])}
        found = saved.signatures["serving_default"](**ids)
        np.testing.assert_allclose(found["logits"], ported(ids).logits, atol=2e-5)


def test_a_model_can_be_part_of_another_and_counts_its_weights(make_model: Any, token_ids: Any) -> None:
    """With the functional interface of Keras, and its summary."""
    ported = to_tf(make_model("Model"))
    ids = keras.Input((None,), dtype="int32")
    whole = keras.Model(ids, keras.layers.Dense(2)(ported(ids)["last_hidden_state"][:, -1]))
    assert whole(token_ids(3, 7).numpy()).shape == (3, 2)
    lines: list[str] = []
    ported.summary(print_fn=lambda line, **options: lines.append(line), expand_nested=True)
    total = sum(int(np.prod(variable.shape)) for variable in ported.named_weights().values())
    assert f"{total:,}" in "".join(lines)
    assert all(f"{layer}" in "".join(lines) for layer in ("embed_tokens", "layer_0", "layer_1", "norm"))
    assert "".join(lines).count("(None, None, 32)") == 4
    cache = ported(token_ids(2, 5).numpy()).past_key_values
    assert repr(cache) == "TFRollingCache(layers=2, segments=(2, 8), length=5)"


REPLICAS = """
import numpy as np, tensorflow as tf, keras, mistral_hf

tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
)
config = mistral_hf.MistralConfig(
    vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=12, sliding_window=5, initializer_range=0.2,
)
ids = np.random.default_rng(0).integers(99, size=(16, 9)).astype("int32")
data = tf.data.Dataset.from_tensor_slices({"input_ids": ids, "labels": ids}).batch(8)
for strategy in (tf.distribute.get_strategy(), tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])):
    keras.utils.set_random_seed(0)
    with strategy.scope():
        model = mistral_hf.TFMistralForCausalLM(config)
        model.compile(keras.optimizers.SGD(0.2))
        loaded = mistral_hf.TFMistralForCausalLM.from_pretrained(mistral_hf.BUNDLED_CHECKPOINT)
    norm = float(tf.reduce_sum(tf.abs(loaded.model.norm.weight.value)))
    assert norm > 1, norm
    losses = model.fit(data, epochs=2, verbose=0).history["loss"]
    print(strategy.num_replicas_in_sync, *losses, float(tf.reduce_sum(tf.abs(model.lm_head.weight.value))))
"""


def test_two_devices_train_as_one() -> None:
    output = run_python(REPLICAS, ("torch",))
    one, two = (np.array(line.split(), float) for line in output.splitlines()[-2:])
    assert (one[0], two[0]) == (1, 2)
    assert one[2] < one[1]
    np.testing.assert_allclose(two[1:], one[1:], rtol=1e-4)


def test_the_example_learns_and_refuses_a_missing_folder(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [EXAMPLE.name, "--examples", "160", "--epochs", "3"])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    output = capsys.readouterr().out
    assert "Epoch 3/3" in output
    assert float(re.search(r"accuracy: (\d+)%", output)[1]) > 60  # type: ignore[index]
    monkeypatch.setattr(sys, "argv", [EXAMPLE.name, "--model", "./nowhere"])
    with pytest.raises(FileNotFoundError, match="nowhere"):
        runpy.run_path(str(EXAMPLE), run_name="__main__")
