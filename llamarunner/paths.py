"""Where things are kept: the configuration, data, state, cache and log directories of this user.

`LLAMARUNNER_HOME` puts all of them below one folder: for containers, the demo and the tests.
"""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

_APP = "llamarunner"


def _home() -> Path | None:
    home = os.environ.get("LLAMARUNNER_HOME")
    return Path(home).expanduser() if home else None


def config_dir() -> Path:
    home = _home()
    return home / "config" if home else platformdirs.user_config_path(_APP)


def config_file() -> Path:
    """The file read when none is named; it need not exist."""
    return config_dir() / "config.toml"


def data_dir() -> Path:
    home = _home()
    return home / "data" if home else platformdirs.user_data_path(_APP)


def state_dir() -> Path:
    home = _home()
    return home / "state" if home else platformdirs.user_state_path(_APP)


def cache_dir() -> Path:
    home = _home()
    return home / "cache" if home else platformdirs.user_cache_path(_APP)


def log_dir() -> Path:
    home = _home()
    return home / "logs" if home else platformdirs.user_log_path(_APP)


def make_private(directory: Path) -> Path:
    """Create the directory, readable by its owner alone."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    return directory
