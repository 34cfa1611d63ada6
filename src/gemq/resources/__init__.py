"""What a job may use and how: memory and where things wait in it, processes, a machine's rates."""
