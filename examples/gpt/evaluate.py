"""Validation loss and sampled text. Every rank calls both alike: at stage 3 each forward is a collective."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gpt.data import Batch
from gpt.ranks import sum_over_ranks
from zerolith import Engine

TEMPERATURE = 0.8


@torch.no_grad()
def validation_loss(engine: Engine, batches: Sequence[Batch]) -> float:
    """Mean nats per token over `batches`, shared out over the ranks. Collective; equal on every rank."""
    engine.eval()
    ranks, total, num_tokens = engine.dp_world_size, 0.0, 0
    for first in range(0, len(batches), ranks):
        index = first + engine.global_rank
        # Past the end a rank repeats the last batch, uncounted: all ranks run forward equally often.
        batch = batches[min(index, len(batches) - 1)]
        loss = engine(batch.tokens.to(engine.device), batch.targets.to(engine.device))
        if index < len(batches):
            total += loss.item() * batch.targets.numel()
            num_tokens += batch.targets.numel()
    engine.train()
    all_loss, all_tokens = sum_over_ranks([total, num_tokens], engine.device)
    return all_loss / all_tokens


@torch.no_grad()
def generate(engine: Engine, prompt: bytes, *, num_bytes: int, seq_len: int, seed: int) -> bytes:
    """`prompt` and what the model writes after it. Collective; the seed makes ranks draw alike."""
    engine.eval()
    draw = torch.Generator(device=engine.device).manual_seed(seed)
    tokens = torch.tensor([list(prompt)], device=engine.device)
    for _ in range(num_bytes):
        logits = engine.module(tokens[:, -seq_len:])[:, -1].float()
        chosen = torch.multinomial((logits / TEMPERATURE).softmax(dim=-1), 1, generator=draw)
        tokens = torch.cat((tokens, chosen), dim=1)
    engine.train()
    return bytes(tokens[0].tolist())
