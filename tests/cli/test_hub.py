"""Conversions of what is on the Hub, by the real program, from a server on this machine that answers as the Hub does."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ckptc.cli.main import run
from ckptc.storage.source import hub_ranges
from golden import golden_cases
from hub_client import point_at
from hub_server import Faults, Hub

CASE = next(c for c in golden_cases() if c.hf.parent.name == "qwen3_moe")
MODEL = ["--model", CASE.model, "--set", f"padded_vocab={CASE.vocab}"]
Ckptc = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        server.add("org/model", CASE.hf)
        yield server


@pytest.fixture
def ckptc(hub: Hub, tmp_path: Path) -> Ckptc:
    """The program, talking to the server, with caches of its own."""

    def call(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        env = {
            **os.environ,
            **hub.environment(tmp_path / "home"),
            "XDG_CACHE_HOME": str(tmp_path / "cache"),
            **environment,
        }
        return subprocess.run(
            [sys.executable, "-m", "ckptc", *arguments], env=env, capture_output=True, text=True, timeout=300
        )

    return call


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is converted from the directory."""
    output = tmp_path_factory.mktemp("local") / "out"
    assert run(["convert", *MODEL, "--source", str(CASE.hf), "--output", str(output), "--quiet"]) == 0
    return output


def same(first: Path, second: Path) -> bool:
    return run(["diff", str(first), str(second)]) == 0


def other_weights(tmp_path: Path) -> Path:
    """Files of the same names, sizes and headers, with other weights."""
    other = tmp_path / "other"
    shutil.copytree(CASE.hf, other)
    for shard in other.glob("*.safetensors"):
        data = bytearray(shard.read_bytes())
        data[-100:] = bytes(100)
        shard.write_bytes(data)
    return other


def test_compiling_again_asks_for_the_commit_alone_and_without_a_network_for_nothing(ckptc: Ckptc, hub: Hub) -> None:
    first = ckptc("compile", *MODEL, "--source", "hf://org/model")
    assert first.returncode == 0, first.stderr
    # The commit, config.json and the index, each with the library's look at its head; all headers, the commit again.
    assert len(hub.requests) <= 8
    hub.requests.clear()
    again = ckptc("compile", *MODEL, "--source", "org/model")
    assert (again.returncode, [r.path for r in hub.requests]) == (0, ["/api/models/org/model"])
    hub.server.shutdown()
    hub.server.server_close()
    alone = ckptc("compile", *MODEL, "--source", "org/model")
    assert alone.returncode == 0 and "reads commit" in alone.stderr
    assert alone.stdout.splitlines()[1:] == again.stdout.splitlines()[1:]


def test_many_shards_take_one_answer_or_one_range_each(ckptc: Ckptc, hub: Hub) -> None:
    shards = len(list(CASE.hf.glob("*.safetensors")))
    hub.faults = Faults(no_metadata=True)
    done = ckptc("compile", *MODEL, "--source", "hf://org/model")
    assert done.returncode == 0, done.stderr
    assert len([r for r in hub.requests if r.path.startswith("/storage/")]) == shards


def test_weights_are_streamed_bit_for_bit_and_none_is_kept(ckptc: Ckptc, hub: Hub, tmp_path: Path, local: Path) -> None:
    done = ckptc("convert", *MODEL, "--source", "hf://org/model", "--output", str(tmp_path / "out"), "--verify")
    assert done.returncode == 0, done.stderr
    commit = hub.repos["org/model"].revisions["main"]
    assert done.stdout.startswith(f"source  hf://org/model@{commit}")
    assert same(tmp_path / "out", local)
    kept = [p for place in ("home", "cache") for p in (tmp_path / place).rglob("*") if p.is_file()]
    assert kept and not any(p.name.endswith(".safetensors") or p.stat().st_size > 20_000 for p in kept)


