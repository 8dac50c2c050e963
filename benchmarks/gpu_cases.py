"""What is measured on a GPU: decoding on a filled cache and prompts, with a model of the shape of Mistral-7B.

Legend: B batch, K key/value heads, D head_dim, V vocabulary, W window.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, StaticCache

import mistral_hf

from .harness import SUBJECT, Cost, Run
from .workloads import IMPLEMENTATIONS, ModelCase, Shape

MISTRAL_7B = Shape(
    layers=32, hidden_size=4096, intermediate_size=14336, heads=32, kv_heads=8, head_dim=128, vocab_size=32000
)
TINY = Shape(layers=2, hidden_size=64, intermediate_size=128, heads=4, kv_heads=2, head_dim=16, vocab_size=256)
CHUNK = 4096  # tokens of a piece of a prompt that is read in pieces


def make_models(shape: Shape, window: int, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Both versions with the same random weights, which lie in memory once."""
    models: dict[str, Any] = {}
    for version, implementation in IMPLEMENTATIONS.items():
        config = implementation.config_class(
            vocab_size=shape.vocab_size,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.intermediate_size,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            sliding_window=window,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
            dtype=dtype,
            attn_implementation="sdpa",
        )
        if not models:
            with device:
                model = implementation.model_class._from_config(config, dtype=dtype)
            generator = torch.Generator(device).manual_seed(0)
            for parameter in (weight for weight in model.parameters() if weight.ndim > 1):
                parameter.data.normal_(std=0.02, generator=generator)
        else:
            with torch.device("meta"):
                model = implementation.model_class._from_config(config, dtype=dtype)
            model.load_state_dict(models[SUBJECT].state_dict(), assign=True)
            model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)  # its buffers are not saved
        models[version] = model.eval().requires_grad_(False)
    return models


