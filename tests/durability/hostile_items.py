"""What a checkpoint made to do harm can be: every item that anybody thought of, and the tests that show how it ends.

An item that the format has no place for is listed too, with the test of what comes nearest: there are no strides, no
flag of a byte order, no list of required features, and nothing that is read for the sake of a base.
"""

ENCODING = {
    "empty": "test_manifests_that_are_not_json_as_defined, test_index_headers_that_are_not_json_as_defined",
    "one byte": "test_manifests_that_are_not_json_as_defined, test_index_headers_that_are_not_json_as_defined",
    "NUL": "test_manifests_that_are_not_json_as_defined, test_index_headers_that_are_not_json_as_defined",
    "not UTF-8": "test_manifests_that_are_not_json_as_defined, test_index_headers_that_are_not_json_as_defined",
    "byte-order mark": "test_manifests_that_are_not_json_as_defined, test_index_headers_that_are_not_json_as_defined",
    "a gigabyte of white space": (
        "test_white_space_costs_what_reading_it_costs, test_huge_sparse_files_are_refused_before_they_are_read"
    ),
    "nested 100,000 deep": (
        "test_manifests_that_are_not_json_as_defined, test_index_headers_that_are_not_json_as_defined, "
        "test_nesting_near_the_limit_of_the_stack"
    ),
    "duplicate keys at the top, of a tensor, of a file": "test_a_key_stands_once_in_every_object",
}
FRAMING = {
    "unknown required feature": (
        "test_what_a_later_version_may_add_is_refused_by_name, test_a_newer_major_is_incompatible_whatever_else_changed"
    ),
    "version 0, 2^32, -1, a text": (
        "test_versions_that_are_none_are_corrupt, test_a_newer_major_is_incompatible_whatever_else_changed"
    ),
    "wrong magic": "test_index_files_that_are_too_short_or_not_one",
    "bad digest of itself": (
        "test_any_flipped_byte_of_manifest_digest_or_index_is_found, test_digest_files_that_are_none_are_refused"
    ),
    "right digest and wrong length": "test_sizes_beyond_what_files_have",
    "garbage behind": (
        "test_manifests_that_are_not_json_as_defined, test_index_files_that_are_too_short_or_not_one, "
        "test_files_that_are_something_else_too_are_refused"
    ),
}
NUMBERS = {
    "NaN, Infinity, 1e400": "test_integers_are_integers_of_64_bits, test_manifests_that_are_not_json_as_defined",
    "-0": "test_minus_zero_is_zero",
    "floats for integers": "test_integers_are_integers_of_64_bits",
    "2^53 + 1": "test_an_integer_that_no_float_holds_is_read_as_it_is",
    "2^64": "test_integers_are_integers_of_64_bits",
    "negative": "test_integers_are_integers_of_64_bits, test_any_value_of_an_index_replaced_or_removed",
    "integers of a million digits": "test_manifests_that_are_not_json_as_defined, test_values_that_no_writer_writes",
}
RANKS_AND_SHARDS = {
    "0, -1, 2^31 ranks": "test_world_sizes_that_do_not_match_the_writers",
    "a rank missing": "test_ranks_stand_once_each_and_in_order",
    "a rank twice": "test_ranks_stand_once_each_and_in_order",
    "overlapping shards": "test_shards_that_overlap_leave_a_hole_or_disagree",
    "holes": "test_shards_that_overlap_leave_a_hole_or_disagree",
    "a shard outside the shape": "test_tensors_that_cannot_be",
}
SHAPES_AND_DTYPES = {
    "negative or overflowing shapes": "test_tensors_that_cannot_be",
    "zero beside huge": "test_tensors_that_cannot_be",
    "dtype unknown, in another case, an alias": (
        "test_dtypes_have_one_name_and_whole_bytes, test_tensors_that_cannot_be"
    ),
    "parts of a byte": "test_dtypes_have_one_name_and_whole_bytes",
    "strides that lie": "test_strides_and_byte_orders_are_not_of_the_format_and_change_nothing",
    "ten million tensors": "test_many_tensors_without_bytes_take_memory_in_proportion",
}
TENSOR_NAMES = {
    "empty, long, NUL, newline, right-to-left, __proto__": "test_names_that_confuse_are_only_names",
    "differing by normal form or case": "test_names_that_look_alike_are_two",
}
FILE_NAMES = {
    "empty, dots, slashes, NUL, drives, escapes, long": "test_names_that_lead_elsewhere_are_refused",
    "a dot or space at the end": (
        "test_names_that_lead_elsewhere_are_refused, test_file_names_are_taken_letter_by_letter"
    ),
    "link, hard link, FIFO, device, directory or socket instead of a file": (
        "test_what_stands_in_place_of_a_file_is_refused"
    ),
}
DELTAS_AND_POINTERS = {
    "base that is itself": (
        "test_a_base_is_never_looked_for_whatever_it_is_said_to_be, test_a_base_that_is_the_target_needs_overwrite"
    ),
    "circle": "test_circles_of_references_are_refused",
    "base missing": (
        "test_a_base_is_never_looked_for_whatever_it_is_said_to_be, "
        "test_a_base_that_cannot_be_read_is_a_typed_error_and_leaves_nothing"
    ),
    "base never committed": (
        "test_a_staging_directory_is_refused_even_when_it_looks_whole, "
        "test_a_base_that_cannot_be_read_is_a_typed_error_and_leaves_nothing"
    ),
    "base of another run": (
        "test_a_base_is_never_looked_for_whatever_it_is_said_to_be, "
        "test_a_base_that_says_other_things_under_its_old_save_id_is_read_again"
    ),
    "depth of 100,000": (
        "test_chains_of_references_are_bounded, test_a_base_with_more_deltas_behind_it_than_a_number_holds"
    ),
    "base of a newer format": "test_a_base_that_cannot_be_read_is_a_typed_error_and_leaves_nothing",
    "two manifests of one step": "test_two_manifests_of_one_step_are_two_checkpoints_and_never_one",
    "LATEST that leads nowhere, outside, in a circle": "test_links_planted_in_a_run_are_no_checkpoints",
}
SHARD_HEADS = {
    "size 0, shorter than its head": "test_index_files_that_are_too_short_or_not_one",
    "header beyond the file, 2^63, 2^64 - 1": "test_header_lengths_that_do_not_fit",
    "chunk sizes of 0, huge, that do not match": "test_records_outside_the_limits_are_refused",
}
CHUNKS = {
    "order swapped": (
        "test_records_that_point_at_other_bytes_are_refused, "
        "test_a_chunk_of_the_same_checkpoint_in_the_wrong_place_is_refused"
    ),
    "of another rank": "test_files_swapped_between_ranks_are_refused_and_the_rank_is_named",
    "of another step": "test_files_swapped_between_steps_are_refused",
    "of another place": "test_a_chunk_of_the_same_checkpoint_in_the_wrong_place_is_refused",
    "twice": "test_records_that_point_at_other_bytes_are_refused",
    "right digest and wrong identity": "test_the_index_of_another_save_is_said_to_be_one",
    "padding that is not zero": "test_any_flipped_byte_of_data_is_found_and_named",
    "cut by a byte, at every boundary, every 4 KiB": "test_truncated_and_extended_files_are_refused",
    "longer": "test_truncated_and_extended_files_are_refused",
    "a hole where data was": "test_holes_and_turned_bytes_where_data_was_are_found",
    "bytes swapped": "test_holes_and_turned_bytes_where_data_was_are_found, test_what_damage_looks_like",
}
FRAMES = {
    "bomb": "test_frames_that_no_writer_writes, test_a_raw_size_that_lies_about_a_bomb_is_bounded_by_the_record",
    "no content size": "test_frames_that_no_writer_writes",
    "dictionary": "test_frames_that_no_writer_writes",
    "window of 2^31": "test_frames_that_no_writer_writes",
    "two frames": "test_frames_that_no_writer_writes",
    "cut": "test_frames_that_no_writer_writes",
    "unknown codec": (
        "test_records_outside_the_limits_are_refused, test_what_a_later_version_may_add_is_refused_by_name"
    ),
}
REST = {
    "a safetensors, torch or zip file at once": "test_files_that_are_something_else_too_are_refused",
    "the other byte order": (
        "test_heads_and_tables_in_the_other_byte_order_are_refused, "
        "test_strides_and_byte_orders_are_not_of_the_format_and_change_nothing"
    ),
    "cut while it is read": "test_a_file_that_is_cut_after_it_was_opened_is_an_error",
    "metadata of torch's own checkpoints": (
        "test_metadata_of_other_writers_takes_memory_in_proportion_and_only_corrupt_errors_come_out"
    ),
}
ITEMS = {
    "encoding of a manifest or index": ENCODING,
    "version and framing": FRAMING,
    "numbers": NUMBERS,
    "ranks and shards": RANKS_AND_SHARDS,
    "shapes and dtypes": SHAPES_AND_DTYPES,
    "tensor names": TENSOR_NAMES,
    "file names": FILE_NAMES,
    "deltas and pointers": DELTAS_AND_POINTERS,
    "heads of an index": SHARD_HEADS,
    "chunks": CHUNKS,
    "compressed frames": FRAMES,
    "the rest": REST,
}
