"""Low-rank adapters inside the policy (LoRA, arXiv 2106.09685), and the policy without them.

An adapted layer computes W x + scaling B A x with W frozen, scaling = lora_alpha / rank. B starts
at zero, so that the policy starts as its base, to the bit.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from powerflow_lit.models.errors import ModelError
from powerflow_lit.models.sharding import is_sharded, part_of

ADAPTER = "default"  # peft's name of the one adapter


@dataclass(frozen=True)
class LoraSettings:
    """The adapter of `finetune=lora`; values stand in `conf/finetune/lora.yaml`."""

    rank: int
    lora_alpha: float  # the adapter's output is scaled by lora_alpha / rank
    target_modules: str | tuple[str, ...]  # `all-linear`, or names of linear layers


def add_lora(model: PreTrainedModel, settings: LoraSettings) -> None:
    """Put an adapter into the model, in place, and freeze all else.

    The adapter is float32 whatever the frozen weights are: AdamW's small steps are lost in
    bfloat16's rounding.

    Raises:
        ModelError: `target_modules` names no layer, the output layer or one that is not linear.
    """
    from peft import LoraConfig  # over a second, which a run without adapter need not spend

    targets = settings.target_modules
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.lora_alpha,  # type: ignore[arg-type]
        lora_dropout=0.0,
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type="CAUSAL_LM",
    )
    try:
        model.add_adapter(config, adapter_name=ADAPTER)
    except ValueError as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"finetune.target_modules={targets}: {reason}") from error
    output = model.get_output_embeddings()
    for name, layer in lora_layers(model).items():
        if layer is output or not isinstance(layer.get_base_layer(), nn.Linear | Conv1D):
            raise ModelError(
                f"finetune.target_modules={targets}: {name} cannot carry an adapter, only linear "
                "layers before the output layer can: name those, as in "
                "'finetune.target_modules=[q_proj,k_proj,v_proj,o_proj]'"
            )
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """The adapted layers by name; none in a plain model."""
    return {n: m for n, m in model.named_modules() if hasattr(m, "lora_A")}


def is_lora(model: nn.Module) -> bool:
    """Whether the model carries an adapter."""
    return any(hasattr(m, "lora_A") for m in model.modules())


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """Within, the model is its base, to the bit: adapted layers compute W x alone."""
    layers = lora_layers(model).values()
    try:
        for layer in layers:
            layer.enable_adapters(enabled=False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(enabled=True)


class PlainWeights(Mapping[str, Tensor]):
    """The policy's weights under the names of a plain model, W + scaling B A where adapted.

    Sums are made in float32 when a weight is asked for, and returned in W's type.
    """

    def __init__(self, model: nn.Module) -> None:
        adapted = lora_layers(model)
        self._layers: dict[str, Any] = {}
        self.tensors: dict[str, Tensor] = {}  # W of an adapted layer
        for name, tensor in model.state_dict().items():
            owner, base_layer, leaf = name.rpartition(".base_layer.")
            if base_layer and owner in adapted:
                self.tensors[f"{owner}.{leaf}"] = tensor
                if leaf == "weight":
                    self._layers[f"{owner}.{leaf}"] = adapted[owner]
            elif ".lora_" not in name:
                self.tensors[name] = tensor

    @torch.no_grad()
    def __getitem__(self, name: str) -> Tensor:
        weight = self.tensors[name]
        layer = self._layers.get(name)
        if layer is None:
            return weight
        return (weight.float() + layer.get_delta_weight(ADAPTER).float()).to(weight.dtype)

    def __contains__(self, name: object) -> bool:
        return name in self.tensors  # a Mapping's own would make the sum

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def policy_weights(model: nn.Module) -> Mapping[str, Tensor]:
    """All weights an engine must be given; a tied output layer appears under its own name too."""
    return PlainWeights(model) if is_lora(model) else dict(model.state_dict())


def plain_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A frozen copy without adapter, in evaluation mode; an adapter's part is in its weights.

    Of a model that is spread over ranks it is the same architecture whole, its weights random.
    """
    if is_sharded(model):
        return _unspread(model)
    copied = copy.deepcopy(model)
    for name, layer in lora_layers(copied).items():
        plain = layer.get_base_layer()
        delta = layer.get_delta_weight(ADAPTER).float()
        plain.weight.data = (plain.weight.data.float() + delta).to(plain.weight.dtype)
        parent, _, child = name.rpartition(".")
        setattr(copied.get_submodule(parent), child, plain)
    if is_lora(model):
        copied._hf_peft_config_loaded = False
        del copied.peft_config
    return copied.eval().requires_grad_(False)


def _unspread(model: PreTrainedModel) -> PreTrainedModel:
    """A whole model of the same architecture, type and device, without adapter."""
    with torch.random.fork_rng(devices=[]):
        made = type(model)(copy.deepcopy(model.config))  # FSDP's classes make the original's
    names = dict(made.named_parameters())
    for name, tensor in PlainWeights(model).tensors.items():
        if name in names:
            names[name].data = names[name].data.to(part_of(tensor).device, tensor.dtype)
    nn.Module.to(made, model.device)  # buffers
    if hasattr(model, "packed_span"):
        made.packed_span = model.packed_span
    return made.eval().requires_grad_(False)


def trained_names(model: nn.Module) -> set[str]:
    """Names in the state dict of what training changes: all of a plain model, else the adapter."""
    names = set(model.state_dict())
    return {n for n in names if ".lora_" in n} if is_lora(model) else names
