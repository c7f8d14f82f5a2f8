"""Places in buckets that cannot be read: what the store answers, and what is said of it. And the sizes of objects."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import tensorstore as ts

from ckptc.diagnostics import Diagnostic, InputError
from ckptc.storage.source import bucket as module
from ckptc.storage.source.base import opened
from ckptc.storage.source.bucket import Bucket, BucketRanges, Objects
from emulated import BUCKET, clear, emulator, put

RANGES = "byte_range" in (ts.KvStore.read.__doc__ or "")
needs_ranges = pytest.mark.skipif(not RANGES, reason="this TensorStore reads objects whole")


@contextmanager
def store_that_says(status: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A store that answers everything with one status, as the real one words it."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = b'{"error": {"code": %d, "message": "no"}}' % status
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", f"http://127.0.0.1:{server.server_address[1]}")
        monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "token")
        try:
            yield
        finally:
            server.shutdown()


def refusal(url: str) -> Diagnostic:
    with pytest.raises(InputError) as caught:
        opened(url).names()
    (only,) = caught.value.diagnostics
    assert only.help and only.message and "tensorstore_spec" not in str(only.notes)
    return only


@needs_ranges
@pytest.mark.parametrize(
    ("status", "code"),
    [(404, "bucket-missing"), (401, "bucket-no-credentials"), (403, "bucket-no-access"), (503, "bucket-unreachable")],
)
def test_what_the_store_answers_is_said(status: int, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RETRIES", 0)
    with store_that_says(status, monkeypatch):
        found = refusal("gs://some-bucket/path")
    assert found.code == code and "gs://some-bucket/path" in found.message


@pytest.mark.skipif(RANGES, reason="this TensorStore reads ranges")
def test_a_library_that_reads_objects_whole_is_said_to() -> None:
    assert refusal("gs://some-bucket/path").code == "bucket-library"


@pytest.mark.parametrize("url", ["gs://", "gs://b", "gs://UPPER/path", "gs://bucket//path", "gs://buc ket/path"])
def test_what_is_no_place_in_a_bucket_is_refused(url: str) -> None:
    with pytest.raises(InputError, match="bucket-name"):
        opened(url)


@needs_ranges
def test_sizes_are_found_by_asking_for_bytes() -> None:
    with emulator():
        for size in (1, 2, 7, 8, 1000, 1 << 20, (1 << 20) + 1):
            put(f"gs://{BUCKET}/sizes/one", bytes(size))
            assert Objects(f"gs://{BUCKET}/sizes").size("one") == size
        clear()


@needs_ranges
def test_ranges_are_of_the_generation_that_was_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE", 10)
    head = (8).to_bytes(8, "little") + b"{}      "
    with emulator():
        put(f"gs://{BUCKET}/one/a.safetensors", head + bytes(range(100)))
        source = Bucket(f"gs://{BUCKET}/one/")
        ((name, start),) = source.starts(["a.safetensors"])
        assert not isinstance(start, InputError) and start[1] == head
        file = source.identified(module.SourceFile(name, 116, ""))
        reader, data = BucketRanges(source.url, [file]), bytearray(95)
        reader.read_into(0, 20, memoryview(data))
        assert (data, reader.bytes_read) == (bytearray(range(4, 99)), 95)
        put(f"gs://{BUCKET}/one/a.safetensors", head + bytes(100))
        with pytest.raises(InputError, match="source-changed"):
            reader.read_into(0, 20, memoryview(data))
        with pytest.raises(InputError, match="source-changed"):
            source.check_unchanged([file])
        clear()
        with pytest.raises(InputError, match="source-missing"):
            reader.read_into(0, 20, memoryview(data))
        with pytest.raises(InputError, match="source-missing"):
            source.check_unchanged([file])
