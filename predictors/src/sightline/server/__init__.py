"""The only room that knows KServe: Model subclasses, the V1 and V2 routes, and what happens around every request."""

import sys

# kserve parses sys.argv when it is imported, and would answer our --help with its own.
_argv = sys.argv
sys.argv = sys.argv[:1]
try:
    import kserve  # noqa: F401  # pyright: ignore[reportMissingTypeStubs, reportUnusedImport]
finally:
    sys.argv = _argv
