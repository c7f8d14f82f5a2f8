"""The Hub's answers, through the real client library, from a server on this machine that answers as the Hub does."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckptc.diagnostics import InputError
from ckptc.storage.formats.safetensors import read_header
from ckptc.storage.source.hub_client import Client, HubName, header_bytes, parse_name
from golden import golden_cases
from hub_client import point_at
from hub_server import Hub

REPO = HubName("org/model")
HF = next(case.hf for case in golden_cases() if (case.hf / "model.safetensors.index.json").exists())


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub() as server:
        server.add("org/model", HF)
        point_at(server, tmp_path, monkeypatch)
        yield server


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("hf://org/model", HubName("org/model")),
        ("org/model", HubName("org/model")),
        ("hf://org/model@refs/pr/3", HubName("org/model", "refs/pr/3")),
        ("org/model@0a1b", HubName("org/model", "0a1b")),
        ("hf://model", None),
        ("a/b/c", None),
        ("/absolute/path", None),
        ("./here", None),
        ("../there", None),
        ("hf://org/model@", None),
        ("hf://org/mo del", None),
    ],
)
def test_names_of_repositories(text: str, name: HubName | None) -> None:
    assert parse_name(text) == name


def test_a_commit_and_its_files_take_one_request(hub: Hub) -> None:
    client = Client()
    commit = client.commit(REPO)
    assert (commit.sha, client.requests, len(hub.requests)) == (hub.repos["org/model"].revisions["main"], 1, 1)
    assert {n: f.size for n, f in commit.files.items()} == {p.name: p.stat().st_size for p in HF.iterdir()}
    shard = next(n for n in commit.files if n.endswith(".safetensors"))
    assert commit.files[shard].sha256 == hashlib.sha256((HF / shard).read_bytes()).hexdigest()


def test_the_headers_of_all_shards_take_one_answer(hub: Hub) -> None:
    client = Client()
    commit = client.commit(REPO)
    headers = client.all_headers(commit, "model.safetensors.index.json")
    assert headers is not None and len(hub.requests) == 3  # the commit, the headers, the commit again
    for name, header in headers.items():
        found, expected = header_bytes(header, commit.files[name].size), read_header(HF / name)
        assert found is not None
        assert {(k, *v["data_offsets"]) for k, v in header.items() if k != "__metadata__"} == {
            (t.name, t.begin - found[0], t.end - found[0]) for t in expected.tensors
        }


def test_headers_of_a_commit_that_has_been_replaced_are_not_taken_for_it(hub: Hub, tmp_path: Path) -> None:
    client = Client()
    commit = client.commit(REPO)
    other = tmp_path / "other"
    other.mkdir()
    for file in HF.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    hub.move("org/model", other)
    assert client.all_headers(commit, "model.safetensors.index.json") is None


def test_a_header_of_another_file_is_seen_by_its_size(hub: Hub) -> None:
    shards = [p for p in sorted(HF.iterdir()) if p.suffix == ".safetensors"]
    header = json.loads((data := shards[0].read_bytes())[8 : 8 + int.from_bytes(data[:8], "little")])
    assert header_bytes(header, shards[0].stat().st_size) is not None
    assert header_bytes(header, 20) is None


def refusal(client: Client, name: HubName, file: str | None = None) -> str:
    with pytest.raises(InputError) as caught:
        commit = client.commit(name)
        if file:
            client.small_file(commit, file)
    return caught.value.diagnostics[0].code


def test_what_the_hub_refuses_has_a_code_each(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("org/gated", HF, gated=True)
    hub.add("org/private", HF, private=True)
    client = Client()
    assert refusal(client, HubName("org/nowhere")) == "hub-no-repository"
    assert refusal(client, HubName("org/private")) == "hub-no-repository"
    assert refusal(client, HubName("org/model", "v9")) == "hub-no-revision"
    assert refusal(client, REPO, "nothing.json") == "hub-no-file"
    assert refusal(client, HubName("org/gated"), "config.json") == "hub-gated"
    point_at(hub, tmp_path, monkeypatch, token="hf_outsider")
    assert refusal(client, HubName("org/gated"), "config.json") == "hub-gated"
    point_at(hub, tmp_path, monkeypatch, token="hf_wrong")
    assert refusal(client, REPO) == "hub-bad-token"
    point_at(hub, tmp_path, monkeypatch, token="hf_good")
    assert client.small_file(client.commit(HubName("org/gated")), "config.json")


def test_without_a_network_or_told_to_be_offline(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert refusal(Client(), REPO) == "hub-offline"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    assert refusal(Client(), REPO) == "hub-unreachable"
