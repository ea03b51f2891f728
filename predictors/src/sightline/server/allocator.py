"""glibc's allocator, kept to two arenas: pictures come and go in many threads, and every arena keeps what it once held.

Six models in one process, rounds of 40-megapixel pictures and bombs: 1,211 to 1,463 MiB resident with as many arenas
as glibc likes, 818 MiB and level with two (`tests/contract/test_fuzz.py`, `test_memory_is_level`; two cores).
"""

import ctypes
import os
import sys

_M_ARENA_MAX = -8
"""From glibc's malloc.h."""
_ARENAS = 2


def keep_few_arenas() -> bool:
    """Tell the allocator, before the process has threads. Whether it listened: only glibc does.

    `MALLOC_ARENA_MAX` in the environment is the operator's own word and stands.
    """
    if sys.platform != "linux" or "MALLOC_ARENA_MAX" in os.environ:
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and mallopt(_M_ARENA_MAX, _ARENAS) == 1
