"""What PENEX costs: `make bench` runs these and writes docs/performance.md from their results."""
