"""Geometries become cache groups that a server accepts."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from kvcore.errors import SetupError
from kvcore.layout import KVLayout
from kvctl.lab.config.model_geometry import CACHE_SHAPES, PRESETS, Geometry, preset

CHUNK = 256


def derive(geometry: Geometry, rank: int = 0, world_size: int = 1) -> list[KVLayout]:
    """Derive every group of a rank, as the server does."""
    cache = geometry.groups(8, rank, world_size)
    return [KVLayout.derive(g, cache.handle_bytes, CHUNK) for g in cache.groups]


@pytest.mark.parametrize("shape", CACHE_SHAPES)
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_derives_in_every_cache_shape(name: str, shape: str) -> None:
    """A part has exactly the bytes of a chunk in every cache shape."""
    geometry = replace(PRESETS[name], cache_shape=shape)
    total = sum(layout.part.num_bytes for layout in derive(geometry))
    assert total == geometry.token_bytes(1) * CHUNK


def test_known_models_have_their_published_bytes_per_token() -> None:
    """Llama-3.1-8B has 128 KiB per token, DeepSeek-V3 68.6 KiB, in bfloat16."""
    assert PRESETS["llama-3.1-8b"].token_bytes(1) == 131072
    assert PRESETS["llama-3.1-70b"].token_bytes(8) == 40960
    assert PRESETS["deepseek-v3"].token_bytes(8) == 61 * 576 * 2


def test_hybrid_has_a_full_and_a_window_group() -> None:
    """Gemma-3-27B: 10 global layers, 52 local ones with a window of 1024."""
    full, local = derive(PRESETS["gemma-3-27b"])
    assert (full.part.num_layers, full.part.window) == (10, None)
    assert (local.part.num_layers, local.part.window) == (52, 1024)


def test_ranks_share_heads_and_replicate_latents() -> None:
    """Tensor parallel ranks split heads; MLA ranks all hold the same part."""
    (whole,), (half,) = (
        derive(PRESETS["tiny-llama"]),
        derive(PRESETS["tiny-llama"], 1, 2),
    )
    assert half.part.num_bytes * 2 == whole.part.num_bytes
    (latent,) = derive(PRESETS["tiny-mla"], 1, 2)
    assert latent.part.replicated
    assert latent.part.num_kv == 1


def test_uneven_heads_are_refused() -> None:
    """Eight heads cannot be split over three ranks."""
    with pytest.raises(SetupError, match="8 KV heads: 3 ranks"):
        PRESETS["llama-3.1-8b"].groups(4, 0, 3)


def test_unknown_names_suggest_known_ones() -> None:
    """An unknown preset names the nearest one; an unknown shape lists all."""
    with pytest.raises(SetupError, match=r"did you mean 'llama-3.1-8b'"):
        preset("lama-3.1-8b")
    with pytest.raises(SetupError, match="KNHSD"):
        replace(PRESETS["tiny-llama"], cache_shape="XYZ").groups(4, 0, 1)
