"""Write docs/openapi/<predictor>.json, without loading a model.

    python scripts/openapi.py [--folder FOLDER] [PREDICTOR …]

Built from the same application as the server's, KServe's own routes left out: they are added when it starts.
"""

import argparse
import json
from pathlib import Path

from sightline.server.model import MODELS
from sightline.server.serve import build_app

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "openapi"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("predictors", nargs="*", metavar="PREDICTOR", help=f"of {', '.join(MODELS)}; default: all")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    wanted = parser.parse_args()
    if unknown := set(wanted.predictors) - set(MODELS):
        parser.error(f"no predictor is called {', '.join(unknown)}")
    wanted.folder.mkdir(parents=True, exist_ok=True)
    for name in wanted.predictors or MODELS:
        settings = MODELS[name].settings_type(api_keys="none is shown", _env_file=None)  # type: ignore[call-arg]
        app = build_app({name: MODELS[name](settings)}, settings)  # type: ignore[arg-type]
        text = json.dumps(app.openapi(), indent=2, ensure_ascii=False, sort_keys=True)
        (wanted.folder / f"{name}.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
