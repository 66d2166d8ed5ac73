"""Problems whose answers are programs: sandboxed, run against tests, with feedback that says what failed."""
