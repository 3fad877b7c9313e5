"""What a build is, who may run it, and when: the sole writer of state."""
