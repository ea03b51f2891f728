"""Write docs/openapi/<predictor>.json, without loading a model.

Built from the same application as the server's, KServe's own routes left out: they are added when it starts.
"""

import json
from pathlib import Path

from sightline.server.model import MODELS
from sightline.server.serve import build_app

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "openapi"


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, model_type in MODELS.items():
        settings = model_type.settings_type(api_keys="none is shown", _env_file=None)  # type: ignore[call-arg]
        app = build_app({name: model_type(settings)}, settings)  # type: ignore[arg-type]
        text = json.dumps(app.openapi(), indent=2, ensure_ascii=False, sort_keys=True)
        (FOLDER / f"{name}.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
