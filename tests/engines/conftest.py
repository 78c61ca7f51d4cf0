"""The tests in in_vllm and in_sglang run in the environment of that engine alone: `make
test-engines`."""

from importlib.util import find_spec

collect_ignore_glob = [f"in_{engine}/*" for engine in ("vllm", "sglang") if not find_spec(engine)]
