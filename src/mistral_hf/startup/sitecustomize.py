"""Registers mistral_hf in every Python process that imports Transformers; `mistral_hf.launch` puts it on PYTHONPATH.

Python imports this module when it starts, before the program. Other environments and older Pythons may run it too.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False  # from here, since typing takes longer to import than all else in this file
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any


def _register() -> None:
    """Import mistral_hf, which registers its classes; silent where it is not installed.

    Raises:
        RuntimeError: The registration failed, and ``MISTRAL_HF_STRICT`` is ``1``.
    """
    try:
        import mistral_hf  # noqa: F401 - the import registers
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "mistral_hf":
            return
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        if os.environ.get("MISTRAL_HF_STRICT") == "1":  # not an ImportError, which programs catch
            raise RuntimeError(f"mistral_hf could not be registered: {reason}") from error
        sys.stderr.write(f"mistral_hf could not be registered, so transformers uses its own Mistral: {reason}\n")


class _RegisterAfterTransformers:
    """A finder that finds nothing: it makes the loader of ``transformers`` call `_register` once it has run."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "transformers":
            return None
        others = [finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec")]
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            self._register_after(spec.loader)
        return spec

    def _register_after(self, loader: Any) -> None:
        run = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            vars(loader).pop("exec_module", None)
            run(module)
            if self in sys.meta_path:  # the first import, not a reload
                sys.meta_path.remove(self)
                _register()

        loader.exec_module = exec_module


def _run_shadowed() -> None:
    """Run the sitecustomize that Python would have found without this one, in its name."""
    from importlib.machinery import PathFinder

    here = os.path.realpath(os.path.dirname(__file__))
    spec = PathFinder.find_spec("sitecustomize", [entry for entry in sys.path if os.path.realpath(entry) != here])
    if spec is not None and spec.loader is not None:
        from importlib.util import module_from_spec

        sys.modules["sitecustomize"] = module = module_from_spec(spec)
        spec.loader.exec_module(module)


sys.meta_path.insert(0, _RegisterAfterTransformers())
_run_shadowed()
