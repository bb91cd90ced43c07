"""What a download costs: a blob from a registry on loopback into the library, verified, beside the same bytes merely
read and written; and how long the event loop, which serves everyone meanwhile, was held up at worst."""

from __future__ import annotations

import asyncio
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import uvloop

from bench.program import Program
from bench.rows import Effort, Row
from llamarunner.catalog.download import Pace
from llamarunner.catalog.library import Library
from llamarunner.catalog.names import ModelName
from llamarunner.catalog.pull import Pulls
from tests.fakes.registry import serve_registry

SIZE = 512 * 1024**2
_PACE = Pace(part_min=SIZE // 8)  # so that parts come side by side
_LINE = "{port} {digest}\n"


def downloads(program: Program, effort: Effort) -> Iterator[Row]:
    with subprocess.Popen([sys.executable, "-m", "bench.downloads"], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        port, digest = server.stdout.readline().split()
        try:
            plain, pulled, stalls = [], [], []
            for number in range(max(2, effort.repeats)):
                plain.append(uvloop.run(_read_and_write(f"http://127.0.0.1:{port}", digest, program.home / "plain")))
                took, stall = uvloop.run(_pull(f"127.0.0.1:{port}/library/big", program.home / f"library{number}"))
                pulled.append(took)
                stalls.append(stall)
        finally:
            server.terminate()
    what = f"a download of {SIZE // 1024**2} MiB"
    yield Row(f"{what}: verified", SIZE / 1e6 / statistics.median(pulled), "MB/s")
    yield Row(
        f"{what}: time beside reading and writing alone", statistics.median(pulled) / statistics.median(plain), "×"
    )
    yield Row(f"{what}: the loop held up, at worst", 1000 * max(stalls), "ms", 25)


async def _read_and_write(url: str, digest: str, path: Path) -> float:
    began = time.perf_counter()
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"{url}/v2/library/big/blobs/{digest}") as response,
    ):
        with path.open("wb") as file:
            while block := await response.content.readany():
                file.write(block)
    return time.perf_counter() - began


async def _pull(name: str, folder: Path) -> tuple[float, float]:
    library = Library(folder)
    pulls = Pulls(library, _nothing, pace=_PACE)
    beating = asyncio.create_task(_beat(worst := [0.0]))
    began = time.perf_counter()
    async for _ in pulls.pull(name, insecure=True):
        pass
    took = time.perf_counter() - began
    beating.cancel()
    await pulls.close()
    library.delete(ModelName.parse(name))
    return took, worst[0]


async def _beat(worst: list[float]) -> None:
    while True:
        before = time.perf_counter()
        await asyncio.sleep(0.005)
        worst[0] = max(worst[0], time.perf_counter() - before - 0.005)


async def _nothing() -> None:
    pass


async def _serve() -> None:
    async with serve_registry() as registry:
        manifest = registry.add("big", model=bytes(range(256)) * (SIZE // 256))
        sys.stdout.write(_LINE.format(port=registry.port, digest=manifest["layers"][0]["digest"]))
        sys.stdout.flush()
        await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(_serve())
