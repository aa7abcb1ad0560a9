"""Every DeepSpeed key has one fate; what asks for nothing is accepted, what asks for too much is refused."""

import json
from pathlib import Path

import pytest

from config import deepspeed_keys
from zerolith.config import KEYS, SECTIONS, Fate, keys, load_config
from zerolith.config.keys import TYPED_SECTIONS
from zerolith.config.problems import join
from zerolith.errors import ConfigError

TABLE = Path(keys.__file__).with_name("deepspeed.json")
OPTIMIZER_NEEDS = {"type": "Adam"}


def nested(path, value):
    """The smallest config that sets one key."""
    *sections, name = path.split(".")
    config = {name: value}
    for section in reversed(sections):
        config = {section: config | (OPTIMIZER_NEEDS if section in ("optimizer", "scheduler") else {})}
    return config


def leaves(config, path=""):
    for name, value in config.items():
        inner = f"{path}.{name}" if path else name
        yield inner, value
        if isinstance(value, dict):
            yield from leaves(value, inner)


DOCUMENTED = [
    *deepspeed_keys.TOP.items(),
    *leaves(deepspeed_keys.SECTIONS),
    *leaves(deepspeed_keys.OTHER_NAMES),
]


@pytest.mark.parametrize(("path", "default"), DOCUMENTED, ids=[path for path, _ in DOCUMENTED])
def test_every_documented_key_is_accepted_at_its_default(path, default):
    load_config(nested(path, default))


def test_all_defaults_together_are_accepted():
    load_config(deepspeed_keys.TOP | deepspeed_keys.SECTIONS)


@pytest.mark.parametrize("client", deepspeed_keys.CLIENTS)
def test_what_clients_send_is_accepted(client):
    config = deepspeed_keys.CLIENTS[client]
    assert load_config(config).zero_optimization.stage == config["zero_optimization"]["stage"]


def test_no_key_has_two_fates():
    pairs = json.loads(TABLE.read_text(), object_pairs_hook=list)  # a dict would hide a key that is there twice
    groups = [dict(group) for group in pairs]
    declared = [join(group["section"], name) for group in groups for name, _ in group["keys"]]
    assert len(declared) == len(set(declared))
    assert all(KEYS[path].fate is not Fate.IMPLEMENTED for path in declared)
    assert not set(KEYS) & set(SECTIONS)


def test_every_key_says_why():
    assert all(key.why for key in KEYS.values())
    assert all(TYPED_SECTIONS.values())


@pytest.mark.parametrize("path", [path for path, key in KEYS.items() if key.fate is not Fate.IMPLEMENTED])
def test_keys_without_effect_leave_the_config_as_it_is(path):
    config = load_config(nested(path, KEYS[path].default))
    plain = load_config({path.split(".")[0]: OPTIMIZER_NEEDS} if path.startswith("optimizer") else {})
    assert config.model_dump() == plain.model_dump()
    assert bool(config.notes) == (KEYS[path].fate is Fate.HINT)


REFUSED = [
    ("sequence_parallel_size", 2),
    ("fp16.fp16_master_weights_and_grads", True),
    ("bf16.immediate_grad_update", True),
    ("bf16.bf16_optimizer_states", True),
    ("data_types.param_dtype", "bf16"),
    ("zero_optimization.cpu_offload_param", True),
    ("zero_optimization.cpu_offload", True),
    ("zero_optimization.zenflow", {"topk_ratio": 0.1}),
    ("zero_optimization.zero_hpz_partition_size", 2),
    ("zero_optimization.zero_quantized_weights", True),
    ("zero_optimization.zero_quantized_gradients", True),
    ("hybrid_engine.enabled", True),
    ("comet.enabled", True),
    ("activation_checkpointing.partition_activations", True),
    ("data_efficiency.enabled", True),
    ("compile.deepcompile", True),
    ("checkpoint.writer", {"type": "FAST"}),
    ("checkpoint.load_universal", True),
    ("pipeline.stages", 2),
    ("tensor_parallel.autotp_size", 2),
    ("tensor_parallel.tp.tp_size", 2),
    ("expert_parallel.enabled", True),
    ("autotuning.enabled", True),
    ("weight_quantization", {"quantized_initialization": {"num_bits": 8}}),
]
REMOVED = [
    ("nebula", {"enabled": True}),
    ("compression_training", {"weight_quantization": {"shared_parameters": {"enabled": True}}}),
    ("amp", {"enabled": True}),
    ("quantize_training", {"enabled": True}),
    ("sparse_gradients", True),
    ("eigenvalue", {"enabled": True}),
    ("sparse_attention", {"mode": "fixed"}),
    ("elasticity", {"enabled": True}),
    ("graph_harvesting", True),
    ("curriculum_learning", {"enabled": True}),
    ("progressive_layer_drop", {"enabled": True}),
    ("zero_optimization.mics_shard_size", 8),
    ("zero_optimization.mics_hierarchical_params_gather", True),
    ("zero_optimization.zeropp_loco_param", {"err_beta": 0.8}),
]


@pytest.mark.parametrize(("path", "value"), REFUSED, ids=[path for path, _ in REFUSED])
def test_what_is_not_done_is_refused_with_its_reason(path, value):
    with pytest.raises(ConfigError) as error:
        load_config(nested(path, value))
    assert f"config: {path} = " in str(error.value)
    assert f"is not supported yet ({KEYS[path].why})" in str(error.value)


@pytest.mark.parametrize(("path", "value"), REMOVED, ids=[path for path, _ in REMOVED])
def test_what_deepspeed_removed_is_refused_as_removed(path, value):
    with pytest.raises(ConfigError, match=f"{path} = .*that DeepSpeed removed .*leave it out"):
        load_config(nested(path, value))


HINT_MISTAKES = [
    ("zero_optimization.contiguous_gradients", 1),
    ("zero_optimization.allgather_bucket_size", "5e8"),
    ("zero_optimization.sub_group_size", True),
    ("aio.queue_depth", 8.5),
    ("comms_logger.prof_ops", "all"),
    ("checkpoint.tag_validation", "Maybe"),
    ("inference", []),
    ("log_level", 3),
]


@pytest.mark.parametrize(("path", "value"), HINT_MISTAKES, ids=[path for path, _ in HINT_MISTAKES])
def test_hints_are_type_checked(path, value):
    with pytest.raises(ConfigError, match=f"{path} must be (of type|one of) .*, not "):
        load_config(nested(path, value))


def test_hints_are_noted_with_their_reason():
    (note,) = load_config({"zero_optimization": {"contiguous_gradients": False}}).notes
    assert note.path == "zero_optimization.contiguous_gradients"
    assert note.why == KEYS[note.path].why
