"""Checked reading of bytes from a sender that is not trusted, and writing of whole numbers."""

from __future__ import annotations

from typing import NoReturn

from fedpress.errors import WireError


def fail(place: str, problem: str, cure: str = "send it again") -> NoReturn:
    """Raises a WireError about the field `place` of a message."""
    raise WireError(problem, place=f"message.{place}", cure=cure)


def varint(value: int) -> bytes:
    """Returns a whole number >= 0 in groups of seven bits, the low group first.

    The high bit of a byte says that another one follows.

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

    So small negative numbers take one byte, too.

    >>> zigzag(-2).hex()
    '03'
    """
    return varint(2 * value if value >= 0 else -2 * value - 1)


class ByteReader:
    """Reads `data` from front to back.

    The argument `field` of its methods is the name of the field in an error. Every method raises
    WireError where the bytes end too early or hold a value out of range.
    """

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self._at = 0

    @property
    def left(self) -> int:
        """Number of bytes that were not read yet."""
        return len(self._data) - self._at

    def take(self, size: int, field: str) -> memoryview:
        """Returns the next `size` bytes, without a copy."""
        begin = self._at
        end = begin + size
        # Checked before anything is made of this size: an announced size may be any number.
        if end > len(self._data):
            fail(field, f"{size} bytes were announced but {self.left} are left")
        self._at = end
        return self._data[begin:end]

    def byte(self, field: str) -> int:
        """Reads one byte."""
        return self.take(1, field)[0]

    def varint(self, field: str, most: int) -> int:
        """Reads a `varint` of at most `most`, a number below 2**64."""
        value = 0
        # Ten groups of seven bits hold 64 bits; without a limit a sender could grow the number.
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
        half = value >> 1
        return half if value % 2 == 0 else -half - 1

    def part(self, field: str) -> ByteReader:
        """Returns a reader of the next part: a `varint` and as many bytes as it says."""
        return ByteReader(self.take(self.varint(field, self.left), field))
