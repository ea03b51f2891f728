"""What Prometheus can scrape beside KServe's own histograms, whose buckets end at ten seconds."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager

from prometheus_client import Counter, Gauge, Histogram

from sightline.engines.breaker import CircuitBreaker
from sightline.wire import Usage

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 60, 120, 300, 600)

REQUESTS = Counter("sightline_requests_total", "Answered requests.", ["method", "route", "status"])
REQUEST_SECONDS = Histogram(
    "sightline_request_seconds",
    "From the first byte in to the last byte out.",
    ["route"],
    buckets=SECONDS,
)
IN_FLIGHT = Gauge("sightline_items_in_flight", "Items queued or running.", ["model_name"])
LOAD_SECONDS = Gauge("sightline_load_seconds", "Time the model took to load.", ["model_name"])
BREAKER = Gauge("sightline_breaker_state", "0 closed, 1 half-open, 2 open.", ["model_name", "step"])
TOKENS = Counter("sightline_tokens_total", "Tokens by kind.", ["model_name", "kind"])


@contextmanager
def in_flight(model_name: str, items: int) -> Generator[None]:
    """Count items while they are queued or running."""
    gauge = IN_FLIGHT.labels(model_name)
    gauge.inc(items)
    try:
        yield
    finally:
        gauge.dec(items)


def watch_breaker(model_name: str, step: str, breaker: CircuitBreaker) -> None:
    """Tell the state of a step's breaker whenever it is asked for."""
    BREAKER.labels(model_name, step).set_function(lambda: _BREAKER_STATES.index(breaker.state))


_BREAKER_STATES = ("closed", "half-open", "open")


def observe(model_name: str, results: Sequence[object]) -> None:
    """Count the tokens of answers."""
    for result in results:
        usage = getattr(result, "usage", None)  # of a Completion, of an Embedding
        if isinstance(usage, Usage):
            image_tokens = usage.image_tokens or 0
            TOKENS.labels(model_name, "image").inc(image_tokens)
            TOKENS.labels(model_name, "prompt").inc(usage.prompt_tokens - image_tokens)
            TOKENS.labels(model_name, "completion").inc(usage.completion_tokens)
