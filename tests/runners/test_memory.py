from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from gguf_file import gguf_bytes
from hypothesis import given
from hypothesis import strategies as st

from llamarunner.catalog.catalog import Model, ModelDetails, Weights
from llamarunner.catalog.details import details_of, read_details
from llamarunner.catalog.gguf import read_header
from llamarunner.config.schema import EngineConfig, ModelSettings
from llamarunner.engines.builtin import BuiltinEngine
from llamarunner.errors import UnsupportedError
from llamarunner.runners.caches import CacheSettings, caches
from llamarunner.runners.memory import MIB, Allocation, Companions, Need, companions, estimate

COMMON: dict[str, Any] = {
    "context_length": 8192,
    "embedding_length": 512,
    "feed_forward_length": 1536,
    "attention.head_count": 8,
    "attention.head_count_kv": 4,
    "attention.key_length": 64,
    "attention.value_length": 64,
}
WINDOW = {"attention.sliding_window": 512}
MAMBA = {"ssm.conv_kernel": 4, "ssm.inner_size": 1024, "ssm.state_size": 16}
LFM2 = {"attention.head_count_kv": [0, 0, 4, 0, 0, 4, 0, 4], "shortconv.l_cache": 3}
MLA = {
    "attention.head_count_kv": 1,
    "attention.key_length": 288,
    "attention.key_length_mla": 96,
    "attention.value_length_mla": 64,
    "attention.kv_lora_rank": 256,
}
MOE = {"expert_count": 8, "expert_used_count": 2, "expert_feed_forward_length": 512}


def details(architecture: str, layers: int = 8, vocabulary: int = 16_384, **more: Any) -> ModelDetails:
    keys = {f"{architecture}.{key}": value for key, value in (COMMON | more).items()}
    weights = Weights((10 * MIB,) * layers, (0,) * layers, embedding=16 * MIB, output=16 * MIB)
    return ModelDetails(
        architecture=architecture, context_length=8192, metadata=keys, weights=weights, vocabulary=vocabulary
    )


def model(known: ModelDetails, context: int = 4096, parallel: int = 1, **flags: Any) -> Model:
    named = {name.replace("_", "-"): value for name, value in flags.items()}
    return Model("m", Path("/m.gguf"), ModelSettings(context=context, parallel=parallel, flags=named), known)


# --- against what llama.cpp logs of its buffers ----------------------------------------------------------------------

LOGGED = [
    # architecture, its keys, context x slots, flags, MiB of keys, values and states, MiB of compute buffer
    ("llama", {}, 4096, 1, {}, 32.0, 18.02),
    ("llama", {}, 2048, 4, {}, 64.0, 16.02),
    ("llama", {}, 2048, 4, {"kv_unified": True}, 64.0, 22.02),
    ("llama", {}, 333, 3, {}, 12.0, 14.55),
    ("llama", {}, 4096, 1, {"flash_attn": "off"}, 32.0, 79.01),
    ("llama", {}, 4096, 1, {"cache_type_k": "q8_0", "cache_type_v": "q4_0"}, 13.0, 18.05),
    ("llama", {}, 4096, 1, {"cache_type_k": "q8_0", "flash_attn": "off"}, 24.5, 78.03),
    ("llama", {}, 4096, 1, {"ubatch_size": 128}, 32.0, 4.50),
    ("llama", {}, 4096, 1, {"ubatch_size": 1024}, 32.0, 36.04),
    ("llama", {}, 4096, 1, {"ubatch_size": 4096, "batch_size": 4096}, 32.0, 144.14),
    ("qwen3moe", MOE, 4096, 1, {}, 32.0, 15.02),
    ("gemma2", WINDOW, 4096, 1, {}, 20.0, 19.03),
    ("gemma3", WINDOW, 4096, 1, {}, 11.0, 19.03),
    ("gemma3", WINDOW, 4096, 2, {}, 22.0, 19.03),
    ("gemma3", WINDOW, 4096, 2, {"kv_unified": True}, 18.5, 23.53),
    ("gemma3", WINDOW, 8192, 1, {"swa_full": True}, 64.0, 30.03),
    ("gpt-oss", WINDOW | MOE, 4096, 1, {}, 20.0, 16.03),
    ("phi3", WINDOW, 4096, 1, {}, 32.0, 18.02),
    ("mamba", MAMBA, 4096, 1, {}, 0.59, 15.08),
    ("mamba", MAMBA, 1365, 3, {}, 1.78, 15.26),
    ("lfm2", LFM2, 4096, 1, {}, 12.02, 18.02),
    ("lfm2", LFM2, 4096, 2, {}, 24.04, 18.02),
    ("deepseek2", MLA, 4096, 1, {}, 18.0, 19.01),
    ("deepseek2", MLA, 4096, 1, {"flash_attn": "off"}, 18.0, 87.01),
    ("llama", {}, 4096, 1, {"embeddings": True, "ubatch_size": 1024, "batch_size": 1024}, 32.0, 82.04),
]


