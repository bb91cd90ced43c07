"""A scripted look-alike of llama-server, a program of its own: `python fake_engine.py --script JSON_OR_FILE ...`.

It takes llama-server's flags (unknown ones are ignored), `LLAMA_API_KEY`, answers its routes in its shapes, and
misbehaves as its script says. `--script` is a JSON object or the path of a file with one; a file is read again at each
request, so that a test can change the behaviour of a running engine. Keys, all optional:

  log             lines to print at start
  junk_bytes      print so many bytes without a newline at start
  load_s          seconds until the model is "loaded" (0.05); until then every route is 503 "Loading model"
  load_log_every_s  print a progress line this often while loading
  load_log        texts to print while loading, spread evenly over load_s; no newline is added to them
  prompt_log      lines to print when a generation begins, before prompt_s
  end_log         lines to print when it has ended
  exit            {"at": "start" | "load" | "ready" | "prompt" | "token:N", "code": 1} or {"at": ..., "signal": 11};
                  "load" is in place of becoming ready, "ready" is `"after_s"` (0.2) after /props (with no_props:
                  /health) was first answered, "token:N" after N tokens
  hang            "start" (never listens) | "load" (never loaded) | "health" (unanswered) | "prompt" | "token:N"
  gpu_bytes       hold so much of the GPUs of `fake_nvml.c` once loaded, shared out by --tensor-split over those of
                  CUDA_VISIBLE_DEVICES; where there is less, end as llama.cpp does that is out of memory
  ignore_sigterm  true: SIGTERM does nothing
  grandchild      "group" (stays in our process group) | "setsid" (double-forked into a session of its own); it sleeps
                  for ten minutes, keeps stdout open, ignores SIGTERM; "grandchild_pid_file" gets its pid
  health          {"status": 500, "body": ...}: what /health answers once loaded
  no_auth         true: ask for no key
  n_ctx, slots    what /props says (from --ctx-size and --parallel otherwise; n_ctx is per slot)
  no_props        true: /props is 404
  prompt_s        seconds before the first token; /slots shows how far the prompt is, and the tokens made
  no_slots        true: /slots is 501
  tokens          strings to stream as content (["Hello", " there", "!"])
  reasoning       strings to stream as reasoning_content before them
  tool_calls      [{"name": ..., "arguments": "{...}"}] to stream after them
  delay_s         seconds between tokens (0)
  finish_reason   in place of "stop", "length" (when max_tokens or n_predict cut it) or "tool_calls"
  drop            "prompt" | "token:N": break the connection there
  http_error      {"status": 500, "body": object or string}: the answer to every generation request
  raw             {"body": text, "chunk_bytes": N, "delay_s": 0, "content_type": "text/event-stream", "status": 200}:
                  replay the body byte for byte, in writes of N bytes ("base64" in place of "body" for any bytes)
  record          file to which one JSON line is appended for each request as it arrives
                  {"event": "request", "n", "method", "path", "headers", "body"} and ends
                  {"event": "end", "n", "path", "tokens", "disconnected"}
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from fake_engine_shapes import Chat, shape_for  # beside this script, which is run by its path
from fake_gpus import hold

PUBLIC = {"/", "/health", "/v1/health", "/models", "/v1/models"}
HELP_FLAGS = """
-m --model -c --ctx-size -np --parallel -ngl --gpu-layers --n-gpu-layers --host --port --api-key --alias --mmproj
--chat-template --chat-template-file --jinja --no-jinja --no-webui --no-ui --embedding --embeddings --pooling --slots
--no-slots --metrics --props --offline --log-verbosity --log-prefix --no-log-prefix --log-timestamps --log-colors
--cache-type-k --cache-type-v --flash-attn --threads --batch-size --ubatch-size --context-shift --reasoning-format
--tensor-split --split-mode --main-gpu --device --load-mode --no-mmap --mlock --kv-unified --cache-ram --fit
"""


def say(line: str) -> None:
    print(line, flush=True)


class Script:
    def __init__(self, source: str) -> None:
        self._source = source

    def read(self) -> dict[str, Any]:
        text = self._source
        if not text.lstrip().startswith("{"):
            text = Path(text).read_text(encoding="utf-8")
        loaded: dict[str, Any] = json.loads(text)
        return loaded


def end_process(script: dict[str, Any]) -> None:
    wanted = script["exit"]
    sys.stdout.flush()
    if "signal" in wanted:
        signal.signal(wanted["signal"], signal.SIG_DFL) if wanted["signal"] != signal.SIGKILL else None
        os.kill(os.getpid(), wanted["signal"])
        time.sleep(60)  # until it arrives
    os._exit(wanted.get("code", 1))


def exits_at(script: dict[str, Any], moment: str) -> bool:
    return bool(script.get("exit", {}).get("at") == moment)


def fork_grandchild(kind: str, pid_file: str | None) -> None:
    if os.fork():
        return
    if kind == "setsid":
        os.setsid()
        if os.fork():
            os._exit(0)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if pid_file:
        Path(pid_file).write_text(str(os.getpid()))
    time.sleep(600)
    os._exit(0)


def parse_flags(argv: list[str]) -> dict[str, str]:
    names = {"-m": "model", "-c": "ctx-size", "-np": "parallel", "-a": "alias"}
    found: dict[str, str] = {}
    for flag, following in itertools.zip_longest(argv, argv[1:]):
        name, equals, value = flag.partition("=")
        if name.startswith("-"):
            has_value = following is not None and not following.startswith("--")
            found[names.get(name, name.lstrip("-"))] = value if equals else (following if has_value else "")
    return found


class FakeEngine:
    def __init__(self, script: Script, flags: dict[str, str]) -> None:
        self.script = script
        self.flags = flags
        self.key = os.environ.get("LLAMA_API_KEY") or flags.get("api-key", "")
        self.model = flags.get("alias") or flags.get("model") or "fake"
        self.slots = int(script.read().get("slots") or flags.get("parallel") or 1)
        self.n_ctx = int(script.read().get("n_ctx") or int(flags.get("ctx-size") or 4096) // self.slots)
        self.loaded = False
        self.seen_ready = asyncio.Event()
        self.busy = 0
        self.prompt_begun: float | None = None
        self.decoded = 0  # tokens, ever
        self.numbers = itertools.count(1)

    # --- one request -------------------------------------------------------------------------------------------

    async def handle(self, request: Any) -> Any:
        from aiohttp import web  # here, so that an engine that dies at start does not wait for it

        script, number, body = self.script.read(), next(self.numbers), await request.read()
        if request.path != "/health":
            self.record(
                script, event="request", n=number, method=request.method, path=request.path_qs,
                headers={name.lower(): value for name, value in request.headers.items()},
                body=body.decode("utf-8", "replace"),
            )  # fmt: skip
        progress = {"tokens": 0}
        disconnected = True
        try:
            response = await self.answer(request, body, script, progress)
            disconnected = False
            return response
        except ConnectionResetError:
            return web.Response()
        finally:
            if request.path != "/health":
                self.record(script, event="end", n=number, path=request.path, disconnected=disconnected, **progress)

    async def answer(self, request: Any, body: bytes, script: dict[str, Any], progress: dict[str, int]) -> Any:
        if request.path == "/health" and script.get("hang") == "health":
            await asyncio.sleep(600)
        if not self.loaded:
            return self.error(503, "Loading model", "unavailable_error")
        if self.key and not script.get("no_auth") and request.path not in PUBLIC:
            given = request.headers.get("Authorization", "").removeprefix("Bearer ") or request.headers.get("x-api-key")
            if given != self.key:
                return self.error(401, "Invalid API Key", "authentication_error")
        match request.path:
            case "/health" | "/v1/health":
                wanted = script.get("health", {})
                if script.get("no_props"):
                    self.seen_ready.set()
                return self.json(wanted.get("body", {"status": "ok"}), wanted.get("status", 200))
            case "/props" if not script.get("no_props"):
                self.seen_ready.set()
                settings = {"n_ctx": self.n_ctx, "params": {}}
                return self.json({
                    "default_generation_settings": settings, "total_slots": self.slots, "model_alias": self.model,
                    "model_path": self.flags.get("model", ""), "chat_template": "", "build_info": "b0-fake",
                    "modalities": {"vision": False, "audio": False}, "chat_template_caps": {"supports_tools": True},
                })  # fmt: skip
            case "/slots" if script.get("no_slots"):
                return self.error(501, "This server does not support slots endpoint.", "not_supported_error")
            case "/slots":
                busy, begun = self.busy, self.prompt_begun
                past = int((time.monotonic() - begun) * 1000) if begun is not None else 0
                work = {"n_past": past, "next_token": [{"n_decoded": self.decoded}]}
                return self.json([
                    {"id": i, "n_ctx": self.n_ctx, "is_processing": i < busy, **(work if i < busy else {})}
                    for i in range(self.slots)
                ])  # fmt: skip
            case "/models" | "/v1/models":
                entry = {"id": self.model, "object": "model", "created": int(time.time()), "owned_by": "llamacpp"}
                return self.json({"object": "list", "data": [entry]})
        try:
            fields = json.loads(body) if body else {}
        except ValueError as error:
            return self.error(400, f"parse error: {error}", "invalid_request_error")
        match request.path:
            case "/v1/rerank":
                scores = [{"index": i, "relevance_score": -i} for i, _ in enumerate(fields["documents"])]
                return self.json({"object": "list", "results": scores, "usage": {"prompt_tokens": 5}})
            case "/tokenize":
                return self.json({"tokens": list(fields.get("content", "").encode())})
            case "/detokenize":
                return self.json({"content": bytes(fields.get("tokens", [])).decode("utf-8", "replace")})
            case "/apply-template":
                turns = [f"<|{turn['role']}|>{turn.get('content', '')}" for turn in fields.get("messages", [])]
                return self.json({"prompt": "\n".join([*turns, "<|assistant|>"])})
            case "/v1/messages/count_tokens":
                return self.json({"input_tokens": len(fields["messages"])})
            case "/v1/embeddings" | "/embeddings" | "/embedding":
                return self.embeddings(fields)
            case (
                "/v1/chat/completions"
                | "/chat/completions"
                | "/v1/completions"
                | "/completion"
                | "/infill"
                | "/v1/responses"
                | "/v1/messages"
            ):
                self.busy += 1
                try:
                    return await self.generate(request, fields, script, progress)
                finally:
                    self.busy -= 1
        return self.error(404, "File Not Found", "not_found_error")

    async def generate(self, request: Any, fields: dict[str, Any], script: dict[str, Any], progress: Any) -> Any:
        from aiohttp import web

        if wanted := script.get("http_error"):
            return self.json(wanted.get("body", ""), wanted["status"])
        shape = shape_for(request.path, self.model)
        if await self.fault(request, script, "prompt"):
            return web.Response()
        for line in script.get("prompt_log", []):
            say(line)
        self.prompt_begun = time.monotonic()
        await asyncio.sleep(script.get("prompt_s", 0))
        self.prompt_begun = None
        if raw := script.get("raw"):
            return await self.replay(request, raw)
        limit = fields.get("max_tokens") or fields.get("max_completion_tokens") or fields.get("n_predict")
        pieces = [("reasoning", text) for text in script.get("reasoning", []) if isinstance(shape, Chat)]
        pieces += [("content", text) for text in script.get("tokens", ["Hello", " there", "!"])]
        cut = isinstance(limit, int) and 0 <= limit < len(pieces)
        pieces = pieces[:limit] if cut else pieces
        calls = [] if cut else script.get("tool_calls", [])
        finish = script.get("finish_reason") or ("length" if cut else "tool_calls" if calls else "stop")
        response = None
        if fields.get("stream"):
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Server": "llama.cpp"})
            await response.prepare(request)
            await self.send(response, shape.first())
        started = time.monotonic()
        for count, (kind, text) in enumerate(pieces, start=1):
            if response is not None:
                await self.send(response, [shape.delta(kind, text)])
            progress["tokens"] = count
            self.decoded += 1
            if await self.fault(request, script, f"token:{count}"):
                return response or web.Response()
            await asyncio.sleep(script.get("delay_s", 0))
        for line in script.get("end_log", []):
            say(line)
        took_ms = (time.monotonic() - started) * 1000 + 0.001
        n = len(pieces)
        usage = {
            "completion_tokens": n, "prompt_tokens": 7, "total_tokens": n + 7,
            "prompt_tokens_details": {"cached_tokens": 3},
        }  # fmt: skip
        timings = {
            "cache_n": 3, "prompt_n": 4, "prompt_ms": 2.0, "prompt_per_token_ms": 0.5, "prompt_per_second": 2000.0,
            "predicted_n": n, "predicted_ms": took_ms, "predicted_per_token_ms": took_ms / max(n, 1),
            "predicted_per_second": n * 1000 / took_ms,
        }  # fmt: skip
        if response is None:
            return self.json(shape.whole(pieces, calls, finish, usage, timings))
        include_usage = bool((fields.get("stream_options") or {}).get("include_usage"))
        await self.send(response, shape.last(calls, finish, usage, timings, include_usage))
        await response.write_eof()
        return response

    async def replay(self, request: Any, raw: dict[str, Any]) -> Any:
        from aiohttp import web

        body = base64.b64decode(raw["base64"]) if "base64" in raw else raw["body"].encode()
        step = raw.get("chunk_bytes") or max(len(body), 1)
        kind = raw.get("content_type", "text/event-stream")
        response = web.StreamResponse(status=raw.get("status", 200), headers={"Content-Type": kind})
        await response.prepare(request)
        for start in range(0, len(body), step):
            await response.write(body[start : start + step])
            await asyncio.sleep(raw.get("delay_s", 0))
        await response.write_eof()
        return response

    async def fault(self, request: Any, script: dict[str, Any], moment: str) -> bool:
        """Do what the script wants at this moment; true when the connection is gone."""
        if exits_at(script, moment):
            end_process(script)
        if script.get("hang") == moment:
            await asyncio.sleep(600)
        if script.get("drop") == moment:
            request.transport.abort()
            return True
        return False

    def embeddings(self, fields: dict[str, Any]) -> Any:
        given = fields.get("input") or fields.get("content") or ""
        inputs = given if isinstance(given, list) and given and not isinstance(given[0], int) else [given]
        data = [
            {
                "object": "embedding",
                "index": i,
                "embedding": [round(((len(str(text)) + j) % 7) / 7, 6) for j in range(8)],
            }
            for i, text in enumerate(inputs)
        ]
        usage = {"prompt_tokens": 3 * len(inputs), "total_tokens": 3 * len(inputs)}
        return self.json({"model": self.model, "object": "list", "usage": usage, "data": data})

    # --- plumbing ----------------------------------------------------------------------------------------------

    @staticmethod
    async def send(response: Any, events: list[dict[str, Any] | str]) -> None:
        for event in events:
            text = event if isinstance(event, str) else json.dumps(event, separators=(",", ":"), ensure_ascii=False)
            prefix = "" if text.startswith("event: ") else "data: "
            await response.write(f"{prefix}{text}\n\n".encode())

    @staticmethod
    def json(value: Any, status: int = 200) -> Any:
        from aiohttp import web

        text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"), ensure_ascii=False)
        return web.Response(body=text.encode(), status=status, content_type="application/json", charset="utf-8")

    def error(self, code: int, message: str, kind: str) -> Any:
        return self.json({"error": {"message": message, "type": kind, "code": code}}, code)

    @staticmethod
    def record(script: dict[str, Any], **entry: Any) -> None:
        if path := script.get("record"):
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")

    async def serve(self) -> None:
        from aiohttp import web

        script, port = self.script.read(), int(self.flags.get("port") or 8080)
        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("*", "/{path:.*}", self.handle)
        runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        stopped = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGINT, stopped.set)
        loop.add_signal_handler(signal.SIGTERM, (lambda: None) if script.get("ignore_sigterm") else stopped.set)
        try:
            await web.TCPSite(runner, self.flags.get("host") or "127.0.0.1", port, reuse_address=True).start()
        except OSError:
            say(f"E srv         start: couldn't bind HTTP server socket, hostname: 127.0.0.1, port: {port}")
            say("E srv          init: exiting due to HTTP server error")
            sys.exit(1)
        loading = asyncio.create_task(self.load(port))
        await stopped.wait()
        loading.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await loading
        say("srv    operator(): operator(): cleaning up before exit...")
        await runner.cleanup()

    async def load(self, port: int) -> None:
        script = self.script.read()
        say(f"srv    load_model: loading model '{self.flags.get('model', '')}'")
        left, step = float(script.get("load_s", 0.05)), script.get("load_log_every_s", 0)
        if texts := script.get("load_log"):
            for text in texts:
                print(text, end="", flush=True)
                await asyncio.sleep(left / len(texts))
            left = 0
        while left > 0:
            await asyncio.sleep(min(left, step or left))
            left -= step or left
            if step:
                say("load_tensors: .")
        if exits_at(script, "load"):
            end_process(script)
        if script.get("hang") == "load":
            return
        if (missing := hold(script.get("gpu_bytes", 0), self.flags.get("tensor-split", ""))) is not None:
            say(
                f"ggml_backend_cuda_buffer_type_alloc_buffer: allocating {missing / 2**20:.2f} MiB on device 0: "
                "cudaMalloc failed: out of memory"
            )
            say("llama_model_load: error loading model: unable to allocate CUDA0 buffer")
            os._exit(1)
        self.loaded = True
        say("srv          init: model loaded")
        say(f"main: server is listening on http://127.0.0.1:{port} - starting the main loop")
        if exits_at(script, "ready"):
            await self.seen_ready.wait()
            await asyncio.sleep(script["exit"].get("after_s", 0.2))
            end_process(script)


def main(argv: list[str]) -> None:
    if "--version" in argv:
        say("version: 0 (fake)\nbuilt with a script for tests")
        return
    if "--help" in argv or "-h" in argv:
        say("usage: fake_engine.py [options]\n" + "\n".join(f"{flag}  N" for flag in HELP_FLAGS.split()))
        return
    flags = parse_flags(argv)
    script = Script(flags.get("script") or "{}")
    wanted = script.read()
    if wanted.get("ignore_sigterm"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    for line in wanted.get("log", []):
        say(line)
    for _ in range(wanted.get("junk_bytes", 0) // 65536):
        sys.stdout.write("x" * 65536)
    sys.stdout.write("x" * (wanted.get("junk_bytes", 0) % 65536))
    if wanted.get("grandchild"):
        fork_grandchild(wanted["grandchild"], wanted.get("grandchild_pid_file"))
    if exits_at(wanted, "start"):
        end_process(wanted)
    if wanted.get("hang") == "start":
        time.sleep(600)
    asyncio.run(FakeEngine(script, flags).serve())


if __name__ == "__main__":
    main(sys.argv[1:])
