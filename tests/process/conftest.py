"""Where the tests of this folder save: in memory when they may, because an fsync there costs microseconds."""

from durability.conftest import directory, no_faults_left

__all__ = ["directory", "no_faults_left"]
