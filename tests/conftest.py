"""One torch thread per test process: tiny matrices gain nothing from two, and idle threads spin."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
