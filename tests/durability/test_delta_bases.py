"""Bases that are missing, damaged or elsewhere, and damage that a base and its deltas share.

Invariants:
  1. A base that was named and has no readable manifest is the typed error that a load raises; nothing is left behind.
  2. Whatever else is wrong with a base: the save is a full one, with a warning that names it, and the checkpoint right.
  3. base="auto" takes the newest checkpoint with an intact manifest; without any the save is a full one.
  4. A wrong byte in a shared file is reported by every checkpoint that uses the chunk, by the name that the file has
     there, and by no other checkpoint.
"""

from __future__ import annotations

import errno
import os
import resource
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import snapstone as ss
from durability import small
from durability.based import NEXT, assert_full, cut, data_of_base, document, flip, forget, names, replace, save
from durability.delta import rewrite_manifest
from snapstone import manifest

# A base that was named and cannot be read ---------------------------------------------------------------------------


def newer(base: Path) -> None:
    rewrite_manifest(base, lambda facts: facts.update(format_version="2.0"))


def staging_name(base: Path) -> Path:
    return base.rename(base.with_name(f".staging-{'a' * 32}"))


def trash_name(base: Path) -> Path:
    return base.rename(base.with_name(f".trash-{'a' * 32}"))


REFUSED: dict[str, tuple[type[ss.CheckpointError], Callable[[Path], Any]]] = {
    "missing": (ss.CheckpointNotFoundError, shutil.rmtree),
    "below a file": (ss.CheckpointNotFoundError, lambda base: base / "MANIFEST.json" / "checkpoint"),
    "a file": (ss.IncompleteCheckpointError, lambda base: base / "MANIFEST.json"),
    "no manifest": (ss.IncompleteCheckpointError, lambda base: (base / "MANIFEST.json").unlink()),
    "no digest": (ss.IncompleteCheckpointError, lambda base: (base / "MANIFEST.xxh128").unlink()),
    "an empty directory": (ss.IncompleteCheckpointError, lambda base: (shutil.rmtree(base), base.mkdir())[2:]),
    "never committed": (ss.IncompleteCheckpointError, staging_name),
    "being removed": (ss.IncompleteCheckpointError, trash_name),
    "a flipped byte": (ss.CorruptCheckpointError, lambda base: flip(base / "MANIFEST.json", 100)),
    "a cut manifest": (ss.CorruptCheckpointError, lambda base: cut(base / "MANIFEST.json")),
    "a cut digest": (ss.CorruptCheckpointError, lambda base: cut(base / "MANIFEST.xxh128")),
    "newer": (ss.IncompatibleCheckpointError, newer),
}


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("kind", list(REFUSED))
def test_a_base_that_cannot_be_read_is_a_typed_error_and_leaves_nothing(
    run: Path, kind: str, asynchronous: bool
) -> None:
    error, spoil = REFUSED[kind]
    base = run.parent / "bases" / "previous"  # in another run: nothing there is reaped
    shutil.copytree(run / "previous", base)
    base = spoil(base) or base
    before = names(run)
    with pytest.raises(error) as caught:
        save(run, base=base, asynchronous=asynchronous)
    assert type(caught.value) is error
    assert str(caught.value.path).startswith(str(base))
    assert names(run) == before
    assert small.open_files(run.parent) == []
    small.assert_slots_free()
    save(run)
    small.assert_holds(run / "next", NEXT)


@pytest.mark.parametrize(("base", "error"), [("", ValueError), (7, TypeError), (b"base", (TypeError, ValueError))])
def test_what_is_no_path_is_refused(run: Path, base: Any, error: Any) -> None:
    before = names(run)
    with pytest.raises(error):
        save(run, base=base)
    assert names(run) == before


# A base whose manifest is right and that cannot be used ---------------------------------------------------------------


def linked_in_base(base: Path) -> Path:
    (file,) = (base / "base").iterdir()
    return file


def link_in_place_of(file: Path) -> None:
    elsewhere = file.rename(file.parents[2] / f"elsewhere-{file.name}")
    file.symlink_to(elsewhere)


