"""Keys are derived as HKDF says, and a remembered signature is still checked in every part."""

import pytest
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedpress.secagg.keys import derive, identity, sign, verify


@pytest.mark.parametrize("size", [0, 1, 16, 31, 32, 33, 64, 100, 255 * 32])
def test_a_derived_key_is_that_of_hkdf(monkeypatch, size):
    monkeypatch.setattr("fedpress.secagg.keys.statement", lambda items: b"".join(items))
    for key in (b"", b"k", bytes(range(32)), bytes(200)):
        for info in (b"", b"mask", bytes(300)):
            if size:
                assert derive(key, info, size=size) == HKDF(SHA256(), size, None, info).derive(key)
            else:
                assert derive(key, info, size=0) == b""


def test_more_bytes_than_hkdf_has_are_refused():
    with pytest.raises(ValueError, match="8160"):
        derive(bytes(32), "mask", size=255 * 32 + 1)


def test_a_signature_is_valid_for_its_key_and_words_alone():
    secret, public = bytes(range(32)), identity(bytes(range(32)))
    signature = sign(secret, "run", 3)
    for _ in range(2):  # the second answers are remembered ones
        assert verify(public, signature, "run", 3)
        assert not verify(public, signature, "run", "3")
        assert not verify(public, signature[:-1] + b"\0", "run", 3)
        assert not verify(identity(bytes(32)), signature, "run", 3)
        assert not verify(b"no key", signature, "run", 3)
