"""`python -m sightline_operator` as it is, but for one line: it writes down when each reconcile starts."""

import sys

from sightline_operator.__main__ import main
from sightline_operator.queue import Key
from sightline_operator.reconcile import Reconciler
from tests.bench.marks import mark

reconcile = Reconciler.reconcile


async def marked(self: Reconciler, key: Key) -> None:
    cr = self._cache.get(*key)
    if cr is not None:
        mark(cr["metadata"])
    await reconcile(self, key)


if __name__ == "__main__":
    Reconciler.reconcile = marked  # type: ignore[method-assign]
    sys.exit(main())
