"""An object store under one URL: its address, time limits, errors and credentials.

obstore makes the requests, and repeats those that fail. It is imported when a store is opened; most runs have none.
"""

import contextlib
import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, timedelta
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote

from mnist_jax.checkpoint.integrity import Json, fsync_path

T = TypeVar("T")

CONCURRENCY = 4  # requests in flight
PART_BYTES = 2**23  # A file of more than four is uploaded in such parts, each with its own time limit.
TRIES = 4  # after the first one
MAX_REQUEST_S = 600.0  # for a download that never pauses for `timeout_s`

AMAZON = "https://s3.amazonaws.com"
_URL = re.compile(r"(?:(s3|gs|az)://([A-Za-z0-9][\w.-]{1,253}[A-Za-z0-9])|file://(?=/.))(/[^?#]*)?", re.ASCII)
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "GOOGLE_BASE_URL", "AZURE_STORAGE_ENDPOINT")
_SECRETS = re.compile(r"(AWS|AZURE|GOOGLE)_\w*(KEY|SECRET|SAS|TOKEN)\w*")


class RemoteError(Exception):
    """The object store did not do what it was asked for, or the files to copy are not valid."""


class InvalidFileError(Exception):
    """A file, a checkpoint or a copy is missing or not valid."""


class ObjectStore:
    """The files under a URL. Its methods raise RemoteError if the store fails or does not answer in time.

    Attributes:
        folder: the folder that a file URL names, without symbolic links; None for other URLs.
    """

    def __init__(self, url: str, timeout_s: float) -> None:
        """Check the URL; nothing is opened yet.

        Args:
            url: `s3://bucket/path`, `gs://bucket/path`, `az://container/path` or `file:///path`.
            timeout_s: how long the store may be silent, and how long a failed request is repeated.

        Raises:
            ValueError: the URL is none of these.
        """
        self.url, self.timeout_s = url, timeout_s
        match = _URL.fullmatch(url)
        path = unquote((match and match[3]) or "").rstrip("/")
        is_file = url.startswith("file:")
        path = os.path.realpath(path).lstrip("/") if is_file else path.removeprefix("/")
        if match is None or not is_plain(path or "root"):
            shown = re.sub(r"//[^/]*@", "//", re.split("[?#]", url)[0])  # The rest may be a password.
            raise ValueError(
                f"{shown!r} cannot hold a remote copy; "
                "use s3://bucket/path, gs://bucket/path, az://container/path or file:///path"
            )
        self._service, self._bucket, self._prefix = match[1], match[2], f"{path}/" if path else ""
        self.folder = Path("/", path) if is_file else None

    def list(self, directory: str) -> list[str]:
        """Return the names of all files under a directory."""
        with self._remote_errors("cannot be listed"):
            rows = [row for rows in self._client.list(self._prefix + directory) for row in rows]
            return [row["path"].removeprefix(self._prefix) for row in rows]

    def read(self, name: str, max_bytes: int) -> bytes | None:
        """Return the content of a file, None if it does not exist. Raises InvalidFileError if it is larger."""
        with self._remote_errors(f"{name} cannot be read"):
            try:
                result = self._client.get(self._prefix + name)
            except FileNotFoundError:
                return None
            if result.meta["size"] > max_bytes:
                raise InvalidFileError(f"{name} has more than {max_bytes:,} bytes")
            return bytes(result.bytes())

    def write(self, name: str, content: bytes) -> None:
        """Write a file. It appears when it is complete."""
        with self._remote_errors(f"{name} cannot be written"):
            is_large = len(content) > 4 * PART_BYTES
            parts: Json = {"use_multipart": is_large, "chunk_size": PART_BYTES, "max_concurrency": CONCURRENCY}
            self._client.put(self._prefix + name, content, **parts)
            if self.folder is not None:  # obstore does not fsync, and a manifest must not be durable before its files.
                fsync_path(self.folder / name)
                fsync_path((self.folder / name).parent)

    def delete(self, name: str) -> None:
        """Delete a file."""
        with self._remote_errors(f"{name} cannot be deleted"), contextlib.suppress(FileNotFoundError):
            self._client.delete(self._prefix + name)

    def each(self, work: Callable[[T], object], items: Iterable[T]) -> None:
        """Call a function with each item, `CONCURRENCY` at a time. The first error is raised and cancels the rest."""
        with ThreadPoolExecutor(CONCURRENCY, thread_name_prefix="remote") as pool:
            for _ in pool.map(work, items):
                pass

    @cached_property
    def _client(self) -> Any:
        import obstore.store

        if self.folder is not None:
            return obstore.store.from_url("file:///")
        timeout = timedelta(seconds=self.timeout_s)
        # Each pause is about twice as long as the one before, all together at most half of the timeout, so that the
        # user sees the reason and not only that time ran out.
        first = min(timedelta(seconds=1), timeout / 2 ** (TRIES + 1))
        return obstore.store.from_url(
            f"{self._service}://{self._bucket}",
            client_options={
                "allow_http": any(os.environ.get(name, "").startswith("http://") for name in _ENDPOINTS),
                "connect_timeout": timeout,
                "read_timeout": timeout,
                "timeout": timedelta(seconds=MAX_REQUEST_S),
            },
            retry_config={
                "max_retries": TRIES,
                "retry_timeout": timeout,
                "backoff": {"init_backoff": first, "max_backoff": first * 2**TRIES, "base": 2},
            },
            **(s3_options(self._bucket, self.timeout_s) if self._service == "s3" else {}),
            **(gcs_options() if self._service == "gs" else {}),
        )

    @contextlib.contextmanager
    def _remote_errors(self, what: str) -> Iterator[None]:
        try:
            yield
        except (InvalidFileError, RemoteError):
            raise
        except Exception as error:  # obstore raises several of its own, ValueError and subclasses of OSError.
            raise RemoteError(f"{self.url}: {what}: {_reason(error, self.timeout_s)}") from None


