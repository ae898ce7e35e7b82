"""What another program sends may be anything: where it cannot be read, that is one error, and the program's fault."""

from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import ControlError, InternalError


@contextmanager
def reading(what: str = "an answer that cannot be read") -> Iterator[None]:
    """Raise InternalError for what reading an answer of any form and of any values can raise in the block."""
    try:
        yield
    except ControlError:  # some are errors of these kinds, too
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as err:
        raise InternalError(f"the other side sent {what}") from err
