"""What is optimized, by which rule, at which rate; and what watches over the losses."""
