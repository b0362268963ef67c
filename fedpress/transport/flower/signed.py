"""Signs the requests of a client, dated by the server's clock.

The SuperLink (Flower's server process) refuses requests that were signed more than five minutes
ago, or in the future, by its own clock. If the clock of either machine jumps, Flower's own client
is refused until somebody sets the clock. The one of this file asks the server what time it is.
"""

from __future__ import annotations

import time
from base64 import b64encode
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.common.constant import TIMESTAMP_HEADER
from flwr.supercore.constant import (
    FLEET_HTTP_PUBLIC_KEY_HEADER,
    FLEET_HTTP_SIGNATURE_HEADER,
)
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufRequestContext

from fedpress.core.log import logger

log = logger(__name__)

SAME = timedelta(seconds=3)
"""Two clocks with a smaller difference count as equal: the answer's date has no fractions, and the
SuperLink accepts a date that is 5 s ahead."""
LATE = 1.5
"""Seconds after which answers bear the date of a clock that has jumped: the SuperLink's web server
computes the date once a second."""


class SignedRequests:
    """Adds a client's public key, the date and the signature of the date to each request.

    Attributes:
        ahead: how far the server's clock is ahead of this machine's, as far as it is known.
    """

    def __init__(self, private_key: ec.EllipticCurvePrivateKey) -> None:
        """Prepares the signatures.

        Args:
            private_key: key of this client.
        """
        self.ahead = timedelta()
        self._accepted = False
        self._private_key = private_key
        self._public_key = _text(public_key_to_bytes(private_key.public_key()))

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        """Sends a signed request; sends it again if it was refused because of its date.

        Args:
            context: the request.
            call_next: sends the request, and returns the answer.
        """
        answer = self._send(context, call_next)
        followed = _refused(answer) and self._set_clock(answer)
        if _refused(answer) and not followed and self._accepted:
            # The key is right. Either the date of the answer is old, or another thread has just
            # set the clock.
            time.sleep(LATE)
            answer = self._send(context, call_next)
            followed = _refused(answer) and self._set_clock(answer)
        if followed:
            answer = self._send(context, call_next)
        return answer

    def _send(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        self._sign(context.request)
        answer = call_next(context)
        self._accepted |= not _refused(answer)
        return answer

    def _sign(self, request: httpx.Request) -> None:
        # Flower signs the date alone. TLS keeps everybody but the server from reading it.
        date = (datetime.now(UTC) + self.ahead).isoformat()
        request.headers[FLEET_HTTP_PUBLIC_KEY_HEADER] = self._public_key
        request.headers[TIMESTAMP_HEADER] = date
        signature = sign_message(self._private_key, date.encode("ascii"))
        request.headers[FLEET_HTTP_SIGNATURE_HEADER] = _text(signature)

    def _set_clock(self, answer: httpx.Response) -> bool:
        """Reads the server's clock from an answer; returns whether it says anything new."""
        try:
            date = parsedate_to_datetime(answer.headers.get("date", ""))
            ahead = date - datetime.now(UTC)
        except (ValueError, TypeError):
            # No date, or one without a time zone.
            return False
        if abs(ahead - self.ahead) < SAME:
            return False
        self.ahead = ahead
        seconds = ahead.total_seconds()
        log.warning("the server's clock is %+.0f s from this machine's; it is followed", seconds)
        return True


def _refused(answer: httpx.Response) -> bool:
    return answer.status_code == httpx.codes.UNAUTHORIZED


def _text(data: bytes) -> str:
    return b64encode(data).decode("ascii")
