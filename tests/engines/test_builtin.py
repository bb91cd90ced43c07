"""The built-in engine for real: SmolLM2 in a child process, over HTTP."""

from __future__ import annotations

import importlib.metadata
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llamarunner.catalog.catalog import Model
from llamarunner.catalog.details import read_details
from llamarunner.config.schema import EngineConfig, ModelSettings
from llamarunner.engines import builtin, builtin_worker
from llamarunner.engines.builtin import BuiltinEngine
from llamarunner.engines.builtin_worker import FLAGS, FlagError, parse
from llamarunner.engines.engine import LaunchPlan
from llamarunner.errors import EngineMissingError, UnsupportedError

KEY = "a-secret-key"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def plan(path: Path, name: str = "smol", **settings: Any) -> LaunchPlan:
    details = read_details(path) if path.name.startswith("SmolLM2") else Model(name, path, ModelSettings()).details
    settings = {"context": 1024, "flags": {"threads": 1, "no-warmup": True}} | settings
    model = Model(name, path, ModelSettings(**settings), details=details)
    return BuiltinEngine("default", EngineConfig()).plan(model, port=free_port(), api_key=KEY)


class Worker:
    def __init__(self, planned: LaunchPlan, log: Path) -> None:
        self.plan = planned
        self.log = log
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                planned.argv, env={**os.environ, **planned.env}, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )

    def ask(self, path: str, body: object = None, key: str = KEY) -> tuple[int, Any]:
        request = urllib.request.Request(
            self.plan.base_url + path,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Authorization": f"Bearer {key}"} if key else {},
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.loads(error.read())

    def wait_until_ready(self, timeout_s: float = 60) -> None:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log.read_text()
            try:
                if self.ask(self.plan.health_path)[0] == 200:
                    return
            except OSError:
                time.sleep(0.02)  # between two polls
        pytest.fail(f"not ready after {timeout_s} s: {self.log.read_text()}")

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.kill()
        return self.process.wait(10)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[LaunchPlan], Worker]]:
    workers: list[Worker] = []

    def begin(planned: LaunchPlan) -> Worker:
        workers.append(Worker(planned, tmp_path / f"worker{len(workers)}.log"))
        return workers[-1]

    yield begin
    for worker in workers:
        worker.stop()


# --- running ---------------------------------------------------------------------------------------------------------


def test_a_model_answers(smollm2: Path, start: Callable[[LaunchPlan], Worker]) -> None:
    worker = start(plan(smollm2, "日本 smol/😀", parallel=2, embeddings=True, flags={"threads": 1, "temp": 0.25}))
    worker.wait_until_ready()

    messages = [{"role": "user", "content": "Say hello."}]
    status, answer = worker.ask("/v1/chat/completions", {"messages": messages, "max_tokens": 4})
    assert status == 200
    assert answer["usage"]["completion_tokens"] == 4
    assert answer["choices"][0]["message"]["content"]
    assert answer["model"] == "日本 smol/😀"

    long_input = "word " * 530  # more than llama.cpp's usual physical batch of 512
    status, answer = worker.ask("/v1/embeddings", {"input": ["hello", long_input]})
    assert status == 200
    assert [len(item["embedding"]) for item in answer["data"]] == [576, 576]

    for key in ("", "wrong"):
        assert worker.ask("/v1/chat/completions", {"messages": messages}, key=key)[0] == 401
        assert worker.ask("/props", key=key)[0] == 401

    status, models = worker.ask("/v1/models")
    assert [item["id"] for item in models["data"]] == ["日本 smol/😀"]
    status, props = worker.ask("/props")
    assert props["total_slots"] == 2
    assert props["default_generation_settings"]["n_ctx"] == 1024  # for each request
    assert props["default_generation_settings"]["params"]["temperature"] == 0.25
    assert props["model_path"] == str(smollm2)
    assert len(worker.ask("/slots")[1]) == 2
    with pytest.raises(json.JSONDecodeError):
        worker.ask("/metrics")  # Prometheus' text: the endpoint is on
    assert worker.ask("/")[0] == 404  # no web page

    assert KEY not in " ".join(worker.plan.argv)
    begun = time.monotonic()
    worker.process.send_signal(signal.SIGTERM)
    assert worker.process.wait(2) == 0
    assert time.monotonic() - begun < 2


def test_a_chat_template_of_ones_own(smollm2: Path, tmp_path: Path, start: Callable[[LaunchPlan], Worker]) -> None:
    template = tmp_path / "shout.jinja"
    template.write_text("{% for m in messages %}LOUD:{{ m.content | upper }}{% endfor %}")
    worker = start(plan(smollm2, chat_template=str(template)))
    worker.wait_until_ready()
    status, answer = worker.ask("/apply-template", {"messages": [{"role": "user", "content": "hi"}]})
    assert (status, answer["prompt"]) == (200, "LOUD:HI")


