"""Rebuild the embedded models from their generated corpora, in minutes on a CPU.

python -m powerflow_lit.pretrain                               # embedded=tiny, in place
python -m powerflow_lit.pretrain embedded=tiny_instruct output=outputs/tiny_instruct
"""

from __future__ import annotations

from pathlib import Path

import hydra
from omegaconf import DictConfig

from powerflow_lit.config import conf_dir
from powerflow_lit.config.checks import typed
from powerflow_lit.config.launching import launch
from powerflow_lit.config.places import check_writable
from powerflow_lit.config.rules import at_least, one_of, positive
from powerflow_lit.config.schema_tools import PretrainConfig
from powerflow_lit.corpora import arithmetic, creative
from powerflow_lit.errors import in_one_line
from powerflow_lit.models.embedded import NAMES, folder_of


def check(config: PretrainConfig) -> None:
    """Raises ConfigError for a value that cannot work."""
    one_of("embedded", config.embedded, NAMES)
    positive(
        {
            "training.lr": config.training.lr,
            f"logit_scale.{config.embedded}": config.logit_scale.get(config.embedded, 0),
        }
    )
    at_least(
        1,
        {
            "threads": config.threads,
            f"steps.{config.embedded}": config.steps.get(config.embedded, 0),
            "training.max_tokens": config.training.max_tokens,
            "training.batch_documents": config.training.batch_documents,
        },
    )
    check_writable("output", config.output or str(folder_of(config.embedded)))


def build(config: PretrainConfig) -> Path:
    """Train the embedded model that the configuration names; returns its folder."""
    import torch
    from rich.progress import Progress

    from powerflow_lit.models.embedded.pretraining import (
        Pretraining,
        encode,
        new_model,
        sharpen,
        train,
    )
    from powerflow_lit.models.embedded.tokenizer import build_tokenizer

    instruct = config.embedded == "tiny_instruct"
    texts = creative.vocabulary_texts() if instruct else arithmetic.vocabulary_texts()
    documents = (
        creative.documents(config.corpus_seed, config.corpus_noise)
        if instruct
        else arithmetic.documents(config.corpus_seed)
    )
    torch.set_num_threads(config.threads)
    torch.use_deterministic_algorithms(True)
    tokenizer = build_tokenizer(texts, instruct=instruct)
    settings = Pretraining(
        **vars(config.shape), **vars(config.training), steps=config.steps[config.embedded],
        seed=config.seed,
    )  # fmt: skip
    model = new_model(settings, tokenizer)
    with Progress() as progress:
        bar = progress.add_task(f"pretraining {config.embedded}", total=settings.steps)
        encoded = encode(tokenizer, documents, settings.max_tokens)
        nats = train(model, encoded, settings, lambda: progress.advance(bar))
    sharpen(model, config.logit_scale[config.embedded])
    folder = Path(config.output) if config.output else folder_of(config.embedded)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"{config.embedded}: {model.num_parameters():,} parameters, {nats:.2f} nats a document")
    return folder


@hydra.main(version_base="1.3", config_path=conf_dir(), config_name="pretrain")
def _main(cfg: DictConfig) -> None:
    with in_one_line():
        config = typed(cfg, PretrainConfig)
        check(config)
        print(f"written to {build(config)}")


def main() -> None:
    """Console script `powerflow-pretrain`."""
    launch(_main, "pretrain")


if __name__ == "__main__":
    main()
