"""What made files of the repository, and is no part of the package."""
