"""What is sharded, how many bytes each rank keeps, and what a step will send."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from itertools import groupby

from zerolith.member import Granularity
from zerolith.optim import PartitionedOptimizer
from zerolith.partitioning import REPLICATE, SHARD
from zerolith.section import Section
from zerolith.sharded_model import ShardedModel
from zerolith.unit import Until

# Numbers that an optimizer keeps per element; 1 where none is given.
STATES = {"Adam": 2, "AdamW": 2, "NAdam": 2, "RAdam": 2, "Adamax": 2, "Adadelta": 2, "Lamb": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The start-up summary; `str()` is for people."""

    headline: str
    units: tuple[tuple[str, int, int], ...]  # name, parameters, elements of each unit
    bytes_per_rank: dict[str, int]  # at rest: parameters, gradients, optimizer (masters and states)
    wire_bytes_per_step: dict[str, int]  # sent by each rank in one optimizer step, by collective

    def __str__(self) -> str:
        lines = [self.headline, "", f"  {'unit':<40} {'params':>7} {'elements':>14}"]
        lines += [f"  {name:<40} {count:>7,} {numel:>14,}" for name, count, numel in _folded(self.units)]
        lines += ["", "  bytes per rank at rest: " + _listed(self.bytes_per_rank)]
        lines += ["  sent per rank and step: " + _listed(self.wire_bytes_per_step)]
        return "\n".join(lines)


def summarize(sharded: ShardedModel, optimizer: PartitionedOptimizer | None, *, steps: int) -> Summary:
    """Count from the buffers themselves; `steps` micro-batches make one optimizer step. Does not communicate."""
    plan, comm = sharded.plan, sharded.comm
    numel = sum(member.param.numel() for section in sharded.sections for member in section.members)
    kind = type(optimizer.inner).__name__ if optimizer is not None else "no optimizer"
    passing = {own.section for own in sharded.gradients if optimizer and steps == 1 and optimizer.ahead.frees(own)}
    return Summary(
        headline=f"zerolith: {numel:,} parameters in {len(sharded.units)} units on {comm.size} ranks "
        f"({comm.backend}, {comm.device.type}), {plan.partitioning}, {kind}{_offloaded(sharded, optimizer)}",
        units=tuple(
            (unit.name, sum(len(section.members) for section in unit.sections), unit.numel) for unit in sharded.units
        ),
        bytes_per_rank=_bytes_at_rest(sharded, kind, passing),
        wire_bytes_per_step=_wire_bytes(sharded, steps),
    )


def _offloaded(sharded: ShardedModel, optimizer: PartitionedOptimizer | None) -> str:
    where, trained = "", [section for section in sharded.sections if section.trained]
    if optimizer is not None and any(section.master_device is not None for section in trained):
        is_on_disk = optimizer.split_masters is None and optimizer.residency.is_swapped
        place = optimizer.residency.place if is_on_disk else "in host memory"
        where = f", {_share(sharded)}masters and states {place}"
    if optimizer is not None and any(section.is_split for section in trained):
        where += f", {'other ' if where else ''}masters {optimizer.residency.place}"
    return where + (f", weights {sharded.residency.place}" if sharded.residency.is_swapped else "")


def _share(sharded: ShardedModel) -> str:
    """How many of the masters are offloaded, unless all are."""
    numels = {
        section: sum(member.param.numel() for member in section.members)
        for section in sharded.sections
        if section.trained
    }
    offloaded = sum(numel for section, numel in numels.items() if section.is_offloaded)
    return "" if offloaded == sum(numels.values()) else f"{offloaded / sum(numels.values()):.0%} of "


def _bytes_at_rest(sharded: ShardedModel, kind: str, passing: Set[Section]) -> dict[str, int]:
    """passing: sections whose gradients never rest, for they are used in backward."""
    counts = dict.fromkeys(("parameters", "gradients", "optimizer"), 0)
    for section in sharded.sections:
        counts["parameters"] += section.weights.data.nbytes
        if section.grads is None:
            continue
        counts["gradients"] += section.grads.data.nbytes if section not in passing else 0
        masters = list(section.masters.values()) if section.main is None else [section.main.data]
        lies_apart = section.main is None or not section.main.shares_memory_with(section.weights)
        is_aux = kind == "Muon" and section.granularity is Granularity.ELEMENT  # which AdamW steps
        states = STATES["AdamW"] if is_aux else STATES.get(kind, 1)
        of_master = 0.5 if section.is_split else float(lies_apart)
        counts["optimizer"] += int((states + of_master) * sum(master.nbytes for master in masters))
    return counts


def _wire_bytes(sharded: ShardedModel, steps: int) -> dict[str, int]:
    partitioning, size = sharded.plan.partitioning, sharded.comm.size
    gather = scatter = 0
    for unit in sharded.units:
        stays = unit.until is Until.BACKWARD or unit is sharded.units[-1]  # the last one does for backward, too
        passes = 1 if unit.until is Until.STEP else steps if stays else 2 * steps
        for section in unit.sections:
            gathers = passes if partitioning.params is SHARD else 0
            if section.grads is not None:
                dtype = sharded.plan.precision.reduce_dtype(section.members[0].param.dtype)
                scatter += section.layout.numel * dtype.itemsize * (1 if partitioning.rests_partial else steps)
                gathers += int(partitioning.shards_states_only)  # publish() makes the weights whole
                if partitioning.optim is REPLICATE:
                    gather += section.grads.data.nbytes
            gather += gathers * section.layout.numel * section.weights.data.element_size()
    return {name: total * (size - 1) // size for name, total in (("all_gather", gather), ("reduce_scatter", scatter))}


def _folded(units: tuple[tuple[str, int, int], ...]) -> list[tuple[str, int, int]]:
    """Neighbouring units that differ only in their number, as one line."""
    rows = []
    for (stem, *sizes), run in groupby(units, key=lambda unit: (unit[0].rsplit(".", 1)[0], *unit[1:])):
        alike = list(run)
        rows.append((f"{stem}.* ({len(alike)} alike)", *sizes) if len(alike) > 1 else alike[0])
    return rows


def _listed(amounts: dict[str, int]) -> str:
    return ", ".join(f"{name} {_human(amount)}" for name, amount in amounts.items())


def _human(amount: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if amount < 1024:
            return f"{amount:.4g} {unit}"
        amount /= 1024
    return f"{amount:.4g} GiB"
