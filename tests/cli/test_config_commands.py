"""`zerolith config` explains configs on one screen and its own mistakes on one line."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from zerolith.cli import main
from zerolith.config import KEYS, Config, Fate, load_config

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "c.json"
    path.write_text(
        '{"train_batch_size": 16, "train_micro_batch_size_per_gpu": 4, "bf16": {"enabled": true},\n'
        ' "zero_optimization": {"stage": 2, "contiguous_gradients": true}, // comment\n}'
    )
    return path


def test_check_says_what_each_key_does(config_file, capsys):
    assert main(["config", "check", str(config_file), "--world-size", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "implemented  zero_optimization.stage = 2" in lines
    assert "derived      gradient_accumulation_steps = 2" in lines
    assert "default      gradient_clipping = 1.0" in lines
    assert "default      optimizer.type = null" in lines
    why = KEYS["zero_optimization.contiguous_gradients"].why
    assert f"hint         zero_optimization.contiguous_gradients: {why}" in lines


@pytest.mark.parametrize(
    ("text", "options", "words"),
    [
        ('{"zero_optimization": {"stagee": 2}}', [], "did you mean 'stage'?"),
        ('{"zero_optimization": ', [], "line 1 column"),
        ('{"train_batch_size": 3}', ["--world-size", "2"], "nearest fixes: train_batch_size 2"),
        ('{"train_batch_size": 3}', ["--world-size", "0"], "must be a positive integer"),
        ('{"optimizer": {"type": "AdamX"}}', [], "did you mean 'Adam"),
        ('{"optimizer": {"type": "Adam", "params": {"lrr": 1}}}', [], "did you mean 'lr'"),
        ('{"scheduler": {"type": "WarmupLR", "params": {"warmup_steps": 3}}}', [], "did you mean 'warmup_num_steps'"),
        (None, [], "no such file"),
    ],
)
def test_a_bad_file_is_one_line_on_stderr_and_status_2(text, options, words, tmp_path, capsys):
    path = tmp_path / "c.json"
    if text is not None:
        path.write_text(text)
    assert main(["config", "check", str(path), *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err
    assert err.count("\n") == 1


def test_the_schema_covers_every_key(capsys):
    assert main(["config", "schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    for path, key in KEYS.items():
        node = schema
        for name in path.split("."):
            assert node["additionalProperties"] is False
            node = node["properties"][name]
        assert key.why in node["description"]
        assert not {"gt", "ge", "lt", "le"} & set(node)
    assert "bfloat16" in schema["properties"]


def files(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.glob("config/*.md"))} | {
        "config.md": (folder / "config.md").read_text()
    }


def test_the_pages_of_keys_are_the_committed_ones(tmp_path):
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "gone.md").write_text("a section that is no more")
    subprocess.run([sys.executable, DOCS / "config_page.py", tmp_path], check=True, timeout=60)
    made = files(tmp_path)
    assert made == files(DOCS), "run `python docs/config_page.py`"
    for path, key in KEYS.items():
        section, _, name = path.partition(".")
        page = made[f"config/{section}.md" if name else "config/top_level.md"]
        assert any(f"| `{'.'.join(path.split('.')[from_:])}` |" in page for from_ in range(path.count(".") + 1)), path
        assert key.why in page.replace("\\", "")
    assert all(fate.value in made["config.md"] for fate in Fate)


def test_the_pages_show_defaults_that_load():
    shown = re.findall(r"```json\n(.*?)```", "".join(files(DOCS).values()), flags=re.DOTALL)
    assert len(shown) > 10
    for text in shown:
        assert load_config(json.loads(text)).model_dump() == Config().model_dump()


@pytest.mark.parametrize("arguments", [[], ["config"], ["config", "chekc"], ["config", "check"]])
def test_a_wrong_command_line_is_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert "usage: zerolith" in capsys.readouterr().err


def test_a_reader_that_stops_early_is_no_error():
    command = f"{sys.executable} -m zerolith.cli config schema | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert done.stderr == ""


def test_the_commands_import_no_torch():
    program = "import sys, zerolith.cli as cli; cli.main(['config', 'schema']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.DEVNULL, timeout=60)
    assert done.returncode == 0
