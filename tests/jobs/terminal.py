"""`sightline batch` for tests, forked from one process that has imported what it imports: it starts in no time.

That command itself, started as people start it, is run by one test of tests/jobs/test_laptop.py.
"""

from collections.abc import Sequence

from tests.nursery import Nursery, answer_questions

TERMINALS = Nursery("tests.jobs.terminal", ["sightline", "batch"])


def work(words: Sequence[str]) -> int:
    """`sightline batch WORDS`."""
    from sightline.cli import app

    app(["batch", *words], prog_name="sightline")
    return 0


def main() -> None:
    import anyio._backends._asyncio  # noqa: F401 - what a go imports late
    import httpcore  # noqa: F401

    import sightline.cli
    import sightline.jobs.going  # noqa: F401

    answer_questions(work)


if __name__ == "__main__":
    main()
