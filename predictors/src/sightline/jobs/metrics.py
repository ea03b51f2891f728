"""What a batch's worker tells Prometheus, of its items, its calls and how fast it may ask."""

from prometheus_client import Counter, Gauge, Histogram

ITEMS = Counter(
    "sightline_batch_items", "Items that are done, by outcome: ok, unenhanced, or the error's code.", ["outcome"]
)
CALL_SECONDS = Histogram(
    "sightline_batch_call_seconds",
    "Calls of the target, by status.",
    ["status"],
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120),
)
REPEATS = Counter("sightline_batch_repeats", "Calls that were made again, by why.", ["code"])
FETCHED_BYTES = Counter("sightline_batch_fetched_bytes", "Bytes of images that were fetched.")
REUSED = Counter("sightline_batch_reused", "Items that were answered from the result of the same content.")
CHUNKS = Counter(
    "sightline_batch_chunks", "Chunks by what became of them: written, or lost to another worker.", ["outcome"]
)
LIMIT = Gauge("sightline_batch_in_flight_limit", "Calls that may be in flight now; 0 in an outage.")
IN_FLIGHT = Gauge("sightline_batch_in_flight", "Calls that are in flight now.")
WAITING = Gauge("sightline_batch_waiting", "1 while calls stand still, by why.", ["reason"])
