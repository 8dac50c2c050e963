"""The key/value cache of a model: rolling buffers that grow, or that have fixed addresses.

Legend: B batch, K key/value heads, D head_dim, W window.
"""

import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, StaticCache
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPast

from .cache_file import load_cache, save_cache
from .rolling_layer import RollingLayer, power_of_two
from .static_layer import StaticRollingLayer

STATIC_BUCKET = 256  # smallest preallocated buffer, in tokens; larger ones are powers of two
FORMER_NAME = "past_key_values"
# What the library calls a cache in arguments and outputs: "cache", and the former name before its release 5.24.
CACHE_NAME = "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else FORMER_NAME


class RollingCache(Cache):
    """The default cache of Mistral models: one rolling buffer for each decoder layer.

    An instance is a `DynamicRollingCache`, or a `StaticRollingCache` if `max_cache_len` is given; tools take them for
    the library's `DynamicCache` and `StaticCache`.

    Args:
        config: The model's configuration, for the window of every layer; or the items of another
            `RollingCache`, which is how torch's DataParallel gathers replicas.
        max_cache_len: Preallocate fixed buffers for that many tokens, for compiled decoding; None lets them grow as
            needed.
        offloading: Keep layers in CPU memory while they are not used.
        round_up: Make preallocated buffers somewhat longer, so that calls of similar lengths share a graph. False gives
            attention weights the length of the cache, from the first tokens on.

    Raises:
        ValueError: ``max_cache_len`` is less than 1.

    Example:
        >>> from mistral_hf import MistralConfig, RollingCache
        >>> cache = RollingCache(MistralConfig(num_hidden_layers=2, sliding_window=4))
        >>> len(cache), cache.get_seq_length(), cache.get_max_length()
        (2, 0, 4)
        >>> cache
        DynamicRollingCache(2 layers, window 4, 0 tokens, 0 bytes)
    """

    def __new__(cls, config: Any = None, max_cache_len: int | None = None, *args: Any, **kwargs: Any) -> "RollingCache":
        if cls is RollingCache:
            return super().__new__(DynamicRollingCache if max_cache_len is None else StaticRollingCache)
        return super().__new__(cls)

    def __init__(
        self,
        config: PreTrainedConfig | Iterable[tuple[Tensor, Tensor, Tensor]],
        max_cache_len: int | None = None,
        offloading: bool = False,
        round_up: bool = True,
    ) -> None:
        if isinstance(config, PreTrainedConfig):
            layers = _layers(config.get_text_config(decoder=True), max_cache_len, round_up)
        else:
            layers = [_gathered_layer(*state) for state in config]
        Cache.__init__(self, layers=layers, offloading=offloading, offload_only_non_sliding=False)

    def ring_slots(self, query_length: int, layer_idx: int = 0) -> int:
        """Number of leading keys that `update` will return in slot order; 0 if all are chronological."""
        return self.layers[layer_idx].ring_slots(query_length) if self.layers else 0

    @property
    def max_cache_len(self) -> int:
        """Number of tokens that a layer holds at most, or -1 without a limit."""
        lengths = [layer.get_max_length() for layer in self.layers]
        return -1 if -1 in lengths else max(lengths, default=-1)

    def save_file(self, file: str | Path, metadata: Mapping[str, str] | None = None) -> None:
        """Write the tokens to a safetensors file, which appears only when it is complete.

        `load_file` continues from it without the text being read again. What the cache was filled with is not in it:
        keep the ids, and which model it was, in `metadata` or elsewhere.

        Args:
            file: The file to write, or to replace.
            metadata: Strings to keep in the file, as safetensors does; ``safetensors.safe_open(file,
                "pt").metadata()`` returns them.

        Raises:
            OSError: The file cannot be written.

        Example:
            >>> cache.save_file("prefix.safetensors")  # doctest: +SKIP
            >>> cache = RollingCache.load_file("prefix.safetensors", model.config, model.device)  # doctest: +SKIP
        """
        save_cache(self.layers, file, metadata or {})

    @classmethod
    def load_file(
        cls,
        file: str | Path,
        config: PreTrainedConfig,
        device: torch.device | str | Sequence[torch.device | str] = "cpu",
        max_cache_len: int | None = None,
    ) -> "RollingCache":
        """Read a cache that `save_file` wrote.

        Args:
            file: The file.
            config: The configuration of the model that filled the cache. Its weights must be the same too, which is not
                checked.
            device: Where the model is, or a device for each layer.
            max_cache_len: Load into fixed buffers, as in the constructor.

        Returns:
            A cache that continues as the saved one would have.

        Raises:
            ValueError: The file is damaged, holds no cache, or one of another window or another shape.
            OSError: The file cannot be read.
        """
        cache = cls(config, max_cache_len)
        load_cache(cache.layers, file, config.get_text_config(decoder=True), device)
        return cache

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield each layer's visible keys and values, oldest first, and ``[tokens so far, W or 0]``."""
        for layer in self.layers:
            keys, values = layer.keys, layer.values
            yield keys, values, torch.tensor([[layer.get_seq_length(), layer.sliding_window or 0]], device=keys.device)

    def __repr__(self) -> str:
        if not self.layers:
            return f"{type(self).__name__}(0 layers)"
        windows = Counter(layer.sliding_window for layer in self.layers)
        names = {window: "no window" if window is None else f"window {window}" for window in windows}
        shown = ", ".join(names[w] if len(windows) == 1 else f"{count} with {names[w]}" for w, count in windows.items())
        memory = sum(layer.nbytes for layer in self.layers)
        tokens = int(self.get_seq_length())
        return f"{type(self).__name__}({len(self.layers)} layers, {shown}, {tokens} tokens, {memory:,} bytes)"


