"""The engine of a worker that is itself the sandbox: a build runs in the very container that the worker runs in, once."""
