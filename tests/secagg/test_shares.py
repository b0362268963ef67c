import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpress.secagg.shares import (
    POLYNOMIAL,
    interpolate,
    multiply,
    recover_secrets,
    share_secrets,
)


def slow_times(a, b):
    """Multiplies two polynomials over GF(2), bit by bit, modulo the field's polynomial."""
    product = 0
    for bit in range(16):
        if b >> bit & 1:
            product ^= a << bit
    for bit in range(31, 15, -1):
        if product >> bit & 1:
            product ^= POLYNOMIAL << (bit - 16)
    return product


def slow_inverse(a):
    result, power = 1, a
    for _ in range(15):  # a^(2^16 - 2)
        power = slow_times(power, power)
        result = slow_times(result, power)
    return result


def slow_join(shares, points):
    """Lagrange's formula for one two-byte secret, with the slow field."""
    total = 0
    for share, point in zip(shares, points, strict=True):
        weight = 1
        for other in points:
            if other != point:
                weight = slow_times(weight, slow_times(other, slow_inverse(other ^ point)))
        total ^= slow_times(share, weight)
    return total


@given(st.lists(st.tuples(st.integers(0, 65535), st.integers(0, 65535)), min_size=1, max_size=20))
def test_products_are_those_of_the_slow_field(pairs):
    a, b = np.array(pairs, np.uint16).T
    assert multiply(a, b).tolist() == [slow_times(x, y) for x, y in pairs]


@given(a=st.integers(1, 65535))
@settings(max_examples=20)
def test_the_slow_field_is_a_field(a):
    assert slow_times(a, slow_inverse(a)) == 1


@given(
    secrets=st.lists(st.binary(min_size=4, max_size=4), min_size=1, max_size=4),
    holders=st.integers(2, 12),
    data=st.data(),
)
@settings(max_examples=40, deadline=None)
def test_any_threshold_shares_give_the_secrets_back(secrets, holders, data):
    threshold = data.draw(st.integers(1, holders))
    rows = np.frombuffer(b"".join(secrets), np.uint8).reshape(-1, 4)
    shares = share_secrets(rows, range(1, holders + 1), threshold, bytes(32))
    assert shares.shape == (holders, len(secrets), 4)
    chosen = data.draw(st.permutations(range(holders)))[:threshold]
    points = [k + 1 for k in chosen]
    assert (interpolate(shares[chosen], points) == rows).all()
    words = np.ascontiguousarray(shares[chosen]).view("<u2")[:, 0, 0].tolist()
    assert slow_join(words, points) == int.from_bytes(secrets[0][:2], "little")


def test_one_share_too_few_is_the_same_noise_whatever_the_secret():
    threshold, draws = 3, 3000
    zeros, ones = (np.full((draws, 2), fill, np.uint8) for fill in (0, 255))
    for secret in (zeros, ones):
        shares = (
            share_secrets(secret, range(1, 5), threshold, b"k" * 32)
            .view("<u2")[:, :, 0]
            .astype(float)
        )
        for pair in itertools.combinations(range(4), threshold - 1):
            first, second = shares[list(pair)] / 65535
            # two independent uniform numbers: mean 1/2, no correlation, over 3000 draws
            assert abs(first.mean() - 0.5) < 0.03
            assert abs(second.mean() - 0.5) < 0.03
            assert abs(np.corrcoef(first, second)[0, 1]) < 0.08


def test_one_share_too_few_leaves_every_secret_possible():
    shares = share_secrets(np.array([[7, 0]], np.uint8), [1, 2, 3], 3, bytes(32))[:2]
    words = np.ascontiguousarray(shares).view("<u2")[:, 0, 0].tolist()
    found = {slow_join([*words, third], [1, 2, 3]) for third in range(500)}
    assert len(found) == 500  # another third share, another secret


@pytest.mark.parametrize("liars", [0, 1, 2, 3])
def test_wrong_shares_are_found_by_the_secret_and_left_out(liars):
    rng = np.random.default_rng(0)
    secrets = rng.integers(0, 256, (5, 16), np.uint8)
    shares = share_secrets(secrets, range(1, 11), 6, bytes(32))
    shares[:liars] ^= 1
    found, lost = recover_secrets(
        shares, range(1, 11), 6, lambda n, data: data == secrets[n].tobytes()
    )
    assert lost == []
    assert (found == secrets).all()


def test_different_liars_about_different_secrets_are_found():
    secrets = np.arange(64, dtype=np.uint8).reshape(4, 16)
    shares = share_secrets(secrets, range(1, 11), 6, bytes(32))
    for number in range(4):
        shares[number, number] ^= 9
    found, lost = recover_secrets(
        shares, range(1, 11), 6, lambda n, data: data == secrets[n].tobytes()
    )
    assert lost == []
    assert (found == secrets).all()


def test_a_secret_with_too_many_wrong_shares_is_lost_and_the_others_are_not():
    secrets = np.arange(64, dtype=np.uint8).reshape(4, 16)
    shares = share_secrets(secrets, range(1, 11), 6, bytes(32))
    shares[:5, 2] ^= np.random.default_rng(0).integers(1, 256, (5, 16), np.uint8)
    found, lost = recover_secrets(
        shares, range(1, 11), 6, lambda n, data: data == secrets[n].tobytes()
    )
    assert lost == [2]
    assert (np.delete(found, 2, 0) == np.delete(secrets, 2, 0)).all()