@pytest.mark.parametrize(("architecture", "keys", "context", "parallel", "flags", "cache", "compute"), LOGGED)
def test_as_llama_cpp_logs_it(
    architecture: str, keys: dict[str, Any], context: int, parallel: int, flags: Any, cache: float, compute: float
) -> None:
    need = estimate(model(details(architecture, **keys), context, parallel, **flags))
    assert need.cache / MIB == pytest.approx(cache, abs=0.01)
    assert need.compute / MIB == pytest.approx(compute, rel=0.04)


def test_a_real_models_caches(smollm2_path: Path) -> None:
    known = read_details(smollm2_path)
    assert estimate(model(known, 8192)).cache == 180 * MIB
    assert estimate(model(known, 512)).cache / MIB == 11.25
    assert estimate(model(known, 8192)).compute / MIB == pytest.approx(22.64, rel=0.01)
    assert known.weights.total / MIB == pytest.approx(92.10, abs=0.01)
    assert (known.vocabulary, known.merges) == (49_152, 48_900)


def test_a_real_engine_takes_what_was_estimated(smollm2_path: Path) -> None:
    known = read_details(smollm2_path)
    asked = replace(model(known, 2048, 2, threads=1), path=smollm2_path)
    with closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    plan = BuiltinEngine("default", EngineConfig()).plan(asked, port=port, api_key="k")
    with running(plan.argv, plan.env) as pid, httpx.Client(base_url=plan.base_url, headers=plan.headers) as client:
        await_health(client)
        client.post("/completion", json={"prompt": [300] * 520, "n_predict": 2}, timeout=60).raise_for_status()
        taken = psutil.Process(pid).memory_info().rss
    assert estimate(asked).on_cpu() == pytest.approx(taken, rel=0.1)


@contextmanager
def running(argv: tuple[str, ...], env: Mapping[str, str]) -> Iterator[int]:
    quiet = subprocess.DEVNULL
    with subprocess.Popen(argv, env={**os.environ, **env}, stdin=quiet, stdout=quiet, stderr=quiet) as process:
        try:
            yield process.pid
        finally:
            process.kill()


def await_health(client: httpx.Client) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            if client.get("/health").status_code == 200:
                return
        except httpx.TransportError:
            pass  # it does not listen yet
        assert time.monotonic() < deadline, "the engine is not healthy after a minute"
        time.sleep(0.05)  # between two looks


# --- windows, states and what shares them ----------------------------------------------------------------------------


def windows(architecture: str, layers: int = 6, **keys: Any) -> list[bool]:
    """Which blocks have the short cache."""
    found = caches(details(architecture, layers, **(WINDOW | keys)), CacheSettings(8192, 1)).layers
    return [size < max(found) for size in found] if len(set(found)) > 1 else [False] * layers


