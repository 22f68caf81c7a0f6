"""Where the bytes of a lane stand on disk: reading and wiping, nothing about who may.

Owns the index from lane offsets to pad files and the batches in which used bytes are wiped
(protocol 1.2). Whether a byte may be read is decided by ``mesh.core.lane`` before.
"""

from __future__ import annotations

from bisect import bisect_right

from mesh.errors import ErrorReason, IntegrityError
from mesh.store.pads import PadFiles
from mesh.store.tables import ExtentRow


class Material:
    """The extents of one lane, in order.

    Args:
        pads: the pad files.
    """

    def __init__(self, pads: PadFiles) -> None:
        self._pads = pads
        self._starts: list[int] = []
        self._extents: list[ExtentRow] = []
        self.wiped_to = 0

    def add(self, extent: ExtentRow) -> None:
        """A pad file holds these offsets."""
        at = bisect_right(self._starts, extent.start)
        self._starts.insert(at, extent.start)
        self._extents.insert(at, extent)

    def drop(self, start: int) -> None:
        """Forget the extent that begins at ``start``, if there is one."""
        if start in self._starts:
            at = self._starts.index(start)
            del self._starts[at], self._extents[at]

    def read(self, start: int, stop: int) -> bytes:
        """The bytes of ``[start, stop)``.

        Raises:
            IntegrityError: not (all) here.
        """
        at = bisect_right(self._starts, start) - 1
        if at >= 0 and stop <= self._extents[at].stop:
            extent = self._extents[at]
            return self._pads.read(extent.file, extent.file_offset + start - extent.start, stop - start)
        parts: list[bytes] = []
        while start < stop and 0 <= at < len(self._extents):
            extent = self._extents[at]
            upto = min(stop, extent.stop)
            if not extent.start <= start < upto:
                break
            parts.append(
                self._pads.read(extent.file, extent.file_offset + start - extent.start, upto - start)
            )
            start, at = upto, at + 1
        if start < stop:
            raise IntegrityError(
                "lane bytes are not on disk", reason=ErrorReason.STATE_CORRUPT, facts={"offset": start}
            )
        return b"".join(parts)

    def spend(self, below: int) -> tuple[list[tuple[str, int, int]], bool]:
        """Let go of everything below an offset.

        Returns:
            (file, offset, length) to overwrite in files that stay, and whether whole extents
            ended: their rows and files may go.
        """
        count = 0
        while count < len(self._extents) and self._extents[count].stop <= below:
            count += 1
        del self._starts[:count], self._extents[:count]
        parts: list[tuple[str, int, int]] = []
        if self._extents and self._extents[0].start < below:
            first = self._extents[0]
            start = max(first.start, self.wiped_to)
            if start < below:
                parts.append((first.file, first.file_offset + start - first.start, below - start))
        self.wiped_to = max(self.wiped_to, below)
        return parts, count > 0
