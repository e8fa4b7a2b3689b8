"""The one place the version is written, which pyproject.toml reads, and the oldest torch that this version runs on."""

import torch

__version__ = "0.1.0"

if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11):
    raise ImportError(f"fastlora {__version__} needs torch 2.11 or newer, found torch {torch.__version__}")
