"""Page-locked memory is as large as it was asked for, and unlocked once, while it is still there.

No GPU is needed: a stand-in for CUDA's runtime writes down what it is asked for.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import itertools
import mmap
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zerolith
import zerolith.placement
from models import assert_same, make_gpt, token_batches, train_on, whole_weights, zero_config
from zerolith.checkpointing import checkpoint, reset
from zerolith.errors import OffloadError
from zerolith.memory import HostStore, Residency, StagedSwap, Store, SwapFile, host_store, lane, locked_bytes, pinned
from zerolith.memory.away import Away
from zerolith.memory.lane import AtOnce
from zerolith.memory.pages import HUGE_PAGE_BYTES
from zerolith.memory.pinned import host_bytes
from zerolith.memory.pool import HostPool

CPU = torch.device("cpu")
PAGE = mmap.PAGESIZE


def is_mapped(address: int) -> bool:
    """Whether there is memory: the kernel, asked to write from there, says so."""
    reader, writer = os.pipe()
    try:
        return os.write(writer, (ctypes.c_char * 1).from_address(address)) == 1
    except OSError as error:
        return error.errno != errno.EFAULT
    finally:
        os.close(reader)
        os.close(writer)


class Cuda:
    """As torch.cuda.cudart(): 0 is success."""

    def __init__(self) -> None:
        self.locked: dict[int, int] = {}
        self.num_calls = 0
        self.full = False
        self.stuck = False

    def __call__(self) -> Cuda:
        return self

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        self.num_calls += 1
        assert flags == 0
        assert address % PAGE == nbytes % PAGE == 0
        assert is_mapped(address)
        assert is_mapped(address + nbytes - 1)
        if self.full:
            return 2
        assert address not in self.locked, "registered twice"
        self.locked[address] = nbytes
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        self.num_calls += 1
        assert is_mapped(address), "unmapped before it is unregistered"
        if self.stuck:
            return 1
        del self.locked[address]  # KeyError if it is not, or no longer
        return 0

    def cudaGetErrorString(self, code: int) -> str:
        return {1: "invalid argument", 2: "out of memory"}[code]


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cuda]:
    runtime, errors = Cuda(), []
    monkeypatch.setattr(pinned, "cudart", runtime)
    monkeypatch.setattr(sys, "unraisablehook", errors.append)  # what is raised in a finalizer
    gc.collect()
    assert locked_bytes() == 0
    yield runtime
    gc.collect()
    assert not errors, errors
    assert locked_bytes() == sum(runtime.locked.values())


SIZES = [1, PAGE, PAGE + 1, 3 * 2**20 + 5, HUGE_PAGE_BYTES, 3 * HUGE_PAGE_BYTES]


@pytest.mark.parametrize("nbytes", SIZES)
def test_no_more_is_locked_than_whole_pages(nbytes: int, cuda: Cuda) -> None:
    tensor = host_bytes(nbytes, pinned=True)
    assert (tensor.dtype, tensor.shape, tensor.untyped_storage().nbytes()) == (torch.uint8, (nbytes,), nbytes)
    (room,) = cuda.locked.values()
    assert nbytes <= room < nbytes + PAGE
    assert cuda.locked == {tensor.data_ptr(): room}
    assert locked_bytes() == room
    assert tensor.data_ptr() % (HUGE_PAGE_BYTES if nbytes >= HUGE_PAGE_BYTES else PAGE) == 0
    assert tensor.fill_(3).sum() == 3 * nbytes
    address = tensor.data_ptr()
    assert is_mapped(address)
    del tensor
    assert cuda.locked == {}
    assert locked_bytes() == 0
    assert not is_mapped(address)


def test_nothing_is_locked_for_no_bytes_or_where_it_is_not_wanted(cuda: Cuda) -> None:
    assert host_bytes(0, pinned=True).shape == (0,)
    assert host_bytes(PAGE, pinned=False).shape == (PAGE,)
    assert cuda.num_calls == 0


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_memory_goes_with_the_last_that_has_it(order: tuple[int, ...], cuda: Cuda) -> None:
    tensor = host_bytes(5 * PAGE, pinned=True)
    holders: list[Any] = [tensor, tensor[7:9], tensor.view(torch.int32), tensor.untyped_storage()]
    del tensor
    for index in order:
        assert len(cuda.locked) == 1
        holders[index] = None
    assert cuda.locked == {}


def test_tensors_go_in_any_order_and_in_a_cycle(cuda: Cuda) -> None:
    for order in itertools.permutations(range(3)):
        tensors: list[Any] = [host_bytes(size, pinned=True) for size in (1, PAGE, HUGE_PAGE_BYTES + 1)]
        for number, index in enumerate(order):
            assert len(cuda.locked) == 3 - number
            tensors[index] = None
    cycle: list[Any] = [host_bytes(PAGE, pinned=True)]
    cycle.append(cycle)
    del cycle
    gc.collect()
    assert cuda.locked == {}


def test_a_refusal_says_what_and_leaks_nothing(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    held = host_bytes(3 * PAGE, pinned=True)
    mapped: list[int] = []
    monkeypatch.setattr(pinned, "map_pages", remembered(pinned.map_pages, mapped))
    cuda.full = True
    with pytest.raises(
        OffloadError, match=f"no room for 5000 bytes.*'out of memory'.* {3 * PAGE} bytes already. Offload less"
    ) as e:
        host_bytes(5000, pinned=True)
    assert not is_mapped(mapped[0]), "not even while somebody looks at the error"
    del e
    assert locked_bytes() == 3 * PAGE
    cuda.full = False
    del held
    assert cuda.locked == {}


def remembered(make: Callable[[int], int], made: list[int]) -> Callable[[int], int]:
    def call(nbytes: int) -> int:
        made.append(make(nbytes))
        return made[-1]

    return call


def test_an_address_space_that_is_too_small_is_told_of(cuda: Cuda) -> None:
    with pytest.raises(OffloadError, match=rf"no room for {2**60} bytes"):
        host_bytes(2**60, pinned=True)
    assert cuda.num_calls == 0


def test_what_cannot_be_unlocked_stays_mapped(cuda: Cuda, caplog: pytest.LogCaptureFixture) -> None:
    tensor = host_bytes(PAGE, pinned=True)
    address = tensor.data_ptr()
    cuda.stuck = True
    del tensor
    assert "invalid argument" in caplog.text
    assert is_mapped(address), "the device may reach it still"
    cuda.locked.clear()


def test_the_device_is_waited_for_before_memory_goes_and_its_last_error_is_taken(
    cuda: Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    def on(device: int) -> AbstractContextManager[None]:
        events.append(f"on {device}")
        return nullcontext()

    def told(name: str) -> Callable[..., int]:
        method = getattr(Cuda, name)
        return lambda *args: (events.append(name), method(cuda, *args))[1]

    for name in ("cudaHostRegister", "cudaHostUnregister"):
        monkeypatch.setattr(cuda, name, told(name))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: events.append("wait"))
    monkeypatch.setattr(torch, "ones", lambda size, device: events.append(f"a kernel on {device}"))
    tensor = host_bytes(PAGE, pinned=True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)  # of the thread that collects garbage
    del tensor
    assert events == ["on 3", "cudaHostRegister", "on 3", "wait", "cudaHostUnregister"]
    events.clear()
    cuda.full = True
    with pytest.raises(OffloadError):
        host_bytes(PAGE, pinned=True)
    assert events == ["on 0", "cudaHostRegister", "a kernel on cuda:0"]


def test_threads_may_take_and_drop_it_at_once(cuda: Cuda) -> None:
    kept: list[Tensor] = []
    start = threading.Barrier(4)

    def work(number: int) -> None:
        start.wait()
        for size in range(1, 40):
            tensor = host_bytes(size * PAGE + number, pinned=True)
            tensor.fill_(number)
            if size % 13 == 0:
                kept.append(tensor)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(kept) == len(cuda.locked) == 12
    assert locked_bytes() == sum(cuda.locked.values())
    kept.clear()
    assert cuda.locked == {}
    assert locked_bytes() == 0


def in_child(body: Callable[[], bool]) -> bool:
    """What `body` returns in a forked child."""
    pid = os.fork()
    if pid == 0:
        done = False
        try:
            done = body()
        finally:
            os._exit(0 if done else 1)
    return os.waitpid(pid, 0)[1] == 0


def test_a_child_leaves_its_parents_memory_alone(cuda: Cuda) -> None:
    tensors = [host_bytes(PAGE, pinned=True).fill_(7)]
    address = tensors[0].data_ptr()

    def body() -> bool:
        before = cuda.num_calls
        is_new = locked_bytes() == 0
        is_alone = not is_mapped(address) or not hasattr(mmap, "MADV_DONTFORK")
        others = [host_bytes(PAGE, pinned=True) for _ in range(50)]  # some may come to lie where the parent's was
        is_counted = locked_bytes() == 50 * PAGE
        tensors.clear()
        gc.collect()
        is_kept = locked_bytes() == 50 * PAGE and all(is_mapped(other.data_ptr()) for other in others)
        return is_new and is_alone and is_counted and is_kept and cuda.num_calls == before + 50

    cuda.locked.clear()  # the child's may have the same address
    assert in_child(body)
    cuda.locked[address] = PAGE
    assert tensors[0].eq(7).all()
    assert locked_bytes() == PAGE
    tensors.clear()
    assert cuda.locked == {}


def test_nothing_is_asked_of_cuda_when_the_interpreter_ends() -> None:
    program = """
