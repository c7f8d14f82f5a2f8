"""Objects as a checkpoint's files: how chunks are gathered, and what is deleted, in which order.

On TensorStore's `file` driver, whose files are objects like any other store's; `tests/run/test_remote.py` has Google's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import pytest

from ckptc.diagnostics import InputError
from ckptc.storage.checkpoint import orbax_writer as orbax
from ckptc.storage.checkpoint.orbax_writer import ItemsWriter
from ckptc.storage.formats.orbax_metadata import ArraySpec
from ckptc.storage.sink.bucket import ObjectData, ObjectStore, refused

SPEC = ArraySpec(("params", "params", "w"), (10, 100), "uint8", (1, 100), (1, 1))


def store(path: Path, object_bytes: int = 250) -> ObjectStore:
    return ObjectStore({"driver": "file", "path": f"{path}/"}, "store://x", object_bytes)


def files(path: Path) -> dict[str, bytes]:
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


class Slow(ObjectStore):
    """Objects are whole when `finish` is told so."""

    def __init__(self) -> None:
        super().__init__({"driver": "memory", "path": ""}, "store://x", 250)
        self.begun, self.ended = list[tuple[str, int]](), list[str]()

    def start(self, name: str, value: bytes) -> Any:
        self.begun.append((name.rpartition("/")[2], len(value)))
        return self

    def done(self) -> bool:
        return False

    def finish(self, name: str, future: Any) -> None:
        self.ended.append(name.rpartition("/")[2])


def test_chunks_are_gathered_and_one_object_at_most_is_under_way() -> None:
    slow = Slow()
    data = ObjectData(slow, "items/ocdbt.process_0/d/", [])
    assert [data.append(memoryview(bytes(100))) for _ in range(5)] == [(0, 0), (0, 100), (1, 0), (1, 100), (2, 0)]
    assert [n for _, n in slow.begun] == [200, 200] and slow.ended == data.files[:1] and data.whole == 1
    assert data.append(memoryview(bytes(1000))) == (3, 0)  # larger than an object should be
    assert [n for _, n in slow.begun] == [200, 200, 100, 1000] and data.whole == 3
    data.sync()
    assert [name for name, _ in slow.begun] == slow.ended == data.files and data.whole == 4
    assert data.close() and len(slow.begun) == 4


def test_what_was_written_is_a_checkpoint(tmp_path: Path) -> None:
    place, values = store(tmp_path), np.arange(1000, dtype=np.uint8).reshape(10, 100)
    for process in range(2):
        writer = ItemsWriter(place, [SPEC], process=process)
        for k in range(process, 10, 2):
            writer.write_chunk(0, (k, 0), values[k : k + 1])
        writer.close()
    orbax.finish(place, [SPEC], custom_metadata={}, final="store://x", writers=[0, 1])
    assert (
        sorted(len(content) for content in files(tmp_path).values() if len(content) in (100, 200))
        == [100] * 2 + [200] * 4
    )
    restored = ocp.StandardCheckpointer().restore(tmp_path / "items")["params"]["params"]["w"]
    assert np.array_equal(restored, values)


def test_a_writer_that_goes_on_adds_to_the_objects_that_are_there(tmp_path: Path) -> None:
    first = ItemsWriter(store(tmp_path), [SPEC])
    for k in range(3):
        first.write_chunk(0, (k, 0), memoryview(bytes([k] * 100)))
    first.sync()
    second = ItemsWriter(store(tmp_path), [SPEC], resume=first.state())
    for k in range(3, 10):
        second.write_chunk(0, (k, 0), memoryview(bytes([k] * 100)))
    second.close()
    assert second.data.files[:2] == first.data.files and len(second.data.files) == 6
    orbax.finish(store(tmp_path), [SPEC], custom_metadata={}, final="store://x")
    assert (tmp_path / "commit_success.txt").exists()


def test_an_object_that_is_gone_is_an_error(tmp_path: Path) -> None:
    writer = ItemsWriter(store(tmp_path), [SPEC])
    for k in range(10):
        writer.write_chunk(0, (k, 0), memoryview(bytes([k] * 100)))
    writer.close()
    (tmp_path / "items/ocdbt.process_0/d" / writer.data.files[2]).unlink()
    with pytest.raises(RuntimeError, match=f"{writer.data.files[2]} is not there"):
        orbax.finish(store(tmp_path), [SPEC], custom_metadata={}, final="store://x")
    assert not (tmp_path / "commit_success.txt").exists()


@pytest.mark.parametrize("looks", [0, 1])
def test_what_must_not_be_finished_is_looked_for_before_anything_goes_and_before_the_markers(
    tmp_path: Path, looks: int
) -> None:
    place, count = store(tmp_path), iter(range(3))
    writer = ItemsWriter(place, [SPEC])
    for k in range(10):
        writer.write_chunk(0, (k, 0), memoryview(bytes([k] * 100)))
    writer.close()
    for name in ("commit_success.txt", "items/other"):
        place.write(name, b"x")
    before = files(tmp_path)

    def check() -> None:
        if next(count) == looks:
            raise KeyError("not now")

    with pytest.raises(KeyError, match="not now"):
        orbax.finish(place, [SPEC], custom_metadata={}, final="store://x", check=check)
    after = files(tmp_path)
    if looks == 0:
        assert after == before
    else:
        assert "items/manifest.ocdbt" in after and "items/other" not in after
        assert [name for name in after if name.endswith(("commit_success.txt", "_CHECKPOINT_METADATA"))] == []


def test_an_older_checkpoint_is_unfinished_before_anything_else_of_it_goes(tmp_path: Path) -> None:
    place = store(tmp_path)
    older = ["commit_success.txt", "_CHECKPOINT_METADATA", "items/commit_success.txt", "items/_METADATA", "items/d/1"]
    for name in [*older, "items/ocdbt.process_0/d/kept", "default/commit_success.txt"]:
        place.write(name, b"x")
    deleted: list[str] = []
    delete = place.delete

    def note(names: Any) -> None:
        deleted.extend(names)
        delete(names)

    place.delete = note  # type: ignore[method-assign]
    place.supersede({"items/ocdbt.process_0/d/kept"})
    assert deleted[:4] == [*older[:2], "default/commit_success.txt", "items/commit_success.txt"]
    assert list(files(tmp_path)) == ["items/ocdbt.process_0/d/kept"]


def test_names_are_those_below_a_name_and_no_others(tmp_path: Path) -> None:
    place = store(tmp_path / "a")
    for name in ("0/x", "00/x", "0.x", "0/items/y", "/z"):
        (tmp_path / f"a/{name}").parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"a/{name}").write_bytes(b"")
    (tmp_path / "ab").mkdir()
    (tmp_path / "ab" / "0").write_bytes(b"")
    assert place.names("0/") == ["0/items/y", "0/x"] and place.below("0/").names("") == ["items/y", "x"]
    assert place.below("0/").read("x") == b"" and place.below("0/").read("q") is None
    assert place.holds("0/x", 9) and not place.holds("0/z", 0)


def test_the_stores_own_words_are_said() -> None:
    error = refused("write to gs://b/x", "PERMISSION_DENIED: you may not")
    assert str(error) == "output-store: cannot write to gs://b/x: PERMISSION_DENIED: you may not"
    assert "gcloud auth application-default login" in str(error.diagnostics[0].help)
    with pytest.raises(InputError, match=r"output-store: cannot open store://x: .*no-such-driver"):
        ObjectStore({"driver": "no-such-driver", "path": ""}, "store://x", 1).probe()


def test_a_store_that_is_silent_is_given_up(tmp_path: Path) -> None:
    class Silent:
        def result(self, timeout: float) -> None:
            raise TimeoutError

    with pytest.raises(InputError, match="output-store: cannot write store://x/a: no answer within 300 seconds"):
        store(tmp_path).finish("a", Silent())
