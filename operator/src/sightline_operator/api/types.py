"""What the two specs are made of: the base of every object, rules, names, durations, quantities, references.

A field is written once, with its description, bounds and default. From it come the CRD, the reference page, the JSON
schema and what the operator reads.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, GetJsonSchemaHandler
from pydantic.alias_generators import to_camel
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

VALIDATIONS = "x-kubernetes-validations"


@dataclass(frozen=True)
class Rule:
    """One CEL rule of the API server. The message names the field and says the rule in words.

    path   the field that a refusal is reported at, below the object that has the rule, such as `.timeout`
    """

    rule: str
    message: str
    path: str = ""

    def as_schema(self) -> dict[str, str]:
        schema = {"rule": self.rule, "message": self.message}
        return schema | ({"fieldPath": self.path} if self.path else {})


class Object(BaseModel):
    """A part of a spec or of a status: camelCase outside, snake_case inside, never changed, unknown fields ignored."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        validate_by_name=True,
        validate_by_alias=True,
        frozen=True,
        extra="ignore",
        protected_namespaces=(),
    )
    rules: ClassVar[tuple[Rule, ...]] = ()

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        schema = handler(core_schema)
        if cls.rules:
            handler.resolve_ref_schema(schema)[VALIDATIONS] = [rule.as_schema() for rule in cls.rules]
        return schema


def ruled(*rules: Rule) -> dict[str, Any]:
    """`json_schema_extra` of a field with CEL rules of its own."""
    return {VALIDATIONS: [rule.as_schema() for rule in rules]}


def immutable(name: str) -> dict[str, Any]:
    """`json_schema_extra` of a field that always has a value and never changes."""
    return ruled(Rule("self == oldSelf", f"{name} is immutable: make a new object instead"))


def keyed_by(*names: str) -> dict[str, Any]:
    """`json_schema_extra` of a list whose items have an identity, so that several writers can share it."""
    return {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": list(names)}


def exactly_one(*names: str) -> str:
    """CEL: one of these fields is there, and no other."""
    return f"[{', '.join(f'has(self.{name})' for name in names)}].exists_one(x, x)"


def at_most_one(*names: str) -> str:
    """CEL: no two of these fields are there."""
    return f"[{', '.join(f'has(self.{name})' for name in names)}].filter(x, x).size() <= 1"


# --- scalars ---------------------------------------------------------------------------------------------------------

_DURATION = r"([0-9]+(\.[0-9]+)?(ms|s|m|h))+"
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}

_NOT_ENDLESS = Rule(
    "duration(self) <= duration('8760h')", "a duration such as 90s or 1h30m must not be longer than 8760h"
)
_LONGER_THAN_NOTHING = Rule(
    "duration(self) > duration('0s')", "a duration such as 90s or 1h30m must be longer than 0s here"
)

Duration = Annotated[str, Field(pattern=f"^{_DURATION}$", max_length=32, json_schema_extra=ruled(_NOT_ENDLESS))]
"""Such as `500ms`, `90s`, `1h30m`."""
PositiveDuration = Annotated[
    str,
    Field(pattern=f"^{_DURATION}$", max_length=32, json_schema_extra=ruled(_LONGER_THAN_NOTHING, _NOT_ENDLESS)),
]

DnsLabel = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", min_length=1, max_length=63)]
DnsName = Annotated[
    str,
    Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$", min_length=1, max_length=253),
]
SecretKey = Annotated[str, Field(pattern=r"^[-._a-zA-Z0-9]+$", min_length=1, max_length=253)]
Image = Annotated[str, Field(pattern=r"^[^\s]+$", min_length=1, max_length=512)]
Quantity = Annotated[int | str, Field(json_schema_extra={"x-kubernetes-int-or-string": True})]
Count = Annotated[int, Field(ge=0, le=10_000_000_000)]
Argument = Annotated[str, Field(max_length=1024)]
FieldPath = Annotated[str, Field(max_length=256)]
LabelValue = Annotated[str, Field(max_length=63)]
AnnotationValue = Annotated[str, Field(max_length=4096)]
PodTemplateOverrides = Annotated[
    dict[str, Any] | None,
    Field(
        json_schema_extra={"type": "object", "x-kubernetes-preserve-unknown-fields": True},
        description="Pod template fields (`metadata.labels`, `metadata.annotations`, `spec`) merged last over what the "
        "operator renders, as `kubectl patch --type=strategic` would: containers, volumes and environment variables "
        "by name, everything else replaced. For what has no field here: affinity, volumes, sidecars, a runtime class.",
    ),
]


def seconds(duration: str) -> float:
    """`1h30m` → 5400.0. Of a string that the pattern of Duration accepts."""
    if not re.fullmatch(_DURATION, duration):
        raise ValueError(f"{duration!r} is no duration such as 500ms, 90s or 1h30m")
    return sum(
        float(count) * _SECONDS[unit] for count, _, unit in re.findall(r"([0-9]+(\.[0-9]+)?)(ms|s|m|h)", duration)
    )


# --- what both kinds have --------------------------------------------------------------------------------------------


