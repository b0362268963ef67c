"""Files that start server and clients at boot: systemd units and Dockerfiles."""

from __future__ import annotations

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
NoNewPrivileges=yes
PrivateTmp=yes
ProtectSystem=strict
ProtectHome=yes
ReadWritePaths={folder}
UMask=0077

[Install]
WantedBy=multi-user.target
"""
DOCKERFILE = """\
FROM python:3.11-slim
RUN pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu \\
    "fedpress[network]" \\
    && useradd --create-home --uid 10001 fedpress
USER fedpress
WORKDIR /network
{expose}# Keys and state stay outside of the image: mount the folder of this machine.
VOLUME ["/network"{more}]
ENTRYPOINT {command}
"""


def server_unit() -> str:
    """Returns the systemd unit of a server; its recipe is `recipe.toml` in the same folder."""
    folder = "/var/lib/fedpress/server"
    command = "/opt/fedpress/bin/fedpress server recipe.toml --network . --out run"
    return UNIT.format(description="fedpress server", folder=folder, command=command)


def client_unit(name: str) -> str:
    """Returns the systemd unit of a client, whose data lie in `data` in the same folder."""
    folder = f"/var/lib/fedpress/{name}"
    command = "/opt/fedpress/bin/fedpress client --network . --data data"
    return UNIT.format(description=f"fedpress client {name}", folder=folder, command=command)


def server_dockerfile(port: int) -> str:
    """Returns the Dockerfile of a server."""
    command = '["fedpress", "server", "recipe.toml", "--network", ".", "--out", "run"]'
    return DOCKERFILE.format(expose=f"EXPOSE {port}\n", more="", command=command)


def client_dockerfile() -> str:
    """Returns the Dockerfile of a client, whose data are mounted read-only at /data."""
    command = '["fedpress", "client", "--network", ".", "--data", "/data"]'
    return DOCKERFILE.format(expose="", more=', "/data"', command=command)
