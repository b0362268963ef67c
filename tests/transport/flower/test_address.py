"""What failures of the network mean, and whether a client waits or gives up."""

import socket
import threading

import pytest

pytest.importorskip("flwr")

import httpx

from fedpress.errors import NetworkError
from fedpress.network import keys
from fedpress.transport.flower import Address, NodeLink
from fedpress.transport.flower.address import transport_problem

VERIFY = "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: "
WAITS = {
    "[Errno 111] Connection refused": "cannot be reached",
    "[SSL: UNEXPECTED_EOF_WHILE_READING] EOF occurred in violation of protocol": "no secure",
    "[SSL: WRONG_VERSION_NUMBER] wrong version number": "no secure",
    "timed out": "cannot be reached",
}
GIVES_UP = {
    f"{VERIFY}self-signed certificate in certificate chain": "is not signed by",
    f"{VERIFY}certificate has expired": "has expired",
    f"{VERIFY}Hostname mismatch, certificate is not valid for 'a'.": "for another host",
    f"{VERIFY}IP address mismatch, certificate is not valid for '10.0.0.1'.": "for another host",
}


@pytest.mark.parametrize("said", [*WAITS, *GIVES_UP])
def test_a_client_gives_up_only_where_waiting_makes_no_sense(said, tmp_path):
    problem = transport_problem(httpx.ConnectError(said), Address("a", 1, tmp_path / "ca.crt"))
    assert {**WAITS, **GIVES_UP}[said] in str(problem)
    assert problem.refused is (said in GIVES_UP)
    assert problem.place == "a:1"
    assert problem.cure


def test_a_port_that_breaks_off_the_handshake_is_tried_again(tmp_path):
    keys.Authority.new().write(tmp_path / "ca.key", tmp_path / "ca.crt")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        def hang_up():
            server.accept()[0].close()

        threading.Thread(target=hang_up, daemon=True).start()
        wire = NodeLink(Address("127.0.0.1", port, tmp_path / "ca.crt"))
        with pytest.raises(NetworkError) as raised:
            wire.connect()
    assert not raised.value.refused
