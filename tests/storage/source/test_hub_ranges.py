"""Ranges of files on the Hub: exactly the bytes asked for, each fetched once, whatever the network does."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from ckptc.diagnostics import InputError
from ckptc.storage.source import hub_ranges
from ckptc.storage.source.hub_client import Client, HubName
from ckptc.storage.source.hub_ranges import HubRanges
from hub_client import point_at
from hub_server import Faults, Hub
from waiting import wait_for

NAME, SIZE = "model.safetensors", 3_000_000


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    directory, data = tmp_path_factory.mktemp("repo"), random.Random(0).randbytes(SIZE)
    (directory / NAME).write_bytes(data)
    return directory, data


@pytest.fixture
def hub(content: tuple[Path, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(hub_ranges, "FIRST_WAIT", 0.001)
    monkeypatch.setattr(hub_ranges, "PIECE", 100_000)
    with Hub() as server:
        server.add("org/model", content[0])
        point_at(server, tmp_path, monkeypatch)
        yield server


def reader() -> HubRanges:
    client = Client()
    return HubRanges(client, client.commit(HubName("org/model")))


def fetch(ranges: HubRanges, offset: int, length: int) -> bytes:
    buffer = bytearray(length)
    ranges.read_into(NAME, offset, memoryview(buffer))
    return bytes(buffer)


def test_a_range_is_fetched_once_from_one_signed_address(hub: Hub, content: tuple[Path, bytes]) -> None:
    with reader() as ranges:
        assert fetch(ranges, 12_345, 1_234_567) == content[1][12_345 : 12_345 + 1_234_567]
        assert fetch(ranges, SIZE - 10, 10) == content[1][-10:]
        assert ranges.bytes_read == 1_234_577
        wait_for(lambda: hub.sent["org/model/model.safetensors"] == 1_234_577)  # the server counts what has gone
    resolved = [r for r in hub.requests if "/resolve/" in r.path]
    # Pieces that begin together may each ask where the file is, but no later one does.
    assert 1 <= len(resolved) <= hub_ranges.CONNECTIONS
    assert all(r.token is None for r in hub.requests if r.path.startswith("/storage/"))


@pytest.mark.parametrize("fault", ["broken", "short", "busy", "failing", "expired"])
def test_what_networks_do_changes_no_byte(fault: str, hub: Hub, content: tuple[Path, bytes]) -> None:
    with reader() as ranges:
        hub.faults = Faults(**{fault: 0.3}, retry_after=0.001)
        for offset, length in ((0, 1_500_000), (777, 1_000_000), (SIZE - 555_555, 555_555)):
            assert fetch(ranges, offset, length) == content[1][offset : offset + length]
    assert any(r.status in (429, 503, 403) for r in hub.requests) or fault in ("broken", "short")


def test_a_broken_answer_goes_on_at_its_byte(hub: Hub, content: tuple[Path, bytes]) -> None:
    with reader() as ranges:
        fetch(ranges, 0, 1)
        hub.faults = Faults(short=0.5)
        before = len(hub.requests)
        assert fetch(ranges, 0, 100_000) == content[1][:100_000]
    got = [r.range for r in hub.requests[before:] if r.range is not None]
    assert got[0] == (0, 100_000) and all(a[1] == b[1] and a[0] <= b[0] for a, b in pairwise(got))
    wait_for(lambda: hub.sent["org/model/model.safetensors"] == 100_001)  # nothing twice


def test_an_address_that_expires_is_asked_for_anew(hub: Hub, content: tuple[Path, bytes]) -> None:
    hub.lifetime = 0.0
    with reader() as ranges:
        with pytest.raises(InputError) as caught:
            fetch(ranges, 0, 1000)
        assert caught.value.diagnostics[0].code == "hub-refused"
        hub.lifetime = 60.0
        assert fetch(ranges, 0, 1000) == content[1][:1000]


def test_a_server_that_never_answers_is_given_up(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with reader() as ranges:
        hub.faults = Faults(failing=1.0)
        waited: list[str] = []
        ranges._on_wait = waited.append
        with pytest.raises(InputError) as caught:
            fetch(ranges, 0, 1000)
    assert caught.value.diagnostics[0].code == "hub-refused"
    assert any("503" in text or "does not answer" in text for text in waited)  # and what is waited for is said


def test_a_server_without_ranges_is_refused(hub: Hub) -> None:
    hub.faults = Faults(no_ranges=True)
    with reader() as ranges, pytest.raises(InputError) as caught:
        fetch(ranges, 100, 100)
    assert caught.value.diagnostics[0].code == "hub-no-ranges"


def test_a_mirror_that_hides_the_commit_is_refused(hub: Hub) -> None:
    hub.faults = Faults(no_commit=True)
    with reader() as ranges, pytest.raises(InputError) as caught:
        fetch(ranges, 100, 100)
    assert caught.value.diagnostics[0].code == "hub-no-commit"


def test_a_file_of_another_size_is_refused(hub: Hub, content: tuple[Path, bytes]) -> None:
    with reader() as ranges:
        (content[0] / NAME).write_bytes(content[1] + b"more")
        try:
            with pytest.raises(InputError) as caught:
                fetch(ranges, 100, 100)
        finally:
            (content[0] / NAME).write_bytes(content[1])
    assert caught.value.diagnostics[0].code == "source-changed"
