"""Every engine beside one plain process: the same losses and weights, whatever the engine and the number of workers."""
