"""Signed requests follow the server's clock, wherever it jumps."""

from base64 import b64decode
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

pytest.importorskip("flwr")

import httpx
from flwr.common.constant import TIMESTAMP_HEADER, TIMESTAMP_TOLERANCE
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.primitives.asymmetric import (
    bytes_to_public_key,
    generate_key_pairs,
    verify_signature,
)
from flwr.supercore.protobuf.client import ProtobufRequestContext

from fedpress.transport.flower import signed as module
from fedpress.transport.flower.signed import SignedRequests


class Server:
    """Accepts signed requests by a clock of its own, as the SuperLink does."""

    def __init__(self, ahead=0.0, *, tells=True, knows=True):
        self.ahead = timedelta(seconds=ahead)
        self.tells = tells
        self.knows = knows
        self.asked = 0
        # How far the date of the answers is ahead, if that is another clock.
        self.dated = None

    def __call__(self, context):
        self.asked += 1
        headers = context.request.headers
        signed = headers[TIMESTAMP_HEADER]
        key = bytes_to_public_key(b64decode(headers[FLEET_HTTP_PUBLIC_KEY_HEADER]))
        now = datetime.now(UTC) + self.ahead
        age = (now - datetime.fromisoformat(signed)).total_seconds()
        valid = verify_signature(
            key, signed.encode("ascii"), b64decode(headers[FLEET_HTTP_SIGNATURE_HEADER])
        )
        accepted = self.knows and valid and -5 < age < TIMESTAMP_TOLERANCE + 5
        said = now if self.dated is None else datetime.now(UTC) + self.dated
        date = {"date": format_datetime(said, usegmt=True)} if self.tells else {}
        return httpx.Response(200 if accepted else 401, headers=date)


@pytest.fixture
def signed():
    return SignedRequests(generate_key_pairs()[0])


def status(signed, server):
    request = httpx.Request("POST", "https://server/v1/fleet/pull-messages", content=b"body")
    return signed.intercept(ProtobufRequestContext("m", None, request), server).status_code


def test_a_server_with_the_same_clock_is_asked_once(signed):
    server = Server()
    assert status(signed, server) == 200
    assert server.asked == 1
    assert signed.ahead == timedelta()


@pytest.mark.parametrize("ahead", [3600.0, -3600.0, 90_000.0])
def test_a_jump_of_the_servers_clock_is_followed_there_and_back(signed, ahead):
    server = Server()
    assert status(signed, server) == 200
    for jump in (ahead, 0.0):
        server.ahead = timedelta(seconds=jump)
        server.asked = 0
        assert status(signed, server) == 200
        assert server.asked == 2
        # From now on the first request of each kind is right.
        assert status(signed, server) == 200
        assert server.asked == 3


@pytest.mark.parametrize("ahead", [3600.0, -3600.0])
def test_a_jump_is_followed_where_answers_bear_the_old_date_for_a_second(
    signed, ahead, monkeypatch
):
    server = Server()
    assert status(signed, server) == 200
    server.ahead, server.dated = timedelta(seconds=ahead), server.ahead
    slept = []

    def sleep(seconds):
        slept.append(seconds)
        server.dated = None

    monkeypatch.setattr(module.time, "sleep", sleep)
    assert status(signed, server) == 200
    assert slept == [module.LATE]
    assert abs(signed.ahead - server.ahead) < module.SAME


def test_a_clock_that_another_thread_has_just_set_is_used(signed, monkeypatch):
    server = Server()
    assert status(signed, server) == 200
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    server.ahead = timedelta(hours=1)

    def overtaken(context):
        answer = server(context)
        signed.ahead = server.ahead
        return answer

    assert status(signed, overtaken) == 200
    assert server.asked == 3


def test_a_key_that_is_removed_is_refused_soon(signed, monkeypatch):
    server = Server()
    assert status(signed, server) == 200
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    server.knows = False
    assert status(signed, server) == 401
    assert server.asked == 3


def test_an_unknown_key_is_refused_after_one_request(signed):
    server = Server(knows=False)
    assert status(signed, server) == 401
    assert server.asked == 1


def test_an_unknown_key_is_not_asked_for_ever_while_clocks_differ(signed):
    server = Server(3600.0, knows=False)
    assert status(signed, server) == 401
    assert status(signed, server) == 401
    assert server.asked == 3


def test_a_server_that_tells_no_date_is_not_followed(signed):
    assert status(signed, Server(3600.0, tells=False)) == 401
    assert signed.ahead == timedelta()
    assert status(signed, Server()) == 200
