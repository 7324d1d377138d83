"""Storage in an S3-compatible object store: objects, read by ranges.

Credentials come from the environment alone (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN); only the
client holds them, so no error, log line, pickle or file of a run has them. AWS_ENDPOINT_URL names an object store other
than Amazon's, AWS_REGION or AWS_DEFAULT_REGION its region.

DALI's readers accept s3:// addresses, but return samples in their own order and end the run at the first file that they
cannot decode. Here samples are read by index (so that any number of ranks has the same order, and a run resumes at any
position), checked, and replaced where they are bad.
"""

from __future__ import annotations

import os
import random
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, TypeVar
from urllib.parse import urlsplit

from iwm_fast.config.schema import DataConfig
from iwm_fast.data.decode.encoded import BadSample
from iwm_fast.data.sources.storage import SYSTEM_FOLDERS, DataGone
from iwm_fast.errors import UserError

__all__ = ["PATIENCE", "Patience", "S3Storage", "is_address"]

Answer = TypeVar("Answer")

_READERS = 16
# Waits between attempts: 0.5, 1, 2, 4, 8 s, each sampled from its upper half, so that many readers do not return at
# once.
_FIRST_WAIT_S = 0.5
_LONGEST_WAIT_S = 10.0

_ADDRESS = re.compile(r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(?:/(.*))?", re.DOTALL)
_MISSING = frozenset({"NoSuchKey", "404", "NotFound"})
_LATER = frozenset({"SlowDown", "RequestTimeout", "RequestTimeTooSkewed", "Throttling", "ThrottlingException"})


@dataclass(frozen=True)
class Patience:
    """The limits of an object store: seconds without a byte, and attempts per request."""

    timeout_s: float = 20.0
    attempts: int = 6

    @classmethod
    def of(cls, data: DataConfig) -> Patience:
        """Return ``data.store_timeout`` and ``data.store_attempts``."""
        return cls(data.store_timeout, data.store_attempts)


PATIENCE = Patience()


def is_address(root: str) -> bool:
    """Return whether a root is an address of an object store rather than a path."""
    return root.startswith("s3://")


class S3Storage:
    """Objects below s3://bucket/prefix. A request that fails temporarily is retried within `patience`.

    Raises UserError for an invalid address, a missing boto3 or missing credentials, a refusal, and an object store that
    does not respond; it names the object and the response.
    """

    readers = _READERS
    system_folders: tuple[str, ...] = ()  # copied there with what lies beside them
    repeated_folders: tuple[str, ...] = ()  # no links either

    def __init__(self, root: str, patience: Patience = PATIENCE) -> None:
        match = _ADDRESS.fullmatch(root)
        if match is None:  # not repeated: it may hold a secret
            raise UserError("this address of an object store is not of the form s3://bucket/prefix; check data.root")
        self._bucket = match[1]
        self._prefix = (match[2] or "").strip("/")
        self._prefix += "/" if self._prefix else ""
        self.root = f"s3://{self._bucket}/{self._prefix}".rstrip("/")
        self._patience = patience
        self._closed = threading.Event()
        self._made = threading.Lock()
        _credentials()

    def __getstate__(self) -> dict[str, Any]:
        """For other processes, which make a client from their own environment."""
        return {"root": self.root, "patience": self._patience}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def shown(self, name: str) -> str:
        """The object's address."""
        return f"s3://{self._bucket}/{self._prefix}{name}"

    def names(self) -> list[str]:
        """Keys below the prefix, without it, sorted."""
        return sorted(self.walk())

    def walk(self) -> Iterator[str]:
        """The keys, as the object store lists them."""
        of_system: set[str] = set()
        for key, _ in self._listed():
            folder = _system_folder(key)
            if folder is None:
                yield key
            else:
                of_system.add(folder)
        self.system_folders = tuple(sorted(of_system))

    def stamps(self, names: Sequence[str]) -> list[bytes | None]:
        """Size and ETag of each object: the first one's by a request, the others' from lists of a thousand."""
        if not names:
            return []
        found: dict[str, bytes | None] = {}
        with suppress(BadSample):
            head = self._ask(names[0], lambda: self._client.head_object(**self._object(names[0])))
            found[names[0]] = _stamp(head.get("ContentLength"), head.get("ETag"))
        for name, entry in self._listed(after=names[0]) if len(names) > 1 else ():
            if name > names[-1]:
                break
            found[name] = _stamp(entry.get("Size"), entry.get("ETag"))
        return [found.get(name) for name in names]

    def sizes(self, names: Sequence[str]) -> list[int]:
        """From the list of objects, a thousand at a time, instead of one request each."""
        wanted = set(names)
        found = {key: int(entry.get("Size", -1)) for key, entry in self._listed() if key in wanted}
        return [found.get(name, -1) for name in names]

    def _listed(self, after: str | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
        """Name and entry of each object below the prefix, or of those after a name, without hidden ones."""
        more: dict[str, str] = {} if after is None else {"StartAfter": self._prefix + after}
        while True:
            page = self._ask(self.root, partial(self._list, **more))
            for entry in page.get("Contents", ()):
                key = entry["Key"][len(self._prefix) :]
                if key and not key.endswith("/") and not _hidden(key):
                    yield key, entry
            if not page.get("IsTruncated"):
                return
            more = {"ContinuationToken": page["NextContinuationToken"]}

    def has(self, name: str) -> bool:
        """Return whether there is such an object, from a list, which needs no right to read it."""
        page = self._ask(self.root, lambda: self._list(name, MaxKeys=1))
        return any(entry["Key"] == self._prefix + name for entry in page.get("Contents", ()))

    def top(self) -> tuple[list[str], list[str]]:
        """Names of the folders and of the objects directly below the prefix, both sorted."""
        folders: list[str] = []
        objects: list[str] = []
        more: dict[str, str] = {}
        while True:
            page = self._ask(self.root, partial(self._list, Delimiter="/", **more))
            folders += [entry["Prefix"][len(self._prefix) : -1] for entry in page.get("CommonPrefixes", ())]
            objects += [entry["Key"][len(self._prefix) :] for entry in page.get("Contents", ())]
            if not page.get("IsTruncated"):
                return _seen(folders), _seen(objects)
            more = {"ContinuationToken": page["NextContinuationToken"]}

    def any(self) -> bool:
        """Whether there is an object below the prefix."""
        return bool(self._ask(self.root, lambda: self._list(MaxKeys=1)).get("KeyCount"))

    def size(self, name: str) -> int:
        """The object's length in bytes."""
        return int(self._ask(name, lambda: self._client.head_object(**self._object(name)))["ContentLength"])

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        """Return the object's bytes, or a range of them."""
        if length is not None and length <= 0:
            return b""
        wanted: dict[str, str] = {}
        if offset or length is not None:
            wanted["Range"] = f"bytes={offset}-" + ("" if length is None else str(offset + length - 1))

        def get() -> bytes:
            body: bytes = self._client.get_object(**self._object(name), **wanted)["Body"].read()
            return body

        return self._ask(name, get)

    def close(self) -> None:
        """Waiting reads end at once, those underway within their time."""
        self._closed.set()

    @cached_property
    def _client(self) -> Any:
        boto3, botocore = _libraries()
        with self._made:
            try:
                return boto3.client(
                    "s3",
                    **_credentials(),
                    region_name=os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1",
                    config=botocore.config.Config(
                        connect_timeout=self._patience.timeout_s,
                        read_timeout=self._patience.timeout_s,
                        retries={"total_max_attempts": 1},  # ours also cover what breaks while a body is read
                        max_pool_connections=256,  # as many as data.readers allows
                        request_checksum_calculation="when_required",  # other object stores have none
                        response_checksum_validation="when_required",
                    ),
                )
            except (ValueError, botocore.exceptions.BotoCoreError) as error:
                raise UserError(f"{self.root}: no client can be made: {_said(error)}") from error

    def _object(self, name: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": self._prefix + name}

    def _list(self, name: str = "", **more: Any) -> Any:
        return self._client.list_objects_v2(Bucket=self._bucket, Prefix=self._prefix + name, **more)

    def _ask(self, name: str, request: Callable[[], Answer]) -> Answer:
        """The object store's response, retried where a failure may be temporary."""
        exceptions = _libraries()[1].exceptions
        passing = (exceptions.ConnectionError, exceptions.HTTPClientError, exceptions.IncompleteReadError)
        what = self.root if name == self.root else self.shown(name)
        for attempt in range(1, self._patience.attempts + 1):
            try:
                return request()
            except passing as error:
                said = _said(error)
            except exceptions.ClientError as error:
                said = self._refusal(what, error)
            except exceptions.BotoCoreError as error:
                raise UserError(f"{what}: {_said(error)}") from error
            wait = min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2 ** (attempt - 1)) * random.uniform(0.5, 1)
            if attempt < self._patience.attempts and self._closed.wait(wait):
                break
        raise UserError(
            f"{what}: cannot be read, {attempt} attempts failed, the last with: {said}; check the store"
            f"{_endpoint()} and resume with --resume auto"
        )

    def _refusal(self, what: str, error: Any) -> str:
        """The response, where a retry may help."""
        code = str(error.response.get("Error", {}).get("Code", ""))
        status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        if code in _MISSING and what != self.root:
            self._require_some()
            raise BadSample("cannot be read: no such object") from error
        if code == "NoSuchBucket":
            raise UserError(f"{what}: there is no such bucket{_endpoint()}; check data.root") from error
        if code == "InvalidRange":
            raise BadSample("cannot be read: the object ends before it") from error
        if status < 500 and status != 429 and code not in _LATER:
            raise UserError(
                f"{what}: the store refuses it ({code or status}); check the credentials in the environment and the "
                "bucket's permissions"
            ) from error
        return f"{code or 'an error'} (HTTP {status})"

    def _require_some(self) -> None:
        """Raise UserError where nothing is left under the prefix."""
        if not self.any():
            raise DataGone(f"{self.root} is empty")


def _stamp(size: Any, tag: Any) -> bytes | None:
    return f"{size} {tag}".encode() if tag else None


def _seen(names: list[str]) -> list[str]:
    return sorted(name for name in names if name and not name.startswith("."))


def _hidden(key: str) -> bool:
    return key.startswith(".") or "/." in key


def _system_folder(key: str) -> str | None:
    """The folder of a system that an object lies in, if it does."""
    parts = key.split("/")[:-1]
    at = next((at for at, part in enumerate(parts) if part in SYSTEM_FOLDERS), None)
    return None if at is None else "/".join(parts[: at + 1])


def _libraries() -> tuple[Any, Any]:
    """boto3 and botocore, which are an extra."""
    try:
        import boto3
        import botocore.config
        import botocore.exceptions
    except ModuleNotFoundError as error:
        raise UserError("s3:// needs boto3, which is not installed: pip install 'iwm-fast[s3]'") from error
    return boto3, botocore


def _credentials() -> dict[str, str]:
    """From the environment, given to the client explicitly, so that it looks nowhere else."""
    names = {"aws_access_key_id": "AWS_ACCESS_KEY_ID", "aws_secret_access_key": "AWS_SECRET_ACCESS_KEY"}
    missing = [name for name in names.values() if not os.environ.get(name)]
    if missing:
        raise UserError(
            f"s3:// needs {' and '.join(missing)} in the environment; set {'it' if len(missing) < 2 else 'them'}"
        )
    found = {key: os.environ[name] for key, name in names.items()}
    if os.environ.get("AWS_SESSION_TOKEN"):
        found["aws_session_token"] = os.environ["AWS_SESSION_TOKEN"]
    return found


def _endpoint() -> str:
    """The object store's host and port, without the rest of its address (a user and a password, perhaps)."""
    url = urlsplit(os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "")
    return f" at {url.hostname}:{url.port}" if url.port else f" at {url.hostname}" if url.hostname else ""


def _said(error: Exception) -> str:
    """The kind of an error: the texts repeat addresses, which may hold credentials."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", type(error).__name__.removesuffix("Error")).lower()
    return words or "an error"
