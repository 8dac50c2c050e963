"""The plugin for axolotl: ``plugins: [mistral_hf.axolotl.MistralPlugin]`` in its configuration."""

from typing import Any

from axolotl.integrations.base import BasePlugin  # type: ignore[import-not-found]  # there where axolotl runs

from .registration import register


class MistralPlugin(BasePlugin):
    """Makes axolotl train this package's models."""

    def register(self, cfg: Any) -> None:
        """Register the classes, before axolotl loads a model; `cfg` is its configuration."""
        register()
