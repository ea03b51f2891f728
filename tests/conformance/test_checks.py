"""Every check of the suite passes against a server that does everything right, and fails for the fault it is about."""

from dataclasses import replace

import pytest

from sightline.conformance.catalogue import CHECKS, selected
from sightline.conformance.run import Unreachable, run
from sightline.conformance.suite import Outcome, run_here
from sightline.conformance.target import Address, Target
from tests.conformance.faulty_server import KEY, FaultyServer, running
from tests.conftest import free_port

FAULTS = {
    "ready.live": "not live",
    "ready.server": "not ready",
    "ready.model": "ready of another",
    "ready.unknown-model": "every model is ready",
    "metadata.server": "no extensions",
    "metadata.model": "tensors without shape",
    "metadata.no-nulls": "null versions",
    "metadata.unknown-model": "detail for unknown models",
    "metadata.versions": "no versions",
    "metadata.binary-announced": "announces nothing",
    "json.infer": "loses an element",
    "json.id": "forgets ids",
    "json.outputs": "returns all outputs",
    "json.as-declared": "declares another datatype",
    "json.nested-data": "no nested data",
    "json.version": "no infer of versions",
    "json.no-nulls": "null for absent",
    "binary.input": "no binary",
    "binary.image-bytes": "text only",
    "binary.large-image": "takes 8 MiB",
    "binary.output": "no binary outputs",
    "binary.output-default": "no default binary",
    "binary.output-exception": "binary always wins",
    "compression.request-gzip": "no gzip",
    "compression.request-deflate": "no deflate",
    "compression.response-gzip": "only says gzip",
    "compression.broken-gzip": "500 for broken gzip",
    "errors.invalid-json": "detail for invalid JSON",
    "errors.empty-body": "an empty body is fine",
    "errors.no-inputs": "an empty answer without inputs",
    "errors.not-an-object": "detail for lists",
    "errors.unknown-model": "unknown models answer",
    "errors.unknown-model-404": "400 for unknown models",
    "errors.wrong-shape": "500 for wrong shapes",
    "errors.unknown-datatype": "any datatype",
    "errors.unknown-output": "any output",
    "errors.binary-too-short": "500 for short data",
    "errors.binary-too-long": "ignores what is left over",
    "errors.header-length": "500 for header lengths",
    "errors.broken-image": "500 for broken images",
    "errors.client-faults-are-4xx": "500 for wrong shapes",
    "errors.no-internals": "names its exceptions",
    "errors.no-echo": "repeats what it got",
    "errors.unknown-route": "own words for unknown routes",
    "connection.reused": "closes after answers",
    "connection.after-errors": "closes after errors",
    "connection.alive": "dies of bad JSON",
    "triton.health": "not live",
    "triton.metadata": "metadata without name",
    "triton.json": "wants a content type",
    "triton.binary": "forgets ids",
    "triton.image-bytes": "text only",
    "triton.gzip": "no gzip",
    "triton.deflate": "no deflate",
    "triton.async-infer": "no binary",
    "triton.asyncio": "no binary",
    "triton.errors": "unknown models answer",
    "grpc.health": "not live",
    "grpc.server-metadata": "no extensions",
    "grpc.model-metadata": "forgets an output",
    "grpc.infer": "forgets ids",
    "grpc.typed-contents": "raw contents only",
    "grpc.outputs": "returns all outputs",
    "grpc.image-bytes": "text only",
    "grpc.large-image": "takes 8 MiB",
    "grpc.unknown-model": "unknown models answer",
    "grpc.unknown-model-not-found": "400 for unknown models",
    "grpc.bad-input": "500 for wrong shapes",
    "grpc.asyncio": "loses an element",
    "kserve.rest-health": "health says nothing",
    "kserve.rest-json": "loses an element",
    "kserve.rest-binary": "no binary",
    "kserve.rest-image-bytes": "text only",
    "kserve.grpc-health": "not live",
    "kserve.grpc-infer": "loses an element",
    "openai.models": "lists another model",
    "openai.chat": "says nothing",
    "openai.chat-stream": "stops streaming",
    "openai.embeddings": "words for vectors",
    "openai.errors": "400 for unknown models",
    "schema.responses": "null versions",
    "schema.status-codes": "answers 202",
    "schema.content-types": "says it is text",
    "schema.no-server-errors": "500 for wrong shapes",
    "schema.bad-data-refused": "takes any member",
    "schema.methods": "takes any method",
    "safety.unload": "can be unloaded",
}


@pytest.fixture(scope="module")
def server():
    with running() as server:
        yield server


def address(server: FaultyServer) -> Address:
    return Address(server.url, grpc=f"127.0.0.1:{server.grpc_port}", openai=True, timeout_seconds=20)


def outcomes(server: FaultyServer, *patterns: str) -> dict[str, tuple[Outcome, str]]:
    results = run(selected(patterns, intrusive=True), address(server))
    return {result.id: (result.outcome, result.reason) for result in results}


def test_a_server_that_does_everything_right_passes_every_check(server):
    found = outcomes(server)
    assert set(found) == {check.id for check in CHECKS}
    assert {name: told for name, told in found.items() if told[0] is not Outcome.PASS} == {}


def test_the_key_goes_with_every_request(server):
    keyed = replace(address(server), api_key=KEY)
    with server.with_faults("wants a key"):
        results = run(selected(), keyed)
        assert {result.id: result.reason for result in results if result.outcome is not Outcome.PASS} == {}
        refused = run(selected(["json.infer"]), address(server))
    assert refused[0].outcome is Outcome.FAIL


def test_every_check_has_a_fault():
    assert set(FAULTS) == {check.id for check in CHECKS}


# Triton's gRPC client cannot be in this process, where KServe is; each run of schemathesis serves all of its checks.
APART = ("grpc.", "schema.")


@pytest.mark.parametrize(("check", "fault"), [entry for entry in FAULTS.items() if not entry[0].startswith(APART)])
def test_it_fails_for_its_fault(server, check, fault):
    with server.with_faults(fault), Target(address(server)) as target:
        (result,) = run_here(selected([check], intrusive=True), target)
    assert result.outcome is Outcome.FAIL, result.reason
    assert result.reason


def test_the_checks_over_grpc_fail_for_their_faults_and_no_others_do(server):
    faults = {check: fault for check, fault in FAULTS.items() if check.startswith("grpc.")}
    separate = {check: faults.pop(check) for check in ("grpc.unknown-model", "grpc.asyncio")}
    for together in (faults, separate):
        with server.with_faults(*together.values()):
            found = outcomes(server, "grpc.*")
        failed = {check for check, told in found.items() if told[0] is Outcome.FAIL}
        if together is faults:
            assert failed == set(faults), found
        else:  # what loses an element of every answer fails more checks than the one
            assert failed >= set(separate), found


def test_the_fuzzed_checks_fail_for_their_faults(server):
    faults = {check: fault for check, fault in FAULTS.items() if check.startswith("schema.")}
    with server.with_faults(*faults.values()):
        found = outcomes(server, "schema.*")
    assert {check for check, told in found.items() if told[0] is Outcome.FAIL} == set(faults), found


def test_nothing_there_is_told_apart_from_a_bad_server():
    with pytest.raises(Unreachable):
        run(selected(), Address(f"http://127.0.0.1:{free_port()}", timeout_seconds=5))


def test_a_pattern_that_fits_nothing_is_an_error():
    with pytest.raises(ValueError, match="no check"):
        selected(["eror.*"])
