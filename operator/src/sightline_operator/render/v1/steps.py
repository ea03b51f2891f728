"""The steps of a pipeline as the gateway sees them: where each is, what it speaks, which Secrets it wants."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast
from urllib.parse import urlsplit

from sightline_operator.api import Pipeline, seconds
from sightline_operator.api.pipeline import CaptionStep, EnhanceStep, InferenceService, InferenceServiceRef
from sightline_operator.api.types import SecretKeyRef
from sightline_operator.render.errors import RenderError
from sightline_operator.render.names import MAX_SERVED_NAME
from sightline_operator.render.v1.frame import Frame

StepName = Literal["caption", "enhance"]
PREDICTORS: Mapping[str, Literal["describe", "enhance"]] = {"caption": "describe", "enhance": "enhance"}


@dataclass(frozen=True)
class Place:
    """Where a step is.

    served     name of its InferenceService, ours or somebody else's
    is_owned   whether that is ours
    protocol   `v2` or `openai`, as the gateway's settings say it
    """

    step: StepName
    spec: CaptionStep | EnhanceStep
    url: str
    model: str
    protocol: Literal["v2", "openai"]
    served: str | None = None
    is_owned: bool = False
    key: SecretKeyRef | None = None
    authority: SecretKeyRef | None = None

    @property
    def timeout_seconds(self) -> float:
        return seconds(self.spec.timeout)

    @property
    def is_in_cluster(self) -> bool:
        """By its name alone: without a dot it is this namespace's, and nothing public ends in `.svc` or `.local`."""
        host = urlsplit(self.url).hostname or ""
        return "." not in host or host.endswith((".svc", ".local")) or ".svc." in host


def places(frame: Frame, spec: Pipeline, addresses: Mapping[str, str]) -> tuple[Place, ...]:
    """The steps that are called, caption first.

    addresses   URL of an InferenceService by name, where it told another than the usual one
    Raises RenderError when a step has no place, or several.
    """
    return tuple(_place(frame, cast("StepName", name), step, addresses) for name, step in spec.steps.items())


def _place(frame: Frame, name: StepName, step: CaptionStep | EnhanceStep, addresses: Mapping[str, str]) -> Place:
    sources = (step.inference_service, step.inference_service_ref, step.endpoint)
    if sum(source is not None for source in sources) != 1:
        fields = "inferenceService, inferenceServiceRef and endpoint"
        raise RenderError(f"spec.{name}", f"exactly one of {fields} must be set: where this step's model is")
    if step.inference_service is not None:
        return _owned(frame, name, step, step.inference_service, addresses)
    if step.inference_service_ref is not None:
        return _referenced(frame, name, step, step.inference_service_ref, addresses)
    assert step.endpoint is not None  # noqa: S101 - counted above
    return Place(
        step=name,
        spec=step,
        url=step.endpoint.url,
        model=step.endpoint.model,
        protocol="openai",
        key=step.endpoint.auth_secret_ref,
        authority=step.endpoint.ca_secret_ref,
    )


def _owned(
    frame: Frame,
    name: StepName,
    step: CaptionStep | EnhanceStep,
    service: InferenceService,
    addresses: Mapping[str, str],
) -> Place:
    served = frame.child(name, MAX_SERVED_NAME)
    has_runtime = service.runtime.name is not None
    return Place(
        step=name,
        spec=step,
        url=(addresses.get(served) or predictor_url(frame, served)) + service.runtime.path,
        model=service.runtime.served_model or (served if has_runtime else PREDICTORS[name]),
        protocol="openai" if service.runtime.protocol == "OpenAI" else "v2",
        served=served,
        is_owned=True,
    )


def _referenced(
    frame: Frame,
    name: StepName,
    step: CaptionStep | EnhanceStep,
    reference: InferenceServiceRef,
    addresses: Mapping[str, str],
) -> Place:
    return Place(
        step=name,
        spec=step,
        url=(addresses.get(reference.name) or predictor_url(frame, reference.name)) + reference.path,
        model=reference.model or reference.name,
        protocol="openai" if reference.protocol == "OpenAI" else "v2",
        served=reference.name,
    )


def predictor_url(frame: Frame, served: str) -> str:
    """Where KServe makes an InferenceService answer inside the cluster, in both of its modes."""
    return f"http://{host(frame, f'{served}-predictor')}"


def host(frame: Frame, service: str) -> str:
    """DNS name of a Service; without a known namespace its short name, which the cluster completes."""
    if frame.namespace is None:
        return service
    return f"{service}.{frame.namespace}.{frame.settings.cluster_domain}"
