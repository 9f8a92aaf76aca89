"""What is seen of a federation from outside, over HTTP; it reads the store and changes nothing."""
