"""Of a copy whose checks can be taken away one at a time (tests/mutation): see mutant.h, which does the same."""

from __future__ import annotations

import os


def stays(name: str) -> bool:
    log = os.environ.get("SNAPSTONE_MUTANT_LOG")
    if log:
        line = f"{name}\t{os.environ.get('PYTEST_CURRENT_TEST', '')}\n".encode()
        try:
            fd = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError:  # no descriptors left, which may be what is tested
            return True
        os.write(fd, line)
        os.close(fd)
    return os.environ.get("SNAPSTONE_MUTANT") != name
