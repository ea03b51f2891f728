"""Strategic merge, beside what `kubectl patch --type=strategic` does; and names that fit."""

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sightline_operator.render.errors import RenderError
from sightline_operator.render.merge import MergeError, merged, overlaid
from sightline_operator.render.names import MAX_NAME, child_name, digest, label_value

POD = {
    "serviceAccountName": "a",
    "containers": [
        {
            "name": "gateway",
            "image": "gateway:1",
            "env": [{"name": "A", "value": "1"}, {"name": "B", "value": "2"}],
            "ports": [{"containerPort": 8080, "name": "http"}],
            "args": ["pipeline"],
        }
    ],
    "volumes": [{"name": "tmp", "emptyDir": {}}, {"name": "cache", "emptyDir": {"sizeLimit": "1Gi"}}],
    "tolerations": [{"key": "a", "operator": "Exists"}],
}


FROM_FIELD = {"fieldRef": {"fieldPath": "metadata.name"}}


def first(pod: dict[str, Any]) -> dict[str, Any]:
    return pod["containers"][0]


@pytest.mark.parametrize(
    ("overlay", "expected"),
    [
        ({"runtimeClassName": "gvisor"}, {**POD, "runtimeClassName": "gvisor"}),
        ({"serviceAccountName": None}, {n: v for n, v in POD.items() if n != "serviceAccountName"}),
        ({"tolerations": [{"key": "b"}]}, {**POD, "tolerations": [{"key": "b"}]}),
        ({"containers": [{"name": "x"}]}, {**POD, "containers": [*POD["containers"], {"name": "x"}]}),
        (
            {"containers": [{"name": "gateway", "args": ["other"]}]},
            {**POD, "containers": [{**first(POD), "args": ["other"]}]},
        ),
        ({"containers": [{"$patch": "replace"}, {"name": "x"}]}, {**POD, "containers": [{"name": "x"}]}),
        ({"volumes": [{"name": "tmp", "$patch": "delete"}]}, {**POD, "volumes": POD["volumes"][1:]}),
        (
            {"volumes": [{"name": "cache", "persistentVolumeClaim": {"claimName": "hub"}}]},
            {**POD, "volumes": [POD["volumes"][0], {"name": "cache", "persistentVolumeClaim": {"claimName": "hub"}}]},
        ),
        (
            {"volumes": [{"name": "cache", "emptyDir": {"medium": "Memory"}}]},
            {
                **POD,
                "volumes": [POD["volumes"][0], {"name": "cache", "emptyDir": {"sizeLimit": "1Gi", "medium": "Memory"}}],
            },
        ),
        (
            {"containers": [{"name": "gateway", "env": [{"name": "B", "valueFrom": FROM_FIELD}]}]},
            {
                **POD,
                "containers": [
                    {
                        **first(POD),
                        "env": [
                            {"name": "A", "value": "1"},
                            {"name": "B", "valueFrom": FROM_FIELD},
                        ],
                    }
                ],
            },
        ),
        (
            {"containers": [{"name": "gateway", "ports": [{"containerPort": 8080, "protocol": "TCP", "name": "web"}]}]},
            {
                **POD,
                "containers": [{**first(POD), "ports": [{"containerPort": 8080, "name": "web", "protocol": "TCP"}]}],
            },
        ),
    ],
    ids=[
        "a new field",
        "null removes",
        "a plain list is replaced",
        "a container is added",
        "a container is changed by name",
        "all containers are replaced",
        "a volume is deleted",
        "a volume of another kind takes the place",
        "a volume of the same kind is merged",
        "a variable from elsewhere loses its value",
        "a port is the same with its default protocol",
    ],
)
def test_merge(overlay: dict[str, Any], expected: dict[str, Any]) -> None:
    assert merged(POD, overlay, "spec") == expected


