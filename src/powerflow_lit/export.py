"""The trained policy as an ordinary model folder: weights, tokenizer, model card, and the hub."""

from __future__ import annotations

import copy
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from huggingface_hub import HfApi
from torch import Tensor
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from powerflow_lit.datamodule import RolloutDataModule
from powerflow_lit.disk import named
from powerflow_lit.models.lora import is_lora, policy_weights, trained_names
from powerflow_lit.models.sharding import is_sharded, whole

PAPER = "https://arxiv.org/abs/2603.18363"
CITATION = """@article{powerflow2026,
  title = {PowerFlow: Unlocking the Dual Nature of LLMs via Principled Distribution Matching},
  author = {Chen and Chen and Li and Huang},
  journal = {arXiv preprint arXiv:2603.18363},
  year = {2026}
}"""
TOKEN = re.compile(r"hf_\w+")


def export(
    policy: PreTrainedModel,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    dtype: str | None = None,
    card: str | None = None,
) -> Path:
    """Write `folder/export`, aside first: `AutoModelForCausalLM` and `vllm serve` open it.

    Of a policy that is spread over ranks, all ranks call it; the first gathers and writes.

    An adapter is merged into the weights, and kept beside them in `export/adapter` for peft.
    What an export before left stays until the new one is whole.

    Args:
        dtype: of the written weights; None keeps the policy's.
        card: text of README.md.

    Raises:
        OSError: the disk is full; the space of the unfinished export is given back.
    """
    target, aside = folder / "export", folder / "export.tmp"
    if is_sharded(policy) and dist.get_rank() != 0:
        _on_cpu(policy, dtype, keep=False)
        _adapter(policy, keep=False)
        return target
    shutil.rmtree(aside, ignore_errors=True)
    try:
        with named(target):
            _write(policy, tokenizer, aside, dtype, card)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    shutil.rmtree(target, ignore_errors=True)
    aside.rename(target)
    return target


def _write(
    policy: PreTrainedModel,
    tokenizer: Tokenizer,
    aside: Path,
    dtype: str | None,
    card: str | None,
) -> None:
    # the weights go through the CPU: a GPU that trains has no room for another copy
    weights, adapter = _on_cpu(policy, dtype), _adapter(policy)
    _plain_shell(policy).save_pretrained(aside, state_dict=weights)
    # the shell, which has no weights of its own, would say the default dtype
    _say_dtype(aside / "config.json", dtype or str(policy.dtype).removeprefix("torch."))
    if is_lora(policy):
        policy.save_pretrained(aside / "adapter", state_dict=adapter)
    tokenizer.save_pretrained(aside)
    if card is not None:
        (aside / "README.md").write_text(card)


def push(folder: Path, repo: str, *, private: bool) -> str | None:
    """Upload an exported folder to the hub; returns why it failed, or None.

    The reason is one line and names no token. A failed upload leaves all files where they are.
    """
    api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="PowerFlow policy")
    except Exception as error:  # whatever fails in an upload, the run and its files must not
        return _reason(error)
    return None


def _reason(error: Exception) -> str:
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return TOKEN.sub("hf_***", line)


def model_card(
    config: Mapping[str, Any], summary: Mapping[str, Any], notes: Mapping[str, str]
) -> str:
    """README.md of the export, with the front matter that the hub reads.

    Args:
        config: the resolved configuration of the run.
        summary: what summary.json says of it.
        notes: further lines on the data, by name (prompts trained on, evaluated on).
    """
    model, strategy, tuned = config["model"], config["strategy"], config["finetune"]
    rollout, optimizer, base = config["rollout"], config["optimizer"], str(model["path"])
    front: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "unknown",  # the base's holds; only its owner can say
        "tags": list(
            dict.fromkeys(
                ["powerflow", "distribution-matching", strategy["name"], config["task"]["name"]]
            )
        ),
    }
    if not base.startswith("embedded:") and not Path(base).expanduser().exists():
        front = {"base_model": base, **front}
    tuning = "all weights"
    if tuned["kind"] == "lora":
        tuning = f"LoRA, rank {tuned['rank']}, lora_alpha {tuned['lora_alpha']:g}; merged here, "
        tuning += "and apart in `adapter/`"
    facts = {
        "base": f"`{base}`" + (f" at `{model['revision']}`" if model["revision"] else ""),
        "alpha (power of the base)": _alpha(config, summary)
        + ("" if strategy.get("uses_alpha", True) else " (not used)"),
        "strategy": f"{strategy['name']}, epsilon {config['epsilon']:g}, "
        f"psi {strategy['format_penalty']:g}",
        "log Z": str(config["log_z"].get("_target_", "")).rpartition(".")[2],
        "trained": tuning,
        "task": config["task"]["name"],
        **notes,
        "refills": f"{summary['refills']} of {rollout['prompts_per_refill']} prompts x "
        f"{rollout['samples_per_prompt']} rollouts, {summary['steps']} updates",
        "learning rate": f"{optimizer['lr']:g} (head {optimizer['log_z_lr']:g})",
        "weights in": f"{model['dtype']}, precision {config['trainer'].get('precision')}",
        "sampling in training": "temperature 1, top-p 1, no top-k, at most "
        f"{rollout['max_new_tokens']} tokens",
        "seed": str(config["seed"]),
    }
    power = (summary.get("automatic_alpha") or config)["alpha"]
    title = f"{model['name']}, PowerFlow alpha {power:.4g}"
    return "\n".join(
        [
            f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
            f"# {title}\n",
            f"A policy trained {_how(strategy)} ([paper]({PAPER})). It was trained and measured at "
            "temperature 1; `generation_config.json` is the base's.\n",
            _table(("", ""), facts.items()),
            "\n## Evaluation\n",
            _metrics(summary["base"], summary["final"]),
            "\n## Versions\n",
            _table(("", ""), {**summary["versions"], "commit": summary["git_commit"]}.items()),
            f"\n## Citation\n\n```bibtex\n{CITATION}\n```\n",
        ]
    )


