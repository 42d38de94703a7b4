"""What this machine has and can do: CPUs and threads, memory and its nodes, dtypes, measured rates."""
