"""Model identity and extra keys: everything besides tokens that determines KV bytes.

Two engines share chunks only if the model identity, the world size, and the layout of
the registered caches agree. Both sides derive the identity from vLLM's configuration,
so it contains nothing that only one of them knows.
"""

from __future__ import annotations

import json
import os
from hashlib import sha256
from pathlib import Path
from typing import Any

from kvcore.keys import ExtraKey

WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.tensors")
NUM_SAMPLES = 16
SAMPLE_BYTES = 4096
_NOT_IDENTITY = ("_name_or_path", "transformers_version", "_commit_hash")


def model_identity(config: Any, platform: str, kv_layout: str | None = None) -> str:
    """Return the model's name, revision, and a digest of what determines its KV.

    `platform` distinguishes devices and versions whose kernels use another block layout
    or compute other values. `kv_layout` is vLLM's name for the order inside a block.
    """
    model, parallel = config.model_config, config.parallel_config
    cache, speculative = config.cache_config, config.speculative_config
    name = str(model.model)
    local = Path(name)
    draft = str(getattr(speculative, "model", None))
    facts = {
        "config": _model_config(model.hf_config),
        "weights": _weights(local) or _revision(model),
        "dtype": str(model.dtype),
        "cache_dtype": str(cache.cache_dtype),
        "quantization": str(model.quantization),
        "load_format": str(config.load_config.load_format),
        "seed": str(model.seed) if config.load_config.load_format == "dummy" else "",
        "attention": str(getattr(config, "attention_config", "")),
        "draft": [draft, _weights(Path(draft))],
        "ranks": [parallel.tensor_parallel_size, parallel.pipeline_parallel_size],
        "platform": platform,
        "kv_layout": kv_layout or os.environ.get("VLLM_KV_CACHE_LAYOUT", ""),
    }
    digest = sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    if local.exists():
        return f"{local.name[:200]}#{digest}"
    return f"{name[:200]}@{_revision(model)}#{digest}"


def _model_config(hf_config: Any) -> str:
    values = hf_config.to_dict()
    kept = {key: value for key, value in values.items() if key not in _NOT_IDENTITY}
    return json.dumps(kept, sort_keys=True, default=str)


def _revision(model: Any) -> str:
    commit = getattr(model.hf_config, "_commit_hash", None)
    return str(commit or model.revision or "main")


def _weights(place: Path) -> str:
    """Return a digest of samples of a weights file or folder.

    Samples of each file detect retraining in milliseconds; hashing whole files takes
    minutes. Empty if the path does not exist.
    """
    if not place.exists():
        return ""
    found = {path for glob in WEIGHTS for path in place.glob(glob)}
    state = sha256()
    for path in [place] if place.is_file() else sorted(found):
        size = path.stat().st_size
        state.update(f"{path.name}:{size};".encode())
        with path.open("rb") as file:
            for number in range(NUM_SAMPLES):
                file.seek(number * max(size - SAMPLE_BYTES, 0) // (NUM_SAMPLES - 1))
                state.update(file.read(SAMPLE_BYTES))
    return state.hexdigest()


def is_cacheable(request: Any) -> bool:
    """Return whether tokens and extra keys determine a request's KV for its lifetime.

    They do not in a streaming session, whose tokens and images change.
    """
    return (
        request.prompt_embeds is None
        and not request.skip_reading_prefix_cache
        and not getattr(request, "resumable", False)
    )


def extra_keys(request: Any) -> tuple[ExtraKey, ...]:
    """Return the extra keys of a request: cache salt, LoRA adapter, images."""
    keys = []
    if request.cache_salt:
        keys.append(_key(0, "salt", request.cache_salt))
    lora = request.lora_request
    if lora is not None:
        weights = _adapter_weights(lora)
        keys.append(_key(0, "lora", lora.lora_name, lora.lora_path, weights))
    for feature in request.mm_features or ():
        place = feature.mm_position
        keys.append(_key(place.offset, "mm", str(feature.identifier), place.length))
    return tuple(keys)


_adapters: dict[tuple[int, str], str] = {}


def _adapter_weights(lora: Any) -> str:
    """Return a digest of an adapter's weights as they were when the engine loaded it.

    With `load_inplace` the engine reads the adapter again for each request.
    """
    key = (lora.lora_int_id, lora.lora_path)
    if key not in _adapters or getattr(lora, "load_inplace", False):
        _adapters[key] = _weights(Path(lora.lora_path))
    return _adapters[key]


def _key(start: int, *parts: object) -> ExtraKey:
    return ExtraKey(start, json.dumps(parts).encode())