def test_where_windows_lie() -> None:
    yes, no = True, False
    assert windows("gemma3") == [yes, yes, yes, yes, yes, no]
    assert windows("gpt-oss") == [yes, no] * 3
    assert windows("smallthinker") == [no, yes, yes, yes, no, yes]  # the one without comes first
    assert windows("cohere2", **{"attention.sliding_window_pattern": 3}) == [yes, yes, no] * 2
    assert windows("gemma4", **{"attention.sliding_window_pattern": [1, 1, 0, 1, 1, 0]}) == [yes, yes, no] * 2
    assert windows("gemma4", **{"attention.sliding_window_pattern": [True, False] * 3}) == [yes, no] * 3
    assert windows("unheard-of") == [no] * 6  # the upper bound


def test_a_windowed_block_may_have_heads_of_its_own() -> None:
    keys = {
        "attention.sliding_window_pattern": [1, 0],
        "attention.key_length_swa": 32,
        "attention.value_length_swa": 32,
    }
    near, far = caches(details("gemma4", 2, **WINDOW, **keys), CacheSettings(8192, 1)).layers
    assert (near, far) == (1024 * 4 * 64 * 2, 8192 * 4 * 128 * 2)


def test_blocks_that_keep_nothing_of_their_own() -> None:
    def kept(architecture: str, **keys: Any) -> list[bool]:
        return [size > 0 for size in caches(details(architecture, 4, **keys), CacheSettings(4096, 1)).layers]

    assert kept("gemma4", **{"attention.shared_kv_layers": 1}) == [True, True, True, False]
    assert kept("glm4moe", nextn_predict_layers=1) == [True, True, True, False]
    assert kept("deci", **{"attention.head_count_kv": [4, 0, 4, 0]}) == [True, False, True, False]
    assert kept("bert", **{"attention.causal": False}) == [False] * 4
    assert kept("nomic-bert") == [False] * 4


def test_hybrids_have_states_between_their_caches() -> None:
    strided = details("qwen3next", 8, **MAMBA, full_attention_interval=4, **{"ssm.group_count": 2})
    state = 4 * (3 * (1024 + 2 * 2 * 16) + 16 * 1024)
    found = caches(strided, CacheSettings(4096, 2))
    rows = 4096 * 4 * 128 * 2
    assert found.layers == (2 * state,) * 3 + (rows,) + (2 * state,) * 3 + (rows,)
    assert not found.rewindable
    assert found.snapshot == 6 * state
    both = caches(details("falcon-h1", 2, **MAMBA), CacheSettings(4096, 1)).layers
    assert all(size > rows for size in both)
    rwkv = caches(details("rwkv7", 2, **{"wkv.head_size": 64}), CacheSettings(4096, 1)).layers
    assert rwkv == (4 * 512 * (2 + 64),) * 2


# --- where the parts lie ---------------------------------------------------------------------------------------------


def test_layers_on_gpus_are_not_in_ram() -> None:
    need = estimate(model(details("llama")))
    whole = need.on_gpus((need.units,))
    parts = [need.on_gpus((count,)) for count in range(1, need.units + 1)]
    assert all(a.ram > b.ram and a.gpus[0] < b.gpus[0] for a, b in pairwise(parts))
    assert need.on_gpus((0,)) == Allocation(need.on_cpu(), (0,))
    layer = 10 * MIB + 4 * MIB
    assert parts[3].gpus[0] - parts[2].gpus[0] == layer
    assert parts[2].ram - parts[3].ram == layer
    assert whole.gpus[0] - need.on_each_gpu == 8 * layer + 16 * MIB
    two = need.on_gpus((5, 4))
    assert sum(two.gpus) == whole.gpus[0] + need.on_each_gpu
    assert two.ram == whole.ram


def test_flags_move_parts() -> None:
    known = details("qwen3moe", **MOE)
    weights = Weights(known.weights.layers, (100 * MIB,) * 8, known.weights.embedding, known.weights.output)
    known = replace(known, weights=weights)

    def whole(**flags: Any) -> Allocation:
        need = estimate(model(known, **flags))
        return need.on_gpus((need.units,))

    plain = whole()
    for flags, moved in (
        ({"cpu_moe": True}, 800),
        ({"ncmoe": 3}, 300),
        ({"no_kv_offload": True}, 32),
        ({"cpu_moe": True, "nkvo": True}, 832),
    ):
        other = whole(**flags)
        assert (other.ram - plain.ram) / MIB == moved
        assert (plain.gpus[0] - other.gpus[0]) / MIB == moved


