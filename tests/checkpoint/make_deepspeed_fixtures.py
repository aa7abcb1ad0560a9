"""Make tests/checkpoint/fixtures/deepspeed.tar.xz: checkpoints that DeepSpeed wrote, and the truth about each.

Not a test: it runs where DeepSpeed is installed, which the tests do not need.

    python -m venv /tmp/ds && /tmp/ds/bin/pip install deepspeed==0.19.8 torch==2.13.0
    /tmp/ds/bin/python tests/checkpoint/make_deepspeed_fixtures.py

Each case is a folder `<name>/` with what `engine.save_checkpoint` wrote and `truth.pt` beside it: the fp32 parameters
and the optimizer's states as DeepSpeed's own safe_get_full_*() gathered them in the run that saved. The folder
`<name>-universal` has what ds_to_universal made of it. Name cases as arguments to make these only, into
./deepspeed-fixtures.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import sys
import tarfile
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

FIXTURES = Path(__file__).parent / "fixtures"
STEPS, BATCH = 3, 6
BUFFERS = ("average", "seen")  # those that a state dict has
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 7}},
}
# name -> stage, ranks, precision, optimizer, and further config
Case = tuple[int, int, str, str, dict[str, Any]]
CASES: dict[str, Case] = {
    f"z{stage}-{ranks}-{precision}": (stage, ranks, precision, "adamw", {})
    for stage in (0, 1, 2, 3)
    for ranks in (1, 2)
    for precision in ("fp32", "bf16")
} | {
    "z1-3-fp32": (1, 3, "fp32", "adamw", {}),
    "z3-3-bf16": (3, 3, "bf16", "adamw", {}),
    "z2-2-fp16": (2, 2, "fp16", "adamw", {}),
    "z2-2-sgd": (2, 2, "fp32", "sgd", {}),
    "z0-2-sgd": (0, 2, "fp32", "sgd", {}),
    "z0-1-fused": (0, 1, "bf16", "fused", {}),
    "z0-2-fp16": (0, 2, "fp16", "fused", {}),
    "z2-2-fused": (2, 2, "bf16", "fused", {}),
    "z2-2-round": (2, 2, "bf16", "adamw", {"zero_optimization": {"round_robin_gradients": True}}),
    "z2-2-aligned": (2, 2, "bf16", "adamw", {"zero_optimization": {"parameter_alignment": True}}),
    # BF16_Optimizer, whose files have fewer keys than those of the ZeRO optimizers
    "z1-2-bf16-acc": (1, 2, "bf16", "adamw", {"data_types": {"grad_accum_dtype": "fp32"}}),
    # several flat groups for each param group
    "z3-2-sub": (3, 2, "fp32", "adamw", {"zero_optimization": {"sub_group_size": 300}}),
}
UNIVERSAL = ("z2-2-bf16", "z3-2-fp32")


class Tiny(nn.Module):
    """Odd sizes, a tied weight, a frozen matrix, a parameter of one element, and buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(23, 9)
        self.fixed = nn.Linear(9, 9, bias=False).requires_grad_(False)
        self.up = nn.Linear(9, 13)
        self.norm = nn.LayerNorm(13)
        self.down = nn.Linear(13, 9)
        self.gain = nn.Parameter(torch.tensor([1.5]))  # DeepSpeed 0.19.8 fails on one without dimensions
        self.head = nn.Linear(9, 23, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("average", torch.zeros(9))
        self.register_buffer("seen", torch.tensor(0))
        self.register_buffer("passing", torch.ones(3), persistent=False)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        hidden = self.fixed(self.embed(tokens))
        self.average.lerp_(hidden.detach().mean(0).to(self.average.dtype), 0.5)
        self.seen += len(tokens)
        hidden = self.gain * self.down(torch.relu(self.norm(self.up(hidden))))
        return nn.functional.cross_entropy(self.head(hidden).float(), targets)


def param_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Matrices with weight decay, the others without; the frozen matrix is in no group."""
    trained = [param for param in model.parameters() if param.requires_grad]
    return [
        {"params": [param for param in trained if param.dim() > 1], "weight_decay": 0.1},
        {"params": [param for param in trained if param.dim() < 2], "weight_decay": 0.0, "lr": 0.02},
    ]


def make_optimizer(kind: str, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    if kind == "fused":
        from deepspeed.ops.adam import FusedAdam

        return FusedAdam(groups, lr=0.01)
    if kind == "sgd":
        return torch.optim.SGD(groups, lr=0.01, momentum=0.9)
    return torch.optim.AdamW(groups, lr=0.01)


def config_of(case: Case) -> dict[str, Any]:
    stage, _, precision, _, more = case
    zero = {"stage": stage, **({"stage3_param_persistence_threshold": 20} if stage == 3 else {})}
    return {
        "train_micro_batch_size_per_gpu": BATCH,
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 5, "warmup_max_lr": 0.01}},
        "zero_allow_untested_optimizer": True,
        **PRECISIONS[precision],
        **more,
        "zero_optimization": {**zero, **more.get("zero_optimization", {})},
    }


def train(rank: int, name: str, port: int, home: str) -> None:
    """One rank: train, gather the truth, save."""
    case = CASES[name]
    ranks = case[1]
    where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in where.items()} | {"OMP_NUM_THREADS": "1"})
    import deepspeed

    # DeepSpeed asks whether fp16 is fast here; that it is slow does no harm.
    deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True
    torch.manual_seed(7)
    model = Tiny()
    optimizer = make_optimizer(case[3], param_groups(model))
    deepspeed.init_distributed("gloo")
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config_of(case))
    generator = torch.Generator().manual_seed(rank)
    for _ in range(STEPS):
        tokens, targets = torch.randint(0, 23, (2, BATCH), generator=generator)
        engine.backward(engine(tokens, targets))
        engine.step()
    gathered = truth(engine, case)
    client = {"epoch": 2, "history": [0.5, None, {"lr": 0.1}], "counts": torch.arange(4)}
    engine.save_checkpoint(home, tag="three", client_state=client)
    if rank == 0:
        torch.save(gathered, f"{home}/truth.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def truth(engine: Any, case: Case) -> dict[str, Any]:
    """Whole values and states by name; collective."""
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    keys = ("momentum_buffer",) if case[3] == "sgd" else ("exp_avg", "exp_avg_sq")
    if case[0] in (1, 2):
        if getattr(engine.optimizer, "round_robin_gradients", False):
            # DeepSpeed 0.19.8 heeds the other order only where parameters are padded.
            paddings = engine.optimizer.round_robin_bit16_padding
            engine.optimizer.round_robin_bit16_padding = [[1]] * len(paddings)
            engine.optimizer._link_all_hp_params()
            engine.optimizer.round_robin_bit16_padding = paddings
        # DeepSpeed 0.19.8 links every group's states when the first group has stepped, so it misses the second's.
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    values, states = {}, {}
    for name, param in engine.module.named_parameters():
        if not param.requires_grad:
            with GatheredParameters([param], enabled=case[0] == 3):
                values[name] = param.detach().clone()
        elif case[0] == 0:
            values[name], states[name] = replicated_truth(engine, param, keys)
        else:
            values[name] = safe_get_full_fp32_param(param).clone()
            states[name] = {key: safe_get_full_optimizer_state(param, key).clone() for key in keys}
    decayed = [name for name in states if values[name].dim() > 1]
    return {
        "values": values,
        "states": states,
        "buffers": {name: buffer.clone() for name, buffer in engine.module.state_dict().items() if name in BUFFERS},
        "groups": [decayed, [name for name in states if name not in decayed]],
        "samples": engine.global_samples,
        "scale": float(engine.optimizer.loss_scale) if case[2] == "fp16" else None,
    }


def replicated_truth(engine: Any, param: nn.Parameter, keys: tuple[str, ...]) -> tuple[Tensor, dict[str, Tensor]]:
    """Stage 0 has no function for it: what the optimizer holds of `param`."""
    wrapper = engine.optimizer
    if isinstance(wrapper, torch.optim.Optimizer):
        state = wrapper.state[param]
        return param.detach().clone(), {key: state[key].clone() for key in keys}
    for index, group in enumerate(wrapper.fp16_groups):
        at = next((place for place, each in enumerate(group) if each is param), None)
        if at is None:
            continue
        if not hasattr(wrapper, "fp32_groups_flat"):
            main = wrapper.fp32_groups[index][at]
            return main.detach().clone(), {key: wrapper.optimizer.state[main][key].clone() for key in keys}
        main, start = wrapper.fp32_groups_flat[index], sum(each.numel() for each in group[:at])
        flat = {"value": main.detach(), **{key: wrapper.optimizer.state[main][key] for key in keys}}
        whole = {key: each[start : start + param.numel()].view(param.shape).clone() for key, each in flat.items()}
        return whole.pop("value"), whole
    raise LookupError("a trained parameter in no group")


def make(name: str, home: Path) -> None:
    """The folder `name` in `home`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(train, (name, port, str(home / name)), nprocs=CASES[name][1])
    if name in UNIVERSAL:
        from deepspeed.checkpoint import ds_to_universal

        target = home / f"{name}-universal"
        arguments = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": False}
        paths = {"input_folder": str(home / name / "three"), "output_folder": str(target / "three")}
        ds_to_universal.main(SimpleNamespace(**paths, **arguments, inject_missing_state=True))
        shutil.copy(home / name / "truth.pt", target)
    for script in (home / name).glob("zero_to_*.py"):
        script.unlink()


def pack(home: Path, target: Path) -> None:
    """The folders of `home` as one archive, the same bytes for the same files."""

    def bare(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.mtime, member.uid, member.gid, member.uname, member.gname, member.mode = 0, 0, 0, "", "", 0o644
        if member.isdir():
            member.mode = 0o755
        return member

    with tarfile.open(target, "w:xz", preset=9) as archive:
        for folder in sorted(home.iterdir()):
            archive.add(folder, arcname=folder.name, filter=bare)


def main() -> None:
    """Make the cases named on the command line, or make and pack all."""
    if sys.argv[1:]:
        for name in sys.argv[1:]:
            make(name, Path("deepspeed-fixtures"))
        return
    with tempfile.TemporaryDirectory() as folder:
        for name in CASES:
            with contextlib.chdir(folder):
                make(name, Path(folder))
        pack(Path(folder), FIXTURES / "deepspeed.tar.xz")


if __name__ == "__main__":
    main()
