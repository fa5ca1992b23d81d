"""A place in an S3-compatible object store, by botocore: the core of boto3, without its resources and transfers.

One PUT carries a whole object, however large a pack may be (S3 takes 5 GiB): it is there whole or not at all, and a cut
connection leaves no parts behind that somebody pays for. Requests that fail on the way, time out or are throttled are sent
again, with growing pauses.

In a bucket with object lock what is written once (packs, backups, repo.json) is written with a time until which nobody can
delete it, and read back as it was written first: a delete marker or a newer version is the doing of somebody else, and is
passed over.

Clocks: the store's own, as its answers say it. This machine's plays no part in how long anything is held or kept.
Threads: any.
"""

import contextlib
import email.utils
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from cdpserver.errors import BrokenError, CorruptError, NoSpaceError, NotFoundError, RefusedError, UsageError
from cdpserver.names import show
from cdpserver.repository.lease import LEASE_S, Lease, holds
from cdpserver.repository.place import HeldCheck, check_name, is_name

CONNECT_S = 10.0
READ_S = 60.0
"""Without a byte for so long, a request counts as lost."""

ATTEMPTS = 8
"""Of a request, pauses growing to 20 s: about a minute of trouble in all, and a minute more for each that hangs."""

CONNECTIONS = 16

WRITTEN_ONCE = ("packs/", "backups/", "repo.json")

_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")

_MISSING = {"NoSuchKey", "404", "NotFound", "NoSuchVersion"}
_FULL = {"QuotaExceeded", "XMinioStorageFull", "InsufficientCapacity", "507"}
_DENIED = {"AccessDenied", "403", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "Forbidden"}
_NO_LOCK = {"ObjectLockConfigurationNotFoundError", "NotImplemented", "MethodNotAllowed", "501", "405", "404"}

CREDENTIALS = (
    "S3 credentials are taken from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or ~/.aws/credentials"
)


@dataclass(frozen=True, slots=True)
class Store:
    """Where a bucket is, and who we are there. Without an endpoint or a region the usual settings of AWS's tools count."""

    bucket: str
    prefix: str = ""
    endpoint: str | None = None
    region: str | None = None
    profile: str | None = None


