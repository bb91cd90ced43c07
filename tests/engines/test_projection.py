"""`llama-fit-params`: what it prints, and a scripted one beside a scripted llama-server."""

from __future__ import annotations

import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llamarunner.catalog.catalog import Model
from llamarunner.config.schema import EngineConfig, ModelSettings
from llamarunner.engines import projection
from llamarunner.engines.llama_server import LlamaServerEngine
from llamarunner.engines.projection import Projection, parse_projection

MIB = 1024**2
HELP = """-c,    --ctx-size N                     size of the prompt context
-b,    --batch-size N                   logical maximum batch size
-ctk,  --cache-type-k TYPE              KV cache data type for K
-fa,   --flash-attn [on|off|auto]       set Flash Attention use
-ngl,  --gpu-layers, --n-gpu-layers N   max. number of layers to store in VRAM
-m,    --model FNAME                    model path to load
-fitp, --fit-print [on|off]             print the estimated required memory
"""
NOTE = (
    "0.00.110.388 I llama_fit_params: printing estimated memory in MiB to stdout "
    "(device, model, context, compute) ...\n"
)
RECORDED = NOTE + "Host 315 224 301 \n"


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (RECORDED, Projection(224 * MIB, 301 * MIB)),
        (NOTE + "CUDA0 0 0 4 \nHost 5915 470 62 \n", Projection(470 * MIB, 62 * MIB)),  # hidden, and there all the same
        (NOTE + "CUDA0 5956 562 501 \nHost 545 0 32 \n", None),
        (NOTE, None),
        ("", None),
        ("Host 1 2\n", None),
        ("Host -1 2 3\n", None),
        ("error: invalid argument: --swa-full\n", None),
    ],
)
def test_what_it_prints(output: str, expected: Projection | None) -> None:
    assert parse_projection(output) == expected


@pytest.fixture
def tool(tmp_path: Path) -> Callable[..., LlamaServerEngine]:
    """An engine with the tool beside it, which prints `output` and writes down how it was called."""

    def make(output: str = RECORDED, *, code: int = 0, help_text: str = HELP, sleep: float = 0) -> LlamaServerEngine:
        for name, text in (("help", help_text), ("output", output)):
            (tmp_path / name).write_text(text)
        script = f"""#!/bin/sh
echo "$CUDA_VISIBLE_DEVICES|$@" >> {tmp_path}/calls
case "$1" in
  --version) echo "version: 8857 (abc)";;
  --help) cat {tmp_path}/help;;
  *) sleep {sleep}; cat {tmp_path}/output; exit {code};;
esac
"""
        for name in ("llama-server", "llama-fit-params"):
            path = tmp_path / name
            path.write_text(script)
            path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return LlamaServerEngine("default", EngineConfig(command=str(tmp_path / "llama-server")))

    return make


def model(**settings: Any) -> Model:
    return Model("m", Path("/m.gguf"), ModelSettings(**settings), size_bytes=5)


def calls(tmp_path: Path) -> list[str]:
    return [line for line in (tmp_path / "calls").read_text().splitlines() if "--fit-print" in line]


def test_it_is_asked_once_and_sees_no_gpu(
    tool: Callable[..., LlamaServerEngine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    engine = tool()
    asked = model(context=4096, flags={"ctk": "q8_0", "fa": True, "temp": 1})
    assert engine.project(asked) == engine.project(asked) == Projection(224 * MIB, 301 * MIB)
    expected = "|--model /m.gguf --ctx-size 4096 --cache-type-k q8_0 --flash-attn on --n-gpu-layers 0 --fit-print on"
    assert calls(tmp_path) == [expected]
    engine.project(model(context=8192))
    assert len(calls(tmp_path)) == 2


@pytest.mark.parametrize(
    "how",
    [
        {"code": 1},
        {"output": "nothing"},
        {"help_text": HELP.replace("--fit-print", "--fit-other")},
        {"help_text": ""},
        {"sleep": 20},
    ],
)
def test_where_it_cannot_say_it_says_nothing(
    tool: Callable[..., LlamaServerEngine], monkeypatch: pytest.MonkeyPatch, how: dict[str, Any]
) -> None:
    monkeypatch.setattr(projection, "_WITHIN_S", 0.5)
    assert tool(**how).project(model()) is None


def test_a_flag_it_does_not_take_would_make_it_another_model(tool: Callable[..., LlamaServerEngine]) -> None:
    engine = tool()
    assert engine.project(model(flags={"swa-full": True})) is None
    assert engine.project(model(parallel=4)) is None
    assert engine.project(model(parallel=1)) is not None


def test_no_tool(tool: Callable[..., LlamaServerEngine], tmp_path: Path) -> None:
    engine = tool()
    (tmp_path / "llama-fit-params").unlink()
    assert engine.project(model()) is None
