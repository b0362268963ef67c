"""The l0 stage: learns which weights or channels are needed, by training random gates."""
