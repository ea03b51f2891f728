"""API keys: several, from a setting or a file that is read again when it changes, compared in constant time."""

import hashlib
import hmac
import logging
from pathlib import Path

from sightline.settings import ServerSettings

log = logging.getLogger("sightline.server")


class Keys:
    """The accepted keys of one process. Raises OSError at start when the file cannot be read."""

    def __init__(self, settings: ServerSettings) -> None:
        self.is_off = settings.auth == "off"
        self._fixed = (
            [key.strip() for key in settings.api_keys.get_secret_value().split(",") if key.strip()]
            if settings.api_keys
            else []
        )
        self._file = settings.api_key_file
        self._stamp: tuple[int, int] | None = None
        self._from_file: list[str] = []
        if self._file is not None and not self.is_off:
            self._reload(self._file)
        if not self.is_off and not (self._fixed or self._from_file):
            raise ValueError("no API key configured: the key file is empty")

    def principal(self, presented: str | None) -> str | None:
        """A short digest that stands for the key, the empty string when authentication is off, None when wrong."""
        if self.is_off:
            return ""
        if self._file is not None:
            try:
                self._reload(self._file)
            except (OSError, ValueError):  # gone, or no text
                log.warning("cannot read the API key file; the last known keys stay valid")
        if presented is None:
            return None
        given = presented.encode()
        matches = [hmac.compare_digest(given, key.encode()) for key in (*self._fixed, *self._from_file)]
        return hashlib.sha256(given).hexdigest()[:16] if any(matches) else None

    def _reload(self, file: Path) -> None:
        stat = file.stat()
        stamp = (stat.st_mtime_ns, stat.st_size)
        if stamp != self._stamp:
            self._from_file = [line.strip() for line in file.read_text().splitlines() if line.strip()]
            self._stamp = stamp
