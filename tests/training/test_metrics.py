"""Logged values: held without their graphs, their memory or their device; shown as JSON whatever they are."""

from __future__ import annotations

import gc
import importlib.util
import math
import sys
import weakref
from contextlib import contextmanager
from decimal import Decimal
from types import SimpleNamespace

import pytest

from forgather_control.training.metrics import MAX_NAMES, MAX_TEXT, hold, merge, plain
from forgather_control.wire.jsonrpc import encode

from ..support.harness import needs_torch, strict

needs_numpy = pytest.mark.skipif(
    importlib.util.find_spec("numpy") is None, reason="numpy, which comes with the trainers of torch, is not installed"
)


def shown(value):
    """What a client reads of one logged value; the way there must not fail."""
    return strict(encode(plain(hold({"x": value}))))["x"]


class Hostile:
    """An object each of whose manners is broken in the way that ``fault`` says."""

    def __init__(self, **members):
        self.__dict__.update(members)

    def __repr__(self):
        raise RuntimeError("no repr")

    def __len__(self):
        raise RuntimeError("no length")


def boom(*args, **kwargs):
    raise RuntimeError("CUDA error: device-side assert triggered")


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (None, None), (True, True), (False, False), (0, 0), (-3, -3), (1.5, 1.5), ("text", "text"), ("", ""),
        (2**63 - 1, 2**63 - 1), (-(2**63) + 1, -(2**63) + 1), (2**63, 9.223372036854775808e18), (-(10**300), -1e300),
        (10**400, "int"), (10**5000, "int"), (math.nan, "NaN"), (math.inf, "Infinity"), (-math.inf, "-Infinity"),
        (5e-324, 5e-324), ("x" * 1000, "x" * MAX_TEXT), ("\ud800", "\ufffd"), ("a\nb\x1b", "a\nb\x1b"),
        ([1, 2.5, "a"], "[1, 2.5, 'a']"), ((1,), "(1,)"), ({"a": 1}, "{'a': 1}"), ([], "[]"),
        ([0] * 16, str([0] * 16)), ([0] * 17, "list"), ([10**5000], "list"), ([[1]], "list"),
        ({"a": [1] * 10**6}, "dict"), (["x" * 10**6], "list"), ({1: 2, "b": None}, "{1: 2, 'b': None}"),
        (["x" * 150] * 16, str(["x" * 150] * 16)[:MAX_TEXT]),
        (Decimal("1.5"), "Decimal"), (1 + 2j, "complex"), (b"bytes", "bytes"), (object(), "object"),
        (range(3), "range"), (float, "type"), ({1, 2}, "set"),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_value_as_json(value, wanted):
    """Numbers stay numbers, texts are short texts, and the rest is named, not spelt out."""
    assert shown(value) == wanted


@pytest.mark.parametrize(
    "value",
    [Hostile(), Hostile(item=boom), Hostile(detach=boom), Hostile(detach=boom, numel=lambda: 1),
     Hostile(detach=lambda: None, numel=boom), Hostile(item=boom, size=1), Hostile(item=lambda: Hostile(), size=1),
     Hostile(detach=5), Hostile(to_local=boom), [Hostile()], (Hostile(),), {"a": Hostile()},
     Hostile(item=lambda: 10**5000, size=1), Hostile(item=lambda: "x" * 10**6, size=1)],
    ids=range(14),
)  # fmt: skip
def test_value_that_fails(value):
    """An object that raises, whatever is done to it, neither ends the control of a job nor its status."""
    found = shown(value)
    assert isinstance(found, str) and len(found) <= MAX_TEXT
    assert shown(1.5) == 1.5


