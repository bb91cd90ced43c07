from __future__ import annotations

import signal
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamarunner.runners.crash import CauseKind, classify

# lines as builds of llama.cpp and its forks print them, from 2023 to 2026, with what must be found in them
LOADING = (
    "0.00.004.166 I srv          init: loading model",
    "0.00.004.230 I srv    load_model: loading model '/m/a.gguf'",
)
FAILING = (
    "0.00.005.694 E llama_model_load_from_file_impl: failed to load model",
    "0.00.005.690 E cmn  common_init_: failed to load model '/m/a.gguf'",
    "0.00.005.692 E srv    load_model: failed to load model, '/m/a.gguf'",
    "0.00.005.694 I srv    operator(): operator(): cleaning up before exit...",
    "0.00.006.009 E srv          init: exiting due to model loading error",
)
TRACEBACK = (
    "Traceback (most recent call last):",
    '  File "src/xllamacpp/xllamacpp.pyx", line 3270, in xllamacpp.xllamacpp.Server.__cinit__',
    "RuntimeError: Failed to init server, please check the input params.",
)

CORPUS = [
    # out of memory
    (
        [
            "ggml_backend_cuda_buffer_type_alloc_buffer: allocating 144817.04 MiB on device 0: cudaMalloc failed: "
            "out of memory",
            "alloc_tensor_range: failed to allocate CUDA0 buffer of size 151851674624",
            "llama_model_load: error loading model: unable to allocate CUDA0 buffer",
            *FAILING,
        ],
        1,
        "out_of_memory",
        "",
    ),
    (["ggml_gallocr_reserve_n: failed to allocate CUDA4 buffer of size 150995968"], 1, "out_of_memory", "CUDA4"),
    (["CUDA error: out of memory", "  current device: 0, in function alloc"], -6, "out_of_memory", ""),
    (["llama_kv_cache_init: failed to allocate buffer for kv cache"], 1, "out_of_memory", "kv cache"),
    (["terminate called after throwing an instance of 'std::bad_alloc'"], -6, "out_of_memory", "std::bad_alloc"),
    (["ggml_vulkan: vk::Device::allocateMemory: ErrorOutOfDeviceMemory"], 1, "out_of_memory", "ErrorOutOfDevice"),
    (["mmap failed: Cannot allocate memory"], 1, "out_of_memory", "Cannot allocate memory"),
    (["CUDA error: CUBLAS_STATUS_ALLOC_FAILED"], -6, "out_of_memory", "CUBLAS"),
    # arguments
    (["error: invalid argument: --mmap"], 1, "bad_argument", "invalid argument: --mmap"),
    (["error: unknown argument: -hf", "usage: llama-server [options]"], 1, "bad_argument", "unknown argument: -hf"),
    (['error while handling argument "--ctx-size": stoi', "usage:"], 1, "bad_argument", '"--ctx-size": stoi'),
    (["error: invalid parameter for argument: -l"], 1, "bad_argument", "-l"),
    (
        ["error: the argument has been removed. use --spec-draft-n-max instead"],
        1,
        "bad_argument",
        "use --spec-draft-n-max instead",
    ),
    (['error: unexpected argument: "--qdrant-url"'], 2, "bad_argument", "--qdrant-url"),
    (["./llamafile: unrecognized option: --v3"], 1, "bad_argument", "--v3"),
    # the model's kind
    (
        [
            *LOADING,
            "llama_model_load: error loading model: error loading model architecture: unknown model architecture: "
            "'qwen3vlmoe'",
            *FAILING,
        ],
        1,
        "unsupported_architecture",
        "unknown model architecture: 'qwen3vlmoe'",
    ),
    (
        ["0.00.147.118 E llama_model_load: error loading model: unknown model architecture: 'mllama'", *FAILING],
        1,
        "unsupported_architecture",
        "'mllama'",
    ),
    (
        ["llama_model_load: error loading model: unknown pre-tokenizer type: 'kimi-k9'"],
        1,
        "unsupported_architecture",
        "'kimi-k9'",
    ),
    # files
    (
        [
            *LOADING,
            "0.00.005.270 E gguf_init_from_file: failed to open GGUF file '/m/a.gguf' (No such file or directory)",
            "0.00.005.390 E llama_model_load: error loading model: llama_model_loader: failed to load model from "
            "/m/a.gguf",
            *FAILING,
            *TRACEBACK,
        ],
        1,
        "missing_file",
        "'/m/a.gguf' (No such file or directory)",
    ),
    (
        ["llama_model_load: error loading model: failed to open /m/a.gguf: Permission denied"],
        1,
        "missing_file",
        "Permission denied",
    ),
    (["error: failed to open file '/m/template.jinja'"], 1, "missing_file", "template.jinja"),
    (
        [
            *LOADING,
            "0.00.004.560 E gguf_init_from_reader: invalid magic characters: 'hell', expected 'GGUF'",
            "0.00.004.692 E llama_model_load: error loading model: llama_model_loader: failed to load model from "
            "/m/a.gguf",
            *FAILING,
            *TRACEBACK,
        ],
        1,
        "bad_model_file",
        "invalid magic characters: 'hell'",
    ),
    (
        ["gguf_init_from_file: invalid magic characters 'V'", "main: error: unable to load model"],
        1,
        "bad_model_file",
        "V",
    ),
    (["gguf_init_from_file: invalid magic number 67676a74"], 1, "bad_model_file", "67676a74"),
    (
        [
            *LOADING,
            "0.00.043.668 E llama_model_load: error loading model: tensor 'token_embd.weight' data is not within the "
            "file bounds, model is corrupted or incomplete",
            *FAILING,
            *TRACEBACK,
        ],
        1,
        "bad_model_file",
        "tensor 'token_embd.weight' data is not within the file bounds",
    ),
    (
        ["llama_model_load: error loading model: done_getting_tensors: wrong number of tensors; expected 292, got 291"],
        1,
        "bad_model_file",
        "expected 292, got 291",
    ),
    (["llama_model_load: error loading model: something new", *FAILING], 1, "bad_model_file", "something new"),
    # the port
    (
        [
            "0.00.010.136 E srv         start: couldn't bind HTTP server socket, hostname: 127.0.0.1, port: 18999",
            "0.00.010.155 I srv    operator(): operator(): cleaning up before exit...",
            "0.00.010.270 E srv          init: exiting due to HTTP server error",
            *TRACEBACK,
        ],
        1,
        "port_taken",
        "port: 18999",
    ),
    (["couldn't bind to server socket: hostname=127.0.0.1 port=8898"], 1, "port_taken", "8898"),
    (["OSError: [Errno 98] Address already in use"], 1, "port_taken", ""),
    # libraries
    (
        [
            "/app/llama-server: error while loading shared libraries: libmtmd.so.0: cannot open shared object file: "
            "No such file or directory"
        ],
        127,
        "missing_library",
        "libmtmd.so.0",
    ),
    (
        ["llama-server: /lib/x86_64-linux-gnu/libc.so.6: version `GLIBC_2.38' not found (required by llama-server)"],
        1,
        "missing_library",
        "GLIBC_2.38",
    ),
    (
        ["llama-server: symbol lookup error: llama-server: undefined symbol: llama_foo"],
        127,
        "missing_library",
        "llama_foo",
    ),
    (["run.sh: line 3: llama-server: command not found"], 127, "missing_library", "command not found"),
    # crashes
    ([], -signal.SIGILL, "illegal_instruction", "processor"),
    (["run.sh: line 3: 71 Illegal instruction (core dumped) llama-server"], 132, "illegal_instruction", "processor"),
    (
        ["/build/ggml/src/ggml.c:3210: GGML_ASSERT(ggml_can_repeat(b, a)) failed"],
        -6,
        "crashed",
        "GGML_ASSERT(ggml_can_repeat(b, a)) failed",
    ),
    (["CUDA error: no kernel image is available for execution on the device"], -6, "crashed", "no kernel image"),
    (["ROCm error: invalid device function"], -6, "crashed", "invalid device function"),
    ([*LOADING], -signal.SIGSEGV, "crashed", "SIGSEGV"),
    ([*LOADING], 128 + signal.SIGSEGV, "crashed", "SIGSEGV"),
    # the rest
    ([*LOADING], -signal.SIGKILL, "killed", "SIGKILL"),
    ([*LOADING], 137, "killed", "SIGKILL"),
    ([*LOADING], -signal.SIGTERM, "killed", "SIGTERM"),
    ([*LOADING], 0, "exited", "exit code 0"),
    (["hello", "error: I do not want to", "goodbye", ""], 3, "exited", "exit code 3: error: I do not want to"),
    (["0.00.006.009 E srv  init: exiting due to bad mood", "0.00.006.010 I srv  bye"], 1, "exited", "bad mood"),
    (["hello", "", "  "], 1, "exited", "hello"),
    ([], 1, "exited", "exit code 1"),
    ([], 255, "exited", "exit code 255"),
    ([], None, "unknown", "failed"),
    # complaints that were no reason to end
    (
        [
            "1.06.520.077 E ggml_backend_cuda_buffer_type_alloc_buffer: allocating 51748.72 MiB on device 1: "
            "cudaMalloc failed: out of memory",
            "1.06.520.086 E graph_reserve: failed to allocate compute buffers",
            "1.06.520.107 W sched_reserve: compute buffer allocation failed, retrying without pipeline parallelism",
            "1.07.304.130 I srv    load_model: initializing, n_slots = 1, n_ctx_slot = 50176",
        ],
        -signal.SIGSEGV,
        "crashed",
        "SIGSEGV",
    ),
    (
        ["ggml_cuda_host_malloc: failed to allocate 1900.00 MiB of pinned memory: invalid argument", *LOADING],
        -signal.SIGSEGV,
        "crashed",
        "SIGSEGV",
    ),
]


