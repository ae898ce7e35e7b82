"""Logged values as JSON values; recognises tensors and NumPy scalars by their attributes.

A logged value may be anything: a tensor on a device, a NumPy scalar, a list of a million numbers.
``hold`` runs on the training thread and must cost next to nothing, above all no synchronisation
with a device. Values on a device are read by a ``DeviceReader``, when a client has asked.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from .limits import DEVICE_VALUE_AGE, MAX_NAMES, MAX_TEXT


def hold(logs: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the values as they are, without the graphs and memory behind them."""
    return {_name(name): _light(value) for name, value in logs.items()}


def merge(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Return a new dictionary with the latest value of each name, the latest ``MAX_NAMES`` of them."""
    merged = {**{name: value for name, value in old.items() if name not in new}, **new}
    return dict(list(merged.items())[-MAX_NAMES:])


def plain(held: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values as JSON values: numbers where they are numbers, else short texts."""
    return {name: _plain(value) for name, value in held.items()}


class DeviceReader:
    """Reads values from devices on a thread of its own, so that a device that hangs blocks no other thread.

    Used on the server thread. There is at most one reading thread; what it has read is assigned whole.

    Args:
        on_read: called on the reading thread after it has read; must not block.
    """

    def __init__(self, on_read: Callable[[], None]) -> None:
        self._on_read = on_read
        self._read: dict[str, tuple[Any, Any]] = {}  # by name: the held value, and its JSON value
        self._thread: threading.Thread | None = None
        #: When the last reading began, and when the last finished one did, in ``time.monotonic()`` seconds.
        self.began_at = self.read_at = float("-inf")

    def is_read(self, held: Mapping[str, Any]) -> bool:
        """Return whether no value is left to read from a device."""
        return all(_is_small(value) or self._read.get(name, (None,))[0] is value for name, value in held.items())

    def known(self, held: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """Return the JSON values that are known, and the names of those that only a device knows.

        A value that was read just now stands for a later one of its name: a loop may log faster than a device answers.
        """
        is_recent = time.monotonic() - self.read_at < DEVICE_VALUE_AGE
        values = {}
        for name, value in held.items():
            if _is_small(value):
                values[name] = _plain(value)
            elif name in self._read and (is_recent or self._read[name][0] is value):
                values[name] = self._read[name][1]
        return values, [name for name in held if name not in values]

    def read(self, held: Mapping[str, Any]) -> None:
        """Begin to read the values on devices, unless a reading is under way."""
        if self._thread is None or not self._thread.is_alive():
            self.began_at = time.monotonic()
            self._thread = threading.Thread(target=self._run, args=(held,), name="forgather-devices", daemon=True)
            self._thread.start()

    def _run(self, held: Mapping[str, Any]) -> None:
        self._read = {name: (value, _plain(value)) for name, value in held.items() if not _is_small(value)}
        self.read_at = self.began_at
        self._thread = None  # the next reading may begin before this thread has ended
        self._on_read()


class CudaNumber:
    """A number on a GPU, to be read in order with the stream that computes it.

    Reading changes nothing for training, also while it captures a graph. See "Stream Management" of CUDA's Driver API.
    """

    def __init__(self, tensor: Any, stream: Any, cuda: Any) -> None:
        self._tensor, self._stream, self._cuda = tensor, stream, cuda

    @classmethod
    def of(cls, tensor: Any) -> CudaNumber | str:
        """Return the number; a text where the tensor was only captured, so that it has no value yet."""
        cuda = sys.modules["torch"].cuda
        if cuda.is_current_stream_capturing():
            return "tensor of a graph that is captured"
        return cls(tensor, cuda.current_stream(tensor.device), cuda)

    def item(self) -> Any:
        """Return the value, on a thread that does nothing else: blocks until the stream has computed it."""
        with contextlib.suppress(OSError, AttributeError):  # else CUDA fails the captures that other threads have begun
            relaxed = ctypes.c_int(2)
            ctypes.CDLL("libcuda.so.1").cuThreadExchangeStreamCaptureMode(ctypes.byref(relaxed))
        with self._cuda.stream(self._stream):
            while self._cuda.is_current_stream_capturing():
                time.sleep(0.01)
            return self._tensor.item()


def on_host(held: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that can be read without a device, as JSON values."""
    return {name: _plain(value) for name, value in held.items() if _is_small(value)}


def _name(name: Any) -> str:
    try:
        return str(name)[:MAX_TEXT]
    except Exception:  # boundary: an object of the user's
        return type(name).__name__


def _light(value: Any) -> Any:
    try:
        if _is_small(value):
            return value
        return str(value)[:MAX_TEXT] if isinstance(value, str) else _light_object(value)
    except Exception:  # boundary: an object of the user's; one odd value must not end control
        return type(value).__name__


def _light_object(value: Any) -> Any:
    if hasattr(value, "to_local"):  # a DTensor: its number may cost a collective
        return f"distributed tensor of shape {tuple(value.shape)}"[:MAX_TEXT]
    if hasattr(value, "detach"):  # a tensor: not its graph, nothing larger than a number, and not what it is a view of
        if value.numel() != 1:
            return f"tensor of shape {tuple(value.shape)}"[:MAX_TEXT]
        if value.device.type == "cpu":
            return value.item()
        number = value.detach().clone()
        return CudaNumber.of(number) if number.is_cuda else number
    if hasattr(value, "item") and getattr(value, "size", 1) == 1:
        return value.item() if type(value).__module__ == "numpy" else value
    if isinstance(value, (list, tuple, dict)) and len(value) <= 16:
        items = [*value, *value.values()] if isinstance(value, dict) else value
        if all(map(_is_small, items)):  # the repr of others might read a device, or take long
            return repr(value)[:MAX_TEXT]
    return type(value).__name__


def _is_small(value: Any) -> bool:
    return value is None or isinstance(value, (int, float)) or (isinstance(value, str) and len(value) <= MAX_TEXT)


def _plain(value: Any) -> Any:
    try:
        if hasattr(value, "item"):
            value = value.item()
        if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 1 << 63:
            value = float(value)
        return value if _is_small(value) else repr(value)[:MAX_TEXT]
    except BaseException:  # boundary: as above (SystemExit would end the server); also an integer beyond a double
        return type(value).__name__