import sys
from zerolith.memory import pinned
class Cuda:
    def cudaHostRegister(self, *_): return 0
    def cudaHostUnregister(self, *_): print("too late")
pinned.cudart = Cuda
kept = pinned.host_bytes(5000, pinned=True)
sys.kept_by_the_interpreter = kept[3:]
cycle = [pinned.host_bytes(2**22, pinned=True)]
cycle.append(cycle)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


# --- those who use it ---------------------------------------------------------------------------


def test_a_pool_lends_the_same_memory_and_lets_it_go(cuda: Cuda) -> None:
    pool = HostPool(pinned=True)
    first = pool.take(5000)
    pool.give_back(first)
    assert pool.take(5000).data_ptr() == first.data_ptr()
    cuda.full = True
    with pytest.raises(OffloadError, match="no room for 1 bytes"):
        pool.take(1)
    assert pool.used_bytes == 5000
    pool.give_back(first)
    del first
    pool.clear()
    assert (pool.idle_bytes, cuda.locked) == (0, {})


def test_what_is_away_is_locked_until_it_is_back(cuda: Cuda) -> None:
    away, tensors = Away(pinned=True), [torch.arange(1000), torch.ones(7)]
    away.send(tensors)
    assert sorted(cuda.locked.values()) == [PAGE, 2 * PAGE]
    away.bring_back()
    assert cuda.locked == {}
    assert tensors[0].equal(torch.arange(1000))
    assert tensors[1].equal(torch.ones(7))


