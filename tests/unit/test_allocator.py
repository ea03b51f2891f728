"""The allocator of a server: few arenas, large blocks given back, unless the environment says otherwise."""

import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")

PROGRAM = """
import ctypes, os, tempfile, threading
from sightline.server.allocator import return_memory
print(return_memory())
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
together = threading.Barrier(9)
def hold():
    libc.malloc(4000)
    together.wait(); together.wait()
for _ in range(8):
    threading.Thread(target=hold).start()
together.wait()
libc.fopen.restype = ctypes.c_void_p
with tempfile.NamedTemporaryFile() as file:
    stream = ctypes.c_void_p(libc.fopen(file.name.encode(), b"w"))
    libc.malloc_info(0, stream)
    libc.fclose(stream)
    print(file.read().count(b"<heap nr="))
together.wait()
"""


PILLOW = """
import ctypes
from sightline.server.allocator import return_memory
print(return_memory())
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free(ctypes.c_void_p(libc.malloc(31 * 2**20)))  # a picture: from here on glibc would keep up to so much
libc.mallinfo2.restype = type("info", (ctypes.Structure,), {"_fields_": [(str(i), ctypes.c_size_t) for i in range(10)]})
before = getattr(libc.mallinfo2(), "3")
block = libc.malloc(16 * 2**20)
print(getattr(libc.mallinfo2(), "3") - before)
"""


def told(program: str, environment: dict[str, str]) -> tuple[str, int]:
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    listened, count = done.stdout.split()
    return listened, int(count)


def arenas(environment: dict[str, str]) -> tuple[str, int]:
    """What the call returned, and how many arenas nine threads that hold memory at once have."""
    return told(PROGRAM, environment)


def mapped(environment: dict[str, str]) -> tuple[str, int]:
    """What the call returned, and how many blocks of their own 16 MiB are after a larger one was freed."""
    return told(PILLOW, environment)


def test_many_threads_share_two() -> None:
    assert arenas({}) == ("True", 2)


def test_the_environment_has_the_last_word() -> None:
    assert arenas({"MALLOC_ARENA_MAX": "5"}) == ("True", 5)
    assert mapped({"MALLOC_MMAP_THRESHOLD_": str(2**25)}) == ("True", 0)
    assert arenas({"MALLOC_ARENA_MAX": "5", "MALLOC_MMAP_THRESHOLD_": str(2**25)}) == ("False", 5)


def test_large_blocks_go_back_to_the_system() -> None:
    assert mapped({}) == ("True", 1)
