"""Model identity, extra keys, and engines whose KV cannot be shared."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvcore.config import ServerConfig
from kvcore.errors import LayoutError, SetupError
from kvcore.keys import ExtraKey
from kvcore.vllm import connector_config as config
from kvcore.vllm import kv_cache_groups as groups
from kvcore.vllm.model_identity import extra_keys, is_cacheable, model_identity


class HfConfig:
    """A configuration with the interface of transformers."""

    def __init__(self, **values: object) -> None:
        self.values = values
        self._commit_hash = "abc"

    def to_dict(self) -> dict[str, object]:
        """Return the values."""
        return self.values


def engine_config(name: str = "org/model", **changes: Any) -> Any:
    """Return an object like vLLM's `VllmConfig`."""
    values: dict[str, Any] = {"dtype": "float32", "tp": 1, "hf": HfConfig(layers=4)}
    values.update(changes)
    return SimpleNamespace(
        model_config=SimpleNamespace(
            model=name, hf_config=values["hf"], dtype=values["dtype"],
            quantization=None, revision=None, seed=0,
        ),
        parallel_config=SimpleNamespace(
            tensor_parallel_size=values["tp"], pipeline_parallel_size=1
        ),
        cache_config=SimpleNamespace(cache_dtype="auto"),
        load_config=SimpleNamespace(load_format="auto"),
        speculative_config=None,
    )  # fmt: skip


def test_identities_differ(tmp_path: Path) -> None:
    """By dtype, configuration, ranks, platform, layout and a folder's weights."""
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(bytes(100_000))
    local = engine_config(str(tmp_path))
    names = [
        model_identity(engine_config(), "cpu"),
        model_identity(engine_config(), "gpu"),
        model_identity(engine_config(dtype="bfloat16"), "cpu"),
        model_identity(engine_config(tp=2), "cpu"),
        model_identity(engine_config(hf=HfConfig(layers=5)), "cpu"),
        model_identity(local, "cpu"),
    ]
    assert names[0].startswith("org/model@abc#")
    assert model_identity(local, "cpu") == names[-1]
    weights.write_bytes(b"1" * 100_000)
    names.append(model_identity(local, "cpu"))
    names.append(model_identity(engine_config(), "cpu", "HND"))
    assert len(set(names)) == len(names)


def test_one_file_of_weights_is_sampled_too(tmp_path: Path) -> None:
    """Replacing a GGUF file changes the identity; so does another draft model."""
    weights, draft = tmp_path / "model.gguf", tmp_path / "draft.gguf"
    config = engine_config(str(weights))
    config.speculative_config = SimpleNamespace(model=str(draft))
    names = set()
    for one, other in ((b"1", b"1"), (b"2", b"1"), (b"2", b"2")):
        weights.write_bytes(one)
        draft.write_bytes(other)
        names.add(model_identity(config, "cpu"))
    assert len(names) == 3


def test_extra_keys_of_salt_adapter_and_images() -> None:
    """Each starts at the first token that it affects."""
    image = SimpleNamespace(
        identifier="hash", mm_position=SimpleNamespace(offset=70, length=9)
    )
    request = SimpleNamespace(
        cache_salt="salt",
        lora_request=SimpleNamespace(lora_name="a", lora_path="/p", lora_int_id=1),
        mm_features=[image],
    )
    assert extra_keys(request) == (
        ExtraKey(0, b'["salt", "salt"]'),
        ExtraKey(0, b'["lora", "a", "/p", ""]'),
        ExtraKey(70, b'["mm", "hash", 9]'),
    )


@pytest.mark.parametrize(
    "values",
    [{"prompt_embeds": []}, {"skip_reading_prefix_cache": True}, {"resumable": True}],
)
def test_requests_not_determined_by_their_tokens_are_not_cached(
    values: dict[str, Any],
) -> None:
    """Prompt embeddings, requests that skip the cache, and streaming sessions."""
    plain = {"prompt_embeds": None, "skip_reading_prefix_cache": False}
    assert is_cacheable(SimpleNamespace(**plain))
    assert not is_cacheable(SimpleNamespace(**{**plain, **values}))


def test_an_adapter_is_identified_by_its_weights(tmp_path: Path) -> None:
    """By the weights when it was loaded; with `load_inplace` by the current ones."""
    weights = tmp_path / "adapter_model.safetensors"

    def key(number: int, *, load_inplace: bool = False) -> ExtraKey:
        lora = SimpleNamespace(
            lora_name="a",
            lora_path=str(tmp_path),
            lora_int_id=number,
            load_inplace=load_inplace,
        )
        request = SimpleNamespace(cache_salt=None, lora_request=lora, mm_features=())
        (one,) = extra_keys(request)
        return one

    weights.write_bytes(b"1")
    first = key(1)
    weights.write_bytes(b"2")
    assert key(1) == first
    assert key(2) != first
    assert key(1, load_inplace=True) == key(2)


def engine_group(kind: str, **spec: Any) -> groups.EngineGroup:
    """Return the engine group for a vLLM group with one spec of this kind."""
    one = type(kind, (), {"block_size": 32, **spec})()
    layers = SimpleNamespace(layer_names=["layer"], kv_cache_spec=one)
    (read,) = groups.engine_groups(SimpleNamespace(kv_cache_groups=[layers]))
    return read


def test_groups_not_determined_by_preceding_tokens_are_refused() -> None:
    """Mamba layers, layers without prefix caching, and non-causal layers."""
    for kind, spec, said in (
        ("MambaSpec", {}, "MambaSpec"),
        ("SlidingWindowMLASpec", {"prefix_cacheable": False}, "out of prefix caching"),
        ("FullAttentionSpec", {"non_causal": True}, "look ahead"),
    ):
        with pytest.raises(LayoutError, match=said):
            engine_group(kind, **spec)
    assert not engine_group("SlidingWindowSpec", sliding_window=64).is_chunked
    local = engine_group("ChunkedLocalAttentionSpec", attention_chunk_size=64)
    assert (local.window, local.is_chunked) == (64, True)


@pytest.mark.parametrize(
    ("place", "values", "said"),
    [
        ("parallel_config", {"decode_context_parallel_size": 2}, "decode_context"),
        ("parallel_config", {"nnodes_within_dp": 2}, "several hosts"),
        ("kv_transfer_config", {"kv_role": "kv_producer"}, "kv_producer"),
        ("model_config", {"is_diffusion": True}, "diffusion"),
        ("cache_config", {"calculate_kv_scales": True}, "scales"),
    ],
)
def test_engines_whose_kv_cannot_be_shared_are_refused(
    place: str, values: dict[str, Any], said: str
) -> None:
    """The error gives the reason."""
    config = engine_config()
    config.kv_transfer_config = SimpleNamespace(kv_role="kv_both")
    groups.check_engine(config)
    getattr(config, place).__dict__.update(values)
    with pytest.raises(SetupError, match=said):
        groups.check_engine(config)


def test_connector_options() -> None:
    """The default address is the server's; errors name an unknown or invalid option."""
    assert config.parse_config({}).address == ServerConfig().address
    with pytest.raises(SetupError, match="adress"):
        config.parse_config({"adress": "x"})
    with pytest.raises(SetupError, match="lookup_timeout_s"):
        config.parse_config({"lookup_timeout_s": 0})
