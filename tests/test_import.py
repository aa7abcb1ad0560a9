"""What importing costs and binds, and that optimised Python checks the same."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from subprocess import PIPE

TUTORIAL_ARGUMENTS = """
import argparse, torch, zerolith
parser = zerolith.add_config_arguments(argparse.ArgumentParser())
args = parser.parse_args(["--deepspeed", "--deepspeed_config", "{path}"])
engine, *_ = zerolith.initialize(args=args, model=torch.nn.Linear(2, 2))
print(engine.train_batch_size())
"""


def python(*sources: str, flags: tuple[str, ...] = ()) -> list[str]:
    """What fresh interpreters, at work side by side, print for each source."""
    started = [
        subprocess.Popen([sys.executable, *flags, "-c", source], stdout=PIPE, stderr=PIPE, text=True)
        for source in sources
    ]
    printed = []
    for process in started:
        out, err = process.communicate(timeout=100)
        assert process.returncode == 0, err
        printed.append(out.strip())
    return printed


def test_importing_zerolith_alone_loads_neither_torch_nor_pydantic() -> None:
    source = "import sys, zerolith; print([name for name in ('torch', 'pydantic') if name in sys.modules])"
    assert python(source) == ["[]"]


def test_no_public_name_needs_distributed_checkpoints() -> None:
    source = (
        "import sys, zerolith\n"
        "for name in zerolith.__all__: getattr(zerolith, name)\n"
        "print('torch.distributed.checkpoint' in sys.modules)"
    )
    assert python(source) == ["False"]


BEFORE = """
import sys
for before in [
    "pass",
    "zerolith.add_config_arguments",
    "import zerolith.initialize",
    "from zerolith.initialize import add_config_arguments",
    "from zerolith.engine import Engine",
    "zerolith.initialize; import zerolith.initialize",
]:
    for name in [name for name in sys.modules if name.split(".")[0] == "zerolith"]:
        del sys.modules[name]
    import zerolith
    exec(before)
    print(type(zerolith.initialize).__name__)
"""


def test_initialize_is_the_function_whatever_was_imported_before() -> None:
    (printed,) = python(BEFORE)
    assert printed.splitlines() == ["function"] * 6


def test_config_arguments_of_a_script_lead_to_an_engine(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"train_batch_size": 4}')
    assert python(TUTORIAL_ARGUMENTS.format(path=path)) == ["4"]


MISTAKES = """
import torch, zerolith
from torch import nn

def tell(call):
    try:
        call()
        print("nothing was said")
    except Exception as error:
        print(type(error).__name__, error)

def start(**kwargs):
    kwargs = {"model": nn.Linear(2, 2), "config": {"train_batch_size": 2}} | kwargs
    return zerolith.initialize(**kwargs)[0]

sgd = {"optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
tell(lambda: start(model=None))
tell(lambda: start(config=None))
tell(lambda: start(config={"train_batch_size": 2, "zero_optimization": {"stage": 4}}))
tell(lambda: start(config={"train_batch_size": 2, "zero_optimization": {"stage": 2}}))
tell(lambda: start(optimizer=3))
tell(lambda: start(optimizer=torch.optim.SGD(nn.Linear(2, 2).parameters())))
tell(lambda: start(optimizer=lambda params: torch.optim.LBFGS(params)))
tell(lambda: start(training_data=[]))
engine = start(config={"train_batch_size": 2, **sgd})
tell(engine.step)
tell(lambda: engine.backward(torch.ones(3)))
tell(lambda: engine.backward(torch.ones(())))
tell(engine.basic_optimizer.step)
tell(lambda: start(model=engine.module))
engine.destroy()
tell(engine.step)
"""


def test_optimised_python_finds_the_same_mistakes() -> None:
    (plain,), (optimised,) = python(MISTAKES), python(MISTAKES, flags=("-O",))
    assert plain == optimised
    assert len(plain.splitlines()) == 14
    assert "nothing was said" not in plain
    for line in plain.splitlines():
        assert line.split(" ")[0] in ("UsageError", "ConfigError", "OptimizerError"), line