def test_a_tied_output_is_copied_to_the_gpu_and_not_in_ram() -> None:
    known = details("llama")
    tied = Weights(known.weights.layers, known.weights.experts, embedding=16 * MIB, output=2048)
    need = estimate(
        Model("m", Path("/m"), ModelSettings(), ModelDetails("llama", metadata=known.metadata, weights=tied))
    )
    assert need.output == 16 * MIB + 2048
    assert need.cpu_weights == 96 * MIB + 2048


def test_types_the_cpu_reorders_count_twice_while_the_file_is_mapped() -> None:
    known = details("llama")
    weights = Weights((10 * MIB,), (0,), by_type={"Q4_K": 8 * MIB, "Q6_K": 2 * MIB})
    known = ModelDetails("llama", metadata=known.metadata, weights=weights)
    assert estimate(model(known)).cpu_weights == 18 * MIB
    for flags in ({"no_mmap": True}, {"no_repack": True}, {"load_mode": "none"}):
        assert estimate(model(known, **flags)).cpu_weights == 10 * MIB


def test_a_projector_and_a_draft_model_count(tmp_path: Path, smollm2_path: Path) -> None:
    keys = {"image_size": 896, "patch_size": 14, "embedding_length": 1152, "feed_forward_length": 4304}
    metadata = {"general.architecture": "clip", "general.type": "mmproj"}
    metadata |= {f"clip.vision.{key}": value for key, value in keys.items()} | {"clip.vision.attention.head_count": 16}
    projector = tmp_path / "mmproj.gguf"
    projector.write_bytes(gguf_bytes(metadata, [("v.blk.0.w", (64, 64), 1, 0)], 8192))
    plain = Model("m", smollm2_path, ModelSettings(), read_details(smollm2_path))
    both = Model(
        "m", smollm2_path, ModelSettings(flags={"model-draft": str(smollm2_path)}), plain.details, mmproj=projector
    )
    beside = companions(both)
    assert companions(plain) == Companions()
    alone, need = estimate(plain), estimate(both, beside)
    assert need.projector / MIB == pytest.approx(1024 + 312, abs=40)  # 4096 patches against each other, 16 times
    assert need.draft is not None
    assert need.draft.cache == alone.cache
    draft = need.draft.on_cpu() - need.draft.process
    assert need.on_cpu() == alone.on_cpu() + need.projector + draft
    on_gpu, in_ram = (
        need,
        estimate(
            Model("m", smollm2_path, ModelSettings(flags={"no-mmproj-offload": True}), plain.details, projector), beside
        ),
    )
    assert on_gpu.on_first_gpu - in_ram.on_first_gpu == need.projector
    assert in_ram.ram_beside(3) - on_gpu.ram_beside(3) == need.projector


def test_measurements_correct_later_estimates() -> None:
    need = estimate(model(details("llama")))
    estimated = need.on_gpus((5, 4))
    measured = Allocation(estimated.ram + 7, (estimated.gpus[0] + 11, estimated.gpus[1] - 2))
    better = need.corrected(estimated, measured)
    assert better.on_gpus((5, 4)) == Allocation(measured.ram, (measured.gpus[0], estimated.gpus[1] + 11))
    assert need.corrected(estimated, Allocation(0, (0, 0))) == need  # nothing could be measured


def test_what_may_grow_is_told_and_in_no_total() -> None:
    limited, off = estimate(model(details("llama"), cram=100)), estimate(model(details("llama"), cache_ram=0))
    assert (limited.prompt_cache, off.prompt_cache) == (100 * MIB, 0)
    assert estimate(model(details("llama"))).prompt_cache == 8192 * MIB
    assert limited.on_cpu() == off.on_cpu()


