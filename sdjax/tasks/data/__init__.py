"""Problems from files and data sets: which files a name stands for, bytes to rows, rows to examples, examples to a task."""
