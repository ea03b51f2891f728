"""A stock KServe 0.21 ModelServer with the same model, written as KServe's documentation does; nothing of ours in it.

    python tests/bench/stock.py KIND FOLDER TOKENS HTTP_PORT GRPC_PORT

Images come base64-encoded in V2 JSON: its binary route takes 0.6 s for 100 KB, and refuses raw JPEG bytes.
"""

import base64
import json
import sys
from pathlib import Path

import kserve
from kserve.utils.utils import generate_uuid

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.bench import plain


class Stock(kserve.Model):
    def __init__(self, kind: str, folder: str, tokens: int) -> None:
        super().__init__("stock")
        self.answer = plain.load(kind, folder, tokens)
        self.ready = True

    def predict(self, payload, headers=None, response_headers=None):
        said = self.answer(base64.b64decode(payload.inputs[0].data[0]))
        output = kserve.InferOutput("said", [1], "BYTES", data=[json.dumps(said)])
        return kserve.InferResponse(generate_uuid(), self.name, [output])


if __name__ == "__main__":
    kind, folder, tokens, http_port, grpc_port = sys.argv[1:6]
    sys.argv = sys.argv[:1]  # KServe reads the command line at import
    server = kserve.ModelServer(http_port=int(http_port), grpc_port=int(grpc_port), workers=1)
    server.start([Stock(kind, folder, int(tokens))])
