"""What the demo, the benchmarks and tests share: real processes around a server, and their end."""
