"""`python -m sightline.jobs plan|run|finish`: a worker of a batch."""

import logging
import os
import signal
import sys
from types import FrameType


def _interrupted(number: int, frame: FrameType | None) -> None:
    """While there is nothing to flush yet. As process 1 of a container we are sent no signal that we do not handle."""
    os._exit(143)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _interrupted)

    from sightline.jobs.worker import run

    code = run(sys.argv[1:])
    logging.shutdown()
    sys.stdout.flush()
    # Threads that still wait for a store must not hold the end of the process, nor obstore's meet a dying interpreter.
    os._exit(code)