def fifo_in_place_of(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def directory_in_place_of(file: Path) -> None:
    file.unlink()
    file.mkdir()


def base_is_a_link(base: Path) -> None:
    (base / "base").rename(base.parent / "elsewhere")
    (base / "base").symlink_to(base.parent / "elsewhere")


SPOILT: dict[str, Callable[[Path], Any]] = {
    "a flipped byte in the index": lambda base: flip(base / "rank-00000.index", 50),
    "a cut index": lambda base: cut(base / "rank-00000.index"),
    "no index": lambda base: (base / "rank-00000.index").unlink(),
    "an index that is a FIFO": lambda base: fifo_in_place_of(base / "rank-00000.index"),
    "a cut data file": lambda base: cut(data_of_base(base), 4096),
    "a longer data file": lambda base: replace(data_of_base(base), data_of_base(base).read_bytes() + bytes(4096)),
    "no data file": lambda base: data_of_base(base).unlink(),
    "a data file that is a link": lambda base: link_in_place_of(data_of_base(base)),
    "a data file that is a FIFO": lambda base: fifo_in_place_of(data_of_base(base)),
    "a data file that is a directory": lambda base: directory_in_place_of(data_of_base(base)),
    "a cut shared file": lambda base: cut(linked_in_base(base)),
    "no shared file": lambda base: linked_in_base(base).unlink(),
    "a shared file that is a link": lambda base: link_in_place_of(linked_in_base(base)),
    "a shared file that is a FIFO": lambda base: fifo_in_place_of(linked_in_base(base)),
    "no directory of shared files": lambda base: shutil.rmtree(base / "base"),
    "a directory of shared files that is a link": base_is_a_link,
}


@pytest.mark.parametrize("kind", list(SPOILT))
def test_a_base_that_cannot_be_used_makes_the_save_a_full_one(run: Path, kind: str) -> None:
    SPOILT[kind](run / "previous")
    assert_full(run, run / "previous")
    small.assert_holds(run / "origin", small.ORIGIN)
    later = save(run, "11124", checkpoint_id=run / "later", base=run / "next")
    assert later.stats["unchanged_chunks"] == 4


def test_a_base_on_another_file_system_makes_the_save_a_full_one(run: Path, tmp_path: Path) -> None:
    if run.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("one file system only")
    other = tmp_path / "run"
    other.mkdir()
    text = assert_full(other, run / "previous", base=run / "previous")
    assert os.strerror(errno.EXDEV) in text, text
    small.assert_holds(run / "previous", small.PREVIOUS)


def test_a_base_in_another_run_is_as_good(run: Path) -> None:
    other = run.with_name("other")
    saved = save(other, base=run / "previous")
    assert saved.stats["unchanged_chunks"] == 4
    assert document(other / "next").base == manifest.Base(document(run / "previous").save_id, None, "previous", 2)
    shutil.rmtree(run)
    small.assert_holds(other / "next", NEXT)


def test_a_base_with_a_link_for_its_name_is_as_good(run: Path) -> None:
    (run / "latest").symlink_to("previous")
    assert save(run, base=run / "latest").stats["unchanged_chunks"] == 4
    shutil.rmtree(run / "previous")
    small.assert_holds(run / "next", NEXT)


def test_a_copy_of_a_checkpoint_is_as_good_a_base_and_gives_its_own_files(run: Path) -> None:
    copy = Path(shutil.copytree(run / "previous", run / "copy"))
    forget()
    save(run, base=copy)
    inodes = {file.stat().st_ino for file in copy.rglob("*") if file.is_file()}
    assert {file.stat().st_ino for file in (run / "next" / "base").iterdir()} <= inodes
    shutil.rmtree(copy)
    small.assert_holds(run / "next", NEXT)


def test_a_base_without_write_permission_is_as_good(run: Path) -> None:
    for path in [*(run / "previous").rglob("*"), run / "previous"]:
        path.chmod(0o500 if path.is_dir() else 0o400)
    assert save(run).stats["unchanged_chunks"] == 4
    (run / "previous").chmod(0o700)
    (run / "previous" / "base").chmod(0o700)
    shutil.rmtree(run / "previous")
    small.assert_holds(run / "next", NEXT)
    ss.save(small.layers("99999"), checkpoint_id=run / "next", overwrite=True)
    small.assert_holds(run / "next", "99999")


def test_a_base_that_is_the_target_needs_overwrite(run: Path) -> None:
    before = small.tree(run)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        save(run, checkpoint_id=run / "previous")
    assert small.tree(run) == before
    save(run, checkpoint_id=run / "previous", overwrite=True)
    assert document(run / "previous").base is not None
    small.assert_holds(run / "previous", NEXT)
    assert names(run) == ["origin", "previous"]


def test_a_base_replaces_itself_again_and_again(run: Path) -> None:
    for number in range(12):
        seeds = f"11{number % 3}{number % 2}{number % 7}"
        save(
            run, seeds, checkpoint_id=run / "previous", overwrite=True, base="auto" if number % 2 else run / "previous"
        )
        small.assert_holds(run / "previous", seeds)
    assert names(run) == ["origin", "previous"]
    assert document(run / "previous").base is not None


# "auto" ---------------------------------------------------------------------------------------------------------------


def newest(*paths: Path) -> None:
    """The manifests have these ages, the last one is the newest."""
    for number, path in enumerate(paths):
        os.utime(path / "MANIFEST.json", (1_700_000_000 + number,) * 2)


def auto(run: Path, expected: str | None, skipped: int = 0) -> None:
    """Saves with base="auto", which takes `expected`, after `skipped` warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        save(run, base="auto")
    assert [str(one.message).startswith("no base for a delta save") for one in caught] == [True] * skipped
    base = document(run / "next").base
    assert (None if base is None else base.name) == expected
    small.assert_holds(run / "next", NEXT)


def test_auto_takes_the_newest_not_the_last_by_name(run: Path) -> None:
    newest(run / "previous", run / "origin")
    auto(run, "origin")


@pytest.mark.parametrize("kind", ["no digest", "a flipped byte", "a cut manifest", "a cut digest", "newer"])
def test_auto_passes_damaged_checkpoints_over_with_a_warning(run: Path, kind: str) -> None:
    REFUSED[kind][1](run / "previous")
    newest(run / "origin", run / "previous")
    auto(run, "origin", 1)


def test_auto_with_nothing_but_damage_is_a_full_save(run: Path) -> None:
    for name in ("origin", "previous"):
        flip(run / name / "MANIFEST.json", 100)
    auto(run, None, 2)


def test_auto_without_a_checkpoint_is_a_full_save_without_a_warning(directory: Path) -> None:
    run = directory / "run"
    auto(run, None)
    (run / "next").rename(directory / "elsewhere")
    (run / "notes.txt").write_text("no checkpoint")
    (run / "empty").mkdir()
    (run / "half").mkdir()
    (run / "half" / "rank-00000.data").write_bytes(bytes(4096))
    (run / "dangling").symlink_to("nowhere")
    shutil.copytree(directory / "elsewhere", run / f".staging-{'a' * 32}")
    shutil.copytree(directory / "elsewhere", run / ".hidden")
    auto(run, None)


def test_auto_does_not_pass_over_a_base_that_cannot_be_used(run: Path) -> None:
    """One whose manifest is right is the base; that its data is gone is found later, and said."""
    newest(run / "origin", run / "previous")
    data_of_base(run / "previous").unlink()
    assert_full(run, run / "previous", base="auto")


def test_every_nth_save_is_a_full_one(run: Path) -> None:
    depths = []
    for step in range(7):
        save(run, f"1112{step}", checkpoint_id=run / f"step-{step}", base="auto", full_every=3)
        base = document(run / f"step-{step}").base
        depths.append(base.depth if base else 0)
    assert depths == [2, 0, 1, 2, 0, 1, 2]


# Damage in what is shared ---------------------------------------------------------------------------------------------


def flip_in_place(file: Path, offset: int) -> None:
    """As a device does it: in every checkpoint that has the file."""
    with file.open("r+b") as opened:
        opened.seek(offset)
        byte = opened.read(1)[0]
        opened.seek(offset)
        opened.write(bytes([byte ^ 1]))


def test_a_flipped_bit_is_reported_by_all_that_use_it_and_by_no_other(run: Path) -> None:
    save(run, NEXT)
    save(run, "14422", checkpoint_id=run / "other", base=run / "previous")  # has no use for layers 1 and 2
    ss.save(small.layers("11123"), checkpoint_id=run / "alone")
    origin = document(run / "origin").save_id
    flip_in_place(run / "origin" / "rank-00000.data", 65536 + 9)
    expected = {
        "origin": "rank-00000.data",
        "previous": f"base/{origin}.rank-00000.data",
        "next": f"base/{origin}.rank-00000.data",
    }
    for name, file in expected.items():
        (problem,) = ss.verify(run / name).problems
        assert str(run / name / file) in problem
        assert "layer1" in problem
        with pytest.raises(ss.CorruptCheckpointError, match="digest mismatch") as caught:
            small.load(run / name, NEXT)
        assert (caught.value.path, caught.value.tensor) == (str(run / name / file), "layer1")
    small.assert_holds(run / "other", "14422")
    small.assert_holds(run / "alone", "11123")


def test_a_full_save_after_damage_is_whole_and_so_are_its_deltas(run: Path) -> None:
    """A delta save takes over what its base has without reading it; a full one does not."""
    flip_in_place(run / "origin" / "rank-00000.data", 9)
    save(run)
    assert not ss.verify(run / "next")
    save(run, checkpoint_id=run / "full", base=None)
    save(run, "11124", checkpoint_id=run / "later", base="auto")
    small.assert_holds(run / "full", NEXT)
    small.assert_holds(run / "later", "11124")


# Many -----------------------------------------------------------------------------------------------------------------


def test_a_run_of_many_deltas_needs_few_descriptors_and_few_bytes(directory: Path, small_chunks: None) -> None:
    """Each save leaves a file that the next ones use: without a limit the last one could not be opened any more."""
    run, saves = directory / "run", 120
    state = {f"layer{number}": torch.full((16_384,), float(number)) for number in range(saves)}
    ss.save(state, checkpoint_id=run / "0")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    written = 0
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 60, hard))
    try:
        for number in range(saves):
            state[f"layer{number}"] += 1
            saved = ss.save(state, checkpoint_id=run / f"{number + 1}", base=run / f"{number}")
            shutil.rmtree(run / f"{number}")
            written += saved.own_nbytes
            assert len(document(Path(saved.path)).shared) <= 32
        target = {name: torch.zeros_like(value) for name, value in state.items()}
        ss.load(target, checkpoint_id=run / f"{saves}")
        assert ss.verify(run / f"{saves}")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert small.bits(target) == small.bits(state)
    assert written <= 5 * saves * 65536, "chunks are carried a few times, not with every save"