class S3Place:
    """Objects below a prefix of a bucket."""

    def __init__(
        self,
        where: str,
        store: Store,
        *,
        lease_s: float = LEASE_S,
        read_s: float = READ_S,
        attempts: int = ATTEMPTS,
    ) -> None:
        """Nothing is asked of the store yet. `where` is how an operator names it. UsageError, RefusedError."""
        if not _BUCKET.fullmatch(store.bucket):
            raise UsageError(f"not the name of a bucket: {show(store.bucket)}", hint="s3://BUCKET/PREFIX")
        self.where = where
        self.bucket = store.bucket
        self._prefix = f"{store.prefix}/" if store.prefix else ""
        self._lease_s = lease_s
        self._client = _client(store, read_s, attempts)
        self._locking: bool | None = None
        self._firsts: dict[str, str] = {}
        """Name -> id of the version that was written first, of what is written once."""

    # -- the Place

    def put(self, name: str, data: bytes | bytearray, until_ns: int = 0) -> None:
        more: dict[str, Any] = {}
        if until_ns and self.locks:
            more = {"ObjectLockMode": "COMPLIANCE", "ObjectLockRetainUntilDate": _date(until_ns)}
        answer = self._ask("put_object", name, Body=data, **more)
        self._note(name, answer)

    def get(self, name: str) -> bytes:
        return self._read(name)

    def read(self, name: str, offset: int, length: int) -> bytes:
        try:
            data = self._read(name, Range=f"bytes={offset}-{offset + length - 1}")
        except _RangeError:
            data = b""
        if len(data) < length:
            raise CorruptError(
                f"{name} in {self.where} ends before {offset + length}",
                hint="cdp repo check says which backups that touches",
            )
        return data

    def names(self, prefix: str) -> Iterator[tuple[str, int]]:
        if self.locks and f"{prefix}/".startswith(WRITTEN_ONCE):
            yield from self._first_versions(f"{prefix}/")
            return
        for row in self._list("list_objects_v2", "Contents", f"{prefix}/"):
            name = row["Key"].removeprefix(self._prefix)
            if is_name(name):
                yield name, row["Size"]

    def delete(self, name: str) -> None:
        if not self.locks:
            self._ask("delete_object", name)
            return
        # With every version, delete markers of others too: what we delete is to be gone, and to cost nothing.
        for kind in ("Versions", "DeleteMarkers"):
            for row in list(self._list("list_object_versions", kind, name)):
                if row["Key"] == self._key(name):
                    self._ask("delete_object", name, VersionId=row["VersionId"])
        self._firsts.pop(name, None)

    def retain(self, name: str, until_ns: int) -> None:
        if self.locks and self.retained_until_ns(name) < until_ns:
            retention = {"Mode": "COMPLIANCE", "RetainUntilDate": _date(until_ns)}
            self._ask("put_object_retention", name, Retention=retention, **self._version(name))

    def retained_until_ns(self, name: str) -> int:
        if not self.locks:
            return 0
        until = self._ask("head_object", name, **self._version(name)).get("ObjectLockRetainUntilDate")
        return int(until.timestamp()) * 1_000_000_000 if until is not None else 0

    @property
    def locks(self) -> bool:
        if self._locking is None:
            try:
                answer = self._ask("get_object_lock_configuration", "")
                found = answer["ObjectLockConfiguration"].get("ObjectLockEnabled")
                self._locking = found == "Enabled"
            except (_NoLockError, RefusedError):
                self._locking = (
                    False  # a store that has none, or credentials that may not know: then it is not relied on
                )
        return self._locking

    def now_ns(self) -> int | None:
        """By the store's clock, to the second."""
        try:
            answer = self._ask("head_object", "repo.json")
        except FileNotFoundError:
            answer = self._ask("list_objects_v2", "", Prefix=self._prefix, MaxKeys=1)
        return _answered_ns(answer)

    @contextlib.contextmanager
    def hold(self, name: str) -> Iterator[HeldCheck]:
        with Lease(self, name, self._lease_s) as lease:
            yield lease.check

    def holds(self, prefix: str) -> set[str]:
        return holds(self, prefix, self._lease_s)

    def ages(self, prefix: str) -> Iterator[tuple[str, float]]:
        """(name, seconds since it was put) of the objects below the folder `prefix`; what a lease needs."""
        for page in self._pages("list_objects_v2", f"{prefix}/"):
            now_ns = _answered_ns(page)
            for row in page.get("Contents", ()):
                name = row["Key"].removeprefix(self._prefix)
                if is_name(name):
                    yield name, (now_ns - _ns(row["LastModified"])) / 1e9

    # -- requests

    def _key(self, name: str) -> str:
        return self._prefix + check_name(name)

    def _ask(self, operation: str, name: str, **parameters: Any) -> dict[str, Any]:
        if name:
            parameters["Key"] = self._key(name)
        with self._errors(operation.partition("_")[0], name):
            answer: dict[str, Any] = getattr(self._client, operation)(Bucket=self.bucket, **parameters)
        return answer

    def _read(self, name: str, **more: Any) -> bytes:
        with self._errors("read", name):
            answer = self._client.get_object(
                Bucket=self.bucket, Key=self._key(name), **self._version(name), **more
            )
            data: bytes = answer["Body"].read()
        return data

    def _list(self, operation: str, field: str, prefix: str) -> Iterator[dict[str, Any]]:
        for page in self._pages(operation, prefix):
            yield from page.get(field, ())

    def _pages(self, operation: str, prefix: str) -> Iterator[dict[str, Any]]:
        pages = self._client.get_paginator(operation)
        with self._errors("list", prefix):
            yield from pages.paginate(Bucket=self.bucket, Prefix=self._prefix + prefix)

    # -- what is written once

    def _note(self, name: str, answer: dict[str, Any]) -> None:
        if answer.get("VersionId") and name.startswith(WRITTEN_ONCE):
            self._firsts.setdefault(name, answer["VersionId"])

    def _first_versions(self, prefix: str) -> Iterator[tuple[str, int]]:
        found: dict[str, tuple[datetime, str, int]] = {}
        for row in self._list("list_object_versions", "Versions", prefix):
            name = row["Key"].removeprefix(self._prefix)
            # A listing has the newest first, also of one second.
            if is_name(name) and (name not in found or row["LastModified"] <= found[name][0]):
                found[name] = (row["LastModified"], row["VersionId"], row["Size"])
        for name, (_, version, size) in found.items():
            self._firsts[name] = version
            yield name, size

    def _version(self, name: str) -> dict[str, str]:
        if not (name.startswith(WRITTEN_ONCE) and self.locks):
            return {}
        if name not in self._firsts:
            for found, _ in self._first_versions(name):
                if found == name:
                    break
            else:
                raise FileNotFoundError(name)
        return {"VersionId": self._firsts[name]}

    # -- errors

    @contextlib.contextmanager
    def _errors(self, doing: str, name: str) -> Iterator[None]:
        from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError
        from urllib3.exceptions import HTTPError

        try:
            yield
        except ClientError as error:
            raise self._answered(doing, name, error.response) from error
        except NoCredentialsError as error:
            raise RefusedError(f"there are no credentials for {self.where}", hint=CREDENTIALS) from error
        except (BotoCoreError, HTTPError, OSError) as error:
            if isinstance(error, FileNotFoundError):
                raise
            raise BrokenError(
                f"cannot {doing} {name or 'anything'} in {self.where}: {_reason(error)}",
                hint="look whether the object store answers; the same command goes on with what is stored",
            ) from error

    def _answered(self, doing: str, name: str, response: dict[str, Any]) -> Exception:
        """What an answer that is an error means."""
        code = str(response.get("Error", {}).get("Code", ""))
        said = f"{code}: {response.get('Error', {}).get('Message') or 'no reason given'}"
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        if code == "NoSuchBucket":
            return NotFoundError(f"there is no bucket {self.bucket} for {self.where}", hint="make it first")
        for codes, kind in _SIGNS:
            if code in codes and (kind is not _NoLockError or not name):
                return kind(name)
        if code in _FULL or status == 507:
            return NoSpaceError(
                f"{self.where} takes no more: {said}", hint="raise its quota, or cdp repo prune and gc"
            )
        if code in _DENIED and doing == "delete":
            return RefusedError(
                f"{self.where} does not let {name} be deleted: {said}",
                hint="it is immutable still, or the credentials may not delete",
            )
        if code in _DENIED:
            return RefusedError(f"{self.where} refuses to {doing} {name}: {said}", hint=CREDENTIALS)
        return BrokenError(
            f"cannot {doing} {name or 'anything'} in {self.where}: {said}",
            hint="look at the object store; the same command goes on with what is stored",
        )


