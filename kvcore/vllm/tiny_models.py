"""Tiny models with random weights, for tests: `python -m kvcore.vllm.tiny_models`.

They need transformers and torch, which vLLM installs. The vocabulary is `w0` to
`w511`, one token each, so that a test can choose a prompt's exact length.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvcore.errors import SetupError

VOCABULARY = 512
MAX_TOKENS = 8192
WINDOW = 128
"""Sliding window of the hybrid model, in tokens."""

LARGE_WEIGHTS = 0.15
"""Standard deviation of the weights; with less, rounding could change an answer."""

SMALL_WEIGHTS = 0.04
"""The same for MLA: with more, vLLM's CPU kernels for prompts and for single tokens
differ by more than rounding, so an engine's answer depends on how it was scheduled."""

_COMMON = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": MAX_TOKENS,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "tie_word_embeddings": False,
}


def write(kind: str, folder: Path, seed: int = 0) -> Path:
    """Write a model of one of `KINDS` with its tokenizer; return the folder.

    Raises:
        SetupError: no such kind.
    """
    make = KINDS.get(kind)
    if make is None:
        raise SetupError(f"model {kind!r}: known are {', '.join(KINDS)}")
    import torch

    torch.manual_seed(seed)
    model = make().to(torch.float32)
    model.generation_config.eos_token_id = None
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    return folder


def _llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            num_hidden_layers=4,
            num_key_value_heads=2,
            initializer_range=LARGE_WEIGHTS,
            **_COMMON,
        )
    )


def _mla() -> Any:
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    return DeepseekV2ForCausalLM(
        DeepseekV2Config(
            num_hidden_layers=3,
            num_key_value_heads=4,
            kv_lora_rank=512,
            q_lora_rank=None,
            qk_nope_head_dim=128,
            qk_rope_head_dim=64,
            v_head_dim=128,
            n_routed_experts=2,  # unused: the first layers are dense
            first_k_dense_replace=3,
            initializer_range=SMALL_WEIGHTS,
            **_COMMON,
        )
    )


def _hybrid() -> Any:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    return Gemma3ForCausalLM(
        Gemma3TextConfig(
            num_hidden_layers=6,
            num_key_value_heads=2,
            head_dim=32,
            sliding_window=WINDOW,
            initializer_range=LARGE_WEIGHTS,
            **_COMMON,
        )
    )


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{number}": number for number in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="w0", eos_token="w1", pad_token="w2"
    )


KINDS: dict[str, Callable[[], Any]] = {"llama": _llama, "mla": _mla, "hybrid": _hybrid}

if __name__ == "__main__":
    write(sys.argv[1], Path(sys.argv[2]))