@pytest.mark.parametrize(("lines", "exit_code", "kind", "words"), CORPUS)
def test_corpus(lines: list[str], exit_code: int | None, kind: str, words: str) -> None:
    cause = classify(exit_code, lines)
    assert cause.kind == kind
    assert words in cause.summary
    assert not cause.summary.endswith(".")
    assert "\n" not in cause.summary


def test_every_kind_is_in_the_corpus() -> None:
    assert {kind for _, _, kind, _ in CORPUS} == set(CauseKind)


@pytest.mark.parametrize("kind", set(CauseKind) - {CauseKind.EXITED, CauseKind.UNKNOWN})
def test_hints(kind: CauseKind) -> None:
    lines, exit_code = next((lines, code) for lines, code, of, _ in CORPUS if of == kind)
    assert classify(exit_code, lines).hint


def test_the_newest_line_counts() -> None:
    cause = classify(1, ["error: invalid argument: --old", "error: invalid argument: --new"])
    assert cause.summary.endswith("--new")


@given(st.none() | st.integers(-100, 300), st.lists(st.text(max_size=2000), max_size=30))
def test_anything_can_be_classified(exit_code: int | None, lines: list[str]) -> None:
    cause = classify(exit_code, lines)
    assert cause.summary
    assert "\n" not in cause.summary
    assert len(cause.summary) < 500


@pytest.mark.parametrize(
    "junk", ["x" * 2_000_000, "failed to open " * 100_000, "error: a: " * 100_000], ids=["one word", "opens", "errors"]
)
def test_long_lines_take_no_time(junk: str) -> None:
    begun = time.perf_counter()
    classify(1, [junk] * 200)
    assert time.perf_counter() - begun < 1.0
