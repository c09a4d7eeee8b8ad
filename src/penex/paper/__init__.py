"""The experiments of the PENEX paper (arXiv 2510.02107), and what only they need."""