def test_llama_cpps_own_templates_and_adapters(
    smollm2: Path, tmp_path: Path, start: Callable[[LaunchPlan], Worker]
) -> None:
    import gguf
    import numpy as np

    adapter = tmp_path / "lora.gguf"
    writer = gguf.GGUFWriter(adapter, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 8.0)
    for name in ("lora_a", "lora_b"):
        shape = (4, 576) if name == "lora_a" else (576, 4)
        writer.add_tensor(f"blk.0.attn_q.weight.{name}", np.zeros(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    settings = ModelSettings(context=512, flags={"threads": 1, "no-warmup": True})
    model = Model("m", smollm2, settings, chat_template="gemma", adapters=(adapter,))
    worker = start(BuiltinEngine("default", EngineConfig()).plan(model, port=free_port(), api_key=KEY))
    worker.wait_until_ready()
    status, answer = worker.ask("/apply-template", {"messages": [{"role": "user", "content": "hi"}]})
    assert (status, answer["prompt"]) == (200, "<start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n")
    assert [item["path"] for item in worker.ask("/lora-adapters")[1]] == [str(adapter)]


def test_it_ends_promptly_while_it_answers(smollm2: Path, start: Callable[[LaunchPlan], Worker]) -> None:
    worker = start(plan(smollm2))
    worker.wait_until_ready()
    body = json.dumps({"prompt": "Once", "n_predict": -1, "stream": True, "ignore_eos": True}).encode()
    request = urllib.request.Request(f"{worker.plan.base_url}/completion", body, worker.plan.headers)
    with urllib.request.urlopen(request, timeout=30) as answer:
        assert answer.readline().startswith(b"data: ")
        worker.process.send_signal(signal.SIGINT)
        assert worker.process.wait(2) == 0


def test_it_ends_at_once_while_it_loads(smollm2: Path, start: Callable[[LaunchPlan], Worker]) -> None:
    worker = start(plan(smollm2))
    deadline = time.monotonic() + 10
    while not worker.log.read_bytes() and time.monotonic() < deadline:
        time.sleep(0.001)  # until llama.cpp's first line
    worker.process.terminate()
    assert worker.process.wait(2) in (0, -signal.SIGTERM)


# --- failing ---------------------------------------------------------------------------------------------------------


def failure(planned: LaunchPlan, *more: str) -> tuple[int, str]:
    done = subprocess.run(
        [*planned.argv, *more],
        env={**os.environ, **planned.env},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    return done.returncode, done.stderr.splitlines()[-1]


def test_files_that_cannot_be_loaded(smollm2: Path, tmp_path: Path) -> None:
    cut, text = tmp_path / "cut.gguf", tmp_path / "text.gguf"
    with smollm2.open("rb") as whole:
        cut.write_bytes(whole.read(3_000_000))
    text.write_text("hello")
    for path, says in ((cut, "could not serve"), (text, "could not serve"), (tmp_path / "gone.gguf", "no file")):
        code, last = failure(plan(path))
        assert code == 1
        assert last.startswith("error: ")
        assert says in last
        assert str(path) in last


def test_flags_that_the_worker_does_not_know(tmp_path: Path) -> None:
    planned = plan(tmp_path / "any.gguf")
    assert failure(planned, "--ctx-sise", "5") == (2, "error: unknown flag --ctx-sise (did you mean --ctx-size?)")
    assert failure(planned, "--ctx-size", "many") == (2, "error: --ctx-size wants a whole number, not 'many'")
    assert failure(planned, "--ctx-size") == (2, "error: --ctx-size needs a value")
    code, last = failure(planned, "--override-tensor", "rubbish")
    assert code == 2
    assert "does not take 'rubbish'" in last


def test_it_serves_nobody_without_a_key(tmp_path: Path) -> None:
    planned = plan(tmp_path / "any.gguf")
    done = subprocess.run(planned.argv, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stderr) == (2, "error: LLAMA_API_KEY is not set\n")


# --- planning --------------------------------------------------------------------------------------------------------


def test_the_plan(tmp_path: Path) -> None:
    planned = plan(tmp_path / "m.gguf", flags={"flash-attn": True, "ctk": "q8_0"}, env={"OMP_NUM_THREADS": "2"})
    python, safe_path, worker, *arguments = planned.argv
    assert (python, safe_path, worker) == (sys.executable, "-P", builtin_worker.__file__)
    assert arguments == [
        "--model", str(tmp_path / "m.gguf"), "--host", "127.0.0.1", "--port", str(planned.port), "--alias", "smol",
        "--ctx-size", "1024", "--parallel", "1", "--jinja", "--no-webui", "--slots",
        "--flash-attn", "on", "--cache-type-k", "q8_0",
    ]  # fmt: skip
    assert planned.env == {"OMP_NUM_THREADS": "2", "LLAMA_API_KEY": KEY}


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"ctx-sizes": 5}, "unknown flag --ctx-sizes .did you mean --ctx-size?"),
        ({"cache-type-k": "q9"}, "--cache-type-k wants one of f32, f16"),
        ({"threads": "two"}, "--threads wants a whole number, not 'two'"),
        ({"threads": 2**40}, "at most 31 bits"),
        ({"threads": True}, "--threads needs a value"),
        ({"mlock": "yes"}, "unknown flag yes"),
        ({"host": "0.0.0.0"}, "'host' cannot be set"),
        ({"chat-template-kwargs": "[1]"}, "a JSON object"),
        ({"chat-template-file": "/nowhere"}, "a readable text file"),
    ],
)
def test_a_mistake_is_refused_before_the_start(tmp_path: Path, flags: dict[str, Any], says: str) -> None:
    with pytest.raises(UnsupportedError, match=says):
        plan(tmp_path / "m.gguf", flags=flags)


