"""A file that only grows, and that survives a full disk."""

from pathlib import Path


class AppendFile:
    """An append-only file. Bytes that the disk does not take are kept and written with the next write."""

    def __init__(self, path: Path) -> None:
        """Open or create the file."""
        self._file = path.open("ab", buffering=0)
        self._pending = bytearray()
        self.write_error: OSError | None = None

    def write(self, data: bytes) -> None:
        """Append; an error is in `write_error` afterwards."""
        self._pending += data
        try:
            while self._pending:
                del self._pending[: self._file.write(self._pending)]
            self.write_error = None
        except OSError as error:
            self.write_error = error

    def close(self) -> None:
        """Write what is pending, and close the file."""
        self.write(b"")
        self._file.close()
