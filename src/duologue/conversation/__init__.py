"""One spoken conversation: the straight path, the ear, the mouth, the history, and the sessions that join them."""