def test_without_a_source_the_models_own_repository_is_read(ckptc: Ckptc, hub: Hub, tmp_path: Path) -> None:
    output = str(tmp_path / "out")
    done = ckptc("convert", *MODEL, "--output", output)
    repo = re.search(r"hf://([\w./-]+)", done.stderr)
    assert done.returncode == 1 and repo is not None and "error[hub-no-repository]" in done.stderr
    hub.add(repo[1], CASE.hf)
    assert ckptc("convert", *MODEL, "--output", output).returncode == 0


def test_a_plan_is_bound_to_its_commit(ckptc: Ckptc, hub: Hub, tmp_path: Path, local: Path) -> None:
    plan = str(tmp_path / "plan.json")
    assert ckptc("compile", *MODEL, "--source", "hf://org/model", "-o", plan).returncode == 0
    hub.move("org/model", other_weights(tmp_path))
    assert ckptc("run", plan, "--output", str(tmp_path / "out")).returncode == 0
    assert same(tmp_path / "out", local)  # of the commit that the plan names, whatever `main` is now
    refused = ckptc("run", plan, "--output", str(tmp_path / "newest"), "--source", "hf://org/model")
    assert refused.returncode == 1 and "error[source-changed]" in refused.stderr
    downloaded = ckptc("run", plan, "--output", str(tmp_path / "downloaded"), "--source", str(CASE.hf))
    assert downloaded.returncode == 0 and same(tmp_path / "downloaded", local)
    changed = ckptc("run", plan, "--output", str(tmp_path / "changed"), "--source", str(tmp_path / "other"))
    assert changed.returncode == 1 and "error[source-changed]" in changed.stderr


def test_files_in_the_hubs_cache_are_read_there(ckptc: Ckptc, hub: Hub, tmp_path: Path, local: Path) -> None:
    first = ckptc("convert", *MODEL, "--source", "hf://org/model", "--output", str(tmp_path / "first"), "--cache")
    assert first.returncode == 0 and "fetches model-00001-of-00002.safetensors" in first.stderr
    hub.requests.clear()
    assert ckptc("convert", *MODEL, "--source", "hf://org/model", "--output", str(tmp_path / "second")).returncode == 0
    assert [r.path for r in hub.requests if r.path.startswith("/storage/")] == []
    assert same(tmp_path / "first", local) and same(tmp_path / "second", local)


def test_a_killed_run_goes_on(ckptc: Ckptc, hub: Hub, tmp_path: Path, local: Path) -> None:
    plan, output = str(tmp_path / "plan.json"), tmp_path / "out"
    assert ckptc("compile", *MODEL, "--source", "hf://org/model", "-o", plan, "--memory", "1MiB").returncode == 0
    hub.faults = Faults(latency=0.05)
    env = {**os.environ, **hub.environment(tmp_path / "home"), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "ckptc", "run", plan, "--output", str(output), "--quiet", "--jobs", "1"]
    with subprocess.Popen(command, env=env, stderr=subprocess.PIPE) as process:
        while process.poll() is None and sum(hub.sent.values()) < 60_000:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert not (output / "0").exists()
    hub.faults = Faults()
    assert ckptc("run", plan, "--output", str(output)).returncode == 0
    assert same(output, local)


