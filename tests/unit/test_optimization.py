"""The fused optimizer takes the step of the plain one, in training as it is."""

from __future__ import annotations

from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from powerflow_lit.config.rules import ConfigError
from powerflow_lit.optimization import adamw
from tests.unit.test_config import checked
from tests.unit.test_module import head
from tests.unit.test_numbers import State, breakable, fit, good, nan_gradient, nan_log_prob, same


def largest_difference(one: State, other: State) -> float:
    """Over everything that training changes, moments included."""
    assert one.keys() == other.keys()
    differences = [(one[n].double() - other[n].double()).abs() for n in one]
    return max(float(d.max()) for d in differences if d.numel())


def trained(fused: bool | None, **changes: Any) -> list[State]:
    updates = [good(1), nan_gradient(), good(2), nan_log_prob(), good(3)]
    return fit(breakable(fused_optimizer=fused, warmup_steps=2, **changes), updates).after


def test_fused_and_plain_steps_agree_clipped_skipped_and_decayed() -> None:
    settings: dict[str, Any] = {"grad_clip": 0.05, "weight_decay": 0.1}
    fused, plain = trained(True, **settings), trained(False, **settings)
    assert largest_difference(fused[-1], plain[-1]) < 1e-6
    assert largest_difference(fused[-1], fused[0]) > 1e-4, "there was something to agree on"
    assert same(fused[0], fused[1]), "a skipped update leaves moments and step counts"
    unclipped = trained(True, **{**settings, "grad_clip": 1e3})
    assert largest_difference(fused[-1], unclipped[-1]) > 1e-6, "the clipping was heeded"


def test_a_checkpoint_goes_on_with_the_steps_that_it_began_with() -> None:
    """Also one from before there was a choice: bit by bit as it would have gone on."""

    def after(steps: int, made: Any, weight: torch.Tensor, seed: int) -> torch.Tensor:
        for step in range(seed, seed + steps):
            generator = torch.Generator().manual_seed(step)
            weight.grad = torch.randn(weight.shape, generator=generator)
            made.step()
        return weight.detach().clone()

    for began in (True, False):
        weight = torch.nn.Parameter(torch.linspace(-1, 1, 1000))
        groups = [{"params": [weight], "lr": 1e-2}]
        made = adamw(groups, betas=(0.9, 0.95), fused=began, scaled_loss=False)
        after(3, made, weight, 0)
        kept, state = weight.detach().clone(), deepcopy(made.state_dict())
        there = after(3, made, weight, 3)
        other = torch.nn.Parameter(kept)
        resumed = adamw(
            [{"params": [other], "lr": 1e-2}], betas=(0.9, 0.95), fused=not began, scaled_loss=False
        )
        resumed.load_state_dict(state)
        assert torch.equal(after(3, resumed, other, 3), there)


def test_null_fuses_where_it_pays_and_never_under_a_scaled_loss() -> None:
    def fused(device: str, choice: bool | None, *, scaled: bool = False) -> bool:
        weight = torch.nn.Parameter(torch.zeros(2, device=device))
        made = adamw(
            [{"params": [weight], "lr": 1.0}], betas=(0.9, 0.95), fused=choice, scaled_loss=scaled
        )
        return bool(made.param_groups[0]["fused"])

    assert fused("cpu", None)
    assert not fused("cpu", False)
    assert not fused("meta", None), "a device of which nothing is known"
    assert not fused("cpu", None, scaled=True)
    with pytest.raises(ValueError, match="still scaled"):
        fused("cpu", True, scaled=True)


def test_a_gradient_scaler_of_the_trainer_is_noticed() -> None:
    made = breakable(log_z=head())
    plugin = SimpleNamespace(scaler=object())
    made._trainer = SimpleNamespace(precision_plugin=plugin)  # type: ignore[assignment]
    assert not made.configure_optimizers()["optimizer"].param_groups[0]["fused"]
    plugin.scaler = None
    assert made.configure_optimizers()["optimizer"].param_groups[0]["fused"]


def test_fused_steps_of_a_scaled_loss_are_refused() -> None:
    words = r"optimizer\.fused=true with trainer\.precision=16-mixed: .* take bf16-mixed"
    with pytest.raises(ConfigError, match=words):
        checked("optimizer.fused=true", "trainer.precision=16-mixed")
    checked("trainer.precision=16-mixed")
    assert checked("optimizer.fused=true").optimizer.fused is True
