"""From images, texts and conversations to the model's inputs, and from ids back to text."""
