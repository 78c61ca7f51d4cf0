"""The counters of a served memory over HTTP."""

from __future__ import annotations

import urllib.request
from urllib.error import HTTPError

import numpy as np
import pytest
import torch

from engraphy.engines.chunks import Chunks
from engraphy.engines.metrics import serve_metrics
from engraphy.errors import ConfigError
from tests.engines.test_served import make_memory, serve


def test_counters_are_those_of_the_memory_that_is_served_now():
    served = serve(make_memory(), 8)
    server = serve_metrics("127.0.0.1:0", served)
    url = f"http://127.0.0.1:{server.server_port}"
    try:
        chunks = Chunks(torch.tensor([3]), np.array([0, 1]), np.array([0]), np.full((1, 9), -1))
        served.begin(chunks)
        rows = served.memory.config.hash.columns
        with urllib.request.urlopen(f"{url}/metrics") as answer:
            assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
            assert f'rows_total{{layer="1",store="ram"}} {rows}\n' in answer.read().decode()
        served.replace(make_memory())
        with urllib.request.urlopen(f"{url}/metrics") as answer:
            assert 'rows_total{layer="1",store="ram"} 0\n' in answer.read().decode()
        with pytest.raises(HTTPError, match="404"):
            urllib.request.urlopen(f"{url}/other")
        with pytest.raises(ConfigError, match="expected HOST:PORT that is free"):
            serve_metrics(f"127.0.0.1:{server.server_port}", served)
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("address", ["8000", "127.0.0.1:x", "127.0.0.1:70000"])
def test_an_address_that_is_none_is_named(address):
    with pytest.raises(ConfigError, match="ENGRAPHY_METRICS: expected HOST:PORT"):
        serve_metrics(address, serve(make_memory(), 8))
