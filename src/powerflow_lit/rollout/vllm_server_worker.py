"""What runs inside a server's workers; `vllm serve --worker-extension-cls` mixes it into them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from powerflow_lit.rollout.vllm_engine import FiniteLogits

WEIGHTS = "model.safetensors"


class PolicyWorker:
    """Methods that `collective_rpc` calls by name; answers are lists and dicts, as it wants them.

    It is mixed into vLLM's own worker, whose attributes it reads.
    """

    vllm_config: Any
    model_runner: Any
    device: torch.device

    def policy_facts(self) -> dict[str, Any]:
        """What the server's model is, so that one of another kind is refused; watches its logits
        from then on."""
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead as Head

        model, config = self.model_runner.get_model(), self.vllm_config
        text = config.model_config.hf_text_config
        self._watch(model)
        return {
            "model": str(config.model_config.model),
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "max_model_len": int(config.model_config.max_model_len),
            "max_num_seqs": int(config.scheduler_config.max_num_seqs),
            "vocab_size": int(text.vocab_size),
            "hidden_size": int(text.hidden_size),
            "layers": int(text.num_hidden_layers),
            "tied": bool(getattr(text, "tie_word_embeddings", False)),
            "head_bias": [m.bias is not None for m in model.modules() if isinstance(m, Head)],
            "experts": any(type(m).__name__ == "RoutedExperts" for m in model.modules()),
            "on_cpu": self.device.type == "cpu",
            "chunked_prefill": bool(config.scheduler_config.enable_chunked_prefill),
            "nccl": getattr(config.weight_transfer_config, "backend", None) == "nccl",
            "workers": int(config.parallel_config.world_size_across_dp),
        }

    def policy_sees(self, folder: str) -> list[bool]:
        """Whether a folder's weights can be read from here."""
        return [(Path(folder) / WEIGHTS).is_file()]

    def policy_reload(self, folder: str) -> list[str]:
        """Replace all weights by those of a folder, of which one at a time is in memory."""
        with safe_open(Path(folder) / WEIGHTS, framework="pt") as file:
            weights = ((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118
            self.reload_weights(weights_iterator=weights)  # type: ignore[attr-defined]
        self._logits().take()
        return []

    def policy_logits_finite(self) -> list[bool]:
        """Whether all logits were numbers since it was last asked."""
        return [self._logits().take()]

    def _logits(self) -> FiniteLogits:
        if not hasattr(self, "_powerflow_logits"):
            self._powerflow_logits = FiniteLogits()
        return self._powerflow_logits

    def _watch(self, model: nn.Module) -> None:
        from vllm.model_executor.layers.logits_processor import LogitsProcessor

        if hasattr(self, "_powerflow_logits"):
            return
        for module in model.modules():
            if isinstance(module, LogitsProcessor):
                module.register_forward_hook(self._logits())
