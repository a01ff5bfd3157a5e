"""Random programs over sequences, each run on one device and lowered on simulated ranks, and the two compared."""
