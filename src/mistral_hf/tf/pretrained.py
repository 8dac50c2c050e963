"""What all TensorFlow models share: checkpoints of the Hugging Face format, in and out, and calls."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, overload

import keras
import tensorflow as tf
from transformers import GenerationConfig
from transformers.utils import logging
from transformers.utils.hub import PushToHubMixin

from ..checkpoints.pretrained import locate, open_weights, save_folder
from ..checkpoints.reader import TensorInfo, open_checkpoint
from ..checkpoints.writer import LazyTensor
from ..compatibility import check_model_type
from ..configuration_mistral import MistralConfig
from .migration import LibraryMethods, check_old_options
from .training import KerasTraining
from .validation import first_argument

if TYPE_CHECKING:
    from typing_extensions import Self

_ROWS = 1024  # rows of a weight that are written together


class TFMistralPreTrainedModel(PushToHubMixin, LibraryMethods, KerasTraining):
    """Base class of the models: loading and saving.

    Attributes:
        config: The configuration.
        architecture: The PyTorch class that loads what `save_pretrained` writes.
        generation_config: Defaults of `generate`, or None.
    """

    architecture: ClassVar[str]
    generation_config: GenerationConfig | None = None

    def __init__(self, config: MistralConfig, *, dtype: Any = None, **kwargs: Any) -> None:
        config.validate_architecture()
        super().__init__(dtype=dtype, autocast=False, **kwargs)
        self.config = config

    def __call__(self, input_ids: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Call the model as its `call` says; its first argument may be in any form that `first_argument` takes."""
        return super().__call__(first_argument(input_ids), *args, **kwargs)

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
        from_pt: bool = False,
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
            from_pt: Accepted in either value: the checkpoints of PyTorch are the only format.
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
            CheckpointError: There are no safetensors files, they are those of another architecture, or weights of the
                decoder are missing or unknown or have another shape.
            ValueError: An argument or the dtype is unknown.
        """
        check_old_options("from_pretrained", overrides)
        hub = {"revision": revision, "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        folder = locate(name_or_path, **hub)
        stored = _stored_dtype(folder)
        check_model_type(folder, MistralConfig.get_config_dict(folder)[0].get("model_type"))
        config, unknown = MistralConfig.from_pretrained(folder, return_unused_kwargs=True, **overrides)
        # The library takes torch_dtype as an alias of the configuration's dtype; here it would have no effect.
        if unknown := sorted(unknown.keys() | overrides.keys() & {"torch_dtype"}):
            raise ValueError(
                f"from_pretrained has no argument {unknown[0]!r}, and MistralConfig has no such field. Of the library's"
                " arguments it takes dtype, from_pt, output_loading_info, revision, token, cache_dir and"
                " local_files_only."
            )
        model = cls(config, dtype=_dtype_policy(dtype, config.dtype or stored), initializer="zeros")
        variables = model.named_weights()
        with open_weights(folder, {name: tuple(variable.shape) for name, variable in variables.items()}) as weights:
            count = len(variables) - len(weights.missing)
            for name, array in logging.tqdm(weights.stream(), total=count, desc="Loading weights"):
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
        saved_model: bool = False,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Write a checkpoint that PyTorch loads bit for bit, in the dtype of the variables.

        Args:
            save_directory: A folder; an existing checkpoint in it is replaced.
            max_shard_size: In bytes, or a string such as ``"5GB"``.
            saved_model: Whether to `export` the forward pass too, to the subfolder ``saved_model/1``.
            push_to_hub: Whether to upload the folder too.
            **kwargs: Arguments of `push_to_hub`; ``repo_id`` is by default the folder's name.

        Raises:
            FileExistsError: The folder holds something other than a checkpoint.
            ValueError: An argument has another form here.
            TypeError: There are arguments of `push_to_hub`, but nothing is to be uploaded.
        """
        check_old_options("save_pretrained", kwargs)
        if kwargs and not push_to_hub:
            raise TypeError(
                f"save_pretrained has no argument {min(kwargs)!r} unless push_to_hub is True: a folder takes"
                " max_shard_size and saved_model, and its files are always safetensors."
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
        if saved_model:
            self.export(Path(save_directory) / "saved_model" / "1", verbose=False)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)

    def get_config(self) -> dict[str, Any]:
        """The fields that recreate the model, for ``.keras`` files."""
        return {**super().get_config(), "config": self.config.to_dict()}

    @classmethod
    def from_config(cls, config: Any, custom_objects: Any = None, **kwargs: Any) -> Any:
        """A model with newly initialised weights.

        Args:
            config: A configuration, its fields, or those of `get_config`.
            custom_objects: Keras passes it; it has no effect.
            **kwargs: Of the constructor.
        """
        if isinstance(config, MistralConfig):
            return cls(config, **kwargs)
        if "config" not in config:
            return cls(MistralConfig.from_dict(config), **kwargs)
        fields = {**config, **kwargs, "config": MistralConfig.from_dict(config["config"])}
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
