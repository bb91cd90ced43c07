"""llama.cpp's server and its forks: where the program is, and how it is started."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from llamarunner.catalog.catalog import Model
from llamarunner.config.schema import EngineConfig
from llamarunner.engines.engine import EngineInfo, LaunchPlan
from llamarunner.engines.flags import canonical, flags_for, to_arguments
from llamarunner.engines.known_flags import as_known
from llamarunner.engines.probe import known, probe
from llamarunner.engines.projection import Projection, project
from llamarunner.errors import EngineMissingError

KIND = "llama-server"
API_KEY_VARIABLE = "LLAMA_API_KEY"
INSTALL_HINT = "pip install 'llamarunner[builtin]', or install llama-server and name it in the engine's command"


def find_command(config: EngineConfig) -> str | None:
    """The absolute path of the engine's program; None where there is none that may be run."""
    command = os.path.expanduser(config.command)
    found = shutil.which(command, path=config.env.get("PATH"))
    return os.path.abspath(found) if found else None


class LlamaServerEngine:
    kind = KIND
    is_local = True
    is_adjustable = True

    def __init__(self, name: str, config: EngineConfig) -> None:
        self.name = name
        self._config = config

    def info(self) -> EngineInfo:
        command = find_command(self._config)
        if command is None:
            return EngineInfo(self.name, KIND, self._config.command, problem=self._missing, hint=INSTALL_HINT)
        found = probe(command, self._config.env)
        hint = f"run {Path(command).name} --version to see what ails it" if found.problem else ""
        return EngineInfo(self.name, KIND, command, version=found.version, problem=found.problem, hint=hint)

    def project(self, model: Model) -> Projection | None:
        command = find_command(self._config)
        return project(command, self._config, model) if command is not None else None

    def plan(self, model: Model, *, port: int, api_key: str) -> LaunchPlan:
        command = find_command(self._config)
        if command is None:
            raise EngineMissingError(self._missing, hint=INSTALL_HINT)
        written = {canonical(name): name for name in model.settings.flags}
        flags = as_known(flags_for(model, port), known(command), written, model.name)
        return LaunchPlan(
            argv=(command, *self._config.args, *to_arguments(flags)),
            port=port,
            api_key=api_key,
            env={**self._config.env, **model.settings.env, API_KEY_VARIABLE: api_key},
            load_timeout_s=model.settings.load_timeout,
            supports_tools=self._config.supports_tools,
        )

    @property
    def known_version(self) -> str:
        command = find_command(self._config)
        return known(command).version if command is not None else ""

    @property
    def _missing(self) -> str:
        return f"engine '{self.name}': the program {self._config.command} is not found"
