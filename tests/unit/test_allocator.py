"""The allocator of a server: two arenas whatever the number of threads, unless the environment says otherwise."""

import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")

PROGRAM = """
import ctypes, os, tempfile, threading
from sightline.server.allocator import keep_few_arenas
print(keep_few_arenas())
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


def arenas(environment: dict[str, str]) -> tuple[str, int]:
    """What the call returned, and how many arenas nine threads that hold memory at once have."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    listened, count = done.stdout.split()
    return listened, int(count)


def test_many_threads_share_two() -> None:
    assert arenas({}) == ("True", 2)


def test_the_environment_has_the_last_word() -> None:
    assert arenas({"MALLOC_ARENA_MAX": "5"}) == ("False", 5)
