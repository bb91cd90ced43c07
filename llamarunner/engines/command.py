"""Any other server of OpenAI's API (vLLM, TabbyAPI, ...): the command line that the configuration spells out."""

from __future__ import annotations

import re
from collections.abc import Mapping

from llamarunner.catalog.catalog import Model
from llamarunner.config.schema import EngineConfig
from llamarunner.config.values import PLACEHOLDERS
from llamarunner.engines.engine import EngineInfo, LaunchPlan
from llamarunner.engines.flags import to_arguments
from llamarunner.engines.llama_server import find_command
from llamarunner.errors import EngineMissingError, UnsupportedError

KIND = "command"

_PLACEHOLDER = re.compile(rf"\$\{{({'|'.join(PLACEHOLDERS)})\}}")
_PORT_FLAGS = ("p", "port")


class CommandEngine:
    kind = KIND
    is_local = True
    is_adjustable = False

    def __init__(self, name: str, config: EngineConfig) -> None:
        self.name = name
        self._config = config

    @property
    def known_version(self) -> str:
        return ""

    def info(self) -> EngineInfo:
        """Its version stays unknown: nobody can say how such a program is asked, nor how long it takes to answer."""
        command = find_command(self._config)
        if command is None:
            return EngineInfo(self.name, KIND, self._config.command, problem=self._missing, hint=self._hint)
        return EngineInfo(self.name, KIND, command)

    def project(self, model: Model) -> None:
        return None

    def plan(self, model: Model, *, port: int, api_key: str) -> LaunchPlan:
        command = find_command(self._config)
        if command is None:
            raise EngineMissingError(self._missing, hint=self._hint)
        config, flags = self._config, model.settings.flags
        if port_flag := next((flag for flag in flags if flag in _PORT_FLAGS), None):
            problem = f"model '{model.name}': the flag '{port_flag}' cannot be set"
            raise UnsupportedError(problem, hint=f"leave it out: ${{port}} in engines.{self.name}.args is the port")
        key = self._key(api_key)
        values = {
            "port": str(port),
            "model": str(model.path),
            "name": model.name,
            "context": str(model.context),
            "parallel": str(model.settings.parallel),
            "api_key": key,
        }
        return LaunchPlan(
            argv=(command, *(_filled(each, values) for each in config.args), *to_arguments(flags)),
            port=port,
            api_key=key,
            env={**{name: _filled(each, values) for name, each in config.env.items()}, **model.settings.env},
            health_path=config.health,
            load_timeout_s=model.settings.load_timeout,
            supports_tools=self._config.supports_tools,
            served_model=self._served_model(model),
            is_llama_cpp=False,
        )

    def _key(self, fresh: str) -> str:
        """The server's own; else a fresh one, where it is told of it."""
        if self._config.api_key is not None:
            return self._config.api_key.get_secret_value()
        return fresh if any("${api_key}" in value for value in self._config.env.values()) else ""

    def _served_model(self, model: Model) -> str:
        """By what it was given, a server calls its model: the name if it was told one, else the path."""
        told = "\n".join([*self._config.args, *self._config.env.values()])
        return model.name if "${name}" in told else str(model.path) if "${model}" in told else ""

    @property
    def _missing(self) -> str:
        return f"engine '{self.name}': the program {self._config.command} is not found"

    @property
    def _hint(self) -> str:
        return f"install it, or name it by its path in engines.{self.name}.command"


def _filled(text: str, values: Mapping[str, str]) -> str:
    """In one pass: what a model's name looks like is not filled in again."""
    return _PLACEHOLDER.sub(lambda match: values[match[1]], text)