class _NoLockError(Exception):
    """The bucket has no object lock, or the store does not know what that is."""


class _RangeError(Exception):
    """The object ends before what was asked for begins."""


_SIGNS: tuple[tuple[set[str], type[Exception]], ...] = (
    (_NO_LOCK, _NoLockError),
    (_MISSING, FileNotFoundError),
    ({"InvalidRange"}, _RangeError),
)
"""Answers that this module deals with itself; where no name was asked for, it was asked for the lock."""


def _client(store: Store, read_s: float, attempts: int) -> Any:
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError
    from botocore.session import Session

    config = Config(
        connect_timeout=CONNECT_S,
        read_timeout=read_s,
        retries={"mode": "standard", "total_max_attempts": attempts},
        max_pool_connections=CONNECTIONS,
        # Every chunk is compared with its id, and TLS or the signature guards the way: more digests would cost and add nothing.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        s3={"addressing_style": "path"} if store.endpoint else None,
    )
    try:
        session = Session(profile=store.profile)
        region = store.region or session.get_config_variable("region") or "us-east-1"
        client = session.create_client("s3", region_name=region, endpoint_url=store.endpoint, config=config)
    except (BotoCoreError, ValueError) as error:
        raise RefusedError(f"the object store cannot be used: {error}", hint=CREDENTIALS) from error
    client.meta.events.register_last("before-call.s3", _expect_nothing)
    return client


def _expect_nothing(params: dict[str, Any], **_: object) -> None:
    """No `Expect: 100-continue`: botocore reads for ever where a connection ends in the middle of that answer."""
    params["headers"].pop("Expect", None)


def _reason(error: Exception) -> str:
    return str(error).partition("\n")[0][:300] or type(error).__name__


def _answered_ns(answer: dict[str, Any]) -> int:
    """When the store answered, by its own clock."""
    text = answer["ResponseMetadata"]["HTTPHeaders"].get("date", "")
    try:
        return _ns(email.utils.parsedate_to_datetime(text))
    except ValueError:
        raise BrokenError(
            "the object store's answers have no date", hint="look what answers at its address"
        ) from None


def _ns(time: datetime) -> int:
    return int(time.timestamp()) * 1_000_000_000


def _date(time_ns: int) -> datetime:
    return datetime.fromtimestamp(-(-time_ns // 1_000_000_000), UTC)
