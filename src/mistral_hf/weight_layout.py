"""How the weights of linear layers lie in memory while a CPU decodes in float32.

For a single row, PyTorch's product reads a column-major weight at up to twice the rate of a row-major one; for several
rows, the row-major one is faster. Shapes, names and values stay as they are, so nothing else can tell the difference.
"""

import torch
from torch import Tensor, nn


def lay_out_for_decoding(model: nn.Module, rows: int) -> None:
    """Store the linear layers' float32 CPU weights column-major for one row, and row-major for several.

    Costs one pass over the weights, when the layout changes. Weights that are narrower at their output gain nothing and
    stay row-major.

    Args:
        model: Whose `nn.Linear` modules are stored anew, in place.
        rows: Sequences that are decoded together.
    """
    with torch.inference_mode(False), torch.no_grad():
        for module in model.modules():
            if type(module) is not nn.Linear or not _is_plain(module.weight):
                continue
            weight = module.weight
            by_column = rows == 1 and weight.shape[0] >= weight.shape[1]
            if by_column and weight.is_contiguous():
                weight.data = weight.data.t().contiguous().t()
            elif not by_column and not weight.is_contiguous():
                weight.data = weight.data.contiguous()


def _is_plain(weight: Tensor) -> bool:
    """A float32 matrix in CPU memory, neither quantized, nor sharded, nor kept elsewhere."""
    return type(weight.data) is Tensor and weight.device.type == "cpu" and weight.dtype == torch.float32
