"""Random generators continue where they were, and go on in a stated way on another number of ranks."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

import snapstone as ss


def draw() -> tuple[object, ...]:
    """From every generator, so that each is in the middle of what it has buffered."""
    return random.random(), random.gauss(0, 1), np.random.standard_normal(), np.random.rand(), torch.rand(3).tolist()


@pytest.fixture(autouse=True)
def keep_generators() -> object:
    saved = ss.capture_rng()
    yield
    ss.restore_rng(saved)


def test_sequences_continue_after_a_checkpoint(tmp_path: Path) -> None:
    draw()
    ss.save({"rng": ss.capture_rng()}, checkpoint_id=tmp_path / "c")
    expected = [draw(), draw()]
    state = {"rng": ss.capture_rng()}
    ss.load(state, checkpoint_id=tmp_path / "c")
    assert ss.restore_rng(state["rng"])
    assert [draw(), draw()] == expected


def test_each_rank_has_its_own() -> None:
    draw()
    both = ss.capture_rng(rank=0, world_size=2)
    expected_of_0 = draw()
    both |= ss.capture_rng(rank=1, world_size=2)
    expected_of_1 = draw()
    assert sorted(both) == ["rank-00000-of-00002", "rank-00001-of-00002"]
    assert ss.restore_rng(both, rank=1, world_size=2)
    assert draw() == expected_of_1
    assert ss.restore_rng(both, rank=0, world_size=2)
    assert draw() == expected_of_0


def test_on_another_number_of_ranks_generators_are_seeded_from_the_saved_ones() -> None:
    saved = ss.capture_rng(rank=0, world_size=2) | ss.capture_rng(rank=1, world_size=2)
    drawn = {}
    for rank in (0, 1, 2, 1):
        if rank == 0:
            with pytest.warns(UserWarning, match="2 other ranks"):
                assert not ss.restore_rng(saved, rank=rank, world_size=3)
        else:
            assert not ss.restore_rng(saved, rank=rank, world_size=3)
        assert drawn.setdefault(rank, value := draw()) == value
    assert len({str(value) for value in drawn.values()}) == 3


def test_generators_of_another_number_of_ranks_can_be_left_alone_or_refused() -> None:
    saved = ss.capture_rng(rank=0, world_size=2)
    draw()
    before = ss.capture_rng()
    assert not ss.restore_rng(saved, on_change="keep")
    expected = draw()
    ss.restore_rng(before)
    assert draw() == expected
    with pytest.raises(ss.IncompatibleCheckpointError, match="none of rank-00000-of-00001"):
        ss.restore_rng(saved, on_change="raise")
    with pytest.raises(ss.IncompatibleCheckpointError, match="no random generators"):
        ss.restore_rng({"model": 1})
