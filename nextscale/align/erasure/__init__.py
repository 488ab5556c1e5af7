"""Taking concepts out of a next-scale model."""
