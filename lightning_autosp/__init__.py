"""Train an unmodified LightningModule on sequences too long for one device.

Importing the package registers the strategy names `autosp`, `autosp_spawn`, `autosp_fork` and `autosp_notebook`:

```python
import lightning_autosp
trainer = Trainer(devices=8, strategy="autosp")
```
"""

from importlib.metadata import version

from lightning.pytorch.strategies import StrategyRegistry

from lightning_autosp.compiler.report import Report, StrictModeError
from lightning_autosp.strategy import AutoSPStrategy

__all__ = ["AutoSPStrategy", "Report", "StrictModeError"]
__version__ = version("lightning-autosp")

AutoSPStrategy.register_strategies(StrategyRegistry)
