"""Time-outs and bounds of the ranks package; all times are in seconds."""

from __future__ import annotations

from typing import Final

#: From a rank's start until control counts as missing on the ranks that have not joined: commands are refused then. At
#: most a tick of the server later those that wait have failed, 30 s in all.
JOIN_TIMEOUT: Final = 20.0
#: In which all ranks must answer a Prepare. They answer in milliseconds, unless C code holds their interpreter's
#: lock; to hold training any longer would do more harm than to try again later.
READY_TIMEOUT: Final = 5.0
#: That a training thread is held before its rank itself proposes to call the round off.
DECISION_TIMEOUT: Final = 10.0
#: That a rank that changed a setting waits for the others to do so before it proposes to undo it.
SETTLE_TIMEOUT: Final = 10.0
#: That it is then held for the store's answer before it trains on without one.
GIVE_UP_TIMEOUT: Final = 10.0
#: From a round that was called off to the next one, and the factor by which that grows each time, up to the maximum: a
#: rank that is stopped holds the others 15 s in the first minute, and less than 5 s in each one after that.
RETRY_DELAY: Final = 1.0
RETRY_FACTOR: Final = 8.0
MAX_RETRY_DELAY: Final = 60.0
#: That a call of the store may take before the channel counts as broken; one that is frozen for less is survived.
STORE_TIMEOUT: Final = 120.0
#: That the receiver's wait for a message may take: longer than any training, and short enough for poll(2), which
#: counts milliseconds in an int (24.8 days).
INBOX_TIMEOUT: Final = 20 * 86400.0
#: That the end of training may wait for a channel to send what is queued.
CLOSE_TIMEOUT: Final = 3.0
#: Between two checks whether the processes of ranks that rank 0 waits for still run.
LOOK_PERIOD: Final = 1.0
#: Between two looks for the last reports of ranks that poll.
REPORTS_PERIOD: Final = 0.05
#: That the interpreter's exit may wait for a channel that was not closed.
EXIT_TIMEOUT: Final = 1.0
#: That the interpreter's exit may wait for the threads of a channel that the end of training did not wait for.
LAST_TIMEOUT: Final = 5.0
#: Steps between two polls where ranks must poll and neither the caller nor the trainer says how many.
POLL_STEPS: Final = 50
#: Commands of which rank 0 remembers what the ranks reported, for callbacks that are registered later.
MAX_RESULTS: Final = 1024
