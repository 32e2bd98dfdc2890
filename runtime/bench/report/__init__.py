"""Results of a benchmark as pages, plots and text."""
