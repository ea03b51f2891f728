"""The arithmetic of docs/scale.md: the page is what the script makes, and the sums are those that the page explains."""

import re

import pytest

from tests.conftest import ROOT
from tests.unit.test_workflows import script

scale = script("scale")


def test_the_page_is_up_to_date():
    text = (ROOT / "docs" / "scale.md").read_text()
    assert scale.page(text) == text, "run `make scale`"
    assert scale.table() in text
    for name in re.findall(r"`([a-z]+_[a-z_]+)`", text):
        assert name in scale.CONSTANTS


def test_sums_by_hand():
    gpus = {
        "gpu_peak": 100,
        "gpu_share": 0.5,
        "caption_work": 10,
        "filling": 0.8,
        "decode_rate": 500,
        "prose_tokens": 5,
    }
    pods = {"latency": 4, "gateway_in_flight": 50, "worker_in_flight": 20, "shard_size": 500}
    needed = scale.need(60_000, **gpus, **pods)
    assert needed.rate == 1_000
    assert needed.caption_gpus == 250  # 100 × 0.5 / 10 × 0.8 = 4 images a second
    assert needed.enhance_gpus == 13  # 500 / 5 × 0.8 = 80
    assert needed.gateways == 80  # 4,000 open
    assert needed.workers == 200
    assert needed.shards == 7_200


def test_ten_times_the_images_are_never_less_of_anything():
    for low, high in zip(scale.RATES, scale.RATES[1:], strict=False):
        one, other = scale.need(low), scale.need(high)
        assert all(getattr(one, name) <= getattr(other, name) for name in one.__dataclass_fields__)


def test_the_defaults_are_those_of_the_operator():
    from sightline_operator.api import Batch
    from sightline_operator.decide.batch_progress import SAMPLE_SECONDS
    from sightline_operator.lead.lease import RETRY_SECONDS

    ours = {name: constant.value for name, constant in scale.CONSTANTS.items() if constant.kind == scale.OURS}
    fields = Batch.model_fields
    assert ours == {
        "worker_in_flight": fields["max_in_flight_per_worker"].default,
        "shard_size": fields["shard_size"].default,
        "chunk_size": fields["chunk_size"].default,
        "status_seconds": SAMPLE_SECONDS,
        "lease_seconds": RETRY_SECONDS,
    }


def test_what_is_said_to_be_measured_stands_where_it_says():
    for constant in scale.CONSTANTS.values():
        if constant.kind == scale.MEASURED:
            (name,) = re.findall(r"docs/[a-z-]+\.md", constant.source)
            said = (ROOT / name).read_text()
            assert any(f"{number:g}" in said for number in (constant.value, constant.value * 1000)), constant


def test_a_constant_that_is_none_is_refused():
    with pytest.raises(KeyError, match="gpu_count"):
        scale.need(10, gpu_count=3)