def test_what_is_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    engine = BuiltinEngine("default", EngineConfig())
    info = engine.info()
    assert (info.kind, info.version, info.problem) == ("builtin", importlib.metadata.version("xllamacpp"), "")
    monkeypatch.setattr(builtin, "is_installed", lambda: False)
    assert "not installed" in engine.info().problem
    with pytest.raises(EngineMissingError, match="not installed") as caught:
        plan(tmp_path / "m.gguf")
    assert caught.value.hint == "pip install 'llamarunner[builtin]'"


EXAMPLES = {
    "alias": "a,b", "lora": "/l.gguf", "load-mode": "mmap+mlock", "cache-type-k": "q8_0", "cache-type-v": "iq4_nl",
    "slot-save-path": "/tmp", "flash-attn": "off", "rope-scaling": "yarn", "n-gpu-layers": "all", "split-mode": "row",
    "tensor-split": "3,1", "override-tensor": "exps=CPU", "fit": "off", "fit-target": "512,256", "prio": "-1",
    "numa": "isolate", "chat-template": "chatml", "chat-template-kwargs": '{"enable_thinking": false}',
    "reasoning-format": "deepseek-legacy", "pooling": "last", "host": "127.0.0.1,::1", "seed": "-1",
}  # fmt: skip


def test_every_flag_has_its_place_in_llama_cpp(tmp_path: Path) -> None:
    """In a child, as llama.cpp is never loaded into this process."""
    (tmp_path / "t.jinja").write_text("{{ x }}")
    examples = EXAMPLES | {"chat-template-file": str(tmp_path / "t.jinja")}
    arguments: list[str] = []
    for name, flag in FLAGS.items():
        arguments += [f"--{name}"] if flag.convert is None else [f"--{name}", examples.get(name, "7")]
    script = (
        "import sys, xllamacpp; from llamarunner.engines import builtin_worker as w;"
        "p = w._params(xllamacpp, w.parse(sys.argv[1:]), 'k');"
        "print([p.api_keys, sorted(p.model_alias), p.tensor_split[:3], p.fit_params_target, p.default_template_kwargs,"
        " p.hostnames, p.chat_template, p.cpuparams.n_threads, p.sampling.top_k, p.timeout_write, p.ui,"
        " [(a.path, a.scale) for a in p.lora_adapters], int(p.cache_type_v), p.sampling.seed])"
    )
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == (
        "[['k'], ['a', 'b'], [3.0, 1.0, 0.0], [536870912, 268435456], {'enable_thinking': 'false'},"
        " ['127.0.0.1', '::1'], '{{ x }}', 7, 7, 7, False, [('/l.gguf', 1.0)], 20, 4294967295]"
    )


@pytest.mark.parametrize("text", ["", "x", "1.5", "99999999999999999999", "-", "٣x"])
@pytest.mark.parametrize("name", [name for name, flag in FLAGS.items() if flag.convert is not None])
def test_no_value_breaks_the_parser(name: str, text: str) -> None:
    try:
        (setting,) = parse([f"--{name}", text])
    except FlagError as error:
        assert f"--{name} wants " in str(error)  # noqa: PT017 - either outcome is right
    else:
        assert setting.attribute == FLAGS[name].attribute
