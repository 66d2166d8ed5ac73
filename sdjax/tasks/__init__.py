"""Problems and how to judge answers to them: every factory returns a `sdjax.types.Task`."""
