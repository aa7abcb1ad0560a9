"""Starting and finding the default process group. The environment is read here and nowhere else."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from zerolith.comm.communicator import Comm
from zerolith.errors import ConfigError, PeerLostError

LOOPBACK = ("localhost", "127.0.0.1", "::1")
TIMEOUT = timedelta(minutes=10)
JOINING = timedelta(minutes=5)  # for ranks that are there to make a second group
GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"  # gloo chooses its interface from this variable when the group is made


def is_distributed() -> bool:
    """Whether a default process group exists."""
    return dist.is_available() and dist.is_initialized()


def init_distributed(
    dist_backend: str | None = None,
    *,
    timeout: timedelta = TIMEOUT,
    rank: int = -1,
    world_size: int = -1,
) -> None:
    """Join the default process group that the launcher's environment describes.

    Reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, as torchrun sets them. Without them, and
    when a group exists already, it makes none: one process needs no group. `dist_backend` defaults to nccl
    with CUDA and gloo without. On a single host, sockets listen on the loopback interface only.

    With CUDA this process's device becomes the one to which an existing group is bound, or GPU number LOCAL_RANK if it
    sees so many; else the current device stays.

    Collective. Raises ConfigError if the environment is only half there, PeerLostError if some rank does not come.
    """
    _choose_device()
    if is_distributed():
        return
    rank = rank if rank >= 0 else _env_int("RANK", -1)
    world_size = world_size if world_size >= 0 else _env_int("WORLD_SIZE", -1)
    if rank < 0 and world_size < 0:
        return
    if not 0 <= rank < world_size:
        raise ConfigError(
            f"environment: RANK={rank} and WORLD_SIZE={world_size} do not fit; start with torchrun, "
            "or unset both to run one process"
        )
    backend = dist_backend or ("nccl" if torch.cuda.is_available() else "gloo")
    address, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), _env_int("MASTER_PORT", 29500)
    agent_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    local = address in LOOPBACK or _env_int("LOCAL_WORLD_SIZE", 0) == world_size
    try:
        with _on_loopback(is_local=local):
            is_ours = address in LOOPBACK and not agent_store
            store = _loopback_store(port, rank=rank, world_size=world_size, timeout=timeout) if is_ours else None
            dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    except RuntimeError as error:  # torch raises DistStoreError and other subclasses
        raise PeerLostError(
            f"rank {rank} of {world_size} could not join the others at {address}:{port} within "
            f"{timeout.total_seconds():g} s: look for ranks that never started or failed before. torch says: {error}"
        ) from error


def _choose_device() -> None:
    """This process's GPU; ranks of one host must not share theirs, and kernels start on the current one."""
    if not torch.cuda.is_available():
        return
    bound = getattr(dist.group.WORLD, "bound_device_id", None) if is_distributed() else None
    local = _env_int("LOCAL_RANK", -1)
    if bound is not None and bound.type == "cuda":
        torch.cuda.set_device(bound)
    elif 0 <= local < torch.cuda.device_count() and torch.cuda.current_device() == 0:
        torch.cuda.set_device(local)  # who has chosen another one than the first has had a reason


def default_comm(*, reproducible: bool = False) -> Comm:
    """All ranks of the default process group, or one rank if there is none."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    group = dist.group.WORLD if is_distributed() else None
    return Comm(group, device, reproducible=reproducible)


def side_comm(comm: Comm, *, timeout: timedelta) -> Comm:
    """The ranks of `comm` with a group of their own on the CPU, for threads beside the one that trains.

    Collective. Raises PeerLostError.
    """
    cpu = torch.device("cpu")
    if comm.group is None:
        return Comm(None, cpu)
    ranks = dist.get_process_group_ranks(comm.group)
    comm.max([0.0], name="second group")  # a rank that is gone is noticed here at once, and there after the timeout
    try:
        with _on_loopback(is_local=_env_int("LOCAL_WORLD_SIZE", 0) == comm.size):
            group = dist.new_group(ranks, backend="gloo", timeout=JOINING)
        distributed_c10d._set_pg_timeout(timeout, group)  # else a rank that fails as it joins is waited for so long
        return Comm(group, cpu)
    except RuntimeError as error:  # DistNetworkError, DistStoreError and others
        raise PeerLostError(
            f"no second group of {comm.size} ranks could be made: another rank died or did not answer; look for "
            f"the first error in the other ranks' logs. torch says: {error}"
        ) from error


@contextmanager
def _on_loopback(*, is_local: bool) -> Iterator[None]:
    """Gloo groups that are made in here use the loopback interface if all ranks are on this host."""
    sets_interface = is_local and GLOO_INTERFACE not in os.environ
    if sets_interface:
        os.environ[GLOO_INTERFACE] = "lo"
    try:
        yield
    finally:
        if sets_interface:
            del os.environ[GLOO_INTERFACE]


def _loopback_store(port: int, *, rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    """A TCPStore whose server is bound to 127.0.0.1; torch's own binds to every interface."""
    if rank != 0:
        return dist.TCPStore("127.0.0.1", port, world_size, is_master=False, timeout=timeout)
    try:
        listener = socket.create_server(("127.0.0.1", port), backlog=world_size)
    except OSError as error:
        raise ConfigError(f"environment: MASTER_PORT={port} is taken ({error}); choose another") from error
    return dist.TCPStore(
        "127.0.0.1",
        port,
        world_size,
        is_master=True,
        timeout=timeout,
        master_listen_fd=listener.detach(),  # the store owns it from here on
        use_libuv=False,
    )


def ranks_on_this_host(otherwise: int = 1) -> int:
    """As the launcher says; `otherwise` where it does not."""
    return max(1, _env_int("LOCAL_WORLD_SIZE", otherwise))


def _env_int(name: str, default: int) -> int:
    text = os.environ.get(name, default)
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"environment: {name}={text!r} is not a whole number") from None
