"""vLLM's scheduler with a memory: requests whose rows could not be read fail, the others go on; and
a pause waits for all requests that have begun."""

# pyright: reportMissingImports=false
from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import RequestStatus

from .worker import ERROR


class MemoryScheduler(Scheduler):
    """Decides what each forward computes."""

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """As vLLM's."""
        output = super().schedule(*args, **kwargs)
        self._finish_preempted()
        return output

    def set_pause_state(self, pause_state: Any) -> None:
        """As vLLM's."""
        super().set_pause_state(pause_state)
        self._finish_preempted()

    def _finish_preempted(self) -> None:
        """In a pause that waits, has requests that were preempted run to their end.

        vLLM lets them wait until the pause is over. They would then go on with another table than
        they began with.
        """
        if self.pause_state != PauseState.PAUSED_NEW:
            return
        for request in list(self.waiting):
            if request.status == RequestStatus.PREEMPTED:
                self.waiting.remove_request(request)
                self.kv_holding_waiting.add_request(request)  # the queue that a pause drains

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """As vLLM's. After a forward that failed, its requests end with an error.

        Their blocks leave the prefix cache, since the forward has not filled them.
        """
        if getattr(model_runner_output, ERROR, None) is not None:
            requests = set(scheduler_output.num_scheduled_tokens) & set(self.requests)
            for request in requests:
                for blocks in self.kv_cache_manager.get_block_ids(request):
                    self.kv_cache_manager.evict_blocks(set(blocks))
            # vLLM ends what stands here with an error, and tells its clients.
            self.grammar_compile_error_reqs.update(requests)
        return super().update_from_output(scheduler_output, model_runner_output)
