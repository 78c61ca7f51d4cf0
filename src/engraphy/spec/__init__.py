"""What a memory is made of: its hash, its layers' sizes, and both in one config.

`dialects` has the rule of each published release, `model_config` the fields of their config files.
"""

from .config import EngramConfig
from .hash import HashSpec
from .hot import HotSpec
from .layer import LayerSpec

__all__ = ["EngramConfig", "HashSpec", "HotSpec", "LayerSpec"]