def test_reading_is_left_to_the_asker():
    """On the training thread nothing is read from a device: ``item`` and ``repr`` are called when a client asks."""
    asked = []

    class OnDevice:
        size = 1

        def item(self):
            asked.append("item")
            return 2.5

        def __repr__(self):
            asked.append("repr")
            return "?"

    held = hold({"a": OnDevice(), "b": [OnDevice()], "c": {"d": OnDevice()}, "e": {OnDevice(): 1}})
    assert asked == []
    assert plain(held) == {"a": 2.5, "b": "list", "c": "dict", "e": "dict"} and asked == ["item"]


# Names...


@pytest.mark.parametrize("name", ["job_id", "status", "", "a/b", "ż", "x" * 10_000, 5, None, 1.5, ("a", 1), "\ud800"])
def test_any_name(name):
    """A name is text of bounded length, also if it is a status key or no text at all."""
    held = hold({name: 1})
    assert held == {str(name)[:MAX_TEXT]: 1}
    strict(encode(plain(held)))


def test_merge_keeps_the_latest():
    """A later log overwrites a name and leaves the others; the dictionaries it was made of stay as they are."""
    old, new = {"loss": 1, "lr": 2}, {"loss": 3}
    assert merge(old, new) == {"lr": 2, "loss": 3} and list(merge(old, new)) == ["lr", "loss"]
    assert (old, new) == ({"loss": 1, "lr": 2}, {"loss": 3})


def test_names_are_bounded():
    """Names that differ at each step do not grow the status for ever: the oldest go."""
    held = {"first": 0}
    for step in range(1000):
        held = merge(held, hold({"loss": step, f"layer{step}": step}))
        assert len(held) <= MAX_NAMES
    assert held["loss"] == held["layer999"] == 999 and "first" not in held
    assert len(merge({}, hold({f"{n}": n for n in range(10_000)}))) == MAX_NAMES


# NumPy...


@needs_numpy
def test_numpy_values():
    """Scalars and arrays of one number are numbers; larger arrays are named; half floats and the like work."""
    import numpy as np

    cases = [
        (np.float32(0.5), 0.5), (np.float64(0.1), 0.1), (np.float16(2), 2.0), (np.int8(-3), -3), (np.bool_(True), True),
        (np.uint64(2**64 - 1), float(2**64)), (np.float32("nan"), "NaN"), (np.float64("-inf"), "-Infinity"),
        (np.array(1.5), 1.5), (np.array([[7]]), 7), (np.zeros(3), "ndarray"), (np.zeros(0), "ndarray"),
        (np.str_("a" * 300), "a" * MAX_TEXT), (np.complex64(1), "(1+0j)"), (np.array("text"), "text"),
    ]  # fmt: skip
    for value, wanted in cases:
        assert (shown(value), type(shown(value))) == (wanted, type(wanted)), repr(value)
    for value in (np.longdouble(1) / 3, np.datetime64("2026-01-01"), np.array([None]), np.void(b"x" * 999)):
        assert shown(value) is None or len(shown(value)) <= MAX_TEXT


@needs_numpy
def test_numpy_view_keeps_nothing_alive():
    """One number of a large array does not keep the array."""
    import numpy as np

    large = np.zeros(1000)
    gone = weakref.ref(large)
    held = hold({"view": large[:1], "all": large})
    del large
    gc.collect()
    assert gone() is None and plain(held) == {"view": 0.0, "all": "ndarray"}


# GPUs (tests/system/test_gpu.py has a real one)...


class Stream:
    """A module ``torch.cuda`` with one stream, which captures a graph for as many questions as ``captures`` says."""

    def __init__(self, captures=()):
        self.entered, self.captures = [], list(captures)

    def current_stream(self, device):
        return f"stream of {device.type}"

    @contextmanager
    def stream(self, stream):
        self.entered.append(stream)
        yield
        self.entered.append(None)

    def is_current_stream_capturing(self):
        return bool(self.captures) and self.captures.pop()

    def item(self):
        assert self.entered == ["stream of cuda"] and not self.captures
        return 7.0


class OnGpu:
    """A tensor of one number on a GPU."""

    is_cuda, device = True, SimpleNamespace(type="cuda")

    def __init__(self, cuda):
        self.item = cuda.item

    def numel(self):
        return 1

    def detach(self):
        return self

    clone = detach


