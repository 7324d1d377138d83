"""The newest record as Prometheus reads it: text over HTTP, on the loopback unless another address is chosen."""

from __future__ import annotations

import http.server
import math
import threading
from typing import Any

from iwm_fast.errors import UserError
from iwm_fast.streams import shown

__all__ = ["PrometheusSink"]

_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class PrometheusSink:
    """Serves ``/metrics`` from a thread: a gauge ``iwm_fast_KEY`` for every number of the newest record.

    Raises UserError where the port cannot be opened. Port 0 takes a free one; ``port`` says which.
    """

    def __init__(self, host: str, port: int, run: str) -> None:
        self._text = b""
        self._run = shown(run).replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
        sink = self

        class Page(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                found = self.path.split("?")[0] == "/metrics"
                body = sink._text if found else b"metrics are under /metrics\n"
                self.send_response(200 if found else 404)
                self.send_header("Content-Type", _TYPE)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  (the base class names it so)
                """Say nothing: a scrape every few seconds is no news."""

        try:
            self._server = http.server.ThreadingHTTPServer((host, port), Page)
        except OSError as error:
            raise UserError(
                f"log.prometheus_port: {host}:{port} cannot be opened ({error.strerror}); choose another port"
            ) from error
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, name="iwm-fast prometheus", daemon=True).start()

    def write(self, record: dict[str, Any]) -> None:
        """Serve these numbers from now on; those that the record does not have keep no older value."""
        lines = []
        for key, value in record.items():
            if isinstance(value, int | float) and math.isfinite(value):
                name = f"iwm_fast_{key}"
                lines += [f"# TYPE {name} gauge", f'{name}{{run="{self._run}"}} {value:.17g}']
        self._text = ("\n".join(lines) + "\n").encode()

    def close(self) -> None:
        """Close the port."""
        self._server.shutdown()
        self._server.server_close()
