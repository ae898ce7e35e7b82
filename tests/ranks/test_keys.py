"""The keys in the store: no two things share one."""

from __future__ import annotations

from forgather_control.ranks import keys


def test_keys_are_distinct():
    """Inboxes, their counts, and decisions; each training run has a prefix of its own."""
    found = [keys.JOINED, keys.LEFT, keys.ROUNDS, keys.MISSING, keys.SCOPE]
    found += [*(key(rank) for key in (keys.count, keys.received, keys.here) for rank in range(12))]
    found += [keys.decision(number) for number in range(12)]
    found += [keys.message(rank, number) for rank in range(12) for number in range(12)]
    assert len(set(found)) == len(found)
    assert len({keys.prefix("job", "0", 1), keys.prefix("job", "0", 2), keys.prefix("job", "1", 1)}) == 3
