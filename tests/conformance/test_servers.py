"""Our six models do all that the suite asks for; a stock KServe server does what its column says, no more, no less."""

import pytest

from sightline.conformance.catalogue import CHECKS, selected
from sightline.conformance.run import run
from sightline.conformance.suite import Outcome
from tests.conformance.table import MARKER, OURS, REPORT, STOCK, address_of, column, marks_of, quoted, stock_server
from tests.conftest import ROOT

TABLE = REPORT.read_text()

# kserve 0.21.0 with an echo model. A new version that mends one of these is good news, and a line to take out.
STOCK_FAILS = {
    "metadata.no-nulls",
    "metadata.binary-announced",
    "json.no-nulls",
    "binary.image-bytes",
    "binary.large-image",
    "compression.request-gzip",
    "compression.request-deflate",
    "errors.invalid-json",
    "errors.empty-body",
    "errors.no-inputs",
    "errors.not-an-object",
    "errors.wrong-shape",
    "errors.binary-too-short",
    "errors.binary-too-long",
    "errors.header-length",
    "errors.broken-image",
    "errors.client-faults-are-4xx",
    "errors.no-internals",
    "errors.no-echo",
    "errors.unknown-route",
    "connection.after-errors",
    "triton.json",
    "triton.image-bytes",
    "triton.gzip",
    "triton.deflate",
    "grpc.outputs",
    "grpc.large-image",
    "grpc.bad-input",
    "kserve.rest-image-bytes",
    "schema.responses",
    "schema.no-server-errors",
    "schema.bad-data-refused",
    "safety.unload",
}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", OURS)
def test_ours_does_everything_that_applies_to_it(name, request):
    is_alone = name in {"describe", "enhance", "pipeline"}  # the others are asked in the process that serves all six
    server = request.getfixturevalue(name if is_alone else "everything")
    results = run(selected(intrusive=True), address_of(server, name))
    assert {result.id: result.reason for result in results if result.outcome is Outcome.FAIL} == {}
    assert marks_of(results) == column(TABLE, name)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_stock_server_does_what_its_column_says(tmp_path):
    with stock_server(tmp_path) as address:
        results = run(selected(intrusive=True), address)
    reasons = {result.id: result.reason for result in results if result.outcome is Outcome.FAIL}
    assert set(reasons) == STOCK_FAILS, reasons
    assert marks_of(results) == column(TABLE, STOCK)


def test_the_table_has_a_mark_of_every_check_for_every_server():
    for name in (*OURS, STOCK):
        assert set(column(TABLE, name)) == {check.id for check in CHECKS}, name


def test_the_readme_quotes_the_table():
    assert f"{MARKER[0]}{quoted(TABLE)}{MARKER[1]}" in (ROOT / "README.md").read_text()
