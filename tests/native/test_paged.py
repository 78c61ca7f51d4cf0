"""The binding of the fusion over a paged cache refuses what its kernels cannot take. Its values are
compared in tests/fusion/test_paged.py."""

from __future__ import annotations

import numpy as np
import pytest

from engraphy import _native

pytestmark = pytest.mark.skipif(_native.core is None, reason="no compiled core")

SIZES = {"bf16": False, "streams": 2, "hidden": 3, "taps": 2, "eps": 1e-6, "conv_eps": 1e-6}
WEIGHTS = ("scale", "conv_norm", "conv")
ARRAYS = ("x", "key", "value", "out")
VALUES = np.ones(64, np.float32)


def plan(**changes: object):
    weights = dict.fromkeys(WEIGHTS, VALUES.ctypes.data)
    return _native.core.PagedFusion(**(SIZES | weights | changes))


def fuse(offsets: list[int], **changes: object) -> None:
    """Two tokens; a cache of three lines."""
    at = np.array(offsets, np.int64)
    arrays = dict.fromkeys(ARRAYS, VALUES.ctypes.data)
    out, cache = np.zeros(12, np.float32), np.zeros(18, np.float32)
    arguments = {"tokens": 2, "stride": 9, "live": 0, "cache_values": 18, "threads": 2}
    arguments |= arrays | {"out": out.ctypes.data, "cache": cache.ctypes.data}
    plan().fuse(**(arguments | {"offsets": at.ctypes.data} | changes))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"hidden": 0}, "positive"),
        ({"taps": 17}, "taps"),
        ({"scale": 0}, "weights must be present"),
        ({"conv": 0}, "weights must be present"),
    ],
)
def test_a_plan_needs_sizes_and_weights(wrong, message):
    with pytest.raises(ValueError, match=message):
        plan(**wrong)


@pytest.mark.parametrize("offsets", [[-1, 0, 0, 13], [-2, 0, 0, 6], [-1, -1, 0, 6]])
def test_lines_outside_of_the_cache_are_refused(offsets):
    fuse([-1, 0, 0, 12])
    with pytest.raises(ValueError, match="lines must be in the cache"):
        fuse(offsets)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"tokens": 0}, "positive"), ({"stride": 2}, "positive"), ({"cache": 0}, "present")],
)
def test_a_call_needs_sizes_and_arrays(wrong, message):
    with pytest.raises(ValueError, match=message):
        fuse([-1, 0, 0, 12], **wrong)
