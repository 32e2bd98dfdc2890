"""Videos of a bundle with a motion adapter: what is asked for, the frames as pictures of one job, and the command."""
