"""Steps done on the machines of a Ray cluster that share a file system: sessions, the pool of steps, workers."""
