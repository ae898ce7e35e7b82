"""Fixtures of the tests of the whole system."""

from __future__ import annotations

import pytest

from forgather_control.client.connection import Client

from ..support import answers


@pytest.fixture(autouse=True)
def answers_fit_over_connect(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check the answers of jobs in other processes, too, against the schemas of ``rpc.discover``."""
    monkeypatch.setattr(Client, "call_raw", answers.checked(Client.call_raw))
