"""Google Cloud Storage on this machine: an emulator, and what is in it."""

from __future__ import annotations

import logging
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import fsspec
import pytest
import tensorstore as ts

BUCKET = "bucket"

# What is downloaded has its generation in a header, as from the real store.
_GENERATIONS = """
from gcp_storage_emulator.handlers import objects
plain = objects.download
def download(request, response, storage, *args, **kwargs):
    try:
        found = storage.get_file_obj(request.params["bucket_name"], request.params["object_id"])
        response["x-goog-generation"] = found["generation"]
    except objects.NotFound:
        pass
    plain(request, response, storage, *args, **kwargs)
objects.download = download
"""


@contextmanager
def emulator() -> Iterator[None]:
    """While it lasts, `gs://` of TensorStore, of Orbax and of child processes leads there."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--host", "127.0.0.1", "--port", str(port), "--in-memory", "--default-bucket", BUCKET]
    # It answers one request after the other; those that come meanwhile are to wait, not to be turned away.
    script = "import http.server, sys; http.server.HTTPServer.request_queue_size = 512\n"
    script += _GENERATIONS + "from gcp_storage_emulator.__main__ import main; sys.exit(main(sys.argv[1:]))"
    argv = [sys.executable, "-c", script, "start", *options]
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        url = f"http://127.0.0.1:{port}"
        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("STORAGE_EMULATOR_HOST", url)
                patch.setenv("TENSORSTORE_GCS_HTTP_URL", url)
                patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "token")
                for protocol in ("gs", "gcs"):
                    patch.setitem(fsspec.config.conf, protocol, {"use_listings_cache": False})
                patch.setattr(
                    logging.getLogger("gcsfs"), "disabled", True
                )  # it warns of missing credentials at each file
                _wait_for(url, process)
                yield
        finally:
            process.kill()


def _wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(f"{url}/storage/v1/b/{BUCKET}").close()
            return
        except OSError:
            assert process.poll() is None and time.monotonic() < end, "the emulator does not start"
            time.sleep(0.05)


def store() -> Any:
    """All objects of the bucket."""
    return ts.KvStore.open({"driver": "gcs", "bucket": BUCKET}).result()


def objects(url: str) -> dict[str, bytes]:
    """Every object below a URL of the bucket, by its name there."""
    prefix = url.removeprefix(f"gs://{BUCKET}/") + "/"
    kv = store()
    names = [
        n for n in kv.list(ts.KvStore.KeyRange(prefix, prefix[:-1] + "0")).result() if n.startswith(prefix.encode())
    ]
    return {n.decode()[len(prefix) :]: kv.read(n).result().value for n in sorted(names)}


def clear() -> None:
    """Deletes all objects."""
    kv = store()
    for deleting in [kv.write(name, None) for name in kv.list().result()]:
        deleting.result()


def put(url: str, content: bytes) -> None:
    store().write(url.removeprefix(f"gs://{BUCKET}/"), content).result()
