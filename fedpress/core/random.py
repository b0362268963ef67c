"""Randomness as keys: a seed and some words name one stream, so nothing depends on the order of calls."""

from __future__ import annotations

import re
from hashlib import blake2b, shake_256
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import torch


def derive(seed: int, *words: str | int) -> int:
    """Returns the 63-bit seed of the stream named by `words` under `seed`; numpy's words count by their value.

    >>> derive(1, "round", 2) == derive(1, "round", 2)
    True
    >>> derive(1, "a", "bc") == derive(1, "ab", "c")
    False
    """
    return int.from_bytes(blake2b(_name(seed, words), digest_size=8).digest(), "little") >> 1


def generator(seed: int, *words: str | int) -> torch.Generator:
    """Returns a fresh CPU generator for the stream named by `words` under `seed`."""
    import torch

    return torch.Generator().manual_seed(derive(seed, *words))


def secret_generator(seed: int, *words: str | int) -> torch.Generator:
    """Returns a fresh CPU generator whose whole state comes from `seed` and `words`: for the noise of privacy.

    `manual_seed` keeps only 32 bits, so that a stream could be found by trying them all. Here SHAKE-256 fills the 624
    words of the Mersenne Twister. It is still no cryptographic generator: who sees enough of its raw output, which
    noise on a secret sum does not show, can compute the rest.
    """
    import torch

    fresh = torch.Generator().manual_seed(
        0
    )  # counters of a generator that must make its first block
    state = fresh.get_state()
    words_32 = torch.frombuffer(
        bytearray(shake_256(_name(seed, words)).digest(4 * 624)), dtype=torch.int32
    )
    state.view(torch.int64)[3:627] = words_32.long() & 0xFFFFFFFF
    return fresh.set_state(state)


def secret_key(seed: int, *words: str | int) -> bytes:
    """Returns the 32-byte key of the stream named by `words` under `seed`, for `keystream`.

    It is as secret as `seed` is: with 256 random bits as seed nobody can guess it.

    >>> secret_key(1, "a") == secret_key(1, "a"), len(secret_key(1, "a"))
    (True, 32)
    """
    return shake_256(b"key" + _name(seed, words)).digest(32)


def keystream(key: bytes, size: int, *, start: int = 0) -> np.ndarray:
    """Returns `size` bytes (uint8) of the AES-256-CTR stream of the 32-byte `key`, from byte `start` on.

    `start` must be a multiple of 16, the block of AES. A cryptographic generator: about 2 GB a second with AES-NI.

    >>> keystream(bytes(32), 4).tolist()
    [220, 149, 192, 120]
    """
    import numpy as np
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    if start % 16:
        raise ValueError(f"start: got {start}, expected a multiple of 16")
    out = np.empty(size + 15, np.uint8)  # the cipher wants room for one more block
    encryptor = Cipher(
        algorithms.AES(key), modes.CTR((start // 16).to_bytes(16, "big"))
    ).encryptor()
    chunk = bytes(min(size, 1 << 20))
    for at in range(0, size, 1 << 20):
        part = chunk[: min(len(chunk), size - at)]
        encryptor.update_into(part, memoryview(out)[at:])  # type: ignore[arg-type]
    return out[:size]


def fingerprint(*parts: object) -> str:
    """Returns a 256-bit digest of `parts`: tensors by type, shape and bytes, the rest by `repr` without addresses.

    >>> fingerprint("a", 1) == fingerprint("a", 1), fingerprint("ab") == fingerprint("a", "b")
    (True, False)
    """
    import torch

    digest = blake2b(digest_size=32)
    for part in parts:
        if isinstance(part, torch.Tensor):
            flat = part.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(f"{part.dtype} {tuple(part.shape)};".encode())
            digest.update(flat.numpy().data)
        else:
            text = re.sub(r" at 0x[0-9a-fA-F]+", "", repr(part)).encode()
            digest.update(f"{len(text)};".encode() + text)
    return digest.hexdigest()


def _name(seed: int, words: tuple[str | int, ...]) -> bytes:
    return repr((int(seed), *(str(w) if isinstance(w, str) else int(w) for w in words))).encode()
