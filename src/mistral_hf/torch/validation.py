"""Checks of token ids and labels."""

import torch
from torch import Tensor


def check_range(name: str, ids: Tensor, count: int, meaning: str, exempt: Tensor | None = None) -> None:
    """Check that ids lie in ``[0, count)``, where they are not exempt.

    Raises:
        ValueError: One does not; the message gives its value and place. On an accelerator, where reading a value would
            stall the queue, a device-side assertion with the same rule takes its place.
    """
    if torch.compiler.is_compiling() or ids.is_meta:
        return
    wrong = (ids < 0) | (ids >= count)
    if exempt is not None:
        wrong &= ~exempt
    if ids.device.type != "cpu":
        torch._assert_async(~wrong.any(), f"{name} must lie in [0, {count}): {meaning}")
    elif wrong.any():
        place = tuple(wrong.nonzero()[0].tolist())
        value, where = ids[place].item(), ", ".join(map(str, place))
        raise ValueError(f"{name}[{where}] = {value}, but must lie in [0, {count}): {meaning}.")
