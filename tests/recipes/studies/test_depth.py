"""The depth study: which text it reads."""

from __future__ import annotations

import numpy as np
import torch

from engraphy.data.packing import Batches
from engraphy.recipes.studies.depth import spread


def test_rows_are_spread_evenly_over_the_held_out_text():
    """Source by source, each token its source's number."""
    documents = [np.full(31, source, dtype=np.int32) for source in (1, 2, 3) for _ in range(40)]
    batches = Batches(documents, 0, batch=7, tokens=32, seed=None)
    batch = spread(batches, 12)
    assert batch.ids_BT.shape == (12, 32)
    assert [int(row.max()) for row in batch.ids_BT] == [1] * 4 + [2] * 4 + [3] * 4
    everything = spread(batches, 1000)
    assert torch.equal(everything.ids_BT, torch.cat([part.ids_BT for part in batches]))
