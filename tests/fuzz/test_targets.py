"""The readers of files in Python, on inputs that hypothesis makes up, and on those that once broke them."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies

import snapstone as ss
from durability import hostile
from fuzz import limits
from fuzz.targets import TARGETS
from snapstone.dcp import stock
from snapstone.integrations import numbered, packing, publication

SEED = 90809
EXAMPLES = {"checkpoint": 40, "report": 15}  # the slow ones; `make fuzz` runs many more of all


def run_in_time(name: str, data: bytes) -> None:
    error = hostile.in_time(lambda: TARGETS[name](data), name, limits.cpu_seconds_max(name))
    assert error is None, error


@pytest.mark.parametrize("name", list(TARGETS))
def test_a_reader_of_files_takes_any_document(name: str) -> None:
    """Right, or one of its own errors, and in the time that is promised."""

    @hypothesis.settings(
        max_examples=EXAMPLES.get(name, 120),
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.seed(SEED)
    @hypothesis.given(strategies.binary(min_size=4, max_size=150))
    def run(data: bytes) -> None:
        run_in_time(name, data)

    run()


def pickles() -> dict[str, bytes]:
    proto = b"\x80\x04"
    return {
        "memo of 2^31 places": proto + b"Nr\xff\xff\xff\x7f.",
        "memo of 2^26 places": proto + b"Nr\0\0\0\x04.",
        "memo by a line": b"Np99999999999\n.",
        "bytearray of exabytes": proto + b"\x96" + b"\x7f" * 8 + b".",
        "string of gigabytes": proto + b"B\xff\xff\xff\x7f.",
        "text of exabytes": proto + b"\x8d" + b"\x7f" * 8 + b".",
        "integer of gigabytes": proto + b"\x8b\xff\xff\xff\x7f.",
        "frame of exabytes": proto + b"\x95" + b"\xff" * 8 + b"N.",
        "a class that is not there": proto + b"ctorch\nnothing\n.",
        "name that is not utf-8": proto + b"ctorch\n\xff\n.",
        "extension": proto + b"\x82\x01.",
        "layout that is none": proto + b"ctorch.serialization\n_get_layout\n(Vnone\ntR.",
        "format that is none": proto
        + b"ctorch.distributed.checkpoint.metadata\nTensorProperties\n)\x81(K\x01K\x02K\x03K\x04K\x05tb.",
        "state of another length": proto + b"ctorch.distributed.checkpoint.metadata\nTensorProperties\n)\x81(K\x01tb.",
        "another object": pickle.dumps({"a": 1}),
        "nested": proto + b"(" * 100_000 + b".",
        "unknown opcode": proto + b"\xfe.",
        "no end": proto + b"N",
        "empty": b"",
    }


def test_metadata_of_other_writers_takes_memory_in_proportion_and_only_corrupt_errors_come_out(tmp_path: Path) -> None:
    hostile.skip_without_memory_counter()
    for name, data in pickles().items():
        (tmp_path / ".metadata").write_bytes(data)
        error = hostile.limited(lambda path: stock.StockReader(str(path)).read_metadata(), tmp_path)
        assert isinstance(error, ss.CorruptCheckpointError), name
        assert "not the metadata of a checkpoint" in str(error), name


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_claims_of_sound_pickles_fit(protocol: int) -> None:
    many = {f"name {i}": [i, -i, float(i), "x" * (i % 300), b"y" * (i % 300), 1 << i, bytearray(i)] for i in range(700)}
    stock.check_claims(pickle.dumps(many, protocol=protocol))


def test_an_opcode_that_no_pickle_has_is_named() -> None:
    with pytest.raises(pickle.UnpicklingError, match="invalid opcode 0xfe"):
        stock.check_claims(pickles()["unknown opcode"])


MARKERS: dict[str, object] = {
    "no files": {"version": 1, "checkpoints": []},
    "files of a number": {"version": 1, "checkpoints": [], "files": 5},
    "a file of three facts": {"version": 1, "checkpoints": [], "files": {"a": [1, "x", 2]}},
    "a file of no facts": {"version": 1, "checkpoints": [], "files": {"a": 0.5}},
    "checkpoints of a number": {"version": 1, "checkpoints": 5, "files": {}},
    "a checkpoint of an object": {"version": 1, "checkpoints": [{}], "files": {}},
    "a checkpoint outside": {"version": 1, "checkpoints": ["../x"], "files": {}},
    "a file outside": {"version": 1, "checkpoints": [], "files": {"/etc/passwd": [1, "x"]}},
    "a file with a zero in its name": {"version": 1, "checkpoints": [], "files": {"a\0b": [1, "x"]}},
    "of another version": {"version": 2, "checkpoints": [], "files": {}},
    "a size that is a text": {"version": 1, "checkpoints": [], "files": {"a": ["1", "x"]}},
    "a file that no file system takes": {"version": 1, "checkpoints": [], "files": {"\ud800": [1, "x"]}},
}


@pytest.mark.parametrize("name", list(MARKERS))
def test_markers_that_nobody_sealed_are_a_problem(tmp_path: Path, name: str) -> None:
    body = MARKERS[name]
    document = {"body": body, "xxh128": publication._digest_of(body)}  # type: ignore[arg-type]
    (tmp_path / publication.MARKER_NAME).write_text(json.dumps(document))
    assert "not the marker of a complete checkpoint" in the_problem(tmp_path)
    (tmp_path / publication.MARKER_NAME).write_text('{"body":' * 100_000)
    assert the_problem(tmp_path)


def the_problem(directory: Path) -> str:
    found: list[str] = []
    hostile.in_time(lambda: found.extend(publication.problems(str(directory), "quick")), "marker")
    assert len(set(found)) == 1
    return found[0]


@pytest.mark.parametrize(
    "header",
    [
        b'{"a":{"data_offsets":[]}}',
        b'{"a":{"data_offsets":[0,null]}}',
        b'{"a":{"data_offsets":[0,1e999]}}',
        b"[" * 5000,
    ],
    ids=["no end", "null", "infinite", "deep"],
)
def test_heads_of_weights_that_are_none_are_not_whole(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    whole: list[bool] = []
    hostile.in_time(lambda: whole.append(numbered._is_whole(str(path))), "head")
    assert not any(whole)


def test_a_key_that_no_dict_can_have_is_corrupt() -> None:
    with pytest.raises(ss.CorruptCheckpointError, match="a key that no dict can have"):
        packing.unpack('{"x": {"$pairs": [[[1], 2]]}}', {})


CORPUS = Path(__file__).with_name("corpus")


def found_before() -> list[Path]:
    return sorted(CORPUS.glob("*/*"))


@pytest.mark.parametrize("path", found_before(), ids=lambda path: f"{path.parent.name}-{path.name}")
def test_what_fuzzing_found_stays_fixed(path: Path) -> None:
    run_in_time(path.parent.name, path.read_bytes())
