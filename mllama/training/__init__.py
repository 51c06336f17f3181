"""Fine-tuning on conversations about images: a file of them, adapters or all weights, runs that resume."""
