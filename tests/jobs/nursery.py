"""Workers for tests, forked from one process that has imported what they import: they start in no time.

What a worker does is what `python -m sightline.jobs` does; that command itself is run by tests/jobs/test_worker.py
and by the bench.
"""

import runpy
import sys
from collections.abc import Sequence

from tests.nursery import answer_questions


def work(words: Sequence[str]) -> int:
    """`python -m sightline.jobs WORDS`."""
    sys.argv = ["sightline.jobs", *words]
    runpy.run_module("sightline.jobs", run_name="__main__", alter_sys=True)
    return 0


def main() -> None:
    import anyio._backends._asyncio  # noqa: F401 - what a worker imports late
    import boto3.session  # noqa: F401
    import httpcore  # noqa: F401
    import obstore.auth.boto3  # noqa: F401

    import sightline.jobs.worker  # noqa: F401

    answer_questions(work)


if __name__ == "__main__":
    main()
