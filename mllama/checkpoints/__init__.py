"""Reading and writing checkpoint folders: the published layouts and Meta's."""
