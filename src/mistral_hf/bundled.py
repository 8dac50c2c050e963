"""The checkpoint that ships with the package."""

from pathlib import Path

# A folder in the Hugging Face format, for any from_pretrained, with a model card and a held-out text.
BUNDLED_CHECKPOINT = Path(__file__).parent / "data" / "tiny-mistral"
