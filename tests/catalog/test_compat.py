from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from gguf_file import gguf_bytes, model_bytes

from llamarunner.catalog.compat import needs_patched_engine
from llamarunner.catalog.gguf import read_both

NORM = {"gemma3.attention.layer_norm_rms_epsilon": 1e-6}
SECTIONS = {"qwen3vl.rope.dimension_sections": [24, 20, 20, 0]}


def verdict(path: Path, architecture: str, tensors: tuple[str, ...] = (), **metadata: Any) -> str:
    names = ("token_embd.weight", "blk.0.attn_q.weight", *tensors)
    shapes = [(name, (32,), 0, 128 * number) for number, name in enumerate(names)]
    path.write_bytes(gguf_bytes({"general.architecture": architecture, **metadata}, shapes, 128 * len(names)))
    return needs_patched_engine(*read_both(path))


@pytest.mark.parametrize(
    ("architecture", "tensors", "metadata", "says"),
    [
        ("gptoss", (), {}, "gptoss, a name that only Ollama's"),
        ("qwen25vl", ("v.blk.0.attn_q.weight",), {}, "a name that only"),
        ("gemma3", ("v.blk.0.attn_q.weight",), NORM, "own file"),
        ("mistral3", ("mm.0.weight",), {}, "own file"),
        ("llama4", ("v.patch_embd.weight",), {}, "own file"),
        ("gemma3", (), {}, "layer_norm_rms_epsilon"),
        ("gemma3", ("dense.0.weight",), NORM, "gemma-embedding"),
        ("lfm2", ("output_norm.weight",), {}, "token_embd_norm"),
        ("qwen3next", ("blk.1.ssm_dt",), {}, "other names"),
        ("qwen35", ("mtp.fc.weight",), {}, "other names"),
        ("qwen3vl", (), {}, "dimension_sections"),
        ("nemotron_h_moe", ("blk.1.ffn_latent_in.weight",), {}, "other names"),
        ("laguna", ("blk.3.attn_g.weight",), {}, "other names"),
    ],
)
def test_files_for_ollamas_engine_alone(
    tmp_path: Path, architecture: str, tensors: tuple[str, ...], metadata: dict[str, Any], says: str
) -> None:
    assert says in verdict(tmp_path / "m.gguf", architecture, tensors, **metadata)


@pytest.mark.parametrize(
    ("architecture", "tensors", "metadata"),
    [
        ("gpt-oss", (), {}),
        ("gemma3", ("output_norm.weight",), NORM),
        ("gemma-embedding", ("dense_2.weight",), {}),
        ("lfm2", ("token_embd_norm.weight",), {}),
        ("qwen3next", ("blk.1.ssm_dt.bias",), {}),
        ("qwen3vl", (), SECTIONS),
        ("mistral3", (), {}),
        ("llama4", ("output.weight",), {}),
        ("nemotron_h_moe", ("blk.1.ffn_latent_down.weight",), {}),
        ("laguna", ("blk.3.attn_gate.weight",), {}),
        ("llama", (), {}),
        ("", (), {}),
        ("llama", ("v.x",), {"general.type": "adapter"}),
    ],
)
def test_files_for_any_llama_cpp(
    tmp_path: Path, architecture: str, tensors: tuple[str, ...], metadata: dict[str, Any]
) -> None:
    assert verdict(tmp_path / "m.gguf", architecture, tensors, **metadata) == ""


def test_embeddings_of_different_lengths(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    for rows, is_odd in ((64, False), (32, True)):
        tensors = [("token_embd.weight", (32, 64), 1, 0), ("per_layer_token_embd.weight", (32, rows), 1, 4096)]
        path.write_bytes(gguf_bytes({"general.architecture": "gemma3n"}, tensors, 8192))
        assert bool(needs_patched_engine(*read_both(path))) is is_odd


def test_the_real_model(smollm2: Path) -> None:
    assert needs_patched_engine(*read_both(smollm2)) == ""


def test_projectors(tmp_path: Path) -> None:
    path = tmp_path / "p.gguf"
    for key in ("clip.projector_type", "clip.vision.projector_type", "clip.audio.projector_type"):
        path.write_bytes(gguf_bytes({"general.architecture": "clip", key: "mlp"}))
        assert needs_patched_engine(*read_both(path)) == ""
    path.write_bytes(gguf_bytes({"general.architecture": "clip"}))
    assert "of what type" in needs_patched_engine(*read_both(path))
    path.write_bytes(model_bytes())
    assert needs_patched_engine(*read_both(path)) == ""
