"""Run, compare and extend PowerFlow (arXiv 2603.18363) with PyTorch Lightning and Hydra."""

__version__ = "0.1.0"
