"""From token ids to row ids: pure arithmetic, with no store and no hidden state."""

from .addresser import Addresser
from .frequent import frequent_rows
from .hot import HotIndex
from .ngrams import Ngrams
from .vocab import VocabMap

__all__ = ["Addresser", "HotIndex", "Ngrams", "VocabMap", "frequent_rows"]
