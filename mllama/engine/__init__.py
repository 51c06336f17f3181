"""Many requests through one model: pools of pages and tiles, the prefix index, and the scheduler."""
