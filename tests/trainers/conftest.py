"""Trainers in their real packages, which `make test-integrations` installs; elsewhere nothing here is collected."""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("SNAPSTONE_TEST_TRAINERS") == "1" else ["*"]
