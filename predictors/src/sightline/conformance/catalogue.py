"""All checks, in the order in which they run."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from sightline.conformance.binary import BINARY, COMPRESSION
from sightline.conformance.faults import CONNECTION, ERRORS, SAFETY
from sightline.conformance.infer import JSON
from sightline.conformance.kserve_clients import KSERVE
from sightline.conformance.metadata import METADATA, READY
from sightline.conformance.openai_client import OPENAI
from sightline.conformance.schema import SCHEMA
from sightline.conformance.suite import Check
from sightline.conformance.triton_grpc import GRPC
from sightline.conformance.triton_http import TRITON

GROUPS = (READY, METADATA, JSON, BINARY, COMPRESSION, ERRORS, CONNECTION, TRITON, GRPC, KSERVE, OPENAI, SCHEMA, SAFETY)
CHECKS: tuple[Check, ...] = tuple(check for group in GROUPS for check in group.checks)


def selected(patterns: Sequence[str] = (), *, intrusive: bool = False) -> list[Check]:
    """The checks whose ids fit one of the patterns (`errors.*`), all without patterns.

    Raises ValueError on a pattern that fits none.
    """
    for pattern in patterns:
        if not any(fnmatchcase(check.id, pattern) for check in CHECKS):
            raise ValueError(f"no check is called {pattern}")
    return [
        check
        for check in CHECKS
        if (intrusive or not check.is_intrusive)
        and (not patterns or any(fnmatchcase(check.id, pattern) for pattern in patterns))
    ]
