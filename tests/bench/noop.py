"""Our server, whole, around a model that does nothing: what a request costs before any model sees it.

python tests/bench/noop.py PORT
"""

import sys
from collections.abc import Sequence

from fastapi import APIRouter

from sightline import v2
from sightline.server.model import PredictorModel
from sightline.server.serve import _configure_logging, _ModelServer, build_app
from sightline.services.base import Json
from sightline.settings import ServerSettings
from sightline.wire import Context


class NoopService:
    """Says how many bytes an image has."""

    name = "noop"
    inputs = (v2.TensorSpec("image", "BYTES", (-1,)),)
    outputs = (v2.TensorSpec("text", "BYTES", (-1,)),)

    async def load(self) -> None: ...

    async def close(self) -> None: ...

    async def preprocess(self, requests: Sequence[bytes], context: Context) -> Sequence[bytes]:
        return requests

    async def predict(self, prepared: Sequence[bytes], context: Context) -> Sequence[str]:
        return [str(len(data)) for data in prepared]

    def from_v1(self, body: object) -> Sequence[bytes]:
        raise NotImplementedError

    def to_v1(self, results: Sequence[str]) -> Json:
        raise NotImplementedError

    def from_v2(self, request: v2.InferRequest) -> Sequence[bytes]:
        return request.inputs[0].elements()

    def to_v2(self, results: Sequence[str]) -> v2.InferResponse:
        return v2.InferResponse(self.name, (v2.Tensor.of_texts("text", results),))

    def metadata(self) -> dict[str, v2.Scalar]:
        return {}

    def router(self, run: object) -> APIRouter:
        return APIRouter()


def main(port: int) -> None:
    settings = ServerSettings(host="127.0.0.1", port=port, auth="off", queue_size=256, _cli_parse_args=False)
    _configure_logging(settings)
    model = PredictorModel(NoopService(), settings)
    app = build_app({"noop": model}, settings)
    _ModelServer(app, settings).start([model])


if __name__ == "__main__":
    main(int(sys.argv[1]))
