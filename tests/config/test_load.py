"""Any source becomes a Config or one ConfigError that says what, where and what to do."""

import base64
import json
import math
import os
import pickle
import subprocess
import sys
import time

import pytest
from hypothesis import example, given, settings, strategies as st
from pydantic import ValidationError

from zerolith.config import KEYS, Config, Fate, load_config
from zerolith.errors import ConfigError


def message(source, **options):
    with pytest.raises(ConfigError) as error:
        load_config(source, **options)
    text = str(error.value)
    assert len(text.splitlines()) == 1
    assert error.value.__cause__ is None
    return text


def outcome(source, **options):
    """The text of the ConfigError, or nothing where the source loads."""
    try:
        load_config(source, **options)
    except ConfigError as error:
        return str(error)
    return ""


def base64_of(config):
    return base64.urlsafe_b64encode(json.dumps(config).encode()).decode()


def test_an_empty_config_has_the_documented_defaults():
    config = load_config({})
    assert config.gradient_clipping == 1.0
    assert config.train_batch_size is None
    assert config.fp16.initial_scale_power == 16
    assert config.zero_optimization.stage == 0
    assert config.zero_optimization.reduce_bucket_size == 500_000_000
    assert config.zero_optimization.stage3_prefetch_bucket_size == 50_000_000
    assert not config.reproducible
    assert config.fingerprint_interval == 1


def test_dict_file_and_base64_read_the_same(tmp_path):
    raw = {"train_batch_size": 8, "zero_optimization": {"stage": 3, "reduce_bucket_size": 5e6}}
    path = tmp_path / "ds_config.json"
    path.write_text(json.dumps(raw))
    configs = [load_config(source) for source in (raw, path, str(path), base64_of(raw))]
    assert all(config == configs[1] or config.raw == raw for config in configs)
    assert {config.zero_optimization.reduce_bucket_size for config in configs} == {5_000_000}
    assert configs[0].raw is raw


def test_a_config_is_frozen_and_pickles():
    config = load_config({"log_level": "info", "optimizer": {"type": "AdamW", "params": {"lr": 0.1}}})
    with pytest.raises(ValidationError):
        config.reproducible = True
    assert pickle.loads(pickle.dumps(config)) == config


ACCEPTED = [
    ({"zero_optimization": True}, lambda c: c.zero_optimization.stage == 1),
    ({"zero_optimization": False}, lambda c: c.zero_optimization.stage == 0),
    ({"steps_per_print": math.inf}, lambda c: c.steps_per_print is None),
    ({"gradient_clipping": 0}, lambda c: c.gradient_clipping == 0),
    ({"bfloat16": {"enabled": True}}, lambda c: c.bf16.enabled),
    ({"zero_optimization": {"leaf_module": {"names": ["a.b"]}}},
     lambda c: c.zero_optimization.leaf_module.names == ("a.b",)),
    ({"zero_optimization": {"stage3_gather_fp16_weights_on_model_save": True}},
     lambda c: c.zero_optimization.stage3_gather_16bit_weights_on_model_save),
    ({"zerolith": {"unit_classes": ["Block"]}}, lambda c: c.zerolith.unit_classes == ("Block",)),
    ({"optimizer": {"type": "SGD", "params": {"lr": 1}}}, lambda c: c.optimizer.params == {"lr": 1}),
    ({"scheduler": None, "fp16": None}, lambda c: c.scheduler is None and not c.fp16.enabled),
]  # fmt: skip


@pytest.mark.parametrize(("raw", "holds"), ACCEPTED, ids=[str(raw) for raw, _ in ACCEPTED])
def test_accepted(raw, holds):
    assert holds(load_config(raw))


