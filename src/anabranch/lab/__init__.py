"""The lab: several nodes on one machine, with slow links and slow ranks, from Linux primitives only."""
