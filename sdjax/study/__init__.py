"""Small models from nothing, arms run once, the base model of the study."""
