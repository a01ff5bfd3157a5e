"""Train an unmodified LightningModule on sequences too long for one device.

Importing the package registers the strategy names `autosp`, `autosp_spawn`, `autosp_fork` and `autosp_notebook`:

```python
import lightning_autosp
trainer = Trainer(devices=8, strategy="autosp")
```
"""

import sys
from importlib.metadata import version

from lightning.pytorch.strategies import StrategyRegistry

from lightning_autosp.callbacks import ThroughputMonitor
from lightning_autosp.check import CheckError, CheckResult, check
from lightning_autosp.compiler.report import Report, StrictModeError
from lightning_autosp.explain import Explanation
from lightning_autosp.metrics import by_position
from lightning_autosp.strategy import AutoSPStrategy, refuse_pytorch_lightning

__all__ = [
    "AutoSPStrategy",
    "CheckError",
    "CheckResult",
    "Explanation",
    "Report",
    "StrictModeError",
    "ThroughputMonitor",
    "by_position",
    "check",
]
__version__ = version("lightning-autosp")

AutoSPStrategy.register_strategies(StrategyRegistry)

if "pytorch_lightning" in sys.modules:
    _other = sys.modules["pytorch_lightning"].strategies.StrategyRegistry
    for _name in ("autosp", "autosp_spawn", "autosp_fork", "autosp_notebook"):
        if _name not in _other:
            _other.register(_name, refuse_pytorch_lightning, description="For lightning.pytorch only")
