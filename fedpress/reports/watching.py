"""Serves a page about a run in progress to browsers on this machine, and keeps it up to date."""

from __future__ import annotations

import os
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from markupsafe import Markup

from fedpress.core.files import replacing, writing
from fedpress.errors import NetworkError, RunError
from fedpress.reports.html import HERE, figures_and_scripts, render, script_hash, templates
from fedpress.reports.live import live
from fedpress.reports.reading import read_run

# Not 0.0.0.0: other machines must not reach the page.
LOOPBACK = "127.0.0.1"
PATIENCE = 10.0
"""Seconds for which the server waits for a browser to send a request or to read the answer."""
REPORT = "report"
"""Path of the run's report on the server."""
# The page shows results of private work: no cache may store it and no other site may embed it.
HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


def _script(name: str) -> str:
    return (HERE / name).read_text("utf-8")


def _policy(scripts: list[str], *, served: bool) -> str:
    """Returns the page's content security policy, which tells the browser what it may load.

    Args:
        scripts: the only scripts that may run.
        served: whether the page may ask this server for new content.
    """
    allowed = " ".join(f"'{script_hash(script)}'" for script in scripts)
    rules = [
        "default-src 'none'",
        "style-src 'unsafe-inline'",
        "img-src data: blob:",
        f"script-src {allowed}",
        "base-uri 'none'",
        "form-action 'none'",
    ]
    if served:
        rules.append("connect-src 'self'")
    return "; ".join(rules)


def page_html(folder: Path, *, served: bool, report: str = "") -> str:
    """Returns the HTML of the whole page.

    Args:
        folder: the run folder.
        served: whether the page asks the server for new content; if not, it never changes.
        report: link to the report of the run; "": no link.
    """
    page = live(folder, report=report)
    scripts = [_script("hover.js"), *([_script("live.js")] if served else [])]
    return (
        templates()
        .get_template("live.html.j2")
        .render(
            page=page,
            live=served,
            policy=_policy(scripts, served=served),
            **(figures_and_scripts(page.figures) | {"scripts": [Markup(one) for one in scripts]}),
        )
    )


def main_html(folder: Path, *, report: str = "") -> str:
    """Returns the HTML of the part of the page that changes while the run goes on."""
    page = live(folder, report=report)
    template = templates().get_template("live_main.html.j2")
    return template.render(page=page, **figures_and_scripts(page.figures))


def write_live(folder: Path, out: Path) -> Path:
    """Writes the page to a file, with the present state of the run; the file never changes itself.

    Raises:
        RunError: if no run has begun in `folder`, or `out` cannot be written.
    """
    check_folder(folder)
    report = folder / "report.html"
    # A relative link still works if the folder is moved.
    link = Path(os.path.relpath(report, out.parent)).as_posix() if report.is_file() else ""
    text = page_html(folder, served=False, report=link)
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        # A lost page can be written again, so there is no need to wait for the disk.
        with replacing(out, durable=False) as part:
            part.write_text(text, "utf-8")
    return out


def check_folder(folder: Path) -> None:
    """Checks that a run has begun in a folder; does not read the files.

    Raises:
        RunError: if no run has begun there.
    """
    names = ("settings.json", "records.jsonl", "result.json")
    if not any((folder / name).exists() for name in names):
        raise RunError(
            "no run has begun in this folder",
            place=folder,
            cure="give the folder that `fedpress run --out` wrote, after the run has begun",
        )


def serve(folder: Path, port: int = 0) -> ThreadingHTTPServer:
    """Starts a web server on 127.0.0.1; the caller must run its `serve_forever`.

    Args:
        folder: the run folder.
        port: number of the port; 0: any free port, which is then in `server_port` of the server.

    Raises:
        RunError: if no run has begun in the folder.
        NetworkError: if the port cannot be opened.
    """
    check_folder(folder)

    class Handler(_Handler):
        run_folder = folder

    try:
        server = _Server((LOOPBACK, port), Handler)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise NetworkError(
            f"cannot be opened ({reason})",
            place=f"port {port}",
            cure="give another port with --port, or leave --port out",
        ) from error
    return server


class _Server(ThreadingHTTPServer):
    """A web server with a thread for each request; the command can end while requests still run."""

    daemon_threads = True


class _Handler(BaseHTTPRequestHandler):
    """Answers requests for three pages: the whole page, its changing part, and the report."""

    run_folder: Path
    timeout = PATIENCE
    server_version = "fedpress"
    sys_version = ""

    def do_GET(self) -> None:
        """Answers one GET request."""
        # The name of another site may resolve to 127.0.0.1 ("DNS rebinding"). A script of that site
        # could then read this page. Requests of such a script have the other site as their `Host`.
        if self.headers.get("Host") not in self._hosts():
            self._send(HTTPStatus.FORBIDDEN, "text/plain", "ask for 127.0.0.1")
            return
        pages = {"/": self._page, "/main": self._main, f"/{REPORT}": self._report}
        make = pages.get(self.path.partition("?")[0])
        if make is None:
            self._send(HTTPStatus.NOT_FOUND, "text/plain", "there is no such page")
            return
        self._send(HTTPStatus.OK, "text/html", make())

    do_HEAD = do_GET

    def _hosts(self) -> tuple[str, ...]:
        port = self.connection.getsockname()[1]
        return f"{LOOPBACK}:{port}", f"localhost:{port}"

    def _page(self) -> str:
        return page_html(self.run_folder, served=True, report=REPORT)

    def _main(self) -> str:
        return main_html(self.run_folder, report=REPORT)

    def _report(self) -> str:
        # The report is made anew: if the folder comes from somebody else, its file report.html may
        # contain any script.
        try:
            return render(read_run(self.run_folder))
        except RunError as error:
            return str(Markup("<!doctype html><title>fedpress</title><p>{}</p>").format(error))

    def _send(self, status: HTTPStatus, kind: str, text: str) -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        # The page itself says which scripts may run.
        self.send_header("Content-Security-Policy", "frame-ancestors 'none'")
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Prints nothing; the base class would print a line for each request."""
