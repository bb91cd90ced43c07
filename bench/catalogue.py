"""What the catalogue costs: two thousand models found for the first time, after a restart, and again where nothing
changed; one large header; and what an idle daemon spends on looking."""

from __future__ import annotations

import os
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from bench.program import Program
from bench.rows import Effort, Row
from llamarunner.catalog.gguf import read_header
from llamarunner.catalog.headers import HeaderCache
from llamarunner.catalog.stores import Discovery
from llamarunner.config.schema import Config, DiscoveryConfig
from tests.fakes.gguf_file import gguf_bytes, text

FILES, FOLDERS = 2000, 200
LAYERS = 24
WITH_VOCABULARY = 20  # one file in so many has all of a real tokenizer, the others its first words
VOCABULARY, FEW = 32_000, 256
LARGE_VOCABULARY, LARGE_BYTES = 151_936, 250 * 10**6

_COLD = """
import sys, time
from bench.catalogue import look
started = time.perf_counter()
found = look(sys.argv[1], sys.argv[2])
print(len(found.look()), time.perf_counter() - started)
"""


def catalogue(program: Program, effort: Effort) -> Iterator[Row]:
    yield _large_header(program.home)
    root, cache = program.home / "models", program.home / "headers"
    _make_models(root)
    what = f"{FILES:,} models"
    yield Row(f"{what}: found the first time", _in_a_new_process(root, cache), "s", 5)
    warm = [_in_a_new_process(root, cache) for _ in range(effort.starts)]
    yield Row(f"{what}: after a restart, median", statistics.median(warm), "s", 0.3)
    yield Row(f"{what}: the cache", cache.stat().st_size / 1e6, "MB")
    found = look(str(root), str(cache))
    found.look()
    yield Row(f"{what}: a look where nothing changed", 1000 * _median(found, effort.starts), "ms", 50)
    changed = []
    for number in range(effort.starts):
        path = root / "7" / f"new{number}.gguf"
        path.write_bytes(_model(10_000 + number, FEW))
        started = time.perf_counter()
        assert len(found.look()) == FILES + number + 1
        changed.append(time.perf_counter() - started)
    yield Row(f"{what}: a look where one came", 1000 * statistics.median(changed), "ms", 300)


def look(root: str, cache: str) -> Discovery:
    discovery = DiscoveryConfig(ollama=False, lmstudio=False, huggingface=False, folders=[Path(root)])
    return Discovery(Config(discovery=discovery), headers=HeaderCache(Path(cache)), environ={"HOME": "/nonexistent"})


def _in_a_new_process(root: Path, cache: Path) -> float:
    """Seconds, without those that Python itself takes to start."""
    command = [sys.executable, "-c", _COLD, str(root), str(cache)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    assert int(output[0]) == FILES
    return float(output[1])


def _median(found: Discovery, times: int) -> float:
    took = []
    for _ in range(times):
        started = time.perf_counter()
        found.look()
        took.append(time.perf_counter() - started)
    return statistics.median(took)


def _large_header(folder: Path) -> Row:
    path = folder / "large.gguf"
    path.write_bytes(_model(0, LARGE_VOCABULARY))
    os.truncate(path, LARGE_BYTES)
    took = []
    for _ in range(9):
        started = time.perf_counter()
        read_header(path)
        took.append(time.perf_counter() - started)
    return Row(f"header of a 250 MB model, {LARGE_VOCABULARY:,} tokens", 1000 * statistics.median(took), "ms", 20)


def _make_models(root: Path) -> None:
    for number in range(FILES):
        folder = root / str(number % FOLDERS)
        folder.mkdir(parents=True, exist_ok=True)
        words = VOCABULARY if number % WITH_VOCABULARY == 0 else FEW
        (folder / f"Model-{number}-Instruct-Q4_K_M.gguf").write_bytes(_model(number, words))
    old = time.time() - 3600
    for folder in root.iterdir():
        os.utime(folder, (old, old))


def _model(number: int, words: int) -> bytes:
    """With the keys, the chat template and the tensors of a model of half a billion parameters, but tiny ones."""
    vocabulary = [b"tok%d" % word for word in range(words)]
    metadata = {
        "general.architecture": "qwen3",
        "general.type": "model",
        "general.name": f"Model {number} Instruct",
        "general.basename": "Model",
        "general.size_label": "0.6B",
        "general.license": "apache-2.0",
        "general.tags": ["text-generation", "chat", "conversational"],
        "general.file_type": 15,
        "qwen3.block_count": LAYERS,
        "qwen3.context_length": 40960,
        "qwen3.embedding_length": 32,
        "qwen3.feed_forward_length": 64,
        "qwen3.attention.head_count": 4,
        "qwen3.attention.head_count_kv": 2,
        "qwen3.attention.layer_norm_rms_epsilon": 1e-6,
        "qwen3.rope.freq_base": 1_000_000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": _strings(vocabulary),
        "tokenizer.ggml.token_type": struct.pack("<IIQ", 9, 5, words) + struct.pack("<i", 1) * words,
        "tokenizer.ggml.merges": _strings([b"a b%d" % word for word in range(words)]),
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": "{% for message in messages %}{% if tools %}<think></think>{{ x }}" * 60,
        "general.quantization_version": 2,
    }
    names = [f"blk.{layer}.{part}.weight" for layer in range(LAYERS) for part in _PARTS]
    tensors = [
        (name, (32,), 0, 128 * at) for at, name in enumerate(("token_embd.weight", "output_norm.weight", *names))
    ]
    return gguf_bytes(metadata, tensors, 128 * len(tensors))


_PARTS = (
    "attn_q", "attn_k", "attn_v", "attn_output", "attn_norm", "attn_q_norm", "attn_k_norm", "ffn_up", "ffn_down",
    "ffn_gate", "ffn_norm",
)  # fmt: skip


def _strings(words: list[bytes]) -> bytes:
    return struct.pack("<IIQ", 9, 8, len(words)) + b"".join(map(text, words))