@dataclass(frozen=True, kw_only=True)
class GpuCase(ModelCase):
    """What the cases have in common.

    Attributes:
        attention: Attention implementation of both versions.
    """

    attention: str = "sdpa"
    dtype: str = "bfloat16"
    shape: Shape = MISTRAL_7B

    def tiny(self) -> "GpuCase":
        """The same case in the smallest sizes."""
        return replace(
            self,
            length=max(16, self.length // 512),
            window=(self.window or 0) // 512,
            batch=min(self.batch, 4),
            tokens=min(self.tokens, 2),
            shape=TINY,
            repeats=2,
        )

    def ids(self, length: int) -> Tensor:
        """Random tokens ``[B, length]`` on the device that is the default, always the same."""
        return super().ids(length).to(torch.get_default_device())


@dataclass(frozen=True, kw_only=True)
class GpuDecoding(GpuCase):
    """Steps of one token a row on caches that hold `length` random keys and values.

    Attributes:
        compiled: Run the step as one CUDA graph on static caches, and not eagerly on the default ones.
        fused: The subject's projections are fused.
    """

    compiled: bool = False
    fused: bool = False

    def prepare(self, model: Any, version: str) -> Run:
        """A run takes `tokens` steps further; it returns the last logits ``[B, V]``."""
        if version == SUBJECT:
            (model.fuse_projections if self.fused else model.unfuse_projections)()
        cache = self.filled_cache(model, version)
        new = self.ids(self.tokens)
        forward = torch.compile(model.forward, **self.compiler_options()) if self.compiled else model.forward

        @torch.inference_mode(not self.compiled)
        @torch.no_grad()
        def run() -> Tensor:
            for step in range(self.tokens):
                torch.compiler.cudagraph_mark_step_begin()
                logits = forward(new[:, step : step + 1], past_key_values=cache, use_cache=True).logits
            return logits[:, -1].clone()

        for _ in range(self.warm_ups()):
            run()
        return run

    def cost(self) -> Cost:
        """A decoding step for every token."""
        keys = self.batch * min(self.length, self.window or self.length)
        return self._cost(self.batch * self.tokens, self.batch, self.batch, keys, keys, times=self.tokens)

    def compiler_options(self) -> dict[str, Any]:
        """CUDA graphs on a GPU; elsewhere only the tracing, to see that it runs."""
        on_gpu = torch.get_default_device().type == "cuda"
        return {"mode": "reduce-overhead"} if on_gpu else {"backend": "eager"}

    def warm_ups(self) -> int:
        """Runs until a CUDA graph has been recorded."""
        return 2 if self.compiled else 1

    @torch.no_grad()
    def filled_cache(self, model: Any, version: str) -> Cache:
        """The version's cache for this case."""
        reach = self.length + self.tokens * (self.repeats + self.warm_ups() + 1)
        cache: Cache
        if version == SUBJECT:
            cache = mistral_hf.RollingCache(model.config, max_cache_len=reach if self.compiled else None)
        elif self.compiled:
            cache = StaticCache(config=model.config, max_cache_len=reach)
        else:
            cache = DynamicCache(config=model.config)
        generator = torch.Generator(torch.get_default_device()).manual_seed(1)
        size = (2, self.batch, self.shape.kv_heads, self.length, self.shape.head_dim)
        for layer in range(self.shape.layers):
            states = torch.randn(size, generator=generator, dtype=model.dtype)
            cache.update(*states[:, :, :, :-1], layer)
            cache.update(*states[:, :, :, -1:], layer)  # after this, no cache keeps the whole of `states` alive
        return cache


@dataclass(frozen=True, kw_only=True)
class GpuPrefill(GpuCase):
    """A prompt until the first token, from an empty cache.

    Attributes:
        chunk: Read the prompt in pieces of so many tokens, or None.
    """

    chunk: int | None = None
    peak_memory: bool = True

    def tiny(self) -> "GpuPrefill":
        """The same case in the smallest sizes."""
        return replace(cast("GpuPrefill", super().tiny()), chunk=self.chunk and 16)

    def prepare(self, model: Any, version: str) -> Run:
        """A run returns the last logits ``[B, V]``."""
        prompt = self.ids(self.length)

        @torch.inference_mode()
        def run() -> Tensor:
            if self.chunk is None:
                return model(prompt, use_cache=True, logits_to_keep=1).logits[:, -1]
            options = {"max_new_tokens": 1, "do_sample": False, "prefill_chunk_size": self.chunk}
            wanted = {"return_dict_in_generate": True, "output_logits": True}
            return model.generate(prompt, attention_mask=torch.ones_like(prompt), **options, **wanted).logits[0]

        run()
        return run

    def cost(self) -> Cost:
        """One forward pass."""
        tokens = self.batch * self.length
        return self._cost(tokens, tokens, self.batch, self.batch * self._visible_pairs(), keys=0)


DECODING = tuple(
    GpuDecoding(
        name=f"decode_b{batch}_{length // 1024}k{'_compiled' if compiled else ''}",
        title=f"decode, batch {batch}, context {length}, {'compiled' if compiled else 'eager'}",
        group="decode_compiled" if compiled else "decode_eager",
        length=length,
        batch=batch,
        tokens=16,
        repeats=7,
        compiled=compiled,
    )
    for compiled in (False, True)
    for batch in (1, 8, 32)
    for length in (1024, 8192, 32768)
)
FUSED = tuple(
    replace(
        case, name=f"{case.name}_fused", title=f"{case.title}, our projections fused", group="decode_fused", fused=True
    )
    for case in DECODING
    if not case.compiled and case.length == 8192
)
PREFILL = tuple(
    GpuPrefill(
        name=f"prefill_{length // 1024}k_{label}",
        title=f"prompt of {length} tokens, {attention}",
        group=f"prefill_{label}",
        length=length,
        attention=attention,
        repeats=5,
    )
    for label, attention in (("sdpa", "sdpa"), ("flash", "flash_attention_2"))
    for length in (4096, 16384, 32768, 65536)
)
CHUNKED = tuple(
    replace(
        case,
        name=f"{case.name}_chunked",
        title=f"{case.title}, in pieces of {CHUNK}",
        group="prefill_chunked",
        chunk=CHUNK,
    )
    for case in PREFILL
    if case.length == 65536
)
CASES: tuple[GpuCase, ...] = (*DECODING, *FUSED, *PREFILL, *CHUNKED)


def select(names: Sequence[str]) -> list[GpuCase]:
    """The cases of these names or groups, in the order of `CASES`; all of them without names.

    Raises:
        ValueError: There is no case or group of a name.
    """
    known = {case.name for case in CASES} | {case.group for case in CASES}
    unknown = sorted(set(names) - known)
    if unknown:
        raise ValueError(f"No case or group is called {', '.join(unknown)}. There are: {', '.join(sorted(known))}.")
    return [case for case in CASES if not names or case.name in names or case.group in names]
