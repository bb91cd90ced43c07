"""The engines of a configuration."""

from __future__ import annotations

from typing import NoReturn

from llamarunner.catalog.catalog import Model
from llamarunner.config.schema import Config, EngineConfig
from llamarunner.engines import builtin
from llamarunner.engines.builtin import BuiltinEngine
from llamarunner.engines.command import CommandEngine
from llamarunner.engines.engine import Engine, EngineInfo
from llamarunner.engines.llama_server import INSTALL_HINT, LlamaServerEngine, find_command
from llamarunner.engines.remote import RemoteEngine
from llamarunner.errors import EngineMissingError


class MissingEngine:
    """Stands for an engine of kind "auto" on a machine that has neither program."""

    kind = "auto"
    is_local = True
    known_version = ""
    is_adjustable = True

    def __init__(self, name: str, config: EngineConfig) -> None:
        self.name = name
        self._command = config.command
        self._problem = f"engine '{name}': neither {config.command} nor the built-in llama.cpp is installed"

    def info(self) -> EngineInfo:
        return EngineInfo(self.name, self.kind, self._command, problem=self._problem, hint=INSTALL_HINT)

    def project(self, model: Model) -> None:
        return None

    def plan(self, model: Model, *, port: int, api_key: str) -> NoReturn:
        raise EngineMissingError(self._problem, hint=INSTALL_HINT)


def make_engines(config: Config) -> dict[str, Engine]:
    """By the name of the [engines.NAME] table. Which program "auto" stands for is decided here, once."""
    return {name: _make(name, engine) for name, engine in config.engines.items()}


def _make(name: str, config: EngineConfig) -> Engine:
    if config.is_remote:
        return RemoteEngine(name, config)
    match config.kind:
        case "command":
            return CommandEngine(name, config)
        case "llama-server":
            return LlamaServerEngine(name, config)
        case "builtin":
            return BuiltinEngine(name, config)
        case _:
            if find_command(config):
                return LlamaServerEngine(name, config)
            return BuiltinEngine(name, config) if builtin.is_installed() else MissingEngine(name, config)
