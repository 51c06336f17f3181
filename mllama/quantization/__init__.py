"""Which weights are quantised how, and what a model takes then."""
