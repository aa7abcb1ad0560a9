"""The same training on a device: by every stage, with states on the host or not, and by plain PyTorch there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from models import make_gpt, start_engine, token_batches, train_on, train_plain, whole_weights, zero_config

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
LR, STEPS = 1e-2, 4
HOST = {"device": "cpu"}
OFFLOADS: dict[str, dict[str, Any]] = {
    "on the device": {},
    "states on the host": {"offload_optimizer": {**HOST, "hbm_first": False}},
    "updates in step": {"offload_optimizer": {**HOST, "overlap": "none"}},
    "updates in backward": {"offload_optimizer": {**HOST, "overlap": "backward"}},
    "half of the states on the host": {"offload_optimizer": {**HOST, "ratio": 0.5}},
}


def trained(device: str, stage: int, **overrides: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and weights after some steps of one rank."""
    engine = start_engine(make_gpt(), zero_config(stage, **overrides))
    losses = train_on(engine, token_batches(STEPS, 4).to(device))
    weights = {name: weight.cpu() for name, weight in whole_weights(engine).items()}
    engine.destroy()
    return losses, weights


@pytest.mark.parametrize("device", DEVICES)
def test_stages_train_as_plain_torch_does_there(device: str) -> None:
    expected, _ = train_plain(
        make_gpt().to(device),
        token_batches(STEPS, 4).to(device),
        lambda model: torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0),
    )
    for stage in range(4):
        torch.testing.assert_close(trained(device, stage)[0], expected, rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_where_states_rest_changes_no_bit(device: str, precision: str) -> None:
    more = {} if precision == "fp32" else {precision: {"enabled": True}}

    def run(stage: int, placing: dict[str, Any]) -> Any:
        return trained(device, stage, gradient_clipping=0.5, zero_optimization=placing, reproducible=True, **more)

    losses, weights = run(0, {})
    for stage in (1, 2, 3):
        weights_too = {"offload_param": HOST} if stage == 3 else {}
        for name, placing in {**OFFLOADS, "all on the host": {**OFFLOADS["updates in step"], **weights_too}}.items():
            found_losses, found = run(stage, placing)
            assert found_losses == losses, (stage, name)
            assert all(torch.equal(found[each], weights[each]) for each in weights), (stage, name)