def test_what_a_header_says_of_weights(tmp_path: Path) -> None:
    block = 32 * 32 * 2
    names = ["token_embd.weight", "output_norm.weight", "output.weight", "rope_freqs.weight"]
    names += ["blk.0.attn_q.weight", "blk.0.ffn_up_exps.weight", "blk.1.ffn_up_shexp.weight", "blk.7.x", "blk.x.y"]
    tensors = [(name, (32, 32), 1, number * block) for number, name in enumerate(names)]
    heads = [4] * 100  # more blocks than most lists have items
    keys = {"general.architecture": "llama", "llama.block_count": 2, "llama.attention.head_count_kv": heads}
    keys |= {"tokenizer.ggml.tokens": ["a", "b", "c"], "tokenizer.ggml.merges": ["a b"]}
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_bytes(keys, tensors, len(names) * block))
    known = read_details(path)
    assert known.weights == Weights(
        layers=(block, block),
        experts=(block, 0),
        embedding=block,
        output=2 * block,
        other=3 * block,  # with a block that llama.cpp does not load
        by_type={"F16": 8 * block},
    )
    assert known.weights.total == len(names) * block
    assert (known.vocabulary, known.merges) == (3, 1)
    assert known.metadata is not None
    assert known.metadata["llama.attention.head_count_kv"] == heads
    header = read_header(path)
    assert details_of(header, header).weights.layers == (2 * block, 2 * block)  # the parts of a split model together


# --- wishes and nonsense ---------------------------------------------------------------------------------------------


def test_wishes_are_read() -> None:
    def wishes(**flags: Any) -> Any:
        return estimate(model(details("llama"), **flags)).wishes

    assert wishes().gpu_layers is None
    assert wishes(ngl=12).gpu_layers == 12
    assert wishes(n_gpu_layers="all").gpu_layers == 999
    assert wishes(n_gpu_layers=-1).gpu_layers is None
    assert wishes(ts="3,1").tensor_split == (3.0, 1.0)
    assert wishes(tensor_split=[1, 2]).tensor_split == (1.0, 2.0)
    assert wishes(dev="CUDA0,CUDA2").devices == ("CUDA0", "CUDA2")
    assert wishes(device="none").devices == ()
    assert wishes(sm="none", mg=1).main_gpu == 1
    assert wishes(mg=1).main_gpu is None
    told = Model("m", Path("/m"), ModelSettings(gpu_layers=5, env={"CUDA_VISIBLE_DEVICES": "1"}), details("llama"))
    assert (estimate(told).wishes.gpu_layers, estimate(told).wishes.visible) == (5, "1")


@pytest.mark.parametrize("split", ["", "a,b", "0,0", "-1,2", "nan,1", "inf,1"])
def test_a_tensor_split_that_is_none(split: str) -> None:
    with pytest.raises(UnsupportedError, match="tensor-split"):
        estimate(model(details("llama"), tensor_split=split))


values = st.one_of(
    st.integers(-(2**63), 2**64), st.floats(), st.text(max_size=5), st.booleans(), st.none(),
    st.lists(st.one_of(st.integers(-5, 2**40), st.booleans(), st.text(max_size=2)), max_size=9),
)  # fmt: skip
keys = st.sampled_from(
    [
        *COMMON,
        *WINDOW,
        *MAMBA,
        *MLA,
        *MOE,
        "wkv.head_size",
        "full_attention_interval",
        "attention.sliding_window_pattern",
    ]
)


@given(
    st.sampled_from(["llama", "gemma3", "mamba", "qwen3next", "rwkv6", "deepseek2", "gemma3n", "bert"]),
    st.dictionaries(keys, values, max_size=8),
    st.integers(0, 7),
)
def test_no_header_breaks_it(architecture: str, metadata: dict[str, Any], layers: int) -> None:
    need = estimate(model(details(architecture, layers, **metadata)))
    assert need.on_cpu() >= need.process
    assert all(size >= 0 for size in need.unit_sizes())
    assert isinstance(need.on_gpus((need.units,)), Allocation)


def test_a_model_that_was_never_read() -> None:
    need = estimate(Model("m", Path("/m"), ModelSettings()))
    assert isinstance(need, Need)
    assert need.units == 1
