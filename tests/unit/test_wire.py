"""Wire types and errors: frozen, plain, telling nothing they should not, and the clock of a deadline."""

import dataclasses
import inspect
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sightline import errors, wire
from sightline.errors import DeadlineExceeded, SightlineError
from sightline.wire import (
    ChatRequest,
    Completion,
    Context,
    Deadline,
    EnhanceRequest,
    ImageBytes,
    ImagePath,
    ImageS3,
    ImageUrl,
    ModelInfo,
    Sampling,
    Turn,
    Usage,
)

EXAMPLES = [
    ImageBytes(b"x"),
    ImageUrl("https://a.example"),
    ImageS3("s3://bucket/key"),
    ImagePath("a.png"),
    Sampling(),
    ModelInfo("name", "1"),
    Usage(),
    Completion("text", "stop", Usage(), ModelInfo("name", "1"), 1.0),
    ChatRequest((Turn("user", (ImageBytes(b"x"), "a cat")),)),
    EnhanceRequest("a cat"),
    Deadline(1.0),
    Context("id", Deadline(1.0)),
]
FAMILY = [member for _, member in inspect.getmembers(errors, inspect.isclass) if issubclass(member, SightlineError)]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(wire, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


class TestDeadline:
    def test_counts_down(self, clock: SimpleNamespace) -> None:
        deadline = Deadline.after(10)
        assert deadline.remaining() == 10

        clock.now += 4
        assert deadline.remaining() == 6

        clock.now += 7
        assert deadline.remaining() == -1

    def test_is_fine_until_its_moment(self, clock: SimpleNamespace) -> None:
        deadline = Deadline.after(10)

        clock.now += 9.999
        deadline.check()

    @pytest.mark.parametrize("seconds", [10, 11], ids=["at the moment", "past it"])
    def test_then_it_is_504(self, seconds: float, clock: SimpleNamespace) -> None:
        deadline = Deadline.after(10)

        clock.now += seconds

        with pytest.raises(DeadlineExceeded) as caught:
            deadline.check()
        assert caught.value.status == 504

    @given(st.floats(-1e6, 1e6))
    def test_of_any_length(self, seconds: float) -> None:
        remaining = Deadline.after(seconds).remaining()

        assert seconds - 60 < remaining <= seconds + 1e-6


class TestTypes:
    @pytest.mark.parametrize("example", EXAMPLES, ids=lambda value: type(value).__name__)
    def test_never_change(self, example: object) -> None:
        name = dataclasses.fields(example)[0].name  # type: ignore[arg-type]

        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(example, name, None)

    @pytest.mark.parametrize("example", EXAMPLES, ids=lambda value: type(value).__name__)
    def test_are_values(self, example: object) -> None:
        assert example == dataclasses.replace(example)  # type: ignore[type-var]
        assert hash(example) == hash(dataclasses.replace(example))  # type: ignore[type-var]

    def test_images_do_not_show_their_bytes(self) -> None:
        assert "hunter2" not in repr(ChatRequest((Turn("user", (ImageBytes(b"hunter2", "cat.png"),)),)))

    def test_greedy_is_the_default(self) -> None:
        assert Sampling() == Sampling(max_tokens=256, temperature=0.0, top_p=1.0, seed=None)

    def test_presets_differ_and_fit_the_limit(self) -> None:
        assert set(wire.PRESETS) == {"alt-text", "detailed", "creative-search", "product", "tags", "short"}
        assert wire.PRESETS["detailed"] == "Describe this image in detail"
        assert len(set(wire.PRESETS.values())) == len(wire.PRESETS)
        assert all(len(text) <= wire.MAX_PROMPT_CHARACTERS for text in wire.PRESETS.values())


class TestErrors:
    @pytest.mark.parametrize("kind", FAMILY, ids=lambda kind: kind.__name__)
    def test_have_a_status_and_a_stable_code(self, kind: type[SightlineError]) -> None:
        error = kind("One sentence.")

        assert 400 <= error.status <= 599
        assert error.code == kind.default_code
        assert error.code.replace("_", "").isalpha()
        assert error.code.islower()
        assert str(error) == error.message == "One sentence."
        assert error.retry_after is None

    @pytest.mark.parametrize("kind", FAMILY, ids=lambda kind: kind.__name__)
    def test_can_be_more_precise(self, kind: type[SightlineError]) -> None:
        error = kind("One sentence.", code="very_precise", retry_after=1.5)

        assert (error.code, error.retry_after) == ("very_precise", 1.5)

    def test_are_in_the_picture_of_the_family(self) -> None:
        picture = errors.__doc__ or ""

        for kind in FAMILY:
            assert kind.__name__ in picture
            if kind is not SightlineError and kind.__base__ is SightlineError:
                assert f"{kind.__name__} {kind.status}" in picture

    def test_only_those_that_pass_by_themselves_are_worth_a_retry(self) -> None:
        assert {kind.status for kind in FAMILY if kind.is_retryable} == {429, 502, 503, 504}