@pytest.mark.parametrize(
    ("overlay", "path"),
    [
        ({"containers": {"name": "gateway"}}, "spec.containers"),
        ({"containers": ["gateway"]}, "spec.containers[0]"),
        ({"containers": [{"image": "x"}]}, "spec.containers[0]"),
        ({"tolerations": {"key": "b"}}, "spec.tolerations"),
        ({"tolerations": "b"}, "spec.tolerations"),
        ({"serviceAccountName": {"a": 1}}, None),
        ({"$setElementOrder/containers": []}, "spec.$setElementOrder/containers"),
        ({"volumes": [{"name": ["a"]}]}, "spec.volumes[0].name"),
        ({"containers": [{"name": "gateway", "env": "A=1"}]}, "spec.containers[0].env"),
    ],
)
def test_an_overlay_of_another_shape_is_refused_by_path(overlay: dict[str, Any], path: str | None) -> None:
    with pytest.raises(MergeError) as caught:
        merged(POD, overlay, "spec")
    if path is not None:
        assert caught.value.path == path


@pytest.mark.parametrize(
    ("overlay", "field"),
    [
        ({"spec": None}, "o.spec"),
        ({"metadata": None}, "o.metadata"),
        ({"metadata": "x"}, "o.metadata"),
        ({"spec": {"containers": None}}, "o.spec.containers"),
        ({"spec": {"containers": [{"name": "gateway", "$patch": "delete"}]}}, "o.spec.containers"),
    ],
)
def test_a_template_stays_a_template(overlay: dict[str, Any], field: str) -> None:
    with pytest.raises(RenderError) as caught:
        overlaid({"metadata": {"labels": {"a": "b"}}, "spec": POD}, overlay, "o")
    assert caught.value.field == field


def test_labels_can_all_be_taken_away() -> None:
    template = {"metadata": {"labels": {"a": "b"}}, "spec": POD}
    assert overlaid(template, {"metadata": {"labels": None}}, "o")["metadata"] == {"labels": {}}
    assert overlaid(template, None, "o") == template


def test_neither_side_is_changed() -> None:
    base, overlay = {"containers": [{"name": "a", "env": []}]}, {"containers": [{"name": "a", "env": [{"name": "X"}]}]}
    merged(base, overlay, "spec")
    assert base == {"containers": [{"name": "a", "env": []}]}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "name", "env"]), inner, max_size=3)
    ),
    max_leaves=10,
)


@given(overlay=st.dictionaries(st.sampled_from(["containers", "volumes", "x", "tolerations"]), JSON, max_size=3))
def test_any_overlay_merges_twice_as_once_or_is_refused(overlay: dict[str, Any]) -> None:
    try:
        once = merged(POD, overlay, "spec")
    except MergeError:
        return
    assert merged(once, overlay, "spec") == once
    assert merged(once, {}, "spec") == once


# --- names -----------------------------------------------------------------------------------------------------------

NAMES = st.from_regex(r"[a-z]([-a-z0-9]{0,250}[a-z0-9])?", fullmatch=True)


@given(owner=NAMES, suffix=st.sampled_from(["gateway", "caption", "run-012345", "gateway-0123abcd"]))
def test_names_of_children_are_dns_labels(owner: str, suffix: str) -> None:
    for limit in (46, MAX_NAME):
        name = child_name(owner, suffix, limit)
        assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name)
        assert len(name) <= limit
        assert name.endswith(f"-{suffix}")


@given(one=NAMES, other=NAMES)
def test_two_owners_have_two_children(one: str, other: str) -> None:
    assert (child_name(one, "gateway") == child_name(other, "gateway")) == (one == other)
    assert (label_value(one) == label_value(other)) == (one == other)


def test_a_name_with_a_dot_is_no_dns_label_and_is_marked() -> None:
    assert child_name("a.b", "gateway") != child_name("a-b", "gateway") == "a-b-gateway"


@given(
    text=st.text(alphabet="abcXYZ019._-", min_size=1, max_size=300).filter(lambda t: t[0].isalnum() and t[-1].isalnum())
)
def test_label_values_are_valid(text: str) -> None:
    assert re.fullmatch(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?", label_value(text))


def test_a_digest_does_not_depend_on_the_order_of_keys() -> None:
    assert digest({"a": 1, "b": [2, 3]}) == digest({"b": [2, 3], "a": 1}) != digest({"a": 1, "b": [3, 2]})
