"""`zerolith checkpoint`: look at checkpoints, check them, take them elsewhere, bring them in, remove old ones."""

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from zerolith.cli.words import at_least_one, many, size, size_text
from zerolith.errors import CheckpointError

if TYPE_CHECKING:
    from zerolith.checkpoint.progress import Tell

# What is imported in functions here loads torch, which other commands need not wait for.

DAMAGED = 2  # exit status


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `checkpoint` and its subcommands."""
    checkpoint = commands.add_parser("checkpoint", help="look at, check, export, import and remove checkpoints")
    subcommands = checkpoint.add_subparsers(metavar="SUBCOMMAND", required=True)
    for add in (_add_info, _add_verify, _add_export, _add_import, _add_prune):
        add(subcommands)


def _add_info(subcommands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    info = subcommands.add_parser("info", help="list the checkpoints of a folder, or what is in one")
    _add_folder(info, tag="say what is in this one")
    info.add_argument("--json", action="store_true", help="for programs")
    info.set_defaults(run=_info)


def _add_verify(subcommands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    verify = subcommands.add_parser("verify", help="read every byte and list what is damaged; status 2 if anything is")
    which = _add_folder(verify, tag="this one; by default what `latest` names")
    which.add_argument("--all", action="store_true", help="all checkpoints of the folder")
    verify.set_defaults(run=_verify)


def _add_export(subcommands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    export = subcommands.add_parser("export", help="write the weights as safetensors, as Hugging Face has them")
    _add_folder(export, tag="this one; by default what `latest` names")
    export.add_argument("target", metavar="TARGET", type=Path, help="folder for the files; made if need be")
    export.add_argument(
        "--dtype",
        choices=("bf16", "fp16", "fp32", "saved"),
        default="bf16",
        help="of floating tensors; saved: bit for bit as in the checkpoint (%(default)s)",
    )
    export.add_argument("--max-shard-size", type=size, default="5GB", metavar="SIZE", help="of one file (%(default)s)")
    export.add_argument("--exclude-frozen", action="store_true", help="leave out parameters that no optimizer had")
    export.add_argument("--overwrite", action="store_true", help="replace the model in a folder that is not empty")
    export.set_defaults(run=_export)


def _add_import(subcommands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    imports = subcommands.add_parser("import", help="bring in a checkpoint that DeepSpeed wrote")
    imports.add_argument("source", metavar="DIR", type=Path, help="DeepSpeed's folder, or one of its checkpoints")
    imports.add_argument("target", metavar="TARGET", type=Path, help="where a job of zerolith keeps its checkpoints")
    imports.add_argument("--tag", metavar="TAG", help="this one; by default what DeepSpeed's `latest` names")
    imports.add_argument("--new-tag", metavar="TAG", help="what to call it; by default as DeepSpeed did")
    imports.set_defaults(run=_import)


def _add_prune(subcommands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    prune = subcommands.add_parser("prune", help="remove old checkpoints, and what saves that died have left")
    prune.add_argument("folder", metavar="DIR", type=Path, help="where a job keeps its checkpoints")
    prune.add_argument("--keep-last", type=at_least_one, metavar="N", required=True, help="keep so many of the newest")
    prune.add_argument("--keep-every", type=at_least_one, metavar="K", help="and those of steps that K divides")
    prune.add_argument("--dry-run", action="store_true", help="say what would go, and remove nothing")
    prune.set_defaults(run=_prune)


def _add_folder(command: argparse.ArgumentParser, *, tag: str) -> "argparse._MutuallyExclusiveGroup":
    """DIR and --tag; returns the group in which only one option may be given."""
    command.add_argument("folder", metavar="DIR", type=Path, help="where a job keeps its checkpoints, or one of them")
    which = command.add_mutually_exclusive_group()
    which.add_argument("--tag", metavar="TAG", help=tag)
    return which


def _info(arguments: argparse.Namespace) -> int:
    from zerolith.checkpoint.catalog import choose, is_checkpoint
    from zerolith.cli.checkpoint_info import checkpoint_text, describe_checkpoint, describe_folder, folder_text

    if arguments.tag is None and not is_checkpoint(arguments.folder):
        described, text = describe_folder(arguments.folder), folder_text
    else:
        described, text = describe_checkpoint(choose(arguments.folder, arguments.tag)), checkpoint_text
    _say(json.dumps(described, indent=2) if arguments.json else text(described))
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from zerolith.checkpoint.catalog import State, catalog, choose, latest_problem

    if not arguments.all:
        return 0 if _verified(choose(arguments.folder, arguments.tag)) else DAMAGED
    entries = catalog(arguments.folder)
    finished = [each for each in entries if each.state is not State.UNFINISHED]
    for each in entries:
        if each not in finished:
            _say(f"{each.tag}: unfinished, {size_text(each.nbytes)}: of a save that is under way, or that died")
    if not finished:
        raise CheckpointError(f"{arguments.folder}: there is no checkpoint here")
    results = [_verified(arguments.folder / each.tag) for each in finished]
    _say(f"{sum(results)} of {many(len(results), 'checkpoint')} whole")
    problem = latest_problem(arguments.folder)
    if problem:
        _say(problem)
    return 0 if all(results) and not problem else DAMAGED


def _verified(home: Path) -> bool:
    """Read all of a checkpoint and say what is found; whether nothing is wrong."""
    from zerolith.checkpoint.manifest import read_manifest
    from zerolith.checkpoint.verify import damages

    name = home.absolute().name
    try:
        nbytes = sum(file.bytes for file in read_manifest(home).files)
        with _bar(name) as tell:
            found = [str(damage) for damage in damages(home, tell=tell)]
    except CheckpointError as error:
        nbytes, found = 0, [str(error)]
    outcome = f"damaged in {many(len(found), 'place')}" if found else f"whole, {size_text(nbytes)}"
    _say(f"{name}: {outcome}")
    for line in found:
        _say(f"  {line}")
    return not found


def _export(arguments: argparse.Namespace) -> int:
    from zerolith.checkpoint import export

    with _bar("exporting") as tell:
        written = export(
            arguments.folder,
            arguments.target,
            arguments.tag,
            dtype=arguments.dtype,
            max_shard_bytes=arguments.max_shard_size,
            exclude_frozen_parameters=arguments.exclude_frozen,
            overwrite=arguments.overwrite,
            tell=tell,
        )
    for path in written:
        _say(f"{size_text(path.stat().st_size):>8}  {path}")
    return 0


def _import(arguments: argparse.Namespace) -> int:
    from zerolith.checkpoint import import_deepspeed

    with _bar("importing") as tell:
        home = import_deepspeed(arguments.source, arguments.target, arguments.tag, new_tag=arguments.new_tag, tell=tell)
    _say(str(home))
    return 0


def _prune(arguments: argparse.Namespace) -> int:
    from zerolith.checkpoint.cleanup import clean_up, going
    from zerolith.checkpoint.folder import Kept

    kept = Kept(arguments.keep_last, arguments.keep_every)
    gone = (going if arguments.dry_run else clean_up)(arguments.folder, kept)
    for tag, nbytes in gone.tags.items():
        _say(f"{size_text(nbytes):>8}  {tag}")
    for path, nbytes in gone.left_overs.items():
        _say(f"{size_text(nbytes):>8}  {path.relative_to(arguments.folder)} (of an unfinished save)")
    for tag, why in gone.spared.items():
        _say(f"   stays  {tag}: {why}")
    nbytes = sum(gone.tags.values()) + sum(gone.left_overs.values())
    _say(f"{size_text(nbytes)} {'would be' if arguments.dry_run else 'were'} freed")
    return 0


@contextmanager
def _bar(what: str) -> "Iterator[Tell]":
    """A bar on stderr if that is a terminal; yields what it has to be told."""
    from tqdm import tqdm

    with tqdm(desc=what, unit="B", unit_scale=True, leave=False, disable=not sys.stderr.isatty()) as bar:

        def tell(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield tell


def _say(text: str) -> None:
    """Print lines; what a file or a manifest may have smuggled in for the terminal is shown as an escape."""
    for line in text.splitlines():
        print("".join(char if char.isprintable() else ascii(char)[1:-1] for char in line))
