"""The recipe of the demo model: its tokenizer, configuration, lessons, training and examination."""