@pytest.mark.parametrize("seed", range(int(os.environ.get("CKPTC_HUB_FAULTS", "6"))))
def test_whatever_the_network_does_the_output_is_right_or_refused(
    seed: int,
    hub: Hub,
    tmp_path: Path,
    local: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(hub_ranges, "FIRST_WAIT", 0.001)
    monkeypatch.setattr(hub_ranges, "PIECE", 10_000)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    point_at(hub, tmp_path / "home", monkeypatch)
    chance = random.Random(seed)
    kinds = ("broken", "short", "busy", "failing", "expired")
    shares = {kind: chance.choice((0.0, 0.02, 0.1, 0.3)) for kind in kinds}
    plan, output = str(tmp_path / "plan.json"), tmp_path / "out"
    assert run(["compile", *MODEL, "--source", "hf://org/model", "-o", plan]) == 0
    hub.faults = Faults(**shares, retry_after=0.001, seed=seed)
    for _ in range(5):  # each goes on from where the one before gave up
        code = run(["run", plan, "--output", str(output), "--quiet", "--jobs", "1"])
        assert code in (0, 1)
        if code == 0:
            break
        assert re.search(r"error\[hub-(refused|unreachable)\]", capsys.readouterr().err)
    else:
        assert not (output / "0").exists()
        return
    assert same(output, local)


def sent(hub: Hub, name: str) -> Path:
    """The files of a repository's newest commit."""
    return hub.repos[name].commits[hub.repos[name].revisions["main"]]


def test_an_export_becomes_a_commit_and_leaves_nothing_here(
    ckptc: Ckptc, hub: Hub, tmp_path: Path, local: Path
) -> None:
    out = "hf://me/exported"
    assert "error[hub-no-token]" in ckptc("export", "--source", str(local), "--output", out).stderr
    refused = ckptc("export", "--source", str(local), "--output", out, HF_TOKEN="hf_outsider")
    assert refused.returncode == 1 and "me/exported" not in hub.repos
    done = ckptc("export", "--source", str(local), "--output", out, HF_TOKEN="hf_good")
    assert done.returncode == 0, done.stderr
    assert hub.repos["me/exported"].private and hub.repos["me/exported"].revisions["main"] in done.stdout
    assert run(["diff", str(sent(hub, "me/exported")), str(CASE.hf)]) == 0
    written = (sent(hub, "me/exported") / "README.md").read_text()
    assert "bit for bit" in written and "sha256:" in written and str(tmp_path) not in written
    assert [p for p in (tmp_path / "cache" / "ckptc" / "uploads").rglob("*") if p.is_file()] == []


def test_weights_on_the_hub_are_replaced_only_when_told_to(ckptc: Ckptc, hub: Hub, local: Path) -> None:
    export = ("export", "--source", str(local), "--output", "hf://me/exported")
    assert ckptc(*export, "--public", HF_TOKEN="hf_good").returncode == 0 and not hub.repos["me/exported"].private
    (sent(hub, "me/exported") / "README.md").write_text("written by people")
    (sent(hub, "me/exported") / "model-00009-of-00009.safetensors").write_bytes(b"stale")
    refused = ckptc(*export, HF_TOKEN="hf_good")
    assert refused.returncode == 1 and "error[output-exists]" in refused.stderr
    assert ckptc(*export, "--force", HF_TOKEN="hf_good").returncode == 0
    assert (sent(hub, "me/exported") / "README.md").read_text() == "written by people"
    assert not (sent(hub, "me/exported") / "model-00009-of-00009.safetensors").exists()
    assert run(["diff", str(sent(hub, "me/exported")), str(CASE.hf)]) == 0


def test_an_upload_that_breaks_goes_on(ckptc: Ckptc, hub: Hub, local: Path) -> None:
    export = ("export", "--source", str(local), "--output", "hf://me/exported")
    hub.faults = Faults(before=lambda method, path: 400 if "/commit/" in path else None)
    broken = ckptc(*export, HF_TOKEN="hf_good")
    assert (
        broken.returncode == 1
        and "error[hub-refused]" in broken.stderr
        and not list(sent(hub, "me/exported").iterdir())
    )
    hub.faults, before = Faults(), len(hub.requests)
    assert ckptc(*export, HF_TOKEN="hf_good").returncode == 0
    assert not any(r.path.startswith("/upload/") for r in hub.requests[before:])  # the Hub had the weights already
    assert run(["diff", str(sent(hub, "me/exported")), str(CASE.hf)]) == 0


def test_without_a_place_for_files_on_their_way_nothing_is_made(
    monkeypatch: pytest.MonkeyPatch, hub: Hub, local: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    point_at(hub, tmp_path, monkeypatch, token="hf_good")
    monkeypatch.setattr("ckptc.storage.sink.hub.cache_home", lambda: None)
    assert run(["export", "--source", str(local), "--output", "hf://me/exported", "--quiet"]) == 1
    assert "error[no-cache]" in capsys.readouterr().err and "me/exported" not in hub.repos
