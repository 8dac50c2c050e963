"""What all TensorFlow models share: checkpoints of the Hugging Face format, training with Keras, and outputs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast, overload

import keras
import optree
import tensorflow as tf
from transformers import GenerationConfig
from transformers.utils.hub import PushToHubMixin

from ..checkpoints.pretrained import locate, open_weights, save_folder
from ..checkpoints.reader import TensorInfo, open_checkpoint
from ..checkpoints.writer import LazyTensor
from ..configuration_mistral import MistralConfig
from .shapes import Tensor

if TYPE_CHECKING:
    from typing_extensions import Self

_ROWS = 1024  # rows of a weight that are written together
_FIELDS = ("loss", "logits", "last_hidden_state", "past_key_values", "hidden_states", "attentions")


class TFMistralOutput(dict[str, Any]):
    """Results by name, as keys and as attributes.

    The names are ``loss``, ``logits``, ``last_hidden_state``, ``past_key_values``, ``hidden_states`` and
    ``attentions``. Fields that were not requested are absent as keys and None as attributes.
    """

    def __init__(self, *pairs: Any, **fields: Any) -> None:
        super().__init__(*pairs, **fields)
        for name in [name for name, value in self.items() if value is None]:
            del self[name]

    def __getattr__(self, name: str) -> Any:
        if name not in _FIELDS:
            raise AttributeError(f"The output has no field {name!r}; it has {', '.join(self)}.")
        return self.get(name)


# Keras flattens results and rebuilds them, as it does with dictionaries.
optree.register_pytree_node(
    cast(Any, TFMistralOutput),
    lambda output: (tuple(cast(Any, output).values()), tuple(output), tuple(output)),
    lambda names, values: TFMistralOutput(zip(cast(Any, names), values, strict=True)),
    namespace="keras",
)


class TFMistralPreTrainedModel(PushToHubMixin, keras.Model):
    """Base class of the models: loading, saving, and training with the model's own loss.

    Attributes:
        config: The configuration.
        architecture: The PyTorch class that loads what `save_pretrained` writes.
        main_output: The field that `predict` returns, and that a loss or a metric given to `compile` sees.
    """

    architecture: ClassVar[str]
    main_output: ClassVar[str]
    generation_config: GenerationConfig | None = None

    def __init__(self, config: MistralConfig, *, dtype: Any = None, **kwargs: Any) -> None:
        config.validate_architecture()
        super().__init__(dtype=dtype, autocast=False, **kwargs)
        self.config = config

    def default_initializer(self) -> Any:
        """A normal distribution with standard deviation ``config.initializer_range``, which follows Keras's seed."""
        return keras.initializers.RandomNormal(stddev=self.config.initializer_range)

    def named_weights(self) -> dict[str, Any]:
        """Variables by their Hugging Face names."""
        raise NotImplementedError

    @overload
    @classmethod
    def from_pretrained(
        cls, name_or_path: str | Path, *, output_loading_info: Literal[False] = False, **options: Any
    ) -> Self: ...

    @overload
    @classmethod
    def from_pretrained(
        cls, name_or_path: str | Path, *, output_loading_info: Literal[True], **options: Any
    ) -> tuple[Self, dict[str, Any]]: ...

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        dtype: Any = None,
        output_loading_info: bool = False,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        **overrides: Any,
    ) -> Any:
        """Load a checkpoint with safetensors files, one tensor in memory at a time.

        Args:
            name_or_path: A folder, or an id on the hub.
            dtype: A Keras dtype policy or its name, a TensorFlow dtype, or ``"auto"`` for that of the checkpoint. None
                is Keras's global policy, ``"float32"`` unless it was set.
            output_loading_info: Return a pair: the model, and a dictionary with ``missing_keys`` and
                ``unexpected_keys``.
            revision: Branch, tag or commit on the hub.
            token: For a private or gated model.
            cache_dir: Where downloads are kept.
            local_files_only: Whether to use only files that were downloaded before.
            **overrides: Fields of the configuration.

        Returns:
            The model. Weights of its head that the checkpoint lacks are newly initialised, with a warning.

        Raises:
            FileNotFoundError: There is no such folder or model, or it has no config.json.
            CheckpointError: There are no safetensors files, or weights of the decoder are missing or unknown or have
                another shape.
            ValueError: An argument or the dtype is unknown.
        """
        hub = {"revision": revision, "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        folder = locate(name_or_path, **hub)
        stored = _stored_dtype(folder)
        config, unknown = MistralConfig.from_pretrained(folder, return_unused_kwargs=True, **overrides)
        # The library takes torch_dtype as an alias of the configuration's dtype; here it would have no effect.
        if unknown := sorted(unknown.keys() | overrides.keys() & {"torch_dtype"}):
            raise ValueError(
                f"from_pretrained has no argument {unknown[0]!r}, and MistralConfig has no such field. Of the library's"
                " arguments it takes dtype, output_loading_info, revision, token, cache_dir and local_files_only."
            )
        model = cls(config, dtype=_dtype_policy(dtype, config.dtype or stored), initializer="zeros")
        variables = model.named_weights()
        with open_weights(folder, {name: tuple(variable.shape) for name, variable in variables.items()}) as weights:
            for name, array in weights.stream():
                _assign_by_rows(variables[name].value, array)
                del array  # one tensor in memory at a time
            for name in weights.missing:
                variables[name].assign(model.default_initializer()(variables[name].shape, variables[name].dtype))
            info = {"missing_keys": list(weights.missing), "unexpected_keys": list(weights.unexpected)}
        if model.generation_config is not None and (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
        return (model, info) if output_loading_info else model

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        max_shard_size: int | str = "50GB",
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Write a checkpoint that PyTorch loads bit for bit, in the dtype of the variables.

        Args:
            save_directory: A folder; an existing checkpoint in it is replaced.
            max_shard_size: In bytes, or a string such as ``"5GB"``.
            push_to_hub: Whether to upload the folder too.
            **kwargs: Arguments of `push_to_hub`; ``repo_id`` is by default the folder's name.

        Raises:
            FileExistsError: The folder holds something other than a checkpoint.
            TypeError: There are arguments of `push_to_hub`, but nothing is to be uploaded.
        """
        if kwargs and not push_to_hub:
            raise TypeError(
                f"save_pretrained has no argument {min(kwargs)!r} unless push_to_hub is True: a folder takes"
                " max_shard_size, and its files are always safetensors."
            )
        tensors = [
            LazyTensor(name, TensorInfo(variable.dtype, tuple(variable.shape)), variable.numpy)
            for name, variable in self.named_weights().items()
        ]
        save_folder(
            save_directory,
            self.config,
            self.generation_config,
            tensors,
            architecture=self.architecture,
            dtype=self.variable_dtype,
            max_shard_size=max_shard_size,
        )
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)

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
        return super().compute_metrics(x, y, self._prediction(y_pred), sample_weight)

    def train_step(self, data: Any) -> Any:
        """A training step on ``inputs`` with labels among them, or on ``(inputs, labels)``."""
        return super().train_step(self._with_labels(data))

    def test_step(self, data: Any) -> Any:
        """An evaluation step, on data as `train_step` takes it."""
        return super().test_step(self._with_labels(data))

    def predict_step(self, data: Any) -> Tensor:
        """The main output for a batch of inputs."""
        return self._prediction(super().predict_step(data))

    def export(
        self, filepath: str | Path, format: str = "tf_saved_model", *, input_signature: Any = None, **kwargs: Any
    ) -> None:
        """Write the forward pass for serving, as `keras.Model.export` does.

        Args:
            filepath: The target.
            format: One of Keras's formats.
            input_signature: By default a dictionary of ``input_ids`` and ``attention_mask``, both ``[batch, tokens]``
                int32.
            **kwargs: Other arguments of `keras.Model.export`.
        """
        tokens = tf.TensorSpec([None, None], tf.int32)
        signature = input_signature or [{"input_ids": tokens, "attention_mask": tokens}]
        super().export(str(filepath), format, input_signature=signature, **kwargs)

    def _with_labels(self, data: Any) -> Any:
        """The data with the labels moved into the inputs, where the model's own loss needs them."""
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        if y is None or self.loss is not None:
            return data
        if sample_weight is not None:
            raise ValueError("The model's own loss takes no sample weights: pass compile() a loss that does.")
        return ({**(x if isinstance(x, dict) else {"input_ids": x}), "labels": y}, y)

    def _prediction(self, outputs: Any) -> Tensor:
        return outputs[self.main_output]

    def get_config(self) -> dict[str, Any]:
        """The fields that recreate the model, for ``.keras`` files."""
        return {**super().get_config(), "config": self.config.to_dict()}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Any:
        """A model with newly initialised weights from the fields of `get_config`."""
        fields = {**config, "config": MistralConfig.from_dict(config["config"])}
        if isinstance(fields.get("dtype"), dict):
            fields["dtype"] = keras.dtype_policies.deserialize(fields["dtype"])
        return cls(**fields)


def _assign_by_rows(variable: Any, array: Any) -> None:
    """Write an array into a variable, a few rows at a time.

    `assign` would hold the new values twice, beside the old ones.
    """
    if isinstance(variable, tf.distribute.DistributedValues):
        variable.assign(tf.cast(tf.convert_to_tensor(array), variable.dtype))
        return
    for first in range(0, len(array), _ROWS):
        rows = tf.cast(tf.convert_to_tensor(array[first : first + _ROWS]), variable.dtype)
        region = {"begin": [first], "end": [first + len(rows)], "strides": [1]}
        tf.raw_ops.ResourceStridedSliceAssign(ref=variable.handle, value=rows, **region)


def _stored_dtype(folder: Path) -> str:
    """The dtype of a checkpoint's first weight.

    Raises:
        CheckpointError: The folder has no safetensors files.
        FileNotFoundError: It has no config.json.
    """
    with open_checkpoint(folder) as checkpoint:
        stored = next((info.dtype for info in checkpoint.values()), "float32")
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} has weights but no config.json: copy it from where the weights came from.")
    return stored


def _dtype_policy(dtype: Any, stored: Any) -> Any:
    """A Keras policy or its name, or None.

    Args:
        dtype: As `from_pretrained` takes it.
        stored: The checkpoint's dtype.
    """
    if isinstance(dtype, str) and dtype == "auto":
        return str(stored).removeprefix("torch.")
    return dtype.name if isinstance(dtype, tf.DType) else dtype
