"""Training: losses, the loop, whole runs, several processes, files and timing."""
