"""The lines of a batch as Parquet, a row group at a time; needs pyarrow, which is the extra `parquet`."""

import io
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import orjson

from sightline.jobs.sidecars import caption_of

GROUP_ROWS = 20_000
"""Rows of one group: what is in memory, and what a reader fetches at once."""

_OWN = ("custom_id", "uri", "caption", "original_caption", "enhanced", "error")


class ParquetMissing(Exception):
    """Parquet was asked for and pyarrow is not installed."""

    def __init__(self) -> None:
        super().__init__("Parquet needs pyarrow: install sightline[parquet]")


def require_parquet() -> None:
    """Raises ParquetMissing now rather than when a million images are captioned."""
    if find_spec("pyarrow") is None:
        raise ParquetMissing


class ParquetFile:
    """Rows in, bytes of one Parquet file out, as they come. What it does takes time: call it from a thread.

    Columns: custom_id, uri, caption, original_caption, enhanced, error_step, error_code, error_status, error_message,
    and `result`, the rest of the line as JSON. Raises ParquetMissing.
    """

    def __init__(self) -> None:
        require_parquet()
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._schema = pa.schema(
            [(name, pa.string()) for name in ("custom_id", "uri", "caption", "original_caption")]
            + [("enhanced", pa.bool_()), ("error_step", pa.string()), ("error_code", pa.string())]
            + [("error_status", pa.int32()), ("error_message", pa.string()), ("result", pa.string())]
        )
        self._sink = _Sink()
        self._writer = pq.ParquetWriter(self._sink, self._schema, compression="zstd")
        self._rows: list[dict[str, Any]] = []

    def add(self, rows: Sequence[Mapping[str, Any]]) -> bytes:
        """Take some lines; returns what is finished of the file, often nothing."""
        self._rows.extend(_columns(row) for row in rows)
        if len(self._rows) >= GROUP_ROWS:
            self._flush()
        return self._sink.taken()

    def close(self) -> bytes:
        """The rest of the file."""
        if self._rows:
            self._flush()
        self._writer.close()
        return self._sink.taken()

    def _flush(self) -> None:
        import pyarrow as pa

        self._writer.write_table(pa.Table.from_pylist(self._rows, schema=self._schema), row_group_size=GROUP_ROWS)
        self._rows = []


class _Sink(io.RawIOBase):
    """A file that is written from its beginning to its end, and whose bytes are taken away meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self._pieces: list[bytes] = []
        self._size = 0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._size

    def write(self, data: Any, /) -> int:  # noqa: ANN401 - any buffer
        piece = bytes(data)
        self._pieces.append(piece)
        self._size += len(piece)
        return len(piece)

    def taken(self) -> bytes:
        data = b"".join(self._pieces)
        self._pieces = []
        return data


def _columns(row: Mapping[str, Any]) -> dict[str, Any]:
    fault: Mapping[str, Any] = row.get("error") or {}
    enhanced: object = row.get("enhanced")
    rest = {name: value for name, value in row.items() if name not in _OWN}
    return {
        "custom_id": row["custom_id"],
        "uri": row.get("uri"),
        "caption": caption_of(row),
        "original_caption": row.get("original_caption"),
        "enhanced": enhanced if isinstance(enhanced, bool) else None,
        "error_step": fault.get("step"),
        "error_code": fault.get("code"),
        "error_status": fault.get("http_status"),
        "error_message": fault.get("message"),
        "result": orjson.dumps(rest).decode() if rest else None,
    }