class DynamicRollingCache(RollingCache, DynamicCache):
    """A `RollingCache` whose buffers grow up to the window."""


class StaticRollingCache(RollingCache, StaticCache):
    """A `RollingCache` whose buffers have fixed addresses and shapes."""


def takes_cache(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Let a method that takes ``cache`` take it as ``past_key_values`` too, as tools of all ages pass it.

    Of two caches, the one with more tokens is taken: a tool may put its prefix in place of an empty cache by one name.
    """

    @wraps(forward)
    def wrapper(self: Any, *args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        if past_key_values is not None:
            if kwargs.get("cache") is None:
                kwargs["cache"] = past_key_values
            elif kwargs["cache"] is not past_key_values:
                kwargs["cache"] = max(kwargs["cache"], past_key_values, key=lambda cache: cache.get_seq_length())
        return forward(self, *args, **kwargs)

    signature = inspect.signature(forward)
    *parameters, keywords = signature.parameters.values()
    former = inspect.Parameter(FORMER_NAME, inspect.Parameter.KEYWORD_ONLY, default=None)
    wrapper.__signature__ = signature.replace(parameters=[*parameters, former, keywords])  # type: ignore[attr-defined]  # inspect reads it
    return wrapper


def cached_states(
    cache: Any, keys: Tensor, values: Tensor, layer_idx: int, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """The keys and values that new queries attend to, the new ones ``[B, K, S, D]`` among them.

    Under autocast, float32 states are kept in its dtype, so that no step casts the whole cache.

    Args:
        cache: A cache of the library's kind, the paged cache of continuous batching, or None.
        options: Those of the attention call; a paged cache changes them in place.
    """
    if cache is None:
        return keys, values
    if CACHE_NAME == FORMER_NAME and not isinstance(cache, Cache):  # there, attention functions fill a paged cache
        options["cache"] = cache
        return keys, values
    if keys.dtype == torch.float32 and torch.is_autocast_enabled(keys.device.type):
        dtype = torch.get_autocast_dtype(keys.device.type)
        keys, values = keys.to(dtype), values.to(dtype)
    return cache.update(keys, values, layer_idx, kwargs=options)


def _layers(config: PreTrainedConfig, max_cache_len: int | None, round_up: bool) -> list[CacheLayerMixin]:
    windows = config.layer_windows
    if max_cache_len is None:
        return [RollingLayer(window) for window in windows]
    if max_cache_len < 1:
        raise ValueError(f"max_cache_len={max_cache_len} must be at least 1 token.")
    slots = max(STATIC_BUCKET, power_of_two(max_cache_len)) if round_up else max_cache_len
    return [StaticRollingLayer(slots, window, max_cache_len, all_slots=not round_up) for window in windows]


def _gathered_layer(keys: Tensor, values: Tensor, counts: Tensor) -> RollingLayer:
    """A layer with the tokens of several replicas; those of the first replica say how many there were."""
    length, window = counts[0].tolist()
    layer = RollingLayer(window or None)
    layer.restore(keys, values, length)
    return layer
