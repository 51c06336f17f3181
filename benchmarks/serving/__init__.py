"""The parts of `benchmarks.serve`: servers and their processor time, a client, load, goals and tables."""
