"""Limits of what travels on the wire: the longest line, the deepest nesting, the largest batch."""

from __future__ import annotations

from typing import Final

#: Longest request line in bytes, its newline not counted (Redis takes 64 KiB inline, too).
MAX_LINE: Final = 64 * 1024
#: Deepest nesting of arrays and objects in a request; far from where CPython's parser raises RecursionError.
MAX_DEPTH: Final = 32
#: Deepest nesting of a reply. Ours reach a fraction of it, so code that walks a reply needs no check of its own.
MAX_REPLY_DEPTH: Final = 2 * MAX_DEPTH
#: Most requests in one batch; without it a line of "1,1,1" costs the server fifty times its length in errors.
MAX_BATCH: Final = 100
#: Longest ``command_id``, and longest ``reason``, in characters.
MAX_COMMAND_ID: Final = 128
MAX_REASON: Final = 1000
#: Longest text of a condition, in characters, and the largest N of its "for N".
MAX_CONDITION: Final = 500
MAX_TIMES: Final = 1_000_000
#: Longest wait of a caller, and longest wait for the ranks' answers, in seconds.
MAX_TIMEOUT: Final = 1e9
MAX_RANK_TIMEOUT: Final = 600
#: Most points of one metric in an answer of ``metrics_history``.
MAX_POINTS: Final = 10_000
