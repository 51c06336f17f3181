"""Fine-tuning on conversations about pictures: a file of them, adapters or all weights, runs that resume."""
