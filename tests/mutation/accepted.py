"""What the search cannot know, by (file:function or file, begin of the line): checks whose absence no test notices,
with the reason why they stay; and calls that nearly every test reaches, with the test about them, which is asked first.
"""

from __future__ import annotations

__all__ = ["ACCEPTED", "NOTICED_BY"]

ZSTD = "csrc/codec/zstd_frame.cc"

ACCEPTED: tuple[tuple[str, str, str], ...] = (
    (ZSTD, 'refuse("reserved bit in', "libzstd refuses it as well; this says why"),
    (ZSTD, "refuse(ZSTD_getErrorName", "an error is no size, which the next check refuses; this says why"),
    (ZSTD, "void decompress_zstd_frame", "of builds without zstd"),
    (ZSTD, "std::optional<std::uint64_t> compress_zstd_frame", "of builds without zstd"),
    (ZSTD, "throw std::bad_alloc", "no memory for a context of libzstd, which has an allocator of its own"),
    (ZSTD, "throw std::invalid_argument", "constants of the engine, which every libzstd knows"),
    (
        "csrc/codec/digest.cc",
        "throw std::bad_alloc",
        "no memory for a state of libxxhash, which has an allocator of its own",
    ),
    ("csrc/io/rung.cc", 'return "io_uring_setup: built without', "of builds without liburing"),
    ("csrc/io/uring_engine.cc", 'throw OsError(ENOSYS, "io_uring_setup: built without', "of builds without liburing"),
    ("csrc/codec/compress.cc", 'return "unknown"', "a name for people, of what `known_codec` has refused before"),
    ("csrc/store/staging.cc", "remove_quietly(parent_, staging)", "what it leaves goes under its other name next"),
    ("repair.py:_Repair._place", "raise _stale(checkpoint)", "who placed the file looks again whether it stands"),
)

NOTICED_BY: tuple[tuple[str, str, str], ...] = (
    (
        "writer.py:Writer._agree_on_structure",
        "_cache.put(",
        "tests/distributed/test_save_ranks.py::test_an_unchanged_structure_is_not_agreed_on_again",
    ),
    (
        "writer.py:Writer._open_staging",
        "_native.reap(",
        "tests/durability/test_existing_targets.py::test_a_save_removes_what_dead_saves_have_left",
    ),
    (
        "writer.py:Writer.wait_staged",
        "self._share.release()",
        "tests/roundtrip/test_harm.py::test_tensors_are_let_go_once_they_are_copied_and_not_when_they_are_written",
    ),
    (
        "writer.py:Writer.finish",
        "_memory.put(",
        "tests/roundtrip/test_delta.py::test_a_later_step_with_the_optimizer_state_of_an_earlier_one",
    ),
    (
        "writer.py:Writer._commit",
        "heed_unchanged(",
        "tests/distributed/test_delta_ranks.py::test_a_state_is_stale_when_nothing_changed_on_any_rank",
    ),
    (
        "writer.py:Writer._commit",
        "self._enter_commit()",
        "tests/roundtrip/test_harm.py::test_a_cancel_between_the_last_vote_and_the_commit_leaves_nothing_visible",
    ),
    (
        "writer.py:Writer._enter_commit",
        "self._check_wanted()",
        "tests/roundtrip/test_harm.py::test_a_cancel_between_the_last_vote_and_the_commit_leaves_nothing_visible",
    ),
    (
        "writer.py:Writer.cancel",
        "share.cancel()",
        "tests/roundtrip/test_harm.py::test_a_cancelled_save_writes_no_further",
    ),
    (
        "writer.py:Writer.close",
        "share.close()",
        "tests/roundtrip/test_harm.py::test_a_save_that_its_callback_ends_writes_no_further",
    ),
    (
        "writer.py:Writer.close",
        "self.channel.close()",
        "tests/distributed/test_save_ranks.py::test_saves_and_loads_leave_no_keys_in_the_store",
    ),
    (
        "outcome.py:Outcome.committed",
        "_native.sync_directory(",
        "tests/crash/test_crash_states.py::test_no_crash_spoils_a_checkpoint_or_loses_one[heard]",
    ),
    (
        "target.py:Target.make_parents",
        "_native.sync_directory(",
        "tests/crash/test_crash_states.py::test_no_crash_spoils_a_checkpoint_or_loses_one[parents]",
    ),
    (
        "load.py:_Load._compare_keys",
        "self._refuse(problems)",
        "tests/roundtrip/test_structures.py::test_every_key_that_does_not_fit_is_named_in_one_error",
    ),
    (
        "joint.py:_JointLoad.close",
        "self._rounds.close()",
        "tests/distributed/test_joint_failures.py::test_a_load_that_was_interrupted_reads_no_further",
    ),
    (
        "opening.py:encode_indexes",
        "told.add(",
        "tests/distributed/test_opening.py::test_what_indexes_have_alike_is_told_once",
    ),
    (
        "compaction.py:_compact",
        "compaction.check_time()",
        "tests/durability/test_compaction.py::test_nothing_is_done_after_the_deadline",
    ),
    (
        "compaction.py:_Compaction._copied_to",
        "self.check_time()",
        "tests/durability/test_compaction.py::test_nothing_is_done_after_the_deadline",
    ),
    (
        "load.py:load",
        "channel.close()",
        "tests/distributed/test_save_ranks.py::test_saves_and_loads_leave_no_keys_in_the_store",
    ),
)
