"""The face of the farm: REST, the worker routes and the log streams."""
