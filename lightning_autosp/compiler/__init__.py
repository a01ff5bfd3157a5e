"""The compiler: capture, plan, emit, compile. Knows nothing of Lightning.

| file            | what it does                                                         |
|-----------------|----------------------------------------------------------------------|
| `capture.py`    | Dynamo's graph, normalised to functional ATen with symbolic shapes   |
| `repeats.py`    | repeated layers are traced once                                      |
| `scalars.py`    | numbers read from tensors stay tensors                               |
| `inline.py`     | checkpoints and vmap in Dynamo's graph                               |
| `flex.py`       | `flex_attention` as scores and a mask                                |
| `written_out.py`| attention that is written out, as the operator it is                 |
| `regions.py`    | attention and its mask as one node                                   |
| `rowwise.py`    | logits and their loss, or an MLP, as one node                        |
| `tiling.py`     | rows of such a node from rows of its inputs                          |
| `layout.py`     | where the sequence is in a tensor and which part each rank owns      |
| `locality.py`   | asks PyTorch whether an operator is local                            |
| `rules/`        | how operators run on shards, one file a family                       |
| `demand.py`     | which form of each value is needed, backwards                        |
| `plan.py`       | what was decided                                                     |
| `emit.py`       | the graph of one rank, forwards                                      |
| `crossing.py`   | values between the pieces of a step that is cut                      |
| `specialise.py` | one program per set of sizes, cached                                 |
| `backend.py`    | AOTAutograd and Inductor                                             |
| `report.py`     | what was done                                                        |
| `simulate.py`   | all ranks in one process                                             |
"""
