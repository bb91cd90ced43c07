"""The whole service in this process, on free ports and in a home of its own: with real models, or with the scripted
engine, whose behaviour a test may change while it runs."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from gguf_file import write_model

from llamarunner.config.load import LoadedConfig
from llamarunner.config.schema import Config
from llamarunner.events import Event, RequestFinished, RequestTrace, RunnerChanged
from llamarunner.service import Service
from llamarunner.telemetry.logs import LogBook, install

FAKE_ENGINE = Path(__file__).with_name("fake_engine.py")
TOOLS_TEMPLATE = "{% if tools %}tools{% endif %}<think></think>"


async def soon(condition: Callable[[], Any], within_s: float = 5.0) -> Any:
    """The first true value of `condition`."""
    deadline = time.monotonic() + within_s
    while not (value := condition()):
        assert time.monotonic() < deadline, "it never came true"
        await asyncio.sleep(0.01)
    return value


class Script:
    """What a running fake engine does, and what it has seen."""

    def __init__(self, folder: Path, name: str) -> None:
        self.path = folder / f"{name}.json"
        self._record = folder / f"{name}.record"
        self.set()

    def set(self, **script: Any) -> None:
        """Behave so from now on, and forget what was seen."""
        self._record.unlink(missing_ok=True)
        draft = self.path.with_suffix(".draft")
        draft.write_text(json.dumps({"record": str(self._record), **script}), encoding="utf-8")
        draft.replace(self.path)

    def replay(self, body: str | bytes, **how: Any) -> None:
        """Answer each generation with exactly this."""
        import base64

        raw = body.encode() if isinstance(body, str) else body
        self.set(raw={"base64": base64.b64encode(raw).decode(), **how})

    @property
    def ends_the_engine(self) -> bool:
        return "exit" in json.loads(self.path.read_text(encoding="utf-8"))

    @property
    def seen(self) -> list[dict[str, Any]]:
        if not self._record.exists():
            return []
        return [json.loads(line) for line in self._record.read_text(encoding="utf-8").splitlines()]

    def requests(self, path: str = "") -> list[dict[str, Any]]:
        """The requests for generation or for `path`, health and properties left out."""
        quiet = ("/props", "/health", "/slots")
        return [e for e in self.seen if e["event"] == "request" and (e["path"] == path or not path)
                and e["path"] not in quiet]  # fmt: skip

    def asked(self, path: str = "") -> dict[str, Any]:
        """The body of the newest request."""
        body: dict[str, Any] = json.loads(self.requests(path)[-1]["body"])
        return body

    @property
    def disconnects(self) -> int:
        return sum(entry["event"] == "end" and entry["disconnected"] for entry in self.seen)

    @property
    def engine_config(self) -> dict[str, Any]:
        """Of an engine table that runs this script."""
        return {
            "kind": "llama-server",
            "command": sys.executable,
            "args": [str(FAKE_ENGINE), "--script", str(self.path)],
        }


@dataclass
class Serving:
    service: Service
    home: Path
    logs: LogBook
    scripts: dict[str, Script] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)

    @property
    def script(self) -> Script:
        """Of the one scripted engine there is."""
        (script,) = self.scripts.values()
        return script

    def url(self, name: str) -> str:
        proxy = next(proxy for proxy in self.service.proxies if proxy.name == name)
        assert proxy.is_running
        return f"http://127.0.0.1:{proxy.port}"

    @property
    def ollama(self) -> str:
        return self.url("ollama")

    @property
    def lmstudio(self) -> str:
        return self.url("lmstudio")

    def port(self, name: str) -> int:
        return int(self.url(name).rpartition(":")[2])

    @property
    def finished(self) -> list[RequestTrace]:
        return [event.trace for event in self.events if isinstance(event, RequestFinished)]

    @property
    def starts(self) -> list[str]:
        """The model of each engine that was started."""
        return [e.model for e in self.events if isinstance(e, RunnerChanged) and e.old == "stopped"]

    async def idle(self) -> None:
        """Until no request is held."""
        places = [self.service.manager.residence(model.name) for model in self.service.catalog]
        assert places is not None
        await soon(lambda: self.service.in_flight == 0)
        for model in self.service.catalog:
            name = model.name
            await soon(lambda name=name: (r := self.service.manager.residence(name)) is None or r.in_flight == 0)


def scripted_config(folder: Path, models: Mapping[str, Mapping[str, Any]] | None = None) -> tuple[dict[str, Any], dict]:
    """A configuration of models on scripted engines, one script for each of them ("smol" alone if none is given), and
    the scripts by model. `metadata` of a model goes into its file's header."""
    wanted = {"smol": {}} if models is None else models
    scripts = {}
    config: dict[str, Any] = {"engines": {}, "models": {}}
    for number, (name, settings) in enumerate(wanted.items()):
        settings = dict(settings)
        metadata = {"tokenizer.chat_template": TOOLS_TEMPLATE} | settings.pop("metadata", {})
        scripts[name] = Script(folder, f"script{number}")
        config["engines"][f"e{number}"] = scripts[name].engine_config
        path = settings.pop("path", None) or write_model(folder / f"model{number}.gguf", **metadata)
        config["models"][name] = {"path": str(path), "engine": f"e{number}", **settings}
    return config, scripts


NO_DISCOVERY = {"ollama": False, "lmstudio": False, "huggingface": False, "folders": []}


@asynccontextmanager
async def serve(
    home: Path, config: Mapping[str, Any], scripts: Mapping[str, Script] | None = None, *, log_files: bool = False
) -> AsyncIterator[Serving]:
    """The service on `config` (tables as in config.toml), with no folders searched and all ports free ones."""
    tables = {**config, "discovery": {**NO_DISCOVERY, **config.get("discovery", {})}}
    proxies = tables.setdefault("proxies", {})
    tables["proxies"] = {name: {"port": 0, **proxies.get(name, {})} for name in ("ollama", "lmstudio")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLAMARUNNER_HOME", str(home))
        logs = LogBook(home / "logs" if log_files else None)
        uninstall = install(logs, "debug") if log_files else lambda: None
        service = Service(LoadedConfig(Config.model_validate(tables)), logs, is_announced=False)
        serving = Serving(service, home, logs, dict(scripts or {}))
        service.bus.subscribe(serving.events.append)
        try:
            await service.start()
            yield serving
        finally:
            await service.stop(0)
            uninstall()
            await asyncio.to_thread(logs.close)
