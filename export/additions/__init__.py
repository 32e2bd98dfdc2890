"""What is put beside a checkpoint or in place of a part of it."""
