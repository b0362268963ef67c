"""The command `fedpress watch`: serves a web page that shows a run while it goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def watch(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port on 127.0.0.1; any free one by default.")
    ] = 0,
    once: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the page to this file once, and end.")
    ] = None,
) -> None:
    """Shows a run in the browser while it goes on; on this machine alone, until Ctrl-C."""
    # Imported here, so that `fedpress --help` does not wait for it.
    from fedpress.reports import watching

    if once is not None:
        typer.echo(watching.write_live(folder, once))
        return
    with watching.serve(folder, port) as server:
        typer.echo(f"http://{watching.LOOPBACK}:{server.server_port}/  (Ctrl-C stops it)")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            # The usual end of this command, so no error. The run itself goes on.
            typer.echo("")
