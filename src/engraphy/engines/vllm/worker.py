"""vLLM's worker with a memory: a store that fails does not end the engine, a table can be exchanged
while it runs, and the counters of the stores are served over HTTP."""

# pyright: reportMissingImports=false
from __future__ import annotations

import logging
from typing import Any

from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.worker.cpu_worker import CPUWorker

from ...errors import EngraphyError
from ...system.environment import METRICS
from ..folder import open_memory, read_folder
from ..metrics import serve_metrics
from ..served import ServedMemory

ERROR = "engraphy_error"
"""Attribute of the output of a forward that failed: why, in words."""


class MemoryWorker(CPUWorker):
    """Runs the model, in a process of its own.

    vLLM's `collective_rpc` calls methods of it by name, over HTTP too (POST /collective_rpc with
    VLLM_SERVER_DEV_MODE=1).
    """

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """As vLLM's. Begins to serve the counters if ENGRAPHY_METRICS says where."""
        super().load_model(*args, **kwargs)
        address = METRICS.given()
        if address is not None:
            serve_metrics(address, self._served)

    def execute_model(self, scheduler_output: Any) -> Any:
        """As vLLM's. If the rows of a forward cannot be read, its requests fail, and no others."""
        try:
            return super().execute_model(scheduler_output)
        except EngraphyError as error:
            requests = list(scheduler_output.num_scheduled_tokens)
            reason = f"{type(error).__name__}: {error}"
            logging.getLogger("engraphy").error("requests %s failed: %s", requests, reason)
            places = {request: place for place, request in enumerate(requests)}
            output = ModelRunnerOutput(requests, places, [[] for _ in requests])
            setattr(output, ERROR, reason)
            return output

    def engraphy_reload(self, folder: str) -> str:
        """Serves the memory of another directory, of the same sizes, from now on.

        Keys and values in the KV cache depend on the memory. So pause the engine first, in the mode
        that waits for the requests that run, and have it clear its caches.

        Args:
            folder: A model saved with its memory; of the model, nothing is read.

        Returns:
            The table_id.

        Raises:
            EngraphyError: The memory does not fit. The old one is still served.
        """
        served = self._served
        served.replace(open_memory(read_folder(folder)))
        return str(served.memory.stores.table_id)

    @property
    def _served(self) -> ServedMemory:
        return self.model_runner.model._served
