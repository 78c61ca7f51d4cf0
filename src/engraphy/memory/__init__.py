"""The memory of a model: addresses, rows and fusion together, and the state of the sequences it
reads."""

from .grads import RowGrad
from .lookup import Lookup, Trace
from .memory import EngramMemory
from .prefetch import Prefetcher
from .state import SequenceState

__all__ = ["EngramMemory", "Lookup", "Prefetcher", "RowGrad", "SequenceState", "Trace"]
