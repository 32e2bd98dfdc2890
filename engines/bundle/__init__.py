"""A bundle on disk: files, manifest and records, read strictly, and written so that a killed run breaks nothing."""
