"""The tier manager's state machine, with quotas and an L1 that outlives its server.

Servers stop and are killed at any moment; before the next one starts, its journal may
be cut or lost, or its memory overwritten.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import get_args
from unittest import mock

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, rule

from kvcore.config import WritePolicy
from kvcore.keys import ChunkHash, SessionKey
from kvcore.shm import SHM_DIR
from kvcore.storage import journal
from kvcore.storage.recovery import arena_name
from tests.tiers.test_tier_manager import TierFixture, chain
from tests.tiers.test_tier_manager_machine import PROMPTS, TierManagerMachine

SPARE_RECORDS = 12
"""Small, so that the journal is compacted during a run."""


class KeptMachine(TierManagerMachine):
    """Model: the next server has what was readable when the last one ended."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="kvtest-"))
        self.path = self.folder / "journal"
        self.patch = mock.patch.object(journal, "SPARE_RECORDS", SPARE_RECORDS)
        self.patch.start()

    @initialize(policy=st.sampled_from(get_args(WritePolicy)), quota=st.integers(0, 12))
    def build(self, policy: str, quota: int) -> None:
        """Start a server with a quota for a tenant and the model."""
        self.policy = policy
        self.quotas = {"salt:tenant": quota * 100, "model:m": 900}
        self.open(now=0.0)

    def open(self, now: float) -> None:
        """Start the next server over the same tiers."""
        self.fixture = TierFixture(
            num_pages=22,
            num_tiers=2,
            policy=self.policy,
            max_bytes=500,
            max_jobs=3,
            now=now,
            over=self.fixture.over if now else (),
            kept_at=self.path,
            quotas=self.quotas,
        )

    @rule(number=st.sampled_from(sorted(PROMPTS)), length=st.integers(1, 6))
    def store_of_tenant(self, number: int, length: int) -> None:
        """A worker stores a prompt's chunks under the tenant's quota."""
        owner = SessionKey("e", "tenant")
        self.fixture.store(chain(number, length), PROMPTS[number], owner)

    # -- the end of a server ----------------------------------------------------------

    @rule()
    def stop(self) -> None:
        """After a clean stop, the next server has all readable chunks."""
        before = self.readable()
        self.fixture.manager.close()
        self.fixture.l1.close()
        self.end()
        assert self.readable() == before

    @rule()
    def kill(self) -> None:
        """After a kill, it has them as well; pending work is lost."""
        before = self.readable()
        for tier in self.fixture.tiers:
            tier.pending.clear()
        self.end()
        assert self.readable() == before

    @rule(harm=st.sampled_from(["cut", "lost", "bytes"]), place=st.floats(0, 0.999))
    def harm(self, harm: str, place: float) -> None:
        """After damage to journal or memory, all recovered chunks are right."""
        before = self.readable()
        for tier in self.fixture.tiers:
            tier.pending.clear()
        self.close()
        segment = SHM_DIR / arena_name(self.path)
        if harm == "lost":
            self.path.unlink()
        elif harm == "cut":
            os.truncate(self.path, int(place * self.path.stat().st_size))
        else:
            with segment.open("r+b") as file:
                file.seek(int(place * segment.stat().st_size))
                file.write(b"\xff")
        self.open(self.fixture.now + 1)
        after = self.readable()
        # A cut journal may restore removed chunks; invariants check their bytes.
        assert harm == "cut" or set(after) <= set(before)

    def end(self) -> None:
        """End the server and start the next one."""
        self.close()
        self.open(self.fixture.now + 1)

    def close(self) -> None:
        """Release all objects of the ended server, and give the next one copies.

        In one process the memory stays mapped, and so locked, while an object of the
        last server refers to it.
        """
        self.jobs.clear()
        self.leases.clear()
        earlier, self.path = self.path, self.path.with_name(f"{self.fixture.now}")
        shutil.copy(earlier, self.path)
        shutil.copy(SHM_DIR / arena_name(earlier), SHM_DIR / arena_name(self.path))
        self.leave()

    def leave(self) -> None:
        """Remove the kept arena."""
        self.fixture.journal.close()
        self.fixture.arena.close()
        (SHM_DIR / self.fixture.arena.name).unlink(missing_ok=True)

    def readable(self) -> dict[ChunkHash, int]:
        """Return the parts of each chunk that can be read."""
        [*chunks] = (
            chunk
            for number in PROMPTS
            for chunk in self.fixture.l1.peek(chain(number, 6))
            if chunk is not None and chunk.ready
        )
        return {chunk.hash: chunk.ready for chunk in chunks}

    # -- what always holds ------------------------------------------------------------

    @invariant()
    def accounts_add_up(self) -> None:
        """Each readable part has its chunk's bytes."""
        table = self.fixture.l1._table
        assert table.quotas is not None
        chunks = [*table.index.values(), *table._dropped]
        for account in table.quotas._accounts.values():
            parts = (c.parts.values() for c in chunks if c.account is account)
            assert account.used_bytes == sum(p.num_bytes for ps in parts for p in ps)

    def teardown(self) -> None:
        """At the end nothing is held, and the segment's name is removed."""
        try:
            super().teardown()
        finally:
            self.leave()
            shutil.rmtree(self.folder)
            self.patch.stop()


TestKeptMachine = KeptMachine.TestCase
TestKeptMachine.__doc__ = """What one server had is the next one's, and right."""
TestKeptMachine.settings = settings(stateful_step_count=50)
