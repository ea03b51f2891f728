"""`sightline render`: YAML of VisionPipelines and VisionBatches in, YAML of everything the operator would apply out."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml
from pydantic import ValidationError

from sightline_operator.api import Batch, Pipeline
from sightline_operator.api.types import Object
from sightline_operator.render import OPTIONAL_KINDS, RenderError, render_batch, render_pipeline, retried
from sightline_operator.settings import API_VERSION, RenderSettings

SPECS: Mapping[str, type[Object]] = {"VisionPipeline": Pipeline, "VisionBatch": Batch}


class InvalidInput(Exception):
    """Something that whoever wrote the file must mend; one line a fault, with file, document and field."""


@dataclass(frozen=True)
class Document:
    """One object of a file, and where it stands there, counted from 1."""

    place: str
    body: Mapping[str, Any]

    @property
    def kind(self) -> str:
        return str(self.body.get("kind", ""))

    @property
    def name(self) -> str:
        return str(self.body["metadata"]["name"])


def render_documents(
    files: Mapping[str, str],
    settings: RenderSettings,
    kinds: frozenset[str] = OPTIONAL_KINDS,
    *,
    namespace: str | None = None,
    plan: Mapping[str, Any] | None = None,
    beside: Mapping[str, str] | None = None,
) -> tuple[list[dict[str, Any]], list[str]]:
    """All children of all objects, in the order to be applied, and notes about documents that were passed over.

    files      text by name
    namespace  of objects that name none
    plan       of the VisionBatches: what their plan Job found; without it only that Job is known
    beside     files whose objects are looked at for VisionBatches, and not rendered
    Raises InvalidInput.
    """
    documents = [document for name, text in files.items() for document in _documents(name, text)]
    notes = [f"{d.place}: {d.kind or 'no kind'} is not rendered" for d in documents if d.kind not in SPECS]
    ours = [_placed(d, namespace) for d in documents if d.kind in SPECS]
    faults = [line for document in ours for line in _faults(document)]
    if faults:
        raise InvalidInput("\n".join(faults))
    if not ours:
        raise InvalidInput(f"{', '.join(files)}: no VisionPipeline and no VisionBatch in there")
    others = [_placed(d, namespace) for name, text in (beside or {}).items() for d in _documents(name, text)]
    known = {(d.kind, d.body["metadata"].get("namespace"), d.name): d.body for d in [*others, *ours]}
    answer: list[dict[str, Any]] = []
    for document in ours:
        try:
            answer += _rendered(document, known, settings, kinds, plan)
        except RenderError as error:
            raise InvalidInput(f"{document.place}: {error}") from error
    return answer, notes


class _Dumper(yaml.SafeDumper):
    """Texts of several lines as blocks, lists indented, nothing by reference: it is there to be read."""

    def ignore_aliases(self, data: object) -> bool:
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


def _text(dumper: _Dumper, value: str) -> yaml.ScalarNode:
    style = "|" if "\n" in value else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _text)


def as_yaml(manifests: Iterable[Mapping[str, Any]]) -> str:
    """One document each, keys in the order they were rendered in. Exactly what the operator applies."""
    return "".join(
        "---\n" + yaml.dump(manifest, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
        for manifest in manifests
    )


def _rendered(
    document: Document,
    others: Mapping[tuple[str, str | None, str], Mapping[str, Any]],
    settings: RenderSettings,
    kinds: frozenset[str],
    plan: Mapping[str, Any] | None,
) -> list[dict[str, Any]]:
    if document.kind == "VisionPipeline":
        return list(render_pipeline(document.body, settings, kinds))
    spec, namespace = document.body["spec"], document.body["metadata"].get("namespace")
    wanted = str(spec["pipelineRef"]["name"])
    pipeline = others.get(("VisionPipeline", namespace, wanted))
    if pipeline is None:
        raise RenderError("spec.pipelineRef.name", f"VisionPipeline {wanted} is in none of the files")
    earlier = others.get(("VisionBatch", namespace, (spec["input"].get("retryOf") or {}).get("batchName", "")))
    again = retried(earlier) if earlier else None
    return list(render_batch(document.body, pipeline, plan, settings, again).values())


def _documents(file: str, text: str) -> Iterator[Document]:
    try:
        loaded = list(yaml.safe_load_all(text))
    except yaml.YAMLError as error:
        raise InvalidInput(f"{file}: not YAML: {' '.join(str(error).split())}") from error
    number = 0
    for body in loaded:
        if body is None:
            continue
        number += 1
        if not isinstance(body, dict):
            raise InvalidInput(f"{file}: document {number}: must be an object")
        items = body.get("items") if body.get("kind") == "List" else None
        for index, item in enumerate(cast("list[Any]", items) if isinstance(items, list) else [body]):
            place = f"{file}: document {number}" + (f", item {index + 1}" if items else "")
            yield Document(place, cast("Mapping[str, Any]", item if isinstance(item, dict) else {}))


def _placed(document: Document, namespace: str | None) -> Document:
    metadata = document.body.get("metadata")
    if not isinstance(metadata, dict) or not isinstance(metadata.get("name"), str) or not metadata["name"]:
        raise InvalidInput(f"{document.place}: metadata.name: is missing")
    if namespace is None or metadata.get("namespace"):
        return document
    return Document(document.place, {**document.body, "metadata": {**metadata, "namespace": namespace}})


def _faults(document: Document) -> Iterator[str]:
    """What is wrong with one object, a line each. The API server says the same, and evaluates the CEL rules besides."""
    if document.body.get("apiVersion") != API_VERSION:
        yield f"{document.place}: apiVersion: must be {API_VERSION}"
        return
    spec = document.body.get("spec")
    if not isinstance(spec, dict):
        yield f"{document.place}: spec: is missing"
        return
    model = SPECS[document.kind]
    try:
        model.model_validate(spec)
    except ValidationError as error:
        for fault in error.errors(include_url=False, include_input=False):
            yield f"{document.place}: {_path(('spec', *fault['loc']))}: {fault['msg'].removeprefix('Value error, ')}"
        return
    for path in _unknown(model, cast("Mapping[str, Any]", spec), "spec"):
        yield f"{document.place}: {path}: no field is called so"


def _path(location: Sequence[str | int]) -> str:
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in location]
    return "".join(parts).removeprefix(".")


def _unknown(model: type[Object], given: Mapping[str, Any], path: str) -> Iterator[str]:
    """Fields that the API server would drop: they are misspelt, or of another version."""
    known = {field.alias or name: field.annotation for name, field in model.model_fields.items()}
    for name, value in given.items():
        if name not in known:
            yield f"{path}.{name}"
            continue
        inner = _object_in(known[name])
        if inner is None:
            continue
        if isinstance(value, dict):
            yield from _unknown(inner, cast("Mapping[str, Any]", value), f"{path}.{name}")
        elif isinstance(value, list):
            for index, item in enumerate(cast("list[Any]", value)):
                if isinstance(item, dict):
                    yield from _unknown(inner, cast("Mapping[str, Any]", item), f"{path}.{name}[{index}]")


def _object_in(annotation: object) -> type[Object] | None:
    """The Object of `X`, `X | None`, `tuple[X, ...]` and `Annotated[X, …]`; None of everything else."""
    if isinstance(annotation, type):
        return annotation if issubclass(annotation, Object) else None
    found = (_object_in(argument) for argument in getattr(annotation, "__args__", ()))
    return next((inner for inner in found if inner is not None), None)


# --- the command -----------------------------------------------------------------------------------------------------


def main(argv: Sequence[str], prog: str = "sightline render") -> int:
    """Read, render, print. Returns the exit code: 0, or 1 after the faults were named on stderr."""
    options = _parser(prog).parse_args(list(argv))
    try:
        settings = _settings(options)
        plan = json.loads(_read(options.plan)) if options.plan else None
        files = {name if name != "-" else "stdin": _read(name) for name in options.file}
        kinds = OPTIONAL_KINDS - frozenset(options.without or ())
        manifests, notes = render_documents(files, settings, kinds, namespace=options.namespace, plan=plan)
    except (InvalidInput, OSError, ValueError) as error:
        for line in str(error).splitlines():
            sys.stderr.write(f"{prog}: {line}\n")
        return 1
    for note in notes:
        sys.stderr.write(f"{prog}: {note}\n")
    sys.stdout.write(as_yaml(manifests))
    return 0


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Print everything that the operator would apply for the VisionPipelines and VisionBatches of the "
        "files: `sightline render -f pipeline.yaml | kubectl apply --server-side -f -` needs no operator.",
    )
    parser.add_argument("-f", "--file", action="append", required=True, help="YAML file; - is stdin; may be repeated")
    parser.add_argument("-n", "--namespace", help="of objects that name none")
    parser.add_argument(
        "--image", action="append", default=[], metavar="NAME=IMAGE", help="such as describe=my/image:1"
    )
    parser.add_argument(
        "--deployment-mode",
        default=RenderSettings().deployment_mode,
        choices=["Standard", "RawDeployment", "Knative", "Serverless"],
        help="of the cluster's KServe",
    )
    parser.add_argument(
        "--worker-env",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a variable of the workers of batches, such as HTTPS_PROXY=http://proxy:3128",
    )
    parser.add_argument(
        "--plan", metavar="FILE", help="JSON that a VisionBatch's plan Job left: its run and finish too"
    )
    parser.add_argument(
        "--without", action="append", choices=sorted(OPTIONAL_KINDS), help="a kind that the cluster does not serve"
    )
    return parser


def _settings(options: argparse.Namespace) -> RenderSettings:
    images = dict(RenderSettings().images)
    for pair in cast("list[str]", options.image):
        name, sign, image = pair.partition("=")
        if not sign or not image or name not in images:
            raise InvalidInput(f"--image {pair}: must be NAME=IMAGE with NAME one of {', '.join(images)}")
        images[name] = image
    try:
        env = environment_of(options.worker_env)
    except ValueError as error:
        raise InvalidInput(f"--worker-env {error}") from error
    return RenderSettings(images=images, deployment_mode=options.deployment_mode, worker_env=env)


def environment_of(pairs: Sequence[str]) -> dict[str, str]:
    """`NAME=VALUE`, each. Raises ValueError, naming the one that is none."""
    answer: dict[str, str] = {}
    for pair in pairs:
        name, sign, value = pair.partition("=")
        if not sign or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ValueError(f"{pair}: must be NAME=VALUE")
        answer[name] = value
    return answer


def _read(name: str) -> str:
    return sys.stdin.read() if name == "-" else Path(name).read_text()
