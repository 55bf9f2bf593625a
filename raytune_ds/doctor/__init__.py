"""`raytune-ds doctor`: what each node has, what all of a cluster have in common, and what to do where it is wrong."""
