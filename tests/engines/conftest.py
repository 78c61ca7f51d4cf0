"""The tests in in_vllm run in vLLM's environment alone: `make test-engines`."""

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("vllm") else ["in_vllm/*"]
