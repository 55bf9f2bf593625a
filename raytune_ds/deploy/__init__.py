"""One config to the files of a cluster: what a run asks of Ray and what its machines offer agree by construction."""
