"""What importing costs and binds, and that optimised Python checks the same."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType
from typing import Any

import pytest

import plain  # noqa: F401  # it has torch import what the first optimizer needs
from harness import run_ranks

SELDOM_NEEDED = (
    "torch.distributed.checkpoint", "torch._dynamo", "triton", "tensorboard", "rich", "matplotlib",
    "zerolith.checkpoint.deepspeed",
)  # fmt: skip


def fresh_interpreter(source: str) -> str:
    """What it prints."""
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def without_zerolith(body: Callable[[], Any]) -> Any:
    """Run `body` in a process that has torch, which takes seconds to import, but has not seen zerolith yet."""

    def forget_it() -> Any:
        for name in [name for name in sys.modules if name.split(".")[0] == "zerolith"]:
            del sys.modules[name]
        return body()

    return run_ranks(1, forget_it)[0]


def test_importing_zerolith_alone_loads_neither_torch_nor_pydantic() -> None:
    source = "import sys, zerolith; print([name for name in ('torch', 'pydantic') if name in sys.modules])"
    assert fresh_interpreter(source) == "[]"


def test_no_public_name_loads_what_few_runs_need() -> None:
    source = f"""if True:
        import sys, zerolith
        for name in zerolith.__all__:
            getattr(zerolith, name)
        print([name for name in {SELDOM_NEEDED} if name in sys.modules])
    """
    assert fresh_interpreter(source) == "[]"


def test_no_json_schema_is_made_before_someone_asks_for_it() -> None:
    source = """if True:
        import pydantic, zerolith
        pydantic.BaseModel.model_json_schema = None
        zerolith.initialize
        from zerolith.config import load_config
        print(load_config({"train_batch_size": 2, "fp16": {"enabled": True}}).train_batch_size)
    """
    assert fresh_interpreter(source) == "2"


@pytest.mark.parametrize("kind", ["AdamW", "Adam", "SGD", "Adagrad", "Lion"])
def test_no_engine_imports_the_compiler_before_it_is_asked_to_compile(kind: str) -> None:
    """torch does, for 1.5 s, wherever an optimizer is made."""
    source = f"""if True:
        import sys, torch, zerolith
        model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
        config = {{"train_batch_size": 2, "optimizer": {{"type": {kind!r}, "params": {{"lr": 0.1}}}}}}
        engine, *_ = zerolith.initialize(model=model, config=config)
        engine.backward(engine(torch.ones(2, 4)).mean())
        engine.step()
        before = "torch._dynamo" in sys.modules
        torch.optim.SGD(model.parameters())
        print(before, "torch._dynamo" in sys.modules)
    """
    assert fresh_interpreter(source).splitlines()[-1] == "False True"


@pytest.mark.parametrize(
    "before",
    [
        "zerolith.add_config_arguments",
        "zerolith.Engine",
        "import zerolith.initialize",
        "from zerolith.initialize import add_config_arguments",
        "zerolith.initialize; import zerolith.initialize",
    ],
)
def test_initialize_is_the_function_whatever_was_imported_before(before: str) -> None:
    def body() -> str:
        names: dict[str, Any] = {}
        exec(f"import zerolith\n{before}\nkind = type(zerolith.initialize).__name__", names)
        return names["kind"]

    assert without_zerolith(body) == "function"


def test_config_arguments_of_a_script_lead_to_an_engine(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"train_batch_size": 4}')

    def body() -> int:
        import argparse

        import torch

        import zerolith

        parser = zerolith.add_config_arguments(argparse.ArgumentParser())
        args = parser.parse_args(["--deepspeed", "--deepspeed_config", str(path)])
        engine, *_ = zerolith.initialize(args=args, model=torch.nn.Linear(2, 2))
        return engine.train_batch_size()

    assert without_zerolith(body) == 4


def mistakes() -> list[str]:
    """What is said to users who make mistakes."""
    import torch
    from torch import nn

    import zerolith

    told = []

    def tell(call: Callable[[], Any]) -> None:
        with pytest.raises(Exception) as caught:  # noqa: PT011  # which one it is, is looked at later
            call()
        told.append(f"{type(caught.value).__name__} {caught.value}")

    def start(**kwargs: Any) -> Any:
        kwargs = {"model": nn.Linear(2, 2), "config": {"train_batch_size": 2}} | kwargs
        return zerolith.initialize(**kwargs)[0]

    sgd = {"optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
    tell(lambda: start(model=None))
    tell(lambda: start(config=None))
    tell(lambda: start(config_params={}))
    tell(lambda: start(config={"train_batch_size": 2, "zero_optimization": {"stage": 4}}))
    tell(lambda: start(config={"train_batch_size": 2, "zero_optimization": {"stage": 2}}))
    tell(lambda: start(optimizer=3))
    tell(lambda: start(optimizer=torch.optim.SGD(nn.Linear(2, 2).parameters())))
    tell(lambda: start(optimizer=lambda params: torch.optim.LBFGS(params)))
    tell(lambda: start(training_data=[]))
    tell(lambda: start(lr_scheduler=lambda optimizer: None))
    engine = start(config={"train_batch_size": 2, **sgd})
    tell(engine.step)
    tell(lambda: engine.backward(torch.ones(3)))
    tell(lambda: engine.backward(torch.ones(())))
    tell(engine.basic_optimizer.step)
    tell(lambda: start(model=engine.module))
    engine.destroy()
    tell(engine.step)
    return told


def optimised(body: Callable[[], Any]) -> Callable[[], Any]:
    """As `python -O` runs zerolith: its sources compiled without asserts."""

    def get_code(loader: Any, name: str, usual: Any = SourceFileLoader.get_code) -> CodeType:
        if not name.startswith("zerolith"):
            return usual(loader, name)
        path = loader.get_filename(name)
        return compile(loader.get_data(path), path, "exec", optimize=1)

    def run() -> Any:
        SourceFileLoader.get_code = get_code  # this process ends with the test
        return body()

    return run


def test_optimised_python_finds_the_same_mistakes() -> None:
    told = without_zerolith(mistakes)
    assert without_zerolith(optimised(mistakes)) == told
    for line in told:
        assert line.split(" ")[0] in ("UsageError", "ConfigError", "OptimizerError"), line
        assert "\n" not in line
