"""A file that is only ever written, and taken away piece by piece."""


class Pieces:
    """Enough of a binary file for zip and Parquet writers; it cannot seek, so they write front to back."""

    closed = False

    def __init__(self) -> None:
        """Nothing is in it yet."""
        self._parts: list[bytes] = []
        self.waiting = 0
        """Bytes that were written and not taken."""
        self._at = 0

    def write(self, data: bytes) -> int:
        """Take the bytes."""
        piece = bytes(data)
        self._parts.append(piece)
        self.waiting += len(piece)
        self._at += len(piece)
        return len(piece)

    def tell(self) -> int:
        """Bytes that were ever written."""
        return self._at

    def flush(self) -> None:
        """Nothing is kept back."""

    def close(self) -> None:
        """The reader takes what is left."""

    def seekable(self) -> bool:
        """Never."""
        return False

    def readable(self) -> bool:
        """Never."""
        return False

    def writable(self) -> bool:
        """Always."""
        return True

    def drain(self) -> bytes:
        """What was written since the last time."""
        data = b"".join(self._parts)
        self._parts.clear()
        self.waiting = 0
        return data
