"""What makes one engine's KV another's: the model, and all that shapes its bytes.

Two engines share chunks only when this text, the world size, and the layout of the
registered caches agree. It is read from vLLM's configuration by both halves, so it
holds nothing that only one of them knows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

from kvcore.keys import ExtraKey

WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.gguf")
NUM_SAMPLES = 16
SAMPLE_BYTES = 4096
_NOT_IDENTITY = ("_name_or_path", "transformers_version", "_commit_hash")


def model_identity(config: Any, platform: str) -> str:
    """Name a model with its revision and a digest of what shapes its KV.

    `platform` tells apart machines and versions whose kernels lay out a block's inside
    otherwise, or compute other values.
    """
    model, parallel = config.model_config, config.parallel_config
    cache, speculative = config.cache_config, config.speculative_config
    name = str(model.model)
    folder = Path(name)
    facts = {
        "config": _model_config(model.hf_config),
        "weights": _weights(folder) if folder.is_dir() else _revision(model),
        "dtype": str(model.dtype),
        "cache_dtype": str(cache.cache_dtype),
        "quantization": str(model.quantization),
        "load_format": str(config.load_config.load_format),
        "seed": str(model.seed) if config.load_config.load_format == "dummy" else "",
        "attention": str(getattr(config, "attention_config", "")),
        "draft": str(getattr(speculative, "model", None)),
        "ranks": [parallel.tensor_parallel_size, parallel.pipeline_parallel_size],
        "platform": platform,
    }
    digest = sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    if folder.is_dir():
        return f"{folder.name[:200]}#{digest}"
    return f"{name[:200]}@{_revision(model)}#{digest}"


def _model_config(hf_config: Any) -> str:
    values = hf_config.to_dict()
    kept = {key: value for key, value in values.items() if key not in _NOT_IDENTITY}
    return json.dumps(kept, sort_keys=True, default=str)


def _revision(model: Any) -> str:
    commit = getattr(model.hf_config, "_commit_hash", None)
    return str(commit or model.revision or "main")


def _weights(folder: Path) -> str:
    """Sample the weights in a folder: their bytes make the KV, whatever their name.

    A sample of each file finds every retraining, and takes milliseconds where hashing
    all of it takes minutes.
    """
    state = sha256()
    for path in sorted({path for glob in WEIGHTS for path in folder.glob(glob)}):
        size = path.stat().st_size
        state.update(f"{path.name}:{size};".encode())
        with path.open("rb") as file:
            for number in range(NUM_SAMPLES):
                file.seek(number * max(size - SAMPLE_BYTES, 0) // (NUM_SAMPLES - 1))
                state.update(file.read(SAMPLE_BYTES))
    return state.hexdigest()


def extra_keys(request: Any) -> tuple[ExtraKey, ...]:
    """Return what else shapes a request's KV: cache salt, LoRA adapter, images."""
    return tuple(_extra_keys(request))


def _extra_keys(request: Any) -> Iterator[ExtraKey]:
    if request.cache_salt:
        yield ExtraKey(0, _material("salt", request.cache_salt))
    lora = request.lora_request
    if lora is not None:
        yield ExtraKey(0, _material("lora", lora.lora_name, lora.lora_path))
    for feature in request.mm_features or ():
        place = feature.mm_position
        material = _material("mm", str(feature.identifier), place.length)
        yield ExtraKey(place.offset, material)


def _material(*parts: object) -> bytes:
    return json.dumps(parts).encode()
