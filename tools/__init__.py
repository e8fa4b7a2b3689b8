"""Tools for developers.  The checkout has them; the installed package does not."""
