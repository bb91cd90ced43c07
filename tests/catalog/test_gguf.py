from __future__ import annotations

import io
import os
import random
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf as oracle
import numpy as np
import pytest
from gguf_file import gguf_bytes, model_bytes, text, whole_files, write_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutants import mutate

from llamarunner.catalog import gguf
from llamarunner.catalog.details import details_of, format_parameters, read_details
from llamarunner.catalog.gguf import printable, read_header
from llamarunner.errors import ModelFileError

ARRAY = struct.pack("<I", 9)


def refusal(path: Path, data: bytes) -> ModelFileError:
    path.write_bytes(data)
    with pytest.raises(ModelFileError) as caught:
        read_header(path)
    assert caught.value.hint
    assert str(path) in caught.value.message
    return caught.value


# --- whole files -----------------------------------------------------------------------------------------------------


def test_what_a_real_model_says(smollm2: Path) -> None:
    details = read_details(smollm2)
    assert (details.architecture, details.basename, details.quantization) == ("llama", "smollm2", "Q4_1")
    assert (details.parameter_count, details.parameter_size) == (134_515_008, "135M")
    assert (details.context_length, details.embedding_length, details.block_count) == (8192, 576, 30)
    assert "<|im_start|>" in details.chat_template
    assert details.capabilities == {"completion"}
    assert details.metadata is not None
    assert details.metadata["tokenizer.ggml.tokens"] is None
    assert details.metadata["general.languages"] == ["en"]
    assert next(iter(details.metadata)) == "general.architecture"


def test_a_real_header_is_read_quickly(smollm2: Path) -> None:
    took = []
    for _ in range(5):
        start = time.perf_counter()
        read_header(smollm2)
        took.append(time.perf_counter() - start)
    assert min(took) < 0.1  # 12 ms on an idle core; the margin is for a busy machine


def test_the_same_as_the_reference_reader(tmp_path: Path, smollm2: Path) -> None:
    for path in (smollm2, *(write_by_oracle(tmp_path / f"{name}.gguf", name) for name in ("qwen3", "bert", "gemma3"))):
        _assert_same(path, oracle.GGUFReader(path))


def _assert_same(path: Path, reference: oracle.GGUFReader) -> None:
    header = read_header(path)
    assert header.tensor_count == len(reference.tensors)
    by_type: dict[str, int] = {}
    for tensor in reference.tensors:
        by_type[tensor.tensor_type.name] = by_type.get(tensor.tensor_type.name, 0) + int(tensor.n_elements)
    assert header.parameters == by_type
    theirs = {name: field for name, field in reference.fields.items() if not name.startswith("GGUF.")}
    assert list(header.metadata) == list(theirs)
    for name, field in theirs.items():
        if header.metadata[name] is None:
            assert field.types[0] == oracle.GGUFValueType.ARRAY
            assert name.startswith("tokenizer.") or len(field.data) > gguf.KEPT_ITEMS
        else:
            assert header.metadata[name] == field.contents()