REFUSED = [
    ({"zero_optimization": {"stagee": 2}}, "zero_optimization.stagee is not a known key of"),
    ({"zero_optimization": {"stagee": 2}}, "did you mean 'stage'?"),
    ({"zero_optimisation": {}}, "did you mean 'zero_optimization'?"),
    ({"bfloat61": {}}, "did you mean 'bfloat16'?"),
    ({"stage": 2}, "it belongs at 'zero_optimization.stage'"),
    ({"reduce_bucket_sise": 2}, "did you mean 'zero_optimization.reduce_bucket_size'?"),
    ({"optimizer": {"type": "Adam", "lr": 1}}, "it belongs at 'optimizer.params.lr'"),
    ({"qwertz": 1}, "qwertz is not a known key; remove it"),
    ({"fp16.enabledd": 1}, "fp16.enabledd is not a known key"),
    ({"seed": 1}, "seed is not a known key"),
    ({"": 1}, "'' is not a known key"),
    ({"a\nb": 1}, r"'a\nb' is not a known key"),
    ({1: 2}, "1 is a key of type int; keys are strings"),
    ({"train_batch_size": True}, "train_batch_size must be a valid integer, not True"),
    ({"train_batch_size": 8.0}, "must be a valid integer, not 8.0"),
    ({"train_batch_size": "8"}, "must be a valid integer, not '8'"),
    ({"train_batch_size": 0}, "must be greater than 0, not 0"),
    ({"train_batch_size": 10**5000}, "not an integer of 16610 bits"),
    ({"gradient_clipping": -1}, "must be greater than or equal to 0, not -1"),
    ({"gradient_clipping": 10**400}, "gradient_clipping must be"),
    ({"gradient_clipping": math.nan}, "gradient_clipping is nan; give a finite number"),
    ({"optimizer": {"type": "A", "params": {"lr": math.inf}}}, "optimizer.params.lr is inf"),
    ({"steps_per_print": -math.inf}, "steps_per_print is -inf"),
    ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage must be less than or equal to 3, not 4"),
    ({"zero_optimization": {"stage": True}}, "stage must be a valid integer, not True"),
    ({"zero_optimization": {"stage": 2.0}}, "stage must be a valid integer, not 2.0"),
    ({"zero_optimization": {"reduce_bucket_size": 0}}, "must be greater than 0, not 0"),
    ({"zero_optimization": {"reduce_bucket_size": 5.5}}, "must be a valid integer, not 5.5"),
    ({"zero_optimization": {"stage3_prefetch_bucket_size": -1}}, "must be greater than or equal to 0"),
    ({"zero_optimization": {"overlap_comm": 1}}, "overlap_comm must be a valid boolean, not 1"),
    ({"zero_optimization": 2}, "zero_optimization must be an object with keys such as 'stage', not 2"),
    ({"zero_optimization": {"leaf_module": {"names": [1]}}}, "leaf_module.names.0 must be a valid string"),
    ({"fp16": {"enabled": 1}}, "fp16.enabled must be a valid boolean, not 1"),
    ({"fp16": {"min_loss_scale": 0}}, "fp16.min_loss_scale must be greater than 0"),
    ({"communication_data_type": "fp8"}, "must be 'fp16', 'bf16' or 'fp32', not 'fp8'"),
    ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, "fp16.enabled and bf16.enabled are"),
    ({"bf16": {"enabled": True}, "torch_autocast": {"enabled": True}}, "bf16.enabled and torch_autocast"),
    ({"bf16": {}, "bfloat16": {}}, "bfloat16 is another name of 'bf16', which is set too; keep one"),
    ({"optimizer": {"params": {}}}, "optimizer.type is required"),
    ({"optimizer": {"type": "Adam", "params": []}}, "must be a valid dictionary, not a list"),
    ({"optimizer": {"type": "Adam", "params": {"max_grad_norm": 1}}}, "move its value to gradient_clipping"),
]  # fmt: skip


@pytest.mark.parametrize(("raw", "text"), REFUSED, ids=[text for _, text in REFUSED])
def test_refused(raw, text):
    assert text in message(raw)


def test_five_problems_are_listed_and_the_rest_counted():
    text = message({f"unknown_{i}": i for i in range(7)} | {"train_batch_size": -1})
    assert text.count("is not a known key") == 5
    assert text.endswith("; and 3 more problems")


