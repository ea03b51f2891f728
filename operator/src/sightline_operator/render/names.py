"""Names and fingerprints: short enough for Kubernetes, the same for the same input, never two for one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

MAX_NAME = 63
"""Characters of a DNS label, and of a label value."""
MAX_SERVED_NAME = 46
"""Characters of an InferenceService's name: Knative labels pods with `<name>-predictor-00001`, 17 more."""

_MARK = 8


def digest(value: object, length: int = 12) -> str:
    """The first hexadecimal digits of the SHA-256 of a JSON value, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def child_name(owner: str, suffix: str, limit: int = MAX_NAME) -> str:
    """`<owner>-<suffix>`. Cut to the limit with a hash of the whole, so that two long owners stay two names."""
    whole = f"{owner}-{suffix}"
    if len(whole) <= limit and "." not in owner:
        return whole
    head = owner.replace(".", "-")[: limit - _MARK - len(suffix) - 2].rstrip("-")
    return f"{head}-{digest(whole, _MARK)}-{suffix}"


def label_value(text: str) -> str:
    """The text itself, or as much of it as a label may hold with a hash of the whole."""
    if len(text) <= MAX_NAME:
        return text
    return f"{text[: MAX_NAME - _MARK - 1].rstrip('-._')}-{digest(text, _MARK)}"


def without_empty(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that say something. None and empty containers and strings do not; 0 and False do."""
    return {name: value for name, value in fields.items() if value is not None and value not in ({}, [], (), "")}
