"""Training with Keras: `compile`, `fit`, `evaluate` and `predict`, with the model's own loss."""

from __future__ import annotations

from typing import Any, ClassVar

import keras
import tensorflow as tf

from .shapes import Tensor


class KerasTraining(keras.Model):
    """The steps of training, evaluation and prediction.

    Attributes:
        main_output: The field that `predict` returns, and that a loss or a metric given to `compile` sees.
    """

    main_output: ClassVar[str]

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Prepare training as `keras.Model.compile` does; without a loss, the model uses its own."""
        self.loss = None  # Keras would keep the loss of an earlier call
        super().compile(*args, **kwargs)

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> Tensor:
        """The loss given to `compile`, of the main output; without one, the model's own.

        Raises:
            ValueError: The model is to use its own loss, but there are no labels.
        """
        if self.loss is not None:
            return super().compute_loss(x, y, self._prediction(y_pred), sample_weight, training)
        if "loss" not in y_pred:
            raise ValueError(
                "There is no loss: the inputs are a dictionary without 'labels', and compile() was called without a"
                " loss. Add the labels to the dictionary, or yield (inputs, labels)."
            )
        replicas = tf.distribute.get_strategy().num_replicas_in_sync
        return y_pred["loss"] / replicas  # gradients are summed over them

    def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        """The metrics given to `compile`, of the labels and the main output."""
        if y is None and isinstance(x, dict):
            y = x.get("labels")
        prediction = self._prediction(y_pred) if len(self.metrics) > 1 else None  # the first is the loss
        return super().compute_metrics(x, y, prediction, sample_weight)

    def train_step(self, data: Any) -> Any:
        """A training step on ``inputs`` with labels among them, or on ``(inputs, labels)``."""
        return super().train_step(self._with_labels(data))

    def test_step(self, data: Any) -> Any:
        """An evaluation step, on data as `train_step` takes it."""
        return super().test_step(self._with_labels(data))

    def predict_step(self, data: Any) -> Tensor:
        """The main output for a batch of inputs."""
        return self._prediction(super().predict_step(data))

    def _with_labels(self, data: Any) -> Any:
        """The data with the labels moved into the inputs, where the model's own loss needs them."""
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        if y is None or self.loss is not None:
            return data
        if sample_weight is not None:
            raise ValueError("The model's own loss takes no sample weights: pass compile() a loss that does.")
        return ({**(x if isinstance(x, dict) else {"input_ids": x}), "labels": y}, y)

    def _prediction(self, outputs: Any) -> Tensor:
        if self.main_output not in outputs:
            raise ValueError(
                "The logits are needed (by predict, or by a loss or metrics given to compile), but with loss_chunk_size"
                " the model's own loss is computed without them: set model.config.loss_chunk_size = None, or leave out"
                " the labels or the metrics."
            )
        return outputs[self.main_output]
