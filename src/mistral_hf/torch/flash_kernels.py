"""The kernels of FlashAttention-2 (Dao, 2023): where they come from, what they support, and one way to call them.

Legend: B batch, S queries, T keys, H query heads, K key/value heads, G = H / K, D head_dim, W window, N sequences.

The kernels take no masks, only bounds: a `VarlenPlan` for several queries, each row of the batch one sequence or more;
a `KeyRangePlan` for one query a row, whose keys are read where they lie in the rolling buffer.
"""

import importlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import torch
from packaging.version import Version
from torch import Tensor, library
from transformers.utils import logging

NAME = "flash_attention_2"
DTYPES = (torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 256
MAX_GRID = 65_535  # of CUDA, in the second and third dimension
OLDEST_PACKAGE = Version("2.3.0")  # the first with windows
logger = logging.get_logger(__name__)


class VarlenPlan(NamedTuple):
    """Several queries a row: which tokens are sequences, aligned by the last query and the last key of each.

    Attributes:
        cu_q, cu_k: ``[N + 1]`` int32, where each sequence begins among all queries and keys, and where the last ends.
        max_q, max_k: At least the number of queries and of keys of every sequence.
        window: W, or None.
        kept: Indices of the real tokens in the flattened batch, or None if all rows are taken as they are.
        order: ``[T]``, the keys of a row in chronological order, or None if they already are.
    """

    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int
    window: int | None
    kept: Tensor | None = None
    order: Tensor | None = None


class KeyRangePlan(NamedTuple):
    """One query a row: which keys of the row it sees, as R ranges (1, or 2 where they wrap around a buffer's end).

    Attributes:
        starts: ``[B, R]`` int32, the first key of each range, ascending in a row; None if all are 0.
        lengths: ``[B, R]`` int32, how many keys each has, possibly none.
        flattened: Results of `flat_ranges`, by heads and slots.
    """

    starts: Tensor | None
    lengths: Tensor
    flattened: dict[tuple[int, int], tuple[Tensor, Tensor]]

    def flat_ranges(self, heads: int, slots: int) -> tuple[Tensor, Tensor]:
        """First key and number of keys, both ``[B * K * R]`` int32, of the ranges in a flattened ``[B, K, slots]``."""
        if (heads, slots) in self.flattened:
            return self.flattened[heads, slots]
        batch = len(self.lengths)
        starts = torch.arange(0, batch * heads * slots, slots, dtype=torch.int32, device=self.lengths.device)
        if self.starts is not None:
            starts = (starts.view(batch, heads, 1) + self.starts[:, None]).flatten()
        ranges = (starts, self.lengths.repeat(1, heads).flatten())
        if not torch.compiler.is_compiling():  # a compiler finds common subexpressions of all layers itself
            self.flattened[heads, slots] = ranges
        return ranges

    def split(self, rows: int) -> "list[KeyRangePlan]":
        """Plans of that many rows each."""
        lengths = self.lengths.split(rows)
        starts = [None] * len(lengths) if self.starts is None else self.starts.split(rows)
        return [KeyRangePlan(*pair, {}) for pair in zip(starts, lengths, strict=True)]

    def contiguous(self) -> "KeyRangePlan":
        """The plan itself; `generate` calls this on every mask that it hands to a compiled step."""
        return self


class Kernels(ABC):
    """The FlashAttention-2 kernels of one provider.

    Attributes:
        name: For messages.
        device_type: Type of the device that they run on.
        has_starts: Whether `ranges` takes ranges that begin after the first key.
    """

    name: str
    device_type: str
    has_starts: bool = True

    def attend(
        self,
        plan: VarlenPlan | KeyRangePlan,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        dropout: float,
    ) -> Tensor:
        """Map ``[B, H, S, D]`` queries and ``[B, K, T, D]`` keys and values to ``[B, S, H, D]``; padding gets zeros."""
        if isinstance(plan, KeyRangePlan):
            return self._ranges_of_rows(query[:, :, 0], key, value, plan, scaling)[:, None]
        batch, heads, length, head_dim = query.shape
        if plan.order is not None:
            key, value = key[:, :, plan.order], value[:, :, plan.order]
        q, k, v = (states.transpose(1, 2).flatten(0, 1) for states in (query, key, value))
        if plan.kept is None:
            output = self.sequences(q, k, v, plan, scaling, dropout)
        else:
            q, k, v = (states[plan.kept] for states in (q, k, v))
            real = self.sequences(q, k, v, plan, scaling, dropout)
            output = real.new_zeros(batch * length, heads, head_dim).index_copy(0, plan.kept, real)
        return output.view(batch, length, heads, head_dim)

    def _ranges_of_rows(self, query: Tensor, key: Tensor, value: Tensor, plan: KeyRangePlan, scaling: float) -> Tensor:
        """`ranges`, for as many rows at a time as a grid of the kernels can hold."""
        rows = max(1, (MAX_GRID - 1) // (plan.lengths.shape[1] * self.blocks_a_range(query.shape[1], key.shape[1])))
        if len(query) <= rows:
            return self.ranges(query, key, value, plan, scaling)
        parts = zip(query.split(rows), key.split(rows), value.split(rows), plan.split(rows), strict=True)
        outputs = [self.ranges(q, k, v, piece, scaling) for q, k, v, piece in parts]
        return torch.cat(outputs)

    @abstractmethod
    def blocks_a_range(self, heads: int, kv_heads: int) -> int:
        """How much of a grid's dimension one range of a row takes in `ranges`."""

    @abstractmethod
    def sequences(self, q: Tensor, k: Tensor, v: Tensor, plan: VarlenPlan, scaling: float, dropout: float) -> Tensor:
        """Causal attention within sequences: queries ``[total, H, D]``, keys and values ``[total, K, D]``."""

    @abstractmethod
    def ranges(self, query: Tensor, key: Tensor, value: Tensor, plan: KeyRangePlan, scaling: float) -> Tensor:
        """Attention of queries ``[B, H, D]`` to ranges of the keys and values ``[B, K, T, D]``."""


def merge(outputs: Tensor, logsumexp: Tensor, lengths: Tensor) -> Tensor:
    """Attention to all of R ranges, from the attention to each.

    Args:
        outputs: ``[B, R, H, D]``.
        logsumexp: ``[B, R, H]``, of the scores.
        lengths: ``[B, R]``; an empty range does not count, and the result is zero if all are empty.

    Returns:
        ``[B, H, D]`` in the dtype of `outputs`.
    """
    empty = (lengths == 0)[:, :, None]
    weights = logsumexp.masked_fill(empty, -torch.inf).softmax(dim=1).masked_fill(empty, 0.0)
    return (outputs * weights[..., None]).sum(dim=1).to(outputs.dtype)


class PackageKernels(Kernels):
    """The kernels of the package ``flash_attn``.

    Args:
        module: The package.
        version: Its version.
        device_type: Type of the device that they run on.
    """

    def __init__(self, module: Any, version: str, device_type: str = "cuda") -> None:
        self.name, self.device_type = f"flash_attn {version}", device_type
        self.varlen: Callable[..., Any] = module.flash_attn_varlen_func
        self.with_cache: Callable[..., Any] = module.flash_attn_with_kvcache
        self.has_starts = "cache_leftpad" in inspect.signature(self.with_cache).parameters

    def blocks_a_range(self, heads: int, kv_heads: int) -> int:
        return heads

    def sequences(self, q: Tensor, k: Tensor, v: Tensor, plan: VarlenPlan, scaling: float, dropout: float) -> Tensor:
        return self.varlen(
            q,
            k,
            v,
            cu_seqlens_q=plan.cu_q,
            cu_seqlens_k=plan.cu_k,
            max_seqlen_q=plan.max_q,
            max_seqlen_k=plan.max_k,
            dropout_p=dropout,
            softmax_scale=scaling,
            causal=True,
            window_size=(-1, -1) if plan.window is None else (plan.window - 1, 0),
        )

    def ranges(self, query: Tensor, key: Tensor, value: Tensor, plan: KeyRangePlan, scaling: float) -> Tensor:
        attend = torch.ops.mistral_hf.attend_to_cache if torch.compiler.is_compiling() else self.attend_to_cache
        batch, count = plan.lengths.shape
        stops, starts, rows = plan.lengths.flatten(), None, None
        if plan.starts is not None:
            starts, stops = plan.starts.flatten(), (plan.starts + plan.lengths).flatten()
        if count > 1:
            rows = torch.arange(batch, dtype=torch.int32, device=query.device).repeat_interleave(count)
            query = query.repeat_interleave(count, dim=0)
        output, logsumexp = attend(query, key, value, stops, starts, rows, scaling)
        if logsumexp is None or count == 1:
            return output
        return merge(output.unflatten(0, (batch, count)), logsumexp.unflatten(0, (batch, count)), plan.lengths)

    def attend_to_cache(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        stops: Tensor,
        starts: Tensor | None,
        rows: Tensor | None,
        scaling: float,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of queries ``[N, H, D]`` to a range of a row each.

        Returns:
            ``[N, H, D]``, and where `rows` are given the logsumexp ``[N, H]`` in float32.
        """
        options: dict[str, Any] = {} if starts is None else {"cache_leftpad": starts}
        if rows is not None:
            options |= {"cache_batch_idx": rows, "return_softmax_lse": True}
        found = self.with_cache(
            query[:, None],
            key.transpose(1, 2),
            value.transpose(1, 2),
            cache_seqlens=stops,
            softmax_scale=scaling,
            **options,
        )
        if rows is None:
            return found[:, 0], None
        output, logsumexp = found
        return output[:, 0], logsumexp[..., 0]


# A compiler cannot trace the package's function, but can keep this operator in its graph.
@library.custom_op("mistral_hf::attend_to_cache", mutates_args=())
def _attend_to_cache(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    stops: Tensor,
    starts: Tensor | None,
    rows: Tensor | None,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    kernels = find_kernels()
    assert isinstance(kernels, PackageKernels)
    output, logsumexp = kernels.attend_to_cache(query, key, value, stops, starts, rows, scaling)
    if logsumexp is None:  # an operator returns tensors
        logsumexp = query.new_zeros(query.shape[:2], dtype=torch.float32)
    return output.contiguous(), logsumexp.contiguous()


@_attend_to_cache.register_fake
def _(query: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), query.new_empty(query.shape[:2], dtype=torch.float32)


class TorchKernels(Kernels):
    """The kernels of PyTorch itself, in ``torch.nn.attention.varlen``.

    Args:
        module: That module.
        device_type: Type of the device that they run on.
    """

    def __init__(self, module: Any, device_type: str = "cuda") -> None:
        self.name, self.device_type = f"torch.nn.attention.varlen of PyTorch {torch.__version__}", device_type
        self.varlen: Callable[..., Any] = module.varlen_attn
        self.with_logsumexp = module.AuxRequest(lse=True)
        parameters = inspect.signature(self.varlen).parameters
        self.grouped = {"enable_gqa": True} if "enable_gqa" in parameters else {}  # without it, groups are not checked
        self.has_lengths = "seqused_k" in parameters

    def blocks_a_range(self, heads: int, kv_heads: int) -> int:
        return kv_heads if self.has_lengths else 2 * kv_heads

    def sequences(self, q: Tensor, k: Tensor, v: Tensor, plan: VarlenPlan, scaling: float, dropout: float) -> Tensor:
        if dropout:
            raise ValueError(
                f"{self.name} has no dropout: set attention_dropout=0 (it is {dropout}), or install flash_attn."
            )
        window = (-1 if plan.window is None else plan.window - 1, 0)
        bounds = (plan.cu_q, plan.cu_k, plan.max_q, plan.max_k)
        return self.varlen(q, k, v, *bounds, scale=scaling, window_size=window, **self.grouped)

    def ranges(self, query: Tensor, key: Tensor, value: Tensor, plan: KeyRangePlan, scaling: float) -> Tensor:
        batch, heads, head_dim = query.shape
        kv_heads, total, count = key.shape[1], key.shape[2], plan.lengths.shape[1]
        keys, slots = _as_rows(key)
        values, _ = _as_rows(value)
        # Every key/value head is a separate sequence, so that the buffer is read as it lies.
        queries = query.view(batch, kv_heads, 1, -1, head_dim).expand(-1, -1, count, -1, -1).flatten(0, 2)
        starts, lengths = plan.flat_ranges(kv_heads, slots)
        end = starts.new_full((1,), keys.shape[0])
        number = torch.arange(len(starts) + 1, dtype=torch.int32, device=query.device)
        if self.has_lengths:
            bounds = (number, torch.cat([starts, end]), 1, total)
            options: dict[str, Any] = {"seqused_k": lengths, **self.grouped}
        else:  # The gaps between the ranges are sequences without a query, for which max_q must not be 1.
            edges = torch.stack([starts, starts + lengths], dim=1).flatten()
            bounds = (number.repeat_interleave(2), torch.cat([starts.new_zeros(1), edges, end]), 2, keys.shape[0])
            options = self.grouped
        aux = None if count == 1 else self.with_logsumexp
        found = self.varlen(queries, keys, values, *bounds, return_aux=aux, scale=scaling, **options)
        if aux is None:
            return found.view(batch, heads, head_dim)
        output = found[0].view(batch, kv_heads, count, -1, head_dim).transpose(1, 2).flatten(2, 3)  # [B, R, H, D]
        logsumexp = found[1].t().view(batch, kv_heads, count, -1).transpose(1, 2).flatten(2, 3)
        return merge(output, logsumexp, plan.lengths)


def _as_rows(states: Tensor) -> tuple[Tensor, int]:
    """A buffer ``[B, K, T, D]`` as one ``[slots of all rows and heads, 1, D]``, and the slots of each; a view."""
    batch, heads, total, head_dim = states.shape
    slots = states.stride(1) // head_dim
    if states.stride() != (heads * slots * head_dim, slots * head_dim, head_dim, 1):
        states, slots = states.contiguous(), total
    return states.as_strided(((batch * heads - 1) * slots + total, 1, head_dim), (head_dim, head_dim, 1)), slots


_kernels: Kernels | None = None


def find_kernels() -> Kernels:
    """The kernels of the package ``flash_attn`` if it is installed, else those of PyTorch.

    Raises:
        ImportError: There are none, or the package is too old, or it cannot be imported, or this is not a CUDA build
            of PyTorch but one for ROCm.
    """
    global _kernels
    if torch.version.hip is not None:  # its back ends ignore ``cache_leftpad`` without an error
        raise ImportError(
            f"attn_implementation={NAME!r} runs on NVIDIA GPUs only, and this PyTorch is built for ROCm"
            f" {torch.version.hip}: choose attn_implementation='sdpa'."
        )
    if _kernels is None:
        _kernels = _package_kernels() or _torch_kernels()
    if _kernels is None:
        raise ImportError(
            f"attn_implementation={NAME!r} found no kernels here. Either install the package flash_attn, version"
            f" {OLDEST_PACKAGE} or later (pip install 'mistral_hf[flash]'), or a CUDA build of PyTorch 2.11 or later,"
            " which has them in torch.nn.attention.varlen; or choose attn_implementation='sdpa'."
        )
    return _kernels


def _package_kernels() -> Kernels | None:
    try:
        installed = version("flash_attn")
    except PackageNotFoundError:
        return None
    if Version(installed) < OLDEST_PACKAGE:
        raise ImportError(
            f"flash_attn {installed} is older than {OLDEST_PACKAGE}, the first version with windows: upgrade it, or"
            " uninstall it to use PyTorch's own kernels."
        )
    return PackageKernels(importlib.import_module("flash_attn"), installed)


def _torch_kernels() -> Kernels | None:
    if not torch.backends.cuda.is_flash_attention_available():
        return None
    module = importlib.import_module("torch.nn.attention.varlen")
    return TorchKernels(module) if "window_size" in inspect.signature(module.varlen_attn).parameters else None


def check_model(dtype: torch.dtype | None, head_dim: int) -> None:
    """Check that a model can run with the kernels found here; one in float32 can under autocast.

    Args:
        dtype: Of its weights, if it is known.
        head_dim: D.

    Raises:
        ImportError: As `find_kernels`.
        ValueError: The dtype, the heads or the device are not supported.
    """
    kernels = find_kernels()
    if kernels.device_type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"attn_implementation={NAME!r} needs a CUDA device, and there is none: choose 'sdpa'.")
        if torch.cuda.get_device_capability() < (8, 0):
            raise ValueError(
                f"attn_implementation={NAME!r} needs a GPU of compute capability 8.0 (Ampere) or later, not"
                f" {'.'.join(map(str, torch.cuda.get_device_capability()))}: choose 'sdpa'."
            )
    if dtype == torch.float32:
        logger.warning_once(
            f"{NAME} computes in float16 and bfloat16 only: a model with weights in torch.float32 runs under"
            " torch.autocast, and nowhere else. To compute without it, load the model with dtype='bfloat16'."
        )
        dtype = None
    check_states(dtype, head_dim)


def check_states(dtype: torch.dtype | None, head_dim: int) -> None:
    """Raise `ValueError` for a dtype (None is not known yet) or a head_dim that the kernels do not support."""
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(
            f"{NAME} computes in float16 and bfloat16 only, not in {dtype}: load the model with dtype='bfloat16' or"
            " attn_implementation='sdpa', or run it under torch.autocast."
        )
    if head_dim > MAX_HEAD_DIM or head_dim % 8:
        raise ValueError(
            f"{NAME} takes heads of a multiple of 8 and at most {MAX_HEAD_DIM} elements, not head_dim={head_dim}:"
            " choose attn_implementation='sdpa'."
        )
