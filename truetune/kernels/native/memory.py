"""Memory that training on the CPU keeps: of freed tensors as much as it needs, of prepared products few.

glibc gives a tensor of 32 MiB or more back to the system when it is freed, and asks for zeroed pages at the next step;
smaller ones it keeps, but in one heap with everything else, where batches of ever new lengths leave holes. So tensors
get memory of their own (``memory.cpp``; Linux only). And oneDNN prepares a product for every new number of tokens,
about 1 MB each, and keeps 1,024 of them in two caches, where a micro-batch asks for some fifty.
Left out: pinned memory, and what other libraries allocate.
"""

from __future__ import annotations

import os

from truetune.kernels.native.build import kernels
from truetune.kernels.op import is_on

PRODUCTS = 64
"""That oneDNN keeps prepared, in each of its caches."""
_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")


def keep_memory() -> None:
    """From now on, and for the whole process. Call it before the first product, after which the caches are as they are.

    A capacity that the environment names stays.
    """
    if not is_on("kept_memory"):
        return
    for name in _CACHES:
        os.environ.setdefault(name, str(PRODUCTS))
    if (compiled := kernels()) is not None:
        compiled.keep_memory(True)


def release_memory() -> None:
    """Give the system what is free, after something that needed more than what follows."""
    if is_on("kept_memory") and (compiled := kernels()) is not None:
        compiled.release_memory()
