"""`python -m sightline_operator` on a machine whose clock is wrong by $CLOCK_SKEW_SECONDS."""

import os
import sys
from datetime import datetime, timedelta, tzinfo

from sightline_operator import process  # noqa: F401  with all that it imports
from sightline_operator.__main__ import main

SKEW = timedelta(seconds=float(os.environ["CLOCK_SKEW_SECONDS"]))


class Skewed(datetime):
    @classmethod
    def now(cls, tz: tzinfo | None = None) -> datetime:
        return datetime.now(tz) + SKEW


if __name__ == "__main__":
    ours = [module for name, module in sys.modules.items() if name.startswith("sightline_operator")]
    for module in ours:
        if getattr(module, "datetime", None) is datetime:
            module.datetime = Skewed  # type: ignore[attr-defined]
    sys.exit(main())
