"""What is wrong with the lines of an OpenAI batch file, and how our lines are told to OpenAI's clients."""

import json
from collections.abc import Iterable
from typing import Any

import pytest

from sightline.jobs.items import Fault, Item, Line
from sightline.jobs.openai.output import output_line
from sightline.jobs.openai.requests import MAX_FAULTS, Checked, LineFault, check, item


def line(custom_id: object = "a", **said: Any) -> bytes:
    request = {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": {"model": "m"}}
    return json.dumps(request | said).encode()


def checked(lines: Iterable[bytes], *, most: int = 100, longest: int = 10_000) -> Checked:
    return check(lines, max_requests=most, max_line_bytes=longest)


def test_a_good_file_has_its_requests_and_endpoints() -> None:
    lines = [line("a") + b"\n", b"\n", line("b", body={"model": "n"}) + b"\r\n", line("c")]
    assert checked(lines) == Checked(3, ("/v1/chat/completions",), ("m", "n"))
    assert item(lines[2]) == Item("b", url="/v1/chat/completions", body={"model": "n"})


@pytest.mark.parametrize(
    ("bad", "code", "param"),
    [
        (b"{", "invalid_json_line", None),
        (b"[1]", "invalid_json_line", None),
        (b"\xff", "invalid_json_line", None),
        (line(None), "invalid_custom_id", "custom_id"),
        (line(""), "invalid_custom_id", "custom_id"),
        (line("x" * 513), "invalid_custom_id", "custom_id"),
        (line("a\nb"), "invalid_custom_id", "custom_id"),
        (line("good"), "duplicate_custom_id", "custom_id"),
        (line(method="GET"), "invalid_method", "method"),
        (line(url="/v1/embeddings"), "invalid_url", "url"),
        (line(url=["/v1/chat/completions"]), "invalid_url", "url"),
        (line(body=None), "invalid_body", "body"),
        (line(body={}), "model_missing", "body.model"),
        (line(body={"model": "m", "stream": True}), "invalid_body", "body.stream"),
    ],
    ids=lambda value: value[:40].decode(errors="replace") if isinstance(value, bytes) else value,
)
def test_a_bad_line_is_named_with_its_number(bad: bytes, code: str, param: str | None) -> None:
    found = checked([line("good"), b"", bad, line("last")])
    assert [(fault.code, fault.line, fault.param) for fault in found.faults] == [(code, 3, param)]
    assert found.requests == 3
    assert LineFault.from_json(found.faults[0].to_json()) == found.faults[0]


def test_a_file_without_requests_is_no_batch() -> None:
    assert [fault.code for fault in checked([b"", b"  \n"]).faults] == ["empty_file"]


def test_reading_ends_at_what_is_too_much() -> None:
    def lines() -> Iterable[bytes]:
        yield from (line(str(number)) for number in range(3))
        pytest.fail("it was read on")

    assert [(fault.code, fault.line) for fault in checked(lines(), most=2).faults] == [("too_many_requests", 3)]
    assert [fault.code for fault in checked(lines(), longest=10).faults] == ["line_too_long"]


def test_a_file_names_a_few_models_and_no_more() -> None:
    found = checked(line(str(number), body={"model": f"m{number}"}) for number in range(10))
    assert found.models == tuple(f"m{number}" for number in range(8))
    assert [(fault.code, fault.line) for fault in found.faults] == [("too_many_models", 9), ("too_many_models", 10)]


def test_at_most_so_many_faults_are_told() -> None:
    assert len(checked([b"{"] * 1000, most=2000).faults) == MAX_FAULTS


# --- answers ---------------------------------------------------------------------------------------------------------


def told(line: Line) -> dict[str, Any]:
    text = output_line("batch_1", line.encoded())
    assert text.endswith(b"}\n")
    return json.loads(text)


def test_a_result_is_a_response_and_no_error() -> None:
    response = {"status_code": 200, "request_id": "r", "body": {"id": "chatcmpl-1"}}
    said = told(Line(Item("a", url="/v1/chat/completions"), {"response": response}))
    assert said.keys() == {"id", "custom_id", "response", "error"}
    assert (said["custom_id"], said["response"], said["error"]) == ("a", response, None)


def test_the_id_of_a_line_is_that_of_its_request_in_its_batch() -> None:
    first, again = (told(Line(Item("a"), {"response": {}}))["id"] for _ in range(2))
    other = told(Line(Item("b"), {"response": {}}))["id"]
    assert first == again
    assert first.startswith("batch_req_")
    assert first != other


def test_a_refused_request_has_its_status_and_our_code() -> None:
    said = told(Line(Item("a"), fault=Fault("caption", "caption_rejected", "No such model.", 404, 1)))
    assert said["response"]["status_code"] == 404
    assert said["response"]["body"]["error"] == {
        "message": "No such model.",
        "type": "invalid_request_error",
        "param": None,
        "code": "caption_rejected",
    }
    assert (said["error"]["code"], said["error"]["step"]) == ("caption_rejected", "caption")


def test_a_request_that_nobody_answered_has_no_response() -> None:
    said = told(Line(Item("a"), fault=Fault("caption", "batch_expired", "The window has passed.")))
    assert said["response"] is None
    assert said["error"]["code"] == "batch_expired"