def write_by_oracle(path: Path, architecture: str) -> Path:
    writer = oracle.GGUFWriter(path, architecture)
    writer.add_context_length(2048)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_file_type(oracle.LlamaFileType.MOSTLY_Q4_K_M)
    writer.add_chat_template("{% if tools %}{{ tools }}{% endif %}<think></think>")
    writer.add_token_list([f"token{i}" for i in range(300)])
    writer.add_token_scores([float(i) for i in range(300)])
    writer.add_array("x.short", [1, 2, 3])
    writer.add_array("x.words", ["a", "bc", "日本"])
    writer.add_array("x.long", list(range(200)))
    writer.add_float64("x.double", 0.1)
    writer.add_int64("x.negative", -(2**40))
    writer.add_bool("x.yes", True)
    writer.add_tensor("token_embd.weight", np.zeros((300, 64), dtype=np.float32))
    writer.add_tensor("blk.0.weight", np.zeros((64, 64), dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_large_vocabularies_do_not_cost_a_second(tmp_path: Path) -> None:
    words = b"".join(text(b"word%d" % i) for i in range(250_000))
    tokens = ARRAY + struct.pack("<IQ", 8, 250_000) + words
    path = tmp_path / "big.gguf"
    path.write_bytes(gguf_bytes({"tokenizer.ggml.tokens": tokens, "after": 7}))
    start = time.perf_counter()
    assert read_header(path).metadata == {"tokenizer.ggml.tokens": None, "after": 7}
    assert time.perf_counter() - start < 0.5


def test_strings_longer_than_the_window(tmp_path: Path) -> None:
    path = tmp_path / "long.gguf"
    words = ["x" * 400_000, "y", "z" * 300_000]
    path.write_bytes(gguf_bytes({"a": "t" * 1_000_000, "tokenizer.ggml.tokens": words, "b": words, "c": 1}))
    assert read_header(path).metadata == {"a": "t" * 1_000_000, "tokenizer.ggml.tokens": None, "b": words, "c": 1}


def test_version_2_is_read_too(tmp_path: Path) -> None:
    path = tmp_path / "v2.gguf"
    path.write_bytes(gguf_bytes({"general.architecture": "llama"}, version=2))
    assert read_header(path).architecture == "llama"


def test_a_tensor_type_of_a_fork_is_no_error(tmp_path: Path) -> None:
    path = tmp_path / "fork.gguf"
    path.write_bytes(gguf_bytes({"general.architecture": "llama"}, [("w", (256, 2), 137, 0)], 64))
    assert details_of(read_header(path)).quantization == "type 137"


def test_invalid_text_is_made_printable(tmp_path: Path) -> None:
    path = tmp_path / "text.gguf"
    raw = struct.pack("<I", 8) + text(b"\xff\x1b]0;evil\x07")
    path.write_bytes(gguf_bytes({"general.architecture": raw, "general.basename": raw}))
    details = read_details(path)
    assert details.architecture.isprintable()
    assert details.basename.isprintable()
    assert printable("a\ud800b\x1bc") == "a\ufffdb\ufffdc"


# --- files that are refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [0.999, 0.5, 0.05])
def test_a_file_that_is_cut_short(smollm2: Path, tmp_path: Path, kept: float) -> None:
    size = smollm2.stat().st_size
    path = tmp_path / "cut.gguf"
    with smollm2.open("rb") as source:
        path.write_bytes(source.read(int(size * kept)))
    start = time.perf_counter()
    with pytest.raises(ModelFileError, match=rf"cut short: needs {size} bytes, has {int(size * kept)}") as caught:
        read_header(path)
    assert time.perf_counter() - start < 0.3  # 15 ms on an idle core
    assert caught.value.hint == "download it again"


def test_a_header_that_is_cut_short(tmp_path: Path) -> None:
    whole = model_bytes()
    for length in range(5, len(whole) - 64 * 32 * 2, 7):
        assert "cut short" in refusal(tmp_path / "x.gguf", whole[:length]).message


@pytest.mark.parametrize(
    ("start", "says"),
    [
        (b"", "empty"),
        (b"G", "not a GGUF"),
        (b"hello, this is some text that is no model", "not a GGUF"),
        (b"\n<!DOCTYPE html><html>", "web page"),
        (b"<html><head>404", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "LFS pointer"),
        (b"PK\x03\x04" + bytes(40), "ZIP"),
        (b"tjgg" + bytes(40), "old GGML"),
        (b"GGUF", "cut short"),
        (b"GGUF\x01\0\0\0" + bytes(16), "version 1 is too old"),
        (b"GGUF\x09\0\0\0" + bytes(16), "version 9 is not known"),
        (b"GGUF\0\0\0\x03" + bytes(16), "big-endian"),
    ],
)
def test_what_is_not_a_gguf(tmp_path: Path, start: bytes, says: str) -> None:
    assert says in refusal(tmp_path / "x.gguf", start).message


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


LIES: dict[str, tuple[bytes, str]] = {
    "2^60 keys": (gguf_bytes(key_count=2**60), "keys"),
    "2^60 tensors": (gguf_bytes(tensor_count=2**60), "tensors"),
    "more keys than there are": (gguf_bytes({"a": 1}, key_count=2), "cut short"),
    "60000 tensors that are not there": (gguf_bytes(tensor_count=60_000), "cut short"),
    "a string of 2^64-1 bytes": (gguf_bytes({"a": struct.pack("<IQ", 8, 2**64 - 1)}), "cut short"),
    "a key of 2^63 bytes": (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**63), "cut short"),
    "an array of 2^64-1 numbers": (gguf_bytes({"a": ARRAY + struct.pack("<IQ", 10, 2**64 - 1)}), "cut short"),
    "an array of 2^61 strings": (gguf_bytes({"a": ARRAY + struct.pack("<IQ", 8, 2**61)}), "cut short"),
    "an array of 2^61 arrays": (gguf_bytes({"a": ARRAY + struct.pack("<IQ", 9, 2**61)}), "lists within lists"),
    "a token list whose strings run off": (
        gguf_bytes({"tokenizer.x": ARRAY + struct.pack("<IQ", 8, 2) + u64(2**62) + u64(0)}),
        "cut short",
    ),
    "an unknown value type": (gguf_bytes({"a": struct.pack("<II", 99, 0)}), "unknown type 99"),
    "an unknown item type": (gguf_bytes({"a": ARRAY + struct.pack("<IQI", 77, 1, 0)}), "unknown type 77"),
    "arrays nested 40 deep": (gguf_bytes({"a": ARRAY + struct.pack("<IQ", 9, 1) * 40 + bytes(64)}), "deep"),
    "a key twice": (gguf_bytes([("a", 1), ("a", 2)]), "twice"),
    "a tensor twice": (gguf_bytes({}, [("w", (4,), 0, 0), ("w", (4,), 0, 32)], 64), "twice"),
    "a tensor of 9 dimensions": (gguf_bytes({}, [("w", (1,) * 9, 0, 0)], 64), "dimensions"),
    "a tensor of 2^128 elements": (gguf_bytes({}, [("w", (2**63, 2**63, 4), 0, 0)], 64), "elements"),
    "a tensor past the end": (gguf_bytes({}, [("w", (64,), 0, 32)], 64), "cut short: needs 352 bytes, has 128"),
    "an offset past the end": (gguf_bytes({}, [("w", (1,), 0, 2**63)], 64), "cut short: needs"),
    "an offset that is not aligned": (gguf_bytes({}, [("w", (1,), 0, 7)], 64), "aligned"),
    "rows that are no whole blocks": (gguf_bytes({}, [("w", (100, 4), 12, 0)], 999), "blocks"),
    "an alignment of 0": (gguf_bytes({"general.alignment": 0}), "alignment"),
    "an alignment of 33": (gguf_bytes({"general.alignment": 33}), "alignment"),
    "an alignment that is text": (gguf_bytes({"general.alignment": "32"}), "alignment"),
}


@pytest.mark.parametrize("name", LIES)
def test_lies(tmp_path: Path, name: str) -> None:
    data, says = LIES[name]
    start = time.perf_counter()
    assert says in refusal(tmp_path / "x.gguf", data).message
    assert time.perf_counter() - start < 0.1


def test_caps_hold_however_large_the_file(tmp_path: Path) -> None:
    path = tmp_path / "sparse.gguf"
    for value, says in (
        (struct.pack("<IQ", 8, 2**25), "a text of"),
        (struct.pack("<IIQ", 9, 0, 2**40), "larger than 64.0 MiB"),
        (struct.pack("<IIQ", 9, 8, 2**22), "more than 1250000 items"),
        (struct.pack("<IIQ", 9, 8, 3) + 3 * text("x" * 2**20), "texts are larger than 2.0 MiB"),
    ):
        path.write_bytes(gguf_bytes({"a": value}))
        os.truncate(path, 2**41)  # sparse: it takes no room
        start = time.perf_counter()
        with pytest.raises(ModelFileError, match=says):
            read_header(path)
        assert time.perf_counter() - start < 0.1


def test_only_regular_files(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo.gguf"
    os.mkfifo(fifo)
    for path, says in ((fifo, "not a regular file"), (tmp_path, "a folder"), (Path("/dev/zero"), "not a regular file")):
        start = time.perf_counter()
        with pytest.raises(ModelFileError, match=says):
            read_header(path)
        assert time.perf_counter() - start < 0.1


def test_paths_that_lead_nowhere(tmp_path: Path) -> None:
    loop = tmp_path / "loop.gguf"
    loop.symlink_to(loop)
    missing = tmp_path / "missing.gguf"
    for path, says in ((missing, "no such file"), (loop, "cannot be read"), (tmp_path / "a\0b", "cannot be read")):
        with pytest.raises(ModelFileError, match=says):
            read_header(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    path = write_model(tmp_path / "secret.gguf")
    path.chmod(0)
    with pytest.raises(ModelFileError, match="may not be read"):
        read_header(path)


# --- mutations -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    folder = tmp_path_factory.mktemp("originals")
    architectures = ("llama", "qwen3moe", "bert", "gemma3", "mamba", "gpt-oss")
    written = [write_by_oracle(folder / f"{name}.gguf", name).read_bytes() for name in architectures]
    return [*written, *whole_files()]


def read_or_refuse(path: Path) -> bool:
    """Whether it could be read. Anything but a result or a ModelFileError, or more than a second, fails the test."""
    start = time.perf_counter()
    try:
        details = read_details(path)
    except ModelFileError:
        return False
    finally:
        assert time.perf_counter() - start < 1
    assert details.parameter_count >= 0
    return True


def test_four_thousand_mutants(originals: list[bytes], tmp_path: Path) -> None:
    chance, read, path = random.Random(20), 0, tmp_path / "mutant.gguf"
    for _ in range(4000):
        path.write_bytes(mutate(chance.choice(originals), chance))
        read += read_or_refuse(path)
    assert 200 < read < 3800  # the mutations reach past the first check, and they are noticed


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    which=st.integers(0, 14),
    edits=st.lists(st.tuples(st.integers(0, 4000), st.binary(max_size=12), st.integers(0, 16)), min_size=1, max_size=6),
)
def test_mutants_that_hypothesis_thinks_of(
    originals: list[bytes], tmp_path: Path, which: int, edits: list[tuple[int, bytes, int]]
) -> None:
    data = bytearray(originals[which])
    for at, inserted, removed in edits:
        data[at : at + removed] = inserted
    path = tmp_path / "mutant.gguf"
    path.write_bytes(data)
    read_or_refuse(path)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=st.binary(max_size=300))
def test_noise_behind_a_good_start(tmp_path: Path, body: bytes) -> None:
    path = tmp_path / "noise.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 2, 3) + body)
    read_or_refuse(path)


# --- what the header means -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "more", "expected"),
    [
        ("llama", {}, {"completion"}),
        ("bert", {}, {"embedding"}),
        ("qwen3", {"qwen3.pooling_type": 3}, {"embedding"}),
        ("qwen3", {"tokenizer.chat_template": "{% for t in tools %}"}, {"completion", "tools"}),
        ("qwen3", {"tokenizer.chat_template": "{{ enable_thinking }}"}, {"completion", "thinking"}),
        ("qwen3", {"tokenizer.chat_template": "<think>\n</think>"}, {"completion", "thinking"}),
        ("gpt-oss", {}, {"completion", "thinking"}),
        ("llama", {"tokenizer.ggml.fim_pre_token_id": 5}, {"completion", "insert"}),
        ("gemma3", {"gemma3.vision.block_count": 27}, {"completion", "vision"}),
        ("gemma4", {"gemma4.audio.block_count": 12}, {"completion", "audio"}),
    ],
)
def test_capabilities(tmp_path: Path, architecture: str, more: dict[str, Any], expected: set[str]) -> None:
    path = write_model(tmp_path / "m.gguf", architecture, **more)
    assert read_details(path).capabilities == expected


