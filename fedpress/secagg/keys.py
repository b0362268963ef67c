"""Cryptography of a secure sum: all keys of a client are derived from its 32-byte secret."""

from __future__ import annotations

import hmac
from collections.abc import Iterable
from functools import lru_cache
from hashlib import blake2b
from typing import TypeAlias

import numpy as np
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

Item: TypeAlias = str | int | bytes
SIGNATURE = 64
"""Size in bytes of an Ed25519 signature."""

NONCE = 12
"""Size in bytes of a ChaCha20-Poly1305 nonce."""

TAG = 16
"""Size in bytes of the authentication tag of ChaCha20-Poly1305."""


def derive(key: bytes, *items: Item, size: int = 32) -> bytes:
    """Derives `size` bytes from `key`, for the purpose that `items` names (HKDF with SHA-256).

    Example: `derive(key, "mask")` and `derive(key, "nonce")` are independent of each other. A text
    and its bytes are different items.

    Raises:
        ValueError: if `size` is above 8160, the most that HKDF gives.

    >>> derive(bytes(32), "a") == derive(bytes(32), "a")
    True
    >>> derive(bytes(32), "a") == derive(bytes(32), b"a")
    False
    """
    # HKDF (RFC 5869) with Python's own HMAC, which is ten times faster than a new object of
    # `cryptography` for each key: a client derives dozens of keys in every round.
    if size > 255 * 32:
        raise ValueError(f"HKDF gives at most 8160 bytes, not {size}")
    extracted = hmac.digest(bytes(32), key, "sha256")
    info = statement(items)
    block, blocks = b"", b""
    for number in range(1, -(-size // 32) + 1):
        block = hmac.digest(extracted, block + info + bytes([number]), "sha256")
        blocks += block
    return blocks[:size]


def digest(*items: Item) -> bytes:
    """Returns the 32-byte digest (BLAKE2b) of a list of items."""
    return digest_all(items)


def digest_all(items: Iterable[Item | np.ndarray]) -> bytes:
    """Returns the digest of items, like `digest`; arrays must be contiguous, and are not copied."""
    hasher = blake2b(digest_size=32)
    for item in items:
        # Type and length precede each item, so that ("ab", "c") and ("a", "bc") differ.
        if isinstance(item, np.ndarray):
            hasher.update(f"{item.dtype.str} {item.shape};".encode())
            hasher.update(item.data)
        else:
            data = item if isinstance(item, bytes) else repr(item).encode()
            hasher.update(f"{type(item).__name__} {len(data)};".encode() + data)
    return hasher.digest()


def identity(secret: bytes) -> bytes:
    """Returns the public Ed25519 key [32] by which a client's signatures are verified.

    The other clients must know this key before the run. They must not get it from an untrusted
    server, which could send its own key instead.

    Args:
        secret: the client's 32 secret bytes.
    """
    return _signer(secret).public_key().public_bytes_raw()


def sign(secret: bytes, *items: Item) -> bytes:
    """Returns the signature [64] of `items` by the client with this `secret`."""
    return _signer(secret).sign(statement(items))


def verify(public: bytes, signature: bytes, *items: Item) -> bool:
    """Returns whether the owner of the public key `public` has signed `items`.

    Returns False, too, if `public` is not a key or `signature` is not a signature.
    """
    return _verified(public, signature, statement(items))


# In a simulation every client verifies the signatures of all others, so that each of them is
# verified as often as there are clients. The answer follows from the arguments alone, so it may be
# remembered; all of them are public. A round of a hundred clients has some hundred signatures.
@lru_cache(maxsize=2048)
def _verified(public: bytes, signature: bytes, statement: bytes) -> bool:
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, statement)
    # ValueError: `public` is not a key.
    except (InvalidSignature, ValueError):
        return False
    return True


class KeyPair:
    """The X25519 key pair of a client, which is different in every run.

    Args:
        secret: the client's 32 secret bytes.
        run: name of the run.
    """

    def __init__(self, secret: bytes, run: str) -> None:
        self._private = X25519PrivateKey.from_private_bytes(derive(secret, "agreement", run))
        self.public = self._private.public_key().public_bytes_raw()

    def shared_secret(self, public: bytes) -> bytes | None:
        """Returns 32 bytes that only this client and the owner of the key `public` can compute.

        Returns None if `public` is a point of low order: then anybody could compute the bytes.
        """
        try:
            shared = self._private.exchange(X25519PublicKey.from_public_bytes(public))
        except ValueError:
            return None
        # Sorted, so that both clients derive the same secret.
        return derive(shared, "pair", *sorted((self.public, public)))


def can_agree(public: bytes) -> bool:
    """Returns whether two parties can agree on a secret with the X25519 key `public`.

    They cannot if `public` is a point of low order. Such a point gives zero with every private key,
    because X25519 private keys are multiples of 8 (RFC 7748, section 6.1). So one trial with any
    private key is enough.

    >>> can_agree(bytes(32)), can_agree(KeyPair(bytes(32), "run").public)
    (False, True)
    """
    try:
        X25519PrivateKey.from_private_bytes(bytes(32)).exchange(
            X25519PublicKey.from_public_bytes(public)
        )
    except ValueError:
        return False
    return True


def seal(key: bytes, nonce: bytes, data: bytes, about: bytes) -> bytes:
    """Encrypts and authenticates `data`; the result is `TAG` bytes longer.

    Args:
        key: 32 bytes.
        nonce: 12 bytes. Never use a nonce twice with the same key for different data.
        data: the plaintext.
        about: associated data: authenticated but not encrypted. `unseal` needs the same bytes.
    """
    return ChaCha20Poly1305(key).encrypt(nonce, data, about)


def unseal(key: bytes, nonce: bytes, data: bytes, about: bytes) -> bytes | None:
    """Decrypts the result of `seal`; None if data, key, nonce or `about` differ."""
    try:
        return ChaCha20Poly1305(key).decrypt(nonce, data, about)
    except InvalidTag:
        return None


def _signer(secret: bytes) -> Ed25519PrivateKey:
    # The label "identity" gives a separate key: a signing key must not serve for key agreement too.
    return Ed25519PrivateKey.from_private_bytes(derive(secret, "identity"))


def statement(items: tuple[Item, ...]) -> bytes:
    """Returns the bytes that are signed for these items."""
    # `repr` distinguishes a text from its bytes, and quotes separate the items. The first item
    # makes signatures of other protocols invalid here.
    return repr(("fedpress secure 1", *items)).encode()
