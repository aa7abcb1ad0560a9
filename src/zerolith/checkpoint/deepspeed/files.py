"""Which files a checkpoint of DeepSpeed has: names and ranks. Opens none but `latest`.

<folder>/latest                                             the newest tag
<folder>/<tag>/mp_rank_00_model_states.pt                   stages 0 to 2
<folder>/<tag>/zero_pp_rank_<rank>_mp_rank_00_model_states.pt          stage 3
<folder>/<tag>/[bf16_|fp16_]zero_pp_rank_<rank>_mp_rank_00_optim_states.pt    stages 1 to 3
<folder>/<tag>/zero/<parameter>/{fp32,exp_avg,...}.pt       universal
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from zerolith.checkpoint.deepspeed.archive import opened
from zerolith.checkpoint.folder import check_tag
from zerolith.errors import CheckpointDamagedError, CheckpointError

LATEST = ("latest", "latest_universal")
WEIGHTS = re.compile(r"mp_rank_(?P<mp>\d+)_model_states\.pt")
WEIGHTS_3 = re.compile(r"zero_pp_rank_(?P<rank>\d+)_mp_rank_(?P<mp>\d+)_model_states\.pt")
OPTIMIZER = re.compile(r"(?P<prefix>bf16_|fp16_|)zero_pp_rank_(?P<rank>\d+)_mp_rank_(?P<mp>\d+)_?optim_states\.pt")
REFUSED = (
    (re.compile(r"layer_.*expert_.*|expert_.*|expp_rank_.*"), "experts that are split over ranks (mixture of experts)"),
    (re.compile(r"layer_.*model_states\.pt"), "the layers of a pipeline"),
)
UNIVERSAL = "zero"  # the folder with a folder for each parameter


@dataclass(frozen=True, kw_only=True)
class CheckpointFiles:
    """The files of one tag, by rank."""

    home: Path
    weights: tuple[Path, ...]  # one, but in stage 3
    optimizer: tuple[Path, ...]  # none in stage 0 and in universal checkpoints
    universal: Path | None


def find_home(folder: Path, tag: str | None) -> Path:
    """The folder of `tag`; without one, that of `latest`, or `folder` itself if the files lie there.

    Raises CheckpointError.
    """
    if tag is not None:
        return folder / check_tag(tag)
    if _names(folder, pattern="*_model_states.pt"):
        return folder
    for name in LATEST:
        if (folder / name).is_file():
            with opened(folder / name) as file:
                text = os.pread(file, 4096, 0).decode(errors="replace").strip()
            return folder / check_tag(text)
    raise CheckpointError(f"{folder}: there is no checkpoint of DeepSpeed, and no file 'latest' that names one")


def find_files(home: Path) -> CheckpointFiles:
    """The files of a checkpoint. Raises CheckpointError for kinds that cannot be read, and for a missing file."""
    names = _names(home)
    if not names:
        raise CheckpointError(f"{home}: there is no such folder, or nothing in it")
    for pattern, what in REFUSED:
        if found := [name for name in names if pattern.fullmatch(name)]:
            raise CheckpointError(f"{home / found[0]}: this checkpoint holds {what}, which cannot be read")
    universal = home / UNIVERSAL if (home / UNIVERSAL).is_dir() else None
    flat, by_rank = _ranks(home, names, WEIGHTS), _ranks(home, names, WEIGHTS_3)
    if flat and by_rank:
        raise CheckpointError(f"{home}: files of two checkpoints lie here, {flat[0].name} and {by_rank[0].name}")
    if not flat and not by_rank:
        raise CheckpointDamagedError(f"{home}: the file mp_rank_00_model_states.pt is missing")
    return CheckpointFiles(
        home=home,
        weights=flat or by_rank,
        optimizer=() if universal else _ranks(home, names, OPTIMIZER),
        universal=universal,
    )


def _ranks(home: Path, names: Sequence[str], pattern: re.Pattern[str]) -> tuple[Path, ...]:
    """The files of one kind by rank, which must be all of 0, 1, ..."""
    found: dict[int, Path] = {}
    for name in names:
        match = pattern.fullmatch(name)
        if match is None:
            continue
        if int(match["mp"]):
            raise CheckpointError(
                f"{home / name}: this checkpoint is split over tensor- or pipeline-parallel ranks, which cannot be read"
            )
        rank = int(match.groupdict().get("rank") or 0)
        if rank in found:
            raise CheckpointError(f"{home}: files of two checkpoints lie here, {found[rank].name} and {name}")
        found[rank] = home / name
    for rank in range(len(found)):
        if rank not in found:
            example = next(iter(found.values()))
            missing = re.sub(r"zero_pp_rank_\d+", f"zero_pp_rank_{rank}", example.name)
            raise CheckpointDamagedError(f"{home / missing}: it is missing, and {max(found) + 1} ranks have saved")
    return tuple(found[rank] for rank in range(len(found)))


def _names(folder: Path, *, pattern: str = "*") -> list[str]:
    """Names in a folder; none if there is no such folder."""
    try:
        return sorted(path.name for path in folder.glob(pattern))
    except OSError as error:
        raise CheckpointError(f"{folder}: it cannot be listed ({error})") from error
