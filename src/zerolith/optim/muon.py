"""Muon for the matrices inside a model, AdamW for everything else, as one optimizer.

Muon orthogonalises the momentum of a matrix (Jordan et al., kellerjordan.github.io/posts/muon). It is made for hidden
layers: embeddings, output heads, biases and norms do better with AdamW. The arithmetic of both is torch.optim's.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from zerolith.optim.closure import evaluated

NOT_HIDDEN = ("embed", "lm_head")  # in the name of a matrix: it maps from or to the vocabulary


class Muon(Optimizer):
    """Steps groups with `use_muon` by torch.optim.Muon, the others by torch.optim.AdamW.

    params: group dicts, each with `use_muon`, whose other keys are options of the optimizer that steps it; `split`
    makes them. muon_lr, adam_lr: rates of the two kinds, `lr` if None. momentum, nesterov, ns_steps, adjust_lr_fn
    are Muon's, betas and eps AdamW's.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float | Tensor = 1e-3,
        muon_lr: float | None = None,
        adam_lr: float | None = None,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        of_muon: dict[str, Any] = {"lr": lr if muon_lr is None else muon_lr, "weight_decay": weight_decay}
        of_muon |= {"momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps, "adjust_lr_fn": adjust_lr_fn}
        of_adam: dict[str, Any] = {"lr": lr if adam_lr is None else adam_lr, "weight_decay": weight_decay}
        of_adam |= {"betas": tuple(betas), "eps": eps, "fused": True}
        given = list(params)
        if not all(isinstance(group, dict) and "use_muon" in group for group in given):
            raise ValueError("Muon takes param groups that each say use_muon; zerolith.optim.muon.split makes them")
        groups = [{**(of_muon if group["use_muon"] else of_adam), **group} for group in given]
        super().__init__(groups, {"lr": lr})
        self._parts: dict[bool, Optimizer] = {}  # by use_muon; made over our own group dicts, which they complete
        for use_muon, factory, options in ((True, torch.optim.Muon, of_muon), (False, torch.optim.AdamW, of_adam)):
            own = self._groups(use_muon)
            if own:
                self._parts[use_muon] = factory(own, **options)

    @staticmethod
    def granularity(group: dict[str, Any]) -> str:
        """What a step of `group` must see of a tensor."""
        return "tensor" if group["use_muon"] else "element"

    def step(self, closure: Any = None) -> Any:
        """One step; returns what `closure` returns."""
        loss = evaluated(closure)
        for use_muon, part in self._parts.items():
            # Again each time: loading a state dict makes new ones.
            part.param_groups, part.state = self._groups(use_muon), self.state
            part.step()
        return loss

    def _groups(self, use_muon: bool) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if bool(group["use_muon"]) is use_muon]


def split(model: nn.Module, groups: Iterable[Any]) -> list[dict[str, Any]]:
    """Cut param groups (or tensors, or named tensors) into hidden matrices and the rest, in groups for Muon.

    Hidden is a matrix that no nn.Embedding holds and whose name has neither "embed" nor "lm_head" in it. A group
    that says `use_muon` stays as it is.
    """
    outside = {
        id(module.weight) for module in model.modules() if isinstance(module, (nn.Embedding, nn.EmbeddingBag))
    } | {
        id(param)
        for name, param in model.named_parameters(remove_duplicate=False)
        if any(word in name for word in NOT_HIDDEN)
    }
    given = list(groups)
    dicts = [group for group in given if isinstance(group, dict)]
    loose = [each for each in given if not isinstance(each, dict)]
    cut: list[dict[str, Any]] = []
    for group in [*dicts, {"params": loose}]:
        params = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        if "use_muon" in group:
            cut.append(group)
            continue
        kinds: dict[bool, list[Tensor]] = {True: [], False: []}
        for each in params:
            param = each[1] if isinstance(each, tuple) else each
            kinds[param.ndim == 2 and id(param) not in outside].append(param)
        cut += [{**group, "params": own, "use_muon": kind} for kind, own in kinds.items() if own]
    return cut
