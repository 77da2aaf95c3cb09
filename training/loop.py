"""What all training stages share: steps with checkpoints, a learning-rate schedule, averaged weights."""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn


def record(folder: Path, name: str, figures: Mapping[str, float]) -> None:
    """Note the figures of a stage in ``figures.json``, from which the model card is written."""
    path = folder / "figures.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(known | {name: dict(figures)}, indent=1) + "\n")


@dataclass(frozen=True)
class Plan:
    """How long and how fast a stage trains."""

    name: str
    steps: int
    lr: float
    warmup: int = 100
    decay_from: float = 0.5
    """Share of the steps after which the learning rate falls, as a cosine, to zero."""
    weight_decay: float = 0.01
    ema: float = 0.0
    """Decay of the averaged weights; 0 averages none."""
    save_seconds: float = 60.0

    def rate(self, step: int) -> float:
        """The learning rate's factor at ``step``."""
        progress = (step / self.steps - self.decay_from) / (1.0 - self.decay_from)
        falling = 0.5 + 0.5 * math.cos(math.pi * min(max(progress, 0.0), 1.0))
        return min(1.0, (step + 1) / self.warmup) * max(falling, 0.01)


def generators(seed: int, step: int) -> tuple[random.Random, torch.Generator]:
    """Random numbers of one step: the same whether or not training was interrupted before it."""
    number = seed * 1_000_003 + step
    return random.Random(number), torch.Generator().manual_seed(number)


class Average:
    """Exponential moving average of a model's floating-point state; it follows faster at the start."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.state = {k: v.detach().clone() for k, v in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Move towards the model's weights."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, value in model.state_dict().items():
            self.state[name].lerp_(value, 1.0 - decay)


def train(
    plan: Plan,
    model: nn.Module,
    loss: Callable[[random.Random, torch.Generator], tuple[torch.Tensor, dict[str, float]]],
    folder: Path,
    seed: int,
    log: Callable[[str], None] = print,
    every: int = 50,
) -> nn.Module:
    """Minimise ``loss``, resuming from ``folder`` where a run stopped.

    Args:
        plan: length and rates.
        model: trained in place. All of its state is saved.
        loss: of a step's random numbers: the loss, and figures to log.
        folder: holds ``<name>.pt``.
        seed: of all random numbers.
        log: called with a line every ``every`` steps.

    Returns:
        ``model``, with averaged weights if the plan averages.
    """
    path = folder / f"{plan.name}.pt"
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=plan.lr, betas=(0.9, 0.99), weight_decay=plan.weight_decay)
    average = Average(model, plan.ema) if plan.ema else None
    start = 0
    if path.exists():
        saved = torch.load(path, weights_only=True)
        model.load_state_dict(saved["model"])
        optimiser.load_state_dict(saved["optimiser"])
        start = saved["step"]
        if average:
            average.state = saved["average"]
        log(f"{plan.name}: resumed at step {start} of {plan.steps}")

    def save(step: int) -> None:
        state = {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "step": step}
        state["average"] = average.state if average else {}
        partial = path.with_suffix(".part")
        torch.save(state, partial)
        partial.replace(path)

    model.train()
    begun = saved_at = time.monotonic()
    sums: dict[str, float] = {}
    last: dict[str, float] = {}
    for step in range(start, plan.steps):
        for group in optimiser.param_groups:
            group["lr"] = plan.lr * plan.rate(step)
        value, figures = loss(*generators(seed, step))
        optimiser.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        if average:
            average.update(model, step)
        for name, figure in {"loss": value.item(), **figures}.items():
            sums[name] = sums.get(name, 0.0) + figure / every
        if (step + 1) % every == 0:
            took = (time.monotonic() - begun) / (step + 1 - start)
            shown = "  ".join(f"{name} {figure:.4f}" for name, figure in sums.items())
            log(f"{plan.name} {step + 1}/{plan.steps}  {took:.3f} s/step  {shown}")
            last, sums = sums, {}
        if time.monotonic() - saved_at > plan.save_seconds:
            save(step + 1)
            saved_at = time.monotonic()
    save(plan.steps)
    if last:
        record(folder, plan.name, {"steps": plan.steps, "seed": seed, "lr": plan.lr, **last})
    log(f"{plan.name}: done in {time.monotonic() - begun:.0f} s")
    model.eval()
    if average:
        model.load_state_dict(average.state)
    return model
