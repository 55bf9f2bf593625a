"""The parts of `raytune_ds.evaluate`: what is asked, how it is scored, and what is said of it."""
