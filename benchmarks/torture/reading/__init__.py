"""What reads what others wrote: changed documents for each reader, and altered files of whole bundles."""
