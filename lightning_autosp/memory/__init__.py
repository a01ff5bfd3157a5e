"""Memory of a step: predicted from the graph that will run, and what is kept for backward chosen by it."""