AUTO = {
    "train_batch_size": "auto",
    "fp16": "auto",
    "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto", "contiguous_gradients": "auto"},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "eps": 1e-8}},
    "scheduler": {"type": "auto", "params": {"warmup_num_steps": "auto"}},
    "tensor_parallel": {"autotp_size": "auto"},
}


def test_auto_left_over_is_an_error_that_names_each_key():
    text = message(AUTO)
    assert "train_batch_size is still 'auto'" in text
    assert "zero_optimization.reduce_bucket_size is still 'auto'" in text
    assert "optimizer.params.lr is still 'auto'" in message({"optimizer": AUTO["optimizer"]})


def test_auto_means_the_default_where_allowed():
    config = load_config(AUTO, allow_auto=True)
    assert config.zero_optimization.reduce_bucket_size == 500_000_000
    assert config.optimizer.params == {"eps": 1e-8}
    assert config.scheduler is None


def test_comments_and_trailing_commas_are_read(tmp_path):
    path = tmp_path / "c.json"
    path.write_text('{ // one\n "log_level": "http://x/*y*/,}#", /* two\n */ "fp16": {"enabled": true,},\n# three\n}')
    config = load_config(path)
    assert config.fp16.enabled
    assert config.raw["log_level"] == "http://x/*y*/,}#"


FILES = [
    (b"", "line 1 column 1: Expecting value"),
    (b"[1]", "holds a list; a config is a JSON object"),
    (b'{\n "a": 1\n "b": 2}', "line 3 column 2: Expecting ',' delimiter"),
    (b'{ /* x */ \n "a": 1 "b": 2}', "line 2 column 9: Expecting ',' delimiter"),
    (b'{"a":\n "\xff"}', "line 2 column 3 is not UTF-8"),
    (
        b'{"fp16": {"enabled": true, "enabled": false}}',
        "fp16.enabled is written twice in one object; keep one",
    ),
    (b'{"gradient_clipping": NaN}', "gradient_clipping is nan"),
    (b'{"gradient_clipping": 1e999}', "gradient_clipping is inf"),
    (b'{"a": ' + b"9" * 5000 + b"}", "too long to read"),
    (b" " * (1 << 20) + b"{}", "is larger than 1048576 bytes"),
    (b"[" * 1_000_000, "is nested deeper than 64 levels"),
    (b'{"a":' * 100 + b"1" + b"}" * 100, "is nested deeper than 64 levels"),
    (b"/*" * 500_000, "Expecting value"),
    (b'"\\"' * 300_000 + b"\\", "line 1 column"),
    (b"," + b" " * 1_000_000, "Expecting value"),
    (b"{" + b'"a":1,' * 170_000 + b"}", "a is written twice"),
    (b'{"inference": {"a": [' + b"1," * 500_000 + b"1]}}", "holds more than 250000 values"),
]


@pytest.mark.parametrize(("data", "text"), FILES, ids=[text for _, text in FILES])
def test_a_bad_file_is_one_line_in_bounded_time(data, text, tmp_path):
    path = tmp_path / "c.json"
    path.write_bytes(data)
    start = time.monotonic()
    assert text in message(path)
    assert time.monotonic() - start < 10


def test_a_byte_order_mark_is_no_error(tmp_path):
    path = tmp_path / "c.json"
    path.write_bytes(b'\xef\xbb\xbf{"train_batch_size": 4}')
    assert load_config(path).train_batch_size == 4


