"""What every test shares: no network, and property tests that try the same cases each time."""

import os

from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"

settings.register_profile("engraphy", deadline=None, derandomize=True, database=None, print_blob=False)
settings.load_profile("engraphy")
