"""To be imported before torch: its threads then sleep when they have nothing to do. By default they
spin for some milliseconds after each call, on the cores of whatever is timed next."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
