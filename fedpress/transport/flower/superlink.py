"""Starts the SuperLink (Flower's server process), and starts it again after it has died."""

from __future__ import annotations

import os
import socket
import ssl
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx

from fedpress.core.log import logger
from fedpress.errors import NetworkError
from fedpress.transport.flower.address import Address, transport_problem
from fedpress.transport.flower.pinned import QUIET

log = logger(__name__)

START = 60.0
"""Seconds that a SuperLink may take to start."""
STARTS = 3
"""How often it is started before a kill during the start counts as an error."""
LET_GO = 10.0
"""Seconds that the SuperLink of a server that was killed may take to end, and to free the port."""


class SuperLink:
    """A SuperLink in its own process, which ends when this process ends.

    The SuperLink's database is in memory, and is lost with the process. A run can do without it,
    because its checkpoints are in the run folder. `ServerLink` starts a SuperLink again that was
    killed.
    """

    def __init__(
        self,
        address: Address,
        folder: Path,
        *,
        bind: str | None = None,
        certificate: Path | None = None,
        key: Path | None = None,
    ) -> None:
        """Starts the SuperLink.

        Args:
            address: where this process reaches the SuperLink. If it has a `ca`, the SuperLink uses
                TLS and accepts only clients with registered keys.
            folder: folder for the SuperLink's log, and for the secret that this process shares with
                the SuperLink.
            bind: host name or IP address on which the SuperLink listens; None: the host of
                `address`.
            certificate: file with the server's certificate, in PEM; used only with TLS.
            key: file with the private key of the certificate.

        Raises:
            NetworkError: if it does not start, for instance because the port is in use.
        """
        self.address = address
        self.folder = folder
        self._bind = bind or address.host
        self._certificate = certificate
        self._key = key
        folder.mkdir(parents=True, exist_ok=True)
        # Flower logs each answer with the number of its client, and with privacy of whole clients
        # nobody else may know who took part in a round.
        folder.chmod(0o700)
        self.secret_file = folder / "superlink.secret"
        self._began_before = self.secret_file.exists()
        if not self._began_before:
            self.secret_file.touch(mode=0o600)
            self.secret_file.write_bytes(os.urandom(32))
        self._process = self._start()

    @property
    def secret(self) -> bytes:
        """The secret by which the SuperLink knows that a request comes from this server."""
        return self.secret_file.read_bytes()

    @property
    def running(self) -> bool:
        """Whether the SuperLink's process still runs."""
        return self._process.poll() is None

    def restart(self) -> None:
        """Ends the process if it still runs, and starts a new one."""
        self.close()
        self._process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        """Starts the process; starts it again if somebody kills it before it is up."""
        # If the port is in use, Flower fails late, and says so only in its log.
        _check_free(self._bind, self.address.port, LET_GO if self._began_before else 0.0)
        self._began_before = True
        for left in reversed(range(STARTS)):
            process = self._launch()
            try:
                self._wait_until_up(process)
                return process
            except BaseException as error:
                status = process.poll()
                process.kill()
                process.wait()
                # A negative status is the number of a signal. Whoever sent it, for instance a
                # system that is short of memory, may not send it again; a fault of the SuperLink's
                # own would come again.
                killed = status is not None and status < 0
                if not left or not killed or not isinstance(error, NetworkError):
                    raise
                log.warning("the SuperLink was killed while it started, and is started again")
        raise AssertionError("the last start returns or raises")

    def _launch(self) -> subprocess.Popen[bytes]:
        words = [sys.executable, "-m", "fedpress.transport.flower.guard", str(os.getpid())]
        words += ["--host", self._bind, "--port", str(self.address.port)]
        words += ["--isolation", "process", "--superexec-auth-secret-file", str(self.secret_file)]
        words += ["--disable-runtime-dependency-installation"]
        if self.address.ca is None:
            words += ["--insecure"]
        else:
            words += ["--ssl-ca-certfile", str(self.address.ca)]
            words += ["--ssl-certfile", str(self._certificate), "--ssl-keyfile", str(self._key)]
            words += ["--enable-supernode-auth"]
        home = self.folder / "flower"
        with (self.folder / "superlink.log").open("ab") as out:
            return subprocess.Popen(
                words,
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **QUIET, "FLWR_HOME": str(home)},
                # Ctrl-C in the terminal must reach only this process. It then ends the SuperLink.
                process_group=0,
            )

    def _wait_until_up(self, process: subprocess.Popen[bytes]) -> None:
        end = time.monotonic() + START
        verify: Any = True if self.address.ca is None else _context(self.address.ca)
        with httpx.Client(verify=verify, timeout=5.0, trust_env=False) as client:
            while time.monotonic() < end:
                if process.poll() is not None:
                    break
                try:
                    client.get(f"{self.address.url}/health")
                    return
                except httpx.TransportError as error:
                    if "certificate" in str(error).lower():
                        raise transport_problem(error, self.address) from error
                    time.sleep(0.05)
        raise NetworkError(
            f"the SuperLink did not start ({_last_line(self.folder / 'superlink.log')})",
            place=self.address.text,
            cure=f"see {self.folder / 'superlink.log'}",
        )

    def close(self) -> None:
        """Ends the process."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._process.wait()


def _context(ca: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=ca.read_text("ascii"))
    return context


def _check_free(host: str, port: int, patience: float) -> None:
    """Checks that the port is free, or becomes free within `patience` seconds."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    end = time.monotonic() + patience
    while True:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
                return
            except OSError as error:
                if time.monotonic() >= end:
                    raise NetworkError(
                        f"the SuperLink cannot listen there ({error.strerror})",
                        place=f"{host}:{port}",
                        cure="end the process that uses the port, or give another one",
                    ) from error
        time.sleep(0.1)


def _last_line(path: Path) -> str:
    lines = [line for line in path.read_text("utf-8", "replace").splitlines() if line.strip()]
    return lines[-1].strip()[:200] if lines else "it said nothing"
