"""The reader of Mooncake's JSONL, and the tokens generated from its ids."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import zstandard

from kvcore.errors import SetupError
from kvctl.lab.traces.hash_id_jsonl import read_mooncake as read
from kvctl.lab.traces.trace_rows import block_tokens

ROWS = [
    {"timestamp": 0, "input_length": 20, "output_length": 3, "hash_ids": [1, 2, 3]},
    {"timestamp": 1500, "input_length": 24, "output_length": 4, "hash_ids": [1, 2, 9]},
]
TEXT = "".join(json.dumps(row) + "\n" for row in ROWS)


def trace(tmp_path: Path, text: str, name: str = "trace.jsonl") -> Path:
    """Write a trace file, compressed according to its suffix."""
    path = tmp_path / name
    data = text.encode()
    if name.endswith(".gz"):
        data = gzip.compress(data)
    if name.endswith(".zst"):
        data = zstandard.compress(data)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("name", ["t.jsonl", "t.jsonl.gz", "t.jsonl.zst"])
def test_compressed_files_give_the_same_rows(tmp_path: Path, name: str) -> None:
    """Plain, gzip and zstd files give the same rows."""
    first, second = read(trace(tmp_path, TEXT, name), 8)
    assert (first.num_tokens, first.output_length, first.line) == (20, 3, 1)
    assert second.arrival_s == 1.5
    assert second.hash_ids.tolist() == [1, 2, 9]


def test_rows_may_have_their_own_block_size_and_session(tmp_path: Path) -> None:
    """`block_size` and `session_id` of a row apply to that row."""
    line = '{"input_length":4,"hash_ids":[1],"block_size":4,"session_id":"a"}'
    (row,) = read(trace(tmp_path, f"\n{line}\n\n"), 512)
    assert (row.block_size, row.session_id, row.line) == (4, "a", 2)


def test_tokens_share_exactly_the_blocks_that_ids_share(tmp_path: Path) -> None:
    """Blocks are equal exactly if their ids are; the last one is partial."""
    first, second = (row.tokens() for row in read(trace(tmp_path, TEXT), 8))
    assert first.dtype == np.uint32
    assert (first.size, second.size) == (20, 24)
    assert (first[:16] == second[:16]).all()
    assert (first[16:20] != second[16:20]).any()


def test_all_64_bits_of_an_id_are_significant() -> None:
    """Ids that differ only in their highest or lowest bits give different blocks."""
    ids = [0, 1, 2**32, 2**53, 2**53 + 1, 2**63, 2**64 - 1, 2**64 - 2]
    blocks = block_tokens(np.array(ids, np.uint64), 2)
    assert len({block.tobytes() for block in blocks}) == len(ids)


def test_tokens_are_the_same_in_every_run(tmp_path: Path) -> None:
    """Tokens depend on the ids alone."""
    path = trace(tmp_path, TEXT)
    one, two = ([row.tokens().tobytes() for row in read(path, 8)] for _ in range(2))
    assert one == two


def test_tokens_without_an_id_belong_to_their_row(tmp_path: Path) -> None:
    """With ids of whole blocks only, the remaining tokens are unique to the row."""
    lines = '{"input_length":11,"hash_ids":[5]}\n{"input_length":11,"hash_ids":[5]}'
    first, second = (row.tokens() for row in read(trace(tmp_path, lines), 8))
    assert first.size == second.size == 11
    assert (first[:8] == second[:8]).all()
    assert (first[8:] != second[8:]).any()


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "truncated"),
        ('{"hash_ids":[1]}', "input_length"),
        ('{"input_length":"x","hash_ids":[1]}', r"Expected `int`.*input_length"),
        ('{"input_length":0,"hash_ids":[]}', ">= 1"),
        ('{"input_length":30,"hash_ids":[1]}', "3.8 blocks of 8, hash_ids has 1"),
        ('{"input_length":3,"hash_ids":[1,2]}', "hash_ids has 2"),
        ('{"input_length":3,"hash_ids":[-1]}', r"0\.\.2\*\*64-1"),
        ('{"input_length":3,"hash_ids":[18446744073709551616]}', r"0\.\.2\*\*64-1|64"),
        ('{"input_length":3,"hash_ids":[1],"block_size":1}', ">= 2"),
    ],
)
def test_a_bad_line_is_reported_with_file_line_and_reason(
    tmp_path: Path, line: str, reason: str
) -> None:
    """Earlier rows are returned; the error names file, line and reason."""
    rows = read(trace(tmp_path, f"{TEXT}{line}\n"), 8)
    assert [next(rows).line, next(rows).line] == [1, 2]
    with pytest.raises(SetupError, match=rf"trace\.jsonl:3: .*({reason})"):
        next(rows)


@pytest.mark.parametrize("name", ["t.jsonl.gz", "t.jsonl.zst"])
def test_a_truncated_file_is_an_error(tmp_path: Path, name: str) -> None:
    """The error names the truncated compressed file."""
    path = trace(tmp_path, TEXT * 100, name)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(SetupError, match=r"t\.jsonl"):
        list(read(path, 8))


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    """The error has the file's name and the reason."""
    with pytest.raises(SetupError, match=r"none\.jsonl: No such file"):
        list(read(tmp_path / "none.jsonl", 8))
