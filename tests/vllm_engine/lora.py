"""A tiny LoRA adapter with random weights for the tiny Llama."""

from __future__ import annotations

import json
from pathlib import Path

RANK = 8
SHAPES = {"q_proj": (128, 128), "k_proj": (128, 64), "v_proj": (128, 64)}
NUM_LAYERS = 4


def write(folder: Path) -> None:
    """Write an adapter in peft's format that changes Q, K and V in every layer."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(1)
    weights = {}
    for layer in range(NUM_LAYERS):
        for name, (width_in, width_out) in SHAPES.items():
            place = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{place}.lora_A.weight"] = torch.randn(RANK, width_in) * 0.1
            weights[f"{place}.lora_B.weight"] = torch.randn(width_out, RANK) * 0.1
    folder.mkdir()
    save_file(weights, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": RANK,
        "target_modules": list(SHAPES),
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
