"""Reads bytes that may come from anybody: every step is checked against what is left, faults name the field."""

from __future__ import annotations

from typing import NoReturn

from fedpress.errors import WireError


def fail(place: str, problem: str, cure: str = "send it again") -> NoReturn:
    """Raises the WireError of the field `place`."""
    raise WireError(problem, place=f"message.{place}", cure=cure)


def varint(value: int) -> bytes:
    """Returns a whole number from 0 on in groups of seven bits, low first; the high bit says that more follow.

    >>> varint(300).hex()
    'ac02'
    """
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def zigzag(value: int) -> bytes:
    """Returns a signed whole number as a `varint`: 0, -1, 1, -2 become 0, 1, 2, 3.

    >>> zigzag(-2).hex()
    '03'
    """
    return varint(2 * value if value >= 0 else -2 * value - 1)


class Reader:
    """A place in `data`; `field` in its methods is the name that an error starts with."""

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self._at = 0

    @property
    def left(self) -> int:
        """Bytes that were not read yet."""
        return len(self._data) - self._at

    def take(self, size: int, field: str) -> memoryview:
        """Returns the next `size` bytes, without a copy."""
        begin, end = self._at, self._at + size
        if end > len(self._data):
            fail(field, f"{size} bytes were announced but {self.left} are left")
        self._at = end
        return self._data[begin:end]

    def byte(self, field: str) -> int:
        """Reads one byte."""
        return self.take(1, field)[0]

    def varint(self, field: str, most: int) -> int:
        """Reads a `varint` of at most `most` (below 2**64)."""
        value = 0
        for shift in range(0, 70, 7):
            byte = self.byte(field)
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                break
        else:
            fail(field, "a whole number of more than ten bytes")
        if value > most:
            fail(field, f"got {value}, expected at most {most}")
        return value

    def zigzag(self, field: str) -> int:
        """Reads a signed whole number of 64 bits."""
        value = self.varint(field, (1 << 64) - 1)
        return value >> 1 if value % 2 == 0 else -(value >> 1) - 1

    def part(self, field: str) -> Reader:
        """Returns a reader of the next part, whose length stands in front of it."""
        return Reader(self.take(self.varint(field, self.left), field))
