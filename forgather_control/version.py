"""The version of the package and of the protocol it speaks. Floor 0: imports nothing."""

VERSION = "0.1.0"

#: Written into ``endpoint.json`` and answered by ``ping``; raised when an old client could misread us.
PROTOCOL = 2
