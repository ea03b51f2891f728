"""Programs that tests of the chart take from PATH: skipped, loudly, where one is missing; not so with REQUIRE_TOOLS."""

import os
import shutil

import pytest

IS_REQUIRED = bool(os.environ.get("REQUIRE_TOOLS"))
"""What `make chart` says: a missing program is a failure."""


def needs(program: str) -> pytest.MarkDecorator:
    """Skips what it marks where `program` is missing."""
    is_missing = shutil.which(program) is None and not IS_REQUIRED
    return pytest.mark.skipif(is_missing, reason=f"{program} is not on PATH: the chart is NOT tested by it")
