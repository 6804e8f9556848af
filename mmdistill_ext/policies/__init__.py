"""Small registered classes, each one choice that a method leaves open."""
