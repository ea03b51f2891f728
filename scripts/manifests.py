"""Write what the operator's source makes: manifests/{crd,rbac}, docs/operator, and what the samples render to."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "operator" / "src")]

from sightline_operator.api import write_crds, write_reference  # noqa: E402
from sightline_operator.rbac import NAMESPACE, operator_roles, user_roles  # noqa: E402
from sightline_operator.render.cli import as_yaml, render_documents  # noqa: E402
from sightline_operator.settings import RenderSettings  # noqa: E402

SAMPLES = ROOT / "manifests" / "samples"
PLAN = {"shards": 120, "items": 118_204}
"""What a plan Job could have found: a batch is shown with all of its Jobs."""


def rendered() -> dict[str, str]:
    """The text of each file of manifests/rendered, by name."""
    samples = {path.name: path.read_text() for path in sorted(SAMPLES.glob("*.yaml"))}
    return {name: _rendered(name, text, samples) for name, text in samples.items()}


def _rendered(name: str, text: str, samples: dict[str, str]) -> str:
    beside = {other: content for other, content in samples.items() if other != name}
    manifests, _ = render_documents({name: text}, RenderSettings(), plan=PLAN, beside=beside)
    command = f"sightline render -f {name}"
    if "kind: VisionBatch" in text:
        command += f" (with its pipeline, and a plan of {PLAN['items']} images)"
    return f"# Made by `make manifests` from samples/{name}, as `{command}` would.\n{as_yaml(manifests)}"


def roles() -> dict[str, str]:
    """The text of each file of manifests/rbac, by name."""
    made = {
        "cluster.yaml": ("rbac", operator_roles()),
        "namespaced.yaml": (f"rbac --namespace {NAMESPACE}", operator_roles([NAMESPACE])),
        "users.yaml": ("rbac --users", user_roles()),
    }
    return {
        name: f"# Made by `make manifests`, as `python -m sightline_operator {command}` prints it.\n{as_yaml(objects)}"
        for name, (command, objects) in made.items()
    }


def main() -> None:
    folder = ROOT / "manifests" / "rendered"
    folder.mkdir(exist_ok=True)
    wanted = rendered()
    for path in folder.glob("*.yaml"):
        if path.name not in wanted:
            path.unlink()
    for name, text in wanted.items():
        (folder / name).write_text(text)
    write_crds(ROOT / "manifests" / "crd")
    (ROOT / "manifests" / "rbac").mkdir(exist_ok=True)
    for name, text in roles().items():
        (ROOT / "manifests" / "rbac" / name).write_text(text)
    write_reference(ROOT / "docs" / "operator")


if __name__ == "__main__":
    main()