def _reason(error: Exception, timeout_s: float) -> str:
    """Return what the user has to know of an error of obstore, whose text goes on with the source in many lines."""
    text, _, source = str(error).partition("\n\nDebug source:")
    if "kind: Timeout" in source:
        return f"no answer in {timeout_s:g} s"
    if "kind: Connect" in source:
        return ": ".join(["could not connect", *re.findall(r'(?:message|error): "([^"]+)"', source)[-1:]])
    if answer := re.search(r"<Code>(.*?)</Code>.*?<Message>(.*?)</Message>", text, re.DOTALL):
        text = f"{answer[1]}: {answer[2]}"
    if re.search(r"status code: 40[13]|token request|api/token", str(error)):
        text += "; check the credentials and their permissions"
    return one_line(text)


def one_line(error: object) -> str:
    """Return an error message in one line, without secrets."""
    text = " ".join(str(error).split())
    for name, value in os.environ.items():
        if _SECRETS.fullmatch(name) and value:
            text = text.replace(value, "(secret)")
    text = re.sub(r"//[^/@\s]*@", "//", text)
    return "".join(letter if letter.isprintable() else "?" for letter in text)[:1000]


def is_plain(name: str) -> bool:
    """Return whether a name with slashes stays inside the directory that it is relative to."""
    return name.isprintable() and "\\" not in name and not {"", ".", ".."} & set(name.split("/"))


# ---- What obstore does not find -------------------------------------------------------------------------------------


def s3_options(bucket: str, timeout_s: float) -> Json:
    """Return the region of a bucket, and credentials in `~/.aws`.

    obstore finds environment variables, web identities, and the roles of containers and machines.
    """
    options: Json = {"disable_bulk_delete": True}  # Not every server with S3's API has it.
    if not {"AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"} & os.environ.keys():
        options |= _find_region(bucket, timeout_s)
    if not {"AWS_ACCESS_KEY_ID", "AWS_WEB_IDENTITY_TOKEN_FILE"} & os.environ.keys():
        options |= _aws_profile()
    return options


def _find_region(bucket: str, timeout_s: float) -> Json:
    """Ask Amazon for the region of a bucket: servers of other regions refuse the requests."""
    try:
        request = urllib.request.Request(f"{AMAZON}/{bucket}", method="HEAD")
        answer: Any = urllib.request.urlopen(request, timeout=timeout_s)
    except urllib.error.HTTPError as error:  # The request is not signed; the answer names the region all the same.
        answer = error
    except OSError:
        return {}
    with answer:
        region = answer.headers.get("x-amz-bucket-region")
    return {"region": region} if region else {}


def _aws_profile() -> Json:
    """Return the credentials of the profile in `~/.aws`, which Amazon's tools use if no variables are set."""
    import configparser  # 5 ms, which only this needs

    name, parser = os.environ.get("AWS_PROFILE") or "default", configparser.RawConfigParser(strict=False)
    files = (("AWS_CONFIG_FILE", "~/.aws/config"), ("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials"))
    parser.read([os.path.expanduser(os.environ.get(variable) or path) for variable, path in files])
    sections = [section for section in (f"profile {name}", name) if parser.has_section(section)]
    profile = {key: value for section in sections for key, value in parser.items(section)}
    keys = {key: value for key, value in profile.items() if re.fullmatch("aws_(access_key_id|secret.*|session.*)", key)}
    if keys or not {"credential_process", "role_arn", "sso_session", "sso_start_url"} & profile.keys():
        return keys
    try:
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError:
        raise RemoteError(f"the profile {name!r} in ~/.aws has no keys; install boto3, which logs in") from None
    return {"credential_provider": Boto3CredentialProvider()}


def gcs_options() -> Json:
    """Return what google-auth finds, if there is a file of application default credentials that obstore cannot use.

    obstore uses keys of service accounts, credentials of users, and the service account of the machine.
    """
    default = "~/.config/gcloud/application_default_credentials.json"
    path = Path(os.environ.get("GOOGLE_APPLICATION_CREDENTIALS") or default).expanduser()
    kind = json.loads(path.read_bytes())["type"] if path.is_file() else "authorized_user"
    if kind in ("authorized_user", "service_account"):
        return {}
    try:
        import google.auth
        from google.auth.transport.requests import Request
    except ImportError:
        raise RemoteError(f"{path} has the type {kind!r}; install the package google-auth[requests]") from None
    credentials, _ = google.auth.default(scopes=["https://www.googleapis.com/auth/devstorage.read_write"])

    def refresh() -> Json:
        credentials.refresh(Request())
        return {"token": credentials.token, "expires_at": credentials.expiry.replace(tzinfo=UTC)}

    return {"credential_provider": refresh}
