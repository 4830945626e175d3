"""What a trained generator has learned: differences, directions, projections, movies, a page."""
