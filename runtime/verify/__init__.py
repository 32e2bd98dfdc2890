"""`latentrt verify`: what the engines compute, and every stage of a drawing, held against the float32 graphs."""
