"""Rebuild the embedded models from their generated corpora, in minutes on a CPU.

python -m powerflow_lit.pretrain                               # embedded=tiny, in place
python -m powerflow_lit.pretrain embedded=tiny_instruct output=outputs/tiny_instruct
"""

from __future__ import annotations

import sys
from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig
from rich.progress import Progress

from powerflow_lit.config import conf_dir
from powerflow_lit.config.checks import ConfigError, typed
from powerflow_lit.config.schema import PretrainConfig
from powerflow_lit.config.secrets import hide_in_output
from powerflow_lit.corpora import arithmetic, creative
from powerflow_lit.models.embedded import NAMES, folder_of
from powerflow_lit.models.embedded.pretraining import Pretraining, encode, new_model, sharpen, train
from powerflow_lit.models.embedded.tokenizer import build_tokenizer


def build(config: PretrainConfig) -> Path:
    """Train the embedded model that the configuration names; returns its folder."""
    if config.embedded not in NAMES:
        raise ConfigError(f"embedded={config.embedded}: choose one of {', '.join(NAMES)}")
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
    try:
        print(f"written to {build(typed(cfg, PretrainConfig))}")
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def main() -> None:
    """Console script `powerflow-pretrain`."""
    hide_in_output()
    _main()


if __name__ == "__main__":
    main()
