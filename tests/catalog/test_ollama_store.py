"""Models in Ollama's folder, as it leaves them there."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from gguf_file import gguf_bytes, model_bytes, projector_bytes, write_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ollama_folder import add_model, blob

from llamarunner.catalog import ollama_store
from llamarunner.catalog.catalog import Catalog, Model
from llamarunner.catalog.stores import discover
from llamarunner.config.schema import Config, DiscoveryConfig, ModelConfig

MODEL = model_bytes()
JINJA = model_bytes("qwen3", **{"tokenizer.chat_template": "{% for m in messages %}{{ tools }}{% endfor %}"})
CHATML = "{{ range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}"


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "ollama"


def found(store: Path, *folders: Path, models: dict[str, ModelConfig] | None = None) -> Catalog:
    discovery = DiscoveryConfig(
        lmstudio=False, huggingface=False, folders=list(folders), library=store.parent / "library"
    )
    environ = {"HOME": str(store.parent / "nobody"), "OLLAMA_MODELS": str(store)}
    return discover(Config(models=models or {}, discovery=discovery), environ=environ)


def only(catalog: Catalog) -> Model:
    (model,) = catalog
    return model


def test_a_model_with_all_that_a_manifest_can_name(store: Path) -> None:
    adapter = gguf_bytes({"general.architecture": "llama", "general.type": "adapter"})
    path = add_model(
        store,
        "llava/7b",
        ("model", MODEL),
        ("projector", projector_bytes()),
        ("adapter", adapter),
        ("template", CHATML),
        ("system", "Be kind."),
        ("params", {"temperature": 0.6, "stop": ["<|im_end|>", "x"], "num_ctx": 1234}),
        ("messages", [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]),
        ("license", "MIT"),
        ("license", "and more"),
    )
    model = only(found(store))
    assert (model.name, model.source, model.problem, model.hint) == ("llava:7b", "ollama", "", "")
    assert model.path == blob(store, MODEL)
    assert model.mmproj == blob(store, projector_bytes())
    assert model.adapters == (blob(store, adapter),)
    assert model.preset.parameters == {"temperature": 0.6, "stop": ["<|im_end|>", "x"], "num_ctx": 1234}
    assert model.context == 1234
    assert (model.preset.system, model.preset.template) == ("Be kind.", CHATML)
    assert [message["content"] for message in model.preset.messages] == ["hi", "yo"]
    assert model.preset.licenses == ("MIT", "and more")
    assert model.manifest_digest == model.digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert model.modified_at == path.stat().st_mtime
    assert model.size_bytes == sum(file.stat().st_size for file in (store / "blobs").iterdir())
    assert model.capabilities == {"completion", "vision"}
    assert model.chat_template == "chatml"
    assert not model.lacks_chat_template


def test_names_are_those_that_ollama_lists(store: Path) -> None:
    for number, name in enumerate(
        ("qwen3/8b", "smollm/latest", "hf.co/ns/Repo-GGUF/Q4_K_M", "registry.ollama.ai/me/own/v1")
    ):
        add_model(store, name, ("model", model_bytes(x=number)))
    catalog = found(store)
    assert {model.name for model in catalog} == {"qwen3:8b", "smollm:latest", "hf.co/ns/Repo-GGUF:Q4_K_M", "me/own:v1"}
    assert catalog.find("smollm").name == "smollm:latest"
    assert catalog.find("HF.co/NS/repo-gguf:q4_k_m").name == "hf.co/ns/Repo-GGUF:Q4_K_M"


def test_its_folders_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named, home, system = tmp_path / "named", tmp_path / "home", tmp_path / "system"
    monkeypatch.setattr(ollama_store, "SYSTEM_STORE", str(system))
    add_model(named, "a/1", ("model", MODEL))
    add_model(home / ".ollama/models", "b/1", ("model", model_bytes(x=2)))
    add_model(home / ".ollama/models", "a/1", ("model", model_bytes(x=3)))
    add_model(system, "c/1", ("model", model_bytes(x=4)))
    config = Config(discovery=DiscoveryConfig(lmstudio=False, huggingface=False, folders=[]))
    catalog = discover(config, environ={"HOME": str(home), "OLLAMA_MODELS": str(named)})
    assert [model.name for model in catalog] == ["a:1", "b:1", "c:1"]
    assert catalog.find("a:1").path == blob(named, MODEL)
    config = Config(discovery=DiscoveryConfig(ollama=False, lmstudio=False, huggingface=False, folders=[]))
    assert len(discover(config, environ={"HOME": str(home), "OLLAMA_MODELS": str(named)})) == 0


def test_our_own_library_comes_first(store: Path) -> None:
    add_model(store, "a/1", ("model", MODEL))
    add_model(store.parent / "library", "a/1", ("model", model_bytes(x=2)))
    model = only(found(store))
    assert (model.source, model.path) == ("library", blob(store.parent / "library", model_bytes(x=2)))


def test_what_runs_elsewhere_or_on_another_engine_is_no_model(store: Path) -> None:
    add_model(store, "cloud/1", ("license", "x"), remote_host="https://ollama.com", remote_model="big")
    add_model(store, "mlx/1", ("tensor", b"x"), ("json", "{}"), model_format="safetensors")
    (store / "manifests" / ".DS_Store").write_text("x")
    (store / "manifests/registry.ollama.ai/library/a b").mkdir()
    (store / "manifests/registry.ollama.ai/library/a b/1").write_text("x")
    assert len(found(store)) == 0


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda store: blob(store, MODEL).unlink(), "this blob of it is missing"),
        (lambda store: blob(store, "MIT").unlink(), "this blob of it is missing"),
        (lambda store: blob(store, MODEL).write_bytes(MODEL[:-9]), f"of {len(MODEL)} bytes {len(MODEL) - 9} are there"),
        (lambda store: blob(store, "[1]").write_text("[2]"), "not a JSON object"),
        (lambda store: (store / "manifests/registry.ollama.ai/library/m/1").write_text("{"), "no JSON"),
    ],
)
def test_one_that_is_not_whole_says_so(store: Path, spoil: object, says: str) -> None:
    add_model(store, "m/1", ("model", MODEL), ("license", "MIT"), ("params", "[1]" if "JSON object" in says else {}))
    assert callable(spoil)
    spoil(store)
    model = only(found(store))
    assert model.name == "m:1"
    assert says in model.problem
    assert model.hint == "pull it again"


def test_partial_downloads_and_old_names_of_blobs(store: Path) -> None:
    add_model(store, "old/1", ("model", MODEL))
    path = blob(store, MODEL)
    path.rename(path.with_name(path.name.replace("-", ":")))
    path.with_name(f"{path.name}-partial").write_bytes(b"x")
    model = only(found(store))
    assert (model.problem, model.path.name) == ("", path.name.replace("-", ":"))


def test_two_names_of_one_model_are_one_model(store: Path) -> None:
    for name in ("qwen3/8b", "qwen3/latest"):
        add_model(store, name, ("model", MODEL), ("system", "x"))
    model = only(found(store))
    assert (model.name, model.aliases) == ("qwen3:8b", ("qwen3:latest",))


def test_one_file_with_several_presets_is_several_models(store: Path, tmp_path: Path) -> None:
    add_model(store, "plain/1", ("model", MODEL))
    add_model(store, "pirate/1", ("model", MODEL), ("system", "Talk like a pirate."))
    add_model(store, "cold/1", ("model", MODEL), ("params", {"temperature": 0}))
    (tmp_path / "models").mkdir()
    (tmp_path / "models/link.gguf").symlink_to(blob(store, MODEL))
    os.link(blob(store, MODEL), tmp_path / "models/hard.gguf")
    catalog = found(store, tmp_path / "models")
    assert [model.name for model in catalog] == ["cold:1", "pirate:1", "plain:1", "hard"]
    assert catalog.find("hard").aliases == ("link",)
    assert len({model.path.stat().st_ino for model in catalog}) == 1


def test_the_configuration_has_the_name_first(store: Path) -> None:
    add_model(store, "m/latest", ("model", MODEL))
    add_model(store, "n/latest", ("model", MODEL), ("system", "x"))
    other = write_model(store.parent / "o.gguf")
    catalog = found(store, models={"m": ModelConfig(path=other)})
    assert {model.name: model.path for model in catalog} == {"m": other, "n:latest": blob(store, MODEL)}


# --- templates and capabilities --------------------------------------------------------------------------------------


def test_a_template_that_llama_cpp_has_no_equal_of(store: Path) -> None:
    add_model(store, "odd/1", ("model", MODEL), ("template", "@@ Instruction\n{{ .Prompt }}\n@@ Response\n"))
    add_model(store, "base/1", ("model", MODEL), ("template", "{{ .Prompt }}"))
    add_model(store, "jinja/1", ("model", JINJA), ("template", "@@ Instruction\n{{ .Prompt }}"))
    add_model(store, "none/1", ("model", MODEL))
    catalog = found(store)
    assert {model.name: model.lacks_chat_template for model in catalog} == {
        "odd:1": True, "base:1": True, "jinja:1": False, "none:1": False
    }  # fmt: skip
    assert "set chat_template" in catalog.find("odd:1").hint
    assert catalog.find("odd:1").problem == ""  # it still completes


def test_capabilities_that_its_config_lists(store: Path) -> None:
    listed = ["completion", "tools", "thinking", "vision", "image", 7]
    add_model(store, "go/1", ("model", MODEL), ("template", CHATML + "{{ .Suffix }}"), capabilities=listed)
    add_model(
        store, "jinja/1", ("model", model_bytes("llama", **{"tokenizer.chat_template": "{{ x }}"})), capabilities=listed
    )
    add_model(store, "bert/1", ("model", model_bytes("bert")), ("template", "{{ .Prompt }}"), capabilities="embedding")
    catalog = found(store)
    assert catalog.find("go:1").capabilities == {"completion", "thinking", "vision", "insert"}
    assert catalog.find("jinja:1").capabilities == {"completion", "tools", "thinking", "vision"}
    assert catalog.find("bert:1").capabilities == {"embedding"}
    assert not catalog.find("bert:1").lacks_chat_template


def test_models_for_ollamas_own_engine_say_so(store: Path) -> None:
    add_model(store, "gpt-oss/20b", ("model", model_bytes("gptoss")))
    model = only(found(store))
    assert "only Ollama's own engine can load it" in model.problem
    assert "hf.co" in model.hint


def test_a_projector_that_is_of_no_use_leaves_the_words(store: Path) -> None:
    old = gguf_bytes(
        {"general.architecture": "clip", "clip.has_vision_encoder": True}, [("mm.0.weight", (4, 4), 0, 0)], 64
    )
    add_model(store, "bakllava/1", ("model", MODEL), ("projector", old))
    model = only(found(store))
    assert (model.problem, model.mmproj) == ("", None)
    assert "sees and hears nothing" in model.hint
    assert "vision" not in model.capabilities


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-5, 5), st.text(max_size=5), st.sampled_from(["gguf", "tools"])),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=6,
)
CONFIG = st.dictionaries(st.sampled_from(["capabilities", "model_format", "remote_host", "x"]), JSON, max_size=4)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(config=CONFIG, params=JSON, messages=JSON, text=st.binary(max_size=40))
def test_whatever_the_small_blobs_hold_the_other_models_are_listed(
    store: Path, config: dict[str, Any], params: Any, messages: Any, text: bytes
) -> None:
    layers = [("params", json.dumps(params)), ("messages", json.dumps(messages)), ("template", text), ("system", text)]
    add_model(store, "odd/1", ("model", MODEL), *layers, **config)
    add_model(store, "good/1", ("model", model_bytes(x=1)))
    catalog = found(store)
    assert catalog.find("good:1").problem == ""
    if odd := catalog.get("odd:1"):
        assert isinstance(odd.preset.parameters, dict)
        assert odd.problem == "" or odd.hint


def test_nothing_is_written_there(store: Path) -> None:
    add_model(store, "m/1", ("model", MODEL), ("license", "x"))
    before = {path: path.stat() for path in store.rglob("*")}
    found(store)
    assert {path: (s.st_mtime_ns, s.st_size, s.st_ino) for path, s in before.items()} == {
        path: ((s := path.stat()).st_mtime_ns, s.st_size, s.st_ino) for path in store.rglob("*")
    }
