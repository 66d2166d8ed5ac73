"""Parameters and tokenizers in the files of other libraries, in and out."""
