"""What is measured of us, and against whom: `scripts/benchmark` prints it as one table."""
