"""The version of the package, and of the protocol that it speaks."""

VERSION = "0.2.0"

#: Written into ``endpoint.json`` and answered by ``ping``; raised when an older client could misunderstand a job.
PROTOCOL = 2
