"""Agreement between the ranks of a job: consensus, the channel over the store, and the groups built on them."""