def test_the_quantization_without_a_file_type_is_that_of_most_parameters(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    tensors = [("a", (32,), 0, 0), ("b", (256, 4), 12, 128)]
    path.write_bytes(gguf_bytes({"general.architecture": "llama"}, tensors, 1024))
    assert read_details(path).quantization == "Q4_K"


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, ""),
        (500, "1K"),
        (12_000, "12K"),
        (4_390_000, "4.4M"),
        (22_565_376, "23M"),
        (134_515_008, "135M"),
        (999_900_000, "1.0B"),
        (8_190_735_360, "8.2B"),
        (70_553_706_496, "70.6B"),
        (671_026_419_200, "671.0B"),
    ],
)
def test_parameters_as_people_say_them(count: int, text: str) -> None:
    assert format_parameters(count) == text


def test_numbers_of_the_wrong_type_are_not_believed(tmp_path: Path) -> None:
    wrong: dict[str, Callable[[], Any] | Any] = {"llama.context_length": "many", "llama.block_count": True}
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_bytes({"general.architecture": "llama", "llama.embedding_length": [1, 2]} | wrong))
    details = read_details(path)
    assert (details.context_length, details.block_count, details.embedding_length) == (0, 0, 0)


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 300)), max_size=12), st.sampled_from([b"", b"x" * 5000]))
def test_lists_of_strings_are_stepped_over_to_their_very_end(runs: list[tuple[int, int]], long: bytes) -> None:
    """Runs of equal lengths, short and longer ones, over the end of more than one window."""
    texts = [b"\0" * length for length, count in runs for _ in range(count)] * 3 + [long]
    data = b"".join(struct.pack("=Q", len(text)) + text for text in texts)
    cursor = gguf._Cursor(io.BytesIO(data + b"end"), len(data) + 3)
    cursor.skip_strings(len(texts))
    assert cursor.offset == len(data)
    assert cursor.take(3) == b"end"
