"""Our OpenAPI documents as tests use them: the operations, and whether an answer is one that is documented."""

import json
import re
from dataclasses import dataclass
from functools import cache
from typing import Any

import httpx
import jsonschema
import pytest

from tests.conftest import ROOT

FOLDER = ROOT / "docs" / "openapi"
LIBRARY_WORDS = re.compile(
    r"Traceback|Errno|PIL\.|torch|botocore|pydantic|/root/|/work/|/usr/|File \"|<class|object at 0x"
)


@dataclass(frozen=True)
class Operation:
    """One route of one predictor, as documented."""

    predictor: str
    method: str
    path: str

    @property
    def document(self) -> dict[str, Any]:
        return document(self.predictor)

    @property
    def spec(self) -> dict[str, Any]:
        return self.document["paths"][self.path][self.method.lower()]

    @property
    def contents(self) -> dict[str, Any]:
        """Media type → schema of the body, references resolved at the top."""
        contents = self.spec.get("requestBody", {}).get("content", {})
        return {kind: self.resolved(content.get("schema", {})) for kind, content in contents.items()}

    def resolved(self, schema: dict[str, Any]) -> dict[str, Any]:
        if (reference := schema.get("$ref")) is None:
            return schema
        return self.document["components"]["schemas"][reference.rpartition("/")[2]]

    def __str__(self) -> str:
        return f"{self.predictor} {self.method} {self.path}"


@cache
def document(predictor: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{predictor}.json").read_text())


def operations() -> list[Operation]:
    """Every operation of every document."""
    return [
        Operation(file.stem, method.upper(), path)
        for file in sorted(FOLDER.glob("*.json"))
        for path, methods in document(file.stem)["paths"].items()
        for method in methods
    ]


def check(operation: Operation, response: httpx.Response) -> None:
    """Fail unless the operation documents this status, this kind of content and a body of this shape."""
    told = f"{operation} answered {response.status_code}: {response.content[:500]!r}"
    documented = operation.spec["responses"].get(str(response.status_code))
    assert documented is not None, f"undocumented status: {told}"
    kind = response.headers.get("content-type", "").partition(";")[0]
    contents = documented.get("content", {})
    assert kind in contents, f"undocumented content type {kind}: {told}"
    if kind == "application/json":
        schema = contents[kind]["schema"] | {"components": operation.document.get("components", {})}
        fault = jsonschema.exceptions.best_match(_validator(schema).iter_errors(response.json()))
        assert fault is None, f"{fault.message} at {list(fault.absolute_path)}: {told}"
    assert response.headers["X-Request-Id"], told


def _validator(schema: dict[str, Any]) -> jsonschema.protocols.Validator:
    return jsonschema.Draft202012Validator(schema)


def check_error(response: httpx.Response) -> None:
    """Fail unless it is an error of ours: a stable code, one sentence, nothing of a library's."""
    body = response.json()
    error = body.get("error")
    code, message = (
        (error["code"], error["message"])
        if isinstance(error, dict)
        else (body.get("code"), error or body.get("detail"))
    )
    assert isinstance(code, str), response.text
    assert re.fullmatch(r"[a-z0-9_]+", code), response.text
    assert isinstance(message, str), response.text
    assert message.strip(), response.text
    assert not LIBRARY_WORDS.search(response.text), response.text


def parametrized(*, method: str | None = None) -> pytest.MarkDecorator:
    """A parameter `operation` for every operation, or for those of one method."""
    chosen = [operation for operation in operations() if method in {None, operation.method}]
    return pytest.mark.parametrize("operation", chosen, ids=str)
