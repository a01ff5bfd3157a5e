"""Rules of your own: how an operator that the package does not know runs on parts of a sequence.

```python
from lightning_autosp.rules import Sharding, bound, register


@register(torch.ops.my_package.normalise.default)
def normalise(facts, node):
    x = bound(node)["x"]
    layout = facts.layout(x)  # how x is cut; None: every rank has the whole
    if layout is None or layout.dim == len(facts.shape(x)) - 1:
        return None  # computed in full, and reported
    return Sharding({x: layout}, layout)  # a part of x gives the same part of the result
```

`Facts` and `Emitter` are what rules are given; collectives with exact gradients are in `lightning_autosp.collectives`.
"""

from lightning_autosp.compiler.emit import Emitter
from lightning_autosp.compiler.layout import Layout
from lightning_autosp.compiler.rule import Facts, Rule, Sharding, bound, tensor_inputs
from lightning_autosp.compiler.rules import register

__all__ = ["Emitter", "Facts", "Layout", "Rule", "Sharding", "bound", "register", "tensor_inputs"]
