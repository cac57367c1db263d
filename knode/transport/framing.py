"""Frames on a stream of bytes: each behind its length, 4 bytes, big-endian. Pure."""

from __future__ import annotations

from knode.transport.link import MAX_FRAME_BYTES

PREFIX_BYTES = 4


def frame_prefix(size: int) -> bytes:
    """Return what stands before a frame of `size` bytes.

    Raises:
        ValueError: a frame has 1 to MAX_FRAME_BYTES bytes.
    """
    if not 0 < size <= MAX_FRAME_BYTES:
        raise ValueError(f"a frame has 1 to {MAX_FRAME_BYTES} bytes, not {size}")
    return size.to_bytes(PREFIX_BYTES)


class FrameReader:
    """Cuts what comes into frames. It holds less than one frame."""

    def __init__(self) -> None:
        self.fault: str | None = None
        """Why what came is no frame. Nothing behind it is looked at."""
        self._held = bytearray()
        self._size = 0
        """Of the frame that is under way; 0 while its prefix is not whole."""

    @property
    def inside_frame(self) -> bool:
        """Whether a part of a frame has come and the rest has not."""
        return bool(self._held or self._size)

    def feed(self, data: bytes) -> list[bytes]:
        """Take the next bytes and return the frames that are whole now."""
        frames: list[bytes] = []
        if self.fault is None:
            self._held += data
            while (frame := self._cut()) is not None:
                frames.append(frame)
        return frames

    def _cut(self) -> bytes | None:
        if not self._size:
            if len(self._held) < PREFIX_BYTES:
                return None
            size = int.from_bytes(self._held[:PREFIX_BYTES])
            if not 0 < size <= MAX_FRAME_BYTES:
                self.fault = f"a length of {size} bytes"
                self._held.clear()
                return None
            del self._held[:PREFIX_BYTES]
            self._size = size
        if len(self._held) < self._size:
            return None
        frame = bytes(self._held[: self._size])
        del self._held[: self._size]
        self._size = 0
        return frame