def test_what_is_no_file_is_said(tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    assert "is a directory; give the path of a JSON file" in message(str(tmp_path))
    assert "no such file; check the path" in message(tmp_path / "absent.json")
    assert "is not a regular file" in message(fifo)
    assert "is neither an existing file nor base64 JSON (both were tried)" in message("absent.json")
    assert "parse JSON text into a dict first" in message('{"fp16": {}}')
    assert "base64 config: line 1 column 7" in message(base64.b64encode(b'{"a": }').decode())
    assert "is larger than" in message("A" * 3_000_000)
    assert "neither an existing file" in message("\0")
    assert "not a bytes" in message(b"{}")
    assert "not 5" in message(5)


def deep(levels):
    config = {}
    inner = config
    for _ in range(levels):
        inner["a"] = {}
        inner = inner["a"]
    return config


def endless():
    config = {}
    config["optimizer"] = {"type": "Adam", "params": config}
    return config


def shared():
    config = {}
    for _ in range(60):
        config = {"a": config, "b": config}
    return {"inference": config}


HOSTILE = [
    ("deep", deep(10_000), "nested deeper"),
    ("endless", endless(), "nested deeper"),
    ("shared", shared(), "more than 250000 values"),
    ("wide", {f"k{i}": i for i in range(100_000)}, "and 99995 more problems"),
    ("long", {"k" * 1_000_000: 1}, "kkk... is not a known key"),
]


@pytest.mark.parametrize(("raw", "text"), [row[1:] for row in HOSTILE], ids=[row[0] for row in HOSTILE])
def test_a_hostile_dict_ends_in_bounded_time(raw, text):
    start = time.monotonic()
    found = message(raw)
    assert text in found
    assert len(found) < 1000
    assert time.monotonic() - start < 10


names = st.sampled_from(sorted({name for path in KEYS for name in path.split(".")})) | st.text(max_size=5)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("auto"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=4),
    max_leaves=10,
)


@settings(deadline=None)
@example({"optimizer": {"\x85": None}}, False)  # a line break in a key
@given(st.dictionaries(names, values, max_size=6), st.booleans())
def test_random_dicts_load_or_raise_config_error(raw, allow_auto):
    assert len(outcome(raw, allow_auto=allow_auto).splitlines()) <= 1


@settings(deadline=None, max_examples=50)
@given(st.binary(max_size=60) | st.text(alphabet='{}[]":,/*#\\ \nae1', max_size=40).map(str.encode))
def test_random_files_load_or_raise_config_error(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "random.json"
    path.write_bytes(data)
    for source in (path, base64.urlsafe_b64encode(data).decode()):
        assert len(outcome(source).splitlines()) <= 1


counts = st.integers(1, 10_000)
valid = st.fixed_dictionaries(
    {},
    optional={
        "train_batch_size": counts,
        "gradient_clipping": st.floats(0, 100),
        "reproducible": st.booleans(),
        "communication_data_type": st.sampled_from(["fp16", "bf16", "fp32", None]),
        "fp16": st.fixed_dictionaries({}, optional={"enabled": st.booleans(), "hysteresis": counts}),
        "zero_optimization": st.fixed_dictionaries(
            {}, optional={"stage": st.integers(0, 3), "reduce_bucket_size": counts | counts.map(float)}
        ),
        "optimizer": st.fixed_dictionaries(
            {"type": st.sampled_from(["AdamW", "SGD"])},
            optional={"params": st.dictionaries(st.text(max_size=5), st.floats(0, 1), max_size=3)},
        ),
        "zerolith": st.fixed_dictionaries({"unit_classes": st.lists(st.text(min_size=1), max_size=3)}),
    },
)


@settings(deadline=None)
@given(valid)
def test_a_valid_config_survives_a_round_trip(raw):
    config = load_config(raw)
    again = load_config(json.loads(json.dumps(config.model_dump())))
    assert again.model_dump() == config.model_dump()
    assert load_config(base64_of(raw)).model_dump() == config.model_dump()


def test_the_defaults_are_what_the_keys_say():
    dump = Config().model_dump()
    for key in KEYS.values():
        if key.fate is Fate.IMPLEMENTED and not key.path.startswith(("optimizer.", "scheduler.")):
            node = dump
            for name in key.path.split("."):
                node = node[name]
            assert node == key.default, key.path


def test_importing_the_config_imports_no_torch():
    program = "import sys, zerolith.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0
