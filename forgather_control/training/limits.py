"""Limits and periods of the training side, in one place; read as ``limits.NAME`` when they are used."""

from __future__ import annotations

from typing import Final

# Commands...

#: Most unfinished commands of one name: a loop that never saves keeps its saves open for ever, and they must not
#: keep an abort out. Equal pending commands without an id share a record, so only a client that sends many ids
#: reaches the limit.
MAX_PENDING: Final = 64
#: Records kept; the oldest finished ones are dropped first.
MAX_RECORDS: Final = 256
#: Finished commands that ``status`` still shows.
RECENT_COMMANDS: Final = 5
#: Most bytes of a command's value as JSON.
MAX_VALUE: Final = 256 * 1024
#: Most characters of a value in answers that hold many records, and in events; a longer one is left out of them.
BRIEF_VALUE: Final = 4096

# Profiles...

#: Seconds after which a profile ends though steps are left: what it records is kept in memory.
PROFILE_SECONDS: Final = 60.0
#: Seconds that the table of operations may take.
TABLE_TIMEOUT: Final = 300.0

# Rules...

#: Rules that are kept, those that have fired, too.
MAX_RULES: Final = 32

# Status...

#: Longest age in seconds of an answer of ``status`` while nothing but the time changes.
STATUS_AGE: Final = 0.1
#: Longest age in seconds of the process figures in it.
PROCESS_STATS_AGE: Final = 1.0
#: Most metric names kept, and the longest text of one value; both are part of every status reply.
MAX_NAMES: Final = 256
MAX_TEXT: Final = 200
#: Seconds between two samples of the step counter, and how many are kept: the speed is that of the last minute, or of
#: the last 60 steps where a step takes longer than a second.
SPEED_SAMPLE_PERIOD: Final = 1.0
SPEED_SAMPLES: Final = 60
#: Most characters of stacks in one reply, all ranks together; a thousand ranks then have two pages each.
MAX_STACKS: Final = 4 << 20

#: Seconds that an answer of ``status`` waits for values on a device, and age up to which one stands for later ones.
DEVICE_READ_TIMEOUT: Final = 0.5
DEVICE_VALUE_AGE: Final = 1.0

#: Seconds after which ``list_jobs`` gives up, and the share of one core that it may use.
LIST_TIMEOUT: Final = 10.0
LIST_SHARE: Final = 0.01

# The history of metrics...

#: Points that are kept of all metrics together, 24 bytes each: with what holds them they stay below 1 MiB. So many
#: metrics share them at first; with twice as many, each has half of them.
HISTORY_POINTS: Final = 28_672
HISTORY_NAMES: Final = 16

# Events...

#: Events kept for subscribers that are slow or come late: of the rare kinds, and of progress and metrics.
MAX_EVENTS: Final = 1000
MAX_SAMPLE_EVENTS: Final = 50
#: Seconds between two samples of progress and metrics for subscribers.
EVENT_SAMPLE_PERIOD: Final = 0.2
#: Writes of the event log that may follow on one another, and how many more a second adds; a tick writes the rest.
EVENT_WRITES: Final = 20.0
EVENT_WRITE_RATE: Final = 2.0

# Pause and settings...

#: Longest wait in seconds of a paused training thread until it looks for what a signal handler asked for.
HOLD_PERIOD: Final = 0.2
#: Seconds that an answer of ``list_settings`` waits for the next step, which reads the values.
SETTINGS_TIMEOUT: Final = 1.0

# Start and end...

#: Seconds that training waits for the jobs directory when it starts, and again when it ends; what is left to do then
#: is done when the file system answers.
DISK_TIMEOUT: Final = 1.0
#: Suffixes that are tried for a generated job id that is taken.
MAX_SUFFIX: Final = 99
#: Seconds between two looks at the files of a save in the background, and without a change until it has failed.
WATCH_PERIOD: Final = 0.2
WRITE_TIMEOUT: Final = 10.0
#: Seconds that the end of training may wait for the last replies.
CLOSE_TIMEOUT: Final = 3.0
