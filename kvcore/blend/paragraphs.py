"""Split a prompt into paragraphs by token patterns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from kvcore.blend.rolling_hash import Tokens
from kvcore.config import BlendConfig
from kvcore.errors import SetupError

Patterns = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Markers:
    """Patterns after which a paragraph begins and before which it ends.

    A start pattern also ends the paragraph before it. Without start patterns a
    paragraph begins at the prompt's start and after every end pattern; without end
    patterns it ends at the next start pattern. Paragraphs exclude the patterns.
    """

    start: Patterns = ()
    end: Patterns = ()


PRESETS = {
    "llama-3": Markers(start=((128007, 271),), end=((128009,),)),
    "qwen": Markers(
        start=((151644, 8948, 198), (151644, 872, 198), (151644, 77091, 198)),
        end=((151645,),),
    ),
    "gemma-3": Markers(start=((105, 2364, 107), (105, 4368, 107)), end=((106,),)),
    "mistral": Markers(start=((3,),), end=((4,),)),
}
"""The text of a message, in token ids of each family's chat template: Llama 3's
`<|end_header_id|>\\n\\n` and `<|eot_id|>`; Qwen 2 to 3's `<|im_start|>ROLE\\n` and
`<|im_end|>`; Gemma 3's `<start_of_turn>ROLE\\n` and `<end_of_turn>`; Mistral's `[INST]`
and `[/INST]` from tokenizer v2 on."""


def make_markers(config: BlendConfig) -> Markers:
    """Return the markers of `blend.preset`, or else of `blend.start` and `blend.end`.

    Raises:
        SetupError: the preset is unknown.
    """
    if not config.preset:
        return Markers(config.start, config.end)
    if config.preset not in PRESETS:
        known = ", ".join(sorted(PRESETS))
        raise SetupError(f"blend.preset = {config.preset!r}: known are {known}")
    return PRESETS[config.preset]


@dataclass(frozen=True, slots=True)
class Paragraph:
    """Tokens [start, end) of a prompt."""

    start: int
    end: int


def split_paragraphs(tokens: Tokens, markers: Markers) -> Iterator[Paragraph]:
    """Yield a prompt's paragraphs in order, none of them empty.

    Of overlapping patterns the first counts, and of several at one token the longest.
    """
    always = not markers.start
    found = [
        (start, start + len(pattern), always or pattern in markers.start)
        for pattern in {*markers.start, *markers.end}
        for start in _find_pattern(tokens, pattern)
    ]
    opened = 0 if always else None
    free = 0
    for start, end, opens in sorted(found, key=lambda marker: (marker[0], -marker[1])):
        if start < free:
            continue
        if opened is not None and opened < start:
            yield Paragraph(opened, start)
        opened = end if opens else None
        free = end
    if opened is not None and opened < len(tokens):
        yield Paragraph(opened, len(tokens))


def _find_pattern(tokens: Tokens, pattern: tuple[int, ...]) -> list[int]:
    """Return the indexes at which a pattern begins, overlapping ones included."""
    places = np.flatnonzero(tokens[: len(tokens) - len(pattern) + 1] == pattern[0])
    for offset, token in enumerate(pattern[1:], 1):
        places = places[tokens[places + offset] == token]
    return [int(place) for place in places]
