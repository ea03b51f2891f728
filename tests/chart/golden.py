"""What every shape in ci/ renders to, kept under golden/; `python -m tests.chart.golden` writes it again by helm."""

import re
from pathlib import Path

from tests.chart.test_chart import SHAPES, helm_template

FOLDER = Path(__file__).parent / "golden"


def golden_of(shape: str) -> str:
    """The text of a release, with the random key replaced, without the dashboard and the roles: those are of files."""
    parts = helm_template("-f", str(SHAPES[shape])).split("---\n")
    text = "---\n".join(part for part in parts if not part.startswith("# Source: sightline/templates/rbac.yaml"))
    text = re.sub(r"(?m)^(kind: Secret\n(?:.*\n)*?data:\n  \S+: ).+$", r"\1RANDOM", text)
    return re.sub(r"(?m)^  sightline.json: \|\n(?:    .*\n|\n)+", "  sightline.json: THE CHART'S\n", text)


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for path in FOLDER.glob("*.yaml"):
        path.unlink()
    for shape in SHAPES:
        (FOLDER / f"{shape}.yaml").write_text(golden_of(shape))


if __name__ == "__main__":
    main()
