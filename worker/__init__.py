"""The worker: claims a build and carries one attempt of it."""