def _alpha(config: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    """The power, and where it came to if a target has driven it."""
    found = summary.get("automatic_alpha")
    if not found:
        return f"{config['alpha']:g}"
    target = config["alpha_schedule"]["target"]
    aim = ", ".join(f"{k} {v}" for k, v in target.items() if k != "_target_")
    return f"{found['alpha']:.4g}, driven from {config['alpha']:g} by a target ({aim})"


def _how(strategy: Mapping[str, Any]) -> str:
    """What it learned from, in a phrase."""
    labels = (
        "with the reference answers as labels" if strategy.get("supervised") else ("without labels")
    )
    if strategy.get("uses_alpha", True):
        return f"{labels} towards the alpha-power of its base"
    return f"{labels} by `{strategy['name']}`"


def data_notes(data: RolloutDataModule, *, supervised: bool) -> dict[str, str]:
    """What the card says of the prompts."""
    notes = {
        "prompts": f"{len(data.train_prompts)} to train on, "
        f"{'with' if supervised else 'without'} their answers; "
        f"{len(data.eval_prompts)} to evaluate on"
    }
    if data.task.notes:
        notes["data"] = "; ".join(data.task.notes)
    return notes


def _metrics(base: Mapping[str, float], final: Mapping[str, float]) -> str:
    rows = [
        (name.removeprefix("val/"), f"{base[name]:.4g}" if name in base else "", f"{value:.4g}")
        for name, value in final.items()
    ]
    return _table(("metric", "base", "this model"), rows) if rows else "None was made."


def _table(head: tuple[str, ...], rows: Any) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(str(c) for c in row) + " |" for row in rows)])


def _plain_shell(policy: PreTrainedModel) -> PreTrainedModel:
    """A model of the policy's architecture without memory, to be saved with weights of its own."""
    with torch.device("meta"):
        shell = type(policy)(copy.deepcopy(policy.config))
    shell.generation_config = copy.deepcopy(policy.generation_config)
    if shell.generation_config is not None:
        try:
            shell.generation_config.validate(strict=True)
        except ValueError:  # some bases ask for greedy decoding and name a temperature beside it
            shell.generation_config.do_sample = True
    return shell


def _on_cpu(policy: PreTrainedModel, dtype: str | None, *, keep: bool = True) -> dict[str, Tensor]:
    """All weights in `dtype`; tied ones stay one tensor, which is then written once.

    Args:
        keep: False gathers for another rank what is spread, and keeps no row of it.
    """
    # by the parameters themselves: of a tensor with few rows some ranks hold none, and no place
    own = {name: id(p) for name, p in policy.named_parameters(remove_duplicate=False)}
    seen: dict[int, Tensor] = {}
    weights: dict[str, Tensor] = {}
    for name, tensor in policy_weights(policy).items():
        place = own.get(name)  # merged weights have none, and are tied to nothing
        if place is not None and place in seen:
            weights[name] = seen[place]
            continue
        gathered = whole(tensor.detach())
        wanted = getattr(torch, dtype) if dtype and tensor.is_floating_point() else tensor.dtype
        weights[name] = gathered.to("cpu", wanted) if keep else gathered[:0].clone()
        if place is not None:
            seen[place] = weights[name]
    return weights


def _adapter(policy: PreTrainedModel, *, keep: bool = True) -> dict[str, Tensor]:
    """The adapter's weights whole; none of a plain policy."""
    if not is_lora(policy):
        return {}
    names, state = trained_names(policy), policy.state_dict()
    gathered = ((name, whole(state[name])) for name in sorted(names))
    return {name: tensor.cpu() for name, tensor in gathered if keep}


def _say_dtype(config: Path, dtype: str) -> None:
    config.write_text(re.sub(r'"dtype": "\w+"', f'"dtype": "{dtype}"', config.read_text()))
