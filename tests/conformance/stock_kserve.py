"""A stock KServe 0.21 ModelServer with an echo model, written as KServe's documentation does: nothing of ours in it.

    python tests/conformance/stock_kserve.py HTTP_PORT GRPC_PORT

The model takes an `image` and a `prompt` and gives both back, so that everything that goes wrong is the SDK's doing.
"""

import sys

import kserve
from kserve.utils.utils import generate_uuid


class Echo(kserve.Model):
    def load(self) -> bool:
        self.ready = True
        return self.ready

    async def get_input_types(self) -> list[dict]:
        return [{"name": name, "datatype": "BYTES", "shape": [-1]} for name in ("image", "prompt")]

    async def get_output_types(self) -> list[dict]:
        return [{"name": name, "datatype": "BYTES", "shape": [-1]} for name in ("image", "prompt")]

    async def predict(self, payload, headers=None, response_headers=None):
        outputs = []
        for tensor in payload.inputs:
            output = kserve.InferOutput(tensor.name, list(tensor.shape), tensor.datatype)
            output.set_data_from_numpy(tensor.as_numpy())
            outputs.append(output)
        return kserve.InferResponse(
            response_id=payload.id or generate_uuid(),  # as the SDK's own helper does
            model_name=self.name,
            infer_outputs=outputs,
            use_binary_outputs=payload.use_binary_outputs,
            requested_outputs=payload.request_outputs,
        )


if __name__ == "__main__":
    http_port, grpc_port = map(int, sys.argv[1:3])
    sys.argv = sys.argv[:1]  # KServe reads the command line at import
    model = Echo("echo")
    model.load()
    kserve.ModelServer(http_port=http_port, grpc_port=grpc_port, workers=1).start([model])
