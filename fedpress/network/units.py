"""Texts of the files that start server and clients at boot: systemd units and Dockerfiles."""

from __future__ import annotations

# The process reads bytes from strangers, so a bug in it must not give away the machine: it runs as
# a user without rights, and can write only to its home folder.
UNIT = """\
[Unit]
Description={description}
After=network-online.target
Wants=network-online.target

[Service]
Type=exec
User=fedpress
WorkingDirectory={folder}
ExecStart={command}
Restart=on-failure
RestartSec=5
# What a stopped command returns.
SuccessExitStatus=130
NoNewPrivileges=yes
CapabilityBoundingSet=
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX
RestrictNamespaces=yes
RestrictSUIDSGID=yes
LockPersonality=yes
ProtectKernelTunables=yes
ProtectKernelModules=yes
ProtectControlGroups=yes
PrivateTmp=yes
ProtectSystem=strict
ProtectHome=yes
# Beside the folder: a client's ledger, which must outlive a network, and the key of run folders.
ReadWritePaths={home}
Environment=XDG_DATA_HOME={home}/share XDG_STATE_HOME={home}/state
UMask=0077

[Install]
WantedBy=multi-user.target
"""
"""Text of a systemd unit, with gaps for `_unit` to fill."""
# Torch comes from PyTorch's CPU index: the default Linux wheels include gigabytes of CUDA.
DOCKERFILE = """\
FROM python:3.11-slim
RUN pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu \\
    "fedpress[network]" \\
    && useradd --create-home --uid 10001 fedpress
USER fedpress
WORKDIR /network
# The ledger outlives the container, too.
ENV XDG_DATA_HOME=/network/share XDG_STATE_HOME=/network/state
{expose}# Keys and state stay outside of the image: mount the network folder of server or client.
VOLUME ["/network"{more}]
ENTRYPOINT {entry}
CMD {command}
"""
"""Text of a Dockerfile, with gaps for `server_dockerfile` and `client_dockerfile` to fill."""
HOME = "/var/lib/fedpress"
"""Home of the user that the units run as."""


def server_unit() -> str:
    """Returns the systemd unit of a server. The server runs `recipe.toml` in its own folder."""
    command = "/opt/fedpress/bin/fedpress server recipe.toml --network . --out run"
    return _unit("fedpress server", "server", command)


def client_unit(name: str) -> str:
    """Returns the systemd unit of a client. The client's data are in `data` in its own folder."""
    command = "/opt/fedpress/bin/fedpress client --network . --data data"
    return _unit(f"fedpress client {name}", name, command)


def _unit(description: str, name: str, command: str) -> str:
    # Absolute paths: systemd searches no PATH of a user, and starts in the root folder.
    folder = f"{HOME}/{name}"
    return UNIT.format(description=description, home=HOME, folder=folder, command=command)


def server_dockerfile(port: int) -> str:
    """Returns the Dockerfile of a server that listens on `port`."""
    # ENTRYPOINT is fixed; CMD can be replaced by the arguments of `docker run`.
    entry = '["fedpress", "server", "--network", "."]'
    command = '["recipe.toml", "--out", "run"]'
    return DOCKERFILE.format(expose=f"EXPOSE {port}\n", more="", entry=entry, command=command)


def client_dockerfile() -> str:
    """Returns the Dockerfile of a client. The data are mounted read-only at /data."""
    # No EXPOSE: a client connects to the server, so it needs no open port.
    entry = '["fedpress", "client", "--network", "."]'
    command = '["--data", "/data"]'
    return DOCKERFILE.format(expose="", more=', "/data"', entry=entry, command=command)
