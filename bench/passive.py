"""Import this before torch: its threads then sleep when they have nothing to do. By default they
spin for some milliseconds after each call, on cores that the next variant needs."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
