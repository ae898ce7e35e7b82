"""Checks of every test of the whole."""

from __future__ import annotations

import pytest

from forgather_control.client.connection import Client

from ..support import answers


@pytest.fixture(autouse=True)
def answers_fit_over_connect(monkeypatch: pytest.MonkeyPatch) -> None:
    """What jobs in other processes answer to this one fits the schemas of ``rpc.discover``, too."""
    monkeypatch.setattr(Client, "call_raw", answers.checked(Client.call_raw))
