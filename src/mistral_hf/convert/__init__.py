"""Raw Mistral checkpoints to Hugging Face format and back."""

from .folders import Conversion, convert_hf_to_raw, convert_raw_to_hf

__all__ = ["Conversion", "convert_hf_to_raw", "convert_raw_to_hf"]
