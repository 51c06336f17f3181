"""Speed of every op and of the model beside its peers: ``python -m benchmarks.run --help``."""
