"""Some checks in a process of their own: `python -m sightline.conformance.worker`; results are its last line."""

import json
import sys
from dataclasses import asdict

from sightline.conformance.catalogue import CHECKS
from sightline.conformance.suite import run_here
from sightline.conformance.target import Address, Target


def main() -> int:
    """Answer one order; the results are the last line, whatever client libraries print before it."""
    order = json.load(sys.stdin)
    wanted = set(order["ids"])
    with Target(Address(**order["address"])) as target:
        results = run_here([check for check in CHECKS if check.id in wanted], target)
    sys.stdout.write("\n" + json.dumps([asdict(result) for result in results]) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
