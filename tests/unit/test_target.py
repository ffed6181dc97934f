"""What a caller may give as the place, the step and the metadata of a checkpoint."""

from __future__ import annotations

from typing import Any

import pytest

from snapstone.target import Target


@pytest.mark.parametrize(
    ("step", "metadata", "error", "words"),
    [
        (True, None, TypeError, "step=True: must be an integer"),
        (1.0, None, TypeError, "integer"),
        (1 << 63, None, ValueError, "must fit into 64 bits"),
        (-(1 << 63) - 1, None, ValueError, "must fit into 64 bits"),
        (1, [], TypeError, "metadata must be a mapping, not a list"),
        (1, {1: 2}, TypeError, "metadata has the key 1: keys must be strings"),
    ],
)
def test_what_no_manifest_can_hold_is_refused(step: Any, metadata: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        Target.of("run/c", step, metadata)
    assert Target.of("run/c", (1 << 63) - 1, {"k": 2}).step == (1 << 63) - 1