def test_one_that_finds_no_room_leaves_nothing_locked(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    away, tensors = Away(pinned=True), [torch.arange(1000), torch.ones(7)]
    register = cuda.cudaHostRegister

    def scarce(address: int, nbytes: int, flags: int) -> int:
        cuda.full = cuda.num_calls > 0
        return register(address, nbytes, flags)

    monkeypatch.setattr(cuda, "cudaHostRegister", scarce)
    with pytest.raises(OffloadError, match="no room"):
        away.send(tensors)
    gc.collect()
    assert cuda.locked == {}
    assert tensors[0].equal(torch.arange(1000))


class Locked(AtOnce):
    """Copies through page-locked memory, each of which is done when the next but one begins: as with a GPU."""

    needs_pinned = True

    def __init__(self) -> None:
        self.sources: list[int] = []  # addresses, of all copies

    def start(self, target: Tensor, source: Tensor) -> int:
        target.copy_(source)
        self.sources.append(source.data_ptr())
        return len(self.sources)

    def is_done(self, copy: int) -> bool:
        return copy + 2 <= len(self.sources)

    def reads(self, buffer: Tensor) -> bool:
        """Whether a copy that is not done reads the buffer."""
        return buffer.data_ptr() in self.sources[-2:]


STORES: dict[str, Callable[[Path], Store]] = {
    "cpu": lambda folder: HostStore(CPU),
    "staged": lambda folder: StagedSwap(SwapFile(folder), CPU),
}


@pytest.mark.parametrize("where", STORES)
def test_an_engine_locks_what_it_needs_and_unlocks_all_of_it(
    where: str, cuda: Cuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = token_batches(4, 8)
    config = zero_config(3, train_micro_batch_size_per_gpu=4, gradient_accumulation_steps=2)
    plain = zerolith.initialize(model=make_gpt(), config=config)[0]
    expected = train_on(plain, data), train_on(plain, data), whole_weights(plain)
    plain.destroy()
    copier, take = Locked(), HostPool.take

    def take_one_that_is_free(pool: HostPool, nbytes: int) -> Tensor:
        buffer = take(pool, nbytes)
        assert not copier.reads(buffer)
        return buffer

    monkeypatch.setattr(HostPool, "take", take_one_that_is_free)
    monkeypatch.setattr(host_store, "copier_for", lambda device: copier)
    store = STORES[where](tmp_path)
    monkeypatch.setattr(zerolith.placement, "_weights_store", lambda *_: store)
    engine = zerolith.initialize(model=make_gpt(), config=config)[0]
    losses = train_on(engine, data)
    num_locked = len(cuda.locked)
    assert num_locked > 0
    if where == "cpu":
        sections = [section for section in engine._sharded.sections if section.is_sharded]
        needed = sum(section.weights.data.numel() * section.weights.data.itemsize for section in sections)
        assert needed <= locked_bytes() < needed + len(sections) * PAGE
    num_calls = cuda.num_calls
    more = train_on(engine, data)
    assert cuda.num_calls == num_calls, "memory is locked once, and used again"
    assert_same((losses, more, whole_weights(engine)), expected)
    engine.destroy()
    gc.collect()
    assert cuda.locked == {}


class Keeper:
    """Two tensors, which nobody else sees."""

    def __init__(self) -> None:
        self.tensors = [torch.arange(1000), torch.ones(7)]

    def kept(self, own: str) -> list[Tensor]:
        return self.tensors

    def show(self, own: str) -> None:
        pass

    hide = show


def test_reads_that_find_no_room_are_made_again_when_there_is(
    cuda: Cuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_store, "copier_for", lambda device: Locked())
    store, keeper = StagedSwap(SwapFile(tmp_path), CPU), Keeper()
    residency: Residency[str] = Residency(store, keeper)
    with residency.resident("both"):
        pass
    residency.settle()
    store._pool.clear()
    register = cuda.cudaHostRegister

    def scarce(address: int, nbytes: int, flags: int) -> int:
        cuda.full = len(cuda.locked) == 1  # the first has been read by then
        return register(address, nbytes, flags)

    with monkeypatch.context() as patch:
        patch.setattr(cuda, "cudaHostRegister", scarce)
        with pytest.raises(OffloadError, match="no room"):
            residency.prefetch("both")
    cuda.full = False
    with residency.readable("both"):
        assert keeper.tensors[0].equal(torch.arange(1000))
        assert keeper.tensors[1].equal(torch.ones(7))
    residency.close()
    gc.collect()
    assert cuda.locked == {}


class Checkpointed(nn.Module):
    """Checkpoints its blocks itself if told."""

    def __init__(self, *, itself: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(128, 128), nn.GELU()) for _ in range(4)])
        self.itself = itself

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x) if self.itself else block(x)
        return x.square().mean()


@pytest.mark.parametrize("policy", ["none", "full"])
def test_checkpoints_on_the_host_unlock_their_memory_too(
    policy: str, cuda: Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lane, "AtOnce", Locked)
    config = zero_config(1, activation_checkpointing={"policy": policy, "cpu_checkpointing": True})
    engine = zerolith.initialize(model=Checkpointed(itself=policy == "none"), config=config)[0]
    try:
        for _ in range(2):
            engine.backward(engine(torch.randn(256, 128)))
            engine.step()
        assert len(cuda.locked) > 0
        engine.destroy()
        gc.collect()
        assert cuda.locked == {}
    finally:
        reset()
