"""A FastAPI server that answers one request at a time, as the five older services do: decode, prepare, generate, JSON.

python tests/bench/naive.py KIND FOLDER TOKENS PORT
"""

import sys
import threading
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import Body, FastAPI

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.bench import plain


def build(kind: str, folder: str, tokens: int) -> FastAPI:
    answer, lock, app = plain.load(kind, folder, tokens), threading.Lock(), FastAPI()

    @app.get("/ready")
    def ready() -> bool:
        return True

    @app.post("/run")
    def run(data: bytes = Body(media_type="application/octet-stream")) -> dict[str, Any]:
        with lock:  # Qwen keeps `rope_deltas` on the model: without it answers would be wrong, not only slow
            return answer(data)

    return app


if __name__ == "__main__":
    uvicorn.run(build(sys.argv[1], sys.argv[2], int(sys.argv[3])), port=int(sys.argv[4]), log_level="warning")
