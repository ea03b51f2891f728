"""A black-box conformance suite for servers of the KServe V2 (Open Inference) protocol: ours and anybody's.

    sightline conformance --url http://127.0.0.1:8080 --grpc 127.0.0.1:8081

It shares no code with the server that it may be pointed at: requests are written, and answers read, from the
protocol's text (open-inference-protocol `inference_rest.md` and `open_inference_grpc.proto`; Triton's binary tensor
data extension). One check is one small function; `suite.py` says what a check is, `catalogue.py` lists all of them.
"""
