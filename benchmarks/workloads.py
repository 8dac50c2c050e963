"""The kinds of work that cases consist of. Legend: B batch, V vocabulary, W window."""

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, StaticCache
from transformers.generation.configuration_utils import CompileConfig
from transformers.utils.logging import disable_progress_bar

import mistral_hf

from .harness import CPU, REFERENCE, SUBJECT, Case, Cost, Run
from .models import IMPLEMENTATIONS, TINY, Shape

WARM_UP = 64  # tokens
MODEL_135M = Shape()


@dataclass(frozen=True, kw_only=True)
class ModelCase(Case):
    """A case that runs a model.

    Attributes:
        length: Prompt tokens, or tokens in the cache, of every sequence.
        window: W, or None for full attention.
        batch: B.
        tokens: New tokens of a sample.
        dtype: Name of the weights' dtype.
        shape: Sizes of the model.
    """

    length: int
    window: int | None = 4096
    batch: int = 1
    tokens: int = 1
    dtype: str = "float32"
    shape: Shape = MODEL_135M

    def tiny(self) -> "ModelCase":
        """The same case in the smallest sizes."""
        window = self.window and max(8, self.window // 64)
        length = max(8, self.length // 64)
        return replace(self, length=length, window=window, tokens=min(self.tokens, 2), shape=TINY, repeats=2)

    def with_layers(self, layers: int) -> "ModelCase":
        """The same case with a model of that many layers."""
        return replace(self, shape=replace(self.shape, layers=layers))

    def load(self, version: str, attention: str) -> Any:
        """The model; both versions have the same weights."""
        implementation = IMPLEMENTATIONS[version]
        config = self.shape.config(
            implementation.config_class,
            sliding_window=self.window,
            tie_word_embeddings=True,
            attn_implementation=attention,
        )
        model = implementation.model_class(config).eval()
        generator = torch.Generator().manual_seed(0)
        for _, parameter in sorted(model.named_parameters()):
            if parameter.ndim > 1:
                parameter.data.normal_(std=0.02, generator=generator)
            parameter.data = parameter.data.to(getattr(torch, self.dtype))
        return model

    def ids(self, length: int) -> Tensor:
        """Random tokens ``[B, length]`` on the default device, the same in every call."""
        generator = torch.Generator().manual_seed(length)
        ids = torch.randint(self.shape.vocab_size, (self.batch, length), generator=generator, device=CPU)
        return ids.to(torch.get_default_device())

    def _cost(self, items: int, tokens: int, kept: int, pairs: int, keys: int, times: int = 1) -> Cost:
        """Cost of a number of forward passes.

        Args:
            items: Tokens that count as the work.
            tokens: New tokens of all sequences.
            kept: How many of them get logits.
            pairs: Pairs of a query and a visible key.
            keys: Cached keys to read, of all sequences.
            times: Number of forward passes.
        """
        shape = self.shape
        size = getattr(torch, self.dtype).itemsize
        matrices = 2 * (tokens * shape.layers * shape.layer_parameters + kept * shape.head_parameters)
        attention = 4 * pairs * shape.heads * shape.head_dim * shape.layers
        cached = 2 * keys * shape.kv_heads * shape.head_dim * shape.layers
        return Cost(
            items=items,
            unit="tokens",
            bytes_moved=times * size * (shape.parameters + cached),
            operations=times * (matrices + attention),
            dtype=self.dtype,
        )

    def _visible_pairs(self) -> int:
        """Pairs of a query and a visible key in one sequence of `length` tokens."""
        window = min(self.window or self.length, self.length)
        return window * (window + 1) // 2 + (self.length - window) * window


@dataclass(frozen=True, kw_only=True)
class Generation(ModelCase):
    """Greedy ``generate`` from a prompt.

    Attributes:
        chunk: ``prefill_chunk_size`` of both versions.
        compiled: Whether the subject's step is compiled; the reference's is not.
    """

    chunk: int | None = None
    compiled: bool = False

    def prepare(self, model: Any, version: str) -> Run:
        """A run returns the new tokens ``[B, tokens]``."""
        prompt = self.ids(self.length)
        options: dict[str, Any] = {"do_sample": False, "prefill_chunk_size": self.chunk}
        if self.compiled and version == SUBJECT:
            compilation = CompileConfig(mode="default")
            compilation._compile_all_devices = True
            options |= {"cache_implementation": "static", "compile_config": compilation}

        def generate(tokens: int = self.tokens) -> Tensor:
            sequences = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, **options)
            return sequences[:, self.length :]

        if self.chunk is None:
            generate(2)
        return generate

    def cost(self) -> Cost:
        """A decoding step for every token; the prompt counts only if it is read in chunks."""
        if self.chunk is not None:
            return self._cost(self.length, self.length, self.tokens, self._visible_pairs(), keys=0)
        keys = self.batch * (self.length + self.tokens // 2)
        return self._cost(self.batch * self.tokens, self.batch, self.batch, keys, keys, times=self.tokens)


class Steps(ModelCase):
    """Decoding steps on a cache that already holds `length` tokens (random keys and values)."""

    def cost(self) -> Cost:
        """A decoding step for every token."""
        keys = self.batch * min(self.length, self.window or self.length)
        return self._cost(self.batch * self.tokens, self.batch, self.batch, keys, keys, times=self.tokens)

    @torch.no_grad()
    def filled_cache(self, model: Any, version: str, capacity: int | None) -> Cache:
        """The version's default cache, or its preallocated one for `capacity` tokens, filled on the default device."""
        cache: Cache
        if version == SUBJECT:
            cache = mistral_hf.RollingCache(model.config, max_cache_len=capacity)
        elif capacity is not None:
            cache = StaticCache(config=model.config, max_cache_len=capacity)
        else:
            cache = DynamicCache(config=model.config)
        generator = torch.Generator(torch.get_default_device()).manual_seed(1)
        size = (2, self.batch, self.shape.kv_heads, self.length, self.shape.head_dim)
        for layer in range(self.shape.layers):
            self.store(cache, torch.randn(size, generator=generator, dtype=model.dtype), layer)
        return cache

    def store(self, cache: Cache, states: Tensor, layer: int) -> None:
        """Add keys and values ``[2, B, kv_heads, length, head_dim]`` to a layer."""
        cache.update(*states, layer)

    def steps(self, forward: Callable[..., Any], cache: Cache) -> Callable[[], Tensor]:
        """A function that takes `tokens` further steps and returns the last logits ``[B, V]``."""
        new = self.ids(self.tokens)

        @torch.no_grad()
        def run() -> Tensor:
            for step in range(self.tokens):
                logits = forward(new[:, step : step + 1], past_key_values=cache, use_cache=True).logits
            return logits[:, -1]

        return run


@dataclass(frozen=True, kw_only=True)
class Decoding(Steps):
    """Steps through the model or through ``generate``.

    Attributes:
        through: "forward", one call a token; or "generate".
        reference_cache: The cache of the reference, "dynamic" (its default) or "static"; the subject uses its default.
    """

    through: str = "forward"
    reference_cache: str = "dynamic"

    def prepare(self, model: Any, version: str) -> Run:
        """A run continues where the last one ended; it returns the last logits ``[B, V]`` or the new tokens."""
        is_static = version == REFERENCE and self.reference_cache == "static"
        cache = self.filled_cache(model, version, 2 * self.length if is_static else None)
        run = self.steps(model, cache) if self.through == "forward" else self._generation(model, cache)
        run()
        return run

    def _generation(self, model: Any, cache: Cache) -> Run:
        def run() -> Tensor:
            ids = self.ids(int(cache.get_seq_length()) + 1)
            options = {"max_new_tokens": self.tokens, "do_sample": False, "past_key_values": cache}
            return model.generate(ids, attention_mask=torch.ones_like(ids), **options)[:, ids.shape[1] :]

        return run


class Prefill(ModelCase):
    """A prompt through the model, with a cache, up to the last token's logits: the first work of ``generate``."""

    def prepare(self, model: Any, version: str) -> Run:
        """A run returns the last logits ``[B, V]``."""
        prompt = self.ids(self.length)

        @torch.no_grad()
        def run(length: int = self.length) -> Tensor:
            return model(prompt[:, :length], use_cache=True, logits_to_keep=1).logits[:, -1]

        run(min(WARM_UP, self.length))
        return run

    def cost(self) -> Cost:
        """One forward pass."""
        tokens = self.batch * self.length
        return self._cost(tokens, tokens, self.batch, self.batch * self._visible_pairs(), keys=0)


class Training(ModelCase):
    """One step: forward, backward and AdamW."""

    def inputs(self) -> dict[str, Tensor]:
        """Inputs of the model, ``[B, length]`` each."""
        ids = self.ids(self.length)
        return {"input_ids": ids, "labels": ids}

    def prepare(self, model: Any, version: str) -> Run:
        """A run returns the loss and the norm of the gradient, ``[2]``."""
        inputs = self.inputs()
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

        def run(length: int = self.length) -> Tensor:
            loss = model(**{name: values[:, :length] for name, values in inputs.items()}, use_cache=False).loss
            loss.backward()
            norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
            optimizer.step()
            optimizer.zero_grad()
            return torch.stack([loss.detach(), norm])

        run(min(WARM_UP, self.length))
        return run

    def cost(self) -> Cost:
        """A forward pass with all logits, and a backward pass of twice its operations."""
        tokens = self.batch * self.length
        return self._cost(tokens, tokens, tokens, self.batch * self._visible_pairs(), keys=0, times=3)


class Loading(ModelCase):
    """``from_pretrained`` of a saved checkpoint that is in the page cache."""

    def load(self, version: str, attention: str) -> tempfile.TemporaryDirectory[str]:
        """A folder with the checkpoint, as the reference saves it."""
        disable_progress_bar()
        folder = tempfile.TemporaryDirectory()
        super().load(REFERENCE, attention).save_pretrained(folder.name)
        return folder

    def prepare(self, folder: tempfile.TemporaryDirectory[str], version: str) -> Run:
        """A run returns a sum over the weights of every layer."""
        model_class = IMPLEMENTATIONS[version].model_class

        def run() -> Tensor:
            model = model_class.from_pretrained(folder.name)
            return torch.stack([layer.mlp.down_proj.weight[0].sum().detach() for layer in model.model.layers])

        run()
        return run

    def cost(self) -> Cost:
        """Every weight is read and written once."""
        size = self.shape.parameters * getattr(torch, self.dtype).itemsize
        return Cost(items=1, unit="loads", bytes_moved=2 * size, operations=0)


IMPORT_REFERENCE = "import torch, transformers.models.mistral.modeling_mistral"
IMPORT_SUBJECT = "import mistral_hf"
IMPORT_DETAILS = f"""
import json, sys, time
{IMPORT_REFERENCE}
before, start = set(sys.modules), time.perf_counter()
{IMPORT_SUBJECT}
seconds, new = time.perf_counter() - start, set(sys.modules) - before
print(json.dumps({{"seconds": seconds, "modules": sorted(new)}}))
"""


class Importing(Case):
    """An interpreter that imports torch and the library's Mistral, and this package too for the subject."""

    def load(self, version: str, attention: str) -> str:
        """The program."""
        return IMPORT_REFERENCE if version == REFERENCE else f"{IMPORT_REFERENCE}; {IMPORT_SUBJECT}"

    def prepare(self, program: str, version: str) -> Run:
        """A run starts a process and has no result."""

        def run() -> None:
            run_python("-c", program)

        run()
        return run

    def cost(self) -> Cost:
        """No limit applies."""
        return Cost(items=1, unit="imports", bytes_moved=0, operations=0)

    def details(self) -> dict[str, Any]:
        """Seconds of ``import mistral_hf`` alone, after the other imports, and the modules that it adds."""
        found = [json.loads(run_python("-c", IMPORT_DETAILS)) for _ in range(self.repeats)]
        modules = found[0]["modules"]
        return {
            "added_seconds": statistics.median(sample["seconds"] for sample in found),
            "added_modules": len(modules),
            "added_packages": sorted({module.split(".")[0] for module in modules}),
        }


def run_python(*arguments: str) -> str:
    """The output of a fresh interpreter; its messages go to this process's error stream."""
    return subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.PIPE, text=True).stdout
