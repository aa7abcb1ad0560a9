"""A torch optimizer that steps this rank's part of the masters: together, a section at a time, behind or ahead."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from itertools import chain
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from zerolith.comm import Comm, agree
from zerolith.errors import OffloadError, UsageError
from zerolith.gradients import Gradients
from zerolith.memory import SwapFile
from zerolith.memory.lane import Copier
from zerolith.optim.ahead import Ahead
from zerolith.optim.before_images import BeforeImage, BeforeImages
from zerolith.optim.behind import Behind, alike, can_run_ahead, can_run_behind, has_hooks, options_of
from zerolith.optim.far import FarMasters
from zerolith.optim.holdings import Holdings
from zerolith.optim.one_pass import OnePass
from zerolith.section import Section

logger = logging.getLogger("zerolith")

MOST_AHEAD = 2  # sections whose gradients wait for their updates in backward


class PartitionedOptimizer(Holdings):
    """Steps the pieces of all sections with `inner`."""

    def __init__(
        self,
        inner: Optimizer,
        gradients: Sequence[Gradients],
        comm: Comm,
        *,
        swap: SwapFile | None = None,
        overlaps: bool = False,  # let updates of what is offloaded run behind the next forward, where they may
        terms: Callable[[], float] | None = None,  # given, they begin in backward, and sums are divided by this
        guesses: bool = False,  # whether the step may turn out to be another one, and they must be taken back
        checks: bool = True,  # whether a step is skipped whose gradients are not finite
        splits: bool = False,  # keep masters as what their weights lack, where that can be
        copier: Copier | None = None,  # between the device and offloaded masters; None where these are beside it
    ) -> None:
        super().__init__(inner, gradients, comm, swap=swap, splits=splits)
        self._far = FarMasters(copier)
        self._is_last = False  # whether the backward under way completes a step's gradients
        self.is_stepping = False
        self._own_hook = inner.register_step_pre_hook(self._refuse_outside)
        self._behind = Behind(comm.device)
        self._is_behind = False  # whether updates have begun since `catch_up`
        self._hand_over(*self.gradients)
        for own in self.gradients:
            own.runs_behind = overlaps and can_run_behind(inner, own)
            own.section.resident = partial(self._resident, own)
            with self.residency.resident(own):
                pass  # from here on it is on disk
        self._images = BeforeImages(self) if guesses else None
        self.ahead = Ahead(
            [own for own in gradients if terms and self.may_run_ahead(own)],
            comm,
            begin=self._begin_ahead,
            undo=self._undo,
            images=self._images,
            options=lambda: options_of(inner),
            terms=terms or (lambda: 1.0),
            may_begin=lambda: not has_hooks(inner, but=self._own_hook),
            checks=checks,
        )
        if self._images is not None and not self.ahead.eligible and comm.rank == 0:
            logger.warning(
                "updates do not begin in backward: with clipping or a loss scale they do where zerolith's kernels step "
                "an optimizer that the config names, in host memory"
            )

    def step(
        self,
        used: Sequence[Sequence[bool]],
        publish: Callable[[Sequence[Section]], None],
        *,
        grad_factor: float = 1.0,
    ) -> None:
        """Step every piece whose parameters had a gradient; `publish` then brings sections' masters to the weights.

        Gradients are multiplied by `grad_factor`. used: per section, per parameter. A parameter without a gradient on
        any rank keeps its value, its momentum and its own step count. Collective. Raises OffloadError, on every rank,
        if a state cannot be brought from disk or back to it; weights and states are a mixture of two steps then. Where
        updates run behind, it is `catch_up` that raises it.
        """
        self._check_groups()
        self.ahead.use_factor(grad_factor)
        for own in self.gradients:  # what has not left in backward does here, not in the thread that updates
            if own not in self.ahead.begun:
                self._far.send(own)
        self._far.settle()
        flags_of = dict(zip(self.gradients, used, strict=True))
        is_watched = has_hooks(self.inner, but=self._own_hook)  # who looks on wants to see gradients and the result
        behind = dict.fromkeys(own for own in self.gradients if own.runs_behind and not is_watched)
        swapped = dict.fromkeys(own for own in self.gradients if self.residency.swaps(own) and own not in behind)
        here = [own for own in self.gradients if own not in behind and own not in swapped]
        left = {own: flags for own, flags in flags_of.items() if own not in self.ahead.begun}
        if self.ahead.begun and (left.keys() - behind.keys() or self._is_to_cut(left)):
            self._behind.settle_all()  # what it steps is in the groups of `inner`, too
        error = self._cut_by_use(left)  # after which, if there is one, nothing is swapped on this rank
        if here or behind:
            self._step_here({own: left[own] for own in here if own in left}, grad_factor)
            self._publish_here(here, publish)
        if swapped:
            self._step_in_turn({own: left[own] for own in swapped if own in left}, publish, grad_factor, error)
        early = [own for own in self.ahead.eligible if self.ahead.is_under_way and own.section.is_sharded]
        for own in (*behind, *early):
            own.section.is_behind = self._is_behind = True
        if behind:
            self._step_behind({own: left[own] for own in behind if own in left}, grad_factor, error)
        self.ahead.end()

    def skip(self, culprit: str) -> None:
        """Do not make the step under way, for a gradient of `culprit` is not finite.

        Raises UsageError on every rank if some of it is made and cannot be taken back. Collective then.
        """
        self.ahead.check_skip(culprit)
        self._is_behind = self._is_behind or not self.ahead.is_final  # what could not be taken back is told

    def catch_up(self) -> None:
        """Wait for updates that run behind. Collective, if a step has begun any since the last time.

        Raises OffloadError on every rank if one has failed, as `step` does.
        """
        if not self._is_behind:
            return
        self._behind.settle_all()
        self._is_behind = False
        for own in self.gradients:
            own.section.is_behind = False
        try:
            agree(self.comm, self._behind.take_error(), doing="an update behind the forward", kind=OffloadError)
        except Exception:
            self.residency.abandon()
            raise

    def backward_begins(self, *, is_last: bool) -> None:
        """Wait for updates that run behind, and begin some in this backward if it is the step's last.

        Does not communicate, and leaves what went wrong to `catch_up`. Raises UsageError if a step is due.
        """
        self._behind.settle_all()
        self._is_last = is_last
        self.ahead.backward_begins(is_last=is_last)

    def summed(self, own: Gradients) -> None:
        """A section's gradient is reduced: begin its update, or its way to the host, if nothing more is to come."""
        self.ahead.summed(own)
        if self._is_last and own not in self.ahead.begun:
            self._far.send(own)

    def give_up(self) -> bool:
        """Wait for all updates, and forget a step that began some in backward; returns whether a rank keeps one.

        Collective, if updates may begin there that cannot be taken back.
        """
        self._behind.settle_all()
        if not self.ahead.is_final:
            self.skip("")
            return False
        has_begun = self.ahead.has_begun_anywhere()
        if self.ahead.end():
            self._behind.take_error()
        return has_begun

    def _refuse_outside(self, *_: Any) -> None:
        if not self.is_stepping:
            raise UsageError(
                "this optimizer's step() would see no gradients: call engine.step(), or step() of the optimizer that "
                "initialize returned"
            )

    def _is_to_cut(self, used: Mapping[Gradients, Sequence[bool]]) -> bool:
        return any(piece.mixes(flags) for own, flags in used.items() for piece in self.pieces[own])

    def _cut_by_use(self, used: Mapping[Gradients, Sequence[bool]]) -> OffloadError | None:
        """Cut pieces of which only some parameters had a gradient; after an error, which is returned, all are here."""
        try:
            for own, flags in used.items():
                if any(piece.mixes(flags) for piece in self.pieces[own]):
                    with self.residency.resident(own):
                        self.pieces[own] = [part for piece in self.pieces[own] for part in self._by_use(piece, flags)]
                        self._hand_over(own)
        except OffloadError as error:
            self.residency.abandon()
            return error
        return None

    def _step_in_turn(
        self,
        used: Mapping[Gradients, Sequence[bool]],
        publish: Callable[[Sequence[Section]], None],
        grad_factor: float,
        error: OffloadError | None,
    ) -> None:
        """A section at a time, as they come into memory; raises what went wrong here or before, on every rank."""
        following = [*used][1:] + [*used][:1]
        for (own, flags), after in zip(used.items(), following, strict=True):
            is_stepped = False
            try:
                with self.residency.resident(own):
                    self._prefetch(after)
                    self._step_together({own: flags}, self.inner, grad_factor)
                    publish([own.section])
                    is_stepped = True
            except OffloadError as caught:
                error = caught
                self.residency.abandon()
                if not is_stepped:  # the other ranks wait for this one's part, whatever is in it
                    self._step_together({own: flags}, self.inner, grad_factor)
                    publish([own.section])
        try:
            agree(self.comm, error, doing="stepping from disk", kind=OffloadError)
        except OffloadError:
            self.residency.abandon()  # on every rank, so that all of them step alike if they load and go on
            raise

    def _step_behind(
        self, used: Mapping[Gradients, Sequence[bool]], grad_factor: float, error: OffloadError | None
    ) -> None:
        """Let them be stepped in the order in which forward meets them."""
        if error is not None:
            self._behind.report(error)
        order, options = [*used][::-1], options_of(self.inner)
        following = order[1:] + order[:1]
        self._behind.start(
            {
                own: partial(self._update_one, own, used[own], after, options, grad_factor)
                for own, after in zip(order, following, strict=True)
            }
        )

    def may_run_ahead(self, own: Gradients) -> bool:
        """Whether a section, as it is now, may be updated in backward."""
        fits = self._images is None or self._images.can_have(own)
        return fits and can_run_ahead(self.inner, own, is_swapped=self.residency.swaps(own))

    def _begin_ahead(
        self, own: Gradients, options: list[dict[str, Any]], grad_factor: float, image: BeforeImage | None
    ) -> None:
        following = self.gradients[self.gradients.index(own) + 1 :]  # in backward, most of the time
        after = next((each for each in following if each not in self.ahead.begun), None)
        flags = [True] * len(own.used)
        self._far.send(own)
        if image is None:
            self._behind.wait_for_room(MOST_AHEAD)
        update = partial(self._update_one, own, flags, after, options, grad_factor, image)
        self._behind.start({own: update}, keeps=image is not None)

    def _undo(self, own: Gradients, image: BeforeImage) -> None:
        self._behind.settle(own)
        try:
            image.restore(self.inner.state)
            own.section.drop_result()
            if own.section.is_sharded:
                own.section.start_publish().wait()
                own.section.plan.residency.settle()
        except Exception as error:
            self._behind.report(error)  # `catch_up` tells all ranks

    def _update_one(
        self,
        own: Gradients,
        flags: Sequence[bool],
        after: Gradients | None,
        options: Sequence[Mapping[str, Any]],
        grad_factor: float,
        image: BeforeImage | None = None,
    ) -> None:
        """Step one section and, where that needs no other rank, publish it; `after` is the next. In the thread.

        `image` is filled before, unless it says that the update is not wanted any more.
        """
        params: list[list[Tensor]] = [[] for _ in options]
        for piece in self.pieces[own]:
            params[piece.group].append(piece.param)
        try:
            with self.residency.resident(own):
                if after is not None:
                    self._prefetch(after)
                if image is not None and not image.fill():
                    return
                self._step_together({own: flags}, alike(self.inner, options, params), grad_factor)
                if own.section.is_sharded:
                    own.section.start_publish().wait()
            own.section.plan.residency.settle()  # here, where a failure is told to all ranks
        except OffloadError:
            self.residency.abandon()
            raise

    def _prefetch(self, own: Gradients) -> None:
        if self.split_masters is None:  # else they are made at once, from weights that may change until they are used
            self.residency.prefetch(own)

    def _step_here(self, used: Mapping[Gradients, Sequence[bool]], grad_factor: float) -> None:
        if used or not self.ahead.begun:  # else its tensors are being stepped
            self._step_together(used, self.inner, grad_factor)

    def _publish_here(self, here: Sequence[Gradients], publish: Callable[[Sequence[Section]], None]) -> None:
        """Bring what is stepped in memory to the weights, unless that was done in backward. Collective."""
        if self.ahead.is_under_way and any(not own.section.is_sharded for own in self.ahead.eligible):
            for own in self.ahead.begun:
                self._behind.settle(own)
            agree(self.comm, self._behind.take_error(), doing="an update in backward", kind=OffloadError)
        publish([own.section for own in here if not (own.section.is_sharded and own in self.ahead.begun)])

    def _resident(self, own: Gradients) -> AbstractContextManager[None]:
        self._behind.settle(own)
        return self.residency.resident(own)

    def _step_together(self, used: Mapping[Gradients, Sequence[bool]], inner: Optimizer, grad_factor: float) -> None:
        """Step the pieces of some sections with `inner`, which has the options."""
        is_one_pass = isinstance(inner, OnePass)
        for own, flags in used.items():
            self._far.land(own)
            if not is_one_pass:
                own.scale(grad_factor)
            self._set_grads(own, flags)
        if inner is self.inner:
            self.is_stepping = True
        try:
            if isinstance(inner, OnePass):
                inner.grad_factor = grad_factor
                inner.outs = dict(chain.from_iterable(map(self._casts, used)))
            inner.step()
            for own, flags in used.items():
                # A landing holds nothing of the pieces that were not stepped; the weights themselves do.
                is_whole = own.section.landing is None or all(
                    any(flags[index] for index in piece.slots()) for piece in self.pieces[own]
                )
                own.section.is_cast = is_one_pass and is_whole and own.section.cast_target is not None
        finally:
            if inner is self.inner:
                self.is_stepping = False
            for group in inner.param_groups:
                for param in group["params"]:
                    param.grad = None
        for own in used:
            if own in self.whole:
                with own.section.near(to_write=True):
                    self.whole[own].put_values(own.section.weights.own())

    def _set_grads(self, own: Gradients, flags: Sequence[bool]) -> None:
        """Give the pieces whose parameters had a gradient theirs. Collective where whole tensors are exchanged."""
        whole = self.whole[own].take_grads(own.sum.own()) if own in self.whole else {}
        for piece in self.pieces[own]:
            slots = piece.slots()
            if any(flags[index] for index in slots):
                grad = whole[slots[0]] if whole else own.sum.at(piece.range)
                piece.param.grad = grad.view_as(piece.param).to(piece.param.device, piece.param.dtype)

    def _casts(self, own: Gradients) -> Iterator[tuple[Tensor, Tensor]]:
        """The stepped tensors of a section, and where their new values go in the dtype of the weights."""
        target = own.section.cast_target
        if target is not None:
            for piece in self.pieces[own]:
                yield piece.param, target.at(piece.range)

    def let_go(self) -> None:
        """Give the optimizer back as it came: over the client's tensors, without state."""
        self._own_hook.remove()
        if not self.ahead.is_final:
            self.skip("")
        self._behind.close()
        if self.ahead.end():
            logger.error("a backward had begun to update and no step() came: weights are those of two steps")
        super().let_go()
