"""How good samples are: features, distances, the report."""
