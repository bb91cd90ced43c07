from __future__ import annotations

from collections.abc import AsyncIterator

import aiohttp
import pytest
from running import Bench

from llamarunner.runners.guardian import Guardian


@pytest.fixture
async def guardian() -> AsyncIterator[Guardian]:
    made = Guardian()
    yield made
    await made.close()


@pytest.fixture
async def bench(guardian: Guardian) -> AsyncIterator[Bench]:
    async with aiohttp.ClientSession() as session:
        made = Bench(guardian, session)
        yield made
        for runner in made.runners:
            await runner.stop("the test is over")