class Reference(Object):
    """Something else by name, replaced as a whole: half of one reference and half of another is none."""

    model_config = ConfigDict(json_schema_extra={"x-kubernetes-map-type": "atomic"})


class SecretKeyRef(Reference):
    """One key of a Secret in the namespace of this object. The operator never reads it: the kubelet mounts it."""

    name: DnsName = Field(description="Name of the Secret, in the namespace of this object.")
    key: SecretKey = Field(description="Key in the Secret.")


class SecretRef(Reference):
    """A whole Secret in the namespace of this object, by name."""

    name: DnsName = Field(description="Name of the Secret, in the namespace of this object.")


_QUANTITIES = Rule(
    "self.all(k, type(self[k]) == int || isQuantity(string(self[k])))",
    "resources: every amount must be a quantity such as 500m, 2 or 16Gi",
)


class Resources(Object):
    """CPU, memory and other resources of one container. GPUs of a predictor are counted in `gpu`, not here."""

    rules = (
        Rule(
            "!has(self.requests) || !has(self.limits) || self.requests.all(k, !(k in self.limits) || "
            "!isQuantity(string(self.requests[k])) || !isQuantity(string(self.limits[k])) || "
            "quantity(string(self.requests[k])).compareTo(quantity(string(self.limits[k]))) <= 0)",
            "resources.requests must not be larger than resources.limits",
            ".requests",
        ),
    )
    requests: dict[str, Quantity] = Field(
        default={},
        max_length=16,
        description="What the scheduler sets aside, such as `cpu: 500m`.",
        json_schema_extra=ruled(_QUANTITIES),
    )
    limits: dict[str, Quantity] = Field(
        default={},
        max_length=16,
        description="What the container may use at most, such as `memory: 16Gi`.",
        json_schema_extra=ruled(_QUANTITIES),
    )


class Generation(Object):
    """How tokens are chosen. What is not set is left to the predictor."""

    max_tokens: int | None = Field(default=None, ge=1, le=4096, description="New tokens at most.")
    temperature: float | None = Field(default=None, ge=0, le=2, description="0 is greedy, and the same on every run.")
    top_p: float | None = Field(
        default=None, gt=0, le=1, description="Choose among the likeliest tokens whose probabilities sum up to this."
    )
    seed: int | None = Field(
        default=None, ge=0, le=4_294_967_295, description="Of the random choices, for steps whose server takes one."
    )


class S3Store(Object):
    """Any store that speaks S3, and who may use it."""

    rules = (
        Rule(
            at_most_one("credentialsSecretRef", "serviceAccountName"),
            "s3: at most one of credentialsSecretRef and serviceAccountName may be set",
        ),
    )
    endpoint: str | None = Field(
        default=None,
        max_length=512,
        description="URL of the store; unset: AWS.",
        json_schema_extra=ruled(
            Rule(
                "isURL(self) && url(self).getScheme() in ['http', 'https']",
                "s3.endpoint must be an http:// or https:// URL",
            ),
            Rule("!self.contains('@')", "s3.endpoint must not hold a user name or password: use credentialsSecretRef"),
        ),
    )
    region: str | None = Field(
        default=None, max_length=64, pattern=r"^[-a-z0-9]+$", description="Region, such as `eu-central-1`."
    )
    path_style: bool = Field(
        default=False, description="Address buckets by path, as most stores other than AWS want it."
    )
    credentials_secret_ref: SecretRef | None = Field(
        default=None,
        description="Secret with the keys AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and AWS_SESSION_TOKEN if any).",
    )
    service_account_name: DnsName | None = Field(
        default=None, description="Service account that the cloud's own identity gives rights to the bucket."
    )


class S3Bucket(S3Store):
    """A bucket in any store that speaks S3."""

    bucket: str = Field(
        min_length=3, max_length=63, pattern=r"^[a-z0-9][-.a-z0-9]*[a-z0-9]$", description="Name of the bucket."
    )


class S3Location(S3Bucket):
    """A prefix of a bucket in any store that speaks S3."""

    prefix: str = Field(
        default="", max_length=512, pattern=r"^[^\s]*$", description="What every key begins with; empty: nothing."
    )


class Condition(Object):
    """One thing that is true, false or unknown about this object, and why."""

    type: str = Field(max_length=316, pattern=r"^[A-Za-z0-9][-A-Za-z0-9_.]*$", description="What it is about.")
    status: str = Field(description="True, False or Unknown.", json_schema_extra={"enum": ["True", "False", "Unknown"]})
    reason: str = Field(
        min_length=1,
        max_length=1024,
        pattern=r"^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$",
        description="One word for why.",
    )
    message: str = Field(
        default="", max_length=32_768, description="The same in a sentence, with the deepest cause that is known."
    )
    last_transition_time: str = Field(
        description="When the status last changed.", json_schema_extra={"format": "date-time"}
    )
    observed_generation: int | None = Field(
        default=None,
        ge=0,
        description="Generation of the object that this was said about; an older one may be out of date.",
    )


Time = Annotated[str | None, Field(json_schema_extra={"format": "date-time"})]
