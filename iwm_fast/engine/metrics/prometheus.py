"""Serve the newest record to Prometheus: text over HTTP, on the loopback unless another address is set."""

from __future__ import annotations

import http.server
import importlib.util
import math
import threading
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from iwm_fast.errors import UserError
from iwm_fast.file_names import valid_unicode

if TYPE_CHECKING:
    from prometheus_client import Metric

__all__ = ["PrometheusSink", "require_prometheus"]

_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def require_prometheus() -> None:
    """Raise UserError where prometheus_client, which formats the text, is not installed."""
    if importlib.util.find_spec("prometheus_client") is None:
        raise UserError(
            "log.prometheus_port is set, but prometheus_client is not installed: pip install 'iwm-fast[prometheus]', "
            "or unset log.prometheus_port"
        )


class PrometheusSink:
    """Serves ``/metrics`` from a thread: a gauge ``iwm_fast_KEY`` for every number of the newest record.

    Raises UserError where the package is missing or the port cannot be opened. Port 0 takes a free one, in ``port``.
    """

    where = "Prometheus (log.prometheus_port)"

    def __init__(self, host: str, port: int, run: str) -> None:
        require_prometheus()
        self._text = b""
        self._run = valid_unicode(run)
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
                """Log nothing: scrapes come every few seconds."""

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
        """Serve these numbers from now on; missing ones keep no older value."""
        from prometheus_client import generate_latest

        self._text = generate_latest(_Gauges(record, self._run))

    def close(self) -> None:
        """Close the port."""
        self._server.shutdown()
        self._server.server_close()


class _Gauges:
    """A record as prometheus_client collects it: a gauge for each finite number, labelled with the run."""

    def __init__(self, record: Mapping[str, Any], run: str) -> None:
        self._record, self._run = record, run

    def collect(self) -> Iterator[Metric]:
        """The gauges, in the record's order."""
        from prometheus_client.core import GaugeMetricFamily

        for key, value in self._record.items():
            if isinstance(value, int | float) and math.isfinite(value):
                gauge = GaugeMetricFamily(f"iwm_fast_{key}", "", labels=["run"])
                gauge.add_metric([self._run], value)
                yield gauge
