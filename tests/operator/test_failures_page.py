"""docs/operator/failures.md names tests that exist."""

import re
from pathlib import Path

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "operator" / "failures.md"


def test_every_test_that_the_page_names_is_there() -> None:
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("|") and "test_" in line]
    assert len(rows) > 15
    for row in rows:
        for part in row.rstrip(" |").rpartition("|")[2].split(";"):
            if (named := re.search(r"`(test_\w+\.py)`(.*)", part)) is None:
                assert part.strip() in ("*convergence*", "golden files"), part
                continue
            more = re.findall(r"`(test_\w+\.py)`", part)
            text = "".join((HERE / name).read_text() for name in more)
            for fragment in re.findall(r"\b[a-z0-9]+(?:_[a-z0-9]+)+\b", re.sub(r"`.*?`", "", part)):
                assert re.search(rf"def test_\w*{fragment}", text), f"{named[1]}: {fragment}"
