"""The exponential moving average of a network."""

import torch
from torch import nn


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """ema <- ema * decay + (1 - decay) * model, for parameters and float buffers; integer buffers are copied.

    So are the tables of rotary positions: the average of a constant rounds away from it.
    In place and in this order, as in the public code: at decay 0.9999 other orders round differently.
    """
    averages, values = [], []
    for (key, average), value in zip(ema.state_dict().items(), model.state_dict().values(), strict=True):
        if average.is_floating_point() and not key.startswith("feat_rope."):
            averages.append(average)
            values.append(value)
        else:
            average.copy_(value)
    torch._foreach_mul_(averages, decay)
    torch._foreach_add_(averages, values, alpha=1 - decay)
