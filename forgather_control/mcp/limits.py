"""Limits of one call of an assistant; all times are seconds."""

from typing import Final

#: Longest wait.
MAX_WAIT: Final = 600.0
#: Wait unless the caller chooses: hosts commonly give up a call after a minute.
DEFAULT_WAIT: Final = 50.0
#: Most events of an answer, and how many unless the caller chooses.
MAX_EVENTS: Final = 1000
EVENTS: Final = 50
#: Longest text of a training script that a description quotes, in characters.
MAX_QUOTED: Final = 500
