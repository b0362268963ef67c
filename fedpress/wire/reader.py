"""Reads untrusted bytes with checks, and writes whole numbers in the varint format."""

from __future__ import annotations

from typing import NoReturn

from fedpress.errors import WireError


def fail(place: str, problem: str, cure: str = "send it again") -> NoReturn:
    """Raises a WireError about a field of a message.

    Args:
        place: name of the field, such as "crc32"; the error shows it as `message.crc32`.
        problem: what is wrong.
        cure: what the user can do.
    """
    raise WireError(problem, place=f"message.{place}", cure=cure)


def varint(value: int) -> bytes:
    """Returns a whole number >= 0 in groups of seven bits, the low group first (LEB128).

    The high bit of each byte is 1 if another byte follows.

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

    So numbers near 0 take one byte, whatever their sign.

    >>> zigzag(-2).hex()
    '03'
    """
    return varint(2 * value if value >= 0 else -2 * value - 1)


class ByteReader:
    """Reads untrusted `data` from front to back.

    The methods' argument `field` is the field's name in errors. Every method raises WireError if
    the bytes end too early or a value is out of range.
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
        # Checked before memory is allocated, because the sender can announce any size.
        if end > len(self._data):
            fail(field, f"{size} bytes were announced but {self.left} are left")
        self._at = end
        return self._data[begin:end]

    def byte(self, field: str) -> int:
        """Reads one byte."""
        return self.take(1, field)[0]

    def varint(self, field: str, most: int) -> int:
        """Reads a `varint` of at most `most`; `most` is below 2**64."""
        value = 0
        # Ten groups of seven bits are enough for 64 bits. Without a limit, an attacker could send a
        # number of any length.
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
        """Reads a length as `varint`, and returns a reader of so many next bytes."""
        return ByteReader(self.take(self.varint(field, self.left), field))