@pytest.mark.parametrize("captures", [[], [True, True]])
def test_a_number_on_a_gpu_is_read_on_its_stream_while_nothing_is_captured(monkeypatch, captures):
    """The stream that computes a number is the one that it is read on, once no graph is being captured."""
    cuda = Stream()
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    held = hold({"loss": OnGpu(cuda)})
    cuda.captures = captures
    assert plain(held) == {"loss": 7.0}
    assert cuda.entered == ["stream of cuda", None]


def test_a_captured_tensor_has_no_value(monkeypatch):
    """What is logged inside the capture of a graph is computed at its replay only."""
    cuda = Stream([True])
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    assert hold({"loss": OnGpu(cuda)}) == {"loss": "tensor of a graph that is captured"}


# torch...


@needs_torch
def test_tensor_values():
    """A tensor of one number is that number, whatever its type and shape; a larger one is its shape."""
    import torch

    cases = [
        (torch.tensor(1.5), 1.5), (torch.tensor([[2]]), 2), (torch.tensor(True), True),
        (torch.tensor(math.nan), "NaN"), (torch.tensor(math.inf), "Infinity"),
        (torch.tensor(0.5, dtype=torch.bfloat16), 0.5),
        (torch.zeros(2, 3), "tensor of shape (2, 3)"), (torch.zeros(0), "tensor of shape (0,)"),
        (torch.nn.Parameter(torch.ones(1)), 1.0), (torch.tensor(1 + 2j), "(1+2j)"), ([torch.tensor(1.0)], "list"),
        (torch.zeros((1,) * 60), 0.0),
        (torch.zeros((2,) + (1,) * 60), f"tensor of shape {(2,) + (1,) * 60}"[:MAX_TEXT]),
        (torch.ones(1, device="meta"), "Tensor"),
    ]  # fmt: skip
    for value, wanted in cases:
        assert (shown(value), type(shown(value))) == (wanted, type(wanted))


@needs_torch
@pytest.mark.parametrize("shape", [(), (1,), (3,)])
def test_graph_is_not_kept_alive(shape):
    """A logged loss does not hold the activations of its step."""
    import torch

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.activations = activations.pop()
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            return grad * 2

    class Activations:
        pass

    activations = [Activations()]
    gone = weakref.ref(activations[0])
    loss = Double.apply(torch.ones(shape, requires_grad=True))
    held = hold({"loss": loss, "losses": [loss]})
    assert gone() is not None
    del loss
    gc.collect()
    assert gone() is None
    assert not any(getattr(value, "requires_grad", False) for value in held.values())


@needs_torch
def test_view_keeps_no_storage_alive():
    """One number of large logits does not keep their memory."""
    import torch

    held = hold({"first": torch.zeros(1_000_000)[0], "row": torch.zeros(1000, 1000)[:1, :1]})
    assert held == {"first": 0.0, "row": 0.0}, "on the processor it is read at once"
    held = hold({"first": torch.zeros(1_000_000, device="meta")[0]})
    assert held["first"].device.type == "meta" and held["first"]._base is None


@needs_torch
def test_held_tensor_does_not_change():
    """What was logged is what is shown, although the loop resets its running loss in place."""
    import torch

    running = torch.tensor(3.0)
    held = hold({"loss": running})
    running.zero_()
    assert plain(held) == {"loss": 3.0}


@needs_torch
def test_distributed_tensor_costs_no_collective(tmp_path):
    """A DTensor's number would need all ranks, so it is not asked for (a gradient norm under FSDP is one)."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial

    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        norm = DTensor.from_local(torch.tensor(2.0), init_device_mesh("cpu", (1,)), [Partial()])
        held = hold({"grad_norm": norm})
        dist.destroy_process_group()
        assert plain(held) == {"grad_norm": "distributed tensor of shape ()"}
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
