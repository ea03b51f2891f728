"""glibc's allocator, kept from hoarding: pictures come and go in many threads, and what it once held it likes to keep.

Two arenas instead of eight a core. And a fixed size from which memory is taken from, and given back to, the system at
once: left alone, glibc raises it to 32 MiB with the first picture that is freed, and the 16 MiB blocks that Pillow
draws in end up between smaller things that live on.

Six models in one process, all hostile bodies, then four rounds of 40-megapixel pictures and bombs; MiB resident after
each round (`tests/contract/test_fuzz.py`, `test_memory_is_level`; two cores, one run each):

    as glibc likes               1,211 to 1,463 over several runs
    two arenas                   1,010  1,148  1,148  1,148
    two arenas, fixed 8 MiB        809    793    793    817
"""

import ctypes
import os
import sys

_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8
"""From glibc's malloc.h."""
_ARENAS = 2
_LARGE_BYTES = 8 * 2**20
"""Above what a small model's tensors need again and again, below Pillow's blocks."""


def return_memory() -> bool:
    """Tell the allocator, before the process has threads. Whether it listened: only glibc does.

    `MALLOC_ARENA_MAX` and `MALLOC_MMAP_THRESHOLD_` in the environment are the user's own word and stand.
    """
    if sys.platform != "linux" or (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is None:
        return False
    wanted = {
        "MALLOC_ARENA_MAX": (_M_ARENA_MAX, _ARENAS),
        "MALLOC_MMAP_THRESHOLD_": (_M_MMAP_THRESHOLD, _LARGE_BYTES),
    }
    told = [mallopt(*option) == 1 for name, option in wanted.items() if name not in os.environ]
    return bool(told) and all(told)
