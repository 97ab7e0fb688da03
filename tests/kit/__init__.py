"""What several suites share: traffic, made-up recordings and snapshots, machines, a browser."""
