"""The loop that the program runs on."""

from __future__ import annotations

import asyncio

import anyio
import pytest

from llamarunner.run import choose_task_factory, new_loop


def new_program_loop() -> asyncio.AbstractEventLoop:
    loop = new_loop()
    choose_task_factory(loop)
    return loop


@pytest.mark.skipif(not hasattr(asyncio, "eager_task_factory"), reason="Python has none before 3.12")
def test_tasks_start_eagerly_and_keep_their_names() -> None:
    async def main() -> None:
        begun = 0

        async def work() -> None:
            nonlocal begun
            begun += 1
            await asyncio.sleep(0)

        task = asyncio.create_task(work(), name="some work")
        assert (begun, task.get_name()) == (1, "some work")
        async with asyncio.TaskGroup() as group:
            group.create_task(work())
            assert begun == 2
        await task

    with asyncio.Runner(loop_factory=new_program_loop) as runner:
        runner.run(main())


def test_libraries_that_must_not_be_started_eagerly_notice() -> None:
    """anyio, and so httpx, looks whether the factory is Python's own."""

    async def main() -> None:
        async with anyio.create_task_group() as group:
            for _ in range(3):
                group.start_soon(anyio.sleep, 0.01)
        with anyio.move_on_after(0.01):
            await anyio.sleep(30)

    with asyncio.Runner(loop_factory=new_program_loop) as runner:
        runner.run(main())
