"""The short conv of a fusion layer: depthwise, causal, dilated by the largest n-gram order."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor


def convolve(
    conv_SDK: Tensor,
    dilation: int,
    inputs_BTSD: Tensor,
    window: Tensor | None,
    starts: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The conv of a chunk.

    Args:
        conv_SDK: Taps of each channel; the last tap is for the present position.
        dilation: Positions between two taps.
        inputs_BTSD: The chunk.
        window: The W = (K - 1) * dilation inputs before it [B, W, S, D]; None = zeros.
        starts: bool [B, T]. True: a document begins here, and the conv does not look before it.
            None = no document begins.

    Returns:
        The outputs [B, T, S, D], and the last W inputs [B, W, S, D], which are zero before the last
        start.
    """
    tokens = inputs_BTSD.shape[1]
    kernel = conv_SDK.shape[2]
    before = (kernel - 1) * dilation  # W
    if window is None:
        padded = F.pad(inputs_BTSD, (0, 0, 0, 0, before, 0))
    else:
        padded = torch.cat([window.to(inputs_BTSD.dtype), inputs_BTSD], dim=1)
    taps_KSD = conv_SDK.to(inputs_BTSD.dtype).permute(2, 0, 1)
    last = padded[:, tokens:]
    if tokens == 1 and starts is None:  # decoding: one product for all taps
        parts = (padded[:, ::dilation] * taps_KSD).split(1, dim=1)
        return functools.reduce(torch.add, parts), last
    # A sum of shifted products takes a third of the time of a grouped conv1d on a CPU, forward and
    # backward.
    shifted = [padded.narrow(1, tap * dilation, tokens) for tap in range(kernel)]
    if starts is not None:
        document = F.pad(starts.cumsum(1), (before, 0))  # [B, W+T], counted within the chunk
        now = document[:, before:]
        final = document[:, -1:]
        for tap in range(kernel - 1):
            same = document.narrow(1, tap * dilation, tokens) == now
            shifted[tap] = torch.where(same[:, :, None, None], shifted[tap], 0.0)
        last = torch.where((document[:, tokens:] == final)[:, :, None, None], last, 0.0)
    parts = (part * weight for part, weight in zip(shifted, taps_KSD.contiguous(), strict=True))
    return functools.reduce(torch.add, parts), last
