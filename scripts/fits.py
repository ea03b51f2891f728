"""Write what the published models need and what the chart's GPU profiles have, by `sightline fit`, for the chart."""

import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "predictors" / "src")]

from sightline.fit import Wish, estimates, predictor_of  # noqa: E402
from sightline.memory import FLOATS, MIB, PROFILES, Anatomy, Estimate, Profile  # noqa: E402
from sightline.models.anatomy import anatomy_of  # noqa: E402
from sightline.models.published import PUBLISHED  # noqa: E402

TARGET = ROOT / "charts" / "sightline" / "files" / "fits.yaml"
HEAD = """\
# Made by `make manifests` of `sightline fit`; do not edit. MiB of one GPU.
# memory: what a GPU of a profile gives. default: how a predictor holds its weights when nothing is said.
# needs: of a model, by its quantization; `one`: with one sequence at a time.
"""


def needs(anatomy: Anatomy) -> dict[str, Any]:
    """MiB of each way in which a predictor holds a model on a GPU: quantised, and as its default floating type."""
    anyone = Profile(0, "cuda")
    ways = [scheme for scheme in anatomy.schemes if scheme not in FLOATS or scheme == _default_float(anatomy)]
    usual, alone = (estimates(anatomy, anyone, ways, Wish(concurrency=count)) for count in (None, 1))
    return {_name(full): {"usual": _mib(full), "one": _mib(one)} for full, one in zip(usual, alone, strict=True)}


def document() -> str:
    """The whole file."""
    memory = {name: profile.memory // MIB for name, profile in PROFILES.items() if profile.device == "cuda"}
    anatomies = [anatomy_of(name) for name in PUBLISHED]
    default = {predictor_of(anatomy): _name_of(anatomy.schemes[0]) for anatomy in anatomies}
    made = {"memory": memory, "default": default, "needs": {anatomy.name: needs(anatomy) for anatomy in anatomies}}
    return HEAD + yaml.safe_dump(made, sort_keys=False)


def _default_float(anatomy: Anatomy) -> str:
    return next(scheme for scheme in anatomy.schemes if scheme in FLOATS)


def _name(made: Estimate) -> str:
    return _name_of(made.scheme)


def _name_of(scheme: str) -> str:
    return "none" if scheme in FLOATS else scheme


def _mib(made: Estimate) -> int:
    return -(-made.total // MIB)


if __name__ == "__main__":
    TARGET.write_text(document())
