"""Whatever a valid spec says: it renders, always the same, within its rights, and tells no secret."""

import json
import re
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sightline_operator.render import OPTIONAL_KINDS, RenderSettings, render_batch, render_pipeline
from tests.operator.objects import pipeline
from tests.operator.rendering import owned
from tests.operator.specs import BATCHES, EARLIER, PIPELINES, PLANS, STORED
from tests.operator.test_render import FOREIGN, walk

MODES = st.sampled_from(["Standard", "RawDeployment", "Knative", "Serverless"])
KINDS = st.sets(st.sampled_from(sorted(OPTIONAL_KINDS))).map(frozenset)
EXAMPLES = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def check(child: dict[str, Any]) -> None:
    """What holds for every child of every spec."""
    assert json.loads(json.dumps(child)) == child, "plain JSON"
    assert re.fullmatch(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", child["metadata"]["name"])
    for value in child["metadata"]["labels"].values():
        assert re.fullmatch(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?", value)
    for path, value in walk(child):
        assert not any(re.fullmatch(pattern, path) for pattern in FOREIGN), path
        assert value is not None, f"{path} is null"
        assert value != [], f"{path}: the API server drops an empty list, and it looks changed for ever"
        if path.endswith("terminationGracePeriodSeconds"):
            assert value > 10


@EXAMPLES
@given(cr=PIPELINES, mode=MODES, kinds=KINDS)
def test_any_valid_pipeline_renders(cr: dict[str, Any], mode: str, kinds: frozenset[str]) -> None:
    by = RenderSettings(deployment_mode=mode)
    children = render_pipeline(owned(cr), by, kinds)
    assert json.dumps(children) == json.dumps(render_pipeline(owned(cr), by, kinds))
    names = [(child["kind"], child["metadata"]["name"]) for child in children]
    assert len(set(names)) == len(names)
    assert {kind for kind, _ in names} & OPTIONAL_KINDS <= kinds
    for child in children:
        check(child)
        if child["kind"] == "Deployment":
            is_scaled = "autoscaling" in cr["spec"]["gateway"] and not cr["spec"].get("suspend")
            assert ("replicas" in child["spec"]) != is_scaled


@EXAMPLES
@given(cr=BATCHES, plan=PLANS)
def test_any_valid_batch_renders(cr: dict[str, Any], plan: dict[str, int] | None) -> None:
    children = render_batch(owned(cr), owned(STORED), plan, RenderSettings(), EARLIER)
    assert children == render_batch(owned(cr), owned(STORED), plan, RenderSettings(), EARLIER)
    assert ("run" in children) == bool(plan and plan["shards"])
    assert ("finish" in children) == (plan is not None)
    for child in children.values():
        check(child)
        if child["kind"] == "Job":
            assert len(f"{child['metadata']['name']}-{10_000}") <= 63, "the index of a pod is in its host name"


@EXAMPLES
@given(cr=PIPELINES, data=st.data())
def test_a_spec_says_the_same_whatever_the_order_of_its_fields(cr: dict[str, Any], data: st.DataObject) -> None:
    fields = data.draw(st.permutations(list(cr["spec"])))
    shuffled = {**cr, "spec": {name: cr["spec"][name] for name in fields}}
    assert json.dumps(render_pipeline(shuffled, RenderSettings())) == json.dumps(render_pipeline(cr, RenderSettings()))


@pytest.mark.parametrize("field", ["authSecretRef", "caSecretRef"])
def test_a_secret_is_only_ever_named(field: str) -> None:
    """There is no field that could hold one; so nothing but its name and key may appear."""
    endpoint = {"url": "https://a.example", "model": "m", field: {"name": "the-secret", "key": "the-key"}}
    children = render_pipeline(owned(pipeline({"enhance": {"endpoint": endpoint}})), RenderSettings())
    told = [path for child in children for path, value in walk(child) if value == "the-secret"]
    assert told
    assert all(path.endswith(("secretKeyRef.name", "secret.secretName")) for path in told)
