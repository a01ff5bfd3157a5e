"""What others do for long sequences, written from their descriptions, to be compared with.

All train the same Transformers decoder on the same batch as `models.LanguageModel` does, with parameters sharded by FSDP2 (a group
for each layer), and give the loss and gradients of one device (`tests/test_benchmarks.py`).
"""

from baselines.recipes import BASELINES, Baseline, NotRunError, make_baseline

__all__ = ["BASELINES", "Baseline", "NotRunError", "make_baseline"]
