"""The embedded default: llama.cpp from the wheel xllamacpp, each model in a child process (`builtin_worker.py`)."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import sys

from llamarunner.catalog.catalog import Model
from llamarunner.config.schema import EngineConfig
from llamarunner.engines import builtin_worker
from llamarunner.engines.engine import EngineInfo, LaunchPlan
from llamarunner.engines.flags import flags_for, to_arguments
from llamarunner.errors import EngineMissingError, UnsupportedError

KIND = "builtin"
_MISSING = "the built-in llama.cpp is not installed"
_HINT = "pip install 'llamarunner[builtin]'"


def is_installed() -> bool:
    """Looks without importing: a crash or the memory of llama.cpp is the child's, never ours."""
    return importlib.util.find_spec("xllamacpp") is not None


@functools.cache
def _version() -> str:
    return importlib.metadata.version("xllamacpp")


class BuiltinEngine:
    kind = KIND
    is_local = True
    is_adjustable = True

    def __init__(self, name: str, config: EngineConfig) -> None:
        self.name = name
        self._config = config

    @property
    def known_version(self) -> str:
        return _version() if is_installed() else ""

    def info(self) -> EngineInfo:
        if not is_installed():
            return EngineInfo(self.name, KIND, sys.executable, problem=_MISSING, hint=_HINT)
        return EngineInfo(self.name, KIND, sys.executable, version=_version())

    def project(self, model: Model) -> None:
        return None

    def plan(self, model: Model, *, port: int, api_key: str) -> LaunchPlan:
        if not is_installed():
            raise EngineMissingError(_MISSING, hint=_HINT)
        flags = flags_for(model, port)
        if flags.get("flash-attn") is True:
            flags["flash-attn"] = "on"
        arguments = [*self._config.args, *to_arguments(flags)]
        try:
            builtin_worker.parse(arguments)
        except builtin_worker.FlagError as error:
            raise UnsupportedError(
                f"model '{model.name}': {error}", hint="the built-in engine takes no other"
            ) from None
        return LaunchPlan(
            # -P: nothing that lies in the working directory or beside the worker is imported in place of a library
            argv=(sys.executable, "-P", builtin_worker.__file__, *arguments),
            port=port,
            api_key=api_key,
            env={**self._config.env, **model.settings.env, builtin_worker.API_KEY_VARIABLE: api_key},
            load_timeout_s=model.settings.load_timeout,
            supports_tools=self._config.supports_tools,
        )
