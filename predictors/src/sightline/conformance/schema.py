"""Checks that fuzz a server against our OpenAPI document of the protocol, by schemathesis in a process of its own.

One run with a fixed seed serves all checks. Not asked for: that a request which fits the schema is accepted, because
the document knows no model, and that a null is refused where a member may be left out, because many servers take it.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sightline.conformance.suite import Failed, Group, Level, Skipped, expect
from sightline.conformance.target import Target
from sightline.conformance.tensors import Json

SCHEMA = Group("schema", "Schema (schemathesis)")

SEED = 4
EXAMPLES = 10
"""Random cases an operation, beside the systematic ones of schemathesis' coverage phase."""
LONGEST_RUN_SECONDS = 240
UNUSED = ("positive_data_acceptance", "ignored_auth", "object_level_authorization", "use_after_free",
          "ensure_resource_availability", "missing_required_header", "allow_header_conformance")  # fmt: skip


@dataclass(slots=True)
class Findings:
    """What a run of schemathesis said: how often each of its checks was made, and where it failed."""

    made: dict[str, int] = field(default_factory=dict[str, int])
    failed: dict[str, list[str]] = field(default_factory=dict[str, list[str]])


@SCHEMA.check("responses", Level.MUST)
def responses(target: Target) -> None:
    """Every answer, errors included, has the shape that the protocol draws."""
    _conforms(target, "response_schema_conformance")


@SCHEMA.check("status-codes", Level.PROMISE)
def status_codes(target: Target) -> None:
    """Every answer is a 200 or an error; nothing redirects."""
    _conforms(target, "status_code_conformance")


@SCHEMA.check("content-types", Level.PROMISE)
def content_types(target: Target) -> None:
    """Every answer with a body says that it is JSON."""
    _conforms(target, "content_type_conformance")


@SCHEMA.check("no-server-errors", Level.PROMISE)
def no_server_errors(target: Target) -> None:
    """No generated request, valid or not, is answered with a 5xx."""
    _conforms(target, "not_a_server_error")


@SCHEMA.check("bad-data-refused", Level.PROMISE)
def bad_data_refused(target: Target) -> None:
    """A request that breaks the schema is refused."""
    _conforms(target, "negative_data_rejection")


@SCHEMA.check("methods", Level.PROMISE)
def methods(target: Target) -> None:
    """A method that a route does not have is a 405."""
    _conforms(target, "unsupported_method")


def document() -> str:
    """Our OpenAPI document of the protocol, as YAML."""
    return (files("sightline.conformance") / "open-inference-protocol.yaml").read_text("utf-8")


def document_for(target: Target) -> Json:
    """The document narrowed to one model: its name, its versions if it lists any, and a request that it takes."""
    import yaml

    narrowed: Json = yaml.safe_load(document())
    parameters, schemas = narrowed["components"]["parameters"], narrowed["components"]["schemas"]
    parameters["ModelName"]["schema"] = {"type": "string", "enum": [target.model]}
    versions = target.metadata.get("versions")
    parameters["ModelVersion"]["schema"] = {"type": "string", "enum": versions or ["none"]}
    paths: Json = {path: item for path, item in narrowed["paths"].items() if versions or "{model_version}" not in path}
    narrowed["paths"] = paths
    for path, item in paths.items():
        if path.endswith("/infer"):
            item["post"]["requestBody"]["content"]["application/json"]["example"] = target.request.as_json()
    _take_null_for_absent(schemas)
    return narrowed


def _take_null_for_absent(schemas: Json) -> None:
    scalar: Json = {"type": ["string", "number", "boolean", "null"]}
    lenient: Json = {"type": ["object", "null"], "additionalProperties": scalar}
    for name in ("InferenceRequest", "InputTensor", "RequestedOutput"):
        schemas[name]["properties"]["parameters"] = lenient
    request = schemas["InferenceRequest"]["properties"]
    request["id"] = {"type": ["string", "null"]}
    request["outputs"] = {"anyOf": [{"type": "null"}, request["outputs"]]}


def _conforms(target: Target, name: str) -> None:
    findings = target.once("schemathesis", lambda: _fuzz(target))
    failures = findings.failed.get(name, [])
    expect(not failures, f"{len(failures)} of {findings.made.get(name, 0)} cases; {failures[0] if failures else ''}")
    expect(findings.made.get(name), "schemathesis made no such check")


def _fuzz(target: Target) -> Findings:
    """Run schemathesis once. Raises Skipped when it is not installed or does not end in time."""
    if find_spec("schemathesis") is None:
        raise ImportError(name="schemathesis")
    with tempfile.TemporaryDirectory(prefix="sightline-conformance-") as folder:
        place = Path(folder)
        (place / "protocol.json").write_text(json.dumps(document_for(target)), "utf-8")
        # In a file: a key on the command line could be read by everybody on this machine.
        settings = [f"{name} = {json.dumps(value)}" for name, value in target.address.headers.items()]
        (place / "schemathesis.toml").write_text("\n".join(["[headers]", *settings]), "utf-8")
        command = [
            *(sys.executable, "-m", "schemathesis.cli", "run", "protocol.json", "--url", target.address.url),
            *("--phases", "examples,coverage,fuzzing", "--max-examples", str(EXAMPLES), "--seed", str(SEED)),
            *("--checks", "all", "--exclude-checks", ",".join(UNUSED), "--continue-on-failure", "--no-shrink"),
            *("--suppress-health-check", "all", "--request-timeout", str(target.address.timeout_seconds)),
            *("--output-sanitize", "false", "--report", "ndjson", "--report-ndjson-path", "events.ndjson"),
        ]
        try:
            done = subprocess.run(
                command, cwd=place, capture_output=True, text=True, timeout=LONGEST_RUN_SECONDS, check=False
            )
        except subprocess.TimeoutExpired:
            raise Skipped(f"schemathesis had not ended after {LONGEST_RUN_SECONDS} s") from None
        events = place / "events.ndjson"
        if not events.exists():
            raise Failed(f"schemathesis ended with {done.returncode}: {(done.stderr or done.stdout)[-200:]}")
        return _findings(json.loads(line) for line in events.read_text("utf-8").splitlines())


def _findings(events: Iterator[Json]) -> Findings:
    findings = Findings()
    for event in events:
        recorder: Any = event.get("ScenarioFinished", {}).get("recorder") or {}
        for case, checks in (recorder.get("checks") or {}).items():
            for check in checks:
                name = check["name"]
                findings.made[name] = findings.made.get(name, 0) + 1
                if check["status"] == "failure":
                    findings.failed.setdefault(name, []).append(_told(check, recorder, case))
    return findings


def _told(check: Json, recorder: Json, case: str) -> str:
    """One failure in a line: operation, status, what was wrong."""
    failure = check["failure_info"]["failure"]
    interaction: Any = (recorder.get("interactions") or {}).get(case) or {}
    status = (interaction.get("response") or {}).get("status_code", "no answer")
    reason = failure["message"].partition("\n\n")[0] or failure["title"]
    return f"{failure['operation']}: {status}: {reason}"
