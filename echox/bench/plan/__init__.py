"""Predicts memory, time and traffic of a recipe's step by arithmetic on shapes; it needs no GPU, weights or data."""
