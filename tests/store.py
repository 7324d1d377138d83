"""An S3-compatible object store on the loopback (moto's server in its own process), and a proxy that injects faults."""

from __future__ import annotations

import http.client
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import boto3


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def moto_server():
    """Yield the object store's port."""
    port = _free_port()
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 60
        while True:
            assert server.poll() is None
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        yield port
    finally:
        server.kill()
        server.wait()


class FaultyStore:
    """Passes requests to the object store, except those that meet a fault: each takes one from `faults`.

    Faults: "500", "503", "403"; "close" (no response), "cut" (half of the body), "stall" (until `release`). always: a
    fault for every request. Records (method, path, range) of all requests, and the maximum of concurrent ones.
    """

    def __init__(self, port):
        self.store_port, self.direct = port, f"http://127.0.0.1:{port}"
        self.faults, self.always = deque(), None
        self.requests, self.most, self._underway = [], 0, 0
        self.delay_s, self.released, self.lock = 0.0, threading.Event(), threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_GET(self):
                outer.answer(self)

            do_HEAD = do_PUT = do_POST = do_DELETE = do_GET  # noqa: N815  (http.server's names)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, handler):
        with self.lock:
            self.requests.append((handler.command, handler.path, handler.headers.get("Range")))
            fault = self.always or (self.faults.popleft() if self.faults else None)
            self._underway += 1
            self.most = max(self.most, self._underway)
        try:
            if self.delay_s:
                time.sleep(self.delay_s)
            self._answer(handler, fault)
        except OSError:
            handler.close_connection = True  # the client did not wait
        finally:
            with self.lock:
                self._underway -= 1

    def _answer(self, handler, fault):
        body = handler.rfile.read(int(handler.headers.get("Content-Length", 0)))
        if fault == "stall":
            self.released.wait(60)
        if fault in {"stall", "close"}:
            handler.close_connection = True
            return
        if fault is not None and fault.isdecimal():
            code = {"500": "InternalError", "503": "SlowDown", "403": "AccessDenied"}[fault]
            self._send(handler, int(fault), [], f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode())
            return
        upstream = http.client.HTTPConnection("127.0.0.1", self.store_port, timeout=60)
        upstream.request(handler.command, handler.path, body, dict(handler.headers))
        answer = upstream.getresponse()
        data = answer.read()
        self._send(handler, answer.status, answer.getheaders(), data, cut=fault == "cut")
        upstream.close()

    @staticmethod
    def _send(handler, status, headers, data, *, cut=False):
        handler.send_response_only(status)
        length = len(data)
        for name, value in headers:
            if name.lower() == "content-length" and handler.command == "HEAD":
                length = int(value)
            elif name.lower() not in {"content-length", "transfer-encoding", "connection"}:
                handler.send_header(name, value)
        handler.send_header("Content-Length", str(length))
        handler.end_headers()
        handler.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            handler.close_connection = True

    def close(self):
        self.released.set()
        self.server.shutdown()
        self.server.server_close()


def upload(url, folder: Path, bucket, prefix=""):
    """Upload every file below the folder as an object."""
    client = boto3.client("s3", endpoint_url=url, region_name="us-east-1")
    if bucket not in {entry["Name"] for entry in client.list_buckets()["Buckets"]}:
        client.create_bucket(Bucket=bucket)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            client.put_object(Bucket=bucket, Key=prefix + str(path.relative_to(folder)), Body=path.read_bytes())
    return client
